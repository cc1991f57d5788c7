"""How waits on gloo end: with the part of a peer, or with the names of the ranks that did not do theirs.

A rank that cannot do its part any more says so to all others and closes its connections, so that nobody waits in vain.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from threading import Lock
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor

from cphandler.comm.membership import Members, members, transports
from cphandler.errors import InvalidValueError, RankLostError


def finish(work: Any, deadline: float | None) -> None:
    """Block until a work is done.

    Raises:
        RuntimeError: it failed, or did not finish before the deadline.
    """
    if deadline is None:
        finished = work.wait()
    else:  # torch takes less than a millisecond for no limit at all
        finished = work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
    if finished is False:
        raise RuntimeError("the work was aborted")


def is_late(error: RuntimeError) -> bool:
    """Whether a wait ran out of time; gloo then has closed all connections of the group, else only that of one peer."""
    return "timed out" in str(error).lower()


def is_done(work: Any) -> bool:
    """Whether a work had finished; where it had not, gloo closes all connections of the group."""
    try:
        finish(work, 0.0)
    except RuntimeError:
        return False
    return True


def lost(at: Members, peers: Sequence[int], error: RuntimeError) -> RankLostError:
    """What to raise when an exchange fails; ends the group's connections.

    Args:
        at: the members.
        peers: the members whose part is not done.
        error: what the transport said.
    """
    late, closed = is_late(error), _end(at)
    closed = [rank for rank in closed if rank in at.peers] or closed
    ranks = sorted({at.peers[peer] for peer in peers}) if late or not closed else closed
    named, me = ranks_named(ranks), at.peers[at.rank]
    return RankLostError(
        f"rank {me} of the context-parallel group waited for {named} in an exchange",
        got=in_place_of_it(late, at.limit),
        fix=f"look at the first error of {named}; then make the process group again, since what was under way is lost",
        ranks=ranks,
        late=late,
    )


def ranks_named(ranks: Sequence[int]) -> str:
    """How an error calls some ranks of the group."""
    return f"rank {', '.join(map(str, ranks))}" if ranks else "some rank"


def in_place_of_it(late: bool, limit: float | None) -> str:
    """What came in place of a rank's part."""
    if not late:
        return "a closed connection: it ended, raised, or has itself given up waiting"
    return "nothing within the group's own time limit" if limit is None else f"nothing within {limit:g} seconds"


_END_TAG = 720_720
"""Tag of the word that a rank ends. With several network devices gloo chooses one by the tag's remainder: this one goes
where tag 0 goes, for any number of devices up to 16."""

_ANSWER_TAG = 2 * _END_TAG
"""Tag of what gloo's own thread answers to it."""

_NEVER_TAG = 3 * _END_TAG
"""Tag of the message that is never sent."""

_ANSWERED = 5.0
"""Seconds that a rank that ends waits for answers: long beside what a busy machine needs to schedule a thread."""


class _Watch:
    """What a rank has posted with every other rank of a gloo group, so that each can end without leaving one untold.

    A message leaves when its receiver has asked for it. Where that one has closed the connection before gloo's thread
    comes to write the message, or before all of it is written, gloo tells nobody who waits for it: it has left the list
    of those that are told. So a rank that ends says so, and closes nothing before it is answered. The answers lie ready
    on every rank: gloo's thread sends them, whatever the rank is busy with, and after all that was asked for before.
    What is sent when the word has come may be lost: who sends looks at :attr:`ended`. Three messages of a byte to each
    rank, once in a group.

    Attributes:
        ended: by rank of the group, not zero where it has said that it ends, or its connection was closed before.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        size = group.size()
        self.ended = bytearray(size)
        said, answer = torch.frombuffer(self.ended, dtype=torch.uint8), torch.ones(1, dtype=torch.uint8, device="cpu")
        self._posted: list[Any] = [answer]
        for rank in range(size):
            if rank == group.rank():
                continue
            try:
                self._posted.append(group.recv([said[rank : rank + 1]], rank, _END_TAG))
                self._posted += [group.send([answer], rank, _ANSWER_TAG) for _ in range(2)]
            except RuntimeError:
                self.ended[rank] = 1


watches: dict[ref[dist.ProcessGroup], _Watch] = {}
"""By the group: a `WeakKeyDictionary` makes two calls of Python for each message."""

_watching = Lock()


def watch(group: dist.ProcessGroup) -> _Watch:
    """To be called before a group's first message, by each rank for itself."""
    with _watching:
        found = watches.get(ref(group))
        if found is None:
            found = watches[ref(group, _forget)] = _Watch(group)
        return found


def _forget(group: ref[dist.ProcessGroup]) -> None:
    watches.pop(group, None)


def _end(at: Members) -> list[int]:
    """Say that this rank ends, and close its connections in a gloo group, so that whoever waits for it raises at once.

    What was under way no longer reads or writes anybody's memory afterwards. Gloo closes a group's connections where a
    wait runs out of time: so this waits a millisecond for a message that nobody sends.

    Returns:
        Ranks of the group that had ended before.
    """
    others = [rank for rank in range(at.group.size()) if rank != at.peers[at.rank]]
    room = torch.ones(at.group.size(), dtype=torch.uint8, device="cpu")
    own = watches.get(ref(at.group))
    ended = set() if own is None else {rank for rank in others if own.ended[rank]}
    never = _begun(at.group.recv, others, room, _NEVER_TAG)
    ended.update(rank for rank in others if rank not in never)
    if own is not None:
        deadline = time.monotonic() + _ANSWERED
        words = _begun(at.group.send, list(never), room, _END_TAG)  # not waited for: they too may be lost
        for _ in range(2):  # by the first answer the word has left, by the second it has come
            if not _all_done(_begun(at.group.recv, list(words), room, _ANSWER_TAG), deadline):
                break
    for work in never.values():
        is_done(work)
    return sorted(ended)


def _begun(move: Callable[..., Any], ranks: Sequence[int], room: Tensor, tag: int) -> dict[int, Any]:
    """Sends or receives of a byte each, by rank, without those whose connection is closed."""
    works = {}
    for rank in ranks:
        with suppress(RuntimeError):
            works[rank] = move([room[rank : rank + 1]], rank, tag)
    return works


def _all_done(works: Mapping[int, Any], deadline: float) -> bool:
    """Wait for all works or for their connections to close; False where that takes too long, and all are closed now."""
    for work in works.values():
        try:
            finish(work, deadline)
        except RuntimeError as error:
            if is_late(error):
                return False
    return True


def end(group_name: str) -> None:
    """To be called where this rank cannot do its part any more: end its connections in a gloo group.

    The other ranks' waits then raise at once, and name this rank. On NCCL transfers go on until the group's own limit.

    Args:
        group_name: the name of a group, or of some of its ranks; empty for none.
    """
    if group_name:
        with suppress(InvalidValueError):  # it is gone already
            _end_on_gloo(members(group_name))


def _end_on_gloo(at: Members) -> None:
    if at.size > 1 and "gloo" in transports(at.group).values():
        _end(at)


class ended_on_error:  # noqa: N801 (used as contextlib's are, which take three times as long)
    """Where the block raises, :func:`end`; what is under way is still alive then, and gloo may write to it.

    Args:
        among: members, or their name.
    """

    __slots__ = ("_among",)

    def __init__(self, among: Members | str) -> None:
        self._among = among

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is not None:
            _end_on_gloo(members(self._among) if isinstance(self._among, str) else self._among)
