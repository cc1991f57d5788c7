"""A CUDA graph of a step, captured over one packing and replayed for others: errors against float64, and times."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.kernels import BOUNDS, Sample
from benchmarks.gpu.rows import ABSENT, OK, WRONG, Record, Row
from benchmarks.gpu.work import Inputs, errors, milliseconds, reference, usable
from cphandler import CapturedBatch, Causal, ContextParallelHandler, CPConfig, Mask, SlidingWindow, get_cp_handler_cls
from cphandler.kernels import Softmax, get_kernel

HEADS, CHANNELS = (8, 2), 64

Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""Records a step, and gives what runs it again."""


def packings(rows: int) -> tuple[tuple[int, ...], ...]:
    """Lengths of documents, with so many tokens each time: the first is captured, all are replayed."""
    halves = (rows // 2, rows // 4, rows - rows // 2 - rows // 4)
    short = tuple(1 + i % 5 for i in range(rows // 8))
    return halves, (rows,), (*short, rows - sum(short)), (1, rows - 2, 1), halves


def recorded(step: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of a step, after three that warm up on a stream of their own, as torch asks."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class Replays(NamedTuple):
    """What replays gave.

    Attributes:
        error: the largest relative L2 error of out, dq, dk and dv, of all packings.
        where: which.
        eager: milliseconds of the step without the graph.
        replay: milliseconds of a replay.
    """

    error: float
    where: str
    eager: float
    replay: float


def check_graphs(record: Record, device: torch.device, *, small: bool) -> None:
    """Every kernel that serves packings, on one rank: captured once, replayed for five packings."""
    if device.type != "cuda":
        record.add(Row("graphs", "a step replayed for other packings", ABSENT, note="graphs are of CUDA devices"))
        return
    rows, masks = 512 if small else 4096, (Causal(), SlidingWindow(100))
    for name, reason in usable(device).items():
        kernel = get_kernel(name, device.type)
        if reason is not None or not kernel.serves_packings(torch.bfloat16):
            continue
        for mask in masks:
            record.add(row_of(name, mask, replays(name, mask, rows, device, recorded)))


def row_of(name: str, mask: Mask, found: Replays) -> Row:
    """A kernel's row."""
    verdict = OK if found.error <= BOUNDS[torch.bfloat16] else WRONG
    what = f"{name} under {mask}, replayed for other packings"
    ratio = found.replay / found.eager
    return Row("graphs", what, verdict, found.error, found.replay, ratio, f"to the step without a graph; {found.where}")


def replays(name: str, mask: Mask, rows: int, device: torch.device, record: Recorder) -> Replays:
    """Capture over the first packing, and replay for each.

    Args:
        name: of the kernel.
        mask: who sees whom.
        rows: tokens of every packing.
        device: where.
        record: makes the graph.
    """
    inputs = Inputs.drawn(rows, HEADS, CHANNELS, torch.bfloat16, device)
    leaves, results = [x.squeeze(0).requires_grad_() for x in inputs[:3]], dict[str, Tensor]()
    several = packings(rows)
    batch = CapturedBatch(_handler(name, mask, several[0]), max_documents=max(map(len, several)), device=device)

    def step() -> None:
        out = batch.handler.core_attn(None, *leaves)
        grads = torch.autograd.grad(out, leaves, inputs.grad_out.squeeze(0))
        results.update(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))

    replay = record(step)
    graphed = dict(results)
    worst, where = 0.0, ""
    for lengths in several:
        batch.load(_handler(name, mask, lengths))
        for x in graphed.values():
            x.fill_(float("nan"))
        replay()
        sample = Sample("", lengths, mask)
        expected = reference(inputs, sample.blocks(), Softmax(CHANNELS**-0.5))
        found = errors(tuple(graphed[x].unsqueeze(0) for x in graphed), expected)  # type: ignore[arg-type]
        for result, error in zip(graphed, found, strict=True):
            if not error <= worst:  # NaN is the worst
                worst, where = error, f"{result} of {len(lengths)} documents"
    return Replays(worst, where, milliseconds(step, device), milliseconds(replay, device))


def _handler(name: str, mask: Mask, lengths: tuple[int, ...]) -> ContextParallelHandler:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    config = CPConfig(kernel=name)
    return get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=offsets, mask=mask, config=config)
