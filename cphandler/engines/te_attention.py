"""Attention by TransformerEngine: one call of its ``DotProductAttention``, under its own context parallelism."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cphandler.attention.attention import Attention
from cphandler.attention.call import AttentionCall, batch_first, from_batch_first
from cphandler.attention.capabilities import Capabilities
from cphandler.attention.loop import AttentionResult
from cphandler.attention.options import AttentionOptions, CoreAttention, OptionalArguments
from cphandler.comm.groups import level_groups, two_levels
from cphandler.engines import te_package as te
from cphandler.errors import InvalidTypeError, InvalidValueError, UnsupportedError
from cphandler.layouts.layout import Layout, contiguous, padded_offsets, padded_zigzag
from cphandler.precision import accumulator_dtype
from cphandler.sharding.shard import Shard
from cphandler.tensors import device_copy
from cphandler.tokens.documents import Documents
from cphandler.tokens.intervals import Flags
from cphandler.tokens.masks import Mask, SlidingWindow
from cphandler.tracing import untraced

PACKED_SINCE = {"p2p": te.OLDEST, "a2a": (2, 10), "all_gather": (2, 18), "a2a+p2p": (2, 19)}
"""The first version that takes packed documents over several ranks, by comm type."""

_REASONS = {
    "softcap": "TransformerEngine caps scores from 2.20 on and by flash-attn 2 alone; use a local backend",
    "sinks": "TransformerEngine has sinks over several ranks with 'a2a' alone; use that, or a local backend",
    "dropout": "TransformerEngine draws other weights on every rank and takes no seed; use a local backend",
    "return_lse": "TransformerEngine does not give its log-sum-exp out; use a local backend",
    "key_padding_mask": "TransformerEngine's dense formats have no padding over several ranks; pack the rows "
    "(qkv_format='thd', cu_seqlens_q and cu_seqlens_q_padded), or use a local backend",
    "own_attention": "pass None, a CoreAttention or TransformerEngine's DotProductAttention",
    "gradient_wire_dtype": "leave it None: TransformerEngine sends gradients in the dtype of the tensors",
    "ulysses_degree": "leave it None, or use 'a2a+p2p'",
}

_FEATURES = frozenset({"softmax_scale", "return_max_logit", "value_head_dim", "cross_attention"})


def capability_table(*further: str, windows: bool = False) -> Capabilities:
    """What a handler over TransformerEngine serves: what all do, further features, and windows where it has them."""
    masks = ("Causal", "Full", "SlidingWindow") if windows else ("Causal", "Full")
    features = _FEATURES | set(further)
    return Capabilities(layouts=(), features=features, instead=_REASONS, masks=masks, cross_masks=("Full",))


def engine_layout(documents: Documents, cp_size: int) -> Layout:
    """Which rank holds which rows, as the engine has it; that of an equal batch is found again."""
    return _layout(documents.offsets.tobytes(), cp_size)


@lru_cache(maxsize=32)
def _layout(offsets: bytes, cp_size: int) -> Layout:
    table = np.frombuffer(offsets, dtype=np.int64)
    return padded_zigzag(table, cp_size) if cp_size > 1 else contiguous(table, 1)


class TEAttention(Attention):
    """One call of a ``DotProductAttention`` over local rows; its own messages, between its own groups."""

    comm_type: ClassVar[str] = "p2p"

    engine = "TransformerEngine"

    @property
    def multiple(self) -> int:
        """What the rows of each document must divide by."""
        size = self.host.ranks.size
        return 2 * size if size > 1 else 1

    @property
    def is_packed(self) -> bool:
        """Whether rows go to the engine as packed documents.

        Also those of a dense batch whose length does not divide: the engine's dense formats have no padding.
        """
        lengths = self.host.queries.documents.num_tokens, self.host.keys.documents.num_tokens
        return self.host.qkv_format == "thd" or any(length % self.multiple for length in lengths)

    def check_batch(self) -> None:
        """See :meth:`Attention.check_batch`."""
        super().check_batch()
        config = self.host.config
        if config.kernel != "auto":
            raise UnsupportedError(
                "TransformerEngine chooses its kernels itself",
                got=f"CPConfig.kernel {config.kernel!r}",
                fix="leave it at 'auto'; NVTE_FLASH_ATTN and NVTE_FUSED_ATTN tell TransformerEngine",
            )
        if config.deterministic and not te.is_deterministic():
            raise UnsupportedError(
                "TransformerEngine is deterministic where it is told so when its modules are made",
                got="CPConfig.deterministic alone",
                fix="set NVTE_ALLOW_NONDETERMINISTIC_ALGO=0, or call torch.use_deterministic_algorithms(True)",
            )
        self._check_packed()

    def _check_packed(self) -> None:
        """Refuse packed documents where this version has none for this comm type."""
        installed, since = te.engine(), PACKED_SINCE[self.used_type]
        if self.host.ranks.size == 1 or not self.is_packed or installed.version >= since:
            return
        dense = self.host.qkv_format != "thd"
        raise UnsupportedError(
            f"{installed} has no packed documents with {self.used_type!r}"
            + (f", which a dense length that does not divide by {self.multiple} goes as" if dense else ""),
            got=f"qkv_format {self.host.qkv_format!r}",
            fix=f"install {te.dotted(since)} or a later one, or use 'p2p'"
            + (f", or pad the sequence to a multiple of {self.multiple}" if dense else ""),
        )

    @cached_property
    def head_parts(self) -> int:
        """Ranks that heads are spread over."""
        if self.comm_type == "a2a+p2p":
            return two_levels(self.host.ranks, self.host.config.ulysses_degree).inner.size
        return self.host.ranks.size if self.comm_type == "a2a" else 1

    @property
    def used_type(self) -> str:
        """The comm type as the engine is told: of two levels, one alone where the other one has one rank."""
        if self.comm_type != "a2a+p2p" or 1 < self.head_parts < self.host.ranks.size:
            return self.comm_type
        return "p2p" if self.head_parts == 1 else "a2a"

    def plan(self, mask: Mask) -> None:
        """Refuse a mask that is not served; the engine plans by itself."""
        self.capabilities.require_mask(self.name, mask, crossing=self.host.shards.is_crossing)

    @untraced
    def __call__(self, attn_mod: Any, tensors: tuple[Tensor, Tensor, Tensor], options: OptionalArguments) -> Any:
        """See :meth:`Attention.__call__`."""
        return super().__call__(attn_mod, tensors, options)

    @untraced
    def checked(
        self, attn_mod: Any, tensors: tuple[Tensor, Tensor, Tensor], options: OptionalArguments
    ) -> AttentionCall:
        """See :meth:`Attention.checked`; the call's module is the caller's ``DotProductAttention``, or one of ours."""
        host = self.host

        def check() -> AttentionCall:
            given = self._given(attn_mod)
            call = AttentionCall.of(
                attn_mod if given is None else None,
                tensors,
                options=AttentionOptions.checked(options),
                rules=self._rules,
                mask=host.mask,
                config=host.config,
            )
            self._check_capabilities(call)
            self._check_tangents(call)
            call = call._replace(module=given)
            self.check_call(call)
            return call if given is not None else call._replace(module=self._made(call))

        return host.agreed("core_attn", check, lambda call: f"{call.describe()}, {host.shown_mask(call.mask)}")

    def _given(self, attn_mod: Any) -> Any:
        """The caller's own ``DotProductAttention``, or None for one of ours."""
        if attn_mod is None or isinstance(attn_mod, CoreAttention):
            return None
        if isinstance(attn_mod, te.engine().attention):
            return attn_mod
        raise UnsupportedError(
            f"{self.name} computes by TransformerEngine's DotProductAttention and no other module",
            got=type(attn_mod).__name__,
            fix="pass None, a CoreAttention or a transformer_engine.pytorch.DotProductAttention, or use the ulysses "
            "backend, which takes callables",
        )

    def check_call(self, call: AttentionCall) -> None:
        """See :meth:`Attention.check_call`."""
        self._check_tensors(call)
        if self.host.ranks.size > 1 and not isinstance(self.host.ranks.source, dist.ProcessGroup):
            raise InvalidTypeError(
                "TransformerEngine sends its messages in a process group",
                got=type(self.host.ranks.source).__name__,
                fix="make the handler with a ProcessGroup or a DeviceMesh",
            )
        if call.module is not None:
            self._check_given(call, call.module)
        self._check_heads(call)
        self._check_version(call)
        if call.sinks is not None and te.is_deterministic():
            raise UnsupportedError(
                "TransformerEngine has no deterministic attention with sinks",
                got="NVTE_ALLOW_NONDETERMINISTIC_ALGO=0, or torch.use_deterministic_algorithms(True)",
                fix="switch that off, or use a local backend",
            )

    @staticmethod
    def _extras(call: AttentionCall) -> tuple[bool, bool]:
        """Whether the engine will compute sinks, and the largest logit; a module of the caller's may want to."""
        module = call.module
        sinks = call.sinks is not None if module is None else module.softmax_type != "vanilla"
        return sinks, call.wants_max_logit if module is None else bool(module.return_max_logit)

    def _check_version(self, call: AttentionCall) -> None:
        """Refuse what the installed version has not yet."""
        sinks, largest = self._extras(call)
        widens = call.q.shape[-1] != call.v.shape[-1] and self._gathers
        asked = (
            ("largest logit of packed documents", self.is_packed and largest, (2, 11)),
            ("sinks over packed documents", self.is_packed and sinks, (2, 12)),
            ("values of another head dim than the queries' with 'all_gather'", widens, (2, 15)),
        )
        installed = te.engine()
        for what, holds, since in asked:
            if holds and installed.version < since:
                raise UnsupportedError(
                    f"{installed} has no {what}",
                    fix=f"install {te.dotted(since)} or a later one, or use a local backend",
                )

    @property
    def _gathers(self) -> bool:
        return self.comm_type == "all_gather" and self.host.ranks.size > 1

    @staticmethod
    def _check_tensors(call: AttentionCall) -> None:
        """Refuse what none of the engine's kernels for several ranks takes."""
        device, dtype, longest = call.q.device, call.q.dtype, max(call.q.shape[-1], call.v.shape[-1])
        if device.type not in te.hardware.devices:
            raise UnsupportedError(
                "TransformerEngine computes on CUDA tensors only", got=device, fix="move them, or use a local backend"
            )
        if dtype not in te.hardware.dtypes:
            raise UnsupportedError(
                "TransformerEngine has no context parallelism for this dtype",
                got=dtype,
                fix="cast queries, keys and values to bfloat16 or float16, or use a local backend",
            )
        if longest % te.hardware.head_dim_multiple:
            raise UnsupportedError(
                f"TransformerEngine's kernels want head dims that are multiples of {te.hardware.head_dim_multiple}",
                got=longest,
                fix="pad the channels with zeros and name the softmax_scale, or use a local backend",
            )

    def _check_heads(self, call: AttentionCall) -> None:
        """Refuse heads that cannot be spread evenly, and those that its only kernel for an option refuses."""
        heads, parts = (call.q.shape[2], call.k.shape[2]), self.head_parts
        if any(number % parts for number in heads):
            raise UnsupportedError(
                f"TransformerEngine spreads query and key heads evenly over the {parts} ranks of {self.comm_type}",
                got=f"{heads[0]} and {heads[1]} heads",
                fix=f"use multiples of {parts}, or 'p2p', or the ulysses backend, which serves any number of heads",
            )
        if parts > 1 and any(number % 2 for number in heads) and any(self._extras(call)):
            raise UnsupportedError(
                "TransformerEngine computes sinks and the largest logit with its cuDNN kernels alone, which want even "
                f"numbers of heads with {self.comm_type}",
                got=f"{heads[0]} and {heads[1]} heads",
                fix="leave the option out, or use the ulysses backend",
            )

    def _check_given(self, call: AttentionCall, module: Any) -> None:
        """Refuse a module that was made for something else than this call asks of it."""
        heads, dims = call.k.shape[2], (call.q.shape[-1], call.v.shape[-1])
        wanted = {
            "num_gqa_groups_per_partition": (heads, "key heads"),
            "hidden_size_per_attention_head_k": (dims[0], "query channels"),
            "hidden_size_per_attention_head_v": (dims[1], "value channels"),
        }
        for name, (number, what) in wanted.items():
            if getattr(module, name) != number:
                raise InvalidValueError(
                    f"the DotProductAttention was made for other {what}",
                    got=f"{number} for {name} {getattr(module, name)}",
                    fix="make it for the tensors' heads and channels, or pass attn_mod=None",
                )
        asked, vanilla = call.options, module.softmax_type == "vanilla"
        scale, several = asked.softmax_scale, self.host.ranks.size > 1
        refused = {
            "has a softmax_scale of its own": scale is not None and scale != module.softmax_scale,
            "has a softmax of its own, and takes no sinks from outside": asked.sinks is not None,
            "was made without return_max_logit": call.wants_max_logit and not module.return_max_logit,
            "is deterministic and has sinks, which TransformerEngine computes otherwise": module.deterministic
            and not vanilla,
            "is not deterministic": self.host.config.deterministic and not module.deterministic,
            f"has sinks, which TransformerEngine has with 'a2a' alone, not with {self.comm_type!r}": not vanilla
            and several
            and self.comm_type != "a2a",
        }
        for why, holds in refused.items():
            if holds:
                raise UnsupportedError(
                    f"the DotProductAttention {why}", fix="make it with what the call asks for, or pass attn_mod=None"
                )
        kind: Any = type(module)
        lacking = te.not_taken(kind)
        if lacking:
            raise UnsupportedError(
                "the attn_mod is a subclass of DotProductAttention whose forward takes other arguments",
                got=f"{kind.__qualname__} without {', '.join(lacking)}",
                fix="pass TransformerEngine's own DotProductAttention, or attn_mod=None",
            )

    def _made(self, call: AttentionCall) -> Any:
        """A module of ours that fits a call."""
        wanted = te.Wanted(
            heads=call.q.shape[2],
            key_heads=call.k.shape[2],
            dims=(call.q.shape[-1], call.v.shape[-1]),
            scale=call.scale,
            has_sinks=call.sinks is not None,
            max_logit=call.wants_max_logit,
            crossing=self.host.shards.is_crossing,
            layer=call.options.layer_number,
            device=call.q.device,
            deterministic=te.is_deterministic(),
        )
        return te.attention_module(te.engine().attention, wanted)

    def compute(self, call: AttentionCall) -> AttentionResult:
        """See :meth:`Attention.compute`."""
        pair, device = self.host.shards, call.q.device
        tokens = pair.queries.documents.num_valid_tokens, pair.keys.documents.num_valid_tokens
        if 0 in (*tokens, call.q.numel(), call.k.numel()):
            return _nothing(call)
        q = _cleared(call.q, self._hidden("q", device))
        k, v = (_cleared(x, self._hidden("kv", device)) for x in (call.k, call.v))
        form = "thd" if self.is_packed else self.host.qkv_format
        tensors = [x.reshape(-1, *x.shape[2:]) if form == "thd" else from_batch_first(x, form) for x in (q, k, v)]
        with self._grouped(call.module, device):
            returned = self._run(call, tensors, self._described(call, form))
        out, largest = returned if isinstance(returned, tuple) else (returned, None)
        heads, channels = call.q.shape[2], call.v.shape[-1]
        if form == "thd":
            out = out.reshape(*call.q.shape[:2], heads, channels)
        else:
            out = batch_first(out.reshape(*out.shape[:2], heads, channels), form)
        out = _cleared(out, self._hidden("rows", device))
        self.host.watched(out)
        if largest is not None:
            largest = largest.detach().to(accumulator_dtype(call.q.dtype))
        return AttentionResult(out, None, largest)

    def _run(self, call: AttentionCall, tensors: list[Tensor], described: Mapping[str, Any]) -> Any:
        """Call the module, whose sinks then have this rank's part of their gradient."""
        module, sinks = call.module, call.sinks
        if sinks is None and module.softmax_type == "learnable":
            sinks = module.softmax_offset
        if sinks is None:
            return module(*tensors, **described)
        size, rank, heads = self.host.ranks.size, self.host.ranks.rank, call.q.shape[2]
        own: Tensor = _OwnHeads.apply(sinks, rank * heads // size, (rank + 1) * heads // size)  # type: ignore[no-untyped-call]
        return torch.func.functional_call(module, {"softmax_offset": own}, tuple(tensors), dict(described))

    def settled(self, call: AttentionCall, result: AttentionResult) -> Tensor | AttentionResult:
        """See :meth:`Attention.settled`; the engine has compared the ranks' largest scores already."""
        if call.core is not None and call.wants_max_logit and result.max_logit is not None:
            call.core.record(result.max_logit)
        return call.arranged(result)

    def _described(self, call: AttentionCall, form: str) -> dict[str, Any]:
        """What the engine is told of the batch and the mask: all of it global."""
        causal, longest = call.mask.is_causal, max(self._longest("q"), self._longest("kv"))
        window = (-1, 0 if causal else -1)
        if isinstance(call.mask, SlidingWindow):
            window = min(call.mask.left, longest), min(call.mask.right, longest)
        name = "causal" if causal else "no_mask"
        described: dict[str, Any] = {"qkv_format": form, "attn_mask_type": name, "window_size": window}
        if form != "thd":
            return {**described, "pad_between_seqs": False}
        described["attn_mask_type"] = "padding_causal" if causal else "padding"
        rows = 1 if self.host.qkv_format == "thd" else call.q.shape[0]
        padded = False
        for stream in ("q", "kv"):
            valid, physical = self._offsets(stream, rows, call.q.device)
            described |= {f"cu_seqlens_{stream}": valid, f"cu_seqlens_{stream}_padded": physical}
            described[f"max_seqlen_{stream}"] = self._longest(stream)
            padded = padded or self._has_padding(stream)
        # flash-attn 2 and 4 go wrong, and say nothing, over packed documents that were gathered: padding rules them out
        return {**described, "pad_between_seqs": padded or self._gathers}

    def _longest(self, stream: str) -> int:
        """The longest document of a stream, padded."""
        longest = (self.host.queries if stream == "q" else self.host.keys).max_seqlen
        return -(-longest // self.multiple) * self.multiple

    def _has_padding(self, stream: str) -> bool:
        documents = self.host.shards[stream].documents
        return documents.has_padding or bool((documents.lengths % self.multiple).any())

    def _offsets(self, stream: str, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """``[D + 1]`` int32 offsets of valid and of physical tokens; a dense batch's rows are documents. Cached."""
        shard = self.host.shards[stream]

        def made() -> tuple[Tensor, Tensor]:
            documents = shard.documents
            both = documents.valid_offsets, padded_offsets(documents.offsets, self.multiple)
            if rows != 1:
                both = tuple(np.arange(rows + 1) * offsets[-1] for offsets in both)
            valid, physical = (device_copy(offsets, device).to(torch.int32) for offsets in both)
            return valid, physical

        return shard.memo.on(("engine offsets", rows, self.multiple), device, made)

    def _hidden(self, which: str, device: torch.device) -> Tensor | None:
        """``[1, L, 1, 1]`` bool: rows whose numbers mean nothing; None where there are none. Cached.

        Of queries or keys, pad and padding rows; of results (``"rows"``), also those whose document has no key.
        """
        pair = self.host.shards
        shard = pair["kv" if which == "kv" else "q"]
        key = ("engine rows", which)
        hidden, rows = pair.memo.on(key, device, lambda: _device_flags(self._hidden_rows(shard, which), device))
        return rows if hidden else None

    def _hidden_rows(self, shard: Shard, which: str) -> Flags:
        hidden: Flags = ~shard.valid
        keys = self.host.shards.keys.documents
        if which == "rows" and self.host.shards.is_crossing and len(shard.tokens):
            blind = np.append(np.diff(keys.valid_offsets) == 0, True)
            document = shard.documents.document_of(np.maximum(shard.tokens, 0))
            hidden = hidden | blind[document]
        return hidden

    @contextmanager
    def _grouped(self, module: Any, device: torch.device) -> Iterator[None]:
        """The module in this handler's group; afterwards, and after an error, in the one it was in."""
        names = ("cp_group", "cp_global_ranks", "cp_stream", "cp_comm_type", "load_balancing_strategy")
        former = {name: getattr(module, name) for name in names if hasattr(module, name)}
        group, ranks, stream = self._placement(device)
        try:
            module.set_context_parallel_group(
                cp_group=group, cp_global_ranks=ranks, cp_stream=stream, cp_comm_type=self.used_type
            )
            yield
        finally:
            module.set_context_parallel_group(**former)

    def _placement(self, device: torch.device) -> tuple[Any, list[int] | None, Any]:
        """The group as the engine wants it, all its ranks in its order, and the side stream; nothing for one rank."""
        group = self.host.ranks
        if group.size == 1:
            return None, None, None
        ranks, stream = dist.get_process_group_ranks(group.source), te.hardware.side_stream(device)
        if self.used_type != "a2a+p2p":
            return group.source, ranks, stream
        return list(level_groups(group, self.head_parts)), ranks, stream  # inner first: a2a, then p2p


class TEGatherAttention(TEAttention):
    """Keys of all ranks are gathered."""

    comm_type = "all_gather"


class TEUlyssesAttention(TEAttention):
    """Heads for tokens."""

    comm_type = "a2a"


class TEUSPAttention(TEAttention):
    """Heads for tokens inside, keys round a ring outside."""

    comm_type = "a2a+p2p"


class _OwnHeads(torch.autograd.Function):
    """Sinks whose gradient, which the engine gives every rank whole, is left to one rank for each head."""

    @staticmethod
    def forward(ctx: Any, sinks: Tensor, first: int, stop: int) -> Tensor:
        ctx.first, ctx.stop = first, stop
        return sinks.view_as(sinks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        part = torch.zeros_like(grad)
        part[ctx.first : ctx.stop] = grad[ctx.first : ctx.stop]
        return part, None, None


def _nothing(call: AttentionCall) -> AttentionResult:
    """The result where no query is real, or no key; it passes on zeros."""
    inputs = [x for x in (call.q, call.k, call.v, call.sinks) if x is not None]
    zero = sum(x.masked_fill(torch.ones_like(x, dtype=torch.bool), 0).sum() for x in inputs).to(call.q.dtype)  # type: ignore[union-attr]
    out = call.q.new_zeros(*call.q.shape[:3], call.v.shape[-1]) + zero
    largest = call.q.new_full((call.q.shape[2],), float("-inf"), dtype=accumulator_dtype(call.q.dtype))
    return AttentionResult(out, None, largest.detach() if call.wants_max_logit else None)


def _cleared(x: Tensor, hidden: Tensor | None) -> Tensor:
    """``[B, L, heads, D]`` with zeros, and without a gradient, in rows that mean nothing."""
    return x if hidden is None else x.masked_fill(hidden, 0)


def _device_flags(hidden: Flags, device: torch.device) -> tuple[bool, Tensor]:
    return bool(hidden.any()), device_copy(hidden, device).view(1, -1, 1, 1)
