"""The bare pass of a backend: its kernel calls and its messages, in its order, with nothing else around them.

A floor (:mod:`benchmarks.floors`) has the kernel's calls and the bytes apart, each alone. What a message costs beside
them, waking threads of ranks that compute at the same time, is in neither. So a pass is watched once, and what it asked
of the kernel and of gloo is then asked again on random tensors: no handler, no autograd, no copies, no sums. What a
backend takes above that is the library's own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.floors import Call, Calls, tensors_of
from benchmarks.kernel_clock import OPERATORS, kernel_clock
from benchmarks.seats import Sample, fresh, written_bytes
from benchmarks.works import Work
from cphandler.comm import transfers
from cphandler.comm.membership import Members


class Message(NamedTuple):
    """What goes to a rank, or comes from it.

    Attributes:
        nbytes: of the payload.
        peer: the rank in the group.
    """

    nbytes: int
    peer: int


class Post(NamedTuple):
    """Messages that start at once.

    Attributes:
        number: by which :class:`Wait` names them.
        sends: what leaves.
        receives: what arrives.
    """

    number: int
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


class Wait(NamedTuple):
    """Until all messages of a :class:`Post` are done."""

    number: int


Event: TypeAlias = Call | Post | Wait


@lru_cache(maxsize=64)
def watched(work: Work) -> tuple[Event, ...]:
    """What a forward and backward pass of a backend asks of the kernel and of gloo, in order, on this rank.

    The second pass of two: the first one of a handler has a check of the ranks in front.
    """
    seat, events = fresh(work), list[Event]()
    seat.attend(*seat.inputs).backward(seat.grad_out)
    with _messages(events), _calls(events):
        seat.attend(*seat.inputs).backward(seat.grad_out)
    return tuple(events)


def kernel_calls(work: Work) -> Calls:
    """What this rank's kernel is asked for in one forward and backward pass."""
    return tuple(event for event in watched(work) if isinstance(event, Call))


@contextmanager
def _calls(events: list[Event]) -> Iterator[None]:
    """Write down each call of the kernel."""

    def heard(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        backward = name == OPERATORS[1]
        q, k, v = args[1:4] if backward else args[:3]
        place, mask = (7 if backward else 4), kwargs.get("attn_mask")
        causal = args[place] if len(args) > place else kwargs.get("is_causal", False)
        hidden = () if mask is None else tuple(mask.shape)
        events.append(Call(tuple(q.shape), tuple(k.shape), tuple(v.shape), hidden, bool(causal), backward))

    clock = kernel_clock()
    clock.listener = heard
    try:
        yield
    finally:
        clock.listener = None


@contextmanager
def _messages(events: list[Event]) -> Iterator[None]:
    """Write down each message, and each wait for some that were posted meanwhile."""
    posted, wait = transfers.posted, transfers.Transfer.wait
    numbers: dict[int, tuple[int, transfers.Transfer]] = {}

    def posting(sends: Any, receives: Any, at: Members) -> transfers.Transfer:
        transfer = posted(sends, receives, at)
        numbers[id(transfer)] = len(numbers), transfer  # held, so that no other one has its identity
        both = (tuple(Message(x.nbytes, at.peers[peer]) for x, peer in part) for part in (sends, receives))
        events.append(Post(len(numbers) - 1, *both))
        return transfer

    def waiting(transfer: transfers.Transfer) -> None:
        if id(transfer) in numbers:
            events.append(Wait(numbers[id(transfer)][0]))
        wait(transfer)

    with patch.object(transfers, "posted", posting), patch.object(transfers.Transfer, "wait", waiting):
        yield


def measure(work: Work) -> Sample:
    """A bare pass on this rank, timed as a pass is."""
    steps, group = _steps(work), dist.group.WORLD
    assert group is not None
    works: dict[int, list[Any]] = {}
    dist.barrier()
    written, clock = written_bytes(), kernel_clock()
    in_kernels, own = clock.seconds, time.thread_time()
    started_wall, started = time.perf_counter(), time.process_time()
    for event, tensors in steps:
        if isinstance(event, Call):
            event.make(tensors)
        elif isinstance(event, Post):
            sends, receives = tensors
            works[event.number] = [group.send([x], peer, 0) for x, peer in sends]
            works[event.number] += [group.recv([x], peer, 0) for x, peer in receives]
        else:
            for each in reversed(works.pop(event.number)):  # as the library does: receives first
                each.wait()
    both, wall = time.process_time() - started, time.perf_counter() - started_wall
    in_kernels, own = clock.seconds - in_kernels, time.thread_time() - own
    wire = None if written is None else (written_bytes() or 0) - written
    sent = sum(message.nbytes for event, _ in steps if isinstance(event, Post) for message in event.sends)
    return Sample(0.0, both, in_kernels, own, wall, wire, 0, sent)


@lru_cache(maxsize=64)
def _steps(work: Work) -> Sequence[tuple[Event, Any]]:
    """The events of a pass, each with its tensors; messages of one size have one tensor to leave from."""
    return [(event, _tensors(event, work.dtype)) for event in watched(work)]


def _tensors(event: Event, dtype: str) -> Any:
    if isinstance(event, Call):
        return tensors_of(event, dtype)
    if isinstance(event, Wait):
        return None
    return [(_leaving(m.nbytes), m.peer) for m in event.sends], [
        (_arriving(m.nbytes, place), m.peer) for place, m in enumerate(event.receives)
    ]


@lru_cache(maxsize=256)
def _leaving(nbytes: int) -> Tensor:
    return torch.ones(nbytes, dtype=torch.uint8)


@lru_cache(maxsize=256)
def _arriving(nbytes: int, place: int) -> Tensor:
    """One for each message of a post: who reads it later would find what came last, but here nobody does."""
    return torch.zeros(nbytes, dtype=torch.uint8)


def forget() -> None:
    """Drop events and tensors."""
    watched.cache_clear()
    _steps.cache_clear()
    _leaving.cache_clear()
    _arriving.cache_clear()
