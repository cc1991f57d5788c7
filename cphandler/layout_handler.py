"""A handler from a layout: everything but attention follows from which rank holds which tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from cphandler.agreement import Agreement, digest, shortened, shown
from cphandler.attention import attention
from cphandler.attention_call import AttentionCall, TensorRules, batch_first, from_batch_first, kind_of
from cphandler.core_attention import AttentionOptions, OptionalArguments
from cphandler.dispatch import GradMode, as_movable, combine_rows, dispatch_rows, filler, restored
from cphandler.errors import InvalidTypeError, InvalidValueError, UnsupportedError
from cphandler.handler import ContextParallelHandler, FreqsMode, refuse_key_stream
from cphandler.layout import Layout, contiguous, make_layout
from cphandler.mask import Mask
from cphandler.reshard import SequenceOrder
from cphandler.roll import RollRoute, roll, roll_route
from cphandler.rope import Freqs, rotate
from cphandler.stream import Fragments, Stream

T = TypeVar("T")


class LayoutHandler(ContextParallelHandler):
    """Derives ``dispatch``, ``combine``, ``rope`` and ``roll_tensor`` from a layout; a backend adds ``core_attn``.

    Arguments are those of :class:`ContextParallelHandler`. A subclass sets ``comm_type``, ``default_layout`` and, where
    its attention serves only some layouts, ``layouts``.
    """

    default_layout: ClassVar[str] = "zigzag"
    """The layout where the caller names none."""

    layouts: ClassVar[tuple[str, ...]] = ("zigzag", "contiguous", "striped")
    """Names of the layouts this class serves; layouts that callers build themselves are always tried."""

    def prepare(self, layout: str | Layout | None) -> None:
        """Cut the documents by the layout.

        Raises:
            InvalidTypeError: neither a name nor a Layout.
            InvalidValueError: an unknown name, or a Layout of another batch.
            UnsupportedError: a layout or a setting this class does not serve.
        """
        for name in ("ulysses_degree", "tile", "gradient_wire_dtype"):
            if getattr(self.config, name) is not None:
                raise UnsupportedError(f"CPConfig.{name} is not available yet", fix="leave it None")
        wanted = self.default_layout if layout is None else layout
        self._layout = make_layout(wanted, self.documents.offsets, self.cp_size)
        own = isinstance(layout, Layout) and not layout.replicated
        if self.cp_size == 1 and not self.layout.keeps_global_order:
            raise UnsupportedError(
                "one rank holds all tokens in global order", got=repr(self.layout), fix="pass layout=None with one rank"
            )
        if self.cp_size > 1 and not own and self.layout.name not in self.layouts:
            raise UnsupportedError(
                f"{type(self).__name__} does not serve the {self.layout.name!r} layout",
                fix="use the ulysses backend" if self.layout.replicated else f"use one of {', '.join(self.layouts)}",
            )
        self._stream = Stream(self.documents, self.layout, self.cp_rank, self.padded_rows)
        self._plans: dict[tuple[Mask, str], Tensor] = {}
        self._routes: dict[tuple[int, torch.device], RollRoute] = {}
        self._agreement = Agreement(self._group, self.config)
        self._stream.bands(self.mask)  # a mask that does not fit the batch is refused here

    @property
    def layout(self) -> Layout:
        """See :attr:`ContextParallelHandler.layout`."""
        return self._layout

    @property
    def position_ids(self) -> Tensor:
        """See :attr:`ContextParallelHandler.position_ids`."""
        return self._stream.tensor("positions", self.device)

    @property
    def valid_mask(self) -> Tensor:
        """See :attr:`ContextParallelHandler.valid_mask`."""
        return self._stream.tensor("valid", self.device)

    @property
    def num_local_tokens(self) -> int:
        """See :attr:`ContextParallelHandler.num_local_tokens`."""
        return self.layout.num_local_tokens

    @property
    def sequence_sharded(self) -> bool:
        """False under the replicated layout."""
        return self.cp_size > 1 and not self.layout.replicated

    @property
    def fragments(self) -> Fragments:
        """See :attr:`ContextParallelHandler.fragments`."""
        return self._stream.fragments

    def _table_rows(self, freqs_mode: FreqsMode, device: torch.device) -> Tensor:
        name = "positions" if freqs_mode == "per_document" else "tokens"
        return self._stream.tensor(name, device).clamp(min=0)

    def sequence_order(self, device: torch.device) -> SequenceOrder:
        """How rows of all ranks and global tokens correspond, for a reshard."""
        return self._stream.order(device)

    def pad_rows(self, device: torch.device) -> Tensor:
        """``[L]`` bool: True for a local row that holds no token at all."""
        return self._stream.tensor("tokens", device) < 0

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
        validity = self._stream.validity
        return {
            "call": call,
            "handler": f"{type(self).__name__}({self.qkv_format})",
            "documents": str(self.documents.num_documents),
            "cu_seqlens_q": shown(self.documents.offsets),
            "valid tokens": f"{validity.num_valid_tokens} in runs {shown(validity.runs, 4)}",
            "mask": self._shown_mask(self.mask),
            "layout": f"{self.layout.name} {digest(np.concatenate(self.layout.spans).tobytes())}",
            "config": repr(self.config.model_dump(exclude={"timeout"})),
        }

    def _shown_mask(self, mask: Mask) -> str:
        """A mask by its bands, which say all that matters, and by name; a caller's class may print an address."""
        name = repr(mask) if is_dataclass(mask) else type(mask).__name__
        return f"{shortened(name, 60)} {digest(self._stream.bands(mask).tobytes())}"

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

    def dispatch(self, tensor: Tensor, seq_dim: int, *, pad_value: float = 0, stream: str = "q") -> Tensor:
        """See :meth:`ContextParallelHandler.dispatch`."""

        def check() -> int:
            dim = self._checked_dim("dispatch", tensor, seq_dim, self.layout.num_tokens, stream)
            filler(pad_value, tensor)
            return dim

        returns = (
            self.sequence_sharded and isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled()
        )
        dim = self._agreed("dispatch", check, lambda dim: f"dim {dim} of {kind_of(tensor)}") if returns else check()
        if not self.sequence_sharded:
            return tensor
        return dispatch_rows(tensor, dim, self._stream, pad_value, self._group.name)

    def combine(self, tensor: Tensor, seq_dim: int, *, grad: GradMode = "replicated", stream: str = "q") -> Tensor:
        """See :meth:`ContextParallelHandler.combine`."""

        def check() -> int:
            if grad not in ("replicated", "sum", "scaled"):
                raise InvalidValueError("unknown grad", got=repr(grad), fix="choose replicated, sum or scaled")
            return self._checked_dim("combine", tensor, seq_dim, self.num_local_tokens, stream)

        if not self.sequence_sharded:
            check()
            return tensor
        dim = self._agreed("combine", check, lambda dim: f"dim {dim} of {kind_of(tensor)}, grad {grad}")
        return combine_rows(tensor, dim, self._stream, grad, self._group.name)

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
        refuse_key_stream(stream)
        return rotate(tensor, freqs, seq_dim=self.seq_dim, interleaved=interleaved, mscale=mscale, inverse=inverse)

    def _checked_dim(self, method: str, tensor: Any, seq_dim: Any, rows: int, stream: str) -> int:
        refuse_key_stream(stream)
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
                fix=self.explain_length(tensor.shape[dim], rows),
            )
        return dim

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
            dim = self._checked_dim("roll_tensor", tensor, dims, self.num_local_tokens, stream)
            self._check_rows_of_batch(tensor, dim)
            return dim

        def describe(dim: int) -> str:
            return f"by {shifts} in dim {dim} of {kind_of(tensor)}"

        dim = self._agreed("roll_tensor", check, describe) if self.sequence_sharded else check()
        key = shifts, tensor.device
        if key not in self._routes:
            self._routes[key] = roll_route(self._stream, shifts, tensor.device)
        rolled = roll(tensor, dim, self._routes[key], fill_value, self._group.name)
        if self.padded_rows is not None:
            rolled = self._cleared(rolled, dim, shifts, fill_value)
        return rolled, rolled.sum() if return_sum else None

    def _check_rows_of_batch(self, tensor: Tensor, dim: int) -> None:
        """With padding, what is real differs from row to row of the batch: the batch dim must be known."""
        copies = self._stream.copies
        if self.padded_rows is not None and (tensor.dim() < 2 or dim > 1 or tensor.shape[1 - dim] != copies):
            raise InvalidValueError(
                "with a key-padding mask, roll_tensor needs the batch and the sequence as the first two dims",
                got=f"shape {list(tensor.shape)} with the sequence in dim {dim}",
                fix=f"pass [B, L, ...] or [L, B, ...] with B = {copies}",
            )

    def _cleared(self, rolled: Tensor, dim: int, shift: int, fill_value: float) -> Tensor:
        """Fill where the row, or the row it came from, is padding in that row of the batch."""
        valid = self._stream.shifted_validity(shift, rolled.device)
        keep = valid if dim == 1 else valid.T
        keep = keep.reshape(*keep.shape, *[1] * (rolled.dim() - 2))
        fill = as_movable(filler(fill_value, rolled))
        return restored(as_movable(rolled).masked_fill(~keep, fill), rolled.dtype)

    def attention_call(
        self,
        attn_mod: Any,
        tensors: tuple[Tensor, Tensor, Tensor],
        options: OptionalArguments,
        *,
        exchange: str,
        check: Callable[[AttentionCall], None] | None = None,
    ) -> AttentionCall:
        """Check a ``core_attn`` call and, on the first exchange, that every rank makes the same one.

        Args:
            attn_mod: see :meth:`ContextParallelHandler.core_attn`.
            tensors: local query, key and value.
            options: keyword options.
            exchange: how keys will reach the queries: the name of an exchange, or ``"whole"`` where the algorithm
                brings whole documents to this rank and can give them to a callable.
            check: what else the backend demands.
        """
        batch = None if self.padded_rows is None else self._stream.copies
        rules = TensorRules(self.qkv_format, self.num_local_tokens, batch, self.explain_length)

        def checked() -> AttentionCall:
            settled = AttentionOptions.checked(options)
            call = AttentionCall.of(
                attn_mod,
                tensors,
                options=settled,
                rules=rules,
                mask=self.mask,
                config=self.config,
                exchange=exchange if self.cp_size > 1 or exchange == "whole" else "none",
            )
            if call.module is not None:
                self._check_module(call, settled)
            if self.layout.replicated and self.cp_size > 1:
                raise UnsupportedError(
                    "core_attn on the replicated layout is not available yet", fix="use the zigzag or contiguous layout"
                )
            if check is not None:
                check(call)
            if call.module is None:
                self._plan(call)
            return call

        return self._agreed("core_attn", checked, lambda call: f"{call.describe()}, {self._shown_mask(call.mask)}")

    def _check_module(self, call: AttentionCall, options: AttentionOptions) -> None:
        if call.exchange != "whole":
            raise UnsupportedError(
                f"{type(self).__name__} never has whole documents to give to a callable",
                fix="pass attn_mod=None or a CoreAttention, or use the ulysses backend",
            )
        asked = {
            "return_lse": call.return_lse,
            "softmax_scale": options.softmax_scale is not None,
            "key_padding_mask": self.padded_rows is not None,
        }
        if any(asked.values()):
            raise UnsupportedError(
                f"a callable attn_mod is not told of {', '.join(name for name, given in asked.items() if given)}",
                fix="let the callable know by itself, or pass attn_mod=None or a CoreAttention",
            )

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Built-in attention of local queries over all ranks' keys.

        Returns:
            ``out [B, L, N, D_v]`` and ``lse [B, L, N]``.
        """
        return self._loop(call, call.q, call.k, call.v)

    def attend_whole(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """Attention over whole documents held on this rank, by the built-in kernels or the caller's module.

        Args:
            call: the call; its tensors are not used.
            q: ``[B, S, heads, D]`` in global order.
            k: ``[B, S, key heads, D]``.
            v: ``[B, S, key heads, D_v]``.

        Returns:
            ``out [B, S, heads, D_v]`` and ``lse [B, S, heads]`` (None from a module).
        """
        if call.module is None:
            return self._loop(call, q, k, v)
        return self._call_module(call, q, k, v), None

    def _plan(self, call: AttentionCall) -> Tensor:
        """The packed plan for a call's mask and exchange, made once per batch."""
        key = call.mask, call.exchange
        if key not in self._plans:
            whole = contiguous(self.documents.offsets, 1) if call.exchange == "whole" else None
            self._plans[key] = self._stream.plan(call.mask, whole, ring=call.exchange == "ring").to_tensor()
        return self._plans[key]

    def _loop(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The attention loop; rows of a batch with padding are laid end to end for it."""
        batch, rows, heads = q.shape[:3]
        if self.padded_rows is not None:
            q, k, v = (x.reshape(1, batch * rows, *x.shape[2:]) for x in (q, k, v))
        travels = call.exchange not in ("whole", "none")
        out, lse = attention(
            q,
            k,
            v,
            self._plan(call),
            scale=call.scale,
            kernel=call.kernel,
            exchange=call.exchange if travels else "none",
            group_name=self._group.name if travels else "",
        )
        return out.view(batch, rows, heads, out.shape[-1]), lse.view(batch, rows, heads)

    def _call_module(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Give whole documents to the caller's module, padding removed."""
        documents, packed = self.documents, self.qkv_format == "thd"
        tensors = [from_batch_first(x, self.qkv_format) for x in (q, k, v)]
        kept = torch.from_numpy(documents.valid_tokens()).to(q.device) if documents.has_padding else None
        if kept is not None:
            tensors = [x.index_select(0, kept) for x in tensors]
        offsets = torch.from_numpy(documents.valid_offsets).to(q.device, torch.int32) if packed else None
        longest = (
            int((documents.valid_offsets[1:] - documents.valid_offsets[:-1]).max(initial=0))
            if packed
            else self.max_seqlen_q
        )
        out = call.module(
            *tensors,
            cu_seqlens_q=offsets,
            cu_seqlens_kv=offsets,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            mask=call.mask,
        )
        expected = (*tensors[0].shape[:-1], v.shape[-1])
        if not isinstance(out, Tensor) or out.shape != expected:
            got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise InvalidValueError(
                "attn_mod must return [..., heads, D_v] in qkv_format", got=got, fix=f"expected {list(expected)}"
            )
        if kept is not None:
            out = out.new_zeros(documents.num_tokens, *out.shape[1:]).index_copy(0, kept, out)
        return batch_first(out, self.qkv_format)
