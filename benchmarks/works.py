"""What competitors compute: the same documents for all, on a number of ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import typer

from benchmarks.peers import Shape, peer_cls
from cphandler import CPConfig, Documents

PACKS = Path(__file__).parent / "data" / "packs"
"""Lengths of packed batches; see the README there."""


@dataclass(frozen=True)
class Work:
    """What everybody computes.

    Attributes:
        backend: ``"plain"`` for torch's kernel on one rank, a backend of the library, or a peer's name.
        ranks: how many.
        lengths: documents of the packed causal batch.
        heads: query heads.
        kv_heads: key heads.
        head_dim: channels of a head.
        dtype: name of the dtype.
        layout: layout name, or None for the backend's own.
        tile: rows of a kernel's tile, which the balanced layout counts area in; None counts pairs.
        kernel_cost: pairs that a task is worth in the balanced layout beside its own.
        peer: ``module:class`` of another project's attention; None for the library's.
    """

    backend: str
    ranks: int
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    layout: str | None
    tile: int | None = None
    kernel_cost: int = 0
    peer: str | None = None

    @property
    def tokens(self) -> int:
        """Global tokens."""
        return sum(self.lengths)

    @property
    def name(self) -> str:
        """The backend, and the layout where it is not the backend's own."""
        return f"{self.backend}@{self.layout}" if self.layout else self.backend

    @property
    def is_ours(self) -> bool:
        """Whether the library computes it."""
        return self.peer is None and self.backend != "plain"

    @property
    def shape(self) -> Shape:
        """What a peer is told."""
        return Shape(self.ranks, self.tokens, self.heads, self.kv_heads, self.head_dim)

    def settings(self) -> dict[str, Any]:
        """What a handler is told, but for its group."""
        batch = {"qkv_format": "thd", "cu_seqlens_q": self.documents().offsets}
        return {**batch, "layout": self.layout, "config": CPConfig(tile=self.tile, kernel_cost=self.kernel_cost)}

    def documents(self) -> Documents:
        """The packed documents."""
        return Documents.from_cu_seqlens([0, *torch.tensor(self.lengths).cumsum(0).tolist()])


@dataclass(frozen=True)
class Contest:
    """Works over the same documents, torch's kernel first.

    Attributes:
        name: what the documents are.
        works: the competitors.
    """

    name: str
    works: tuple[Work, ...]

    def __str__(self) -> str:
        plain = self.works[0]
        documents = f"{len(plain.lengths)} document{'s' if len(plain.lengths) > 1 else ''}"
        heads = f"{plain.heads} query and {plain.kv_heads} key heads of {plain.head_dim}"
        return f"{self.name}: {plain.tokens} tokens in {documents}, causal, {heads}, {plain.dtype}"


@dataclass(frozen=True)
class Absent:
    """A peer that does not take part.

    Attributes:
        name: its name.
        ranks: on how many ranks.
        reason: why not.
    """

    name: str
    ranks: int
    reason: str


def inner_ranks(ranks: int) -> int:
    """Ranks that split heads under ``usp``: the smallest divisor that is at least the square root."""
    return next(number for number in range(1, ranks + 1) if ranks % number == 0 and number * number >= ranks)


def pack_lengths(pack: str, ranks: int) -> tuple[int, ...]:
    """Document lengths of a pack ``corpus:index`` for a number of ranks."""
    corpus, _, index = pack.partition(":")
    known = sorted(path.stem for path in PACKS.glob("*.json"))
    if corpus not in known:
        raise typer.BadParameter(f"--pack takes corpus:index with a corpus of {', '.join(known)}, got {pack}")
    packs: dict[str, list[list[int]]] = json.loads((PACKS / f"{corpus}.json").read_text())
    chosen = packs.get(str(ranks), [])
    if not index.isdecimal() or int(index) >= len(chosen):
        raise typer.BadParameter(f"{corpus} has packs 0 to 15 for {', '.join(packs)} ranks, got {pack} for {ranks}")
    return tuple(chosen[int(index)])


def works_of(plain: Work, counts: Sequence[int], names: Sequence[str], layout: str | None) -> Iterator[Work]:
    """The plain kernel, one rank of the library, then every backend on every number of ranks.

    Args:
        plain: the plain kernel's work.
        counts: numbers of ranks.
        names: ``backend`` or ``backend@layout``; the usual backends if empty.
        layout: of those that name none; None for the backend's own.
    """
    yield plain
    yield replace(plain, backend="local")
    for count in counts:
        inner = inner_ranks(count)
        sharers = {"ulysses": count, "usp": inner}
        usual = ["ring", "p2p", "all_gather", "ulysses", *(["usp"] if inner < count else [])]
        for name in names or usual:
            backend, _, own = name.partition("@")
            if backend == "local" or plain.heads % sharers.get(backend, 1):
                raise typer.BadParameter(f"{name} cannot serve {plain.heads} heads on {count} ranks")
            yield replace(plain, backend=backend, ranks=count, layout=own or layout)


def peers_of(plain: Work, counts: Sequence[int], paths: Sequence[str]) -> Iterator[Work | Absent]:
    """Every peer on every number of ranks, or why it is absent.

    Args:
        plain: the plain kernel's work, on one document.
        counts: numbers of ranks.
        paths: ``module:class`` of each peer.
    """
    for count in counts:
        for path in paths:
            try:
                peer = peer_cls(path)
            except ValueError as error:
                raise typer.BadParameter(f"--peer: {error}") from None
            reason = peer.availability(count, plain.heads, plain.kv_heads)
            if reason is None and plain.tokens % (2 * count):
                reason = f"needs tokens that {2 * count} divides, got {plain.tokens}"
            if reason is not None:
                yield Absent(peer.name, count, reason)
            else:
                yield replace(plain, backend=peer.name, ranks=count, peer=path)
