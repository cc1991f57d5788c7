"""Attention over one batch by one algorithm: what a handler hands ``core_attn`` to."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils import checkpoint

from cphandler.attention.call import AttentionCall, TensorRules, batch_first, from_batch_first, kind_of_call
from cphandler.attention.capabilities import Capabilities
from cphandler.attention.capture import CAPTURED, check_capture, is_capturing
from cphandler.attention.exchange import get_exchange
from cphandler.attention.loop import OF_DOCUMENTS, OPEN, AttentionResult, Indices, Scalars, attention, max_logit
from cphandler.attention.options import AttentionOptions, CoreAttention, OptionalArguments
from cphandler.attention.plans import Plans
from cphandler.comm import collectives
from cphandler.comm.endings import end
from cphandler.comm.groups import CPGroup
from cphandler.config import CPConfig
from cphandler.errors import InvalidValueError, UnsupportedError
from cphandler.kernels import check_kernel_name, get_kernel, likely_kernel
from cphandler.layouts.layout import LAYOUTS
from cphandler.plan.plan import head_of
from cphandler.sharding.dispatch import GradMode
from cphandler.sharding.shard import ShardPair
from cphandler.tensors import check_no_tangent, device_copy
from cphandler.tokens.masks import Mask, is_value, make_mask
from cphandler.tokens.metadata import StreamMetadata
from cphandler.tokens.offsets import as_int32
from cphandler.tracing import untraced

T = TypeVar("T")

MOST_KINDS = 512
"""Of calls that a handler remembers to have found right: tensors of a shape with options of a value, as layers have."""


class Host(Protocol):
    """What attention asks of the handler that it works for."""

    config: CPConfig
    ranks: CPGroup
    shards: ShardPair
    queries: StreamMetadata
    keys: StreamMetadata
    device: torch.device

    @property
    def qkv_format(self) -> Any:
        """Order of the dims of queries, keys and values."""

    @property
    def mask(self) -> Mask:
        """Who sees whom, unless a call says otherwise."""

    def agree(self, call: str, error: Exception | None = None) -> None:
        """Tell the other ranks what this one is about to do, or to raise."""

    def dispatch(self, tensor: Tensor, seq_dim: int, *, pad_value: float = 0, stream: str = "q") -> Tensor:
        """This rank's rows of a global tensor."""

    def combine(self, tensor: Tensor, seq_dim: int, *, grad: GradMode = "replicated", stream: str = "q") -> Tensor:
        """All ranks' rows in global order."""

    def explain_length(self, got: int, expected: int, stream: str = "q", *, elsewhere: str = "") -> str:
        """What a wrong sequence length probably means."""

    def agreed(self, method: str, check: Callable[[], T], describe: Callable[[T], str]) -> T:
        """The result of a check, once all ranks know whether it passed and whether they make one call."""

    def watched(self, x: Tensor) -> Tensor:
        """``x`` itself, whose backward pass is a call that all ranks make alike."""

    def shown_mask(self, mask: Mask) -> str:
        """A mask in a few words, the same on every rank that has the same one."""


class Prepared(NamedTuple):
    """What attention under one mask needs of a batch: its tensors, and words that are the same in all batches.

    Attributes:
        plan: the head of the packed plan; see :func:`head_of`.
        plans: where it is from; says how keys reach the queries.
        indices: see :class:`Indices`.
        heads: the split of the heads around attention, where the algorithm has one.
        device: where the tensors of a call must be; None where all of this is on the host.
    """

    plan: Tensor
    plans: Plans
    indices: Indices
    heads: Any
    device: torch.device | None

    def serves(self, device: torch.device) -> bool:
        """Whether tensors may be on a device."""
        return self.device is None or self.device == device


class FixedTables(Protocol):
    """Tables in memory that stays where it is, for a CUDA graph that serves every packing written there."""

    def served(self, name: str, call: AttentionCall) -> AttentionCall:
        """The call with what attention needs of them, or a refusal."""


class Attention:
    """One algorithm over one batch: checks a call, computes, and arranges what comes back.

    A backend that only moves keys names its ``exchange``. One that does something else around attention overrides
    :meth:`compute`, and where it needs more than the shards, :meth:`set_up`; what it cannot serve beyond the table of
    its capabilities it refuses in :meth:`check_batch` and :meth:`check_call`.

    Args:
        host: the handler.
        name: the handler class's name, for errors.
        capabilities: what that class serves.
        exchange: how keys reach the queries: the name of an exchange; empty where it brings whole documents.
    """

    whole: ClassVar[bool] = False
    """Whether the algorithm brings whole documents to a rank, so that a caller's own attention can be served."""

    engine: ClassVar[str] = ""
    """What computes attention in place of the library's kernels, for :meth:`ContextParallelHandler.explain`."""

    def __init__(self, host: Host, name: str, capabilities: Capabilities, exchange: str = "") -> None:
        self.host, self.name, self.capabilities, self.exchange = host, name, capabilities, exchange
        self._plans: dict[bool, Plans] = {}
        self._passed: dict[Hashable, AttentionCall] = {}
        self._prepared_own: tuple[Prepared, ...] = ()
        self._prepared_others: tuple[tuple[Mask, Prepared], ...] = ()
        self.fixed: FixedTables | None = None
        check_kernel_name(host.config.kernel)
        if exchange:
            get_exchange(exchange)  # a name that is none is refused here, with one rank too
        self.check_batch()
        self.set_up()

    @property
    def parts(self) -> tuple[Attention, ...]:
        """The algorithms that calls come to."""
        return (self,)

    @property
    def serves_packings(self) -> bool:
        """Whether its messages are the same for all packings of as many tokens, so that one CUDA graph can hold them.

        An algorithm of its own says so itself; its :meth:`compute` then takes what a call has prepared.
        """
        gathers = bool(self.exchange) and get_exchange(self.exchange).gathers
        return type(self).compute is Attention.compute and not self.engine and (self.whole or gathers)

    def set_up(self) -> None:
        """Make what the algorithm needs beside the shards, such as groups of its own; nothing by default."""

    def check_batch(self) -> None:
        """Refuse the batch where the algorithm does not serve it, on every rank alike.

        Raises:
            UnsupportedError: what the capability table lacks.
        """
        table, shards = self.capabilities, self.host.shards
        table.require_format(self.name, self.host.qkv_format)
        table.require(self.name, *batch_features(self.host.queries, self.host.keys, self.host.config))
        table.require_mask(self.name, self.host.mask, crossing=shards.is_crossing)
        for shard in (shards.queries, shards.keys):
            layout = shard.layout
            if self.host.ranks.size > 1 and (layout.name in LAYOUTS or layout.replicated):
                table.require_layout(self.name, "replicated" if layout.replicated else layout.name)

    def check_call(self, call: AttentionCall) -> None:
        """Refuse a call beyond what the table says; nothing by default.

        Raises:
            InvalidValueError: sizes that do not go together.
            UnsupportedError: what the algorithm cannot do.
        """

    def compute(self, call: AttentionCall) -> AttentionResult:
        """The algorithm: from local rows of all heads to local rows of all heads.

        Args:
            call: a checked call.

        Returns:
            ``out [B, L, N, D_v]``, ``lse [B, L, N]`` and, where it is wanted, ``max_logit [N]`` of what this rank saw.
        """
        return self.attend_whole(call) if self.whole else self.attend(call)

    def __call__(self, attn_mod: Any, tensors: tuple[Tensor, Tensor, Tensor], options: OptionalArguments) -> Any:
        """All of ``core_attn``; see :meth:`ContextParallelHandler.core_attn`."""
        if not torch.compiler.is_compiling():
            call = self.checked(attn_mod, tensors, options)
        else:
            traced = self._traced(attn_mod, tensors, options)
            if traced is None and not _is_own(attn_mod):
                return self._outside(attn_mod, tensors, options)
            call = self.checked(attn_mod, tensors, options) if traced is None else traced
        return self.settled(call, self.compute(call))

    @untraced
    def _outside(self, attn_mod: Any, tensors: tuple[Tensor, Tensor, Tensor], options: OptionalArguments) -> Any:
        """All of a call outside of a graph, which breaks once: not every compiler carries a call over a break."""
        call = self.checked(attn_mod, tensors, options)
        return self.settled(call, self.compute(call))

    def _traced(
        self, attn_mod: Any, tensors: tuple[Tensor, Tensor, Tensor], options: OptionalArguments
    ) -> AttentionCall | None:
        """A call as a compiler can trace it, over what :meth:`plan` prepared; None where that is not enough."""
        prepared = self._prepared_for(options.get("mask"), tensors[0].device)
        drops = bool(options.get("dropout_p")) or (isinstance(attn_mod, CoreAttention) and attn_mod.drops(options))
        if prepared is None or _is_own(attn_mod) or drops or self.fixed is not None:
            return None
        call = AttentionCall.traced(attn_mod, tensors, AttentionOptions.checked(options), self._rules, self.host.mask)
        self._check_capabilities(call)
        self.check_call(call)
        follows = self._rules.qkv_format == "thd" or self._rules.batch is not None
        kernel = OPEN + (OF_DOCUMENTS if follows else "") + self.host.config.kernel
        return call._replace(kernel=kernel, prepared=prepared)

    def _prepared_for(self, mask: Mask | str | None, device: torch.device) -> Prepared | None:
        wanted = None if mask is None else make_mask(mask)
        for known, prepared in self._prepared_others if wanted is not None else ():
            if _are_alike(known, wanted) and prepared.serves(device):
                return prepared
        for prepared in self._prepared_own if wanted is None else ():
            if prepared.serves(device):
                return prepared
        return None

    @untraced
    def checked(
        self, attn_mod: Any, tensors: tuple[Tensor, Tensor, Tensor], options: OptionalArguments
    ) -> AttentionCall:
        """Check a ``core_attn`` call, and that every rank makes the same one.

        Args:
            attn_mod: see :meth:`ContextParallelHandler.core_attn`.
            tensors: local query, key and value.
            options: keyword options.
        """
        host, kind = self.host, kind_of_call(attn_mod, tensors, options)

        def check() -> AttentionCall:
            known = None if kind is None else self._passed.get(kind)
            call = self._checked_anew(attn_mod, tensors, options) if known is None else known.over(tensors)
            self.check_call(call)
            self._check_tangents(call)
            if self.fixed is not None:
                return self.fixed.served(self.name, call)
            if call.q.device.type == CAPTURED and is_capturing():
                padded = host.shards.keys.padded_rows is not None
                check_capture(self.name, self.exchange, packed=host.qkv_format == "thd", padded=padded)
            if known is None and call.module is None:
                self.plans(call).plan(call.mask)
            if known is None and kind is not None and is_value(call.mask):
                call = self._remembered(kind, call)
            return call

        return host.agreed("core_attn", check, self._in_words)

    def _checked_anew(
        self, attn_mod: Any, tensors: tuple[Tensor, Tensor, Tensor], options: OptionalArguments
    ) -> AttentionCall:
        host, asked = self.host, AttentionOptions.checked(options)
        call = AttentionCall.of(attn_mod, tensors, options=asked, rules=self._rules, mask=host.mask, config=host.config)
        self._check_capabilities(call)
        return call

    def _remembered(self, kind: Hashable, call: AttentionCall) -> AttentionCall:
        """The call, of a kind that will pass without being looked at again."""
        if len(self._passed) >= MOST_KINDS:
            self._passed.clear()
        call = call._replace(kept={})
        self._passed[kind] = call.replaced(*[torch.empty(0)] * 3)
        return call

    def _in_words(self, call: AttentionCall) -> str:
        """A call in words that ranks compare."""
        tensors = call.q, call.k, call.v
        key = "words", torch.is_grad_enabled(), *(x.requires_grad for x in tensors)
        words: str | None = None if call.kept is None else call.kept.get(key)
        if words is None:
            words = f"{call.describe()}, {self.host.shown_mask(call.mask)}"
            if call.kept is not None:
                call.kept[key] = words
        return words

    @cached_property
    def _rules(self) -> TensorRules:
        shards = self.host.shards
        padded = shards.keys.padded_rows
        batch = None if padded is None else padded.num_documents
        rows = shards.queries.num_local_tokens, shards.keys.num_local_tokens
        return TensorRules(self.host.qkv_format, rows, batch, self.host.explain_length)

    def _check_capabilities(self, call: AttentionCall) -> None:
        features = list(call.options.features)
        if call.q.shape[-1] != call.v.shape[-1]:
            features.append("value_head_dim")
        if call.module is not None:
            features.append("own_attention")
        if call.wants_max_logit:
            features.append("return_max_logit")
        self.capabilities.require(self.name, *features)
        if self.capabilities.masks is not None:
            self.capabilities.require_mask(self.name, call.mask, crossing=self.host.shards.is_crossing)
        if call.module is None:
            return
        rows = self.host.shards.keys.padded_rows
        told = [*call.options.features, *(["key_padding_mask"] if rows is not None and rows.has_padding else [])]
        if told:
            raise UnsupportedError(
                f"a callable attn_mod is not told of {', '.join(told)}",
                fix="let the callable know by itself, or pass attn_mod=None or a CoreAttention",
            )

    def _check_tangents(self, call: AttentionCall) -> None:
        """Forward-mode differentiation ends at operators and collectives, where torch goes on without a tangent."""
        if call.module is None or self.host.ranks.size > 1:
            for x in (call.q, call.k, call.v, call.sinks):
                if x is not None:
                    check_no_tangent(x, "core_attn")

    def plan(self, mask: Mask) -> None:
        """Make, or find, the plan of a mask, for the kernel that calls are likely to take; nothing is sent.

        Args:
            mask: who sees whom.

        Raises:
            InvalidValueError: a mask that does not fit the documents.
            UnsupportedError: a mask or a layout that no plan can be made of.
        """
        self.capabilities.require_mask(self.name, mask, crossing=self.host.shards.is_crossing)
        devices = [self.host.device]
        if devices[0].type == "cpu" and torch.cuda.is_initialized():  # metadata on the host say nothing of the model
            devices.append(torch.device("cuda", torch.cuda.current_device()))
        prepared = tuple(self._prepare(mask, device) for device in devices)
        if mask is self.host.mask:
            self._prepared_own = prepared
        others = [pair for pair in self._prepared_others if not _are_alike(pair[0], mask)]
        self._prepared_others = (*others, *((mask, one) for one in prepared))
        _ = self._rules  # looked up here, since a compiler would have to trace how they are made

    def _prepare(self, mask: Mask, device: torch.device) -> Prepared:
        plans = self._plans_for(likely_kernel(self.host.config.kernel, device.type).takes_prefix)
        indices, heads = Indices(plans.places(device)), self.head_parallel(device)
        anywhere = indices.places is None and heads is None
        return Prepared(head_of(plans.plan(mask)), plans, indices, heads, None if anywhere else device)

    def head_parallel(self, device: torch.device) -> Any:
        """The split of the heads around attention, for an algorithm that has one; None by default.

        Args:
            device: where the tensors are.
        """

    def plans(self, call: AttentionCall) -> Plans:
        """The plans of a call's attention; made once per batch."""
        if call.prepared is not None:
            made: Plans = call.prepared.plans
            return made
        return self._plans_for(get_kernel(call.kernel, call.q.device.type).takes_prefix)

    def _plans_for(self, ordered: bool) -> Plans:
        if ordered not in self._plans:
            self._plans[ordered] = self.make_plans(ordered)
        return self._plans[ordered]

    def make_plans(self, ordered: bool) -> Plans:
        """Plans over all tokens where whole documents come here, else over the shards' layouts.

        Args:
            ordered: whether the kernel is better off with gathered keys in global order.
        """
        pair, group = self.host.shards, self.host.ranks
        if self.whole:
            return Plans.whole(pair)
        layouts = pair.queries.layout, pair.keys.layout
        if group.size == 1:
            return Plans(pair, layouts, group.rank)
        return Plans(pair, layouts, group.rank, self.exchange, group.name, ordered=ordered)

    def attend(self, call: AttentionCall, *, last: bool = True) -> AttentionResult:
        """Built-in attention of the call's queries over all keys they may see, wherever the exchange finds them.

        Args:
            call: the call.
            last: nothing is exchanged after it, so that its backward pass is the first to send anything: the ranks'
                check is told. Where something is, tell it of that: ``self.host.watched(out)``.

        Returns:
            ``out [B, L, N, D_v]``, ``lse [B, L, N]`` and, where it is wanted, ``max_logit [N]`` of these queries.
        """
        q, k, v = call.q, call.k, call.v
        batch, rows, heads = q.shape[:3]
        padded = self.host.shards.keys.padded_rows is not None
        if padded:  # rows of a batch with padding are laid end to end
            q, k, v = (x.reshape(1, batch * x.shape[1], *x.shape[2:]) for x in (q, k, v))
        plan, scalars, indices = self._found(call) if call.prepared is not None else self._prepared(call, q.device)
        out, lse = attention(q, k, v, plan, scalars, sinks=call.sinks, indices=indices)
        if last:
            self.host.watched(out)
        largest = max_logit(q, k, plan, scalars, indices) if call.wants_max_logit else None
        if padded:
            out, lse = out.view(batch, rows, heads, out.shape[-1]), lse.view(batch, rows, heads)
        return AttentionResult(out, lse, largest)

    @untraced
    def _prepared(self, call: AttentionCall, device: torch.device) -> tuple[Tensor, Scalars, Indices]:
        """The packed plan of a call and what else the operator takes."""
        said = (*call[3:10], call.first_head, call.repeats)  # all but tensors: an algorithm may have changed some of it
        known: tuple[Any, ...] | None = None if call.kept is None else call.kept.get("prepared")
        if known is not None and known[:-3] == said:
            return known[-3], known[-2], known[-1]
        plans = self.plans(call)
        scalars = self._scalars(call, plans)
        positions = plans.positions(device) if scalars.dropout_p else ()
        plan, indices = plans.plan(call.mask), Indices(plans.places(device), *positions)
        if call.kept is not None and all(x is None for x in indices):  # each stream asks for tables on a device
            call.kept["prepared"] = (*said, plan, scalars, indices)
        return plan, scalars, indices

    def _found(self, call: AttentionCall) -> tuple[Tensor, Scalars, Indices]:
        """As :meth:`_prepared`, of what was prepared before."""
        prepared: Prepared = call.prepared
        return prepared.plan, self._scalars(call, prepared.plans), prepared.indices

    def _scalars(self, call: AttentionCall, plans: Plans) -> Scalars:
        options = call.options
        return Scalars(
            scale=call.scale,
            kernel=call.kernel,
            exchange=plans.exchange,
            group_name=plans.group_name or self.host.ranks.name,
            wire=self.host.config.gradient_wire_dtype or "",
            deterministic=self.host.config.deterministic,
            softcap=float(options.softcap or 0.0),
            dropout_p=float(options.dropout_p or 0.0),
            dropout_seed=options.dropout_seed or 0,
            layer=options.layer_number or 0,
            first_head=call.first_head,
            tokens=plans.tokens if options.dropout_p else (0, 0),
            repeats=call.repeats,
        )

    def attend_whole(self, call: AttentionCall, *, last: bool = True) -> AttentionResult:
        """Attention over whole documents held on this rank, by the built-in kernels or the caller's own.

        Args:
            call: a call whose tensors hold all tokens in global order, ``[B, S, heads, D]``; see
                :meth:`AttentionCall.replaced`.
            last: see :meth:`attend`.

        Returns:
            ``out [B, S, heads, D_v]`` and, but from a caller's own attention, ``lse [B, S, heads]``.
        """
        if call.module is None:
            return self.attend(call, last=last)
        return AttentionResult(self._call_module(call), None, None)

    def settled(self, call: AttentionCall, result: AttentionResult) -> Tensor | AttentionResult:
        """What ``core_attn`` returns, from local rows of all heads; settles the largest score over the group.

        Args:
            call: the call.
            result: see :meth:`compute`.
        """
        if call.wants_max_logit and result.max_logit is not None:
            largest = result.max_logit
            if self.host.ranks.size > 1:
                largest = collectives.maximum(largest, self.host.ranks.name)
            if call.core is not None:
                call.core.record(largest)
            result = result._replace(max_logit=largest)
        return call.arranged(result)

    @untraced
    def _call_module(self, call: AttentionCall) -> Tensor:
        """Give whole documents to the caller's module; where it raises on one rank, the others are told."""
        try:
            return self._result_of_module(call)
        except _STOPS:  # a layer is computed again, and what is needed of it has been
            raise
        except BaseException:
            end(self.host.ranks.name)
            raise

    def _result_of_module(self, call: AttentionCall) -> Tensor:
        """What the caller's module makes of whole documents, padding removed."""
        queries, keys, form = self.host.queries, self.host.keys, self.host.qkv_format
        tensors = [
            _without_padding(from_batch_first(x, form), stream)
            for x, stream in zip((call.q, call.k, call.v), (queries, keys, keys), strict=True)
        ]
        packed = form == "thd"
        out = call.module(
            *tensors,
            cu_seqlens_q=_valid_offsets(queries, call.q.device) if packed else None,
            cu_seqlens_kv=_valid_offsets(keys, call.q.device) if packed else None,
            max_seqlen_q=_longest(queries) if packed else queries.max_seqlen,
            max_seqlen_kv=_longest(keys) if packed else keys.max_seqlen,
            mask=call.mask,
        )
        expected = (*tensors[0].shape[:-1], call.v.shape[-1])
        if not isinstance(out, Tensor) or out.shape != expected:
            got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise InvalidValueError(
                "attn_mod must return [..., heads, D_v] in qkv_format", got=got, fix=f"expected {list(expected)}"
            )
        if queries.documents.has_padding:
            kept = device_copy(queries.documents.valid_tokens, out.device)
            out = out.new_zeros(queries.documents.num_tokens, *out.shape[1:]).index_copy(0, kept, out)
        return batch_first(out, form)


_STOPS: tuple[type[BaseException], ...] = tuple(filter(None, [getattr(checkpoint, "_StopRecomputationError", None)]))
"""What activation checkpointing raises in the midst of a layer, on every rank alike."""


def _are_alike(one: Mask, other: Mask | None) -> bool:
    """Whether two masks are one by value."""
    return type(one) is type(other) and one == other


def _is_own(attn_mod: Any) -> bool:
    """Whether a caller's own function computes attention."""
    return attn_mod is not None and not isinstance(attn_mod, CoreAttention)


def batch_features(queries: StreamMetadata, keys: StreamMetadata, config: CPConfig) -> list[str]:
    """What a batch and its settings ask of a handler class, by the names of its capability table.

    Args:
        queries: the query stream.
        keys: the key stream; the same object for self attention.
        config: settings.
    """
    asked = {
        "cross_attention": keys is not queries,
        "key_padding_mask": keys.padded_rows is not None,
        "gradient_wire_dtype": config.gradient_wire_dtype is not None,
        "ulysses_degree": config.ulysses_degree is not None,
    }
    return [feature for feature, given in asked.items() if given]


def _without_padding(x: Tensor, stream: StreamMetadata) -> Tensor:
    """The rows of real tokens."""
    if not stream.documents.has_padding:
        return x
    return x.index_select(0, device_copy(stream.documents.valid_tokens, x.device))


def _valid_offsets(stream: StreamMetadata, device: torch.device) -> Tensor:
    """``cu_seqlens`` of the real tokens."""
    return as_int32(stream.documents.valid_offsets, device)


def _longest(stream: StreamMetadata) -> int:
    """Real tokens of the longest document."""
    offsets = stream.documents.valid_offsets
    return int((offsets[1:] - offsets[:-1]).max(initial=0))
