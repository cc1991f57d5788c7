"""What this process sends, counted while somebody asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock


@dataclass
class Traffic:
    """What this rank sent to other ranks while :func:`record_traffic` was active.

    Attributes:
        sent_bytes: payload in bytes, not counting what stays on the rank.
        messages: sends to one peer each; a collective counts one per peer.
        by_operation: bytes per kind of operation.
    """

    sent_bytes: int = 0
    messages: int = 0
    by_operation: dict[str, int] = field(default_factory=dict)

    def add(self, operation: str, sent_bytes: int, messages: int) -> None:
        """Count one operation."""
        self.sent_bytes += sent_bytes
        self.messages += messages
        self.by_operation[operation] = self.by_operation.get(operation, 0) + sent_bytes


_lock = Lock()
_open: dict[int, Traffic] = {}
"""What is being counted, by identity: two counts may hold the same numbers."""


@contextmanager
def record_traffic() -> Iterator[Traffic]:
    """Count what this process sends inside the ``with`` block, forward and backward alike.

    Blocks may lie in each other, overlap, and be open in several threads: each counts everything that any thread of the
    process sends while it is open, since torch runs backward passes in threads of its own.
    """
    traffic = Traffic()
    with _lock:
        _open[id(traffic)] = traffic
    try:
        yield traffic
    finally:
        with _lock:
            del _open[id(traffic)]


def record_sent(operation: str, sent_bytes: int, messages: int) -> None:
    """Count one operation in every open block."""
    with _lock:
        for traffic in _open.values():
            traffic.add(operation, sent_bytes, messages)
