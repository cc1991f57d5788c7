"""The script of the documentation, and the proposal for Megatron that the handler comes from, as they stand."""

from __future__ import annotations

import runpy
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cphandler import get_batch_on_this_cp_rank, get_cp_handler_cls
from cphandler.handler.contract import ContextParallelHandler
from cphandler.testing import RankPool

pytest.importorskip("megatron.core")

from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from tests.integrations.gpt import VOCABULARY, assert_alike, config_of, gpt, mean_over, megatron, packed
from tests.integrations.test_megatron_model import LENGTHS, reference

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def example_case() -> None:
    """Two steps' worth of gradients from one batch: the mean is the reference's."""
    script = runpy.run_path(str(EXAMPLES / "megatron.py"))
    with megatron():
        expected, grads = reference("packed", False, 3)
        weights = gpt(config_of()).state_dict()
    with megatron(cp=4):
        config = config_of(context_parallel_size=4, cp_comm_type="a2a+p2p")
        settings = {"vocab_size": VOCABULARY, "max_sequence_length": 512, "position_embedding_type": "rope"}
        model = script["model_provider"](config, **settings)
        model.load_state_dict(weights)
        iterator = repeat(packed(LENGTHS, 3))
        losses = [script["forward_step"](iterator, model) for _ in range(2)]
        for loss in losses:
            loss.backward()
            total = loss.detach().clone()
            dist.all_reduce(total)
            assert torch.allclose(total.float() / 4, expected, rtol=1e-5)
        found = mean_over(parallel_state.get_context_parallel_group(), model)
        assert_alike({name: grad / 2 for name, grad in found.items()}, grads, "docs/examples/megatron.py")


def test_the_script_of_the_documentation(ranks: RankPool) -> None:
    ranks.run(example_case)


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
