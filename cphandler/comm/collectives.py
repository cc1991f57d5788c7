"""Differentiable collectives on an explicit group.

Each is an opaque custom op that takes its group by name: ``torch.compile``, activation checkpointing and selective
checkpointing see values, never half-done transfers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # loaded later, by operators' first call, it holds the world group for good
from torch import Tensor

from cphandler.comm import membership, staging, transfers
from cphandler.comm.endings import ended_on_error, finish, in_place_of_it, lost, ranks_named, watch
from cphandler.comm.membership import Members, device_of, members
from cphandler.comm.traffic import record_sent
from cphandler.comm.transfers import bytes_of, bytes_of_rows
from cphandler.errors import RankLostError, RankMismatchError
from cphandler.precision import accumulator_dtype


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
    sent, arriving = bytes_of_rows(x.contiguous()), bytes_of_rows(received)
    record_sent("all_to_all", sent.nbytes - send_counts[at.rank] * sent.shape[1], at.size - 1)
    receives, sends = ([0] * dist.get_world_size(at.group) for _ in range(2))
    for i, peer in enumerate(at.peers):
        receives[peer], sends[peer] = recv_counts[i], send_counts[i]
    if not membership.on_gloo(x.device, at.group):
        dist.all_to_all_single(arriving, sent, receives, sends, group=at.group)
        return received
    host = staging.through_host(x.device, at.group)
    if host is not None:
        sent, arriving = host.leaving(sent), host.arriving(arriving)
        host.settle()
    marks = _Marks(arriving.split(recv_counts), at.rank)
    watch(at.group)
    with ended_on_error(at):
        work = dist.all_to_all_single(arriving, sent, receives, sends, group=at.group, async_op=True)
        try:
            finish(work, None if at.limit is None else time.monotonic() + at.limit)
        except RuntimeError as error:
            raise lost(at, marks.unwritten(), error) from error
    if host is not None:
        host.land()
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
    transfers.post([(sent_parts[i], i) for i in peers], [(received_parts[i], i) for i in peers], group_name).wait()
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
    if membership.on_gloo(x.device, group) or size < dist.get_world_size(group):  # gloo's own is several times slower
        parts = gathered.chunk(size)
        parts[rank].copy_(x)
        peers = [peer for peer in range(size) if peer != rank]
        transfers.post([(x, peer) for peer in peers], [(parts[peer], peer) for peer in peers], group_name).wait()
    else:
        record_sent("all_gather", x.nbytes * (size - 1), size - 1)
        _all_gather_into(bytes_of(gathered), bytes_of(x), group=group)
    return gathered


def gather_parts(tensors: Sequence[Tensor], group_name: str) -> list[tuple[Tensor, ...]]:
    """Every rank's tensors, in rank order; its own are the ones it gave, where the transport needs no copy of them.

    Args:
        tensors: of one device, in the same shapes and dtypes on every rank.
        group_name: the process group's name.
    """
    group, size, rank, _, _ = members(group_name)
    if not membership.on_gloo(tensors[0].device, group) and size == dist.get_world_size(group):
        whole = [all_gather(x, group_name).view(size, *x.shape) for x in tensors]
        return list(zip(*whole, strict=True))
    parts = [tensors if peer == rank else [x.new_empty(x.shape) for x in tensors] for peer in range(size)]
    transfers.connect(group_name, tensors[0].device)
    peers = [peer for peer in range(size) if peer != rank]
    sends = [(x, peer) for peer in peers for x in tensors]
    transfers.post(sends, [(x, peer) for peer in peers for x in parts[peer]], group_name).wait()
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
    transfers.post([(x, (rank + shift) % size)], [(received, (rank - shift) % size)], group_name).wait()
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
    device, length = device_of(at.group), len(payload)
    room = bytearray(length * at.size)  # read as bytes: what torch makes under one of its transforms has no memory
    room[at.rank * length : (at.rank + 1) * length] = payload
    if device.type == "cpu":
        everyone = [torch.frombuffer(room, dtype=torch.uint8, count=length, offset=i * length) for i in range(at.size)]
    else:  # one copy there, and one back
        whole = torch.frombuffer(room, dtype=torch.uint8).to(device)
        everyone = list(whole.view(at.size, length))
    peers = [peer for peer in range(at.size) if peer != at.rank]
    mine, others = everyone[at.rank], [(everyone[peer], peer) for peer in peers]

    def arrived() -> list[bytes]:
        content = bytes(room) if device.type == "cpu" else whole.cpu().numpy().tobytes()
        return [content[i * length : (i + 1) * length] for i in range(at.size)]

    record_sent("check", len(payload) * len(peers), len(peers))
    try:
        if membership.on_gloo(device, at.group) or at.size < dist.get_world_size(at.group):
            transfers.posted([(mine, peer) for peer in peers], others, at).wait()
        else:
            work = dist.all_gather(everyone, mine, group=at.group, async_op=True)
            finish(work, None if at.limit is None else time.monotonic() + at.limit)
    except RankLostError as error:
        away = [at.peers[peer] for peer in peers if not any(arrived()[peer])] if error.late else error.ranks
        raise _absent(at, away or error.ranks, late=error.late) from error
    except RuntimeError as error:
        raise _absent(at, [], late=True) from error
    return arrived()


def _absent(at: Members, ranks: list[int], *, late: bool) -> RankMismatchError:
    named = ranks_named(ranks)
    return RankMismatchError(
        f"{named} of the context-parallel group did not reach the consistency check of rank {at.peers[at.rank]}",
        got=in_place_of_it(late, at.limit),
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
