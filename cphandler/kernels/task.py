"""The unit of work of a kernel: a rectangle of query and key rows with a band across it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

from cphandler.tokens.intervals import UNBOUNDED


class Task(NamedTuple):
    """Query rows ``[q, q + nq)`` against key rows ``[k, k + nk)``; row i sees row j where ``lo <= j - i <= hi``.

    Every row of a task sees at least one key. Bounds that exclude nothing are ``-UNBOUNDED`` and ``UNBOUNDED``.
    """

    q: int
    nq: int
    k: int
    nk: int
    lo: int
    hi: int

    @property
    def is_full(self) -> bool:
        """Every row sees every key."""
        return self.lo == -UNBOUNDED and self.hi == UNBOUNDED

    @property
    def rows(self) -> slice:
        """The query rows."""
        return slice(self.q, self.q + self.nq)

    @property
    def keys(self) -> slice:
        """The key rows."""
        return slice(self.k, self.k + self.nk)


Tasks: TypeAlias = Iterable[Task]
