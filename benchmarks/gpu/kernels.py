"""Every kernel that runs here against float64, and the time of an attention call above its own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.rows import ABSENT, OK, WRONG, Record, Row
from benchmarks.gpu.work import Blocks, Inputs, Results, computed, direct, errors, milliseconds, reference, usable
from cphandler import (
    Causal,
    ContextParallelHandler,
    CPConfig,
    Full,
    Mask,
    SlidingWindow,
    get_cp_handler_cls,
    plan_batch,
)
from cphandler.kernels import Kernel, Softmax, Tasks, get_kernel
from cphandler.kernels.sums import ALL

BOUNDS = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5, torch.float64: 1e-12}
"""Largest relative L2 error of any result: a few roundings of the inputs' dtype."""

WITHIN = 1.02
"""A call on one rank takes at most so many times the kernel's own time."""


class Sample(NamedTuple):
    """A batch and a mask.

    Attributes:
        name: of the sample.
        lengths: of its documents.
        mask: who sees whom.
    """

    name: str
    lengths: tuple[int, ...]
    mask: Mask

    def blocks(self) -> Blocks:
        """What one rank computes for all of it."""
        offsets = [sum(self.lengths[:i]) for i in range(len(self.lengths) + 1)]
        plan = plan_batch(offsets, 1, mask=self.mask, layout="contiguous", ranks=[0]).plan(0)
        return Blocks(ALL, [(ALL, Tasks(plan.tasks[:, 1:]))])


PACK = (300, 57, 1, 600, 2, 129, 800)
SAMPLES = (
    Sample("dense causal", (2048,), Causal()),
    Sample("dense full", (1024,), Full()),
    Sample("packed causal", PACK, Causal()),
    Sample("packed full", PACK, Full()),
    Sample("window 128", PACK, SlidingWindow(128)),
    Sample("window 100 and 30", (700, 333), SlidingWindow(100, 30)),
)
SMALL = (Sample("packed causal", (37, 1, 80), Causal()), Sample("window 10", (37, 1, 80), SlidingWindow(10)))
SHAPES = (((8, 2), 64), ((8, 8), 128), ((4, 1), 96), ((4, 4), 192), ((4, 2), 256))
"""Heads of queries and keys, and head dims."""


def check_kernels(record: Record, device: torch.device, *, small: bool) -> None:
    """Errors of every kernel, dtype, head dim, and sample; the largest of each kernel, dtype and head dim is a row."""
    for name, reason in usable(device).items():
        if reason is not None:
            record.add(Row("kernels", name, ABSENT, note=reason))
            continue
        for dtype in BOUNDS:
            for heads, channels in SHAPES[:1] if small else SHAPES:
                shape = Shape(heads, channels, dtype, device)
                record.add(_checked(get_kernel(name, device.type), shape, SMALL if small else SAMPLES))


class Shape(NamedTuple):
    """What inputs are drawn as.

    Attributes:
        heads: of queries and keys.
        channels: head dim.
        dtype: of all.
        device: of all.
    """

    heads: tuple[int, int]
    channels: int
    dtype: torch.dtype
    device: torch.device

    def drawn(self, rows: int) -> Inputs:
        """Inputs of so many rows."""
        return Inputs.drawn(rows, self.heads, self.channels, self.dtype, self.device)


def _checked(kernel: Kernel, shape: Shape, samples: tuple[Sample, ...]) -> Row:
    what = f"{kernel.name} {str(shape.dtype)[6:]} heads {shape.heads[0]},{shape.heads[1]} of {shape.channels}"
    refusal = kernel.refusal(*shape.drawn(8)[:3])
    if refusal is not None:
        return Row("kernels", what, "refused", note=refusal)
    worst, where = 0.0, ""
    try:
        for sample, name, found in _errors(kernel, shape, samples):
            if not found <= worst:  # NaN is the worst
                worst, where = found, f"{name} of {sample}"
    except Exception as error:  # other kernels still have something to say, unless it is the device that is broken
        note = f"{type(error).__name__}: {error}".splitlines()[0]
        return Row("kernels", what, WRONG, worst, note=f"after {where or 'nothing'}: {note}")
    verdict = OK if worst <= BOUNDS[shape.dtype] else WRONG
    return Row("kernels", what, verdict, worst, note=where)


def _errors(kernel: Kernel, shape: Shape, samples: tuple[Sample, ...]) -> Iterator[tuple[str, str, float]]:
    softmax = Softmax(shape.channels**-0.5)
    for sample in samples:
        inputs, blocks = shape.drawn(sum(sample.lengths)), sample.blocks()
        results: Results = computed(kernel, inputs, blocks, softmax)
        apart = errors(results, reference(inputs, blocks, softmax))
        for name, found in zip(("out", "dq", "dk", "dv"), apart, strict=True):
            yield sample.name, name, found


def check_one_rank(record: Record, device: torch.device, *, small: bool) -> None:
    """``core_attn`` of one rank beside the kernel called directly: forward, and forward with backward."""
    rows, heads, channels = (256, (4, 2), 64) if small else (8192, (64, 8), 128)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    inputs = Inputs.drawn(rows, heads, channels, dtype, device)
    softmax = Softmax(channels**-0.5)
    for name, lengths in (("dense", (rows,)), ("packed", (rows // 2, rows // 4, rows // 8, rows // 8))):
        sample = Sample(name, lengths, Causal())
        offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        for kernel_name, reason in usable(device).items():
            kernel = get_kernel(kernel_name, device.type)
            if reason is not None or kernel_name == "reference" or kernel.refusal(*inputs[:3]) is not None:
                continue
            config, leaves = CPConfig(kernel=kernel_name), [x.squeeze(0).requires_grad_() for x in inputs[:3]]
            handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=torch.tensor(offsets), config=config)
            calls = {
                "forward": partial(_call, handler, leaves),
                "forward and backward": partial(_step, handler, leaves, inputs.grad_out.squeeze(0)),
            }
            for what, ours in calls.items():
                own = direct(kernel, inputs, sample.blocks(), softmax, backward="backward" in what)
                took, alone = milliseconds(ours, device), milliseconds(own, device)
                record.add(_timed(f"{kernel_name} {name} {what} of {rows}", took, alone))


@torch.no_grad()
def _call(handler: ContextParallelHandler, leaves: list[Tensor]) -> None:
    handler.core_attn(None, *leaves)


def _step(handler: ContextParallelHandler, leaves: list[Tensor], grad: Tensor) -> None:
    torch.autograd.grad(handler.core_attn(None, *leaves), leaves, grad)


def _timed(what: str, ours: float, own: float) -> Row:
    ratio = ours / own
    return Row("local", what, OK if ratio <= WITHIN else "above", None, ours, ratio, "to the kernel's own time")
