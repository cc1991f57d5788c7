"""Everything but attention, from which rank holds which tokens: dispatch, combine, rope, rolls, and the facts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from cphandler.comm.consistency import Agreement, digest, kind_of, shortened, shown
from cphandler.errors import InvalidTypeError, InvalidValueError, UnsupportedError
from cphandler.handler.capabilities import Capabilities
from cphandler.handler.contract import ContextParallelHandler, FreqsMode, LayoutSource, check_stream
from cphandler.layouts.layout import LAYOUTS, Layout
from cphandler.layouts.placement import place
from cphandler.sharding.dispatch import GradMode, as_movable, combine_rows, dispatch_rows, filler, restored
from cphandler.sharding.order import SequenceOrder
from cphandler.sharding.roll import RollRoute, roll, roll_route
from cphandler.sharding.rope import Freqs, rotate
from cphandler.sharding.shard import Fragments, Stream, StreamPair
from cphandler.tokens.masks import Mask
from cphandler.tokens.metadata import StreamMetadata
from cphandler.tracing import eager, keep_out_of_graphs

T = TypeVar("T")


class RowsHandler(ContextParallelHandler):
    """Derives ``dispatch``, ``combine``, ``rope`` and ``roll_tensor`` from a layout; knows nothing of attention."""

    default_layout: ClassVar[str] = "zigzag"
    """The layout where the caller names none."""

    capabilities: ClassVar[Capabilities] = Capabilities()
    """What this class serves."""

    def prepare(self, layout: LayoutSource) -> None:
        """Cut the documents by the layout.

        Raises:
            InvalidTypeError: neither a name nor a Layout.
            InvalidValueError: an unknown name, a Layout of another batch, or a mask that does not fit the documents.
            UnsupportedError: a layout or a setting this class does not serve.
        """
        keep_out_of_graphs()
        sources = layout if isinstance(layout, tuple) else (layout, layout)
        if len(sources) != 2 or (isinstance(layout, tuple) and not self.is_cross_attention):
            raise InvalidValueError(
                "a pair of layouts is for the query and the key stream of cross attention",
                got=repr(layout),
                fix="pass one layout; cu_seqlens_kv or max_seqlen_kv make a key stream",
            )
        asked = [self.default_layout if source is None else source for source in sources]
        layouts = place((asked[0], asked[1]), *self._metadata(), self.mask, self.cp_size, tile=self.config.tile)
        self._check_one_rank(layouts[0])
        queries = Stream(self.documents, layouts[0], self.cp_rank, self.padded_rows)
        keys = queries
        if self.is_cross_attention:
            self._check_one_rank(layouts[1])
            keys = Stream(self.kv_documents, layouts[1], self.cp_rank, self.kv_padded_rows)
            if keys.layout.replicated != queries.layout.replicated:
                raise UnsupportedError(
                    "one stream is replicated and the other is not", fix="use the replicated layout for both or none"
                )
        self._streams = {"q": queries, "kv": keys}
        self._pair = StreamPair(queries, keys)
        self._routes: dict[tuple[str, int, torch.device], RollRoute] = {}
        self._agreement = Agreement(self._group, self.config)
        self.admit()
        self.join()
        self._pair.bands(self.mask)  # a mask that does not fit the batch is refused here

    def _metadata(self) -> tuple[StreamMetadata, StreamMetadata]:
        """The query and the key stream; the same object twice for self attention."""
        queries = StreamMetadata(self.documents, self.padded_rows, self.max_seqlen_q)
        keys = queries
        if self.is_cross_attention:
            keys = StreamMetadata(self.kv_documents, self.kv_padded_rows, self.max_seqlen_kv)
        return queries, keys

    def _check_one_rank(self, layout: Layout) -> None:
        if self.cp_size == 1 and not layout.keeps_global_order:
            raise UnsupportedError(
                "one rank holds all tokens in global order", got=repr(layout), fix="pass layout=None with one rank"
            )

    def join(self) -> None:
        """Set up what a class needs beside its streams, such as groups of its own; nothing by default."""

    def admit(self) -> None:
        """Refuse the batch where this class does not serve it; called once its streams are known.

        Raises:
            UnsupportedError: what the capability table lacks.
        """
        name, table = type(self).__name__, self.capabilities
        table.require_format(name, self.qkv_format)
        asked = {
            "cross_attention": self.is_cross_attention,
            "key_padding_mask": self.kv_padded_rows is not None,
            "gradient_wire_dtype": self.config.gradient_wire_dtype is not None,
            "ulysses_degree": self.config.ulysses_degree is not None,
        }
        table.require(name, *(feature for feature, given in asked.items() if given))
        for stream in self._streams.values():
            if self.cp_size > 1 and (stream.layout.name in LAYOUTS or stream.layout.replicated):
                table.require_layout(name, "replicated" if stream.layout.replicated else stream.layout.name)

    @property
    def layout(self) -> Layout:
        """See :attr:`ContextParallelHandler.layout`."""
        return self._streams["q"].layout

    @property
    def kv_layout(self) -> Layout:
        """See :attr:`ContextParallelHandler.kv_layout`."""
        return self._streams["kv"].layout

    @property
    def position_ids(self) -> Tensor:
        """See :attr:`ContextParallelHandler.position_ids`."""
        return self._streams["q"].tensor("positions", self.device)

    @property
    def kv_position_ids(self) -> Tensor:
        """See :attr:`ContextParallelHandler.kv_position_ids`."""
        return self._streams["kv"].tensor("positions", self.device)

    @property
    def valid_mask(self) -> Tensor:
        """See :attr:`ContextParallelHandler.valid_mask`."""
        return self._streams["q"].tensor("valid", self.device)

    @property
    def kv_valid_mask(self) -> Tensor:
        """See :attr:`ContextParallelHandler.kv_valid_mask`."""
        return self._streams["kv"].tensor("valid", self.device)

    @property
    def num_local_tokens(self) -> int:
        """See :attr:`ContextParallelHandler.num_local_tokens`."""
        return self.layout.num_local_tokens

    @property
    def kv_num_local_tokens(self) -> int:
        """See :attr:`ContextParallelHandler.kv_num_local_tokens`."""
        return self.kv_layout.num_local_tokens

    @property
    def sequence_sharded(self) -> bool:
        """False under the replicated layout."""
        return self.cp_size > 1 and not self.layout.replicated

    @property
    def fragments(self) -> Fragments:
        """See :attr:`ContextParallelHandler.fragments`."""
        return self._streams["q"].fragments

    @property
    def kv_fragments(self) -> Fragments:
        """See :attr:`ContextParallelHandler.kv_fragments`."""
        return self._streams["kv"].fragments

    @eager
    def _table_rows(self, freqs_mode: FreqsMode, device: torch.device, stream: str) -> Tensor:
        name = "positions" if freqs_mode == "per_document" else "tokens"
        return self._streams[stream].tensor(name, device).clamp(min=0)

    @eager
    def sequence_order(self, device: torch.device, stream: str = "q") -> SequenceOrder:
        """How rows of all ranks and global tokens correspond, for a reshard."""
        return self._streams[stream].order(device)

    @eager
    def pad_rows(self, device: torch.device) -> Tensor:
        """``[L]`` bool: True for a local row of the queries that holds no token at all."""
        return self._streams["q"].tensor("tokens", device) < 0

    def agree(self, call: str = "agree", error: Exception | None = None) -> None:
        """Check that all ranks of the group hold this batch; does nothing after the first time.

        Every method that communicates does this by itself. Called early, it moves the check to a convenient place.

        Args:
            call: what this rank is about to do, in words that must be the same on all ranks.
            error: what this rank is about to raise; it then only tells the others.

        Raises:
            RankMismatchError: the ranks' batches differ, or another rank raised; on every rank alike.
        """
        if self._agreement.pending:
            self._agreement.settle(self._facts(call), error)

    def _facts(self, call: str) -> dict[str, str]:
        facts = {"call": call, "handler": f"{type(self).__name__}({self.qkv_format})"}
        for name, stream in self._streams.items():
            if name == "kv" and not self.is_cross_attention:
                break
            validity, layout = stream.validity, stream.layout
            of = "" if name == "q" else " of keys"
            facts |= {
                f"documents{of}": str(stream.documents.num_documents),
                f"cu_seqlens_{name}": shown(stream.documents.offsets),
                f"valid tokens{of}": f"{validity.num_valid_tokens} in runs {shown(validity.runs, 4)}",
                f"layout{of}": f"{layout.name} {digest(np.concatenate(layout.spans).tobytes())}",
            }
        facts["mask"] = self._shown_mask(self.mask)
        facts["config"] = repr(self.config.model_dump(exclude={"timeout"}))
        return facts

    def _shown_mask(self, mask: Mask) -> str:
        """A mask by its bands, which say all that matters, and by name; a caller's class may print an address."""
        name = repr(mask) if is_dataclass(mask) else type(mask).__name__
        return f"{shortened(name, 60)} {digest(self._pair.bands(mask).tobytes())}"

    def _agreed(self, method: str, check: Callable[[], T], describe: Callable[[T], str]) -> T:
        """Run a check; on the first exchange, let every rank know whether it passed and whether all make one call."""
        try:
            result = check()
        except Exception as error:
            self.agree(method, error)
            raise
        if self._agreement.pending:
            self.agree(f"{method} {describe(result)}")
        return result

    @eager
    def dispatch(self, tensor: Tensor, seq_dim: int, *, pad_value: float = 0, stream: str = "q") -> Tensor:
        """See :meth:`ContextParallelHandler.dispatch`."""

        def check() -> int:
            dim = self._checked_dim("dispatch", tensor, seq_dim, stream, local=False)
            filler(pad_value, tensor)
            return dim

        returns = (
            self.sequence_sharded and isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled()
        )
        dim = self._agreed("dispatch", check, lambda dim: f"dim {dim} of {kind_of(tensor)}") if returns else check()
        if not self.sequence_sharded:
            return tensor
        return dispatch_rows(tensor, dim, self._streams[stream], pad_value, self._group.name)

    @eager
    def combine(self, tensor: Tensor, seq_dim: int, *, grad: GradMode = "replicated", stream: str = "q") -> Tensor:
        """See :meth:`ContextParallelHandler.combine`."""

        def check() -> int:
            if grad not in ("replicated", "sum", "scaled"):
                raise InvalidValueError("unknown grad", got=repr(grad), fix="choose replicated, sum or scaled")
            return self._checked_dim("combine", tensor, seq_dim, stream, local=True)

        if not self.sequence_sharded:
            check()
            return tensor
        dim = self._agreed("combine", check, lambda dim: f"dim {dim} of {kind_of(tensor)}, grad {grad}")
        return combine_rows(tensor, dim, self._streams[stream], grad, self._group.name)

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
        return rotate(tensor, freqs, seq_dim=self.seq_dim, interleaved=interleaved, mscale=mscale, inverse=inverse)

    def _checked_dim(self, method: str, tensor: Any, seq_dim: Any, stream: str, *, local: bool) -> int:
        check_stream(stream)
        layout = self._streams[stream].layout
        rows = layout.num_local_tokens if local else layout.num_tokens
        if not isinstance(tensor, Tensor) or isinstance(seq_dim, (bool, Tensor)) or not isinstance(seq_dim, int):
            raise InvalidTypeError(
                f"{method} takes the tensor first, then the sequence dim",
                got=f"{type(tensor).__name__}, {type(seq_dim).__name__}",
                fix=f"call {method}(tensor, seq_dim); Megatron's proposal has them the other way round",
            )
        if not -tensor.dim() <= seq_dim < tensor.dim():
            raise InvalidValueError(f"{method}: the tensor has no dim {seq_dim}", got=f"shape {list(tensor.shape)}")
        dim = seq_dim % tensor.dim()
        if tensor.shape[dim] != rows:
            raise InvalidValueError(
                f"{method} expects {rows} rows in dim {dim}",
                got=f"shape {list(tensor.shape)}",
                fix=self.explain_length(tensor.shape[dim], rows, stream),
            )
        return dim

    @eager
    def roll_tensor(
        self,
        tensor: Tensor | None,
        shifts: int = -1,
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
            if isinstance(shifts, bool) or not isinstance(shifts, int):
                raise InvalidTypeError("shifts must be an int", got=repr(shifts))
            filler(fill_value, tensor)
            dim = self._checked_dim("roll_tensor", tensor, dims, stream, local=True)
            self._check_rows_of_batch(tensor, dim, stream)
            return dim

        def describe(dim: int) -> str:
            return f"by {shifts} in dim {dim} of {kind_of(tensor)}"

        dim = self._agreed("roll_tensor", check, describe) if self.sequence_sharded else check()
        rolled = roll(tensor, dim, self._route(stream, shifts, tensor.device), fill_value, self._group.name)
        if self._streams[stream].padded_rows is not None:
            valid = self._streams[stream].shifted_validity(shifts, rolled.device)
            rolled = _cleared(rolled, dim, valid, fill_value)
        return rolled, rolled.sum() if return_sum else None

    def _route(self, stream: str, shifts: int, device: torch.device) -> RollRoute:
        key = stream, shifts, device
        if key not in self._routes:
            self._routes[key] = roll_route(self._streams[stream], shifts, device)
        return self._routes[key]

    def _check_rows_of_batch(self, tensor: Tensor, dim: int, stream: str) -> None:
        """With padding, what is real differs from row to row of the batch: the batch dim must be known."""
        copies = self._streams[stream].copies
        if self._streams[stream].padded_rows is not None and (
            tensor.dim() < 2 or dim > 1 or tensor.shape[1 - dim] != copies
        ):
            raise InvalidValueError(
                "with a key-padding mask, roll_tensor needs the batch and the sequence as the first two dims",
                got=f"shape {list(tensor.shape)} with the sequence in dim {dim}",
                fix=f"pass [B, L, ...] or [L, B, ...] with B = {copies}",
            )


def _cleared(rolled: Tensor, dim: int, valid: Tensor, fill_value: float) -> Tensor:
    """Fill where the row, or the row it came from, is padding in that row of the batch."""
    keep = valid if dim == 1 else valid.T
    keep = keep.reshape(*keep.shape, *[1] * (rolled.dim() - 2))
    fill = as_movable(filler(fill_value, rolled))
    return restored(as_movable(rolled).masked_fill(~keep, fill), rolled.dtype)
