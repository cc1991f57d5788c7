"""Differentiable collectives on an explicit group, and sends that can be waited for later.

The only module that calls the operations of ``torch.distributed``. Every differentiable collective is an opaque
custom op that takes its group by name: ``torch.compile``, activation checkpointing and selective checkpointing see
values, never half-done transfers. Pure data movement goes as bytes, so that any dtype travels bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from cphandler.comm.traffic import record_sent
from cphandler.errors import InvalidValueError, RankMismatchError
from cphandler.precision import accumulator_dtype


class Members(NamedTuple):
    """The ranks that an operation is between: all of a group, or some of it.

    Attributes:
        group: the process group.
        size: how many.
        rank: this process's place among them.
        peers: their ranks in the group, in order.
    """

    group: dist.ProcessGroup
    size: int
    rank: int
    peers: range


def sub_group_name(group_name: str, peers: range) -> str:
    """A name under which every operation of this module is between some ranks of a group.

    Messages go through the group itself, so that nothing has to be made, by anybody. In collectives all ranks of the
    group take part, each with its own part of it; parts do not overlap.
    """
    return f"{group_name}#{peers.start}:{peers.stop}:{peers.step}" if group_name else ""


def members(group_name: str) -> Members:
    """Who a name stands for.

    Raises:
        InvalidValueError: the group was destroyed or never made in this process.
    """
    name, _, part = group_name.partition("#")
    group = process_group(name)
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if not part:
        return Members(group, size, rank, range(size))
    peers = range(*map(int, part.split(":")))
    return Members(group, len(peers), peers.index(rank), peers)


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


def transports(group: dist.ProcessGroup) -> dict[str, str]:
    """Which transport serves each device type in this group, such as ``{"cpu": "gloo", "cuda": "nccl"}``."""
    return dict(part.split(":", 1) for part in dist.get_backend_config(group).split(","))


def _gathers_by_sends(device: torch.device, group: dist.ProcessGroup) -> bool:
    """True on gloo, whose own all-gather is several times slower than its sends."""
    return transports(group).get(device.type) == "gloo"


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
    """Sends and receives that are under way; holds what they need until :meth:`wait`."""

    def __init__(self, works: Sequence[Any], tensors: Sequence[Tensor]) -> None:
        self._works = list(works)
        self._tensors = list(tensors)

    def wait(self) -> None:
        """Block (on CUDA: make the stream wait) until every part is done."""
        for work in self._works:
            work.wait()
        self._works.clear()
        self._tensors.clear()


def post(sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], group_name: str) -> Transfer:
    """Start sends and receives to and from group ranks in one batch.

    Both sides of a pair must name their messages in the same order. A tensor being sent must not be written, and a
    received one not be read, before :meth:`Transfer.wait`. Empty tensors are not sent.

    Args:
        sends: tensors of any dtype and strides, and the rank each goes to.
        receives: contiguous tensors, and the rank whose bytes each is filled with.
        group_name: the group.

    Raises:
        InvalidValueError: a tensor to receive into that is not contiguous.
    """
    plain = [(tensor.resolve_conj().resolve_neg().contiguous(), peer) for tensor, peer in sends if tensor.numel()]
    outgoing = [(_bytes(tensor), peer) for tensor, peer in plain]
    incoming = [(_bytes(tensor), peer) for tensor, peer in receives if tensor.numel()]
    group, _, _, ranks = members(group_name)
    operations = [dist.P2POp(dist.isend, part, group=group, group_peer=ranks[peer]) for part, peer in outgoing]
    operations += [dist.P2POp(dist.irecv, part, group=group, group_peer=ranks[peer]) for part, peer in incoming]
    record_sent("send", sum(part.nbytes for part, _ in outgoing), len(outgoing))
    works = dist.batch_isend_irecv(operations) if operations else []
    return Transfer(works, [part for part, _ in [*outgoing, *incoming]])


def _bytes(x: Tensor) -> Tensor:
    """``[bytes]`` of a contiguous tensor, in its own memory: the one way in which anything here is sent or received.

    A dim of size 1 may have any stride in a tensor that torch calls contiguous; ``view`` and ``contiguous`` keep it.

    Raises:
        InvalidValueError: not contiguous, so that its bytes are not one run of memory.
    """
    if not x.is_contiguous():
        raise InvalidValueError(
            "only contiguous memory can be sent or received",
            got=f"shape {list(x.shape)} with strides {list(x.stride())}",
            fix="pass x.contiguous()",
        )
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)


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
    group, size, rank, peers = members(group_name)
    sent = _bytes_of_rows(x.contiguous())
    record_sent("all_to_all", sent.nbytes - send_counts[rank] * sent.shape[1], size - 1)
    receives, sends = ([0] * dist.get_world_size(group) for _ in range(2))
    for i, peer in enumerate(peers):
        receives[peer], sends[peer] = recv_counts[i], send_counts[i]
    dist.all_to_all_single(_bytes_of_rows(received), sent, receives, sends, group=group)
    return received


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
    group, size, rank, _ = members(group_name)
    gathered = x.new_empty((size * len(x), *x.shape[1:]))
    if x.numel() == 0:
        return gathered
    x = x.contiguous()
    if _gathers_by_sends(x.device, group) or size < dist.get_world_size(group):
        parts = gathered.chunk(size)
        parts[rank].copy_(x)
        peers = [peer for peer in range(size) if peer != rank]
        post([(x, peer) for peer in peers], [(parts[peer], peer) for peer in peers], group_name).wait()
    else:
        record_sent("all_gather", x.nbytes * (size - 1), size - 1)
        _all_gather_into(_bytes(gathered), _bytes(x), group=group)
    return gathered


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
    _, size, rank, _ = members(group_name)
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


def agree(payload: bytes, group_name: str, timeout: float | None) -> list[bytes]:
    """Every rank's payload, in rank order: the one tiny collective behind the consistency check.

    Args:
        payload: bytes of one length on all ranks.
        group_name: the group.
        timeout: seconds to wait for a rank; None leaves it to the group's own limit.

    Raises:
        RankMismatchError: some ranks did not come in time; names them where the transport can.
    """
    group = process_group(group_name)
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    mine = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(device_of(group))
    everyone = mine.new_empty((size, len(mine)))
    limit = None if timeout is None else timedelta(seconds=timeout)
    peers = [peer for peer in range(size) if peer != rank]
    sends: list[Any] = []
    if _gathers_by_sends(mine.device, group):
        everyone[rank] = mine
        sends = [dist.isend(mine, group=group, group_dst=peer) for peer in peers]
        waits = {peer: dist.irecv(everyone[peer], group=group, group_src=peer) for peer in peers}
    else:
        waits = {-1: dist.all_gather([*everyone], mine, group=group, async_op=True)}
    record_sent("check", mine.nbytes * len(peers), len(peers))
    missing = [peer for peer, work in waits.items() if not _wait(work, limit)]
    if missing:
        who = "some rank" if missing == [-1] else f"rank {', '.join(map(str, missing))}"
        raise RankMismatchError(
            f"{who} of the context-parallel group did not reach the consistency check of rank {rank}",
            got=f"nothing within {timeout} seconds" if timeout else "no answer within the group's own time limit",
            fix="every rank of the group must run the same steps; look at the first error of the ranks named",
        )
    for work in sends:
        work.wait()
    return [bytes(row) for row in everyone.cpu().numpy()]


def _wait(work: Any, limit: timedelta | None) -> bool:
    """True when the work finished; a transport raises RuntimeError when its peer is gone or too late."""
    try:
        finished = work.wait(limit) if limit is not None else work.wait()
    except RuntimeError:
        return False
    return finished is not False


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
