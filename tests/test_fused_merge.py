"""The merge in one pass against torch's operations, in Triton's interpreter where Triton is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cphandler.kernels import merge
from cphandler.kernels.merge import merge_into

ROOT = Path(__file__).parent.parent
SHAPES = [(1, 5, 3, 8), (2, 7, 2, 24), (1, 1, 1, 1), (3, 4, 2, 64)]


def rows(shape: tuple[int, int, int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An output in a wider memory, and a log-sum-exp of which some rows are blind."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(*shape[:2], 2 * shape[2], shape[3], generator=generator)[:, :, ::2]
    lse = 3 * torch.randn(*shape[:2], 2 * shape[2], generator=generator)[:, :, ::2]
    blind = torch.rand(shape[:3], generator=generator) < 0.3
    return out.masked_fill_(blind.unsqueeze(-1), 0.0), lse.masked_fill_(blind, float("-inf"))


def compare() -> None:
    """To be run under Triton's interpreter."""
    from cphandler.kernels.fused_merge import merge_rows  # noqa: PLC0415

    for seed, shape in enumerate(SHAPES):
        for dtype in (torch.float32, torch.bfloat16):
            block_out, block_lse = rows(shape, seed + 50)
            wide = (shape[0], shape[1] + 4, *shape[2:])
            for index in (None, torch.randperm(wide[1])[: shape[1]]):
                ours, theirs = (rows(shape if index is None else wide, seed) for _ in range(2))
                merge_rows(*ours, block_out.to(dtype), block_lse, index)
                merge_into(*theirs, block_out.to(dtype), block_lse, index)
                for a, e in zip(ours, theirs, strict=True):
                    torch.testing.assert_close(a, e, rtol=2e-6, atol=2e-6)
                    assert torch.equal(torch.isinf(a), torch.isinf(e))


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", "from tests.test_fused_merge import compare; compare()"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=120)


def test_rows_that_lie_apart() -> None:
    """What torch's operations do with an index is what they do without, row by row."""
    out, lse = rows((2, 9, 2, 8), 1)
    block_out, block_lse = rows((2, 4, 2, 8), 2)
    index = torch.tensor([7, 0, 3, 8])
    expected_out, expected_lse = out[:, index].contiguous(), lse[:, index].contiguous()
    merge_into(expected_out, expected_lse, block_out, block_lse)
    untouched = out[:, 1].clone()
    merge_into(out, lse, block_out, block_lse, index)
    assert torch.equal(out[:, index], expected_out)
    assert torch.equal(lse[:, index], expected_lse)
    assert torch.equal(out[:, 1], untouched)


def test_a_merge_that_cannot_be_launched_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton looks for a C compiler when it launches, not when it is imported."""
    calls: list[int] = []

    def launched(*tensors: torch.Tensor) -> None:
        calls.append(len(tensors))
        if len(calls) == 1:
            raise RuntimeError("Failed to find C compiler")

    fused = SimpleNamespace(merge_rows=launched)
    monkeypatch.setattr(merge, "import_module", lambda _: fused)
    merge._fused.cache_clear()
    try:
        assert merge._fused(torch.device("cpu")) is None
        merge._fused.cache_clear()
        assert merge._fused(torch.device("cpu")) is fused
        assert merge._fused(torch.device("cpu")) is fused
        assert calls == [4, 4], "tried once on a device"
    finally:
        merge._fused.cache_clear()
