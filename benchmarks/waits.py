"""How long a rank stands still for transfers: what communication costs a step after all that is hidden."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch.distributed as dist


@dataclass
class Waits:
    """Seconds that this process was blocked while :func:`record_waits` was active.

    Attributes:
        exposed: in waits for transfers of context parallelism, for data or for a rank that is late.
        summing: in the sum of gradients over ranks, as a whole.
    """

    exposed: float = 0.0
    summing: float = 0.0


@contextmanager
def record_waits() -> Iterator[Waits]:
    """Time the waits of every transfer that ``torch.distributed`` hands out, whoever waits.

    On gloo all that is posted is waited for by ``Work.wait``, so nothing that blocks is missed. The model's own sum of
    gradients, the one ``all_reduce`` of a step, is counted apart: it is there without context parallelism as well.
    """
    waits, inside = Waits(), [False]
    wait, reduce = dist.Work.wait, dist.all_reduce

    def waited(work: Any, *arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return wait(work, *arguments)
        finally:
            if not inside[0]:
                waits.exposed += time.perf_counter() - started

    def reduced(*arguments: Any, **named: Any) -> Any:
        started, inside[0] = time.perf_counter(), True
        try:
            return reduce(*arguments, **named)
        finally:
            inside[0] = False
            waits.summing += time.perf_counter() - started

    patched: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
        (dist.Work, "wait", waited),
        (dist, "all_reduce", reduced),
    )
    with patch.object(*patched[0]), patch.object(*patched[1]):
        yield waits
