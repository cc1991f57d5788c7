"""Batches for the demo's model: bytes of real documents, in documents of lengths that are honest, or in one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.packs import RANKS, TOKENS, drawn, packs
from cphandler import pack_documents
from cphandler.demo.corpus import packed_batches, read_documents

KINDS = {
    "pile": "documents with The Pile's lengths",
    "sources": "source files, packed as the demo packs them",
    "dense": "one document",
}
"""Documents by name, and what they are."""


def pile_lengths(seq_len: int, number: int) -> list[int]:
    """Document lengths of a pack: one that is kept where there are any of so many tokens, else drawn the same way."""
    ranks, rest = divmod(seq_len, TOKENS)
    if not rest and ranks in RANKS:
        kept = packs("pile", ranks)
        return kept[number % len(kept)]
    return drawn("pile", 1, 1, number, tokens=seq_len)[0]


def batches(kind: str, seq_len: int, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Different packed batches of ``seq_len`` tokens, as the demo makes them.

    Args:
        kind: one of :data:`KINDS`.
        seq_len: tokens of a batch.
        count: batches wanted.
        seed: of the text and the first pack; packs follow one another from there.
    """
    if kind == "sources":
        return packed_batches(count, seq_len, seed=seed)
    text = torch.cat(read_documents(count * seq_len, seq_len, seed))
    lengths = [[seq_len] if kind == "dense" else pile_lengths(seq_len, seed + i) for i in range(count)]
    return [_cut(part, own) for part, own in zip(text[: count * seq_len].split(seq_len), lengths, strict=True)]


def _cut(text: Tensor, lengths: list[int]) -> dict[str, Any]:
    return pack_documents(list(text.split(lengths)))
