"""Models that call ``torch.nn.functional.scaled_dot_product_attention``, under a handler."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from cphandler.errors import InvalidTypeError, InvalidValueError, UnsupportedError
from cphandler.handler.contract import ContextParallelHandler
from cphandler.tokens.masks import Causal, Full, Mask


@contextmanager
def context_parallel(
    module: nn.Module, handler: ContextParallelHandler, *, dropout_seed: int | None = None
) -> Iterator[None]:
    """Let a module's calls of ``scaled_dot_product_attention`` see the whole batch of a handler.

    Only calls from within the module's ``forward``, or that of a part of it; whatever else the process runs is left
    alone. On the way out, also after an error, the module is as it was. With activation checkpointing
    (``use_reentrant=False``) run the backward pass under the same handler: torch raises a ``CheckpointError`` where a
    part is computed again without it, or under another batch's.

    Args:
        module: a model, or a part of one, that attends by nothing else. Its inputs are this rank's rows, and their
            ``position_ids`` the handler's.
        handler: the batch's. ``is_causal`` chooses between causal and full attention, documents apart; a handler with
            another mask has that one in every layer.
        dropout_seed: required where attention drops weights, another one for each batch and the same on all ranks.

    Raises:
        InvalidTypeError: no module, or no handler.
        UnsupportedError: a module that attends otherwise (``nn.MultiheadAttention``), by its name; in a call: an
            ``attn_mask``, dropout without a seed, queries that are not ``[B, H, L, D]``, recomputation with
            ``use_reentrant=True``; a forward pass in which nothing attended.
    """
    if not isinstance(module, nn.Module):
        raise InvalidTypeError("context_parallel takes a module", got=type(module).__name__, fix="pass the model")
    if not isinstance(handler, ContextParallelHandler):
        raise InvalidTypeError(
            "context_parallel takes the batch's handler",
            got=type(handler).__name__,
            fix="make one for each batch: get_cp_handler_cls(...)(cp_group=..., ...)",
        )
    for name, part in module.named_modules():
        if isinstance(part, nn.MultiheadAttention):
            raise UnsupportedError(
                f"{name or 'the module'} attends without scaled_dot_product_attention, depending on its settings",
                got=type(part).__name__,
                fix="use an attention that calls scaled_dot_product_attention",
            )
    seen = _seen.setdefault(handler, _Seen(next(_serials)))
    scope = _Scope(module, handler, dropout_seed, seen)
    handles = [handle for part in module.modules() for handle in scope.watch(part)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Seen:
    """What stays the same for a batch from its forward pass to its backward pass, in one ``with`` or two.

    Attributes:
        serial: of the batch in this process.
        numbers: the layer number of the n-th call from within a module.
    """

    serial: int
    numbers: dict[tuple[nn.Module, int], int] = field(default_factory=dict)


class _Active(threading.local):
    """The scopes around what this thread runs, outermost first, and whether one of them is computing a call."""

    def __init__(self) -> None:
        self.scopes: list[_Scope] = []
        self.computing = False


_active = _Active()
_serials = count(1)
_seen: WeakKeyDictionary[ContextParallelHandler, _Seen] = WeakKeyDictionary()


class _Scope(TorchFunctionMode):
    """Active while the module, or a part of it, is in its ``forward``.

    Parts are watched one by one, because checkpointing calls them again without the module around them.
    """

    def __init__(self, root: nn.Module, handler: ContextParallelHandler, seed: int | None, seen: _Seen) -> None:
        super().__init__()
        self.root, self.handler, self.seed, self.seen = root, handler, seed, seen
        self.within: list[tuple[nn.Module, list[int]]] = []
        self.calls = 0
        self.trains = False

    def watch(self, part: nn.Module) -> Iterator[Any]:
        """Hooks around a part's ``forward``; those of an inner ``with`` lie inside those of an outer one."""
        yield part.register_forward_pre_hook(self._begin)
        yield part.register_forward_hook(self._end, always_call=True, prepend=True)
        if part is self.root:
            yield part.register_forward_hook(self._check_called)

    def _begin(self, part: nn.Module, _: Any) -> None:
        if not self.within:
            self.calls, self.trains = 0, torch.is_grad_enabled()
            _active.scopes.append(self)
            self.__enter__()  # type: ignore[no-untyped-call]
        self.within.append((part, [0]))

    def _end(self, part: nn.Module, *_: Any) -> None:
        if self.within and self.within[-1][0] is part:
            self.within.pop()
            if not self.within:
                self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
                _active.scopes.remove(self)

    def _check_called(self, *_: Any) -> None:
        if not self.calls:
            raise UnsupportedError(
                "the module attended to nothing under context_parallel",
                got=f"a forward pass of {type(self.root).__name__} without scaled_dot_product_attention",
                fix="let its attention call torch.nn.functional.scaled_dot_product_attention",
            )

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not functional.scaled_dot_product_attention or _active.computing:
            return func(*args, **(kwargs or {}))
        _active.computing = True
        try:
            return self._attend(*args, **(kwargs or {}))
        finally:
            _active.computing = False

    def _attend(  # noqa: PLR0917 (torch's signature)
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        self._check(query, key, attn_mask, enable_gqa=enable_gqa)
        for scope in _active.scopes:
            scope.calls += 1
        options: dict[str, Any] = {"mask": self._mask(causal=is_causal), "layer_number": self._number()}
        if scale is not None:
            options["softmax_scale"] = scale
        if dropout_p:
            if self.seed is None:
                raise UnsupportedError(
                    "attention dropout needs a seed that all ranks share",
                    got=f"dropout_p={dropout_p}",
                    fix="context_parallel(module, handler, dropout_seed=...), another one for each batch",
                )
            options |= {"dropout_p": dropout_p, "dropout_seed": self.seed}
        rows = [self._ours(x) for x in (query, key, value)]
        out: Tensor = self.handler.core_attn(None, *rows, **options)
        marker = torch.empty(0, self.seen.serial, device=out.device)
        marked: Tensor = _Marked.apply(_theirs(out, self.handler.qkv_format), marker)  # type: ignore[no-untyped-call]
        return marked

    def _check(self, query: Tensor, key: Tensor, attn_mask: object, *, enable_gqa: bool) -> None:
        if attn_mask is not None:
            raise UnsupportedError(
                "an attn_mask shows this rank's rows alone, and cannot say who sees whom in the batch",
                got=f"shape {list(attn_mask.shape)}" if isinstance(attn_mask, Tensor) else type(attn_mask).__name__,
                fix="pass attn_mask=None, and tell the handler: key_padding_mask=, cu_seqlens_q=, or mask=",
            )
        if query.dim() != 4 or (self.handler.qkv_format == "thd" and query.shape[0] != 1):
            raise UnsupportedError(
                "queries must be [B, H, L, D], and [1, H, L, D] of a packed batch",
                got=f"shape {list(query.shape)} in {self.handler.qkv_format}",
                fix="give the tokens a batch dim",
            )
        if query.shape[1] != key.shape[1] and not enable_gqa:
            raise InvalidValueError(
                "queries have more heads than keys",
                got=f"{query.shape[1]} and {key.shape[1]} heads",
                fix="pass enable_gqa=True, as without context_parallel",
            )
        if self.trains and not torch.is_grad_enabled():
            raise UnsupportedError(
                "a part of the module runs without gradients: checkpointing with use_reentrant=True, probably",
                got="attention under torch.no_grad() in a forward pass with gradients",
                fix="checkpoint with use_reentrant=False",
            )

    def _mask(self, *, causal: bool) -> Mask:
        own = self.handler.mask
        return own if own not in (Causal(), Full()) else Causal() if causal else Full()

    def _number(self) -> int:
        part, calls = self.within[-1]
        numbers, place = self.seen.numbers, (part, calls[0])
        calls[0] += 1
        return numbers.setdefault(place, len(numbers) + 1)

    def _ours(self, x: Tensor) -> Tensor:
        rows = x.transpose(1, 2)
        if self.handler.qkv_format == "thd":
            return rows.squeeze(0)
        return rows.transpose(0, 1) if self.handler.qkv_format == "sbhd" else rows


def _theirs(out: Tensor, qkv_format: str) -> Tensor:
    """``[B, H, L, D_v]``."""
    if qkv_format == "thd":
        return out.transpose(0, 1).unsqueeze(0)
    return out.permute(1, 2, 0, 3) if qkv_format == "sbhd" else out.transpose(1, 2)


class _Marked(torch.autograd.Function):
    """The same tensor, and among what is saved an empty one whose shape is the batch's number.

    Checkpointing compares the shapes of what it saved with those of what it computes again, so that another batch's
    handler, or none, is noticed there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, marker: Tensor) -> Tensor:
        ctx.save_for_backward(marker)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        del ctx
        return grad, None
