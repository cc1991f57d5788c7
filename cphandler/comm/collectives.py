"""Differentiable collectives on an explicit group, and sends that can be waited for later.

The only module that calls the operations of ``torch.distributed``. Every differentiable collective is an opaque
custom op that takes its group by name: ``torch.compile``, activation checkpointing and selective checkpointing see
values, never half-done transfers. Pure data movement goes as bytes, so that any dtype travels bit for bit.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # loaded later, by operators' first call, it holds the world group for good
from torch import Tensor

from cphandler.comm.staging import Staging
from cphandler.comm.traffic import record_sent
from cphandler.errors import InvalidValueError, RankLostError, RankMismatchError
from cphandler.precision import accumulator_dtype


class Members(NamedTuple):
    """The ranks that an operation is between: all of a group, or some of it.

    Attributes:
        group: the process group.
        size: how many.
        rank: this process's place among them.
        peers: their ranks in the group, in order.
        limit: seconds that one wait may take; None leaves it to the group.
    """

    group: dist.ProcessGroup
    size: int
    rank: int
    peers: range
    limit: float | None = None


def sub_group_name(group_name: str, peers: range) -> str:
    """A name under which every operation of this module is between some ranks of a group.

    Messages go through the group itself, so that nothing has to be made, by anybody. On NCCL all ranks of the group
    take part in collectives, each with its own part of it; parts do not overlap.
    """
    return f"{group_name}#{peers.start}:{peers.stop}:{peers.step}" if group_name else ""


def limited_name(group_name: str, limit: float | None) -> str:
    """A name under which every operation of this module waits so many seconds for a rank, and no longer.

    The limit goes with the name, not with the group: handlers of one group may have different ones, and a backward pass
    has that of its forward pass.
    """
    return group_name if limit is None or not group_name else f"{group_name}#{limit!r}s"


def members(group_name: str) -> Members:
    """Who a name stands for.

    Raises:
        InvalidValueError: the group was destroyed or never made in this process.
    """
    name, some, limit = _read(group_name)
    group = process_group(name)
    peers = range(group.size()) if some is None else some
    return Members(group, len(peers), peers.index(group.rank()), peers, limit)


@lru_cache(maxsize=1024)
def _read(group_name: str) -> tuple[str, range | None, float | None]:
    """The group's own name, the ranks of it that are meant where not all are, and the limit of a wait."""
    name, *additions = group_name.split("#")
    limit, peers = None, None
    for addition in additions:
        if addition.endswith("s"):
            limit = float(addition[:-1])
        else:
            peers = range(*map(int, addition.split(":")))
    return name, peers, limit


def process_group(group_name: str) -> dist.ProcessGroup:
    """The live group of this name.

    Raises:
        InvalidValueError: the group was destroyed or never made in this process.
    """
    if not group_name:
        raise InvalidValueError(
            "this handler's group cannot communicate",
            got="an object with a size and a rank only",
            fix="pass a torch.distributed.ProcessGroup or a DeviceMesh; this object is enough for positions and plans",
        )
    try:
        return torch._C._distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type]
    except (RuntimeError, KeyError) as error:
        raise InvalidValueError(
            "the context-parallel process group does not exist any more",
            got=f"group {group_name!r}",
            fix="make the handler and run its backward before destroy_process_group",
        ) from error


_transports: WeakKeyDictionary[dist.ProcessGroup, dict[str, str]] = WeakKeyDictionary()


def transports(group: dist.ProcessGroup) -> Mapping[str, str]:
    """Which transport serves each device type in this group, such as ``{"cpu": "gloo", "cuda": "nccl"}``."""
    found = _transports.get(group)
    if found is None:
        config = dist.get_backend_config(group)
        found = _transports[group] = dict(part.split(":", 1) for part in config.split(","))
    return found


def _on_gloo(device: torch.device, group: dist.ProcessGroup) -> bool:
    """Whether the host itself moves and waits for what is on a device."""
    return transports(group).get(device.type) == "gloo"


def _staging(device: torch.device, group: dist.ProcessGroup) -> Staging | None:
    """Where messages must pass through the host although they are not on it."""
    return Staging() if device.type != "cpu" and _on_gloo(device, group) else None


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Where a small tensor of integers should live to travel in this group: the host where the group serves it."""
    if "cpu" in transports(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


_connected: WeakKeyDictionary[dist.ProcessGroup, set[torch.device]] = WeakKeyDictionary()


def connect(group_name: str, device: torch.device) -> None:
    """Set up a group's transport between all ranks before some of them send to each other.

    NCCL makes its communicator at a group's first operation and wants every rank there; later, sends between pairs are
    fine. To be called by every rank of the group. Nothing to do on gloo, and after the first time.
    """
    if device.type == "cpu":
        return
    group = members(group_name).group
    devices = _connected.setdefault(group, set())
    if device not in devices and transports(group).get(device.type) == "nccl":
        dist.all_reduce(torch.zeros(1, device=device), group=group)
        devices.add(device)


class Transfer:
    """Sends and receives that are under way; holds what they need until :meth:`wait`.

    Args:
        works: what the transport handed out.
        tensors: what must stay alive.
        at: where a work is with one peer each (gloo), the members.
        peers: and which of them.
        staging: the host's copies of what a device sends and receives.
    """

    def __init__(
        self,
        works: Sequence[Any] = (),
        tensors: Sequence[Tensor] = (),
        at: Members | None = None,
        peers: Sequence[int] = (),
        staging: Staging | None = None,
    ) -> None:
        self._works, self._tensors, self._staging = list(works), list(tensors), staging
        self._at, self._peers = at, list(peers)

    def wait(self) -> None:
        """Block (on CUDA: make the stream wait) until every part is done.

        Raises:
            RankLostError: on gloo, a peer did not do its part in time, or its connection is closed.
        """
        try:
            if self._at is None:
                for work in self._works:
                    work.wait()
            else:
                self._wait_for_peers(self._at)
            if self._staging is not None:
                self._staging.land()
        finally:
            for held in (self._works, self._tensors, self._peers):
                held.clear()

    def _wait_for_peers(self, at: Members) -> None:
        deadline = None if at.limit is None else time.monotonic() + at.limit
        done = 0
        with ended_on_error(at):
            try:
                for work in self._works:
                    if deadline is not None or work.wait() is False:  # which a second wait says as well
                        _finish(work, deadline)
                    done += 1
            except RuntimeError as error:
                later = zip(self._peers[done + 1 :], self._works[done + 1 :], strict=True)
                others = [other for other, work in later if not _done(work)] if _is_late(error) else []
                raise _lost(at, [self._peers[done], *others], error) from error


def _finish(work: Any, deadline: float | None) -> None:
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


def _is_late(error: RuntimeError) -> bool:
    """Whether a wait ran out of time; gloo then has closed all connections of the group, else only that of one peer."""
    return "timed out" in str(error).lower()


def _done(work: Any) -> bool:
    """Whether a work had finished; where it had not, gloo closes all connections of the group."""
    try:
        _finish(work, 0.0)
    except RuntimeError:
        return False
    return True


def _lost(at: Members, peers: Sequence[int], error: RuntimeError) -> RankLostError:
    """What to raise when an exchange fails; ends the group's connections.

    Args:
        at: the members.
        peers: the members whose part is not done.
        error: what the transport said.
    """
    late, closed = _is_late(error), _end(at)
    closed = [rank for rank in closed if rank in at.peers] or closed
    ranks = sorted({at.peers[peer] for peer in peers}) if late or not closed else closed
    named, me = _named(ranks), at.peers[at.rank]
    return RankLostError(
        f"rank {me} of the context-parallel group waited for {named} in an exchange",
        got=_answer(late, at.limit),
        fix=f"look at the first error of {named}; then make the process group again, since what was under way is lost",
        ranks=ranks,
        late=late,
    )


def _named(ranks: Sequence[int]) -> str:
    return f"rank {', '.join(map(str, ranks))}" if ranks else "some rank"


def _answer(late: bool, limit: float | None) -> str:
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
    What is posted when the word has come may be lost: :func:`_posted` refuses it. Three messages of a byte to each
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


_watches: dict[ref[dist.ProcessGroup], _Watch] = {}
"""By the group: a `WeakKeyDictionary` makes two calls of Python for each message."""

_watching = Lock()


def _watch(group: dist.ProcessGroup) -> _Watch:
    """To be called before a group's first message, by each rank for itself."""
    with _watching:
        found = _watches.get(ref(group))
        if found is None:
            found = _watches[ref(group, _forget)] = _Watch(group)
        return found


def _forget(group: ref[dist.ProcessGroup]) -> None:
    _watches.pop(group, None)


def _end(at: Members) -> list[int]:
    """Say that this rank ends, and close its connections in a gloo group, so that whoever waits for it raises at once.

    What was under way no longer reads or writes anybody's memory afterwards. Gloo closes a group's connections where a
    wait runs out of time: so this waits a millisecond for a message that nobody sends.

    Returns:
        Ranks of the group that had ended before.
    """
    others = [rank for rank in range(at.group.size()) if rank != at.peers[at.rank]]
    room = torch.ones(at.group.size(), dtype=torch.uint8, device="cpu")
    watch = _watches.get(ref(at.group))
    ended = set() if watch is None else {rank for rank in others if watch.ended[rank]}
    never = _begun(at.group.recv, others, room, _NEVER_TAG)
    ended.update(rank for rank in others if rank not in never)
    if watch is not None:
        deadline = time.monotonic() + _ANSWERED
        words = _begun(at.group.send, list(never), room, _END_TAG)  # not waited for: they too may be lost
        for _ in range(2):  # by the first answer the word has left, by the second it has come
            if not _all_done(_begun(at.group.recv, list(words), room, _ANSWER_TAG), deadline):
                break
    for work in never.values():
        _done(work)
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
            _finish(work, deadline)
        except RuntimeError as error:
            if _is_late(error):
                return False
    return True


class ended_on_error:  # noqa: N801 (used as contextlib's are, which take three times as long)
    """Where the block raises, end the connections of a gloo group: this rank cannot do its part any more.

    The other ranks' waits then raise at once, and name this rank. On NCCL transfers go on until the group's own limit.

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
            at = members(self._among) if isinstance(self._among, str) else self._among
            if "gloo" in transports(at.group).values():
                _end(at)


def post(sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], group_name: str) -> Transfer:
    """Start sends and receives to and from group ranks in one batch.

    Both sides of a pair must name their messages in the same order. A tensor being sent must not be written, and a
    received one not be read, before :meth:`Transfer.wait`. Empty tensors are not sent.

    Args:
        sends: tensors of any dtype and strides, and the rank each goes to.
        receives: contiguous tensors of the same device, and the rank whose bytes each is filled with.
        group_name: the group.

    Raises:
        InvalidValueError: a tensor to receive into that is not contiguous.
        RankLostError: on gloo, the connection to a peer is closed.
    """
    outgoing = [(x.resolve_conj().resolve_neg().contiguous(), peer) for x, peer in sends if x.numel()]
    incoming = [(x if x.is_contiguous() else _one_run(x), peer) for x, peer in receives if x.numel()]
    record_sent("send", sum(x.nbytes for x, _ in outgoing), len(outgoing))
    return _posted(outgoing, incoming, members(group_name)) if outgoing or incoming else Transfer()


def _posted(sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], at: Members) -> Transfer:
    """Start to move contiguous tensors, byte by byte."""
    device = (sends or receives)[0][0].device
    if not _on_gloo(device, at.group):
        return _posted_together(sends, receives, at)
    staging = _staging(device, at.group)
    if staging is not None:
        sends = [(staging.leaving(_bytes(x)), peer) for x, peer in sends]
        receives = [(staging.arriving(_bytes(x)), peer) for x, peer in receives]
        staging.settle()
    group, ranks = at.group, at.peers
    ended = (_watches.get(ref(group)) or _watch(group)).ended
    works, peer = [], 0
    with ended_on_error(at):
        try:  # the group's own methods: what `isend` and `irecv` do before them costs as much again
            for x, peer in sends:
                works.append(group.send([x], ranks[peer], 0))
                if ended[ranks[peer]]:
                    raise RuntimeError("it has said that it ends")
            for x, peer in receives:
                works.append(group.recv([x], ranks[peer], 0))
        except RuntimeError as error:
            raise _lost(at, [peer], error) from error
    tensors, peers = zip(*sends, *receives, strict=True)
    # receives are waited for first: gloo tells of a lost connection there, and not always where it writes
    return Transfer(works[::-1], tensors, at, peers[::-1], staging)


def _posted_together(
    sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], at: Members
) -> Transfer:
    """One batch of a transport that moves what is on devices, and knows few dtypes."""
    parts: list[tuple[Callable[..., Any], Tensor, int]] = [(dist.isend, _bytes(x), peer) for x, peer in sends]
    parts += [(dist.irecv, _bytes(x), peer) for x, peer in receives]
    batch = [dist.P2POp(move, x, group=at.group, group_peer=at.peers[peer]) for move, x, peer in parts]
    return Transfer(dist.batch_isend_irecv(batch), [x for _, x, _ in parts])


def _bytes(x: Tensor) -> Tensor:
    """``[bytes]`` of a contiguous tensor, in its own memory.

    A dim of size 1 may have any stride in a tensor that torch calls contiguous; ``view`` and ``contiguous`` keep it.

    Raises:
        InvalidValueError: not contiguous.
    """
    return _one_run(x).as_strided((x.numel(),), (1,)).view(torch.uint8)


def _one_run(x: Tensor) -> Tensor:
    """The tensor, whose bytes are one run of memory.

    Raises:
        InvalidValueError: they are not.
    """
    if not x.is_contiguous():
        raise InvalidValueError(
            "only contiguous memory can be sent or received",
            got=f"shape {list(x.shape)} with strides {list(x.stride())}",
            fix="pass x.contiguous()",
        )
    return x


def _bytes_of_rows(x: Tensor) -> Tensor:
    """``[n, bytes]`` of contiguous ``[n, ...]`` rows, in their own memory."""
    return _bytes(x).view(len(x), math.prod(x.shape[1:]) * x.element_size())


@torch.library.custom_op("cphandler::all_to_all", mutates_args=())
def all_to_all(x: Tensor, send_counts: list[int], recv_counts: list[int], group_name: str) -> Tensor:
    """Send ``send_counts[p]`` consecutive rows of ``x`` to each rank p and stack what comes, in rank order.

    Args:
        x: ``[sum(send_counts), ...]``, any dtype and strides.
        send_counts: rows for each rank, zeros allowed.
        recv_counts: rows from each rank; what rank p counts for this one.
        group_name: the process group's name.

    Returns:
        ``[sum(recv_counts), ...]``. The backward pass is the same exchange the other way.
    """
    received = x.new_empty((sum(recv_counts), *x.shape[1:]))
    if 0 in x.shape[1:]:
        return received
    at = members(group_name)
    sent, arriving = _bytes_of_rows(x.contiguous()), _bytes_of_rows(received)
    record_sent("all_to_all", sent.nbytes - send_counts[at.rank] * sent.shape[1], at.size - 1)
    receives, sends = ([0] * dist.get_world_size(at.group) for _ in range(2))
    for i, peer in enumerate(at.peers):
        receives[peer], sends[peer] = recv_counts[i], send_counts[i]
    if not _on_gloo(x.device, at.group):
        dist.all_to_all_single(arriving, sent, receives, sends, group=at.group)
        return received
    staging = _staging(x.device, at.group)
    if staging is not None:
        sent, arriving = staging.leaving(sent), staging.arriving(arriving)
        staging.settle()
    marks = _Marks(arriving.split(recv_counts), at.rank)
    _watch(at.group)
    with ended_on_error(at):
        work = dist.all_to_all_single(arriving, sent, receives, sends, group=at.group, async_op=True)
        try:
            _finish(work, None if at.limit is None else time.monotonic() + at.limit)
        except RuntimeError as error:
            raise _lost(at, marks.unwritten(), error) from error
    if staging is not None:
        staging.land()
    return received


class _Marks:
    """Random bytes where each peer's part will end: an exchange that fails as a whole then shows whose did not come."""

    _MARK = torch.frombuffer(bytearray(os.urandom(16)), dtype=torch.uint8)

    def __init__(self, parts: Sequence[Tensor], own: int) -> None:
        ends = {peer: part.reshape(-1)[-len(self._MARK) :] for peer, part in enumerate(parts) if peer != own}
        self._ends = {peer: end for peer, end in ends.items() if len(end)}
        for end in self._ends.values():
            end.copy_(self._MARK[: len(end)])

    def unwritten(self) -> list[int]:
        """The peers whose part has not come."""
        return [peer for peer, end in self._ends.items() if torch.equal(end, self._MARK[: len(end)])]


@torch.library.custom_op("cphandler::exchange_rows", mutates_args=())
def exchange_rows(x: Tensor, send_counts: list[int], recv_counts: list[int], group_name: str) -> Tensor:
    """The same exchange as :func:`all_to_all`, as one message per pair of ranks that has rows to move.

    For sparse exchanges such as rolls and halos, where most counts are zero. Rows a rank keeps
    (``send_counts[rank]``) are copied.
    """
    received = x.new_empty((sum(recv_counts), *x.shape[1:]))
    rank = members(group_name).rank
    sent_parts, received_parts = x.contiguous().split(send_counts), received.split(recv_counts)
    received_parts[rank].copy_(sent_parts[rank])
    peers = [peer for peer in range(len(send_counts)) if peer != rank]
    post([(sent_parts[i], i) for i in peers], [(received_parts[i], i) for i in peers], group_name).wait()
    return received


@torch.library.custom_op("cphandler::all_gather", mutates_args=())
def all_gather(x: Tensor, group_name: str) -> Tensor:
    """Stack the ranks' equal shards ``[n, ...]`` to ``[P * n, ...]`` in rank order, any dtype.

    The backward pass is :func:`reduce_scatter`.
    """
    group, size, rank, _, _ = members(group_name)
    gathered = x.new_empty((size * len(x), *x.shape[1:]))
    if x.numel() == 0:
        return gathered
    x = x.contiguous()
    if _on_gloo(x.device, group) or size < dist.get_world_size(group):  # gloo's own is several times slower
        parts = gathered.chunk(size)
        parts[rank].copy_(x)
        peers = [peer for peer in range(size) if peer != rank]
        post([(x, peer) for peer in peers], [(parts[peer], peer) for peer in peers], group_name).wait()
    else:
        record_sent("all_gather", x.nbytes * (size - 1), size - 1)
        _all_gather_into(_bytes(gathered), _bytes(x), group=group)
    return gathered


def gather_parts(tensors: Sequence[Tensor], group_name: str) -> list[tuple[Tensor, ...]]:
    """Every rank's tensors, in rank order; its own are the ones it gave, where the transport needs no copy of them.

    Args:
        tensors: of one device, in the same shapes and dtypes on every rank.
        group_name: the process group's name.
    """
    group, size, rank, _, _ = members(group_name)
    if not _on_gloo(tensors[0].device, group) and size == dist.get_world_size(group):
        whole = [all_gather(x, group_name).view(size, *x.shape) for x in tensors]
        return list(zip(*whole, strict=True))
    parts = [tensors if peer == rank else [x.new_empty(x.shape) for x in tensors] for peer in range(size)]
    connect(group_name, tensors[0].device)
    peers = [peer for peer in range(size) if peer != rank]
    sends = [(x, peer) for peer in peers for x in tensors]
    post(sends, [(x, peer) for peer in peers for x in parts[peer]], group_name).wait()
    return [tuple(part) for part in parts]


@torch.library.custom_op("cphandler::reduce_scatter", mutates_args=())
def reduce_scatter(x: Tensor, group_name: str) -> Tensor:
    """Sum the ranks' ``[P * n, ...]`` and keep this rank's block of n rows; the backward pass is :func:`all_gather`.

    Blocks travel once and are added in rank order, in float32 for 16-bit inputs: two runs give the same bits.
    """
    size = members(group_name).size
    rows = len(x) // size
    parts = all_to_all(x, [rows] * size, [rows] * size, group_name).chunk(size) if rows else (x,)
    total = parts[0].to(accumulator_dtype(x.dtype), copy=True)
    for part in parts[1:]:
        total += part.to(total.dtype) if part.itemsize == 1 else part  # torch adds no float8
    return total.to(x.dtype)


@torch.library.custom_op("cphandler::ring_shift", mutates_args=())
def ring_shift(x: Tensor, shift: int, group_name: str) -> Tensor:
    """Send ``x`` to rank ``r + shift`` and return what rank ``r - shift`` sent; every rank has the same shape.

    The backward pass is the shift the other way.
    """
    _, size, rank, _, _ = members(group_name)
    if shift % size == 0:
        return x.clone(memory_format=torch.contiguous_format)
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    post([(x, (rank + shift) % size)], [(received, (rank - shift) % size)], group_name).wait()
    return received


@torch.library.custom_op("cphandler::maximum", mutates_args=())
def maximum(x: Tensor, group_name: str) -> Tensor:
    """The largest of the ranks' values, element by element; no gradient.

    Args:
        x: the same shape on every rank, of a dtype that torch can order; meant for few numbers, since all travel.
        group_name: the process group's name.

    Returns:
        The shape of ``x``; NaN wherever a rank has NaN, so that all ranks hold the same.
    """
    everyone: Tensor = all_gather(x.unsqueeze(0), group_name)
    return everyone.amax(0)


def agree(payload: bytes, group_name: str) -> list[bytes]:
    """Every rank's payload, in rank order: the one tiny collective behind the consistency check.

    Args:
        payload: bytes of one length on all ranks, not all of them zero: by that a rank that has come is known.
        group_name: the group; the limit in its name counts once for all ranks together.

    Raises:
        RankMismatchError: some ranks did not come in time, or have ended; names them where the transport can.
    """
    at = members(group_name)
    if at.size == 1:
        return [payload]
    mine = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(device_of(at.group))
    everyone = mine.new_zeros((at.size, len(mine)))
    everyone[at.rank] = mine
    peers = [peer for peer in range(at.size) if peer != at.rank]
    record_sent("check", mine.nbytes * len(peers), len(peers))
    try:
        if _on_gloo(mine.device, at.group) or at.size < dist.get_world_size(at.group):
            _posted([(mine, peer) for peer in peers], [(everyone[peer], peer) for peer in peers], at).wait()
        else:
            work = dist.all_gather([*everyone], mine, group=at.group, async_op=True)
            _finish(work, None if at.limit is None else time.monotonic() + at.limit)
    except RankLostError as error:
        away = [at.peers[peer] for peer in peers if not everyone[peer].any()] if error.late else error.ranks
        raise _absent(at, away or error.ranks, late=error.late) from error
    except RuntimeError as error:
        raise _absent(at, [], late=True) from error
    return [bytes(row) for row in everyone.cpu().numpy()]


def _absent(at: Members, ranks: list[int], *, late: bool) -> RankMismatchError:
    named = _named(ranks)
    return RankMismatchError(
        f"{named} of the context-parallel group did not reach the consistency check of rank {at.peers[at.rank]}",
        got=_answer(late, at.limit),
        fix="every rank of the group must run the same steps; look at the first error of the ranks named, and make the "
        "process group again",
    )


def _all_gather_into(output: Tensor, x: Tensor, group: dist.ProcessGroup) -> None:
    """``all_gather_into_tensor``, which torch 2.13 renamed."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(output, x, group=group)


def _save_counts(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.send_counts, ctx.recv_counts, ctx.group_name = inputs


def _save_group(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group_name = inputs[-1]


def _save_shift(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.shift, ctx.group_name = inputs


def _fake_exchange(x: Tensor, send_counts: list[int], recv_counts: list[int], group_name: str) -> Tensor:
    return x.new_empty((sum(recv_counts), *x.shape[1:]))


def _fake_all_gather(x: Tensor, group_name: str) -> Tensor:
    return x.new_empty((members(group_name).size * x.shape[0], *x.shape[1:]))


def _fake_reduce_scatter(x: Tensor, group_name: str) -> Tensor:
    return x.new_empty((x.shape[0] // members(group_name).size, *x.shape[1:]))


@maximum.register_fake
def _fake_maximum(x: Tensor, group_name: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_ring_shift(x: Tensor, shift: int, group_name: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _register(operation: Any, fake: Any, setup: Any, backward: Any) -> None:
    operation.register_fake(fake)
    operation.register_autograd(backward, setup_context=setup)


_register(
    all_to_all,
    _fake_exchange,
    _save_counts,
    lambda ctx, grad: (all_to_all(grad, ctx.recv_counts, ctx.send_counts, ctx.group_name), None, None, None),
)
_register(
    exchange_rows,
    _fake_exchange,
    _save_counts,
    lambda ctx, grad: (exchange_rows(grad, ctx.recv_counts, ctx.send_counts, ctx.group_name), None, None, None),
)
_register(all_gather, _fake_all_gather, _save_group, lambda ctx, grad: (reduce_scatter(grad, ctx.group_name), None))
_register(reduce_scatter, _fake_reduce_scatter, _save_group, lambda ctx, grad: (all_gather(grad, ctx.group_name), None))
_register(
    ring_shift,
    _fake_ring_shift,
    _save_shift,
    lambda ctx, grad: (ring_shift(grad, -ctx.shift, ctx.group_name), None, None),
)
