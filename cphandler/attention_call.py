"""One checked call of ``core_attn``: tensors in a common shape, options settled, refusals made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cphandler.attention import AttentionResult
from cphandler.config import CPConfig
from cphandler.core_attention import AttentionOptions, CoreAttention
from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.kernels import select_kernel
from cphandler.mask import Mask, make_mask


@dataclass(frozen=True)
class TensorRules:
    """What queries, keys and values of a handler must look like.

    Attributes:
        qkv_format: order of dims.
        local_tokens: rows L of this rank.
        batch: rows of the batch where the handler knows them (key-padding mask), else None.
        explain: what a wrong length, given the right one, probably means.
    """

    qkv_format: str
    local_tokens: int
    batch: int | None
    explain: Callable[[int, int], str]

    def check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Raise what is wrong with the three tensors.

        Raises:
            InvalidTypeError: no tensors, not floating point, or mixed dtypes.
            InvalidValueError: wrong shapes or devices.
        """
        named = {"query": query, "key": key, "value": value}
        self._check_kinds(named)
        dims = 3 if self.qkv_format == "thd" else 4
        letters = {"sbhd": "[L, B, heads, D]", "bshd": "[B, L, heads, D]", "thd": "[L, heads, D]"}[self.qkv_format]
        seq_dim = 1 if self.qkv_format == "bshd" else 0
        for name, x in named.items():
            if x.dim() != dims:
                raise InvalidValueError(f"{name} must be {letters}", got=f"shape {list(x.shape)}")
            if x.shape[seq_dim] != self.local_tokens:
                raise InvalidValueError(
                    f"{name} must hold this rank's {self.local_tokens} rows in dim {seq_dim}",
                    got=f"shape {list(x.shape)}",
                    fix=self.explain(x.shape[seq_dim], self.local_tokens),
                )
        self._check_sizes(query, key, value)

    @staticmethod
    def _check_kinds(named: dict[str, Any]) -> None:
        for name, x in named.items():
            if not isinstance(x, Tensor):
                raise InvalidTypeError(f"{name} must be a tensor", got=type(x).__name__)
            if not x.is_floating_point():
                raise InvalidTypeError(f"{name} must be floating point", got=x.dtype)
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
                want = f" of the key-padding mask's {self.batch} rows" if self.batch is not None else ""
                raise InvalidValueError(f"query, key and value must have one batch size{want}", got=sizes)
        heads, key_heads, value_heads = (x.shape[-2] for x in (query, key, value))
        if key_heads != value_heads:
            raise InvalidValueError("key and value must have the same heads", got=f"{key_heads} and {value_heads}")
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
        if query.shape[-1] == 0:
            raise InvalidValueError("the head dim must not be 0")


@dataclass(frozen=True)
class AttentionCall:
    """A checked call.

    Attributes:
        q: ``[B, L, N, D]``; B is 1 for ``thd``.
        k: ``[B, L, G, D]``.
        v: ``[B, L, G, D_v]``.
        module: the caller's own attention over whole documents, or None for the built-in kernels.
        mask: who sees whom.
        scale: factor on the scores.
        kernel: name of the built-in kernel.
        exchange: how keys reach the queries; ``"whole"`` where whole documents come to this rank.
        qkv_format: how results are arranged.
        return_lse: whether the caller asked for it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    module: Any
    mask: Mask
    scale: float
    kernel: str
    exchange: str
    qkv_format: str
    return_lse: bool

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
        exchange: str,
    ) -> AttentionCall:
        """Check everything and settle the options.

        Raises:
            InvalidTypeError: see :meth:`TensorRules.check`, or an ``attn_mod`` that cannot be called.
            InvalidValueError: see :meth:`TensorRules.check`.
            UnsupportedError: see :class:`AttentionOptions` and :func:`select_kernel`.
        """
        rules.check(*tensors)
        module = None
        if isinstance(attn_mod, CoreAttention):
            options = attn_mod.applied_to(options)
        elif attn_mod is not None:
            module = attn_mod
            if not callable(module):
                raise InvalidTypeError(
                    "attn_mod must be None, a CoreAttention or a callable", got=type(module).__name__
                )
        q, k, v = (batch_first(x, rules.qkv_format) for x in tensors)
        scale = float(q.shape[-1]) ** -0.5 if options.softmax_scale is None else float(options.softmax_scale)
        chosen = mask if options.mask is None else make_mask(options.mask)
        name = select_kernel(config.kernel, q, k, v, deterministic=config.deterministic)
        return cls(q, k, v, module, chosen, scale, name, exchange, rules.qkv_format, options.return_lse)

    def describe(self) -> str:
        """The call in a few words, the same on every rank that makes the same one."""
        tensors = ", ".join(kind_of(x) for x in (self.q, self.k, self.v))
        how = self.kernel if self.module is None else "own module"
        return f"({tensors}; {how}, scale {self.scale:g}{', lse' if self.return_lse else ''})"

    def result(self, out: Tensor, lse: Tensor | None) -> Tensor | AttentionResult:
        """Arrange ``out [B, L, N, D_v]`` and ``lse [B, L, N]`` as the caller asked."""
        arranged = from_batch_first(out, self.qkv_format)
        if not self.return_lse:
            return arranged
        return AttentionResult(arranged, None if lse is None else from_batch_first(lse, self.qkv_format), None)


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


def kind_of(x: Any) -> str:
    """A tensor's dtype, shape and whether it needs a gradient, in a few words."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    grad = " grad" if x.requires_grad and torch.is_grad_enabled() else ""
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}{grad}"
