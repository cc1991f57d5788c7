"""Small Megatron models on CPU, and what has to be patched of Megatron for that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor
from torch.nn.functional import pad

from cphandler import pack_documents
from cphandler.handler.contract import ContextParallelHandler

VOCABULARY = 64


class _NoTracker:
    """Stands in for the tracker of CUDA's random states."""

    def fork(self, name: str = "") -> Any:
        del name
        return nullcontext()

    def get_states(self) -> dict[str, Any]:
        return {}

    def set_states(self, states: dict[str, Any]) -> None:
        del states


def zigzag_rows(pos_emb: Tensor, seq_dim: int, cp_group: Any) -> Tensor:
    """Megatron's zigzag slice of a rope table; its own goes through pinned memory to CUDA."""
    size, rank = cp_group.size(), cp_group.rank()
    chunks = pos_emb.chunk(2 * size, dim=seq_dim)
    return torch.cat([chunks[rank], chunks[2 * size - rank - 1]], dim=seq_dim)


def _norm(config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.LayerNorm:
    """Torch's norm; Megatron's wrapper of it refuses sequence parallel, whose gradients the test adds up itself."""
    made = torch.nn.LayerNorm(hidden_size, eps=eps)
    for parameter in made.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return made


_zeros = torch.zeros


def _zeros_here(*shape: Any, device: Any = None, **settings: Any) -> Tensor:
    """What a schedule counts tokens in is made on ``"cuda"``."""
    return _zeros(*shape, device=None if device == "cuda" else device, **settings)


def _patches() -> dict[str, Any]:
    """Every name of Megatron, or that Megatron asks of torch, which has no meaning without CUDA."""
    rotary = "megatron.core.models.common.embeddings"
    states = "megatron.core.tensor_parallel.random"
    return {
        "torch.cuda.current_device": lambda: torch.device("cpu"),
        "megatron.core.pipeline_parallel.schedules.torch.zeros": _zeros_here,
        "megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__": lambda _, *given, **named: _norm(
            *given, **named
        ),
        "megatron.core.transformer.multi_latent_attention.HAVE_TE": False,  # True without it, and its classes None
        f"{states}.get_cuda_rng_tracker": _NoTracker,
        f"{states}._get_cuda_rng_state": lambda *_, **__: None,
        f"{states}._set_cuda_rng_state": lambda *_, **__: None,
        f"{rotary}.rotary_pos_embedding.get_pos_emb_on_this_cp_rank": zigzag_rows,
        f"{rotary}.yarn_rotary_pos_embedding.get_pos_emb_on_this_cp_rank": zigzag_rows,
        "megatron.core.transformer.dot_product_attention.tensor_parallel.get_cuda_rng_tracker": _NoTracker,
        f"{rotary}.language_model_embedding.tensor_parallel.get_cuda_rng_tracker": _NoTracker,
        "megatron.core.transformer.multi_token_prediction.tensor_parallel.get_cuda_rng_tracker": _NoTracker,
        "megatron.core.transformer.transformer_block.tensor_parallel.get_cuda_rng_tracker": _NoTracker,
    }


@contextmanager
def _groups_that_end() -> Iterator[None]:
    """What is made of groups inside is no more afterwards.

    Megatron makes dozens and forgets them: their threads would stay, thousands of them, each awake every ten
    milliseconds.
    """
    made: list[Any] = []
    new_group = dist.new_group

    def kept(*given: Any, **named: Any) -> Any:
        made.append(new_group(*given, **named))
        return made[-1]

    with patch("torch.distributed.new_group", kept):
        yield
    dist.barrier()  # not reached after an error: the pool then ends all ranks
    for group in made:
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)


@contextmanager
def megatron(*, tp: int = 1, cp: int = 1) -> Iterator[None]:
    """Megatron's parallel state over all ranks of the pool, and the patches; both are undone."""
    with ExitStack() as stack:
        for name, replacement in _patches().items():
            stack.enter_context(patch(name, replacement))
        stack.enter_context(_groups_that_end())
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp, context_parallel_size=cp, create_gloo_process_groups=False
        )
        stack.callback(parallel_state.destroy_model_parallel)
        yield


MLA = {
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
    "rope_type": "rope",
    "num_query_groups": 4,
}


def config_of(**settings: Any) -> Any:
    if settings.get("multi_latent_attention"):
        settings = MLA | settings
    return (MLATransformerConfig if settings.get("multi_latent_attention") else TransformerConfig)(
        **{
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "kv_channels": 8,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "use_cpu_initialization": True,
            "gradient_accumulation_fusion": False,
            "bias_activation_fusion": False,
            "masked_softmax_fusion": False,
            **settings,
        }
    )


def gpt(config: Any, spec: Callable[[Any], Any] = lambda spec: spec, **arguments: Any) -> Any:
    """A GPTModel from the local spec; the same weights for the same seed, whatever the ranks."""
    layer = spec(get_gpt_layer_local_spec(multi_latent_attention=config.multi_latent_attention))
    mtp = get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False) if config.mtp_num_layers else None
    torch.manual_seed(7)
    model = GPTModel(
        config,
        layer,
        VOCABULARY,
        max_sequence_length=512,
        position_embedding_type="rope",
        mtp_block_spec=mtp,
        **arguments,
    )
    randomize(model)
    return model


class DenseAttention(MegatronModule):
    """Causal attention over a score matrix: Megatron's own for CPUs has no value channels of their own."""

    def __init__(self, config: Any, layer_number: int, *_: Any, softmax_scale: float, **__: Any) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **_: Any) -> Tensor:
        scores = torch.einsum("sbnd,tbnd->bnst", query, key) * self.softmax_scale
        weights = scores.masked_fill(mask, float("-inf")).softmax(-1)
        return torch.einsum("bnst,tbnd->sbnd", weights, value).flatten(2)


def dense_spec(layer: Any) -> Any:
    """A spec of multi-latent attention over :class:`DenseAttention`; other specs as they are."""
    if layer.submodules.self_attention.module is MLASelfAttention:
        layer.submodules.self_attention.submodules.core_attention = DenseAttention
    return layer


def randomize(model: Any) -> None:
    """Weights that matter: biases and norms are not 0 and 1."""
    generator = torch.Generator().manual_seed(11)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def packed(lengths: Sequence[int], seed: int) -> dict[str, Any]:
    """A packed batch in Megatron's shapes ``[1, T]``: labels are the next tokens, a third of them does not count."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in lengths]
    made = pack_documents(tokens)
    labels = made["labels"].clamp_min(0)
    mask = (made["labels"] >= 0) & (torch.rand(labels.shape, generator=generator) > 0.3)
    batch = {
        "tokens": made["tokens"],
        "labels": labels,
        "loss_mask": mask.float(),
        "position_ids": made["position_ids"],
    }
    return {key: value[None] for key, value in batch.items()} | {"cu_seqlens": made["cu_seqlens"]}


def padded(batch: dict[str, Any], multiple: int) -> dict[str, Any]:
    """The same documents, each padded at its end: pads hold tokens that would change the loss if anything read them."""
    cuts = batch["cu_seqlens"].tolist()
    lengths = [b - a for a, b in pairwise(cuts)]
    physical = [-(-n // multiple) * multiple for n in lengths]
    fill = {"tokens": 9, "labels": 9, "loss_mask": 0.0, "position_ids": 0}
    made: dict[str, Any] = {}
    for key, value in fill.items():
        pieces = [batch[key][:, a:b] for a, b in pairwise(cuts)]
        ends = [(0, m - n) for m, n in zip(physical, lengths, strict=True)]
        made[key] = torch.cat([pad(x, end, value=value) for x, end in zip(pieces, ends, strict=True)], dim=1)
    offsets = torch.tensor([0, *physical]).cumsum(0).to(torch.int32)
    return made | {"cu_seqlens": batch["cu_seqlens"], "cu_seqlens_padded": offsets}


def dense(rows: int, length: int, seed: int) -> dict[str, Any]:
    """A dense batch ``[B, S]``, with less and less that counts towards the end."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (rows, length + 1), generator=generator)
    mask = torch.rand(rows, length, generator=generator) > torch.linspace(0, 0.9, length)
    mask[:, -1] = False
    positions = torch.arange(length).expand(rows, length)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask.float(), "position_ids": positions}


def causal_mask(length: int) -> Tensor:
    """Megatron's: True where a token is not seen."""
    return torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)


def mean_over(group: Any, model: Any) -> dict[str, Tensor]:
    """Gradients as Megatron's DDP leaves them: the mean over the ranks of a group."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        if group is not None:
            dist.all_reduce(grad, group=group)
            grad /= dist.get_world_size(group)
        found[name] = grad
    return found


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor], what: str, bound: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        error = (found[name] - grad).norm() / grad.norm().clamp_min(1e-12)
        assert error < bound, f"{what}: {name} {error:.2e}"


def loss_of(out: Tensor, mask: Tensor, tokens: Tensor | float) -> Tensor:
    """Token losses to one number, by Megatron's convention: gradients are averaged over ranks afterwards."""
    return (out.float() * mask).sum() / tokens


def total_over(handler: ContextParallelHandler, value: Tensor) -> Tensor:
    total = value.detach().clone()
    if handler.cp_size > 1:
        dist.all_reduce(total, group=handler.group)
    return total
