"""A packed batch whose tables stay where they are, so that a CUDA graph captured over it serves other packings."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cphandler.attention.capture import CAPTURED
from cphandler.attention.fixed import FixedAttention, Limits
from cphandler.comm.membership import members, transports
from cphandler.errors import InvalidTypeError, InvalidValueError, UnsupportedError
from cphandler.handler.contract import ContextParallelHandler, FreqsMode, check_stream
from cphandler.handler.layout_handler import LayoutHandler
from cphandler.kernels.buffer import Array, Buffer
from cphandler.tokens.counts import checked_count, checked_flag
from cphandler.tokens.intervals import Table
from cphandler.tokens.masks import Mask, make_mask

ASK_OUTSIDE = "leave it out of the graph, or make another CapturedBatch and capture it too"


class CapturedBatch:
    """One packing after another in the same memory: what a CUDA graph was captured over is replayed for all of them.

    ::

        batch = CapturedBatch(handler, max_documents=64)
        step(batch.handler)                                  # to warm up, as torch asks
        with torch.cuda.graph(graph):
            step(batch.handler)                              # forward and backward
        batch.load(next_handler)                             # another packing of as many tokens
        tokens.copy_(next_tokens)
        graph.replay()

    For one rank (``local``), Ulysses and ``all_gather``, whose messages have the shape of the batch, over the flash
    kernels of torch and of the flash-attn packages. The graph holds one launch for each window of a mask, whatever the
    documents; what a packing is goes into one buffer, by one copy.

    :attr:`handler` is what the model takes: ``core_attn`` under the masks that were named, ``rope``,
    ``get_emb_on_this_cp_rank``, ``get_rotary_seq_len`` (the same for all packings), ``position_ids`` and ``valid_mask``
    are of the batch that was loaded last, in a replay too. With several ranks ``dispatch`` and ``combine``, and
    ``roll_tensor`` with any, are for outside of the capture, where they are that batch's as well.

    Every rank of the group makes this object, and loads, at the same places of its program: ranks compare what they
    hold there, by the handler's own :meth:`agree`, since a graph has no room for it.

    Args:
        handler: the first packing, of ``qkv_format="thd"``.
        max_documents: that hold tokens, in any packing.
        max_seqlen: the longest document of any packing, padding included; None for all tokens. A tight bound saves
            empty blocks of threads.
        padding: whether packings may have tokens that are none: padded documents, a tail. None: where the first has
            some. Rows are then gathered for the kernel and put back, which costs a copy of each tensor.
        masks: further masks that single calls may name.
        device: where the model computes; None for the current CUDA device, and without one for the handler's.

    Raises:
        InvalidTypeError: no handler, or arguments of another type.
        InvalidValueError: a packing beyond its own limits.
        UnsupportedError: a handler, mask or layout that follows from the packing in more than tables.
    """

    def __init__(
        self,
        handler: ContextParallelHandler,
        *,
        max_documents: int,
        max_seqlen: int | None = None,
        padding: bool | None = None,
        masks: tuple[str | Mask, ...] = (),
        device: torch.device | str | None = None,
    ) -> None:
        handler = _of_layout(handler)
        try:
            self._first = handler
            self.device = _device(handler, device)
            _check_first(handler, self.device)
            documents = handler.documents
            self.max_documents = checked_count("max_documents", max_documents, least=1)
            longest = documents.num_tokens if max_seqlen is None else checked_count("max_seqlen", max_seqlen, least=1)
            self.max_seqlen = min(longest, documents.num_tokens)
            gathers = bool(handler.attention.exchange) and handler.cp_size > 1
            padded = documents.has_padding if padding is None else checked_flag("padding", padding)
            self.padding = padded or gathers
            limits = Limits(self.max_documents, self.max_seqlen, self.padding)
            self._attention = FixedAttention(handler.attention, _masks(handler, masks), limits)
            self._rotary = max(self.max_seqlen, handler.get_rotary_seq_len())
            self._positions = _positions(handler).shape
            tables = self._tables(handler)
        except Exception as error:
            handler.agree("CapturedBatch", error)
            raise
        handler.agree("CapturedBatch")
        self._buffer = Buffer(tables, self.device)
        views = iter(self._buffer.views)
        facts = Facts(self._rotary, *(next(views) for _ in range(3)))
        self._attention.take(views, self.device)
        self.handler = _captured(handler, facts, self._attention, self.device)
        """What the model takes, inside the capture and outside."""

    @property
    def masks(self) -> tuple[Mask, ...]:
        """What calls of ``core_attn`` may be under; the handler's own first."""
        return self._attention.masks

    @property
    def nbytes(self) -> int:
        """Bytes of the tables, which one :meth:`load` copies."""
        return self._buffer.nbytes

    def load(self, handler: ContextParallelHandler) -> None:
        """Write another packing where the graph finds it: the next replay, and calls outside of it, are of that one.

        The copy goes to the current stream, after what was launched there; load where the graph is replayed. What is
        refused leaves the packing that was there.

        Args:
            handler: of as many tokens, of the same class, group, mask and settings as the first; made anew for every
                batch, as ever.

        Raises:
            InvalidTypeError: no such handler.
            InvalidValueError: a batch that the graph was not captured for, by what differs.
            RankMismatchError: ranks load different batches, or another rank refused.
        """
        handler = _of_layout(handler)
        try:
            self._check(handler)
            tables = self._tables(handler)
        except Exception as error:
            handler.agree("CapturedBatch.load", error)
            raise
        handler.agree("CapturedBatch.load")
        self._buffer.write(tables)
        _tell(self.handler, handler)

    def _tables(self, handler: LayoutHandler) -> list[Array]:
        self._check_limits(handler)
        shard = handler.shards.queries
        rows: list[Array] = [_positions(handler), np.maximum(shard.tokens, 0), np.asarray(shard.valid)]
        return [*rows, *self._attention.tables(handler.attention)]

    def _check(self, handler: LayoutHandler) -> None:
        """Refuse a batch of another kind than the first.

        Raises:
            InvalidValueError: what differs, by name.
        """
        first = self._first
        pairs = {
            "backend": (type(first).__name__, type(handler).__name__, type(first) is type(handler)),
            "group": _alike(_seat(first), _seat(handler)),
            "format": (first.qkv_format, handler.qkv_format, first.qkv_format == handler.qkv_format),
            "streams": ("self attention", "cross attention", not handler.is_cross_attention),
            "config": (first.config, handler.config, first.config == handler.config),
            "mask": (first.mask, handler.mask, type(first.mask) is type(handler.mask) and first.mask == handler.mask),
            "tokens": _alike(first.documents.num_tokens, handler.documents.num_tokens),
            "rows of a rank": _alike(first.num_local_tokens, handler.num_local_tokens),
            "layout": _alike(first.layout.name, handler.layout.name),
            "device": (self.device, handler.device, handler.device.type != CAPTURED or handler.device == self.device),
        }
        for name, (own, got, fits) in pairs.items():
            if not fits:
                raise InvalidValueError(
                    f"a CapturedBatch takes packings like its first, and this one differs by its {name}",
                    got=f"{got} after {own}",
                    fix=ASK_OUTSIDE,
                )

    def _check_limits(self, handler: LayoutHandler) -> None:
        """Refuse a packing beyond the room that there is.

        Raises:
            InvalidValueError: which limit, by name.
        """
        documents, rotary = handler.documents, handler.get_rotary_seq_len()
        beyond = {
            "max_documents": (len(documents.runs), self.max_documents),
            "max_seqlen": (documents.max_length, self.max_seqlen),
            "padding": (documents.num_tokens - documents.num_valid_tokens, documents.num_tokens * self.padding),
            "positions": (rotary, self._rotary),
        }
        for name, (number, most) in beyond.items():
            if number > most:
                raise InvalidValueError(
                    f"a packing is beyond what its CapturedBatch has room for: {name}",
                    got=f"{number}, at most {most}",
                    fix=f"make CapturedBatch with a larger {name}, and capture again"
                    if name.startswith("max")
                    else "make CapturedBatch of a packing that has as much, or with padding=True, and capture again",
                )
        shape = _positions(handler).shape
        if shape != self._positions:
            raise InvalidValueError(
                "a packing has positions of another shape than the first of its CapturedBatch",
                got=f"{list(shape)} after {list(self._positions)}",
                fix="name position_ids for all packings or for none",
            )


class Facts(NamedTuple):
    """What a handler tells of its rows, on a device.

    Attributes:
        rotary: rows that a rope table needs for any packing.
        positions: ``[..., L]`` position of each local row.
        tokens: ``[L]`` token of each local row in the packed stream, 0 for a pad row.
        valid: ``[L]`` whether a row holds a real token.
    """

    rotary: int
    positions: Tensor
    tokens: Tensor
    valid: Tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> Facts:
        """Itself: the tables are the graph's, whoever holds them."""
        return self


class CapturedHandler(LayoutHandler):
    """The handler of a :class:`CapturedBatch`: of its first packing's class, over tables that stay in place."""

    facts: Facts

    def get_rotary_seq_len(self, *, freqs_mode: FreqsMode = "per_document", stream: str = "q") -> int:
        """Rows that a rope table needs for any packing; see :meth:`ContextParallelHandler.get_rotary_seq_len`."""
        needed = super().get_rotary_seq_len(freqs_mode=freqs_mode, stream=stream)
        return self.facts.rotary if freqs_mode == "per_document" else needed

    def plan(self, mask: str | Mask | None = None) -> None:
        """Nothing is left to plan: see :meth:`CapturedBatch.load`."""
        if mask is not None:
            make_mask(mask)

    @property
    def valid_mask(self) -> Tensor:
        """``[L]`` bool: True for a real token of the batch loaded last; the caller's copy."""
        return self.facts.valid.clone()

    @property
    def kv_valid_mask(self) -> Tensor:
        """As :attr:`valid_mask`: there is one stream."""
        return self.facts.valid.clone()

    def _positions_on(self, device: torch.device, stream: str) -> Tensor:
        return self._here(self.facts.positions, device, stream)

    def _table_rows(self, freqs_mode: FreqsMode, device: torch.device, stream: str) -> Tensor:
        return self._here(self.facts.tokens if freqs_mode == "packed" else self.facts.positions, device, stream)

    def _here(self, table: Tensor, device: torch.device, stream: str) -> Tensor:
        check_stream(stream)
        if device != table.device:
            raise InvalidValueError(
                "a captured batch has its positions on another device than the rope table",
                got=f"{table.device} and {device}",
                fix="move the table there, or make CapturedBatch with device= where the model is",
            )
        return table


@lru_cache
def _class(handler_cls: type[LayoutHandler]) -> type[CapturedHandler]:
    """A class and its captured handlers' ways."""
    return type(f"Captured{handler_cls.__name__}", (CapturedHandler, handler_cls), {"__module__": __name__})


def _captured(handler: LayoutHandler, facts: Facts, attention: FixedAttention, device: torch.device) -> CapturedHandler:
    """A handler of the same batch and group, which has its tables from elsewhere."""
    made: Any = copy.deepcopy(handler)
    made.__class__ = _class(type(handler))
    made.facts, made.device, made.attention.fixed = facts, device, attention
    captured: CapturedHandler = made
    return captured


def _tell(captured: CapturedHandler, handler: LayoutHandler) -> None:
    """Let a handler be another batch's where it answers from the host."""
    captured.queries, captured.keys, captured.shards = handler.queries, handler.keys, handler.shards
    captured._named_positions = handler._named_positions
    captured.__dict__.pop("global_positions", None)
    captured._local_positions = {}


def _positions(handler: LayoutHandler) -> Table:
    """``[..., L]`` position of each local row, 0 for a pad row."""
    shard, own = handler.shards.queries, handler.global_positions
    if own is None:
        return np.asarray(shard.positions)
    local: Table = np.where(shard.tokens >= 0, own[..., np.maximum(shard.tokens, 0)], 0)
    return local


def _seat(handler: LayoutHandler) -> str:
    ranks = handler.ranks
    return f"rank {ranks.rank} of {ranks.size} {ranks.name}".rstrip()


def _alike(own: object, got: object) -> tuple[object, object, bool]:
    return own, got, own == got


def _masks(handler: LayoutHandler, masks: object) -> tuple[Mask, ...]:
    if not isinstance(masks, (tuple, list)):
        raise InvalidTypeError("masks must be a tuple", got=repr(masks), fix='pass ("full", SlidingWindow(128)), say')
    return (handler.mask, *map(make_mask, masks))


def _device(handler: LayoutHandler, device: torch.device | str | None) -> torch.device:
    if device is None:
        usable = torch.cuda.is_available() and handler.device.type == "cpu"
        return torch.device(CAPTURED, torch.cuda.current_device()) if usable else handler.device
    try:
        named: torch.device = torch.device(device)
        torch.empty(0, device=named)
    except (RuntimeError, TypeError, ValueError, OverflowError, AssertionError) as error:
        raise InvalidValueError(
            "device must be one that is here", got=repr(device), fix='pass torch.device("cuda"), say, or None'
        ) from error
    if named.type == CAPTURED and named.index is None:
        return torch.device(CAPTURED, torch.cuda.current_device())
    return named


def _of_layout(handler: object) -> LayoutHandler:
    if not isinstance(handler, LayoutHandler):
        raise InvalidTypeError(
            "a CapturedBatch takes handlers of the library's layouts",
            got=handler.__name__ if isinstance(handler, type) else type(handler).__name__,
            fix="make one for each packing: get_cp_handler_cls(...)(qkv_format='thd', cu_seqlens_q=..., ...)",
        )
    return handler


def _check_first(handler: LayoutHandler, device: torch.device) -> None:
    """Refuse what no packing of it could be captured for.

    Raises:
        InvalidValueError: no tokens.
        UnsupportedError: dense or crossing batches, checks before each call, messages that pass through the host.
    """
    name = type(handler).__name__
    if handler.qkv_format != "thd" or handler.is_cross_attention:
        raise UnsupportedError(
            f"{name}: a CapturedBatch is of one packed stream",
            got=f"{handler.qkv_format}{', cross attention' if handler.is_cross_attention else ''}",
            fix="capture the handler of a dense batch without padding as it is; pack other ones, qkv_format='thd'",
        )
    if handler.documents.num_tokens == 0:
        raise InvalidValueError("a batch without tokens leaves nothing to capture", got="0 tokens", fix="pass some")
    if handler.config.check_consistency == "each_call":
        raise UnsupportedError(
            f"{name}: no CUDA graph can hold a check before each call",
            got="check_consistency='each_call'",
            fix="use 'always', by which ranks compare each batch when it is loaded",
        )
    if handler.cp_size > 1 and device.type == CAPTURED:
        served = transports(members(handler.ranks.name).group).get(device.type)
        if served != "nccl":
            raise UnsupportedError(
                f"{name}: messages that pass through the host cannot be captured",
                got=f"a group whose transport for {device.type} is {served}",
                fix="make the group with NCCL",
            )
