"""The numbers by which work is cut, on this machine: what the constants of kernels and exchanges were chosen by.

Each row is one way to cut one task; forward and backward together, CPU time on one thread, as a ratio to the fastest.

    python -m benchmarks.blocks
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from cphandler.attention import exchange
from cphandler.kernels import AttentionSum, RowSum, Softmax, Task, Tasks
from cphandler.kernels.blocks import BlockKernel
from cphandler.kernels.kernel import Gradients, Saved
from cphandler.kernels.reference import ReferenceKernel
from cphandler.kernels.strips import strips, tiles
from cphandler.kernels.tables import DeviceTables
from cphandler.kernels.torch_cpu import TorchCpuKernel
from cphandler.plan.plan import Plan
from cphandler.sharding.shard import HOST
from cphandler.tokens.intervals import UNBOUNDED, table

Cutter = Callable[[Task], Iterator[Task]]
HEADS, DIM = 4, 64


def cut_by(kernel_cls: type[BlockKernel], cutter: Cutter) -> BlockKernel:
    """A kernel over blocks that are cut in another way."""

    class Recut(kernel_cls):  # type: ignore[misc, valid-type]
        """The same with its blocks chosen from outside."""

        def blocks(self, task: Task, dtype: torch.dtype) -> Iterator[Task]:
            """See :meth:`BlockKernel.blocks`."""
            return cutter(task)

    made: BlockKernel = Recut()
    return made


def attention(kernel: BlockKernel, dtype: torch.dtype, *several: Task) -> Callable[[], None]:
    """Forward and backward of some tasks."""
    rows, keys = (max(getattr(task, side).stop for task in several) for side in ("rows", "keys"))
    q, k, v, grad = (torch.randn(1, length, HEADS, DIM).to(dtype) for length in (rows, keys, keys, rows))
    softmax, tasks = Softmax(DIM**-0.5, masks=DeviceTables()), Tasks.of(*several)

    def run() -> None:
        result = AttentionSum(q, DIM)
        kernel.forward(q, k, v, tasks, softmax, result)
        out, lse = result.total()
        grads = Gradients(*(RowSum.like(x) for x in (q, k, v)))
        kernel.backward(Saved(q, out, lse, grad, None), k, v, tasks, softmax, grads)

    return run


def copying(runs: int, few: int) -> Callable[[], None]:
    """Packing 2048 rows out of runs, and adding them back, where up to ``few`` runs are taken one by one."""
    length = 2048 // runs
    rows, total = (torch.randn(1, 4096, HEADS, DIM),) * 2, RowSum((1, 4096, HEADS, DIM), torch.float32, HOST)
    runs_of = table([(2 * length * i, length) for i in range(runs)], 2)
    route = exchange.Route(Plan(1, 0, table([], 7)), "", DeviceTables())

    def run() -> None:
        exchange._FEW_RUNS = few
        packed = exchange._packed_runs(route, rows, runs_of)
        exchange._add_runs(route, total, packed[0], runs_of)

    return run


def timed(ways: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """The least CPU seconds of each way, in turns: what else runs on the machine only adds to it."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, run in ways.items():
            start = time.process_time()
            run()
            if turn:  # the first one warms up
                samples[name].append(time.process_time() - start)
    return {name: min(values) for name, values in samples.items()}


def questions() -> Iterator[tuple[str, dict[str, Callable[[], None]]]]:
    """What is compared: for each case, ways by name."""
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        for n in (512, 768, 1024, 2048, 4096):
            task = Task(0, n, 0, n, -UNBOUNDED, 0)
            ways: dict[str, Cutter] = {f"strips of {r}": partial(strips, rows=r, widest=2048) for r in (64, 128, 256)}
            ways["one square"] = lambda task: iter([task])
            yield (
                f"causal {n}, {kind}",
                {way: attention(cut_by(TorchCpuKernel, c), dtype, task) for way, c in ways.items()},
            )
        window = Task(0, 1024, 0, 7168, -6144, 0)
        ways = {f"apart from {w}": partial(strips, rows=128, widest=w) for w in (512, 1024, 2048, 4096, 8192)}
        yield f"window, {kind}", {way: attention(cut_by(TorchCpuKernel, c), dtype, window) for way, c in ways.items()}
    full = Task(0, 2048, 0, 4096, -UNBOUNDED, UNBOUNDED)
    ways = {f"{r} x {c}": partial(tiles, rows=r, columns=c) for r in (64, 256, 1024) for c in (512, 2048)}
    yield "tiles", {way: attention(cut_by(ReferenceKernel, c), torch.float32, full) for way, c in ways.items()}
    for runs in (4, 8, 16, 32, 64, 256):
        yield f"{runs} runs", {"one by one": copying(runs, runs), "by index": copying(runs, 0)}


def launch_pairs(dtype: torch.dtype, repeats: int) -> int:
    """Pairs that a task costs beside its own: many short causal documents beside one full block."""
    many, rows, side = 256, 16, 2048
    short = [Task(rows * i, rows, rows * i, rows, -UNBOUNDED, 0) for i in range(many)]
    block = Task(0, side, 0, side, -UNBOUNDED, UNBOUNDED)
    ways = {"short": attention(TorchCpuKernel(), dtype, *short), "block": attention(TorchCpuKernel(), dtype, block)}
    seconds = timed(ways, repeats)
    return round(seconds["short"] / many / seconds["block"] * side**2 - rows * (rows + 1) / 2)


def main(*, repeats: Annotated[int, typer.Option(help="Repeats of each way.")] = 7) -> None:
    """Time every way and print its ratio to the fastest."""
    torch.set_num_threads(1)
    shown = Table(box=box.SIMPLE_HEAD)
    for header in ("case", "ms of the fastest", "ratio to it"):
        shown.add_column(header)
    for name, ways in questions():
        seconds = timed(ways, repeats)
        best = min(seconds.values())
        ratios = ", ".join(f"{way} {value / best:.2f}" for way, value in seconds.items())
        shown.add_row(name, f"{1000 * best:.1f}", ratios)
    console = Console(width=150)
    console.print(shown)
    for dtype in (torch.float32, torch.bfloat16):
        console.print(f"a task costs as much as {launch_pairs(dtype, repeats)} pairs, {HEADS} heads of {DIM}, {dtype}")


if __name__ == "__main__":
    typer.run(main)
