"""What a small ``core_attn`` costs above its kernel: microseconds of the host, one rank, one thread, forward.

The CPU kernel is timed alone, on the same tensors in the shape it takes. CUDA's operators are the doubles of the tests,
which compute once, and whose own time is measured inside each call and taken off. All rows are timed in turns; the
least counts, since whatever else runs on the machine only adds to it, and the median says how much it did.

    python -m benchmarks.overhead
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cphandler import CPConfig, get_cp_handler_cls
from cphandler.testing import dense_attention, visible_pairs
from cphandler.testing.cases import Batch, Case, documents_of
from tests.doubles import operators
from tests.doubles.packages import kernels_on_cpu, prefixed

HEADS, DIM = 4, 32
PACKS = {"one document": (16,), "three": (5, 4, 7), "64 alike": (24,) * 64}
DOUBLES = {
    "torch_flash": ("_flash_attention_forward", torch.bfloat16),
    "torch_efficient": ("_efficient_attention_forward", torch.float32),
    "torch_cudnn": ("_cudnn_attention_forward", torch.bfloat16),
}
"""By kernel: the operator that it calls, and a dtype that it takes."""

Microseconds = Callable[[], float]
"""Does the work once; what of it is to be counted."""


class Inside:
    """Nanoseconds that functions take while others are timed around them.

    Attributes:
        nanoseconds: so far.
        answers_again: for shapes that were met functions answer as they did then; not while results are looked at,
            since launches of one call may have the same shapes.
    """

    def __init__(self) -> None:
        self.nanoseconds, self.answers_again = 0, False

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time noted.

        What it computes would leave the caches cold, which a launch on a GPU does not.
        """
        answers: dict[Hashable, Any] = {}

        def run(*args: Any, **options: Any) -> Any:
            start = time.perf_counter_ns()
            shapes = tuple(x.shape if isinstance(x, Tensor) else None for x in args)
            if shapes not in answers or not self.answers_again:
                answers[shapes] = function(*args, **options)
            self.nanoseconds += time.perf_counter_ns() - start
            return answers[shapes]

        return run

    def left_out_of(self, run: Callable[[], Any]) -> Microseconds:
        """Microseconds of some work without what is noted in it."""

        def one() -> float:
            self.nanoseconds, start = 0, time.perf_counter_ns()
            run()
            return (time.perf_counter_ns() - start - self.nanoseconds) / 1000

        return one


def call(lengths: tuple[int, ...], kernel: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A forward pass whose result was found right."""
    case = Case("local", 1, batch=Batch(lengths))
    offsets = documents_of(case).offsets.tolist()
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=offsets, config=CPConfig(kernel=kernel))
    q, k, v = (torch.randn(offsets[-1], HEADS, DIM).to(dtype) for _ in range(3))
    seen = visible_pairs(case.mask, documents_of(case))
    wanted, _ = dense_attention(q.double(), k.double(), v.double(), seen, qkv_format="thd")
    narrow = dtype.itemsize == 2
    torch.testing.assert_close(handler.core_attn(None, q, k, v).double(), wanted, rtol=0, atol=2e-2 if narrow else 1e-5)
    return lambda: handler.core_attn(None, q, k, v)


def kernel_alone() -> Callable[[], Any]:
    """The CPU kernel on 16 rows, in the shape it takes."""
    q, k, v = (torch.randn(16, HEADS, DIM).unsqueeze(0).transpose(1, 2) for _ in range(3))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    return lambda: flash(q, k, v, 0.0, True, attn_mask=None, scale=DIM**-0.5)


def ways(stack: ExitStack, inside: Inside) -> dict[str, Microseconds]:
    """What is timed, by name."""
    whole = call(PACKS["one document"], "torch", torch.float32)

    def inference() -> None:
        with torch.inference_mode():
            whole()

    found = {"the CPU kernel alone": kernel_alone(), "CPU, [16, 4, 32]": whole, "the same, inference mode": inference}
    doubles: dict[str, Any] = {name: operators.DOUBLES[name] for name, _ in DOUBLES.values()}
    functions = {name: inside.counted(double) for name, double in doubles.items()}
    stack.enter_context(mock.patch.dict(operators.DOUBLES, functions))
    stack.enter_context(kernels_on_cpu())
    for kernel, (_, dtype) in DOUBLES.items():
        for pack, lengths in PACKS.items():
            found[f"{kernel}, {pack}"] = call(lengths, prefixed(kernel), dtype)
    return {name: inside.left_out_of(run) for name, run in found.items()}


def main(*, repeats: Annotated[int, typer.Option(help="Turns, of twenty calls each.")] = 30) -> None:
    """Time a call on each kernel."""
    torch.set_num_threads(1)
    with ExitStack() as stack, torch.no_grad():
        inside = Inside()
        timed = ways(stack, inside)
        inside.answers_again = True
        samples: dict[str, list[float]] = {name: [] for name in timed}
        gc.disable()
        for _ in range(repeats):
            for name, run in timed.items():
                samples[name] += [run() for _ in range(20)][1:]  # caches are another way's at the first
    alone = samples.pop("the CPU kernel alone")
    shown = Table(title="Microseconds above the kernel", box=box.SIMPLE_HEAD, title_justify="left")
    for header in ("call", "least", "median"):
        shown.add_column(header, justify="left" if header == "call" else "right", no_wrap=True)
    for name, taken in samples.items():
        off = (0.0, 0.0) if name.split(",")[0] in DOUBLES else (min(alone), statistics.median(alone))
        shown.add_row(name, f"{min(taken) - off[0]:.0f}", f"{statistics.median(taken) - off[1]:.0f}")
    console = Console()
    console.print(shown)
    console.print(f"the CPU kernel alone: {min(alone):.0f}, {statistics.median(alone):.0f}")


if __name__ == "__main__":
    typer.run(main)
