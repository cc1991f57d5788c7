"""What the options of ``core_attn`` cost: a forward pass on one rank, one thread, beside plain attention.

Prints, per option, the CPU seconds of a causal forward pass (median of interleaved repeats) and, taken repeat by
repeat, its ratio to the plain call and to the plain call of the tile kernel. Every option is checked against the dense
float64 reference first, over a shorter batch.

    python -m benchmarks.options
"""

from __future__ import annotations

import os
import statistics
import time
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.allocator import ALLOCATOR
from cphandler import CPConfig, SlidingWindow, get_cp_handler_cls
from cphandler.handler.contract import ContextParallelHandler
from cphandler.testing import RankPool
from cphandler.testing.cases import Batch, Case
from cphandler.testing.laws import check_all

PLAIN, TILES = "plain", "plain, tile kernel"

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    PLAIN: ("auto", {}),
    "return_lse": ("auto", {"return_lse": True}),
    "sinks": ("auto", {"sinks": True}),
    "return_max_logit": ("auto", {"return_max_logit": True}),
    "a window of 512": ("auto", {"mask": SlidingWindow(511)}),
    TILES: ("reference", {}),
    "softcap": ("auto", {"softcap": 20.0}),
    "dropout": ("auto", {"dropout_p": 0.1, "dropout_seed": 1, "layer_number": 1}),
}
"""By name: the kernel and what is asked for; softcap and dropout make ``auto`` take the tile kernel."""


def checked_case(kernel: str, asked: dict[str, Any]) -> Case:
    """The same call over a batch that the dense reference can hold."""
    fields = {"return_lse": "lse", "return_max_logit": "max_logit", "layer_number": "layer"}
    described = {fields.get(name, name): value for name, value in asked.items() if name != "dropout_seed"}
    return Case("local", 1, **{"batch": Batch((700,)), "heads": (2, 2), "kernel": kernel, "lse": False, **described})


def seconds_of(handlers: dict[str, ContextParallelHandler], tensors: tuple[Tensor, Tensor, Tensor], name: str) -> float:
    """One forward pass."""
    kernel, asked = OPTIONS[name]
    if asked.get("sinks"):
        asked = {"sinks": torch.zeros(tensors[0].shape[1])}
    start = time.process_time()
    handlers[kernel].core_attn(None, *tensors, **asked)
    return time.process_time() - start


def rank_seconds(tokens: int, heads: int, head_dim: int, dtype: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of every option, one round after another; the first round is not counted."""
    handlers = {
        kernel: get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, tokens], config=CPConfig(kernel=kernel))
        for kernel in ("auto", "reference")
    }
    torch.manual_seed(0)
    q, k, v = (torch.randn(tokens, heads, head_dim, dtype=getattr(torch, dtype)) for _ in range(3))
    samples: dict[str, list[float]] = {name: [] for name in OPTIONS}
    with torch.no_grad():
        for _ in range(repeats + 1):
            for name, taken in samples.items():
                taken.append(seconds_of(handlers, (q, k, v), name))
    return {name: taken[1:] for name, taken in samples.items()}


def ratio(taken: list[float], beside: list[float]) -> str:
    """Median of the ratios of repeats that ran next to each other."""
    return f"{statistics.median(a / b for a, b in zip(taken, beside, strict=True)):.2f}"


def main(
    *,
    tokens: Annotated[int, typer.Option(help="Length of the one document.")] = 4096,
    heads: int = 8,
    head_dim: int = 64,
    dtype: str = "float32",
    repeats: Annotated[int, typer.Option(help="Interleaved repeats; medians are shown.")] = 7,
) -> None:
    """Time the forward pass of each option."""
    os.environ.update(ALLOCATOR)
    with RankPool(4, timeout=600) as pool:
        pool.run(check_all, [checked_case(kernel, asked) for kernel, asked in OPTIONS.values()])
    with RankPool(1, timeout=600) as pool:
        samples = pool.run(rank_seconds, tokens, heads, head_dim, dtype, repeats)[0]
    table = Table(
        title=f"Forward, causal, {tokens} tokens, {heads} heads of {head_dim}, {dtype}",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    for header in ("option", "CPU s", "to plain", "to the tile kernel"):
        table.add_column(header, justify="left" if header == "option" else "right", no_wrap=True)
    for name, taken in samples.items():
        beside = (ratio(taken, samples[PLAIN]), ratio(taken, samples[TILES]))
        table.add_row(name, f"{statistics.median(taken):.3f}", *beside)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
