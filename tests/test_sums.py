"""Sums and merges of pieces, in any order and overlap, against what the same pieces give at once."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from cphandler.attention.exchange import Block
from cphandler.attention.loop import _PlanInUse
from cphandler.kernels import AttentionSum, RowSum
from cphandler.plan.plan import Plan
from cphandler.testing import assert_close

ROWS, HEADS, DIM = 11, 3, 4
WHOLE = slice(0, ROWS)


def pieces_of(seed: int, number: int) -> list[slice]:
    """Runs of rows that overlap, touch, lie apart, are one row, or all."""
    chosen = random.Random(seed)
    bounds = (sorted(chosen.sample(range(ROWS + 1), 2)) for _ in range(number))
    return [WHOLE if chosen.random() < 0.2 else slice(*pair) for pair in bounds]


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_sum_of_any_pieces(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.empty(2, ROWS, HEADS, DIM, dtype=dtype)
    total, expected = RowSum.like(x), torch.zeros(x.shape, dtype=torch.float64)
    for rows in pieces_of(seed, seed % 5):
        part = torch.randn((2, rows.stop - rows.start, HEADS, DIM), generator=generator).to(dtype)
        expected[:, rows] += part.double()
        if seed % 2:  # as an operator may return it
            part = part.transpose(1, 2).contiguous().transpose(1, 2)
        total.add(rows, part)
    result = total.total()
    assert result.dtype == total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result.is_contiguous()
    assert_close(result, expected, dtype=result.dtype)
    assert torch.equal(result == 0, expected == 0), "rows that no piece covered are zero"


def test_rows_that_lie_apart() -> None:
    total, index = RowSum.like(torch.empty(1, ROWS, HEADS, DIM)), torch.tensor([7, 0, 3])
    first, second = torch.randn(1, 3, HEADS, DIM), torch.randn(1, 2, HEADS, DIM)
    total.add_at(index, first)
    total.add(slice(3, 5), second)
    expected = torch.zeros(1, ROWS, HEADS, DIM)
    expected[:, index] = first
    expected[:, 3:5] += second
    assert torch.equal(total.total(), expected)


def attention(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(scores, -1)
    return torch.einsum("blnm,bmnd->blnd", weights, values), torch.logsumexp(scores, -1)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_merge_of_any_pieces(seed: int, dtype: torch.dtype) -> None:
    """Each piece sees keys of its own; rows that no piece covers are 0 and -inf, whatever memory held."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.empty(2, ROWS, HEADS, DIM, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    pieces, result = pieces_of(seed, seed % 5), AttentionSum(q, 2 * DIM)
    scores = torch.full((2, ROWS, HEADS, 5 * len(pieces) + 1), float("-inf"), dtype=torch.float64)
    values = torch.randn((2, 5 * len(pieces) + 1, HEADS, 2 * DIM), generator=generator, dtype=torch.float64)
    for i, rows in enumerate(pieces):
        keys = slice(5 * i, 5 * i + 5)
        shape = 2, rows.stop - rows.start, HEADS, 5
        scores[:, rows, :, keys] = 30 * torch.randn(shape, generator=generator, dtype=torch.float64)
        out, lse = attention(scores[:, rows, :, keys], values[:, keys])
        result.merge(rows, out.to(dtype), lse.to(wide))
    out, lse = result.total()
    expected, expected_lse = attention(scores, values)
    assert (out.dtype, lse.dtype) == (dtype, wide)
    assert out.is_contiguous()
    assert lse.is_contiguous()
    assert_close(out, expected.nan_to_num(0.0), dtype=dtype)
    assert_close(lse, expected_lse, dtype=wide)
    assert torch.equal(lse == float("-inf"), expected_lse == float("-inf"))


def test_one_piece_over_everything_is_the_result() -> None:
    """No accumulator, no merge, no cast: the memory of what came is what is handed out."""
    q = torch.empty(1, ROWS, HEADS, DIM, dtype=torch.bfloat16)
    out, lse = torch.randn(1, ROWS, HEADS, DIM).bfloat16(), torch.randn(1, ROWS, HEADS)
    result = AttentionSum(q, DIM)
    result.merge(WHOLE, out, lse)
    assert [x.data_ptr() for x in result.total()] == [out.data_ptr(), lse.data_ptr()]
    total, part = RowSum.like(q), torch.randn(1, ROWS, HEADS, DIM).bfloat16()
    total.add(WHOLE, part)
    assert total.total(torch.bfloat16).data_ptr() == part.data_ptr()


def test_no_rows_and_no_heads() -> None:
    for shape in ((1, 0, 2, 4), (1, 5, 0, 4), (0, 5, 2, 4)):
        q = torch.empty(shape, dtype=torch.float16)
        out, lse = AttentionSum(q, 3).total()
        assert (out.shape, lse.shape) == ((*shape[:3], 3), shape[:3])
        assert (out.dtype, lse.dtype) == (torch.float16, torch.float32)
        assert RowSum.like(q).total(q.dtype).shape == shape


def test_tasks_of_any_part_of_a_plan_are_told_apart() -> None:
    """What is kept for a part serves that part alone: a slice with steps begins where another one does."""
    in_use = _PlanInUse(Plan(1, 0, np.arange(42, dtype=np.int64).reshape(6, 7)).to_tensor(), 0)
    own = in_use.plan.tasks
    for part in (own, own[:3], own[::2], own[3:], own[::-2], own[:3].copy(), own[:0]):
        for _ in range(2):
            assert in_use.tasks(Block(part, (), (), 0)).table.tolist() == part[:, 1:].tolist()
    assert in_use.tasks(Block(own[:3], (), (), 0)) is in_use.tasks(Block(own[:3], (), (), 0))
