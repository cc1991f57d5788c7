"""The unit of work of a kernel, a rectangle of query and key rows with a band across it, and tables of such."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sized
from typing import Any, NamedTuple, TypeVar

import numpy as np

from cphandler.tokens.intervals import UNBOUNDED, Table

T = TypeVar("T")

PIECE_BYTES = 568
"""Of a task, two slices and the eight integers in them, as CPython 3.11 keeps them."""


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


class Tasks:
    """The tasks over one block of keys, and what kernels made of them; kept with a plan, for all its layers and passes.

    Args:
        table: ``[n, 6]`` int64, the fields of a :class:`Task` in a row each, in the order they run.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self._prepared: dict[Hashable, Any] = {}

    @classmethod
    def of(cls, *tasks: Task) -> Tasks:
        """Of single tasks."""
        return cls(np.array(tasks, dtype=np.int64).reshape(-1, len(Task._fields)))

    def __len__(self) -> int:
        return len(self.table)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept, about: what does not say itself is counted as so many Python objects."""
        return sum(_bytes(made) for made in list(self._prepared.values()))

    def __iter__(self) -> Iterator[Task]:
        return (Task(*row) for row in self.table.tolist())

    def prepared(self, key: Hashable, make: Callable[[], T]) -> T:
        """What was made for a key; made when it is first asked for.

        Args:
            key: what it depends on beside the tasks.
            make: makes it.
        """
        if key not in self._prepared:
            self._prepared[key] = make()
        made: T = self._prepared[key]
        return made


def _bytes(made: Any) -> int:
    own: int | None = getattr(made, "nbytes", None)
    if own is not None:
        return own
    return PIECE_BYTES * len(made) if isinstance(made, Sized) else 0
