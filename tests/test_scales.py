"""The factor of each gradient convention, against one rank, by engines written from their definitions."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cphandler import (
    InvalidValueError,
    get_cp_handler_cls,
    language_model_loss,
    loss_scale,
    next_token_labels,
    token_count,
)
from cphandler.testing import RankPool, partition_group

CONTEXT = {2: ((0, 1), (2, 3)), 4: ((0, 1, 2, 3),), 1: ((0,), (1,), (2,), (3,))}
DATA = {2: ((0, 2), (1, 3)), 4: ((0,), (1,), (2,), (3,)), 1: ((0, 1, 2, 3),)}
OFFSETS = [0, 13, 14, 20, 29, 33]
MICRO_BATCHES = 2
WORDS = 11


def batch(data_rank: int, micro_batch: int) -> tuple[Tensor, Tensor]:
    """Tokens, and which of them count as labels: very different numbers in each batch."""
    generator = torch.Generator().manual_seed(10 * data_rank + micro_batch)
    ids = torch.randint(0, WORDS, (OFFSETS[-1],), generator=generator)
    keep = torch.rand(OFFSETS[-1], generator=generator) < (0.1, 0.8, 0.4, 0.95)[(data_rank + 3 * micro_batch) % 4]
    return ids, keep


def whole_step(table: Tensor, data_ranks: int) -> Tensor:
    """The gradient of one rank that has all batches."""
    weight = table.clone().requires_grad_()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for data_rank, micro_batch in itertools.product(range(data_ranks), range(MICRO_BATCHES)):
        ids, keep = batch(data_rank, micro_batch)
        labels = torch.full_like(ids, -100)
        for start, end in itertools.pairwise(OFFSETS):
            labels[start : end - 1] = ids[start + 1 : end]
        labels = labels.masked_fill(~keep, -100)
        total = total + torch.nn.functional.cross_entropy(weight[ids], labels, reduction="sum")
        count += int((labels >= 0).sum())
    (grad,) = torch.autograd.grad(total / count, weight)
    return grad


def step(cp_size: int, layout: str | None, convention: str, scale: float | None = None) -> float:
    """How far the reduced gradient of a step is from one rank's; ``scale`` in place of the right one."""
    context, data = partition_group(CONTEXT[cp_size]), partition_group(DATA[cp_size])
    assert context is not None
    assert data is not None
    cp, dp = context.size(), data.size()
    backend = "ulysses" if layout == "replicated" else "ring"
    handler = get_cp_handler_cls(backend)(cp_group=context, qkv_format="thd", cu_seqlens_q=OFFSETS, layout=layout)
    table = torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = table.clone().requires_grad_()
    locals_ = []
    for micro_batch in range(MICRO_BATCHES):
        ids, keep = batch(dist.get_rank(data), micro_batch)
        local = handler.dispatch(ids, 0)
        kept = handler.dispatch(keep, 0, pad_value=False)
        locals_.append((local, next_token_labels(local, handler).masked_fill(~kept, -100)))
    factor = scale
    if factor is None:
        factor = loss_scale(convention, handler, group=data, num_micro_batches=MICRO_BATCHES)  # type: ignore[arg-type]
    count = sum(int(token_count(labels, handler, data)) for _, labels in locals_)
    if convention == "huggingface":  # each process counts the batch, those that share one too
        count *= cp
    for local, labels in locals_:
        options: dict[str, Any] = {"num_tokens": count}
        if convention == "megatron_per_token":
            options = {"reduction": "token_sum"}
        loss = language_model_loss(weight[local], labels, handler, group=data, **options) * factor
        if convention == "megatron":  # schedules.py, a loss function of two values
            loss = loss * cp / MICRO_BATCHES
        if convention == "huggingface":
            loss = loss * cp * dp
        loss.backward()
    own = torch.stack([(labels >= 0).sum() for _, labels in locals_]).sum()
    grad = reduced(weight.grad, convention, context, data, own)  # type: ignore[arg-type]
    wanted = whole_step(table, dp)
    return float((grad - wanted).norm() / wanted.norm())


def reduced(grad: Tensor, convention: str, context: Any, data: Any, own_tokens: Tensor) -> Tensor:
    """What each engine does to gradients."""
    dist.all_reduce(grad, group=context)
    dist.all_reduce(grad, group=data)
    if convention in ("mean", "megatron", "huggingface"):
        return grad / context.size() / data.size()
    if convention == "sum_over_cp_mean_over_dp":
        return grad / data.size()
    if convention == "megatron_per_token":  # finalize_model_grads
        dist.all_reduce(own_tokens, group=context)
        dist.all_reduce(own_tokens, group=data)
        return grad / own_tokens
    return grad


CONVENTIONS = ("sum", "sum_over_cp_mean_over_dp", "mean", "megatron", "megatron_per_token", "huggingface")


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_reduced_gradients_are_one_ranks(ranks: RankPool, convention: str) -> None:
    for cp_size in (1, 2, 4):
        for layout in ("zigzag", "balanced", "replicated") if cp_size > 1 else (None,):
            assert max(ranks.run(step, cp_size, layout, convention)) < 1e-12, (cp_size, layout)


WRONG = [
    ("mean", 2, "zigzag", 1.0, 0.75),  # the factors of both groups forgotten
    ("mean", 4, "zigzag", 1.0, 0.75),
    ("mean", 2, "zigzag", 2.0, 0.5),  # cp_size alone
    ("mean", 2, "replicated", 4.0, 1.0),  # the number of ranks where each has the whole gradient
    ("sum", 4, "replicated", 1.0, 3.0),
    ("megatron", 2, "zigzag", 4.0, 1.0),  # cp_size once more, beside the schedule's own
]


@pytest.mark.parametrize(("convention", "cp_size", "layout", "factor", "off"), WRONG)
def test_factors_that_are_easily_taken_instead(
    ranks: RankPool, convention: str, cp_size: int, layout: str, factor: float, off: float
) -> None:
    """What they cost: a direction that is right and a length that is not, which no optimizer with Adam shows."""
    found = ranks.run(step, cp_size, layout, convention, factor * (MICRO_BATCHES if convention == "megatron" else 1))
    assert all(error == pytest.approx(off, rel=1e-9) for error in found)


def test_what_is_refused() -> None:
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 3])
    with pytest.raises(InvalidValueError, match=re.escape("unknown convention; got 'ddp'; choose sum, sum_over_cp_")):
        loss_scale("ddp", handler)  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match="num_micro_batches must be at least 1"):
        loss_scale("megatron", handler, num_micro_batches=0)
    assert loss_scale("mean", handler) == 1
