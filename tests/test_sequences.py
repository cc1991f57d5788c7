"""Values gathered back to documents and scattered over ranks, in the caller's coordinates, against plain indexing."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from cphandler import (
    InvalidTypeError,
    InvalidValueError,
    gather_last_tokens,
    gather_tokens,
    get_cp_handler_cls,
    scatter_last_tokens,
    scatter_tokens,
)
from cphandler.testing import RankPool, partition_group

SPLIT = {2: ((0, 2), (1, 3)), 3: ((1, 2, 3),), 4: ((0, 1, 2, 3),)}
LENGTHS, PADDED = [6, 1, 0, 9, 4], [8, 1, 0, 9, 7]
LAYOUTS = ("zigzag", "contiguous", "striped", "balanced", "replicated")


def offsets(lengths: list[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def made(group: Any, layout: str | None, *, padding: bool) -> Any:
    padded = {"cu_seqlens_q_padded": offsets(PADDED)} if padding else {}
    backend = "ulysses" if layout == "replicated" else "ring"
    return get_cp_handler_cls(backend)(
        cp_group=group, qkv_format="thd", cu_seqlens_q=offsets(LENGTHS), layout=layout, **padded
    )


def physical(x: Tensor, padding: bool, fill: float = 7.0) -> Tensor:
    """Real tokens, with padding of its own behind each document."""
    if not padding:
        return x
    pieces = []
    for (start, end), length in zip(pairwise(offsets(LENGTHS)), PADDED, strict=True):
        pieces += [x[start:end], x.new_full((length - end + start, *x.shape[1:]), fill)]
    return torch.cat(pieces)


def there_and_back(size: int, layout: str, padding: bool) -> None:
    group = partition_group(SPLIT[size])
    if group is None:
        return
    handler = made(group, layout, padding=padding)
    generator = torch.Generator().manual_seed(3)
    documents = [torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in LENGTHS]
    packed = torch.cat(documents)
    local = handler.dispatch(physical(packed, padding), 0)
    assert torch.equal(gather_tokens(local, handler), packed)
    assert torch.equal(gather_tokens(local.unsqueeze(0), handler), packed)
    nested = gather_tokens(local, handler, nested=True)
    assert nested.is_nested
    assert all(torch.equal(a, b) for a, b in zip(nested.unbind(), documents, strict=True))
    table = gather_tokens(local, handler, padding_value=-1.0)
    assert table.shape == (5, 9, 2)
    for row, document in zip(table, documents, strict=True):
        assert torch.equal(row[: len(document)], document)
        assert (row[len(document) :] == -1).all()
    wanted = handler.dispatch(physical(packed, padding, 0.5), 0, pad_value=0.5)
    wider = torch.cat([table, table[:, :2]], dim=1)
    for given, options in (
        (packed, {}),
        (documents, {}),
        (nested, {}),
        (table, {"padded": True}),
        (wider, {"padded": True}),
    ):
        assert torch.equal(scatter_tokens(given, handler, pad_value=0.5, **options), wanted)
    check_gradients(handler, local, packed, generator)


def check_gradients(handler: Any, local: Tensor, packed: Tensor, generator: torch.Generator) -> None:
    """Every rank computes the same loss of what was gathered; what was scattered has the whole gradient everywhere."""
    weight = torch.randn(packed.shape, generator=generator, dtype=torch.float64)
    back = scatter_tokens(weight, handler)
    for options in ({}, {"nested": True}, {"padding_value": 3.0}):
        leaf = local.clone().requires_grad_()
        given = gather_tokens(leaf, handler, **options)
        if options.get("nested"):
            given = torch.cat(given.unbind())
        if "padding_value" in options:
            given = torch.cat([row[:n] for row, n in zip(given, LENGTHS, strict=True)])
        (given * weight).sum().backward()
        assert torch.equal(leaf.grad, back), options
    whole = packed.clone().requires_grad_()
    rows = scatter_tokens(whole, handler)
    (rows * scatter_tokens(weight, handler)).sum().backward()
    torch.testing.assert_close(whole.grad, weight)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_documents_there_and_back(ranks: RankPool, size: int) -> None:
    for layout in LAYOUTS:
        for padding in (False, True):
            ranks.run(there_and_back, size, layout, padding)


def dense_there_and_back(size: int, form: str) -> None:
    group = partition_group(SPLIT[size])
    if group is None:
        return
    generator = torch.Generator().manual_seed(5)
    real = torch.rand(3, 11, generator=generator) < 0.6
    real[0] = True
    real[1] = False
    handler = get_cp_handler_cls("ring")(cp_group=group, qkv_format=form, max_seqlen_q=11, key_padding_mask=real)
    x = torch.randn(3, 11, 2, generator=generator)
    turned = (lambda t: t.transpose(0, 1)) if form == "sbhd" else (lambda t: t)
    dim = 0 if form == "sbhd" else 1
    local = handler.dispatch(turned(x), dim)
    filled = turned(x.masked_fill(~real.unsqueeze(-1), 2.5))
    assert torch.equal(gather_tokens(local, handler, padding_value=2.5), filled)
    assert torch.equal(gather_tokens(local, handler), turned(x.masked_fill(~real.unsqueeze(-1), 0)))
    nested = gather_tokens(local, handler, nested=True)
    assert all(torch.equal(a, row[m]) for a, row, m in zip(nested.unbind(), x, real, strict=True))
    assert torch.equal(scatter_tokens(turned(x), handler), local)
    scores = gather_last_tokens(local[..., 0].contiguous(), handler)
    last = [row[m][-1, 0] if m.any() else torch.tensor(0.0) for row, m in zip(x, real, strict=True)]
    assert torch.equal(scores, torch.stack(last))
    placed = torch.zeros(3, 11)
    for i in (0, 2):
        placed[i, real[i].nonzero()[-1]] = scores[i]
    assert torch.equal(handler.combine(scatter_last_tokens(scores, handler), dim), turned(placed))


@pytest.mark.parametrize("form", ["bshd", "sbhd"])
def test_a_dense_batch_keeps_its_padding(ranks: RankPool, form: str) -> None:
    ranks.run(dense_there_and_back, 3, form)


def owners(size: int, layout: str, padding: bool) -> None:
    """A response is a part of a document, and none of it may be here, or anywhere."""
    group = partition_group(SPLIT[size])
    if group is None:
        return
    handler = made(group, layout, padding=padding)
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(sum(LENGTHS), generator=generator, dtype=torch.float64)
    response = torch.rand(sum(LENGTHS), generator=generator) < 0.5
    response[offsets(LENGTHS)[4] :] = False
    for mask in (None, response):
        last = [
            max((t for t in range(start, end) if mask is None or mask[t]), default=None)
            for start, end in pairwise(offsets(LENGTHS))
        ]
        wanted = torch.stack([values.new_zeros(()) if t is None else values[t] for t in last])
        leaf = scatter_tokens(values, handler, pad_value=float("nan")).clone().requires_grad_()
        local = None if mask is None else scatter_tokens(mask, handler, pad_value=True)
        scores = gather_last_tokens(leaf, handler, local)
        assert torch.equal(scores, wanted)
        weight = torch.randn(5, generator=generator, dtype=torch.float64)
        (scores * weight).sum().backward()
        placed = torch.zeros_like(values)
        for t, number in zip(last, weight, strict=True):
            if t is not None:
                placed[t] = number
        assert torch.equal(gather_tokens(leaf.grad, handler), placed), "the owner's row, and no other"
        rewards = weight.clone().requires_grad_()
        rows = scatter_last_tokens(rewards, handler, local)
        assert torch.equal(gather_tokens(rows.detach(), handler), placed)
        rows.sum().backward()
        grad = rewards.grad
        if handler.sequence_sharded:
            torch.distributed.all_reduce(grad, group=group)
        assert grad.tolist() == [0.0 if t is None else 1.0 for t in last]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sequences_scalar_finds_its_owner(ranks: RankPool, layout: str) -> None:
    for padding in (False, True):
        ranks.run(owners, 4, layout, padding)


def test_no_tokens_at_all() -> None:
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 0])
    assert gather_tokens(torch.empty(0, 3), handler).shape == (0, 3)
    assert gather_tokens(torch.empty(0, 3), handler, padding_value=0).shape == (1, 0, 3)
    assert gather_last_tokens(torch.empty(0), handler).tolist() == [0.0]
    assert scatter_last_tokens(torch.ones(1), handler).shape == (0,)


HANDLER: dict[str, Any] = {"qkv_format": "thd", "cu_seqlens_q": [0, 3, 5], "cu_seqlens_q_padded": [0, 4, 6]}


@pytest.mark.parametrize(
    ("call", "given", "options", "error", "message"),
    [
        (gather_tokens, [1, 2], {}, InvalidTypeError, "values must be a tensor; got list"),
        (
            gather_tokens,
            torch.ones(5),
            {},
            InvalidValueError,
            "values must be this rank's rows, [L, ...] or [1, L, ...] with L = 6",
        ),
        (gather_tokens, torch.ones(6), {"nested": True, "padding_value": 0}, InvalidValueError, "no padding"),
        (scatter_tokens, torch.ones(6), {}, InvalidValueError, "values must have the 5 real tokens"),
        (scatter_tokens, [torch.ones(3)], {}, InvalidValueError, "got 1 of 2"),
        (scatter_tokens, [torch.ones(3), torch.ones(3)], {}, InvalidValueError, "got 3 tokens in sequence 1; it has 2"),
        (scatter_tokens, torch.ones(2, 2), {"padded": True}, InvalidValueError, "2 sequences, 3 long or longer"),
        (gather_last_tokens, torch.ones(6, 2), {}, InvalidValueError, "one number for each of this rank's 6 rows"),
        (scatter_last_tokens, torch.ones(3), {}, InvalidValueError, "one for each of the 2 sequences; got shape [3]"),
    ],
)
def test_what_is_refused(call: Any, given: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(given, get_cp_handler_cls("local")(**HANDLER), **options)
