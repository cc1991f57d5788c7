"""Metrics that do not change with the number of ranks, in training and in an evaluation between two steps of it."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cphandler import (
    InvalidTypeError,
    InvalidValueError,
    gather_last_tokens,
    get_cp_handler_cls,
    language_model_loss,
    next_token_labels,
    reduce_token_loss,
    sum_over_tokens,
    token_accuracy,
    token_count,
    token_histogram,
    token_log_probs,
    token_mean,
)
from cphandler.comm.groups import Place
from cphandler.testing import RankPool, partition_group
from cphandler.training.reductions import REDUCTIONS


def test_a_group_that_cannot_communicate_gives_no_parts_of_sums() -> None:
    apart = get_cp_handler_cls("ring")(cp_group=Place(4, 1), qkv_format="thd", cu_seqlens_q=[0, 16])
    alone = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 4])
    labels, values = torch.zeros(4, dtype=torch.int64), torch.ones(4)
    calls: list[tuple[str, Any]] = [
        ("token_count", lambda handler, **group: token_count(labels, handler, **group)),
        ("sum_over_tokens", lambda handler, **group: sum_over_tokens(values, handler, **group)),
        ("token_mean", lambda handler, **group: token_mean(values, labels >= 0, handler, **group)),
    ]
    for reduction in REDUCTIONS:
        divisor = {"normalizer": 1.0} if reduction == "fixed" else {}
        told = {"reduction": reduction, **divisor}
        calls.append(
            (reduction, lambda handler, t=told, **group: reduce_token_loss(values, labels >= 0, handler, **t, **group))
        )
    for _, call in calls:
        with pytest.raises(InvalidValueError, match="cannot communicate"):
            call(apart)
        with pytest.raises(InvalidValueError, match="cannot communicate"):
            call(alone, group=Place(2, 0))
        assert torch.equal(call(alone, group=Place(1, 0)), call(alone))
    with pytest.raises(InvalidValueError, match="cannot communicate"):
        gather_last_tokens(values, apart)


CONTEXT = {2: ((0, 2), (1, 3)), 3: ((1, 2, 3),), 4: ((0, 1, 2, 3),)}
DATA = ((0, 1), (2, 3))
EDGES = [-12.0, -4.0, -2.5, -1.0, 0.0]


def batch(kind: str, seed: int = 0) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """Offsets, tokens, logits in float64 and which labels count."""
    lengths = {"some": [7, 1, 12, 5], "a document of one": [1], "all masked": [9, 4], "one token": [5, 8, 3]}[kind]
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 6, (offsets[-1],), generator=generator)
    logits = 2 * torch.randn(offsets[-1], 6, generator=generator, dtype=torch.float64)
    keep = torch.rand(offsets[-1], generator=generator) < 0.8
    if kind == "all masked":
        keep[:] = False
    if kind == "one token":
        keep[:] = torch.arange(len(keep)) == 6
    return offsets, ids, logits, keep


def by_hand(kind: str, seeds: list[int]) -> dict[str, Any]:
    """On one rank, from the definitions, over several batches at once."""
    chosen, right = [], []
    for seed in seeds:
        offsets, ids, logits, keep = batch(kind, seed)
        for start, end in pairwise(offsets):
            for t in range(start, end - 1):
                if keep[t]:
                    chosen.append(float(logits[t].log_softmax(-1)[ids[t + 1]]))
                    right.append(int(logits[t].argmax()) == int(ids[t + 1]))
    counts = [0] * 4
    for value in chosen:
        for i, (low, high) in enumerate(pairwise(EDGES)):
            counts[i] += low <= value < high or (i == 3 and value == high)
    number = len(chosen)
    return {
        "count": number,
        "mean": sum(chosen) / max(1, number),
        "accuracy": sum(right) / max(1, number),
        "histogram": counts,
    }


def measured(size: int, layout: str, kind: str, spread: bool = False) -> dict[str, Any] | None:
    group = partition_group(CONTEXT[size])
    if group is None:
        return None
    data = partition_group(DATA) if spread else None
    seed = dist.get_rank(data) if data is not None else 0
    offsets, ids, logits, keep = batch(kind, seed)
    backend = "ulysses" if layout == "replicated" else "ring"
    handler = get_cp_handler_cls(backend)(cp_group=group, qkv_format="thd", cu_seqlens_q=offsets, layout=layout)
    local = handler.dispatch(ids, 0)
    labels = next_token_labels(local, handler)
    labels = labels.masked_fill(~handler.dispatch(keep, 0, pad_value=False), -100)
    scores = token_log_probs(handler.dispatch(logits, 0, pad_value=float("nan")), labels, return_top1=True)
    mask = labels >= 0
    return {
        "count": int(token_count(labels, handler, data)),
        "mask count": int(token_count(mask, handler, data)),
        "mean": float(token_mean(scores.log_probs, mask, handler, data)),
        "accuracy": float(token_accuracy(scores.top1, labels, handler, data)),
        "histogram": token_histogram(scores.log_probs, mask, handler, edges=EDGES, group=data).tolist(),
    }


@pytest.mark.parametrize("kind", ["some", "a document of one", "all masked", "one token"])
def test_metrics_are_one_ranks(ranks: RankPool, kind: str) -> None:
    for size, layout in ((2, "zigzag"), (2, "balanced"), (3, "contiguous"), (4, "zigzag"), (4, "replicated")):
        for spread in (False, True) if size == 2 else (False,):
            wanted = by_hand(kind, [0, 1] if spread else [0])
            for found in filter(None, ranks.run(measured, size, layout, kind, spread)):
                assert found.pop("mask count") == wanted["count"]
                mean = found.pop("mean")
                assert mean == pytest.approx(wanted["mean"], rel=1e-12, abs=1e-12)
                assert found == {key: wanted[key] for key in found}, (size, layout, spread)


def between_steps(size: int) -> list[float]:
    """Losses of a step, two evaluations of other lengths and formats without gradients, and the step again."""
    group = partition_group(CONTEXT[size]) if size > 1 else None
    if size > 1 and group is None:
        return []
    table = torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    seen = []

    def train() -> None:
        offsets, ids, _, _ = batch("some", 4)
        handler = get_cp_handler_cls("ring")(cp_group=group, qkv_format="thd", cu_seqlens_q=offsets)
        local = handler.dispatch(ids, 0)
        loss = language_model_loss(table[local], next_token_labels(local, handler), handler)
        (grad,) = torch.autograd.grad(loss, table)
        if size > 1:
            dist.all_reduce(grad, group=group)
        seen.extend([float(loss.detach()), float(grad.norm())])

    def evaluate(rows: int, length: int) -> None:
        ids = torch.randint(0, 6, (rows, length), generator=torch.Generator().manual_seed(length))
        handler = get_cp_handler_cls("ulysses")(cp_group=group, qkv_format="bshd", max_seqlen_q=length)
        local = handler.dispatch(ids, 1)
        labels = next_token_labels(local, handler)
        with torch.no_grad():
            seen.append(float(language_model_loss(table[local], labels, handler)))
        seen.append(float(token_count(labels, handler)))

    train()
    for rows, length in ((1, 5), (3, 13)):
        evaluate(rows, length)
    with torch.inference_mode():
        offsets, ids, _, _ = batch("a document of one")
        handler = get_cp_handler_cls("ring")(cp_group=group, qkv_format="thd", cu_seqlens_q=offsets)
        local = handler.dispatch(ids, 0)
        seen.append(float(language_model_loss(table[local], next_token_labels(local, handler), handler)))
    train()
    return seen


def test_an_evaluation_between_two_steps(ranks: RankPool) -> None:
    wanted = between_steps(1)
    assert wanted[:2] == wanted[-2:]
    for size in (2, 3, 4):
        for found in filter(None, ranks.run(between_steps, size)):
            assert found == pytest.approx(wanted, rel=1e-12)


ONE: Any = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 4])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: token_count(torch.ones(4), ONE), InvalidTypeError, "labels_or_mask must be integers or bool"),
        (lambda: token_count(torch.ones(3).bool(), ONE), InvalidValueError, "L = 4; got shape [3]"),
        (lambda: token_mean(torch.ones(4), torch.ones(3), ONE), InvalidValueError, "mask must have the shape"),
        (
            lambda: token_histogram(torch.ones(4), torch.ones(4), ONE, edges=[1, 1]),
            InvalidValueError,
            "edges must ascend",
        ),
    ],
)
def test_what_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
