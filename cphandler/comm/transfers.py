"""Sends and receives between ranks that can be waited for later.

Pure data movement goes as bytes, so that any dtype travels bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor

from cphandler.comm import membership, staging
from cphandler.comm.endings import ended_on_error, finish, is_done, is_late, lost, watch, watches
from cphandler.comm.membership import Members, members, transports
from cphandler.comm.traffic import record_sent
from cphandler.errors import InvalidValueError

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
        host: the copies there of what a device sends and receives.
    """

    def __init__(
        self,
        works: Sequence[Any] = (),
        tensors: Sequence[Tensor] = (),
        at: Members | None = None,
        peers: Sequence[int] = (),
        host: staging.Staging | None = None,
    ) -> None:
        self._works, self._tensors, self._host = list(works), list(tensors), host
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
            if self._host is not None:
                self._host.land()
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
                        finish(work, deadline)
                    done += 1
            except RuntimeError as error:
                later = zip(self._peers[done + 1 :], self._works[done + 1 :], strict=True)
                others = [other for other, work in later if not is_done(work)] if is_late(error) else []
                raise lost(at, [self._peers[done], *others], error) from error


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
    return posted(outgoing, incoming, members(group_name)) if outgoing or incoming else Transfer()


def posted(sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], at: Members) -> Transfer:
    """Start to move contiguous tensors, byte by byte; :func:`post` checks and counts them first.

    Raises:
        RankLostError: on gloo, the connection to a peer is closed.
    """
    device = (sends or receives)[0][0].device
    if not membership.on_gloo(device, at.group):
        return _posted_together(sends, receives, at)
    host = staging.through_host(device, at.group)
    if host is not None:
        sends = [(host.leaving(bytes_of(x)), peer) for x, peer in sends]
        receives = [(host.arriving(bytes_of(x)), peer) for x, peer in receives]
        host.settle()
    group, ranks = at.group, at.peers
    ended = (watches.get(ref(group)) or watch(group)).ended
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
            raise lost(at, [peer], error) from error
    tensors, peers = zip(*sends, *receives, strict=True)
    # receives are waited for first: gloo tells of a lost connection there, and not always where it writes
    return Transfer(works[::-1], tensors, at, peers[::-1], host)


def _posted_together(
    sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], at: Members
) -> Transfer:
    """One batch of a transport that moves what is on devices, and knows few dtypes."""
    parts: list[tuple[Callable[..., Any], Tensor, int]] = [(dist.isend, bytes_of(x), peer) for x, peer in sends]
    parts += [(dist.irecv, bytes_of(x), peer) for x, peer in receives]
    batch = [dist.P2POp(move, x, group=at.group, group_peer=at.peers[peer]) for move, x, peer in parts]
    return Transfer(dist.batch_isend_irecv(batch), [x for _, x, _ in parts])


def bytes_of(x: Tensor) -> Tensor:
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


def bytes_of_rows(x: Tensor) -> Tensor:
    """``[n, bytes]`` of contiguous ``[n, ...]`` rows, in their own memory."""
    return bytes_of(x).view(len(x), math.prod(x.shape[1:]) * x.element_size())
