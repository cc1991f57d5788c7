"""The check for machines with a GPU, run where there is none: that it finds what is wrong, and writes as it goes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import graphs, kernels, ring, waits
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.rows import OK, WRONG, Record
from benchmarks.gpu.work import Inputs, direct
from cphandler import CapturedBatch, Causal, SlidingWindow
from cphandler.kernels import registry
from cphandler.kernels.kernel import Softmax
from cphandler.kernels.registry import get_kernel
from cphandler.kernels.task import Task
from cphandler.kernels.torch_cpu import TorchCpuKernel
from tests.doubles.graphs import captured, room
from tests.doubles.packages import kernels_on_cpu

CPU = torch.device("cpu")


class Drifting(TorchCpuKernel):
    """Forgets a thousandth of each block."""

    def block_forward(self, q: Tensor, k: Tensor, v: Tensor, block: Task, softmax: Softmax) -> tuple[Tensor, Tensor]:
        out, lse = super().block_forward(q, k, v, block, softmax)
        return out * 0.999, lse


def test_the_parts_that_need_no_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    assert main(["--device", "cpu", "--small", "--only", "kernels,ring,waits,graphs", "--json", str(path)]) == 0
    said = capsys.readouterr().out
    assert "never run here: NCCL" in said
    assert "0 wrong of" in said
    rows = json.loads(path.read_text())["rows"]
    assert {row["part"] for row in rows} == {"kernels", "local", "ring", "speed", "waits", "graphs"}
    assert {row["verdict"] for row in rows if row["part"] in ("kernels", "ring")} == {OK}


def test_the_step_that_must_not_wait() -> None:
    """Torch tells of waits on CUDA devices only; the step itself runs anywhere."""
    for offsets in ([0, 1024], [0, 12, 500, 1024]):
        waits.step(offsets, SlidingWindow(100), CPU)


def test_a_kernel_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._KERNELS._loaded, ("torch", "cpu"), Drifting)
    get_kernel.cache_clear()
    try:
        record = Record(None, {})
        kernels.check_kernels(record, CPU, small=True)
        ring.check_ring(record, CPU, small=True)
    finally:
        monkeypatch.undo()
        get_kernel.cache_clear()
    wrong = [row.what for row in record.rows if row.verdict == WRONG]
    assert any("torch float32" in what for what in wrong)
    assert not any("reference" in what for what in wrong)


def test_a_part_that_raises_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ring, "packs", None)
    monkeypatch.setattr("benchmarks.gpu.ring._whole", lambda offsets: 1 / 0)
    assert main(["--device", "cpu", "--small", "--only", "ring,waits"]) == 1
    said = capsys.readouterr().out
    assert "ZeroDivisionError" in said
    assert "waits" in said


def test_a_part_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "everything"])
    assert "no part everything" in capsys.readouterr().err


@pytest.mark.slow
def test_real_ranks_and_the_demo() -> None:
    assert main(["--device", "cpu", "--small", "--only", "ranks,demo"]) == 0


def test_the_kernel_alone_makes_its_launches_and_no_more() -> None:
    sample = kernels.Sample("packed causal", (37, 1, 80), Causal())
    inputs = Inputs.drawn(118, (4, 2), 16, torch.bfloat16, CPU)
    with kernels_on_cpu() as calls:
        kernel = get_kernel("double_torch_flash", "cpu")
        call = direct(kernel, inputs, sample.blocks(), Softmax(0.25), backward=True)
        calls.clear()
        call()
    assert sorted(calls) == ["flash backward", "flash forward"], "the document of one token is causal as the others are"


def test_a_kernel_that_raises_is_one_row_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = kernels.Shape((4, 2), 16, torch.bfloat16, CPU)
    with kernels_on_cpu():
        kernel = get_kernel("double_torch_flash", "cpu")
        assert kernels._checked(kernel, shape, kernels.SMALL).verdict == OK
        monkeypatch.setattr(type(kernel), "launch_backward", lambda *_: {}["nothing"])
        row = kernels._checked(kernel, shape, kernels.SMALL)
    assert (row.verdict, "KeyError" in row.note) == (WRONG, True)


def recorded(step: Callable[[], None]) -> Callable[[], None]:
    with captured() as graph:
        step()
    return graph.replay


def test_a_graph_is_replayed_for_every_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    with kernels_on_cpu(), room():
        for mask in (Causal(), SlidingWindow(20)):
            row = graphs.row_of("flash", mask, graphs.replays("double_torch_flash", mask, 64, CPU, recorded))
            assert row.verdict == OK, row
        monkeypatch.setattr(CapturedBatch, "load", lambda batch, handler: None)
        row = graphs.row_of("flash", Causal(), graphs.replays("double_torch_flash", Causal(), 64, CPU, recorded))
        assert row.verdict == WRONG, row
