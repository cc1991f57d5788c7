"""The floor of an algorithm: its kernel calls alone, and its bytes at gloo's price, both timed in the same run.

The calls of a pass that was watched (:mod:`benchmarks.bare`) are made again on random tensors, with no exchange, no
merging and no handler around them. What gloo's threads and the system's network code take for a byte is timed by moving
blocks of keys and values, by direct sends and by an all-to-all; the cheaper of the two is the price.
"""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.works import Work

ROUNDS = 4
"""Messages of a timing of gloo, each as large as a rank's keys and values."""

Size = tuple[int, ...]


class Call(NamedTuple):
    """One call of the kernel, ``[B, N, S, D]``.

    Attributes:
        query: shape of the queries.
        key: shape of the keys.
        value: shape of the values.
        mask: shape of the additive mask; empty without one.
        causal: the kernel's causal flag.
        backward: whether it is the backward kernel.
    """

    query: Size
    key: Size
    value: Size
    mask: Size
    causal: bool
    backward: bool

    def make(self, tensors: tuple[Any, ...]) -> None:
        """Make the call, with what :func:`tensors_of` has for it."""
        q, k, v, mask, grad, out, lse = tensors
        if self.backward:
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, out, lse, 0.0, self.causal, attn_mask=mask
            )
        else:
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, self.causal, attn_mask=mask)


Calls = tuple[Call, ...]
"""A rank's calls in one pass, in order."""


def replay(calls_of_ranks: tuple[Calls, ...], dtype: str) -> float:
    """CPU seconds of this rank's calls alone.

    Args:
        calls_of_ranks: every rank's calls.
        dtype: name of the tensors' dtype.
    """
    mine = calls_of_ranks[dist.get_rank()]
    tensors = [tensors_of(call, dtype) for call in mine]
    if dist.get_world_size() > 1:
        dist.barrier()
    started = time.process_time()
    for call, made in zip(mine, tensors, strict=True):
        call.make(made)
    return time.process_time() - started


def tensors_of(call: Call, dtype: str) -> tuple[Any, ...]:
    """Random inputs of a call, rows before heads in memory, with the output and log-sum-exp that belong to them."""
    return _tensors(call._replace(backward=False), dtype)


@lru_cache(maxsize=256)
def _tensors(call: Call, dtype: str) -> tuple[Any, ...]:
    generator, kind = torch.Generator().manual_seed(0), getattr(torch, dtype)

    def drawn(shape: Size) -> Tensor:
        batch, heads, rows, dim = shape
        return torch.randn(batch, rows, heads, dim, generator=generator).to(kind).transpose(1, 2)

    q, k, v = (drawn(shape) for shape in (call.query, call.key, call.value))
    mask = torch.zeros(call.mask, dtype=kind) if call.mask else None
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, call.causal, attn_mask=mask)
    return q, k, v, mask, drawn((*call.query[:3], call.value[-1])), out, lse


class Price(NamedTuple):
    """CPU seconds of this rank and bytes it sent: by direct sends, and by an all-to-all."""

    direct: float
    direct_bytes: int
    traded: float
    traded_bytes: int


def gloo_price(work: Work) -> Price:
    """What it costs this rank to move its keys and values a few times, on its own."""
    size, rank = dist.get_world_size(), dist.get_rank()
    numbers = -(-work.tokens // size) * 2 * work.kv_heads * work.head_dim // size * size
    sent = torch.ones(numbers, dtype=getattr(torch, work.dtype))
    received = torch.empty_like(sent)

    def direct() -> None:
        transfers = [dist.isend(sent, (rank + 1) % size), dist.irecv(received, (rank - 1) % size)]
        for transfer in transfers:
            if transfer is not None:
                transfer.wait()

    def traded() -> None:
        dist.all_to_all_single(received, sent)

    seconds = []
    for move in (direct, traded):
        move()
        dist.barrier()
        started = time.process_time()
        for _ in range(ROUNDS):
            move()
        seconds.append(time.process_time() - started)
    whole = ROUNDS * numbers * sent.element_size()
    return Price(seconds[0], whole, seconds[1], whole * (size - 1) // size)


def forget() -> None:
    """Drop the tensors."""
    _tensors.cache_clear()
