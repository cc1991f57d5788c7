"""MagiAttention's keys, which are its plans: one per mask and heads, over the rows that the first of them dealt out."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import torch

from cphandler.comm import collectives
from cphandler.comm.groups import CPGroup
from cphandler.comm.membership import process_group
from cphandler.engines.magi_package import MagiPackage
from cphandler.engines.slices import KIND, KINDS
from cphandler.errors import UnsupportedError
from cphandler.layouts.layout import Layout, contiguous
from cphandler.tokens.bands import K0, Q0, Q1
from cphandler.tokens.intervals import Table, table

Heads = tuple[int, int, int]
"""Query heads, key heads and head dim, as a key has them."""


class MagiKeys:
    """The keys of one batch. Making one is a collective call: all ranks of the group make it, in the same order.

    Args:
        package: MagiAttention.
        group: the ranks; they must be able to communicate.
        num_tokens: global tokens S.
        slices: who sees whom under the mask by which rows are dealt out; see :mod:`cphandler.engines.slices`.
        heads: query heads, key heads and head dim of the first key.
        settings: a ``DistAttnConfig``; None for the package's own.

    Attributes:
        first: the key that dealt out the rows.
        rows: rows of each rank, the engine's own pads included.
    """

    def __init__(
        self, package: MagiPackage, group: CPGroup, num_tokens: int, slices: Table, heads: Heads, settings: Any = None
    ) -> None:
        self._package, self._group, self._num_tokens = package, group, num_tokens
        length = max(num_tokens, group.size)  # each rank must get a chunk
        self.first = package.flex_key(
            **_mask(package, slices),
            total_seqlen_q=length,
            total_seqlen_k=length,
            **_named(heads),
            pad_size=0,  # deprecated there, and required
            cp_group_or_mesh=process_group(group.name.partition("#")[0]),
            dist_attn_config=package.config() if settings is None else settings,
        )
        self._check_flags()
        self._length = length
        self.rows = self.first.total_seqlen_q // group.size
        self._made: dict[Hashable, Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> MagiKeys:
        """Itself: keys never change, and belong to a group."""
        return self

    @property
    def kernel(self) -> str:
        """The engine's kernel: ``"ffa"``, ``"fa4"``, ``"sdpa"`` or ``"sdpa_ol"``."""
        backend = self.first.kernel_backend
        return str(getattr(backend, "value", backend))

    @property
    def deterministic(self) -> bool:
        """Whether the engine gives the same bits in two runs."""
        return bool(self.first.is_deterministic_mode_enable) or self.kernel.startswith("sdpa")

    @property
    def flattens_heads(self) -> bool:
        """Whether the engine makes one head of each group, which rules out sinks and the largest score."""
        return bool(self.first.is_flatten_head_groups_enable)

    def _check_flags(self) -> None:
        """Refuse what a variable of the environment, or the settings, have switched on, and nobody asked a handler for.

        Raises:
            UnsupportedError: rows that differ in number from rank to rank, or another dtype than the tensors'.
        """
        if self.first.uneven_shard:
            raise UnsupportedError(
                "all ranks must hold as many rows",
                got="uneven_shard=True",
                fix="leave uneven_shard out of the settings",
            )
        if self.first.precision is not None:
            raise UnsupportedError(
                "attention would compute in another dtype than the tensors'",
                got=f"MAGI_ATTENTION_PRECISION for {self.first.precision}",
                fix="unset MAGI_ATTENTION_PRECISION, and cast queries, keys and values where that is meant",
            )

    def layout(self, device: torch.device) -> Layout:
        """Which rank holds which tokens, in which order: read off the engine's dispatch of the tokens' own numbers.

        Args:
            device: where to dispatch.

        Raises:
            InvalidValueError: a dispatch that loses tokens, or gives one to two ranks.
        """
        if self._group.size == 1:
            return contiguous(table([0, self._num_tokens], 1)[:, 0], 1)
        numbers = torch.arange(self._length, device=device)
        own = self._package.dispatch(x=numbers, key=self.first, pad_value=-1)
        everyone = collectives.all_gather(own, self._group.name).view(self._group.size, -1).cpu().numpy()
        spans = [_spans(np.where(tokens < self._num_tokens, tokens, -1)) for tokens in everyone]
        return Layout("magi", self._num_tokens, spans, num_local_tokens=everyone.shape[1])

    def key(self, name: Hashable, slices: Table, heads: Heads) -> Any:
        """The key of a mask over these rows, made with the first call that asks for it.

        Args:
            name: what tells the mask from others; None for that of the first key.
            slices: who sees whom.
            heads: query heads, key heads and head dim.
        """
        first = self.first
        if name is None and heads == (first.num_heads_q, first.num_heads_kv, first.head_dim):
            return first
        if (name, heads) not in self._made:
            self._made[name, heads] = self._package.further_key(
                **_mask(self._package, slices), key_for_dispatch=first, **_named(heads)
            )
        return self._made[name, heads]


def _named(heads: Heads) -> dict[str, int]:
    return dict(zip(("num_heads_q", "num_heads_kv", "head_dim"), heads, strict=True))


def _mask(package: MagiPackage, slices: Table) -> dict[str, Any]:
    """Slices as the package takes them, in lists of their own: it keeps them, and adds its pads.

    It fails on a mask under which nobody sees anything. There token 0 sees itself, and what comes of it is dropped.
    """
    rows = (slices if len(slices) else table([0, 1, 0, 1, 0], 5)).tolist()
    return {
        "q_ranges": package.ranges([row[Q0 : Q1 + 1] for row in rows]),
        "k_ranges": package.ranges([row[K0:KIND] for row in rows]),
        "attn_mask_type": [KINDS[row[KIND]] for row in rows],
    }


def _spans(tokens: Table) -> Table:
    """Spans ``(start, length, 1, local)`` by start, from the token of each local row; below 0 in pad rows."""
    rows = np.flatnonzero(tokens >= 0)
    held = tokens[rows]
    opens = np.ones(len(held), dtype=bool)
    opens[1:] = (np.diff(held) != 1) | (np.diff(rows) != 1)
    first = np.flatnonzero(opens)
    lengths = np.diff(np.append(first, len(held)))
    spans: Table = np.stack([held[first], lengths, np.ones_like(first), rows[first]], axis=1).astype(np.int64)
    return spans[np.argsort(spans[:, 0], kind="stable")]
