"""What is easily written in place of the right way, and what it costs: the table of docs/training.md, measured."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cphandler import (
    ContextParallelHandler,
    get_cp_handler_cls,
    language_model_loss,
    loss_scale,
    next_token_labels,
    reduce_token_loss,
    sum_over_tokens,
    token_count,
    token_log_probs,
)
from cphandler.demo.model import GPT, GPTConfig
from cphandler.testing import RankPool, partition_group

CONTEXT = {1: ((0,), (1,), (2,), (3,)), 2: ((0, 1), (2, 3)), 4: ((0, 1, 2, 3),)}
OFFSETS = [0, 31, 32, 75, 110, 128]
CONFIG = GPTConfig(vocabulary=64, layers=2, width=32, heads=4, kv_heads=2, hidden=48)


class Positioned:
    """A handler whose rope rows are chosen by local rows in place of positions."""

    def __init__(self, handler: ContextParallelHandler) -> None:
        self._handler = handler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handler, name)

    def get_emb_on_this_cp_rank(self, table: Tensor) -> Tensor:
        return table[torch.arange(self._handler.num_local_tokens) % len(table)]


class Alone(Positioned):
    """A handler around a model that kept its own attention over what is here."""

    def get_emb_on_this_cp_rank(self, table: Tensor) -> Tensor:
        return self._handler.get_emb_on_this_cp_rank(table)

    def core_attn(self, module: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turned = (x.transpose(0, 1) for x in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(*turned, is_causal=True, enable_gqa=True)
        return out.transpose(0, 1)


def tokens_and_mask() -> tuple[Tensor, Tensor]:
    """A packed batch, of which the first 40 in 100 tokens are prompts that are not learned."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, CONFIG.vocabulary, (OFFSETS[-1],), generator=generator)
    return ids, torch.arange(OFFSETS[-1]) >= int(0.4 * OFFSETS[-1])


def labels_of(handler: ContextParallelHandler) -> Tensor:
    ids, learned = tokens_and_mask()
    local = handler.dispatch(ids, 0)
    return next_token_labels(local, handler).masked_fill(~handler.dispatch(learned, 0, pad_value=False), -100)


def plain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


def right(model: GPT, ids: Tensor, handler: ContextParallelHandler) -> Tensor:
    loss = language_model_loss(model(ids, cp_handler=handler), labels_of(handler), handler)
    return loss * loss_scale("mean", handler)


def means_of_means(model: GPT, ids: Tensor, handler: ContextParallelHandler) -> Tensor:
    labels = labels_of(handler)
    return plain_loss(model(ids, cp_handler=handler), labels) / (labels >= 0).sum().clamp(min=1)


def factor_forgotten(model: GPT, ids: Tensor, handler: ContextParallelHandler) -> Tensor:
    return language_model_loss(model(ids, cp_handler=handler), labels_of(handler), handler)


def shifted_after_the_cut(model: GPT, ids: Tensor, handler: ContextParallelHandler) -> Tensor:
    whole, learned = tokens_and_mask()
    own = handler.dispatch(torch.where(learned, whole, -100), 0, pad_value=-100)
    labels = torch.cat([own[1:], own.new_full((1,), -100)])
    loss = plain_loss(model(ids, cp_handler=handler), labels) / token_count(labels, handler)
    return loss * handler.cp_size


def positions_forgotten(model: GPT, ids: Tensor, handler: ContextParallelHandler) -> Tensor:
    around: Any = Positioned(handler)
    return language_model_loss(model(ids, cp_handler=around), labels_of(handler), handler) * handler.cp_size


def attention_left_alone(model: GPT, ids: Tensor, handler: ContextParallelHandler) -> Tensor:
    around: Any = Alone(handler)
    return language_model_loss(model(ids, cp_handler=around), labels_of(handler), handler) * handler.cp_size


def own_count_in_an_auxiliary_loss(model: GPT, ids: Tensor, handler: ContextParallelHandler) -> Tensor:
    """The tokens two ahead, over this rank's own number of them, beside a right main loss."""
    logits = model(ids, cp_handler=handler)
    labels = next_token_labels(ids, handler, depths=2)[1].masked_fill(labels_of(handler) < 0, -100)
    auxiliary = plain_loss(logits, labels) / (labels >= 0).sum().clamp(min=1)
    return right(model, ids, handler) + auxiliary


def balance_of_a_rank(model: GPT, ids: Tensor, handler: ContextParallelHandler) -> Tensor:
    """A product of means, as a router's balance is, over the rows of each rank."""
    p = model(ids, cp_handler=handler).softmax(-1)
    return (p.mean(0) ** 2).sum() * CONFIG.vocabulary


def balance(model: GPT, ids: Tensor, handler: ContextParallelHandler) -> Tensor:
    p = model(ids, cp_handler=handler).softmax(-1) * handler.valid_mask.unsqueeze(-1)
    sums = sum_over_tokens(p.sum(0), handler) / OFFSETS[-1]
    return (sums**2).sum() * CONFIG.vocabulary * loss_scale("mean", handler)


def auxiliary(model: GPT, ids: Tensor, handler: ContextParallelHandler) -> Tensor:
    labels = next_token_labels(ids, handler, depths=2)[1].masked_fill(labels_of(handler) < 0, -100)
    values = token_log_probs(model(ids, cp_handler=handler), labels)
    assert isinstance(values, Tensor)
    extra = reduce_token_loss(-values, labels >= 0, handler) * loss_scale("mean", handler)
    return right(model, ids, handler) + extra


Loss = Callable[[GPT, Tensor, ContextParallelHandler], Tensor]

WAYS: dict[str, tuple[Loss, Loss]] = {
    "the functions of this page": (right, right),
    "a mean over each rank's own tokens, averaged": (means_of_means, right),
    "the factor of the average forgotten": (factor_forgotten, right),
    "labels shifted after the cut": (shifted_after_the_cut, right),
    "rope by local rows": (positions_forgotten, right),
    "the model's own attention left in": (attention_left_alone, right),
    "an auxiliary loss over a rank's own tokens": (own_count_in_an_auxiliary_loss, auxiliary),
    "a router's balance over a rank's own tokens": (balance_of_a_rank, balance),
}
"""Each way, and the right one of the same loss."""


def gradient(loss: Loss, size: int) -> Tensor:
    """All parameters', averaged over ranks as DDP and FSDP do."""
    group = partition_group(CONTEXT[size])
    torch.manual_seed(1)
    model = GPT(CONFIG).double()
    handler = get_cp_handler_cls("ring")(cp_group=group, qkv_format="thd", cu_seqlens_q=OFFSETS)
    loss(model, handler.dispatch(tokens_and_mask()[0], 0), handler).backward()
    whole = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )
    dist.all_reduce(whole, group=group)
    return whole / size


def off(name: str, size: int) -> float:
    wrong, meant = WAYS[name]
    wanted = gradient(meant, 1)
    return float((gradient(wrong, size) - wanted).norm() / wanted.norm())


def table() -> dict[str, list[str]]:
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| ([\d.e-]+) \| ([\d.e-]+) \|", page, flags=re.MULTILINE)
    return {name: numbers for name, *numbers in rows}


@pytest.mark.parametrize("name", WAYS)
def test_what_a_way_costs(ranks: RankPool, name: str) -> None:
    """Relative error of the gradient on 2 and on 4 ranks; nothing raises."""
    for size, written in zip((2, 4), table()[name], strict=True):
        found = max(ranks.run(off, name, size))
        if name == "the functions of this page":
            assert found < 1e-12
            continue
        assert found == pytest.approx(float(written), rel=0.06), (size, found)
        assert found > 1e-3
