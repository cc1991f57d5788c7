"""A sign of life between ranks, so that a lost one is named while the others still wait for it or compute alone."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from cphandler.errors import RankLostError

ALIVE, DONE = 1, 2


class Pulse:
    """A thread on each rank that hears from all the others every few seconds.

    A rank may compute alone for hours while the others wait in a collective, so that a collective's own limit says
    little. A thread has nothing to do but answer: where one is silent, its process, its host or the link to it is gone.
    This rank then says which, and ends at once, whatever its other threads wait for.

    Args:
        interval: seconds from one sign to the next.
        limit: seconds to wait for a rank's sign.
    """

    def __init__(self, interval: float, limit: float) -> None:
        self._interval, self._limit = interval, limit
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=limit))
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._sign = ALIVE
        self._wanted, self._given = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Wait until every rank is here."""
        self._sign = DONE
        self._wanted.set()
        self._thread.join()

    def look(self) -> None:
        """Hear from the others once more, where this rank has an error that may come from a lost one."""
        self._given.clear()
        self._wanted.set()
        self._given.wait(self._interval + self._limit)

    def _beat(self) -> None:
        heard = {ALIVE}
        while heard != {DONE}:
            self._wanted.wait(self._interval)
            mine = self._sign
            signs = self._exchanged(mine)
            missing = [rank for rank, sign in signs.items() if not sign]
            if missing:
                self._end(missing)
            heard = {mine, *signs.values()}
            self._given.set()

    def _exchanged(self, mine: int) -> dict[int, int]:
        """Each other rank's sign; 0 for one that did not give it."""
        others = [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
        signs = {rank: torch.zeros(1, dtype=torch.uint8) for rank in others}
        sign, works = torch.tensor([mine], dtype=torch.uint8), []
        deadline = time.monotonic() + self._limit
        for rank in others:
            with suppress(RuntimeError):  # a closed connection; who has come shows in what has arrived
                works.append(dist.irecv(signs[rank], src=rank, group=self._group))
                works.append(dist.isend(sign, dst=rank, group=self._group))
        for work in works:
            assert work is not None
            with suppress(RuntimeError):
                work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
        return {rank: int(arrived) for rank, arrived in signs.items()}

    def _end(self, missing: list[int]) -> None:
        """Say who is missing, and end: threads that wait for a lost rank cannot be ended in order."""
        me, named = f"rank {dist.get_rank()} of {dist.get_world_size()}", ", ".join(map(str, missing))
        error = RankLostError(
            f"{me} does not hear from rank {named}",
            got=f"nothing for {self._limit:g} seconds, or a closed connection",
            fix="look at what was printed there, and at the link between the hosts",
        )
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
