"""The script of the documentation, and the proposal for Megatron that the handler comes from, as they stand."""

from __future__ import annotations

import runpy
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cphandler import get_batch_on_this_cp_rank, get_cp_handler_cls
from cphandler.handler.contract import ContextParallelHandler
from cphandler.testing import RankError, RankPool

pytest.importorskip("megatron.core")

from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.pipeline_parallel import get_forward_backward_func

from cphandler.integrations.megatron import batch_tokens
from tests.integrations.gpt import VOCABULARY, assert_alike, config_of, gpt, mean_over, megatron, packed
from tests.integrations.test_megatron_model import LENGTHS, reference

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


SEEDS = (3, 4)
"""Of two micro-batches of one step."""


def example_case(per_token: bool, wrong: str | None = None) -> None:
    """A step of two micro-batches in Megatron's schedule, then what its DDP and training loop do with what comes."""
    script = runpy.run_path(str(EXAMPLES / "megatron.py"))
    batches = [packed([*LENGTHS, *LENGTHS[:i]], seed) for i, seed in enumerate(SEEDS)]
    with megatron():
        losses, grads, counts = expected_of(batches)
        weights = gpt(config_of()).state_dict()
    share = [count / sum(counts) if per_token else 1 / len(counts) for count in counts]
    expected = {name: sum(s * grad[name] for s, grad in zip(share, grads, strict=True)) for name in grads[0]}
    with megatron(cp=4):
        settings: dict[str, Any] = {"vocab_size": VOCABULARY, "max_sequence_length": 512}
        config = config_of(
            context_parallel_size=4,
            cp_comm_type="a2a+p2p",
            calculate_per_token_loss=per_token,
            pipeline_dtype=torch.float,
        )
        model = script["model_provider"](config, **settings, position_embedding_type="rope")
        model.load_state_dict(weights)
        reports = get_forward_backward_func()(
            forward_step_func=script["forward_step"] if wrong is None else with_function(script, wrong),
            data_iterator=iter(batches),
            model=model,
            num_microbatches=len(batches),
            seq_length=sum(LENGTHS),
            micro_batch_size=1,
        )
        found = mean_over(parallel_state.get_context_parallel_group(), model)
        if per_token:  # DDP adds up, and divides by what the schedule counted
            found = {name: grad * 4 / sum(counts) for name, grad in found.items()}
        for report, loss, count in zip(reports, losses, counts, strict=True):
            total = report["lm loss"].clone()
            dist.all_reduce(total)
            assert total[1] == count
            assert torch.allclose(total[0] / total[1], loss.float(), rtol=1e-5)
        assert_alike(found, expected, "docs/examples/megatron.py")


def expected_of(batches: list[dict[str, Any]]) -> tuple[list[Tensor], list[dict[str, Tensor]], list[float]]:
    """Each micro-batch on one rank: its mean loss, its gradients and its count."""
    losses, grads, counts = [], [], []
    for batch in batches:
        with patch(f"{reference.__module__}.batch_of", lambda *_, batch=batch: batch):
            loss, grad = reference.__wrapped__("packed", False, 0)
        losses.append(loss)
        grads.append(grad)
        counts.append(batch["loss_mask"].sum().item())
    return losses, grads, counts


def with_function(script: dict[str, Any], wrong: str) -> Any:
    """The script's step with another loss function."""

    def own_loop(mask: Tensor, params: Any, losses: Tensor) -> tuple[Any, ...]:
        total = (losses * mask).sum()
        return total / batch_tokens(mask.sum(), params), {"lm loss": torch.stack([total.detach(), mask.sum()])}

    def megatrons(mask: Tensor, params: Any, losses: Tensor) -> tuple[Any, ...]:
        total, count = (losses * mask).sum(), mask.sum()
        return total, count.int(), {"lm loss": torch.stack([total.detach(), count])}

    def step(iterator: Any, model: Any) -> Any:
        losses, function = script["forward_step"](iterator, model)
        return losses, partial(own_loop if wrong == "own loop" else megatrons, *function.args[:2])

    return step


@pytest.mark.parametrize("per_token", [False, True])
def test_the_script_of_the_documentation(ranks: RankPool, per_token: bool) -> None:
    ranks.run(example_case, per_token)


@pytest.mark.parametrize("wrong", ["own loop", "megatron's"])
def test_other_loss_functions_are_found_wrong(ranks: RankPool, wrong: str) -> None:
    with pytest.raises(RankError, match=r"docs/examples/megatron\.py: "):
        ranks.run(example_case, False, wrong)


class ProposedRotaryEmbedding(RotaryEmbedding):
    """The whole table, of which the handler takes this rank's rows."""

    def forward(self, cp_handler: ContextParallelHandler) -> Tensor:
        return cp_handler.get_emb_on_this_cp_rank(self.get_emb(cp_handler.get_rotary_seq_len()))  # type: ignore[no-any-return]


class ProposedAttention(nn.Module):
    def __init__(self, config: Any, layer_number: int) -> None:
        super().__init__()
        self.config, self.layer_number = config, layer_number
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def forward(self, hidden: Tensor, freqs: Tensor, cp_handler: ContextParallelHandler) -> Tensor:
        heads = self.qkv(hidden).unflatten(-1, (3, self.config.num_attention_heads, -1))
        query, key, value = heads.unbind(-3)
        query, key = (cp_handler.apply_rotary_pos_emb(x, freqs, self.config) for x in (query, key))
        out: Tensor = cp_handler.core_attn(None, query, key, value, layer_number=self.layer_number)
        return hidden + out.flatten(-2)


class ProposedModel(nn.Module):
    """``forward(tokens, cp_handler=...)``, and nothing else of it knows of ranks."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, config.hidden_size)
        self.rotary = ProposedRotaryEmbedding(config.kv_channels, 1.0, use_cpu_initialization=True)
        self.layers = nn.ModuleList(ProposedAttention(config, number) for number in (1, 2))
        self.head = nn.Linear(config.hidden_size, VOCABULARY)

    def forward(self, tokens: Tensor, *, cp_handler: ContextParallelHandler) -> Tensor:
        hidden, freqs = self.embedding(tokens), self.rotary(cp_handler)
        for layer in self.layers:
            hidden = layer(hidden, freqs, cp_handler)
        logits: Tensor = self.head(hidden)
        return logits


def get_batch(batch: dict[str, Any], backend: str, group: Any) -> tuple[dict[str, Any], ContextParallelHandler]:
    """As proposed: the handler is made beside the batch, and both go to the model."""
    handler_cls = get_cp_handler_cls(backend)
    cp_handler = handler_cls(cp_group=group, qkv_format="thd", cu_seqlens_q=batch["cu_seqlens"])
    rows = {key: value[0] for key, value in batch.items() if key != "cu_seqlens"}
    return get_batch_on_this_cp_rank(rows, cp_handler=cp_handler), cp_handler


def proposal_case() -> None:
    with megatron(cp=4):
        group = parallel_state.get_context_parallel_group()
        grads = {}
        for backend in ("local", "ring", "ulysses", "usp"):
            torch.manual_seed(5)
            model = ProposedModel(config_of())
            local, cp_handler = get_batch(packed(LENGTHS, 3), backend, None if backend == "local" else group)
            logits = model(local["tokens"], cp_handler=cp_handler)
            losses = nn.functional.cross_entropy(logits, local["labels"].clamp_min(0), reduction="none")
            (losses * local["loss_mask"]).sum().backward()
            found = mean_over(group, model)
            scale = 1 if backend == "local" else 4
            grads[backend] = {name: grad * scale for name, grad in found.items()}
        for backend in ("ring", "ulysses", "usp"):
            assert_alike(grads[backend], grads["local"], backend)


def test_the_proposals_own_example(ranks: RankPool) -> None:
    ranks.run(proposal_case)
