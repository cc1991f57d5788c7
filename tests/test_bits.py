"""Bits and precision: two runs, Ulysses beside one rank, bfloat16 on more ranks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cphandler import Causal, SlidingWindow
from cphandler.testing import RankPool, dense_gradients
from cphandler.testing.cases import Batch, Case, draw, group_of, make_handler, visible
from tests.test_options import BACKENDS, LENGTHS, bits, local_tensors


def run_twice(case: Case) -> None:
    """Forward and gradients of two runs have the same bits."""
    group, seed = group_of(case)
    if seed < 0:
        return
    seen = []
    for _ in range(2):
        handler = make_handler(case, group)
        q, k, v, grad = local_tensors(case, seed, handler)
        out = handler.core_attn(None, q, k, v)
        seen.append(bits([out, *torch.autograd.grad(out, (q, k, v), grad)]))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_have_the_same_bits(ranks: RankPool, backend: str, dtype: torch.dtype) -> None:
    for layout in ("zigzag", "contiguous"):
        ranks.run(run_twice, Case(backend, 4, layout=layout, batch=LENGTHS, dtype=dtype, heads=(4, 2), head_dim=16))


def ulysses_bits(case: Case) -> None:
    group, seed = group_of(case)
    if seed < 0:
        return
    handler = make_handler(case, group)
    q, k, v, _ = local_tensors(case, seed, handler)
    out = handler.combine(handler.core_attn(None, q, k, v), handler.seq_dim)
    alone = make_handler(replace(case, backend="local", cp_size=1, layout=None), None)
    whole = alone.core_attn(None, *draw(case, seed)[:3])
    assert bits([out]) == bits([whole])


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (12, 6), (12, 4)], ids=str)
@pytest.mark.parametrize("cp_size", [2, 4])
def test_ulysses_forward_has_the_bits_of_one_rank(ranks: RankPool, heads: tuple[int, int], cp_size: int) -> None:
    for mask in (Causal(), SlidingWindow(9, 3)):
        for layout in ("contiguous", "zigzag"):
            for qkv_format in ("thd", "sbhd"):
                case = Case("ulysses", cp_size, qkv_format, layout, mask, LENGTHS, heads, 16, torch.float32)
                ranks.run(ulysses_bits, case)


@pytest.mark.parametrize("heads", [(30, 30), (30, 6), (6, 2), (5, 1), (2, 2), (1, 1)], ids=str)
def test_uneven_shares_of_heads_have_the_bits_of_one_rank(ranks: RankPool, heads: tuple[int, int]) -> None:
    for cp_size, layout, qkv_format in ((4, "contiguous", "thd"), (3, "zigzag", "sbhd"), (4, "replicated", "bshd")):
        for dtype in (torch.float32, torch.bfloat16):
            case = Case("ulysses", cp_size, qkv_format, layout, Causal(), LENGTHS, heads, 16, dtype)
            ranks.run(ulysses_bits, case)


def precision(case: Case) -> float:
    """Relative L2 error of output and gradients together, in bfloat16, against float64."""
    group, seed = group_of(case)
    q, k, v, grad, *_ = draw(case, seed)
    expected = dense_gradients((q, k, v), visible(case), grad, qkv_format=case.qkv_format)
    handler = make_handler(case, group)
    local = [handler.dispatch(x, 0).requires_grad_() for x in (q, k, v)]
    out = handler.core_attn(None, *local)
    grads = torch.autograd.grad(out, local, handler.dispatch(grad, 0))
    whole = [handler.combine(x, 0).double() for x in (out, *grads)]
    wanted = [expected[0], *expected[2]]
    return max(float((a - e).norm() / e.norm()) for a, e in zip(whole, wanted, strict=True))


@pytest.mark.parametrize(
    "backend", ["ring", *(pytest.param(name, marks=pytest.mark.slow) for name in BACKENDS if name != "ring")]
)
def test_bfloat16_error_does_not_grow_with_ranks(ranks: RankPool, backend: str) -> None:
    batch = Batch((900, 380))
    alone = ranks.run(precision, Case("local", 1, batch=batch, dtype=torch.bfloat16, head_dim=32))[0]
    spread = ranks.run(precision, Case(backend, 4, batch=batch, dtype=torch.bfloat16, head_dim=32))
    assert max(spread) <= 1.5 * alone


@pytest.mark.slow
def test_bfloat16_error_at_eight_ranks() -> None:
    """The table of the script, which fails above 1.5 times one rank's error."""
    script = Path(__file__).parent.parent / "benchmarks" / "precision.py"
    done = subprocess.run(
        [sys.executable, str(script), "--lengths", "900,380"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ring") == done.stdout.count("p2p") == 3
