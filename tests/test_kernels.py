"""Kernels take any band: random tasks against a dense softmax, forward and backward, gradient of the lse included."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cphandler import CPConfig, InvalidTypeError, InvalidValueError, UnsupportedError, get_cp_handler_cls
from cphandler.kernels import (
    AttentionSum,
    Dropout,
    Kernel,
    RowSum,
    Softmax,
    Task,
    Tasks,
    available_kernels,
    get_kernel,
    keep_mask,
    merge_attention,
    query_states,
    register_kernel,
    registry,
    select_kernel,
)
from cphandler.kernels.kernel import COLUMNS, ROWS, Gradients, Saved
from cphandler.kernels.merge import merge_into
from cphandler.kernels.reference import ReferenceKernel
from cphandler.kernels.strips import additive_mask, strips, tiles
from cphandler.kernels.tables import DeviceTables
from cphandler.kernels.torch_cuda import TorchCudaKernel
from cphandler.precision import accumulator_dtype
from cphandler.testing import assert_close
from cphandler.tokens.intervals import UNBOUNDED
from tests.sweeps import half

PLAIN = Softmax(0.3)
FULL = (-UNBOUNDED, UNBOUNDED)


def task_between(q: int, nq: int, k: int, nk: int, lo: int, hi: int) -> Task | None:
    """The task left when rows and keys that see nothing are trimmed, as a plan makes them."""
    for _ in range(2):
        skip = max(0, -hi)
        q, nq, lo, hi = q + skip, min(nq, nk - lo) - skip, lo + skip, hi + skip
        skip = max(0, lo)
        k, nk, lo, hi = k + skip, min(nk, nq + hi) - skip, lo - skip, hi - skip
        if nq <= 0 or nk <= 0:
            return None
    return Task(q, nq, k, nk, -UNBOUNDED if lo <= 1 - nq else lo, UNBOUNDED if hi >= nk - 1 else hi)


def open_cells(task: Task, queries: int, keys: int) -> Tensor:
    i, j = torch.arange(task.nq)[:, None], torch.arange(task.nk)[None]
    seen = torch.zeros(queries, keys, dtype=torch.bool)
    seen[task.q : task.q + task.nq, task.k : task.k + task.nk] = (j - i >= task.lo) & (j - i <= task.hi)
    return seen


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, softmax: Softmax) -> tuple[Tensor, Tensor]:
    times = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(times, 2), v.repeat_interleave(times, 2)
    scores = torch.einsum("blnd,bmnd->blnm", q, k) * softmax.scale
    if softmax.softcap is not None:
        scores = softmax.softcap * torch.tanh(scores / softmax.softcap)
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).nan_to_num(0.0)
    if softmax.dropout is not None:
        weights = weights * keep_mask(softmax.dropout).transpose(1, 2) / (1 - softmax.dropout.p)
    return torch.einsum("blnm,bmnd->blnd", weights, v), lse


def dropout_of(p: float, queries: int, keys: int, heads: int, *, batch: int = 2) -> Dropout:
    """Dropout of rows in no particular order, as a layout deals them out."""
    generator = torch.Generator().manual_seed(queries)
    rows = torch.arange(batch)[:, None].expand(batch, queries)
    positions = torch.randperm(queries, generator=generator)
    states = query_states(7, 3, rows, positions, torch.arange(heads))
    return Dropout(p, states, torch.randperm(keys, generator=generator))


def check(
    kernel: Kernel,
    task: Task,
    queries: int,
    keys: int,
    *,
    heads: tuple[int, int],
    dtype: torch.dtype,
    d: int = 16,
    d_v: int = 16,
    softmax: Softmax = PLAIN,
    with_lse: bool = True,
) -> None:
    generator = torch.Generator().manual_seed(task.nq * 1000 + task.nk)
    n, g = heads
    shapes = [(2, queries, n, d), (2, keys, g, d), (2, keys, g, d_v), (2, queries, n, d_v), (2, queries, n)]
    q, k, v, grad_out, grad_lse = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    grad_lse += (
        grad_lse.sign()
    )  # away from 0: it is all that is left of dq in a row with one key, where the rest cancels
    leaves = [x.double().clone().requires_grad_() for x in (q, k, v)]
    seen = open_cells(task, queries, keys)
    expected, expected_lse = dense(*leaves, seen, softmax)
    total = (expected * grad_out.double()).sum()
    if with_lse:
        rows = slice(task.q, task.q + task.nq)
        total = total + (expected_lse[:, rows] * grad_lse.double()[:, rows]).sum()
    wanted = torch.autograd.grad(total, leaves)
    accumulator = accumulator_dtype(dtype)
    tasks, result = Tasks.of(task), AttentionSum(q, d_v)
    kernel.forward(q, k, v, tasks, softmax, result)
    out, lse = result.total()
    grads = Gradients(*(RowSum.like(x) for x in (q, k, v)))
    saved = Saved(q, out, lse, grad_out, grad_lse.to(accumulator) if with_lse else None)
    kernel.backward(saved, k, v, tasks, softmax, grads)
    results = [out, lse, *(grad.total() for grad in grads)]
    for name, a, e in zip(("out", "lse", "dq", "dk", "dv"), results, (expected, expected_lse, *wanted), strict=True):
        # a gradient that is zero has no relative error
        if a.shape != e.shape or float(e.detach()[torch.isfinite(e)].abs().max()) > 1e-6:
            assert_close(a, e, dtype=dtype, what=f"{name} of {kernel.name} {task} {dtype}")


@settings(max_examples=75, deadline=None)
@given(
    st.integers(1, 330),
    st.integers(1, 330),
    st.one_of(st.none(), st.integers(-340, 340)),
    st.one_of(st.none(), st.integers(0, 300)),
    st.sampled_from([(4, 4), (4, 2), (2, 1)]),
    st.sampled_from([torch.float64, torch.float32]),
    st.sampled_from([("torch", 16), ("torch", 9), ("torch", 24), ("reference", 16), ("reference", 9)]),
)
def test_any_task(
    nq: int,
    nk: int,
    lo: int | None,
    width: int | None,
    heads: tuple[int, int],
    dtype: torch.dtype,
    kernel: tuple[str, int],
) -> None:
    name, d_v = kernel
    low = -UNBOUNDED if lo is None else lo
    high = UNBOUNDED if width is None else (width - 100 if lo is None else lo + width)
    task = task_between(3, nq, 5, nk, low, high)
    if task is not None:
        check(get_kernel(name, "cpu"), task, nq + 4, nk + 7, heads=heads, dtype=dtype, d_v=d_v)


class SmallTiles(ReferenceKernel):
    """The reference kernel with so many cuts that each kind of tile occurs."""

    def blocks(self, task: Task, dtype: torch.dtype) -> Iterator[Task]:
        return tiles(task, 16, 24)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(-80, 80),
    st.integers(0, 60),
    st.sampled_from([(4, 4), (4, 2), (2, 1)]),
    st.sampled_from([torch.float64, torch.float32]),
    st.sampled_from([(0.5, None), (30.0, None), (None, 0.0), (None, 0.3), (2.0, 0.3), (None, 0.9)]),
)
def test_any_softmax(
    nq: int,
    nk: int,
    lo: int,
    width: int,
    heads: tuple[int, int],
    dtype: torch.dtype,
    options: tuple[float | None, float | None],
) -> None:
    softcap, p = options
    task = task_between(3, nq, 5, nk, lo, lo + width)
    if task is not None:
        dropout = None if p is None else dropout_of(p, nq + 4, nk + 7, heads[0])
        softmax = Softmax(0.3, softcap, dropout)
        check(SmallTiles(), task, nq + 4, nk + 7, heads=heads, dtype=dtype, d_v=10, softmax=softmax)


LONG = [
    Task(0, 2500, 0, 2500, -UNBOUNDED, 0),
    Task(0, 2200, 0, 2600, -UNBOUNDED, 400),
    Task(0, 2600, 0, 2300, -UNBOUNDED, 50),
    Task(0, 300, 0, 2600, -UNBOUNDED, 2300),
    Task(0, 300, 0, 2900, -2400, 300),
    Task(0, 300, 0, 2900, 0, UNBOUNDED),
]


@pytest.mark.parametrize(("task", "dtype"), half(LONG, [torch.float32, torch.bfloat16]), ids=str)
def test_long_tasks_take_the_other_cuts(task: Task, dtype: torch.dtype) -> None:
    check(get_kernel("torch", "cpu"), task, task.nq, task.nk, heads=(2, 1), dtype=dtype)


@pytest.mark.parametrize("task", half(LONG), ids=str)
def test_long_tasks_of_the_reference_are_cut_both_ways(task: Task) -> None:
    blocks = list(get_kernel("reference", "cpu").blocks(task, torch.float32))  # type: ignore[attr-defined]
    assert max(block.nq for block in blocks) <= ROWS
    assert max(block.nk for block in blocks) <= COLUMNS < task.nk
    softmax = Softmax(0.3, 2.0, dropout_of(0.2, task.nq, task.nk, 2)) if task.nq == 300 else PLAIN
    check(get_kernel("reference", "cpu"), task, task.nq, task.nk, heads=(2, 1), dtype=torch.float32, softmax=softmax)


@pytest.mark.parametrize("d_v", [8, 17, 24, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_of_another_head_dim_in_the_torch_kernel(d_v: int, dtype: torch.dtype) -> None:
    for task in (Task(0, 900, 0, 900, -UNBOUNDED, 0), Task(0, 300, 0, 400, -50, 200), Task(1, 30, 2, 50, *FULL)):
        for with_lse in (True, False):
            options: dict[str, Any] = {"heads": (4, 2), "dtype": dtype, "d": 24, "d_v": d_v, "with_lse": with_lse}
            check(get_kernel("torch", "cpu"), task, task.nq + 1, task.nk + 2, **options)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(-70, 70),
    st.integers(0, 60),
    st.integers(1, 20),
    st.integers(0, 30),
    st.sampled_from([strips, tiles]),
)
def test_cuts_cover_a_task_once(
    nq: int, nk: int, lo: int, width: int, rows: int, widest: int, cut: Callable[[Task, int, int], Iterator[Task]]
) -> None:
    task = task_between(2, nq, 3, nk, lo, lo + width)
    if task is None:
        return
    widest += cut is tiles  # at least one column
    counts, kept = torch.zeros(nq + 4, nk + 4, dtype=torch.int64), DeviceTables(2)
    for part in cut(task, rows, widest):
        cells = open_cells(part, *counts.shape)
        counts += cells
        assert part.nq <= rows
        assert part.nk <= widest or cut is strips
        block = cells[part.rows, part.keys]
        assert block.any(1).all(), "no row of a part is blind: the kernels answer that with a wrong log-sum-exp"
        assert part.is_full == bool(block.all())
        if not part.is_full:
            for tables in (None, kept):
                mask = additive_mask(part, torch.float32, torch.device("cpu"), tables)
                assert torch.equal(mask == 0, block)
    assert torch.equal(counts, open_cells(task, *counts.shape).long())


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(-310, 310),
    st.integers(0, 300),
    st.sampled_from([(4, 4), (4, 2), (2, 1)]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.sampled_from([0.3, -0.3]),
)
def test_the_largest_logit(
    nq: int, nk: int, lo: int, width: int, heads: tuple[int, int], dtype: torch.dtype, scale: float
) -> None:
    task = task_between(3, nq, 5, nk, lo, lo + width)
    if task is not None:
        check_max_logit([task], nq + 4, nk + 7, heads=heads, dtype=dtype, scale=scale)


def check_max_logit(
    tasks: list[Task], queries: int, keys: int, *, heads: tuple[int, int], dtype: torch.dtype, scale: float = 0.3
) -> None:
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    n, g = heads
    q, k = (torch.randn(2, *shape, 8, generator=generator).to(dtype) for shape in ((queries, n), (keys, g)))
    scores = torch.einsum("blnd,bmnd->blnm", q.double(), k.double().repeat_interleave(n // g, 2)) * scale
    seen = sum((open_cells(task, queries, keys) for task in tasks), torch.zeros(queries, keys, dtype=torch.bool))
    expected = scores.masked_fill(~seen[:, None], float("-inf")).amax((0, 1, 3))
    result = torch.full((n,), float("-inf"), dtype=accumulator_dtype(dtype))
    get_kernel("torch", "cpu").max_logit(q, k, Tasks.of(*tasks), Softmax(scale), result)
    torch.testing.assert_close(result, expected.to(result.dtype))


def test_the_largest_logit_of_long_and_of_no_tasks() -> None:
    check_max_logit(LONG[:2], 2500, 2600, heads=(2, 1), dtype=torch.float32)
    check_max_logit([], 5, 5, heads=(2, 1), dtype=torch.bfloat16)
    result = torch.tensor([float("-inf"), 1e3])
    q = torch.randn(1, 4, 2, 8)
    kernel = get_kernel("reference", "cpu")
    kernel.max_logit(q, q, Tasks.of(Task(0, 4, 0, 4, -UNBOUNDED, 0)), Softmax(1.0), result)
    assert torch.isfinite(result[0])
    assert result[1] == 1e3, "a larger one from before stays"
    kernel.max_logit(q[:0], q[:0], Tasks.of(Task(0, 4, 0, 4, -UNBOUNDED, 0)), Softmax(1.0), result)


def test_merge_is_safe_where_nothing_is_seen() -> None:
    out, lse = torch.zeros(1, 3, 1, 2), torch.full((1, 3, 1), float("-inf"))
    block = torch.tensor([[[[1.0, 2]], [[3, 4]], [[0, 0]]]])
    block_lse = torch.tensor([[[0.5], [-0.5], [float("-inf")]]])
    merge_into(out, lse, block, block_lse)
    assert torch.equal(out, block)
    assert torch.equal(lse, block_lse)
    merge_into(out, lse, torch.full_like(block, 7.0), torch.full_like(block_lse, float("-inf")))
    assert torch.equal(out, block)
    assert torch.equal(lse, block_lse)
    merge_into(out, lse, block, block_lse)
    torch.testing.assert_close(out, block)
    torch.testing.assert_close(lse, block_lse + torch.tensor(2.0).log())


def attention_over(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Dense attention whose gradients are not NaN in rows that see nothing."""
    scores = torch.einsum("blnd,bmnd->blnm", q, k)
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    blind = ~seen.any(1)[:, None]
    lse = torch.logsumexp(scores.masked_fill(blind.unsqueeze(-1), 0.0), -1).masked_fill(blind, float("-inf"))
    weights = torch.exp(scores - lse.masked_fill(blind, 0.0).unsqueeze(-1))
    return torch.einsum("blnm,bmnd->blnd", weights, v), lse


def test_merged_attention_is_attention_over_the_union() -> None:
    q, k, v = (torch.randn(2, n, 3, 4, dtype=torch.float64, requires_grad=True) for n in (8, 10, 10))
    seen = torch.rand(8, 10) < 0.5
    seen[0], seen[1, :6], seen[2, 6:] = False, False, False
    seen[1, 6], seen[2, 0] = True, True
    first = attention_over(q, k[:, :6], v[:, :6], seen[:, :6])
    second = attention_over(q, k[:, 6:], v[:, 6:], seen[:, 6:])
    merged, expected = merge_attention(*first, *second), attention_over(q, k, v, seen)
    grad_out, grad_lse = torch.randn_like(merged[0]), torch.randn_like(merged[1])
    for a, e in zip(merged, expected, strict=True):
        torch.testing.assert_close(a, e)
    gradients = [
        torch.autograd.grad((out * grad_out).sum() + (lse[:, 1:] * grad_lse[:, 1:]).sum(), (q, k, v))
        for out, lse in (merged, expected)
    ]
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("results", ["out", "lse", "both"])
def test_gradients_of_merged_attention(results: str) -> None:
    out1, out2 = (torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    lse1, lse2 = (torch.randn(5, 2, dtype=torch.float64) for _ in range(2))
    lse1[0], lse2[1], lse1[2], lse2[2] = (float("-inf"),) * 4

    def finite(*inputs: Tensor) -> tuple[Tensor, ...]:
        out, lse = merge_attention(*inputs)
        lse = lse.masked_fill(torch.isinf(lse), 0.0)  # numeric differences of infinities are NaN
        return {"out": (out,), "lse": (lse,), "both": (out, lse)}[results]

    assert torch.autograd.gradcheck(finite, (out1, lse1.requires_grad_(), out2, lse2.requires_grad_()))


def test_merging_with_what_saw_nothing() -> None:
    never = float("-inf")
    out1 = torch.tensor([[-0.0, 1.0], [float("nan"), float("inf")], [float("nan"), 1.0]], dtype=torch.bfloat16)
    out2 = torch.tensor([[float("nan"), 1.0], [3.0, -0.0], [float("inf"), 2.0]], dtype=torch.bfloat16)
    lse1, lse2 = torch.tensor([-0.0, never, never]), torch.tensor([never, 0.3, never])
    leaves = [x.requires_grad_() for x in (out1, lse1, out2, lse2)]
    out, lse = merge_attention(*leaves)
    expected = torch.stack([out1[0], out2[1], torch.zeros(2, dtype=torch.bfloat16)])
    assert torch.equal(out.view(torch.int16), expected.view(torch.int16))
    assert torch.equal(lse.view(torch.int32), torch.tensor([-0.0, 0.3, never]).view(torch.int32))
    grads = torch.autograd.grad([out, lse], leaves, [torch.ones_like(out), torch.full_like(lse, 2.0)])
    assert grads[0].tolist() == [[1, 1], [0, 0], [0, 0]]
    assert grads[1].tolist() == [2, 0, 0]
    assert grads[2].tolist() == [[0, 0], [1, 1], [0, 0]]
    assert grads[3].tolist() == [0, 2, 0]
    poisoned = torch.autograd.grad(
        merge_attention(*leaves), leaves, [torch.full_like(out, float("nan")), torch.full_like(lse, float("nan"))]
    )
    assert all(not grad[2].isnan().any() for grad in poisoned), "rows that saw nothing send nothing home"


def test_merging_is_computed_in_float32_and_compiles() -> None:
    out1, out2 = (torch.randn(7, 4, dtype=torch.bfloat16) for _ in range(2))
    lse1, lse2 = (torch.randn(7) for _ in range(2))
    out, lse = merge_attention(out1, lse1, out2, lse2)
    exact, exact_lse = merge_attention(out1.double(), lse1.double(), out2.double(), lse2.double())
    assert torch.equal(out, exact.to(torch.bfloat16))
    torch.testing.assert_close(lse, exact_lse.float())
    leaves = [x.requires_grad_() for x in (out1, lse1, out2, lse2)]
    compiled = torch.compile(merge_attention, backend="aot_eager", fullgraph=True)
    results = [function(*leaves) for function in (merge_attention, compiled)]
    gradients = [torch.autograd.grad(o.float().square().sum() + e.sum(), leaves) for o, e in results]
    for a, e in zip((*results[1], *gradients[1]), (*results[0], *gradients[0]), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"out1": [1.0]}, InvalidTypeError, "out1 must be a dense tensor; got list; merge takes"),
        ({"lse2": torch.zeros(4, 2).to_sparse()}, InvalidTypeError, "lse2 must be .*; got torch.sparse_coo"),
        ({"out2": torch.zeros(2, 4)}, InvalidTypeError, "one floating-point dtype; got torch.float64, torch.float32"),
        ({"lse2": torch.zeros(2)}, InvalidTypeError, "must be torch.float64 beside outputs in torch.float64; got"),
        ({"out2": torch.zeros(2, 5).double()}, InvalidValueError, r"one shape \[..., D\]; got \[2, 4\], \[2, 5\]"),
        ({"lse1": torch.zeros(2, 1).double()}, InvalidValueError, r"lse1 and lse2 must be \[2\]"),
        ({"lse1": torch.zeros(2, device="meta").double()}, InvalidValueError, "one device; got cpu, meta, cpu, cpu"),
    ],
)
def test_merging_refuses(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    good = {"out1": torch.zeros(2, 4), "lse1": torch.zeros(2), "out2": torch.zeros(2, 4), "lse2": torch.zeros(2)}
    with pytest.raises(kind, match=message):
        merge_attention(**{name: x.double() for name, x in good.items()} | change)


def correlation(a: Tensor, b: Tensor) -> float:
    """In standard deviations of what independent masks have."""
    table = torch.stack([a.flatten(), b.flatten()]).double()
    return float(torch.corrcoef(table)[0, 1]) * table.shape[1] ** 0.5


def kept(p: float, *, seed: int = 1, layer: int = 1) -> Tensor:
    rows = torch.arange(2)[:, None].expand(2, 48)
    states = query_states(seed, layer, rows, torch.arange(48), torch.arange(6))
    return keep_mask(Dropout(p, states, torch.arange(160)))


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.9])
def test_dropout_drops_as_much_as_asked(p: float) -> None:
    mask = kept(p)
    assert mask.dtype == torch.bool
    assert mask.shape == (2, 6, 48, 160)
    for dim in range(4):
        rates = 1 - mask.double().mean([d for d in range(4) if d != dim])
        assert float((rates - p).abs().max()) <= 5 * (p * (1 - p) * mask.shape[dim] / mask.numel()) ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_is_independent_between_any_two_places(p: float) -> None:
    mask = kept(p)
    for dim in range(4):
        for step in (1, 2, 16):
            if step < mask.shape[dim]:
                size = mask.shape[dim] - step
                a, b = mask.narrow(dim, 0, size), mask.narrow(dim, step, size)
                assert abs(correlation(a, b)) < 5, f"dim {dim}, {step} apart"
    pairs = mask[..., :-1] == mask[..., 1:]
    assert abs(correlation(pairs[:, :, :-1], pairs[:, :, 1:])) < 5, "no pattern repeats from row to row"
    i, j = torch.triu_indices(48, 48, offset=1)
    assert abs(correlation(mask[..., i, j], mask[..., j, i])) < 5, "queries and keys are not mistaken for each other"
    for other in (kept(p, seed=2), kept(p, layer=2), kept(p, seed=2**63), kept(p, seed=-1), kept(p, seed=1 << 32)):
        assert abs(correlation(mask, other)) < 5
    assert torch.equal(mask, kept(p))
    assert not torch.equal(kept(p, seed=2, layer=1), kept(p, seed=1, layer=2))


def test_dropout_does_not_depend_on_how_the_rows_are_cut() -> None:
    dropout = dropout_of(0.4, 50, 70, 4)
    whole = keep_mask(dropout)
    for rows, keys in ((slice(0, 50), slice(3, 4)), (slice(7, 31), slice(11, 70)), (slice(49, 50), slice(0, 70))):
        assert torch.equal(keep_mask(dropout.of(rows, keys)), whole[:, :, rows, keys])
    order = torch.randperm(50)
    rows_of = torch.arange(2)[:, None].expand(2, 50)
    positions = torch.arange(50)
    states = query_states(7, 3, rows_of, positions, torch.arange(4))
    assert torch.equal(states[:, order], query_states(7, 3, rows_of, positions[order], torch.arange(4)))
    assert torch.equal(states[:, :, 2:], query_states(7, 3, rows_of, positions, torch.arange(2, 4)))
    assert torch.equal(states[1:], query_states(7, 3, rows_of[1], positions, torch.arange(4)))
    assert torch.equal(states, query_states(7 + (1 << 64), 3, rows_of, positions.int(), torch.arange(4)))


def test_dropout_is_the_generator_it_says_it_is() -> None:
    """Against unsigned arithmetic in Python: the bits are the same on every device and in every release."""

    def mixed(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    def bits(*values: int) -> int:
        state = 0
        for value in values:
            state = mixed(state ^ mixed((value + 0x9E3779B97F4A7C15) % 2**64))
        return state

    states = query_states(-5, 2, torch.tensor([[3], [4]]), torch.tensor([1 << 40]), torch.tensor([9, 0]))
    expected = [[[bits(-5, 2, row, 1 << 40, head) for head in (9, 0)]] for row in (3, 4)]
    assert [[[x % 2**64 for x in heads] for heads in rows] for rows in states.tolist()] == expected
    mask = keep_mask(Dropout(0.3, states, torch.arange(100)))
    for b, row in enumerate((3, 4)):
        for n, head in enumerate((9, 0)):
            drawn = [bits(-5, 2, row, 1 << 40, head, key) ^ (1 << 63) for key in range(100)]
            assert mask[b, n, 0].tolist() == [value >= int(0.3 * 2**64) for value in drawn]


def test_kernels_by_name() -> None:
    q, wide, odd = torch.empty(1, 4, 2, 8), torch.empty(1, 4, 2, 16), torch.empty(1, 4, 2, 8, dtype=torch.float8_e5m2)
    assert available_kernels("cpu") == ["reference", "torch"]
    assert select_kernel("auto", q, q, q) == "torch"
    assert select_kernel("auto", q, q, wide) == "torch"
    assert select_kernel("auto", odd, odd, odd) == "reference"
    assert select_kernel("Reference", q, q, wide) == "reference"
    with pytest.raises(UnsupportedError, match=r"dtype torch.float8_e5m2; use CPConfig\(kernel=\"reference\"\)"):
        select_kernel("torch", odd, odd, odd)
    with pytest.raises(ValueError, match="may be auto, reference, torch"):
        select_kernel("flash", q, q, q)
    assert select_kernel("auto", q, q, q, deterministic=True) == "torch"
    cuda = TorchCudaKernel()
    assert cuda.refusal(q, q, wide) is None
    assert cuda.refusal(*(torch.empty(1, 4, 2, d) for d in (8, 8, 257))) == "head dim 257: at most 256 is possible"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"softcap": True}, "got softcap;"),
        ({"dropout": True}, "got dropout: its generator is its own, and the mask would depend on the number of ranks;"),
        ({"softcap": True, "dropout": True}, "got softcap; dropout: its generator"),
    ],
)
def test_options_choose_the_kernel(options: dict[str, bool], reason: str) -> None:
    q = torch.empty(1, 4, 2, 8)
    assert select_kernel("auto", q, q, q, **options) == "reference"
    assert select_kernel("reference", q, q, q, **options) == "reference"
    with pytest.raises(UnsupportedError, match=reason) as raised:
        select_kernel("torch", q, q, q, **options)
    assert 'CPConfig(kernel="reference")' in str(raised.value)
    assert TorchCudaKernel().refusal(q, q, q, **options) == get_kernel("torch", "cpu").refusal(q, q, q, **options)
    assert Loud().refusal(q, q, q, **options) == "; ".join(options), "a kernel that says nothing of options has none"


def test_a_kernel_never_passes_over_an_option() -> None:
    q, task = torch.randn(1, 4, 2, 8), Task(0, 4, 0, 4, -UNBOUNDED, 0)
    for softmax in (Softmax(1.0, 5.0), Softmax(1.0, None, dropout_of(0.1, 4, 4, 2, batch=1))):
        with pytest.raises(UnsupportedError, match="kernel 'torch' cannot be used here"):
            get_kernel("torch", "cpu").forward(q, q, q, Tasks.of(task), softmax, AttentionSum(q, 8))


@pytest.fixture
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it: ``auto`` considers every kernel."""
    monkeypatch.setattr(registry, "_KERNELS", copy.deepcopy(registry._KERNELS))
    monkeypatch.setattr(registry, "_PREFERENCES", dict(registry._PREFERENCES))
    get_kernel.cache_clear()
    yield
    get_kernel.cache_clear()


@pytest.mark.usefixtures("clean_registry")
def test_deterministic_refuses_kernels_that_are_not() -> None:
    on_gpu = torch.empty(1, 4, 2, 8, device="meta")
    register_kernel("wobbly", "meta", "cphandler.kernels.torch_cuda:TorchCudaKernel")
    assert select_kernel("wobbly", on_gpu, on_gpu, on_gpu) == "wobbly"
    with pytest.raises(UnsupportedError, match=r"only under torch.use_deterministic_algorithms\(True\)"):
        select_kernel("wobbly", on_gpu, on_gpu, on_gpu, deterministic=True)


@pytest.mark.usefixtures("clean_registry")
def test_a_kernel_of_ones_own() -> None:
    register_kernel("mine", "any", "tests.test_kernels:Loud")
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 4], config=CPConfig(kernel="mine"))
    x = torch.randn(4, 2, 8)
    with pytest.raises(RuntimeError, match="mine was asked"):
        handler.core_attn(None, x, x, x)


class Loud(Kernel):
    name = "mine"

    def misfit(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        return None

    def forward(self, *args: object) -> None:
        raise RuntimeError("mine was asked")

    def backward(self, *args: object) -> None:
        raise NotImplementedError


def test_tables_are_made_once_and_freed_with_their_keeper() -> None:
    tables, cpu = DeviceTables(), torch.device("cpu")
    window = Task(0, 128, 0, 256, -3, 4)
    with torch.inference_mode():
        first = additive_mask(window, torch.float32, cpu, tables)
    assert not first.is_inference(), "scored first, the same batch may train later"
    assert additive_mask(window, torch.float32, cpu, tables).data_ptr() == first.data_ptr()
    assert additive_mask(window, torch.bfloat16, cpu, tables).dtype == torch.bfloat16
    assert len(tables) == 2
    assert first._base is not None
    table = weakref.ref(first._base)
    del tables, first
    assert table() is None


def test_tables_beyond_the_limit_are_made_anew() -> None:
    tables, cpu = DeviceTables(2), torch.device("cpu")
    for number in (1, 2, 1, 3, 1):
        assert tables.get(number, cpu, lambda number=number: torch.tensor(number)) == number  # type: ignore[misc]
        assert len(tables) <= 2


def test_each_stream_has_its_own_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA does about it is not run here; the streams are made up."""
    tables, cpu, seen = DeviceTables(), torch.device("cpu"), []
    for stream in (1, 2, 1):
        monkeypatch.setattr("cphandler.kernels.tables._stream", lambda _, stream=stream: stream)
        seen.append(tables.get("x", cpu, lambda: torch.zeros(())))
    assert seen[0] is seen[2]
    assert seen[0] is not seen[1]


class Counting(type(get_kernel("torch", "cpu"))):  # type: ignore[misc]
    """The torch kernel, which counts its calls."""

    calls = 0

    def block_forward(self, *arguments: Any) -> Any:
        self.calls += 1
        return super().block_forward(*arguments)


ALIKE = {
    "documents": ([Task(7 * i, 7, 7 * i, 7, -UNBOUNDED, 0) for i in range(9)], 1),
    "windows": ([Task(5 * i, 5, 8 * i, 8, -2, 3) for i in range(4)], 1),
    "full": ([Task(5 * i, 5, 8 * i, 8, *FULL) for i in range(4)], 1),
    "one that differs": ([Task(7 * i + (i > 2), 7, 7 * i, 7, -UNBOUNDED, 0) for i in range(6)], 2),
    "keys apart": ([Task(7 * i, 7, 9 * i, 7, -UNBOUNDED, 0) for i in range(3)], 1),
    "queries apart": ([Task(12 * i + 3, 5, 8 * i, 8, *FULL) for i in range(5)], 1),
    "both apart": ([Task(9 * i + 1, 4, 11 * i + 2, 6, -1, 3) for i in range(6)], 1),
    "other distances": ([Task(q, 5, k, 5, *FULL) for q, k in ((0, 0), (9, 7), (18, 14), (24, 21), (29, 27))], 2),
    "over rows that saw others": (
        [Task(4, 21, 40, 9, *FULL), *(Task(12 * i, 5, 8 * i, 8, *FULL) for i in range(5))],
        2,
    ),
    "over keys that others saw": (
        [Task(60, 5, 3, 30, *FULL), *(Task(12 * i, 5, 9 * i, 8, *FULL) for i in range(5))],
        2,
    ),
    "the same rows": ([Task(0, 7, 9 * i, 7, *FULL) for i in range(3)], 3),
    "keys that overlap": ([Task(7 * i, 7, 6 * i, 7, -UNBOUNDED, 0) for i in range(3)], 3),
    "the same keys": ([Task(7 * i, 7, 0, 7, -UNBOUNDED, 0) for i in range(3)], 3),
    "two kinds": ([Task(7 * i, 7, 7 * i, 7, -UNBOUNDED, 0 if i < 2 else UNBOUNDED) for i in range(5)], 2),
    "none": ([], 0),
}


@pytest.mark.parametrize(("tasks", "calls"), ALIKE.values(), ids=ALIKE.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
def test_equal_blocks_at_equal_distances_are_one_call(
    tasks: list[Task], calls: int, dtype: torch.dtype, batch: int
) -> None:
    generator = torch.Generator().manual_seed(batch)
    shapes = [(batch, 70, 4, 8), (batch, 71, 2, 8), (batch, 71, 2, 11), (batch, 70, 4, 11), (batch, 70, 4)]
    q, k, v, grad, grad_lse = (torch.randn(x, generator=generator, dtype=torch.float64).to(dtype) for x in shapes)
    leaves = [x.double().clone().requires_grad_() for x in (q, k, v)]
    seen = torch.stack([open_cells(task, 70, 71) for task in tasks]).any(0) if tasks else torch.zeros(70, 71).bool()
    expected, expected_lse = dense(*leaves, seen, PLAIN)
    covered = seen.any(1)
    total = (expected * grad.double()).sum() + (expected_lse * grad_lse.double())[:, covered].sum()
    wanted = torch.autograd.grad(total, leaves)
    kernel, result = Counting(), AttentionSum(q, 11)
    kernel.forward(q, k, v, Tasks.of(*tasks), PLAIN, result)
    assert kernel.calls == calls
    out, lse = result.total()
    grads = Gradients(*(RowSum.like(x) for x in (q, k, v)))
    saved = Saved(q, out, lse, grad, grad_lse.to(lse.dtype))
    kernel.backward(saved, k, v, Tasks.of(*tasks), PLAIN, grads)
    assert_close(out, expected, dtype=dtype)
    assert_close(lse, expected_lse, dtype=lse.dtype if dtype == torch.float64 else dtype)
    for grad_of, e in zip(grads, wanted, strict=True):
        assert_close(grad_of.total(), e, dtype=dtype)
