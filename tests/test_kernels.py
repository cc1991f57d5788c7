"""Kernels take any band: random tasks against a dense softmax, forward and backward, gradient of the lse included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cphandler import CPConfig, UnsupportedError, get_cp_handler_cls
from cphandler.comm import accumulator_dtype
from cphandler.intervals import UNBOUNDED
from cphandler.kernels import Kernel, Task, available_kernels, get_kernel, merge, register_kernel, select_kernel
from cphandler.kernels.kernel import Gradients, Saved
from cphandler.kernels.strips import additive_mask, strips
from cphandler.kernels.torch_cuda import TorchCudaKernel
from cphandler.testing import assert_close


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


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    times = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(times, 2), v.repeat_interleave(times, 2)
    scores = (torch.einsum("blnd,bmnd->blnm", q, k) * scale).masked_fill(~seen[:, None], float("-inf"))
    lse = torch.logsumexp(scores, -1)
    return torch.einsum("blnm,bmnd->blnd", torch.exp(scores - lse.unsqueeze(-1)).nan_to_num(0.0), v), lse


def check(
    kernel: Kernel, task: Task, queries: int, keys: int, *, heads: tuple[int, int], dtype: torch.dtype, d: int = 16
) -> None:
    generator = torch.Generator().manual_seed(task.nq * 1000 + task.nk)
    n, g = heads
    shapes = [(2, queries, n, d), (2, keys, g, d), (2, keys, g, d), (2, queries, n, d), (2, queries, n)]
    q, k, v, grad_out, grad_lse = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    seen = open_cells(task, queries, keys)
    expected, expected_lse = dense(*leaves, seen, 0.3)
    rows = slice(task.q, task.q + task.nq)
    total = (expected * grad_out.double()).sum() + (expected_lse[:, rows] * grad_lse.double()[:, rows]).sum()
    wanted = torch.autograd.grad(total, leaves)
    accumulator = accumulator_dtype(dtype)
    out = torch.zeros(q.shape, dtype=accumulator)
    lse = torch.full(q.shape[:-1], float("-inf"), dtype=accumulator)
    kernel.forward(q, k, v, [task], 0.3, out, lse)
    grads = Gradients(*(torch.zeros(x.shape, dtype=accumulator) for x in (q, k, v)))
    saved = Saved(q, out.to(dtype), lse, grad_out, grad_lse.to(accumulator))
    kernel.backward(saved, k, v, [task], 0.3, grads)
    results = [out, lse, *grads]
    for name, a, e in zip(("out", "lse", "dq", "dk", "dv"), results, (expected, expected_lse, *wanted), strict=True):
        if float(e.detach()[torch.isfinite(e)].abs().max()) > 1e-6:  # a gradient that is zero has no relative error
            assert_close(a, e, dtype=dtype, what=f"{name} of {kernel.name} {task} {dtype}")


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 330),
    st.integers(1, 330),
    st.one_of(st.none(), st.integers(-340, 340)),
    st.one_of(st.none(), st.integers(0, 300)),
    st.sampled_from([(4, 4), (4, 2), (2, 1)]),
    st.sampled_from([torch.float64, torch.float32]),
    st.sampled_from(["torch", "reference"]),
)
def test_any_task(
    nq: int, nk: int, lo: int | None, width: int | None, heads: tuple[int, int], dtype: torch.dtype, name: str
) -> None:
    low = -UNBOUNDED if lo is None else lo
    high = UNBOUNDED if width is None else (width - 100 if lo is None else lo + width)
    task = task_between(3, nq, 5, nk, low, high)
    if task is not None:
        check(get_kernel(name, "cpu"), task, nq + 4, nk + 7, heads=heads, dtype=dtype)


LONG = [
    Task(0, 2500, 0, 2500, -UNBOUNDED, 0),
    Task(0, 2200, 0, 2600, -UNBOUNDED, 400),
    Task(0, 2600, 0, 2300, -UNBOUNDED, 50),
    Task(0, 300, 0, 2600, -UNBOUNDED, 2300),
    Task(0, 300, 0, 2900, -2400, 300),
    Task(0, 300, 0, 2900, 0, UNBOUNDED),
]


@pytest.mark.parametrize("task", LONG, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_tasks_take_the_other_cuts(task: Task, dtype: torch.dtype) -> None:
    check(get_kernel("torch", "cpu"), task, task.nq, task.nk, heads=(2, 1), dtype=dtype)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(-70, 70),
    st.integers(0, 60),
    st.integers(1, 20),
    st.integers(0, 30),
)
def test_strips_cover_a_task_once(nq: int, nk: int, lo: int, width: int, rows: int, widest: int) -> None:
    task = task_between(2, nq, 3, nk, lo, lo + width)
    if task is None:
        return
    counts = torch.zeros(nq + 4, nk + 4, dtype=torch.int64)
    for strip in strips(task, rows, widest):
        cells = open_cells(strip, *counts.shape)
        counts += cells
        assert strip.nq <= rows
        block = cells[strip.q : strip.q + strip.nq, strip.k : strip.k + strip.nk]
        assert block.any(1).all(), "no row of a strip is blind: the kernels answer that with a wrong log-sum-exp"
        assert strip.is_full == bool(block.all())
        if not strip.is_full:
            mask = additive_mask(strip, torch.float32, torch.device("cpu"))
            assert torch.equal(mask == 0, block)
    assert torch.equal(counts, open_cells(task, *counts.shape).long())


def test_merge_is_safe_where_nothing_is_seen() -> None:
    out, lse = torch.zeros(1, 3, 1, 2), torch.full((1, 3, 1), float("-inf"))
    block = torch.tensor([[[[1.0, 2]], [[3, 4]], [[0, 0]]]])
    block_lse = torch.tensor([[[0.5], [-0.5], [float("-inf")]]])
    merge(out, lse, block, block_lse)
    assert torch.equal(out, block)
    assert torch.equal(lse, block_lse)
    merge(out, lse, torch.full_like(block, 7.0), torch.full_like(block_lse, float("-inf")))
    assert torch.equal(out, block)
    assert torch.equal(lse, block_lse)
    merge(out, lse, block, block_lse)
    torch.testing.assert_close(out, block)
    torch.testing.assert_close(lse, block_lse + torch.tensor(2.0).log())


class _Recorded(TorchCudaKernel):
    """The CUDA kernel's shapes, followed on meta tensors."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cuda_kernel_has_the_right_shapes(dtype: torch.dtype) -> None:
    """No GPU here: the operators' own shape functions stand in for them, blocks are checked by arithmetic."""
    kernel = _Recorded()
    shapes = [(2, 100, 4, 16), (2, 130, 2, 16), (2, 130, 2, 16)]
    q, k, v = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    for task in (Task(0, 100, 0, 130, -UNBOUNDED, 30), Task(0, 100, 0, 130, -UNBOUNDED, UNBOUNDED)):
        counts = torch.zeros(100, 130, dtype=torch.int64)
        for block in kernel.blocks(task, q):
            counts += open_cells(block, 100, 130)
            if not block.is_full and not (block.nq == block.nk and block.hi == 0):
                continue
            rows, keys = slice(block.q, block.q + block.nq), slice(block.k, block.k + block.nk)
            out, lse = kernel.block_forward(q[:, rows], k[:, keys], v[:, keys], block, 0.3)
            assert out.shape == (2, block.nq, 4, 16)
            assert lse.shape == (2, block.nq, 4)
            assert lse.dtype == torch.float32
            saved = Saved(q[:, rows], out, lse, torch.empty_like(out), None)
            if dtype == torch.bfloat16:
                grads = kernel.block_backward(saved, k[:, keys], v[:, keys], block, 0.3)
                assert [g.shape for g in grads] == [q[:, rows].shape, k[:, keys].shape, v[:, keys].shape]
        assert torch.equal(counts, open_cells(task, 100, 130).long())


def test_kernels_by_name() -> None:
    q, wide = torch.empty(1, 4, 2, 8), torch.empty(1, 4, 2, 16)
    assert available_kernels("cpu") == ["reference", "torch"]
    assert select_kernel("auto", q, q, q) == "torch"
    assert select_kernel("auto", q, q, wide) == "reference"
    assert select_kernel("Reference", q, q, wide) == "reference"
    with pytest.raises(UnsupportedError, match="head dim 8 of queries and 16 of values"):
        select_kernel("torch", q, q, wide)
    with pytest.raises(ValueError, match="may be auto, reference, torch"):
        select_kernel("flash", q, q, q)
    assert select_kernel("auto", q, q, q, deterministic=True) == "torch"


def test_deterministic_refuses_kernels_that_are_not() -> None:
    on_gpu = torch.empty(1, 4, 2, 8, device="meta")
    register_kernel("wobbly", "meta", "cphandler.kernels.torch_cuda:TorchCudaKernel")
    assert select_kernel("wobbly", on_gpu, on_gpu, on_gpu) == "wobbly"
    with pytest.raises(UnsupportedError, match="deterministic=True, and this kernel is not"):
        select_kernel("wobbly", on_gpu, on_gpu, on_gpu, deterministic=True)


def test_a_kernel_of_ones_own() -> None:
    register_kernel("mine", "any", "tests.test_kernels:Loud")
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 4], config=CPConfig(kernel="mine"))
    x = torch.randn(4, 2, 8)
    with pytest.raises(RuntimeError, match="mine was asked"):
        handler.core_attn(None, x, x, x)


class Loud(Kernel):
    name = "mine"

    def refusal(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        return None

    def forward(self, *args: object) -> None:
        raise RuntimeError("mine was asked")

    def backward(self, *args: object) -> None:
        raise NotImplementedError
