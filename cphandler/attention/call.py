"""One checked call of ``core_attn``: tensors in a common shape, options settled, refusals made."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cphandler.attention.loop import AttentionResult
from cphandler.attention.options import AttentionOptions, CoreAttention, OptionalArguments, check_tensor
from cphandler.comm.consistency import kind_of
from cphandler.config import CPConfig
from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.kernels import select_kernel
from cphandler.precision import ATTENTION_DTYPES
from cphandler.tensors import where_rows_are
from cphandler.tokens.masks import Mask, is_value, make_mask

MOST_SIGNATURES = 64
"""Kinds of tensors that a handler remembers to have found right."""


def _signature(tensors: tuple[Tensor, Tensor, Tensor]) -> Hashable | None:
    """All that the checks of plain tensors look at, and the choice of a kernel; None for what is not just a tensor."""
    for x in tensors:
        if type(x) is not Tensor or x.layout is not torch.strided or x.is_nested:
            return None
    q, k, v = tensors
    return q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device


_PLAIN = frozenset({type(None), bool, int, float, str})


def kind_of_call(attn_mod: Any, tensors: tuple[Tensor, Tensor, Tensor], options: OptionalArguments) -> Hashable | None:
    """All that the checks of a call look at, and what is settled by it; None where some of it may change unseen.

    Types count: True is no 1. A module may be given other settings, a tensor other numbers, and a seed comes once.
    """
    if attn_mod is not None:
        return None
    signature = _signature(tensors)
    if signature is None or not options:
        return signature
    values = tuple(options.values())
    for value in values:
        if type(value) not in _PLAIN and not (isinstance(value, Mask) and is_value(value)):
            return None
    if options.get("dropout_p"):
        return None
    return signature, tuple(options), values, tuple(map(type, values))


@dataclass(frozen=True)
class TensorRules:
    """What queries, keys and values of a handler must look like.

    Attributes:
        qkv_format: order of dims.
        local_tokens: rows of this rank, of queries and of keys.
        batch: rows of the batch where the handler knows them (key-padding mask), else None.
        explain: what a wrong length, given the right one and the stream, probably means.
        passed: signatures of tensors that were found right, and the kernels chosen for them, by what was asked.
    """

    qkv_format: str
    local_tokens: tuple[int, int]
    batch: int | None
    explain: Callable[..., str]
    passed: dict[Hashable, dict[Hashable, str]] = field(default_factory=dict)

    def kernels_for(self, tensors: tuple[Tensor, Tensor, Tensor]) -> dict[Hashable, str]:
        """The kernels that were chosen for tensors like these, once they have been checked: as every layer has them.

        Raises:
            InvalidTypeError: see :meth:`check`.
            InvalidValueError: see :meth:`check`.
        """
        signature = _signature(tensors)
        known = None if signature is None else self.passed.get(signature)
        if known is not None:
            return known
        self.check(*tensors)
        if signature is None:
            return {}
        if len(self.passed) >= MOST_SIGNATURES:
            self.passed.clear()
        return self.passed.setdefault(signature, {})

    def check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Raise what is wrong with the three tensors.

        Raises:
            InvalidTypeError: what :func:`check_tensor` refuses, or mixed dtypes.
            InvalidValueError: wrong shapes or devices.
        """
        named = {"query": query, "key": key, "value": value}
        self._check_kinds(named)
        dims = 3 if self.qkv_format == "thd" else 4
        letters = {"sbhd": "[L, B, heads, D]", "bshd": "[B, L, heads, D]", "thd": "[L, heads, D]"}[self.qkv_format]
        seq_dim = 1 if self.qkv_format == "bshd" else 0
        for name, x in named.items():
            if x.dim() != dims:
                raise InvalidValueError(
                    f"{name} must be {letters}",
                    got=f"shape {list(x.shape)}",
                    fix=f"reshape it, or make the handler with another qkv_format than {self.qkv_format!r}",
                )
            rows, stream = (self.local_tokens[0], "q") if name == "query" else (self.local_tokens[1], "kv")
            if x.shape[seq_dim] != rows:
                elsewhere = where_rows_are(x.shape, seq_dim, rows)
                raise InvalidValueError(
                    f"{name} must hold this rank's {rows} rows in dim {seq_dim}",
                    got=f"shape {list(x.shape)}",
                    fix=f"{self.explain(x.shape[seq_dim], rows, stream, elsewhere=elsewhere)}; {name} is {letters}",
                )
        self._check_sizes(query, key, value)

    def check_traced(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """:meth:`check` without its explanations, which a compiler would trace.

        Raises:
            InvalidTypeError: mixed dtypes, or one that attention does not compute in.
            InvalidValueError: wrong shapes or devices.
        """
        way_out = "call core_attn outside of torch.compile to be told what is wrong"
        if not query.dtype == key.dtype == value.dtype or query.dtype not in ATTENTION_DTYPES:
            raise InvalidTypeError("query, key and value must share one dtype that attention computes in", fix=way_out)
        dims, seq_dim = 3 if self.qkv_format == "thd" else 4, 1 if self.qkv_format == "bshd" else 0
        batch = 1 - seq_dim
        fits = query.dim() == key.dim() == value.dim() == dims and query.device == key.device == value.device
        fits = fits and query.shape[seq_dim] == self.local_tokens[0] and query.shape[-1] == key.shape[-1]
        fits = fits and key.shape[seq_dim] == value.shape[seq_dim] == self.local_tokens[1]
        fits = fits and key.shape[-2] == value.shape[-2] != 0 and query.shape[-2] % key.shape[-2] == 0
        if fits and dims == 4:
            fits = query.shape[batch] == key.shape[batch] == value.shape[batch] == (self.batch or query.shape[batch])
        if not fits:
            raise InvalidValueError("query, key and value do not have the handler's rows, or do not fit", fix=way_out)

    @staticmethod
    def _check_kinds(named: dict[str, Any]) -> None:
        for name, x in named.items():
            check_tensor(name, x)
        for what in ("dtype", "device"):
            seen = {name: getattr(x, what) for name, x in named.items()}
            if len(set(seen.values())) > 1:
                kind = InvalidTypeError if what == "dtype" else InvalidValueError
                listed = ", ".join(f"{name} {value}" for name, value in seen.items())
                raise kind(f"query, key and value must share one {what}", got=listed, fix="cast or move them first")

    def _check_sizes(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if self.qkv_format != "thd":
            batch_dim = 0 if self.qkv_format == "bshd" else 1
            sizes = [x.shape[batch_dim] for x in (query, key, value)]
            if len(set(sizes)) > 1 or (self.batch is not None and sizes[0] != self.batch):
                want = f" of the {self.batch} rows that the handler's masks have" if self.batch is not None else ""
                raise InvalidValueError(
                    f"query, key and value must have one batch size{want}",
                    got=sizes,
                    fix=f"the batch is dim {batch_dim} in {self.qkv_format}",
                )
        heads, key_heads, value_heads = (x.shape[-2] for x in (query, key, value))
        if key_heads != value_heads:
            raise InvalidValueError(
                "key and value must have the same heads",
                got=f"{key_heads} and {value_heads}",
                fix="repeat the heads of the one that has fewer",
            )
        if key_heads == 0 or heads % key_heads:
            raise InvalidValueError(
                "the query heads must be a multiple of the key heads",
                got=f"{heads} and {key_heads}",
                fix="query head n uses key head n // (N // G)",
            )
        if query.shape[-1] != key.shape[-1]:
            raise InvalidValueError(
                "query and key must have one head dim",
                got=f"{query.shape[-1]} and {key.shape[-1]}",
                fix="only values may have another",
            )
        if 0 in (query.shape[-1], value.shape[-1]):
            raise InvalidValueError(
                "the head dim must not be 0",
                got=f"{query.shape[-1]} for queries, {value.shape[-1]} for values",
                fix="pass tensors with at least one channel in their last dim",
            )


class AttentionCall(NamedTuple):
    """A checked call.

    Attributes:
        q: ``[B, L, N, D]``; B is 1 for ``thd``.
        k: ``[B, L, G, D]``.
        v: ``[B, L, G, D_v]``.
        module: the caller's own attention over whole documents, or None for the built-in kernels.
        mask: who sees whom.
        scale: factor on the scores.
        kernel: name of the built-in kernel.
        qkv_format: how results are arranged.
        options: what else was asked for.
        core: the :class:`CoreAttention` that was given, which records the largest score; None for none.
        sinks: ``[N]``, or None.
        first_head: number in the model of the first head in ``q``.
        repeats: how many query heads in ``q`` use each key head, where they are uneven; else empty.
        prepared: what attention needs, where it was found before the call was traced; None where it is looked up.
        kept: what follows from a call of its kind alone, kept from call to call; None where nothing may be.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    module: Any
    mask: Mask
    scale: float
    kernel: str
    qkv_format: str
    options: AttentionOptions
    core: CoreAttention | None
    sinks: Tensor | None
    first_head: int
    repeats: tuple[int, ...]
    prepared: Any = None
    kept: dict[Hashable, Any] | None = None

    @classmethod
    def of(
        cls,
        attn_mod: Any,
        tensors: tuple[Tensor, Tensor, Tensor],
        *,
        options: AttentionOptions,
        rules: TensorRules,
        mask: Mask,
        config: CPConfig,
    ) -> AttentionCall:
        """Check everything and settle the options.

        Raises:
            InvalidTypeError: see :meth:`TensorRules.check`, or an ``attn_mod`` that cannot be called.
            InvalidValueError: see :meth:`TensorRules.check`, sinks of another shape, or dropout without a seed.
            UnsupportedError: see :func:`select_kernel`.
        """
        kernels = rules.kernels_for(tensors)
        core = attn_mod if isinstance(attn_mod, CoreAttention) else None
        module = attn_mod if core is None else None
        if module is not None and not callable(module):
            raise InvalidTypeError(
                "attn_mod must be None, a CoreAttention or a callable",
                got=type(module).__name__,
                fix="pass None for the built-in kernels; query, key and value come after it",
            )
        options = options if core is None else core.applied_to(options)
        q, k, v = (batch_first(x, rules.qkv_format) for x in tensors)
        _check_sinks(options.sinks, q)
        if options.dropout_p and (options.dropout_seed is None or options.layer_number is None):
            raise InvalidValueError(
                "dropout needs a dropout_seed and a layer_number",
                got=f"dropout_p {options.dropout_p}, seed {options.dropout_seed}, layer {options.layer_number}",
                fix="pass dropout_seed=, the same on all ranks and another in every step, and layer_number= from 1",
            )
        scale = float(q.shape[-1]) ** -0.5 if options.softmax_scale is None else float(options.softmax_scale)
        chosen = mask if options.mask is None else make_mask(options.mask)
        softcap, dropout = options.softcap is not None, bool(options.dropout_p)
        name = kernels.get((softcap, dropout))
        if name is None:
            asked = {"deterministic": config.deterministic, "softcap": softcap, "dropout": dropout}
            name = kernels[softcap, dropout] = select_kernel(config.kernel, q, k, v, **asked)
        form = rules.qkv_format
        return cls(q, k, v, module, chosen, scale, name, form, options, core, options.sinks, 0, ())

    @classmethod
    def traced(
        cls,
        attn_mod: CoreAttention | None,
        tensors: tuple[Tensor, Tensor, Tensor],
        options: AttentionOptions,
        rules: TensorRules,
        mask: Mask,
    ) -> AttentionCall:
        """As :meth:`of`, in words that a compiler can trace, without a kernel and what dropout asks for.

        Raises:
            InvalidTypeError: mixed dtypes, or one that attention does not compute in.
            InvalidValueError: wrong shapes or devices.
        """
        rules.check_traced(*tensors)
        options = options if attn_mod is None else attn_mod.applied_to(options)
        q, k, v = (batch_first(x, rules.qkv_format) for x in tensors)
        _check_sinks(options.sinks, q)
        scale = float(q.shape[-1]) ** -0.5 if options.softmax_scale is None else float(options.softmax_scale)
        form = rules.qkv_format
        return cls(q, k, v, None, mask, scale, "", form, options, attn_mod, options.sinks, 0, ())

    @property
    def return_lse(self) -> bool:
        """Whether the caller asked for the log-sum-exp."""
        return self.options.return_lse

    @property
    def wants_max_logit(self) -> bool:
        """Whether the largest score is needed: to be returned, or to be recorded."""
        return self.options.return_max_logit or (self.core is not None and self.core.record_max_logit)

    def replaced(self, q: Tensor, k: Tensor, v: Tensor, **changes: Any) -> AttentionCall:
        """The same call over other tensors: whole documents in place of local rows, or some heads only."""
        return self._replace(q=q, k=k, v=v, **changes)

    def over(self, tensors: tuple[Tensor, Tensor, Tensor]) -> AttentionCall:
        """The same call over other tensors of the kind that it was made for, in the caller's format."""
        form = self.qkv_format
        q, k, v = tensors
        return AttentionCall(batch_first(q, form), batch_first(k, form), batch_first(v, form), *self[3:])

    def describe(self) -> str:
        """The call in a few words, the same on every rank that makes the same one."""
        tensors = ", ".join(kind_of(x) for x in (self.q, self.k, self.v))
        how = self.kernel if self.module is None else "own module"
        asked = [name for name in self.options.features if name != "softmax_scale"]
        if self.options.dropout_p:
            asked.append(f"p {self.options.dropout_p} seed {self.options.dropout_seed}")
        if self.sinks is not None:
            asked.append(kind_of(self.sinks))
        if self.options.layer_number is not None:
            asked.append(f"layer {self.options.layer_number}")
        return f"({tensors}; {how}, scale {self.scale:g}{''.join(', ' + word for word in asked)})"

    def arranged(self, result: AttentionResult) -> Tensor | AttentionResult:
        """What the caller gets: ``out [B, L, N, D_v]`` and ``lse [B, L, N]`` in its format, no more than it asked."""
        out = from_batch_first(result.out, self.qkv_format)
        if not (self.return_lse or self.options.return_max_logit):
            return out
        lse = None if result.lse is None or not self.return_lse else from_batch_first(result.lse, self.qkv_format)
        return AttentionResult(out, lse, result.max_logit if self.options.return_max_logit else None)


def _check_sinks(sinks: Tensor | None, q: Tensor) -> None:
    if sinks is None:
        return
    if sinks.shape != (q.shape[2],) or sinks.device != q.device:
        raise InvalidValueError(
            "sinks must be one number per query head, on the device of the queries",
            got=f"shape {list(sinks.shape)} on {sinks.device}",
            fix=f"expected [{q.shape[2]}] on {q.device}, the same on every rank",
        )


def batch_first(x: Tensor, qkv_format: str) -> Tensor:
    """A view ``[B, rows, ...]`` of a tensor in a format; B is 1 for ``thd``."""
    if qkv_format == "thd":
        return x.unsqueeze(0)
    return x.transpose(0, 1) if qkv_format == "sbhd" else x


def from_batch_first(x: Tensor, qkv_format: str) -> Tensor:
    """The contiguous tensor in a format, from ``[B, rows, ...]``."""
    if qkv_format == "thd":
        return x.squeeze(0)
    return x.transpose(0, 1).contiguous() if qkv_format == "sbhd" else x.contiguous()
