"""What is true of a case's tokens, from the definitions: which are real, and which positions they have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cphandler.testing.cases import Case, documents_of, metadata, valid_tokens
from cphandler.testing.fuzz.cases import RandomCase
from cphandler.tokens.masks import AcrossDocuments, Mask, PerDocument, PrefixTree, SharedQuestion

AXES = 3
"""Rotary axes of positions that have several."""


def rows_differ(case: Case) -> int | None:
    """Rows of a dense batch that differ by padding, or by a mask of one each; None where they are alike."""
    if case.qkv_format == "thd":
        return None
    if case.batch.real is not None:
        return len(case.batch.real)
    return None if case.mask.num_documents in (None, 1) else case.mask.num_documents


class Truth:
    """The facts of one group's handler.

    Args:
        case: what is asked.
        seed: of the group's data.
    """

    def __init__(self, case: RandomCase, seed: int) -> None:
        self.case, self.base = case, case.base
        self.rows = rows_differ(case.base)
        self.named = self._named(seed) if case.positions else None

    def _named(self, seed: int) -> Tensor:
        """Positions of the caller's own, in the shape in which they are given."""
        batch = self.base.batch
        rows = len(batch.real) if batch.real is not None else batch.rows
        sizes = {"A": AXES, "B": rows, "1": 1, "S": documents_of(self.base).num_tokens}
        shape = tuple(sizes[letter] for letter in self.case.positions)
        return torch.randint(0, 2 * sizes["S"] + 3, shape, generator=torch.Generator().manual_seed(seed))

    def arguments(self) -> dict[str, Any]:
        """What the handler is told of the batch, as the case gives it."""
        described = metadata(self.base)
        if self.named is not None:
            described["position_ids"] = self.named
        if self.base.is_cross:
            described["cross_attention"] = True
        return {name: self._given(x) if isinstance(x, Tensor) else x for name, x in described.items()}

    def _given(self, x: Tensor) -> Any:
        """A tensor of integers as the case gives it; a list or an array where that says as much."""
        if x.dtype == torch.bool:  # a padding mask is a tensor
            return x.to(torch.uint8) if self.case.given_as == "wide tensor" else x.clone()
        how = self.case.given_as if x.numel() else "tensor"
        forms = {"wide tensor": lambda: x.to(torch.int64, copy=True), "array": x.numpy().copy}
        return {**forms, "list": x.tolist, "tensor": x.clone}[how]()

    def valid(self, stream: str) -> Tensor:
        """``[S]`` bool, or ``[B, S]`` where rows differ: real tokens."""
        valid = valid_tokens(self.base, stream)
        return valid if valid.dim() == 2 or self.rows is None else valid.expand(self.rows, -1)

    def own_positions(self, stream: str) -> Tensor | None:
        """``[..., S]`` positions that the caller named or the mask implies; None where they follow from documents."""
        if stream == "kv" and self.base.is_cross:
            return None
        if self.named is not None:
            return (
                self.named.squeeze(-2)
                if self.base.qkv_format == "thd" and self.named.dim() > 1 and (self.named.shape[-2] == 1)
                else self.named
            )
        return None if self.base.is_cross else self._implied()

    def _implied(self) -> Tensor | None:
        lengths = documents_of(self.base).lengths.tolist()
        valid, mask = self.valid("q"), self.base.mask
        if self.rows is None:
            implied = positions_under(mask, lengths, [bool(real.any()) for real in valid.split(lengths)])
            return None if implied is None else torch.tensor(implied, dtype=torch.int64)
        real = valid.any(-1).tolist()
        if mask.num_documents in (None, 1):
            rows = [positions_under(mask, lengths, [each]) for each in real]
        else:
            whole = positions_under(mask, lengths * self.rows, real)
            size = lengths[0]
            rows = [None if whole is None else whole[i * size : (i + 1) * size] for i in range(self.rows)]
        if all(row is None for row in rows):
            return None
        return torch.tensor([list(range(lengths[0])) if row is None else row for row in rows], dtype=torch.int64)

    def positions(self, stream: str) -> Tensor:
        """``[..., S]`` position of each token."""
        own = self.own_positions(stream)
        if own is not None:
            return own
        return torch.cat([*map(torch.arange, documents_of(self.base, stream).lengths.tolist()), torch.arange(0)])


def positions_under(mask: Mask, lengths: list[int], real: list[bool]) -> list[int] | None:
    """The position of each token that a mask implies; None for a mask that implies none.

    Args:
        mask: who sees whom.
        lengths: physical tokens of each document.
        real: whether each has real tokens; one that has none is no tree.
    """
    if isinstance(mask, AcrossDocuments):
        return positions_under(mask.mask, [sum(lengths)], [any(real)])
    if isinstance(mask, PerDocument):
        alone = [positions_under(m, [n], [r]) for m, n, r in zip(mask.masks, lengths, real, strict=True)]
        if all(own is None for own in alone):
            return None
        pairs = zip(alone, lengths, strict=True)
        return [token for own, length in pairs for token in (range(length) if own is None else own)]
    if not isinstance(mask, SharedQuestion | PrefixTree):
        return None
    positions: list[int] = []
    for number, (length, some) in enumerate(zip(lengths, real, strict=True)):
        own = list(_of_document(mask, number)) if some else []
        rest = range(len(own), length) if isinstance(mask, PrefixTree) or not own else _answer(mask, number, length)
        positions += [*own, *rest][:length]
    return positions


def _of_document(mask: SharedQuestion | PrefixTree, number: int) -> list[int]:
    """Positions of the tokens that a document's segments or nodes name."""
    if isinstance(mask, SharedQuestion):
        question, *answers = _segments(mask, number) or (0,)
        return [*range(question), *(question + i for length in answers for i in range(length))]
    starts: list[int] = []
    for parent, _ in zip(mask.parents, mask.lengths, strict=True):
        starts.append(starts[parent] + mask.lengths[parent] if parent >= 0 else 0)
    return [start + i for start, length in zip(starts, mask.lengths, strict=True) for i in range(length)]


def _segments(mask: SharedQuestion, number: int) -> tuple[int, ...]:
    own = mask.segments[number] if mask.segments and isinstance(mask.segments[0], tuple) else mask.segments
    return tuple(own)  # type: ignore[arg-type]


def _answer(mask: SharedQuestion, number: int, length: int) -> range:
    """Positions of what is left over after the last answer: one more."""
    segments = _segments(mask, number) or (0,)
    return range(segments[0], segments[0] + length - sum(segments))
