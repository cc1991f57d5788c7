"""The contract: what a training loop and a model may ask of context parallelism."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, SupportsIndex, TypeAlias, TypeVar

import torch
from torch import Tensor

from cphandler.attention.options import OptionalArguments
from cphandler.comm.groups import GroupSource, resolve_group
from cphandler.comm.membership import device_of
from cphandler.config import CPConfig
from cphandler.errors import InvalidTypeError, InvalidValueError, MissingPackageError, UnsupportedError
from cphandler.handler.explanation import Algorithm, Explanation, Sample
from cphandler.layouts.layout import Layout
from cphandler.layouts.placement import LayoutSpec
from cphandler.plan.batch_plan import BatchPlan
from cphandler.sharding.dispatch import DispatchGrad, GradMode
from cphandler.sharding.rope import Freqs, deinterleaved, flat_table, yarn_scale
from cphandler.sharding.shard import Fragments, ShardFacts
from cphandler.tensors import device_copy
from cphandler.tokens.counts import checked_count
from cphandler.tokens.documents import Documents, Offsets
from cphandler.tokens.intervals import Table
from cphandler.tokens.masks import Mask, implied_positions, make_mask
from cphandler.tokens.metadata import StreamMetadata, dense_streams, packed_streams
from cphandler.tokens.positions import PositionIds, checked_positions
from cphandler.tracing import untraced

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

T = TypeVar("T")

Format: TypeAlias = Literal["sbhd", "bshd", "thd"]
"""Order of dims: S sequence, B batch, H heads, D head dim; ``thd`` packs the documents of a batch in one dim T."""

FreqsMode: TypeAlias = Literal["per_document", "packed"]
"""Whether a rope table counts positions from each document's start, or has one row per packed token."""

AskedLayout: TypeAlias = "LayoutSpec | BatchPlan | tuple[LayoutSpec, LayoutSpec] | None"
"""What a caller may give as ``layout=``."""


class ContextParallelHandler(ABC):
    """One batch under context parallelism; the object a training loop makes and a model uses.

    L is the number of local rows, S (or T) of global tokens, N of query heads, D the head dim.

    Args:
        cp_group: the ranks that share each sequence: a process group, a 1-D device mesh, accelerate's
            ``ParallelismConfig`` once it has its mesh, or None for one rank. A class of two levels (:attr:`two_level`:
            ``a2a+p2p``, ``a2a+ring``, lists with one of them) also takes the 2-D (outer, inner) device mesh of its two
            groups.
        qkv_format: ``"sbhd"``, ``"bshd"`` or ``"thd"``.
        cu_seqlens_q: ``thd``: ``[D + 1]`` offsets of the valid tokens, global, before any split over ranks.
        cu_seqlens_kv: the same for the keys of cross attention, document i of the queries with document i of the keys;
            None, or the same offsets, for self attention.
        cu_seqlens_q_padded: ``thd``: physical offsets where documents are padded at their ends; tensors then have that
            length.
        cu_seqlens_kv_padded: the same for keys.
        max_seqlen_q: dense formats: the global sequence length S, required. ``thd``: at least the longest physical
            document, which is the default.
        max_seqlen_kv: the same for keys; dense formats: another length means cross attention.
        position_ids: positions for rope, in place of those that restart with each document or that the mask implies:
            global, from 0, the same on every rank. ``thd``: ``[T]`` or ``[1, T]``, or ``[A, T]`` for A rotary axes, as
            in M-RoPE. Dense formats: ``[S]`` or ``[B, S]``, or ``[A, B, S]``. Of the query stream; keys of cross
            attention have the positions of their documents. Rolls, masks and layouts go by documents as ever.
        key_padding_mask: dense formats: ``[B, S]`` bool over the keys, True for a real token; left padding, right
            padding and holes are all exact. In self attention it says which queries are real too.
        cross_attention: True makes a key stream even where its documents are as long as the queries'; None leaves it to
            the lengths, False refuses others.
        local_cp_size: dynamic context parallelism: how many ranks this batch uses; must be the size of ``cp_group``.
        mask: ``"causal"``, ``"full"`` or a :class:`Mask`. Dense formats: one that has another mask, or other numbers,
            for each document (``PerDocument((m0, m1))``) has them for the rows of the batch.
        layout: a name (``"zigzag"``, ``"contiguous"``, ``"striped"``, ``"balanced"``, ``"replicated"``), a
            :class:`Balanced` mix of masks, a :class:`Layout`, or None for the class's default; a pair of them for the
            two streams of cross attention. A :class:`BatchPlan` of this batch is its layout, and what else it holds is
            not made again.
        config: settings that do not change from batch to batch.

    Raises:
        InvalidTypeError: arguments of a wrong type or dtype.
        InvalidValueError: arguments that contradict each other or the group.
        UnsupportedError: what this class cannot do, naming what can.
    """

    comm_type: ClassVar[str] = "none"
    """How this class communicates: ``"none"``, ``"a2a"``, ``"ring"``, ``"all_gather"``, ..."""

    two_level: ClassVar[bool] = False
    """Whether a 2-D (outer, inner) device mesh may be given as the group."""

    package: ClassVar[str] = ""
    """The optional package that this class computes with, as it is imported; empty for none."""

    @classmethod
    def check_package(cls) -> None:
        """Import :attr:`package`; :func:`cphandler.get_cp_handler_cls` calls this, so that it is not imported before.

        A class that knows more of its package, such as which versions will do, overrides it.

        Raises:
            MissingPackageError: the package is missing, broken, or of a version that is not supported.
        """
        try:
            if cls.package:
                import_module(cls.package)
        except Exception as error:  # a package that is half installed may raise anything
            raise MissingPackageError(
                f"{cls.__name__} computes with {cls.package!r}, which cannot be imported",
                got=f"{type(error).__name__}: {error}",
                fix=f"install {cls.package!r}, or mend it",
            ) from error

    def __init__(
        self,
        *,
        cp_group: GroupSource = None,
        qkv_format: Format = "sbhd",
        cu_seqlens_q: Offsets | None = None,
        cu_seqlens_kv: Offsets | None = None,
        cu_seqlens_q_padded: Offsets | None = None,
        cu_seqlens_kv_padded: Offsets | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        position_ids: PositionIds | None = None,
        key_padding_mask: Tensor | None = None,
        cross_attention: bool | None = None,
        local_cp_size: int | None = None,
        mask: str | Mask = "causal",
        layout: AskedLayout = None,
        config: CPConfig | None = None,
    ) -> None:
        self.config = CPConfig() if config is None else config
        if not isinstance(self.config, CPConfig):
            raise InvalidTypeError(
                "config must be a CPConfig", got=type(config).__name__, fix="pass CPConfig(...), or None"
            )
        if qkv_format not in ("sbhd", "bshd", "thd"):
            raise InvalidValueError("unknown qkv_format", got=repr(qkv_format), fix="choose sbhd, bshd or thd")
        self.qkv_format: Format = qkv_format
        self.ranks = resolve_group(cp_group, two_level=self.two_level, timeout=self.config.timeout)
        self._check_local_cp_size(local_cp_size)
        self._mask = make_mask(mask)
        offsets = {
            "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_kv": cu_seqlens_kv,
            "cu_seqlens_q_padded": cu_seqlens_q_padded,
            "cu_seqlens_kv_padded": cu_seqlens_kv_padded,
        }
        lengths = {"max_seqlen_q": max_seqlen_q, "max_seqlen_kv": max_seqlen_kv}
        if qkv_format == "thd":
            queries, keys = packed_streams(offsets, lengths, key_padding_mask, cross=cross_attention)
        else:
            rows = self._mask.num_documents
            queries, keys = dense_streams(
                qkv_format, offsets, lengths, key_padding_mask, cross=cross_attention, rows=rows
            )
        self.queries: StreamMetadata = queries
        self.keys: StreamMetadata = keys
        self._named_positions = None if position_ids is None else self._checked_positions(position_ids)
        self._local_positions: dict[torch.device, Tensor] = {}
        self.device = self._device(cu_seqlens_q, key_padding_mask, position_ids)
        self.prepare(layout)

    def prepare(self, layout: AskedLayout) -> None:
        """Build what follows from the checked metadata; called once, at the end of construction.

        Args:
            layout: what the caller asked for. A class that brings its own layout refuses it.
        """
        if layout is not None:
            raise UnsupportedError(
                f"{type(self).__name__} brings its own layout", got=repr(layout), fix="pass layout=None"
            )

    def plan(self, mask: str | Mask | None = None) -> None:
        """Make, or find, what attention under a mask needs, so that the first call under it does not wait for it.

        A loop calls it early, on any thread, while the device computes. Nothing is sent, and nothing depends on it but
        a block compiled without graph breaks: :meth:`core_attn` plans by itself what was not planned. A class that
        leaves planning to its engine does nothing.

        Args:
            mask: as the ``mask`` option of :meth:`core_attn`; None for the handler's own.

        Raises:
            InvalidTypeError: neither a name nor a mask.
            InvalidValueError: a mask that does not fit the documents.
            UnsupportedError: a mask, or a layout, that this class does not serve.
        """
        if mask is not None:
            make_mask(mask)

    def explain(
        self,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int = 128,
        value_head_dim: int | None = None,
        softcap: bool = False,
        dropout: bool = False,
    ) -> Explanation:
        """How :meth:`core_attn` will compute a call, and why: the algorithm, the kernel, and what the others lack.

        Packages that bring kernels are imported, as the call would; nothing is sent. ``print`` shows all of it.

        Args:
            dtype: of queries, keys and values.
            device: where they are; None for the handler's own. One that is not here has no kernel that can run.
            heads: query heads N.
            kv_heads: key and value heads G; None for N.
            head_dim: D, of queries and keys.
            value_head_dim: D_v, of values; None for D.
            softcap: whether scores are capped.
            dropout: whether weights are dropped.

        Raises:
            InvalidTypeError: a dtype that attention does not compute in, counts or flags that are none.
            InvalidValueError: a device that torch does not know, or for which ``CPConfig.kernel`` names no kernel.
        """
        sample = Sample.checked(
            dtype=dtype,
            device=self.device if device is None else device,
            softcap=softcap,
            dropout=dropout,
            heads=heads,
            kv_heads=heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            value_head_dim=head_dim if value_head_dim is None else value_head_dim,
        )
        return Explanation.of(self._algorithm(), sample, self.config)

    def _algorithm(self) -> Algorithm:
        """What :meth:`explain` says of the class; one that computes with the library's kernels overrides it."""
        name = type(self).__name__
        return Algorithm(name, self.comm_type, self.cp_size, "its own", "its own", name)

    def _checked_positions(self, position_ids: PositionIds, name: str = "position_ids") -> Table:
        rows = None if self.queries.padded_rows is None else self.queries.padded_rows.num_documents
        length, packed = self.queries.documents.num_tokens, self.qkv_format == "thd"
        return checked_positions(position_ids, length, packed=packed, rows=rows, name=name)

    @cached_property
    def global_positions(self) -> Table | None:
        """``[..., S]`` positions of the query stream where the caller named them or the mask implies them, else None.

        Read-only. See ``position_ids`` among the arguments; a mask implies ``[T]``, or ``[B, S]`` where rows of a dense
        batch differ.
        """
        if self._named_positions is not None or self.is_cross_attention:
            return self._named_positions
        implied = implied_positions(self.mask, self.queries.documents, self.queries.padded_rows)
        name = f"the positions that {type(self.mask).__name__} implies"
        return None if implied is None else self._checked_positions(implied, name)

    def __copy__(self) -> Self:
        """As ``copy.deepcopy``: half a copy would share what changes from call to call."""
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A handler of its own over the same batch, in the same group; what cannot change is shared."""
        made = object.__new__(type(self))
        memo[id(self)] = made
        memo |= {id(value): value for value in self._shared_with_copies()}
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """A handler stays in its process.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "a handler cannot be pickled: it belongs to a process group of this process",
            got=type(self).__name__,
            fix="send the BatchPlan that plan_batch makes, or the batch, and make the handler where it arrives",
        )

    def _shared_with_copies(self) -> list[object]:
        """Values that never change, or only remember what follows from such."""
        arrays = [self._named_positions, self.__dict__.get("global_positions")]  # a copy of an array can be written to
        return [self.ranks, self.config, self.mask, self.queries, self.keys, *(x for x in arrays if x is not None)]

    def _check_local_cp_size(self, local_cp_size: int | None) -> None:
        way_out = "pass the group this batch uses; cp_group=None for local_cp_size=1"
        if local_cp_size is not None and checked_count("local_cp_size", local_cp_size, fix=way_out) != self.cp_size:
            raise InvalidValueError(
                "local_cp_size must be the size of cp_group",
                got=f"{local_cp_size} with a group of {self.cp_size}",
                fix=way_out,
            )

    def _device(self, *metadata: object) -> torch.device:
        """Where facts such as ``position_ids`` live: with the metadata, else where the group communicates."""
        for value in metadata:
            if isinstance(value, Tensor) and value.device.type != "cpu":
                return value.device
        on_host = not self.ranks.name or "cpu" in str(device_of(self.ranks.source))
        return torch.device("cpu") if on_host else device_of(self.ranks.source)

    @property
    def cp_size(self) -> int:
        """Ranks that share each sequence."""
        return self.ranks.size

    @property
    def cp_rank(self) -> int:
        """This process's rank among them."""
        return self.ranks.rank

    @property
    def group(self) -> Any:
        """The process group; None with one rank and no group."""
        return self.ranks.source

    @property
    def mask(self) -> Mask:
        """Who sees whom, unless a call says otherwise."""
        return self._mask

    @property
    def is_cross_attention(self) -> bool:
        """Whether keys are a stream of their own."""
        return self.keys is not self.queries

    @property
    def seq_dim(self) -> int:
        """The sequence dim of queries, keys and values in ``qkv_format``."""
        return 1 if self.qkv_format == "bshd" else 0

    @abstractmethod
    def shard(self, stream: str = "q") -> ShardFacts:
        """What this rank holds of a stream; the facts below are read off it.

        Args:
            stream: ``"q"``, or ``"kv"`` for the key stream of cross attention, in self attention the same one.

        Returns:
            The rank's :class:`Shard` of a layout, or an :class:`EngineShard` where an engine keeps it to itself.
        """

    @property
    def documents(self) -> Documents:
        """The documents of the query stream; of one row of the batch in dense formats."""
        return self.queries.documents

    @property
    def kv_documents(self) -> Documents:
        """The key stream's :attr:`documents`."""
        return self.keys.documents

    @property
    def max_seqlen_q(self) -> int:
        """Length of the longest physical document, or the bound that the caller named."""
        return self.queries.max_seqlen

    @property
    def max_seqlen_kv(self) -> int:
        """The key stream's :attr:`max_seqlen_q`."""
        return self.keys.max_seqlen

    @property
    def layout(self) -> Layout:
        """Which rank holds which tokens; a class that leaves this to its engine has none to show."""
        return self.shard().layout

    @property
    def kv_layout(self) -> Layout:
        """The key stream's :attr:`layout`; the query stream's in self attention."""
        return self.shard("kv").layout

    @property
    def position_ids(self) -> Tensor:
        """``[L]`` int64 position of each local row in its document; the caller's own copy.

        Where ``position_ids`` were given, or the mask implies some, these, cut in their last dim: ``[L]``, ``[B, L]``,
        ``[A, L]`` or ``[A, B, L]``, 0 in pad rows.
        """
        return self._positions_on(self.device, "q").clone()

    @property
    def kv_position_ids(self) -> Tensor:
        """The key stream's :attr:`position_ids`; the query stream's in self attention."""
        return self._positions_on(self.device, "kv").clone()

    @property
    def valid_mask(self) -> Tensor:
        """``[L]`` bool (``[B, L]`` where rows of the batch differ): True for a real token; the caller's copy."""
        return self.shard().valid_mask

    @property
    def kv_valid_mask(self) -> Tensor:
        """The key stream's :attr:`valid_mask`."""
        return self.shard("kv").valid_mask

    @property
    def num_local_tokens(self) -> int:
        """Physical rows L this rank holds."""
        return self.shard().num_local_tokens

    @property
    def kv_num_local_tokens(self) -> int:
        """The key stream's :attr:`num_local_tokens`."""
        return self.shard("kv").num_local_tokens

    @property
    def fragments(self) -> Fragments:
        """The runs of one document each that this rank holds."""
        return self.shard().fragments

    @property
    def kv_fragments(self) -> Fragments:
        """The key stream's :attr:`fragments`."""
        return self.shard("kv").fragments

    @property
    def sequence_sharded(self) -> bool:
        """True where ranks hold different tokens."""
        return self.cp_size > 1

    @property
    def effective_cp_size(self) -> int:
        """How many parts the tokens are in: what losses and gradients are scaled by."""
        return self.cp_size if self.sequence_sharded else 1

    def _stream(self, stream: str) -> StreamMetadata:
        return self.queries if stream == "q" else self.keys

    def agree(self, call: str, error: Exception | None = None) -> None:
        """Check that all ranks of the group hold this batch; nothing to do for a class that leaves it to its engine.

        Args:
            call: what this rank is about to do, in words that must be the same on all ranks.
            error: what this rank is about to raise; it then only tells the others.
        """
        del call, error

    def agreed(self, method: str, check: Callable[[], T], describe: Callable[[T], str]) -> T:
        """Run a check that comes before an exchange, and let the other ranks know whether it passed.

        Args:
            method: what this rank is about to do.
            check: checks it; what it raises is raised here, once the others have been told.
            describe: what it found, in words that must be the same on all ranks.
        """
        try:
            result = check()
        except Exception as error:
            self.agree(method, error)
            raise
        self.agree(f"{method} {describe(result)}")
        return result

    @abstractmethod
    def dispatch(
        self, tensor: Tensor, seq_dim: int, *, pad_value: float = 0, grad: DispatchGrad = "full", stream: str = "q"
    ) -> Tensor:
        """This rank's rows of a global tensor that is the same on every rank.

        Args:
            tensor: ``[..., S, ...]``, any dtype and strides.
            seq_dim: dim of the sequence; negative counts from the end.
            pad_value: what a pad row holds.
            grad: what the backward pass gives. ``"full"``: every rank the whole gradient, so that what was computed
                before the cut has complete gradients on every rank, not to be summed over the group. ``"partial"``:
                each rank its own rows' part and zeros elsewhere, so that gradients before the cut sum over the group
                like those after it; nothing is sent.
            stream: ``"q"``, or ``"kv"`` for the key stream of cross attention.

        Returns:
            ``[..., L, ...]``, contiguous; with one rank, and on the replicated layout, the argument itself, both ways.

        Raises:
            InvalidTypeError: not an ordinary tensor first and an int second, or a ``pad_value`` that is no number.
            InvalidValueError: the dim does not exist or is not S long, an unknown ``grad``, or a ``pad_value`` that the
                dtype cannot hold.
            UnsupportedError: forward-mode differentiation.
        """

    @abstractmethod
    def combine(self, tensor: Tensor, seq_dim: int, *, grad: GradMode = "replicated", stream: str = "q") -> Tensor:
        """All ranks' rows in global order, bit for bit: ``combine(dispatch(x)) == x``.

        Args:
            tensor: ``[..., L, ...]``, any dtype and strides.
            seq_dim: dim of the sequence.
            grad: what the incoming gradient means. ``"replicated"``: all ranks compute the same loss; this rank's
                slice. ``"sum"``: each rank computes its own part; a reduce-scatter. ``"scaled"``: the slice times
                ``cp_size``.
            stream: ``"q"``, or ``"kv"`` for the key stream of cross attention.

        Returns:
            ``[..., S, ...]`` on every rank, contiguous; with one rank, and on the replicated layout, the argument
            itself, whatever its strides.

        Raises:
            InvalidTypeError: not an ordinary tensor first and an int second.
            InvalidValueError: the dim does not exist or is not L long, or an unknown ``grad``.
            UnsupportedError: forward-mode differentiation; differentiating a gradient of ``"scaled"`` again. The
                others may be differentiated as often as on one rank.
        """

    @abstractmethod
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
        """Shift a local tensor along the sequence inside each document, across ranks.

        Token t gets the value of token ``t - shifts`` where both are real tokens of one document, else ``fill_value``.
        With documents ``[1, 2, 3 | 4, 5]`` and ``shifts=-1`` the result is ``[2, 3, 0 | 5, 0]``, whatever the layout.

        Args:
            tensor: ``[..., L, ...]``, any dtype; None gives ``(None, None)``. With a key-padding mask the sequence and
                the batch are the first two dims, in either order.
            shifts: tokens to shift by; negative moves later tokens forward, as labels want it. A list or tuple of K
                shifts gives the K results, and their sums, in a dim of their own in front, in one exchange.
            dims: dim of the sequence.
            fill_value: what rows hold that no token reaches.
            return_sum: also return the sum of the rolled tensor.
            stream: ``"q"``, or ``"kv"`` for the key stream of cross attention.

        Returns:
            The rolled tensor and its sum over this rank's rows (None without ``return_sum``): of one shift
            ``[..., L, ...]`` and a number, of several ``[K, ..., L, ...]`` and ``[K]``. Differentiable.
        """

    @abstractmethod
    def core_attn(
        self, attn_mod: Any, query: Tensor, key: Tensor, value: Tensor, **options: Unpack[OptionalArguments]
    ) -> Any:
        """Attention of this rank's queries over every key its mask lets them see, wherever it lives.

        Args:
            attn_mod: None for the built-in kernels, a :class:`CoreAttention`, or, where the algorithm has whole
                documents to give it, a callable (see :class:`AttentionModule`).
            query: ``[L, B, N, D]``, ``[B, L, N, D]`` or ``[L, N, D]``, by ``qkv_format``.
            key: the same with G heads; N divisible by G.
            value: the same with G heads and head dim D_v.
            options: see :class:`AttentionOptions`.

        Returns:
            ``[..., N, D_v]`` in the query's format and dtype, zero where a row sees nothing; an
            :class:`AttentionResult` of it when ``return_lse`` or ``return_max_logit`` is asked for.
        """

    @abstractmethod
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
        """Rotate local rows by local rows of a rope table; commutes with :meth:`dispatch`.

        Args:
            tensor: queries or keys in ``qkv_format``.
            freqs: angles in radians, ``[L, R]`` or ``[L, 1, 1, R]`` with R the whole rotary dim, or a pair (cos, sin),
                from :meth:`get_emb_on_this_cp_rank`. Channels from R on pass through. Where rows of a dense batch have
                angles of their own, ``[B, L, R]`` or ``[B, L, 1, 1, R]``, batch first in either format; ``[1, L, R]``
                serves every batch and ``thd``.
            interleaved: channels are paired (0, 1), (2, 3), ... instead of (i, i + R / 2).
            mscale: factor on cos and sin.
            inverse: undo the rotation.
            stream: ``"q"``, or ``"kv"`` for the key stream of cross attention.

        Raises:
            InvalidValueError: freqs of another length than L, or a rotary dim that does not fit.
        """

    def apply_rotary_pos_emb(self, tensor: Tensor, freqs: Freqs, config: Any = None, *, stream: str = "q") -> Tensor:
        """:meth:`rope` with the settings of a Megatron-style config.

        Args:
            tensor: queries or keys in ``qkv_format``.
            freqs: local rows of the rope table.
            config: read for ``rotary_interleaved``, ``multi_latent_attention`` (channels are first taken apart into
                even and odd ones) and YaRN's scale; None for the defaults.
            stream: ``"q"``, or ``"kv"`` for the key stream of cross attention.
        """
        if getattr(config, "multi_latent_attention", False):
            table = freqs[0] if isinstance(freqs, tuple) else freqs
            tensor = deinterleaved(tensor, table.shape[-1])
        interleaved = bool(getattr(config, "rotary_interleaved", False))
        return self.rope(tensor, freqs, interleaved=interleaved, mscale=yarn_scale(config), stream=stream)

    @untraced
    def get_rotary_seq_len(self, *, freqs_mode: FreqsMode = "per_document", stream: str = "q") -> int:
        """Rows a rope table needs: the longest physical document, or every packed token. Global on every rank.

        Where positions were named, or the mask implies some, one more than the largest of the whole batch.
        """
        check_stream(stream)
        if freqs_mode not in ("per_document", "packed"):
            raise InvalidValueError("unknown freqs_mode", got=repr(freqs_mode), fix="choose per_document or packed")
        documents, own = self._stream(stream).documents, self._own_positions(stream)
        if freqs_mode == "packed":
            return documents.num_tokens
        return documents.max_length if own is None else int(own.max(initial=-1)) + 1

    def get_emb_on_this_cp_rank(self, emb: Freqs, *, freqs_mode: FreqsMode = "per_document", stream: str = "q") -> Any:
        """The rows of a rope table that belong to this rank's tokens.

        Args:
            emb: a table of at least :meth:`get_rotary_seq_len` rows, ``[rows, R]`` or ``[rows, 1, 1, R]``, or a pair
                (cos, sin).
            freqs_mode: ``"per_document"``, rows count from each document's start; ``"packed"``, one per packed token.
            stream: ``"q"``, or ``"kv"`` for the key stream of cross attention.

        Returns:
            The row of each local token, in the shape of :attr:`position_ids`: ``[L, R]``, or ``[B, L, R]`` where
            positions differ between rows of the batch; with A rotary axes ``[A, L, R]`` or ``[A, B, L, R]``, for the
            model to join its sections of them to one table. ``[..., 1, 1, R]`` in place of R where ``emb`` has that
            form, a pair for a pair. ``"packed"`` rows are always ``[L, R]``.

        Raises:
            InvalidValueError: a table that is too short.
        """
        needed = self.get_rotary_seq_len(freqs_mode=freqs_mode, stream=stream)
        tables = emb if isinstance(emb, tuple) else (emb,)
        for part in tables or (emb,):
            if not isinstance(part, Tensor) or len(tables) > 2:
                raise InvalidTypeError(
                    "the rope table must be a tensor or a pair (cos, sin)",
                    got=type(part).__name__,
                    fix=f"build it with get_rotary_seq_len(freqs_mode={freqs_mode!r}) rows",
                )
            if flat_table(part, "the rope table").shape[0] < needed:
                raise InvalidValueError(
                    "the rope table is too short",
                    got=f"{part.shape[0]} rows, {needed} needed",
                    fix=f"build it with get_rotary_seq_len(freqs_mode={freqs_mode!r}) rows",
                )
        local = [_chosen_rows(part, self._table_rows(freqs_mode, part.device, stream)) for part in tables]
        return tuple(local) if isinstance(emb, tuple) else local[0]

    def _own_positions(self, stream: str) -> Table | None:
        """``[..., S]`` positions of a stream that do not follow from its documents."""
        return None if stream == "kv" and self.is_cross_attention else self.global_positions

    @untraced
    def _positions_on(self, device: torch.device, stream: str) -> Tensor:
        """Local positions on a device, not to be written to."""
        own = self._own_positions(stream)
        if own is None:
            return self._document_positions(device, stream)
        if device not in self._local_positions:
            with torch.inference_mode(mode=False):  # a batch may train later
                self._local_positions[device] = self.dispatch(device_copy(own, device), -1)
        return self._local_positions[device]

    def _document_positions(self, device: torch.device, stream: str) -> Tensor:
        """``[L]`` position of each local row in its document, on a device, not to be written to."""
        return self.shard(stream).position_ids.to(device)

    def _table_rows(self, freqs_mode: FreqsMode, device: torch.device, stream: str) -> Tensor:
        """``[..., L]`` row of the rope table for each local row; a handler with ``"packed"`` tables overrides this."""
        if freqs_mode == "packed":
            raise UnsupportedError(
                f"{type(self).__name__} has no packed rope tables", fix="use freqs_mode='per_document'"
            )
        return self._positions_on(device, stream)

    def explain_length(self, got: int, expected: int, stream: str = "q", *, elsewhere: str = "") -> str:
        """What a wrong sequence length probably means: a local tensor or local metadata where global ones belong.

        Args:
            got: rows that were found.
            expected: rows that should be there, local or global.
            stream: which stream's.
            elsewhere: where the tensor has the expected rows, in words; empty where it has them nowhere.
        """
        length, local = self._stream(stream).documents.num_tokens, self.shard(stream).num_local_tokens
        metadata = f"cu_seqlens_{stream}" if self.qkv_format == "thd" else f"max_seqlen_{stream}"
        looks_local = f"{metadata} must be global, taken before the split over ranks"
        if expected == length and got == local:
            return "this is the length of a rank's own rows: the tensor was already dispatched"
        if expected == local and got == length:
            return f"this is the global length: dispatch the tensor first; if it is this rank's part, {looks_local}"
        if elsewhere:
            return f"{elsewhere}: name the right dim, or bring the tensor's dims in order"
        if expected == length and self.cp_size > 1 and -(-got // self.cp_size) == length:
            return f"{looks_local}; it looks local"
        return f"{metadata} says that the sequence has {length} tokens, {local} on each rank; {looks_local}"


def _chosen_rows(table: Tensor, rows: Tensor) -> Tensor:
    """``table[rows]``; zeros where there are no positions to have angles, and pad rows nonetheless."""
    if not len(table):
        return table.new_zeros(*rows.shape, *table.shape[1:])
    return table.index_select(0, rows.reshape(-1)).view(*rows.shape, *table.shape[1:])


def check_stream(stream: str) -> None:
    """Refuse what names no stream.

    Raises:
        InvalidValueError: neither ``"q"`` nor ``"kv"``.
    """
    if stream not in ("q", "kv"):
        raise InvalidValueError("unknown stream", got=repr(stream), fix="use 'q' or 'kv'")
