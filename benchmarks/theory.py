"""Bytes that algorithms must send, counted from who sees whom and from nothing of the library's plan."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import typer
from torch import Tensor

from benchmarks.works import Work, inner_ranks
from cphandler import Causal, Documents, get_cp_handler_cls
from cphandler.testing import visible_pairs


@lru_cache
def theoretical_bytes(work: Work) -> tuple[int, int]:
    """Bytes that all ranks send, forward and in all, counted from who sees whom and from nothing of the library's plan.

    Ring: a block makes as many hops as the farthest rank that sees a key of it; gradients start at the nearest such
    rank and make one more hop, home. P2p: each row once to each rank that sees it, its gradient once back. All-gather:
    every block to every other rank, gradients back. Ulysses: every head that another rank computes, once each way. USP:
    Ulysses in the inner groups, and p2p between them.
    """
    if work.ranks == 1:
        return 0, 0
    size = torch.empty(0, dtype=getattr(torch, work.dtype)).element_size()
    accumulator = max(size, 4)
    rows, width, traded = -(-work.tokens // work.ranks), 2 * work.kv_heads * work.head_dim, 0
    if work.backend == "all_gather":
        out = home = work.ranks * (work.ranks - 1) * rows * width
    elif work.backend == "ulysses":
        out, home, traded = 0, 0, heads_traded(work, work.ranks)
    elif work.backend == "ring":
        first, last = hops(work)
        out = sum(last) * rows * width
        home = sum(b - a + 1 for a, b in zip(first, last, strict=True) if b) * rows * width
    elif work.backend == "p2p":
        out = home = rows_seen(work, 1) * width
    elif work.backend == "usp":
        inner = inner_ranks(work.ranks)
        traded = work.ranks // inner * heads_traded(work, inner)
        out = home = rows_seen(work, inner) * 2 * sum(key_heads(work, inner)) * work.head_dim
    else:
        raise typer.BadParameter(f"no theory of {work.backend}")
    forward = (out + traded) * size
    return forward, 2 * forward + home * accumulator


def key_heads(work: Work, sharers: int) -> list[int]:
    """Key heads that the query heads of each of some ranks use."""
    share, group = work.heads // sharers, work.heads // work.kv_heads
    return [((r + 1) * share - 1) // group - r * share // group + 1 for r in range(sharers)]


def heads_traded(work: Work, sharers: int) -> int:
    """Numbers that ranks which share the heads send each other: queries and outputs, keys and values."""
    rows = -(-work.tokens // work.ranks)
    return (sharers - 1) * rows * work.head_dim * 2 * (work.heads + sum(key_heads(work, sharers)))


@lru_cache
def sight(work: Work) -> tuple[Tensor, Tensor]:
    """``[S]`` the rank that holds a token, and ``[ranks, S]`` whose queries see it, from each document's dense mask."""
    handler_cls = get_cp_handler_cls(work.backend)

    @dataclass
    class Seat:
        place: int

        def size(self) -> int:
            return work.ranks

        def rank(self) -> int:
            return self.place

    offsets = work.documents().offsets
    holder = torch.full((work.tokens,), -1)
    for rank in range(work.ranks):
        handler = handler_cls(cp_group=Seat(rank), **work.settings())
        held = handler.dispatch(torch.arange(work.tokens), 0, pad_value=-1)
        holder[held[held >= 0]] = rank
    sees = torch.zeros(work.ranks, work.tokens, dtype=torch.bool)
    for start, length in zip(offsets.tolist(), work.lengths, strict=False):
        dense = visible_pairs(Causal(), Documents.dense(length))
        for rank in range(work.ranks):
            sees[rank, start : start + length] = dense[holder[start : start + length] == rank].any(0)
    return holder, sees


def rows_seen(work: Work, together: int) -> int:
    """Rows of one set of ranks that a query of another sees, over all pairs of sets; ``together`` ranks form a set."""
    holder, sees = sight(work)
    by_set = sees.unflatten(0, (-1, together)).any(1)
    return sum(int(seen[holder // together != number].sum()) for number, seen in enumerate(by_set))


def hops(work: Work) -> tuple[list[int], list[int]]:
    """Per owner, ring distance to the nearest and the farthest rank that sees one of its keys."""
    holder, sees = sight(work)
    first, last = [], []
    for owner in range(work.ranks):
        away = [s for s in range(1, work.ranks) if sees[(owner + s) % work.ranks, holder == owner].any()]
        first.append(min(away, default=0))
        last.append(max(away, default=0))
    return first, last
