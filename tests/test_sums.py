"""Sums and merges of pieces, in any order and overlap, against what the same pieces give at once."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from cphandler.attention.exchange import Block
from cphandler.attention.loop import _PlanInUse
from cphandler.kernels import AttentionSum, RowSum, sums
from cphandler.kernels.sums import Spaced
from cphandler.plan.plan import Plan
from cphandler.testing import assert_close

ROWS, HEADS, DIM = 11, 3, 4
WHOLE = slice(0, ROWS)


APART = (Spaced(0, 2, 4, 3), Spaced(2, 1, 2, 5), Spaced(1, 3, 5, 2), Spaced(4, 1, 6, 2), Spaced(0, 5, 6, 2))


def pieces_of(seed: int, number: int) -> list[slice | Spaced]:
    """Runs of rows that overlap, touch, lie apart, are one row, or all; and several at one distance."""
    chosen = random.Random(seed)
    bounds = [sorted(chosen.sample(range(ROWS + 1), 2)) for _ in range(number)]
    pieces = [WHOLE if chosen.random() < 0.2 else slice(*pair) for pair in bounds]
    return [chosen.choice(APART) if chosen.random() < 0.4 else piece for piece in pieces]


def numbers_of(piece: slice | Spaced) -> list[int]:
    """The rows of a piece."""
    if isinstance(piece, slice):
        return list(range(ROWS)[piece])
    return [piece.first + i * piece.apart + j for i in range(piece.number) for j in range(piece.length)]


def laid_out(part: Tensor, piece: slice | Spaced) -> Tensor:
    """``[B, n, ...]`` as a sum takes it."""
    return part if isinstance(piece, slice) else part.unflatten(1, (piece.number, piece.length))


@pytest.fixture(params=[0, 16])
def few_runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that nothing was written to are found one by one, or by an index."""
    monkeypatch.setattr(sums, "FEW_RUNS", request.param)


@pytest.mark.usefixtures("few_runs")
@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_sum_of_any_pieces(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.empty(2, ROWS, HEADS, DIM, dtype=dtype)
    total, expected = RowSum.like(x), torch.zeros(x.shape, dtype=torch.float64)
    for piece in pieces_of(seed, seed % 5):
        rows = numbers_of(piece)
        part = torch.randn((2, len(rows), HEADS, DIM), generator=generator).to(dtype)
        expected[:, rows] += part.double()
        if seed % 2:  # as an operator may return it
            part = part.transpose(1, 2).contiguous().transpose(1, 2)
        total.add(piece, laid_out(part, piece))
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


@pytest.mark.usefixtures("few_runs")
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_sum_added_to_another(seed: int, dtype: torch.dtype) -> None:
    """As many pieces as there are, none, one, or one of all rows; rows of no piece stay as they are, bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.empty(2, ROWS, HEADS, DIM, dtype=dtype)
    share, wide = RowSum.like(x), torch.float64 if dtype == torch.float64 else torch.float32
    before = torch.randn(x.shape, generator=generator, dtype=wide)
    after, expected, touched = before.clone(), before.double(), torch.zeros(ROWS, dtype=torch.bool)
    for piece in [WHOLE][: seed % 10 == 9] or pieces_of(seed, seed % 4):
        rows = numbers_of(piece)
        part = torch.randn((2, len(rows), HEADS, DIM), generator=generator).to(dtype)
        expected[:, rows] += part.double()
        touched[rows] = True
        share.add(piece, laid_out(part, piece))
    share.add_to(after)
    assert_close(after, expected, dtype=wide)
    assert torch.equal(after[:, ~touched], before[:, ~touched])


def attention(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(scores, -1)
    return torch.einsum("blnm,bmnd->blnd", weights, values), torch.logsumexp(scores, -1)


@pytest.mark.usefixtures("few_runs")
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
    for i, piece in enumerate(pieces):
        rows, keys = numbers_of(piece), slice(5 * i, 5 * i + 5)
        shape = 2, len(rows), HEADS, 5
        scores[:, rows, :, keys] = 30 * torch.randn(shape, generator=generator, dtype=torch.float64)
        out, lse = attention(scores[:, rows, :, keys], values[:, keys])
        result.merge(piece, laid_out(out.to(dtype), piece), laid_out(lse.to(wide), piece))
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
