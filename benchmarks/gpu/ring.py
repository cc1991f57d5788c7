"""The merged ring of several ranks, one after another on one GPU: its error, and what a rank's compute costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.rows import OK, WRONG, Record, Row
from benchmarks.gpu.work import Blocks, Inputs, Results, computed, errors, milliseconds, reference, usable
from benchmarks.packs import packs
from cphandler import BatchPlan, plan_batch
from cphandler.kernels import Kernel, Softmax, Tasks, get_kernel
from cphandler.kernels.sums import ALL

RANKS = 8
"""Ranks of the ring that is timed."""

ERROR = 1.5
"""Error of merged ranks at most so many times the plain kernel's."""


def of_rank(plan: BatchPlan, rank: int, device: torch.device) -> Blocks:
    """What a rank of a ring computes, owner by owner, in global rows."""
    tasks = plan.plan(rank).tasks
    owners = [(rank - step) % plan.cp_size for step in range(plan.cp_size)]
    parts = [(_rows(plan, owner, device), Tasks(tasks[tasks[:, 0] == owner][:, 1:])) for owner in owners]
    return Blocks(_rows(plan, rank, device), [(rows, table) for rows, table in parts if len(table)])


def _rows(plan: BatchPlan, rank: int, device: torch.device) -> Tensor:
    """Global rows of a rank, without the pad row that it may hold last."""
    rows = plan.layout.positions(rank)
    return torch.from_numpy(rows[rows >= 0].copy()).to(device)


def check_ring(record: Record, device: torch.device, *, small: bool) -> None:
    """Errors of 2, 4 and 8 merged ranks against float64, beside the plain kernel's own."""
    rows, heads, channels = (256, (4, 2), 64) if small else (4096, (8, 2), 128)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    softmax = Softmax(channels**-0.5)
    inputs = Inputs.drawn(rows, heads, channels, dtype, device)
    for lengths in ((rows,), (rows // 2, 37, rows // 4, rows // 4 - 37)):
        offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        whole = _whole(offsets)
        expected = reference(inputs, whole, softmax)
        for name in _kernels(inputs, device):
            kernel = get_kernel(name, device.type)
            plain = errors(computed(kernel, inputs, whole, softmax), expected)
            for size in (2, 4, 8):
                plan = plan_batch(offsets, size, cp_comm_type="ring", ranks="all")
                merged = errors(_merged(kernel, inputs, plan, softmax), expected)
                ratio = max(m / max(p, 1e-12) for m, p in zip(merged, plain, strict=True))
                what = f"{name} {len(lengths)} documents on {size} ranks"
                verdict = OK if ratio <= ERROR or max(merged) < 1e-6 else WRONG
                record.add(Row("ring", what, verdict, max(merged), None, ratio, "to the plain kernel's error"))


def _kernels(inputs: Inputs, device: torch.device) -> list[str]:
    names = [name for name, reason in usable(device).items() if reason is None and name != "reference"]
    return [name for name in names if get_kernel(name, device.type).refusal(*inputs[:3]) is None]


def _whole(offsets: Sequence[int]) -> Blocks:
    tasks = plan_batch(list(offsets), 1, layout="contiguous", ranks=[0]).plan(0).tasks
    return Blocks(ALL, [(ALL, Tasks(tasks[:, 1:]))])


def _merged(kernel: Kernel, inputs: Inputs, plan: BatchPlan, softmax: Softmax) -> Results:
    """All ranks one after another: their outputs put in place, the gradients of the keys summed in rank order."""
    out, dq = torch.zeros_like(inputs.grad_out), torch.zeros_like(inputs.q)
    dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (inputs.k, inputs.v))
    for rank in range(plan.cp_size):
        blocks = of_rank(plan, rank, inputs.q.device)
        own_out, own_dq, own_dk, own_dv = computed(kernel, inputs, blocks, softmax)
        out[:, blocks.rows], dq[:, blocks.rows] = own_out, own_dq.to(dq.dtype)
        dk += own_dk
        dv += own_dv
    return out, dq, dk, dv


def time_ring(record: Record, device: torch.device, *, small: bool) -> None:
    """A rank's forward and backward of a ring of 8, without its messages, to an eighth of one call over everything."""
    rows = 512 if small else 65536
    heads, channels = ((4, 2), 64) if small else ((64, 8), 128)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    inputs, softmax = Inputs.drawn(rows, heads, channels, dtype, device), Softmax(channels**-0.5)
    pile = packs("pile", RANKS)[:2]
    batches = [("dense", [rows])] + ([] if small else [(f"pile {i}", lengths) for i, lengths in enumerate(pile)])
    for name in _kernels(inputs, device):
        kernel = get_kernel(name, device.type)
        for batch, lengths in batches:
            offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
            cut = Inputs(*(x[:, : offsets[-1]] for x in inputs))
            bound = 0.95 if batch == "dense" else 0.85
            record.add(_speed(kernel, cut, offsets, softmax, f"{name} {batch}", bound=bound))


def _speed(kernel: Kernel, inputs: Inputs, offsets: list[int], softmax: Softmax, what: str, *, bound: float) -> Row:
    device, whole = inputs.q.device, _whole(offsets)
    size = RANKS
    plan = plan_batch(offsets, size, cp_comm_type="ring", ranks=[1])
    local, blocks = _local(inputs, plan, 1)
    repeats = 3
    ours = milliseconds(lambda: computed(kernel, local, blocks, softmax), device, repeats)
    share = milliseconds(lambda: computed(kernel, inputs, whole, softmax), device, repeats) / size
    speed = share / ours
    verdict = OK if speed >= bound else "below"
    return Row("speed", f"{what} rank 1 of {size}, forward and backward", verdict, None, ours, speed, f"asked {bound}")


def _local(inputs: Inputs, plan: BatchPlan, rank: int) -> tuple[Inputs, Blocks]:
    """The rows of all ranks side by side, so that a block is a view, as it is when it has come."""
    tasks, size = plan.plan(rank).tasks, plan.cp_size
    order = [(rank - step) % size for step in range(size)]
    rows = [_rows(plan, owner, inputs.q.device) for owner in order]
    arranged = Inputs(*(x.index_select(1, torch.cat(rows)) for x in inputs))
    ends = np.cumsum([0, *(len(part) for part in rows)]).tolist()
    owners = [(slice(ends[i], ends[i + 1]), Tasks(tasks[tasks[:, 0] == owner][:, 1:])) for i, owner in enumerate(order)]
    return arranged, Blocks(slice(0, ends[1]), [(keys, table) for keys, table in owners if len(table)])
