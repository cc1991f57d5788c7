"""Losses over all ranks' tokens against one rank's, value and gradient, and the usual wrong ways beside them."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from cphandler import (
    InvalidTypeError,
    InvalidValueError,
    get_cp_handler_cls,
    language_model_loss,
    next_token_labels,
    reduce_token_loss,
    sum_over_tokens,
)
from cphandler.testing import RankPool, partition_group
from cphandler.training.reductions import REDUCTIONS

SPLIT = {2: ((0, 2), (1, 3)), 3: ((1, 2, 3),), 4: ((0, 1, 2, 3),)}
DATA_PARALLEL = ((0, 1), (2, 3))
"""Across the two groups of two."""

LENGTHS = [13, 1, 6, 9, 4]
OFFSETS = [sum(LENGTHS[:i]) for i in range(len(LENGTHS) + 1)]
MASKS = ("some", "one rank's", "none", "weights")


def drawn(seed: int, kind: str) -> tuple[Tensor, Tensor]:
    """Values of all tokens, some infinite where they do not count, and a mask: a document of it counts nothing."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(OFFSETS[-1], generator=generator, dtype=torch.float64)
    mask = torch.rand(OFFSETS[-1], generator=generator, dtype=torch.float64)
    if kind != "weights":
        mask = (mask < 0.6).double()
    mask[OFFSETS[2] : OFFSETS[3]] = 0
    if kind == "none":
        mask.zero_()
    if kind == "one rank's":
        mask[:] = 0
        mask[2] = 1
    return values.masked_fill(mask == 0, float("inf")), mask


def truth(values: Tensor, mask: Tensor, reduction: str, divisor: float | None = None) -> Tensor:
    """By the definition, document by document; several batches side by side are ``[D, T]``."""
    kept = torch.where(mask == 0, 0.0, values) * mask
    if reduction == "token_sum":
        return kept.sum()
    if not reduction.startswith("sequence"):
        return kept.sum() / (divisor or max(float(mask.sum()), 1e-300))
    per_sequence = []
    for row, weights in zip(kept, mask, strict=True):
        for start, end in itertools.pairwise(OFFSETS):
            count = weights[start:end].sum()
            if count > 0:
                total = row[start:end].sum()
                per_sequence.append(total / count if reduction.endswith("mean") else total)
    return torch.stack(per_sequence).mean() if per_sequence else kept.sum()


def equal_one_rank(size: int, layout: str, kind: str, reduction: str, spread: bool) -> tuple[float, float]:
    """Differences of value and gradient, and of what a rank's own mean would give."""
    group = partition_group(SPLIT[size])
    if group is None:
        return 0.0, 1.0
    data = partition_group(DATA_PARALLEL) if spread else None
    batches = 2 if spread else 1
    mine = torch.distributed.get_rank(data) if data is not None else 0
    handler = get_cp_handler_cls("ulysses" if layout == "replicated" else "ring")(
        cp_group=group, qkv_format="thd", cu_seqlens_q=torch.tensor(OFFSETS), layout=layout
    )
    pairs = [drawn(10 + i, kind) for i in range(batches)]
    leaf = torch.stack([values for values, _ in pairs]).requires_grad_()
    masks = torch.stack([mask for _, mask in pairs])
    divisor = 7.5 if reduction == "fixed" else None
    expected = truth(leaf, masks, reduction, divisor)
    (grads,) = torch.autograd.grad(expected, leaf)
    values = handler.dispatch(leaf[mine].detach(), 0, pad_value=float("nan")).requires_grad_()
    mask = handler.dispatch(masks[mine], 0)
    loss = reduce_token_loss(values, mask, handler, reduction=reduction, normalizer=divisor, group=data)
    (grad,) = torch.autograd.grad(loss, values)
    wanted = handler.dispatch(grads[mine], 0)
    assert torch.isfinite(grad).all()
    assert (grad[mask == 0] == 0).all()
    local = torch.where(mask == 0, 0.0, values.detach() * mask).sum() / mask.sum().clamp_min(1.0)
    apart = max(float((loss - expected).abs()), float((grad - wanted).abs().max()))
    return apart, float((local - expected).abs())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_loss_is_one_ranks(ranks: RankPool, size: int, reduction: str) -> None:
    for layout in ("zigzag", "contiguous", "balanced"):
        for kind in MASKS:
            found = ranks.run(equal_one_rank, size, layout, kind, reduction, False)
            assert max(apart for apart, _ in found) < 1e-12, (layout, kind)
            if reduction == "token_mean" and kind == "some":
                assert max(wrong for _, wrong in found) > 1e-2, "the mean of a rank's own tokens is another one"


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_data_parallel_ranks_are_counted_once(ranks: RankPool, reduction: str) -> None:
    for kind in MASKS:
        found = ranks.run(equal_one_rank, 2, "zigzag", kind, reduction, True)
        assert max(apart for apart, _ in found) < 1e-12, kind


def test_a_layout_that_every_rank_holds_whole(ranks: RankPool) -> None:
    for reduction in REDUCTIONS:
        found = ranks.run(equal_one_rank, 4, "replicated", "some", reduction, False)
        assert max(apart for apart, _ in found) < 1e-12


def dense(size: int, form: str) -> float:
    group = partition_group(SPLIT[size])
    if group is None:
        return 0.0
    generator = torch.Generator().manual_seed(4)
    values, mask = torch.randn(3, 10, generator=generator), torch.rand(3, 10, generator=generator) < 0.5
    mask[1] = False
    handler = get_cp_handler_cls("ring")(cp_group=group, qkv_format=form, max_seqlen_q=10)
    given = (values, mask) if form == "bshd" else (values.t(), mask.t())
    local = [handler.dispatch(x, 1 if form == "bshd" else 0) for x in given]
    loss = reduce_token_loss(*local, handler, reduction="sequence_mean_of_token_mean")
    rows = [(values[i][mask[i]]).double().mean() for i in range(3) if mask[i].any()]
    return float((loss - torch.stack(rows).mean()).abs())


@pytest.mark.parametrize("form", ["bshd", "sbhd"])
def test_rows_of_a_dense_batch_are_sequences(ranks: RankPool, form: str) -> None:
    assert max(ranks.run(dense, 3, form)) < 1e-6


def accumulated(size: int) -> float:
    """Two micro-batches, each divided by the tokens of both, are one step."""
    group = partition_group(SPLIT[size])
    if group is None:
        return 0.0
    handler = get_cp_handler_cls("ring")(cp_group=group, qkv_format="thd", cu_seqlens_q=torch.tensor(OFFSETS))
    pairs = [drawn(20, "some"), drawn(21, "weights")]
    total = sum(float(mask.sum()) for _, mask in pairs)
    losses = [
        reduce_token_loss(handler.dispatch(values, 0), handler.dispatch(mask, 0), handler, num_tokens=total)
        for values, mask in pairs
    ]
    expected = truth(torch.stack([v for v, _ in pairs]), torch.stack([m for _, m in pairs]), "token_mean")
    return float((sum(losses) - expected).abs())


def test_accumulated_steps_count_all_tokens_once(ranks: RankPool) -> None:
    assert max(ranks.run(accumulated, 4)) < 1e-12


def accumulated_sequences(size: int) -> float:
    group = partition_group(SPLIT[size])
    if group is None:
        return 0.0
    handler = get_cp_handler_cls("ring")(cp_group=group, qkv_format="thd", cu_seqlens_q=torch.tensor(OFFSETS))
    pairs = [drawn(20, "some"), drawn(21, "weights")]
    count = sum(float(m[a:b].sum() > 0) for _, m in pairs for a, b in itertools.pairwise(OFFSETS))
    kind = "sequence_mean_of_token_sum"
    losses = [
        reduce_token_loss(
            handler.dispatch(values, 0), handler.dispatch(mask, 0), handler, reduction=kind, num_sequences=count
        )
        for values, mask in pairs
    ]
    expected = truth(torch.stack([v for v, _ in pairs]), torch.stack([m for _, m in pairs]), kind)
    return float((sum(losses) - expected).abs())


def test_accumulated_steps_count_all_sequences_once(ranks: RankPool) -> None:
    assert max(ranks.run(accumulated_sequences, 3)) < 1e-12


def careless_mask(size: int, form: str) -> float:
    """A mask of ones counts padding of the batch and of the layout too; the loss does not."""
    group = partition_group(SPLIT[size])
    if group is None:
        return 0.0
    generator = torch.Generator().manual_seed(9)
    if form == "thd":
        handler = get_cp_handler_cls("ring")(
            cp_group=group, qkv_format="thd", cu_seqlens_q=[0, 5, 6, 13], cu_seqlens_q_padded=[0, 7, 9, 17]
        )
        values = torch.randn(17, generator=generator, dtype=torch.float64)
        real = torch.tensor([1] * 5 + [0] * 2 + [1, 0] + [1] * 7 + [0], dtype=torch.bool)
    else:
        real = torch.rand(3, 11, generator=generator) < 0.7
        handler = get_cp_handler_cls("ring")(cp_group=group, qkv_format=form, max_seqlen_q=11, key_padding_mask=real)
        values = torch.randn(3, 11, generator=generator, dtype=torch.float64)
    given = values.t() if form == "sbhd" else values
    local = handler.dispatch(given, 1 if form == "bshd" else 0, pad_value=float("inf"))
    loss = reduce_token_loss(local, torch.ones_like(local, dtype=torch.bool), handler)
    return float((loss - values[real].mean()).abs())


@pytest.mark.parametrize("form", ["thd", "bshd", "sbhd"])
def test_padding_never_counts(ranks: RankPool, form: str) -> None:
    assert max(ranks.run(careless_mask, 4, form)) < 1e-12


def model_loss(size: int) -> float:
    group = partition_group(SPLIT[size])
    if group is None:
        return 0.0
    handler = get_cp_handler_cls("ring")(cp_group=group, qkv_format="thd", cu_seqlens_q=torch.tensor(OFFSETS))
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(0, 11, (OFFSETS[-1],), generator=generator)
    table = torch.randn(11, 11, generator=generator, dtype=torch.float64)
    local = handler.dispatch(ids, 0)
    weight = table.clone().requires_grad_()
    loss = language_model_loss(weight[local], next_token_labels(local, handler), handler)
    (grad,) = torch.autograd.grad(loss, weight)
    torch.distributed.all_reduce(grad, group=group)
    whole = table.clone().requires_grad_()
    labels = torch.full_like(ids, -100)
    for start, end in itertools.pairwise(OFFSETS):
        labels[start : end - 1] = ids[start + 1 : end]
    expected = torch.nn.functional.cross_entropy(whole[ids], labels)
    (wanted,) = torch.autograd.grad(expected, whole)
    return max(float((loss - expected).abs()), float((grad - wanted).abs().max()))


@pytest.mark.parametrize("size", [2, 4])
def test_a_language_models_loss(ranks: RankPool, size: int) -> None:
    assert max(ranks.run(model_loss, size)) < 1e-12


def balance(size: int) -> tuple[float, float]:
    """An auxiliary loss that is a product of two means, as of a router: value, and gradient summed over ranks."""
    group = partition_group(SPLIT[size])
    if group is None:
        return 0.0, 0.0
    handler = get_cp_handler_cls("ring")(cp_group=group, qkv_format="thd", cu_seqlens_q=torch.tensor(OFFSETS))
    generator = torch.Generator().manual_seed(8)
    hidden = torch.randn(OFFSETS[-1], 5, generator=generator, dtype=torch.float64)
    start = torch.randn(5, 3, generator=generator, dtype=torch.float64)

    def router(x: Tensor, weight: Tensor, real: Tensor) -> Tensor:
        probabilities = (x @ weight).softmax(-1) * real.unsqueeze(-1)
        chosen = torch.nn.functional.one_hot(probabilities.argmax(-1), 3) * real.unsqueeze(-1)
        return torch.stack([probabilities.sum(0), chosen.sum(0).to(x.dtype)])

    local, real = handler.dispatch(hidden, 0), handler.valid_mask.double()
    weight = start.clone().requires_grad_()
    sums = sum_over_tokens(router(local, weight, real), handler)
    loss = (sums[0] * sums[1]).sum()
    (grad,) = torch.autograd.grad(loss, weight)
    torch.distributed.all_reduce(grad, group=group)
    whole = start.clone().requires_grad_()
    both = router(hidden, whole, torch.ones(OFFSETS[-1], dtype=torch.float64))
    expected = (both[0] * both[1]).sum()
    (wanted,) = torch.autograd.grad(expected, whole)
    return float((loss - expected).abs()), float((grad - wanted).norm() / wanted.norm())


def test_a_ratio_of_sums_is_the_batchs(ranks: RankPool) -> None:
    for value, gradient in ranks.run(balance, 4):
        assert value < 1e-10
        assert gradient < 1e-12


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"values": torch.zeros(6, dtype=torch.int64)},
            InvalidTypeError,
            "values must be floating point; got torch.int64",
        ),
        ({"mask": torch.ones(5)}, InvalidValueError, "got [5] beside [6]"),
        ({"reduction": "mean"}, InvalidValueError, "unknown reduction; got 'mean'; choose token_mean, token_sum"),
        ({"reduction": "fixed"}, InvalidValueError, "the reduction fixed divides by a normalizer; got none"),
        (
            {"normalizer": 3.0},
            InvalidValueError,
            "normalizer belongs to the reduction fixed; got normalizer with token_mean",
        ),
        ({"num_sequences": 3}, InvalidValueError, "num_sequences with token_mean"),
        ({"values": torch.zeros(5), "mask": torch.ones(5)}, InvalidValueError, "L = 6; got shape [5]"),
        (
            {"values": torch.zeros(6, 2), "mask": torch.ones(6, 2)},
            InvalidValueError,
            "one number for each of this rank's 6 rows",
        ),
        ({"reduction": "token_sum", "num_tokens": 3}, InvalidValueError, "num_tokens with token_sum"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 6]))
    with pytest.raises(error, match=re.escape(message)):
        reduce_token_loss(**{"values": torch.zeros(6), "mask": torch.ones(6), "handler": handler, **options})
