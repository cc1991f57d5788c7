"""A competitor's seat in a rank's process: its tensors, one pass, and what a pass costs there."""

from __future__ import annotations

import ctypes
import gc
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.kernel_clock import kernel_clock
from benchmarks.peers import Peer, peer_cls
from benchmarks.works import Work
from cphandler import get_cp_handler_cls, record_traffic
from cphandler.handler.contract import ContextParallelHandler


@dataclass
class Sample:
    """What one forward and backward pass cost on one rank.

    Attributes:
        forward: CPU seconds of the forward pass, all threads.
        both: CPU seconds of forward and backward.
        kernel: CPU seconds of the attention kernel's calls, forward and backward.
        own: CPU seconds of the thread that computes, the kernel's included; what is left are gloo's threads.
        wall: seconds from the start to the end of both.
        wire_bytes: bytes that the process wrote to its sockets; None where the system does not say.
        forward_bytes: bytes sent forward, as the library counts its own; 0 for others.
        both_bytes: the same in all.
    """

    forward: float
    both: float
    kernel: float
    own: float
    wall: float
    wire_bytes: int | None
    forward_bytes: int
    both_bytes: int


@dataclass
class Part:
    """What one rank has of a result.

    Attributes:
        tokens: ``[L]`` which tokens its rows are; negative for a pad row.
        tensors: output and the gradients of q, k and v, ``[L, N, D]`` each.
    """

    tokens: Tensor
    tensors: list[Tensor]


def global_tensors(work: Work) -> list[Tensor]:
    """Query, key, value and the gradient of the output, ``[S, N, D]``: the same for all competitors."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(work.tokens, heads, work.head_dim) for heads in (work.heads, work.kv_heads, work.kv_heads, work.heads)]
    return [torch.randn(shape, generator=generator).to(getattr(torch, work.dtype)) for shape in shapes]


class Seat(ABC):
    """A competitor on this rank.

    Attributes:
        tokens: ``[L]`` the tokens of its rows.
        inputs: query, key and value as it takes them, leaves.
        grad_out: the gradient of its output.
    """

    tokens: Tensor
    inputs: list[Tensor]
    grad_out: Tensor

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """A forward pass."""

    def rows(self, x: Tensor) -> Tensor:
        """``[L, N, D]`` of an input's gradient."""
        return x

    def output_rows(self, out: Tensor) -> Tensor:
        """``[L, N, D]`` of the output."""
        return out


class PlainSeat(Seat):
    """Torch's scaled dot product attention, one call per document."""

    def __init__(self, work: Work) -> None:
        self.work, self.tokens = work, torch.arange(work.tokens)
        *inputs, self.grad_out = global_tensors(work)
        self.inputs = [x.requires_grad_() for x in inputs]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See :class:`Seat`."""
        outs = []
        for parts in zip(*(x.split(self.work.lengths) for x in (query, key, value)), strict=True):
            q, k, v = (x.unsqueeze(0).transpose(1, 2) for x in parts)
            grouped = self.work.heads != self.work.kv_heads
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            outs.append(out.transpose(1, 2).squeeze(0))
        return outs[0] if len(outs) == 1 else torch.cat(outs)


class HandlerSeat(Seat):
    """A backend of the library."""

    def __init__(self, work: Work) -> None:
        group = dist.group.WORLD if work.ranks > 1 else None
        handler: ContextParallelHandler = get_cp_handler_cls(work.backend)(cp_group=group, **work.settings())
        self.handler = handler
        self.tokens = handler.dispatch(torch.arange(work.tokens), 0, pad_value=-1)
        *inputs, self.grad_out = (handler.dispatch(x, 0) for x in global_tensors(work))
        self.inputs = [x.requires_grad_() for x in inputs]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See :class:`Seat`."""
        out: Tensor = self.handler.core_attn(None, query, key, value)
        return out


class PeerSeat(Seat):
    """Another project's attention."""

    def __init__(self, work: Work) -> None:
        self.peer: Peer = peer_cls(str(work.peer))()
        self.peer.connect(work.shape)
        self.tokens = self.peer.tokens(work.shape, dist.get_rank())
        *inputs, grad_out = (x[self.tokens] for x in global_tensors(work))
        self.inputs = [self.peer.arranged(x).requires_grad_() for x in inputs]
        self.grad_out = self.peer.arranged_output(grad_out)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See :class:`Seat`."""
        return self.peer.attention(query, key, value)

    def rows(self, x: Tensor) -> Tensor:
        """See :class:`Seat`."""
        return self.peer.rows(x)

    def output_rows(self, out: Tensor) -> Tensor:
        """See :class:`Seat`."""
        return self.peer.output_rows(out)


@lru_cache(maxsize=64)
def seat_of(work: Work) -> Seat:
    """This rank's seat, made once."""
    if work.peer is not None:
        return PeerSeat(work)
    return PlainSeat(work) if work.backend == "plain" else HandlerSeat(work)


def fresh(work: Work) -> Seat:
    """The same without gradients, after all ranks have come here."""
    seat = seat_of(work)
    for x in seat.inputs:
        x.grad = None
    if dist.get_world_size() > 1:
        dist.barrier()
    return seat


def measure(work: Work) -> Sample:
    """One forward and backward pass on this rank."""
    seat = fresh(work)
    written, clock = written_bytes(), kernel_clock()
    with record_traffic() as traffic:
        in_kernels, own = clock.seconds, time.thread_time()
        started_wall, started = time.perf_counter(), time.process_time()
        out = seat.attend(*seat.inputs)
        forward, forward_bytes = time.process_time() - started, traffic.sent_bytes
        out.backward(seat.grad_out)
        both, wall = time.process_time() - started, time.perf_counter() - started_wall
        in_kernels, own = clock.seconds - in_kernels, time.thread_time() - own
    wire = None if written is None else (written_bytes() or 0) - written
    return Sample(forward, both, in_kernels, own, wall, wire, forward_bytes, traffic.sent_bytes)


def part(work: Work) -> Part:
    """This rank's rows of a result, to be checked before anything is timed."""
    seat = fresh(work)
    out = seat.attend(*seat.inputs)
    out.backward(seat.grad_out)
    grads = [seat.rows(x.grad) for x in seat.inputs if x.grad is not None]
    tensors = [x.contiguous() for x in (seat.output_rows(out.detach()), *grads)]
    return Part(seat.tokens, tensors)


def forget() -> None:
    """Drop seats: the next contest has others."""
    seat_of.cache_clear()


def written_bytes() -> int | None:
    """Bytes this process has written so far, which in a pass is what gloo gave to its sockets; None off Linux."""
    counts = Path("/proc/self/io")
    if not counts.exists():
        return None
    return int(counts.read_text().split("wchar:")[1].split()[0])


def peak(work: Work) -> int | None:
    """Bytes of memory that a pass needs above its inputs, outputs and gradients, at most; None off Linux and glibc.

    The process's own high-water mark (VmHWM) in one pass, so that everybody's buffers count, gloo's too. What the
    allocator keeps is given back before, and the mark is set to what is resident then.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None or not Path("/proc/self/clear_refs").exists():
        return None
    seat = fresh(work)
    gc.collect()
    trim(0)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    out = seat.attend(*seat.inputs)
    out.backward(seat.grad_out)
    results = [out, *(x.grad for x in seat.inputs if x.grad is not None)]
    return _resident("VmHWM") - before - sum(x.numel() * x.element_size() for x in results)


def _resident(field: str) -> int:
    """Bytes, from the kernel's account of this process."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])
