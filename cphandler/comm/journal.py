"""What this rank did in a group: a running digest of its calls, which ranks compare when they next check each other."""

from __future__ import annotations

import hashlib
from weakref import WeakKeyDictionary


class Journal:
    """The calls of one rank in one group.

    Attributes:
        calls: how many there were, ever.
        last: the last one, in words.
    """

    def __init__(self) -> None:
        self.calls, self.last = 0, "none"
        self.start_afresh()

    def start_afresh(self) -> None:
        """All ranks have done the same so far: what comes is compared by itself."""
        self._digest = hashlib.blake2b(digest_size=4)

    def note(self, call: str) -> None:
        """Add a call; its words must be the same on every rank that makes the same one."""
        self.calls, self.last = self.calls + 1, call
        self._digest.update(call.encode() + b"\n")

    def __str__(self) -> str:
        return f"{self.calls}, the last {self.last} #{self._digest.hexdigest()}"


_journals: WeakKeyDictionary[object, Journal] = WeakKeyDictionary()


def journal_of(group: object) -> Journal:
    """The journal of a process group; gone with the group."""
    return _journals.setdefault(group, Journal())
