"""Cutting a task into strips or tiles that a dense kernel takes with a small additive mask, or with none."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cphandler.kernels.tables import DeviceTables
from cphandler.kernels.task import Task
from cphandler.tokens.intervals import UNBOUNDED


def strips(task: Task, rows: int, widest: int) -> Iterator[Task]:
    """Cut a task into tasks of at most ``rows`` query rows, each over the keys its rows see.

    Keys that every row of a strip sees are split off as a full task of their own once there are more than ``widest``,
    so that masks stay small. Strips come in ascending order and cover each pair once.
    """
    for a in range(0, task.nq, rows):
        n = min(rows, task.nq - a)
        lo, hi = task.lo + a, task.hi + a
        first = max(0, lo) if task.lo > -UNBOUNDED else 0
        stop = min(task.nk, hi + n) if task.hi < UNBOUNDED else task.nk
        inner_first = max(0, lo + n - 1) if task.lo > -UNBOUNDED else 0
        inner_stop = min(task.nk, hi + 1) if task.hi < UNBOUNDED else task.nk
        if inner_stop - inner_first > widest:
            parts = [(first, inner_first), (inner_first, inner_stop), (inner_stop, stop)]
        else:
            parts = [(first, stop)]
        for k0, k1 in parts:
            if k0 < k1:
                yield from _seen(task, a, n, k0, k1)


def tiles(task: Task, rows: int, columns: int) -> Iterator[Task]:
    """Cut a task into tasks of at most ``rows`` query rows and ``columns`` keys, without rows that see nothing of them.

    Tiles come in ascending order of rows, then keys, and cover each pair once.
    """
    for strip in strips(task, rows, task.nk):
        for first in range(0, strip.nk, columns):
            yield from _seen(strip, 0, strip.nq, first, min(first + columns, strip.nk))


def _seen(task: Task, a: int, n: int, k0: int, k1: int) -> Iterator[Task]:
    """The part of a task in rows ``[a, a + n)`` and keys ``[k0, k1)``, without rows that see nothing of it."""
    lo = task.lo + a - k0 if task.lo > -UNBOUNDED else -UNBOUNDED
    hi = task.hi + a - k0 if task.hi < UNBOUNDED else UNBOUNDED
    nk = k1 - k0
    skip = max(0, -hi)
    stop = min(n, nk - lo) if lo > -UNBOUNDED else n
    if skip >= stop:
        return
    lo, hi, n = (lo + skip if lo > -UNBOUNDED else lo), (hi + skip if hi < UNBOUNDED else hi), stop - skip
    lo = -UNBOUNDED if lo <= 1 - n else lo
    hi = UNBOUNDED if hi >= nk - 1 else hi
    yield Task(task.q + a + skip, n, task.k + k0, nk, lo, hi)


def additive_mask(task: Task, dtype: torch.dtype, device: torch.device, tables: DeviceTables | None = None) -> Tensor:
    """``[nq, nk]`` of 0 where row i sees key j and ``-inf`` elsewhere, for a task that is not full.

    A view into a table, not to be written to. Which cells are open depends on ``j - i`` alone, so that one table serves
    every strip of a diagonal, moved along.

    Args:
        task: the task.
        dtype: of the mask.
        device: where it is to be.
        tables: keeps the table for the next strip; None makes it anew.
    """
    rows = _rounded_up(task.nq)
    if task.lo == -UNBOUNDED:
        width = _rounded_up(rows + task.hi)
        start, low, high = width - rows - task.hi, -UNBOUNDED, width - rows
    elif task.hi == UNBOUNDED:
        width = _rounded_up(task.nk - task.lo)
        start, low, high = -task.lo, 0, UNBOUNDED
    else:
        width = rows + task.hi - task.lo
        start, low, high = -task.lo, 0, task.hi - task.lo
    shape = rows, width, low, high
    if tables is None:
        table = _mask_table(*shape, dtype, device)
    else:
        table = tables.get((*shape, dtype), device, lambda: _mask_table(*shape, dtype, device))
    return table[: task.nq, start : start + task.nk]


def _rounded_up(n: int) -> int:
    """The next power of two, at least 128."""
    return max(128, 1 << (n - 1).bit_length())


def _mask_table(rows: int, width: int, low: int, high: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    distance = torch.arange(width, device=device) - torch.arange(rows, device=device).unsqueeze(1)
    hidden = (distance < low) | (distance > high)
    return torch.zeros(rows, width, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
