"""A handler from a layout: the contract follows from which rank holds which tokens; attention is a part of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import is_dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, get_args

import torch
from torch import Tensor

from cphandler.attention.attention import Attention
from cphandler.attention.capabilities import Capabilities
from cphandler.attention.capture import CAPTURED, check_facts, is_capturing
from cphandler.attention.options import OptionalArguments
from cphandler.attention.plans import take_ahead
from cphandler.comm.consistency import Consistency, digest, kind_of, shortened, shown
from cphandler.errors import InvalidTypeError, InvalidValueError, UnsupportedError
from cphandler.handler.contract import AskedLayout, ContextParallelHandler, FreqsMode, check_stream
from cphandler.handler.explanation import Algorithm
from cphandler.layouts.layout import Layout
from cphandler.layouts.placement import LayoutSpec
from cphandler.plan.batch_plan import BatchPlan
from cphandler.sharding.cache import Seat, cut_batch
from cphandler.sharding.dispatch import DispatchGrad, GradMode, combine_rows, dispatch_rows, filler
from cphandler.sharding.roll import RollRoute, checked_shifts, cleared, roll, roll_route, summed
from cphandler.sharding.rope import Freqs, rotate
from cphandler.sharding.shard import Shard, ShardPair
from cphandler.tensors import check_no_tangent, check_plain, where_rows_are
from cphandler.tokens.counts import checked_flag
from cphandler.tokens.documents import Documents
from cphandler.tokens.masks import Mask, make_mask
from cphandler.tracing import untraced

if TYPE_CHECKING:
    from typing_extensions import Unpack

T = TypeVar("T")


class LayoutMaker(Protocol):
    """A layout from a stream's documents and the number of ranks."""

    def __call__(self, documents: Documents, cp_size: int, /) -> Layout:
        """Which rank holds which tokens."""


class LayoutHandler(ContextParallelHandler):
    """Derives the contract from a layout; a backend says how attention reaches its keys, and what it serves.

    Arguments are those of :class:`ContextParallelHandler`. A subclass sets ``comm_type``, ``default_layout``,
    ``capabilities``, and either ``exchange``, where attention is the library's loop over an exchange, or
    ``attention_cls``, an :class:`Attention` of its own. It may override ``core_attn`` altogether; it then cannot be one
    of several in a list of comm types.
    """

    default_layout: ClassVar[str] = "zigzag"
    """The layout where the caller names none."""

    capabilities: ClassVar[Capabilities] = Capabilities()
    """What this class serves."""

    exchange: ClassVar[str] = ""
    """Name of the exchange that brings keys to the queries; empty where attention brings whole documents."""

    attention_cls: ClassVar[type[Attention]] = Attention
    """The algorithm."""

    own_layout: ClassVar[LayoutMaker | None] = None
    """What makes the layout, a static method, where the class brings its own; None: the caller chooses."""

    def prepare(self, layout: AskedLayout) -> None:
        """Cut the documents by the layout, and set up attention; what was made for an equal batch is found again.

        Raises:
            InvalidTypeError: neither a name, a Layout nor a BatchPlan.
            InvalidValueError: an unknown name, a Layout or BatchPlan of another batch, or a mask that does not fit the
                documents.
            UnsupportedError: a layout or a setting this class does not serve.
        """
        layout = self._chosen(layout)
        planned = layout if isinstance(layout, BatchPlan) else None
        if isinstance(layout, BatchPlan):
            self._check_planned(layout)
            layout = layout.layout
        self.shards = self._shards(layout)
        if planned is not None:
            take_ahead(self.shards, planned, self.cp_rank)
        self._consistency = Consistency(self.ranks, self.config)
        self.attention = self.make_attention()
        self.shards.visible_bands(self.mask)  # a mask that does not fit the batch is refused here

    def _chosen(self, layout: AskedLayout) -> AskedLayout:
        """What was asked for, or what the class brings.

        Raises:
            UnsupportedError: both.
        """
        if self.own_layout is None:
            return layout
        queries, keys = (self.own_layout(stream.documents, self.cp_size) for stream in (self.queries, self.keys))
        if layout is not None:
            raise UnsupportedError(
                f"{type(self).__name__} brings its own layout", got=f"layout {layout!r}", fix="pass layout=None"
            )
        return (queries, keys) if self.is_cross_attention else queries

    def _check_planned(self, planned: BatchPlan) -> None:
        """Refuse what was planned for another batch.

        Raises:
            InvalidValueError: other documents, padding or ranks; cross attention, or padded rows, which no plan has.
        """
        has = "cross attention" if self.is_cross_attention else "rows with padding or masks of their own"
        if self.is_cross_attention or self.queries.padded_rows is not None:
            raise InvalidValueError(
                f"a BatchPlan is of one packed stream, and this batch has {has}",
                got="a BatchPlan as layout=",
                fix="pass its layout alone, layout=plan.layout, or leave layout out: what was planned once is kept",
            )
        planned.check_fits(self.queries.documents, self.cp_size)

    def _shards(self, layout: LayoutSpec | tuple[LayoutSpec, LayoutSpec] | None) -> ShardPair:
        """This rank's shards of the two streams; the same object twice in self attention."""
        specs = layout if isinstance(layout, tuple) else (layout, layout)
        if len(specs) != 2 or (isinstance(layout, tuple) and not self.is_cross_attention):
            raise InvalidValueError(
                "a pair of layouts is for the query and the key stream of cross attention",
                got=repr(layout),
                fix="pass one layout; cu_seqlens_kv or max_seqlen_kv make a key stream",
            )
        first, second = (self.default_layout if spec is None else spec for spec in specs)
        seat = Seat(self.cp_size, self.cp_rank, self.device, self.config.tile, self.config.kernel_cost)
        batch = cut_batch((first, second), self.queries, self.keys, self.mask, seat)
        for shard in (batch.queries, batch.keys):
            self._check_one_rank(shard.layout)
        if batch.queries.layout.replicated != batch.keys.layout.replicated:
            raise UnsupportedError(
                "one stream is replicated and the other is not", fix="use the replicated layout for both or none"
            )
        return ShardPair(*batch)

    def _check_one_rank(self, layout: Layout) -> None:
        if self.cp_size == 1 and not layout.keeps_global_order:
            raise UnsupportedError(
                "one rank holds all tokens in global order", got=repr(layout), fix="pass layout=None with one rank"
            )

    def make_attention(self) -> Attention:
        """The algorithm over this handler's shards."""
        return self.attention_over(self)

    @classmethod
    def attention_over(cls, host: LayoutHandler, *, served_elsewhere: frozenset[str] = frozenset()) -> Attention:
        """This class's algorithm over a handler's shards: its own, or one that has another algorithm in each layer.

        Args:
            host: the handler.
            served_elsewhere: features whose settings are meant for other layers, so that they are not refused.

        Raises:
            UnsupportedError: what the class does not serve.
        """
        table = replace(cls.capabilities, features=cls.capabilities.features | served_elsewhere)
        return cls.attention_cls(host, cls.__name__, table, cls.exchange)

    @property
    def algorithm(self) -> str:
        """How this handler computes attention, the same on every rank that computes it in the same way."""
        return type(self).__name__

    def _algorithm(self) -> Algorithm:
        layouts = dict.fromkeys(shard.layout.name for shard in (self.shards.queries, self.shards.keys))
        parts = self.attention.parts
        exchanges = dict.fromkeys(part.exchange for part in parts) if self.cp_size > 1 else {"": None}
        has_own = type(self).core_attn is not LayoutHandler.core_attn
        engine = type(self).__name__ if has_own else ", ".join(dict.fromkeys(part.engine for part in parts))
        shown = ", ".join(name or "none" for name in exchanges)
        return Algorithm(self.algorithm, self.comm_type, self.cp_size, ", ".join(layouts), shown, engine)

    def core_attn(
        self, attn_mod: Any, query: Tensor, key: Tensor, value: Tensor, **options: Unpack[OptionalArguments]
    ) -> Any:
        """See :meth:`ContextParallelHandler.core_attn`."""
        return self.attention(attn_mod, (query, key, value), options)

    @untraced
    def plan(self, mask: str | Mask | None = None) -> None:
        """See :meth:`ContextParallelHandler.plan`."""
        self.attention.plan(self.mask if mask is None else make_mask(mask))

    def watched(self, x: Tensor) -> Tensor:
        """``x`` itself, whose backward pass is a call that ranks make alike; see :meth:`Consistency.watched`."""
        return self._consistency.watched(x)

    def _shared_with_copies(self) -> list[object]:
        layouts = self.shards.queries.layout, self.shards.keys.layout
        return [*super()._shared_with_copies(), self.shards, *layouts]

    def shard(self, stream: str = "q") -> Shard:
        """See :meth:`ContextParallelHandler.shard`."""
        check_stream(stream)
        return self.shards[stream]

    @property
    def sequence_sharded(self) -> bool:
        """False under the replicated layout."""
        return self.cp_size > 1 and not self.layout.replicated

    def _check_capture(self, method: str, device: torch.device, *, served: bool = False) -> None:
        """Refuse to have one packing's rows in a CUDA graph; see :func:`check_facts`."""
        if device.type == CAPTURED and is_capturing():
            padded = self.shards.keys.padded_rows is not None
            packed = self.qkv_format == "thd"
            check_facts(type(self).__name__, method, packed=packed, padded=padded, served=served)

    @untraced
    def _table_rows(self, freqs_mode: FreqsMode, device: torch.device, stream: str) -> Tensor:
        if freqs_mode == "packed":
            self._check_capture("get_emb_on_this_cp_rank", device, served=True)
            return self.shards[stream].tensor("tokens", device).clamp(min=0)
        return self._positions_on(device, stream)

    @untraced
    def _positions_on(self, device: torch.device, stream: str) -> Tensor:
        self._check_capture("position_ids", device, served=True)
        return super()._positions_on(device, stream)

    def _document_positions(self, device: torch.device, stream: str) -> Tensor:
        return self.shards[stream].tensor("positions", device)

    def agree(self, call: str = "agree", error: Exception | None = None) -> None:
        """Check that all ranks of the group hold this batch and did the same; does nothing after the first time.

        Every method that communicates does this by itself. Called early, it moves the check to a convenient place.

        Args:
            call: what this rank is about to do, in words that must be the same on all ranks.
            error: what this rank is about to raise; it then only tells the others.

        Raises:
            RankMismatchError: the ranks' batches differ, or another rank raised; on every rank alike.
            UnsupportedError: a CUDA graph is being captured.
        """
        if self._consistency.pending:
            if is_capturing():
                raise UnsupportedError(
                    "ranks compare their batches before they first exchange anything, which no CUDA graph can hold",
                    got=f"{call} while a graph is captured",
                    fix="call handler.agree() before the capture; check_consistency='each_call' allows none",
                )
            self._consistency.settle(self._facts(call), error)

    def _facts(self, call: str) -> dict[str, str]:
        facts = {"call": call, "handler": f"{self.algorithm}({self.qkv_format})"}
        for name in ("q", "kv") if self.is_cross_attention else ("q",):
            shard = self.shards[name]
            validity, layout = shard.validity, shard.layout
            of = "" if name == "q" else " of keys"
            facts |= {
                f"documents{of}": str(shard.documents.num_documents),
                f"cu_seqlens_{name}": shown(shard.documents.offsets),
                f"valid tokens{of}": f"{validity.num_valid_tokens} in runs {shown(validity.runs, 4)}",
                f"layout{of}": f"{layout.name} of {layout.num_local_tokens} rows {digest(layout.fingerprint)}",
            }
        facts["mask"] = self.shown_mask(self.mask)
        facts["positions"] = "of the documents"
        if self._named_positions is not None:  # what a mask implies, its bands say
            facts["positions"] = f"{list(self._named_positions.shape)} {shown(self._named_positions)}"
        facts["config"] = repr(self.config.model_dump(exclude={"timeout"}))
        return facts

    def shown_mask(self, mask: Mask) -> str:
        """A mask by its bands, which say all that matters, and by name; a caller's class may print an address."""

        def in_words() -> str:
            name = repr(mask) if is_dataclass(mask) else type(mask).__name__
            return f"{shortened(name, 60)} {digest(self.shards.fingerprint(mask))}"

        return self.shards.memo_of(mask).get(("shown", mask), in_words)

    def agreed(self, method: str, check: Callable[[], T], describe: Callable[[T], str]) -> T:
        """Run a check; on the first exchange, let every rank know whether it passed and whether all make one call.

        Later calls go into the group's journal; see :class:`Consistency`.
        """
        try:
            result = check()
        except Exception as error:
            self.agree(method, error)
            raise
        if self._consistency.active:
            call = f"{method} {describe(result)}"
            self.agree(call)
            self._consistency.note(call)
        return result

    @untraced
    def dispatch(
        self, tensor: Tensor, seq_dim: int, *, pad_value: float = 0, grad: DispatchGrad = "full", stream: str = "q"
    ) -> Tensor:
        """See :meth:`ContextParallelHandler.dispatch`."""

        def check() -> int:
            _check_grad("dispatch", grad, get_args(DispatchGrad))
            dim = self._checked_dim("dispatch", tensor, seq_dim, stream, local=False)
            filler(pad_value, tensor)
            return dim

        if self._gathers_gradient(tensor, grad):
            dim = self.agreed("dispatch", check, lambda dim: f"{self._dim_of(stream, dim)} of {kind_of(tensor)}")
        else:
            dim = check()
        if not self.sequence_sharded:
            return tensor
        self._check_capture("dispatch", tensor.device)
        rows = dispatch_rows(tensor, dim, self.shards[stream], pad_value, self.ranks.name, grad)
        return self._consistency.watched(rows) if self._gathers_gradient(tensor, grad) else rows

    def _dim_of(self, stream: str, dim: int) -> str:
        """A dim in words that differ from stream to stream, where there are two."""
        return f"dim {dim} of stream {stream}" if self.is_cross_attention else f"dim {dim}"

    def _gathers_gradient(self, tensor: Any, grad: str) -> bool:
        """Whether the backward pass of a cut will be an exchange."""
        differentiable = isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled()
        return self.sequence_sharded and differentiable and grad != "partial"

    @untraced
    def combine(self, tensor: Tensor, seq_dim: int, *, grad: GradMode = "replicated", stream: str = "q") -> Tensor:
        """See :meth:`ContextParallelHandler.combine`."""

        def check() -> int:
            _check_grad("combine", grad, get_args(GradMode))
            return self._checked_dim("combine", tensor, seq_dim, stream, local=True)

        if not self.sequence_sharded:
            check()
            return tensor
        self._check_capture("combine", tensor.device)
        dim = self.agreed(
            "combine", check, lambda dim: f"{self._dim_of(stream, dim)} of {kind_of(tensor)}, grad {grad}"
        )
        return self._consistency.watched(combine_rows(tensor, dim, self.shards[stream], grad, self.ranks.name))

    def rope(
        self,
        tensor: Tensor,
        freqs: Freqs,
        *,
        interleaved: bool = False,
        mscale: float = 1.0,
        inverse: bool = False,
        stream: str = "q",
    ) -> Tensor:
        """See :meth:`ContextParallelHandler.rope`."""
        check_stream(stream)
        batch_dim = None if self.qkv_format == "thd" else 1 - self.seq_dim
        pairing: dict[str, Any] = {"interleaved": interleaved, "mscale": mscale, "inverse": inverse}
        return rotate(tensor, freqs, seq_dim=self.seq_dim, batch_dim=batch_dim, **pairing)

    def _checked_dim(self, method: str, tensor: Any, seq_dim: Any, stream: str, *, local: bool) -> int:
        check_stream(stream)
        self._check_arguments(method, tensor, seq_dim)
        layout = self.shards[stream].layout
        rows = layout.num_local_tokens if local else layout.num_tokens
        if not -tensor.dim() <= seq_dim < tensor.dim():
            raise InvalidValueError(
                f"{method}: the tensor has no dim {seq_dim}",
                got=f"shape {list(tensor.shape)}",
                fix=f"pass a tensor with {rows} rows, and their dim",
            )
        dim: int = seq_dim % tensor.dim()
        if tensor.shape[dim] != rows:
            elsewhere = where_rows_are(tensor.shape, dim, rows)
            raise InvalidValueError(
                f"{method} expects {rows} rows in dim {dim}",
                got=f"shape {list(tensor.shape)}",
                fix=self.explain_length(tensor.shape[dim], rows, stream, elsewhere=elsewhere),
            )
        return dim

    def _check_arguments(self, method: str, tensor: Any, seq_dim: Any) -> None:
        """An ordinary tensor and an int, in this order; and where ranks exchange rows, no dual tensor."""
        if not isinstance(tensor, Tensor) or isinstance(seq_dim, Tensor):
            raise InvalidTypeError(
                f"{method} takes the tensor first, then the sequence dim",
                got=f"{type(tensor).__name__}, {type(seq_dim).__name__}",
                fix=f"call {method}(tensor, seq_dim), in this order"
                if isinstance(seq_dim, Tensor)
                else "make a tensor of it: torch.as_tensor(...)",
            )
        if isinstance(seq_dim, bool) or not isinstance(seq_dim, int):
            raise InvalidTypeError(f"{method}: the sequence dim must be an int", got=repr(seq_dim), fix="pass 0, say")
        check_plain(tensor, f"{method}: the tensor")
        if self.sequence_sharded:
            check_no_tangent(tensor, method)

    @untraced
    def roll_tensor(
        self,
        tensor: Tensor | None,
        shifts: int | Sequence[int] = -1,
        dims: int = -1,
        *,
        fill_value: float = 0,
        return_sum: bool = True,
        stream: str = "q",
    ) -> tuple[Tensor | None, Tensor | None]:
        """See :meth:`ContextParallelHandler.roll_tensor`."""
        if tensor is None:
            return None, None

        def check() -> int:
            checked_shifts(shifts)
            checked_flag("return_sum", return_sum)
            dim = self._checked_dim("roll_tensor", tensor, dims, stream, local=True)
            filler(fill_value, tensor)
            self._check_rows_of_batch(tensor, dim, stream)
            return dim

        def describe(dim: int) -> str:
            by = shifts if isinstance(shifts, int) else list(shifts)
            return f"by {by} in {self._dim_of(stream, dim)} of {kind_of(tensor)}"

        if isinstance(tensor, Tensor):
            self._check_capture("roll_tensor", tensor.device)
        dim = self.agreed("roll_tensor", check, describe) if self.sequence_sharded else check()
        farthest = self.shards[stream].layout.num_tokens  # from there on nothing moves
        each = tuple(max(-farthest, min(farthest, shift)) for shift in checked_shifts(shifts))
        rolled = roll(tensor, dim, self._route(stream, each, tensor.device), fill_value, self.ranks.name)
        if self.sequence_sharded:
            self._consistency.watched(rolled)
        if self.shards[stream].padded_rows is not None:
            valid = torch.stack([self.shards[stream].shifted_validity(shift, rolled.device) for shift in each])
            rolled = cleared(rolled, dim + 1, valid, fill_value)
        if isinstance(shifts, int):
            return rolled[0], summed(rolled[0]) if return_sum else None
        rolled = rolled.contiguous()
        return rolled, torch.stack([summed(one) for one in rolled.unbind()]) if return_sum else None

    def _route(self, stream: str, shifts: tuple[int, ...], device: torch.device) -> RollRoute:
        shard = self.shards[stream]
        return shard.memo.on(("roll", shifts), device, lambda: roll_route(shard, shifts, device))

    def _check_rows_of_batch(self, tensor: Tensor, dim: int, stream: str) -> None:
        """With padding, what is real differs from row to row of the batch: the batch dim must be known."""
        copies = self.shards[stream].copies
        if self.shards[stream].padded_rows is not None and (
            tensor.dim() < 2 or dim > 1 or tensor.shape[1 - dim] != copies
        ):
            raise InvalidValueError(
                "where rows of the batch differ, roll_tensor needs the batch and the sequence as the first two dims",
                got=f"shape {list(tensor.shape)} with the sequence in dim {dim}",
                fix=f"pass [B, L, ...] or [L, B, ...] with B = {copies}",
            )


def _check_grad(method: str, grad: object, known: tuple[str, ...]) -> None:
    if grad not in known:
        others = {"dispatch": "combine", "combine": "dispatch"}
        raise InvalidValueError(
            f"{method} knows no such grad",
            got=repr(grad),
            fix=f"choose {', '.join(known[:-1])} or {known[-1]}; {others[method]} has others",
        )
