"""What a model says about its attention: per-call options, and a module that keeps them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Protocol, TypedDict, runtime_checkable

import torch
from torch import Tensor

from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.precision import ATTENTION_DTYPES
from cphandler.tensors import check_plain
from cphandler.tokens.masks import Mask


class OptionalArguments(TypedDict, total=False):
    """Keyword arguments of ``core_attn``; see :class:`AttentionOptions`."""

    layer_number: int | None
    mask: Mask | str | None
    softmax_scale: float | None
    softcap: float | None
    sinks: Tensor | None
    dropout_p: float | None
    dropout_seed: int | None
    return_lse: bool
    return_max_logit: bool


@dataclass(frozen=True)
class AttentionOptions:
    """Options of one ``core_attn`` call.

    Attributes:
        layer_number: the layer's number, from 1; selects the algorithm where a handler has one per layer, and is
            required with dropout, so that layers under one seed drop different weights.
        mask: replaces the handler's mask for this call.
        softmax_scale: factor on the scores; None is ``D ** -0.5``.
        softcap: scaled scores s become ``softcap * tanh(s / softcap)``.
        sinks: ``[N]``: a learnable logit per head that takes part in every row's softmax and has no value (gpt-oss).
            The log-sum-exp that is returned holds it. Its gradient is this rank's part: sum it over the group, as
            gradients of replicated parameters are (on the replicated layout it is complete on every rank).
        dropout_p: probability that an attention weight is dropped; those kept are divided by ``1 - dropout_p``. None
            leaves it to the :class:`CoreAttention`; 0 switches its dropout off.
        dropout_seed: required with dropout. Which weights are dropped depends on the seed, the layer, the row of the
            batch, the head and both tokens' global positions, so that it is the same for any number of ranks.
        return_lse: also return the log-sum-exp of each row.
        return_max_logit: also return the largest scaled score (before any softcap) of each head over the group; costs
            a further pass over queries and keys, and the keys travel once more.

    Raises:
        InvalidTypeError: an option of a wrong type.
        InvalidValueError: an option out of its range.
    """

    layer_number: int | None = None
    mask: Mask | str | None = None
    softmax_scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout_p: float | None = None
    dropout_seed: int | None = None
    return_lse: bool = False
    return_max_logit: bool = False

    def __post_init__(self) -> None:
        _check_int("layer_number", self.layer_number, least=1, wrong="layer_number counts from 1")
        _check_int("dropout_seed", self.dropout_seed, least=0, wrong="dropout_seed must not be negative")
        _check_bool("return_lse", self.return_lse)
        _check_bool("return_max_logit", self.return_max_logit)
        _check_positive("softmax_scale", self.softmax_scale)
        _check_positive("softcap", self.softcap)
        _check_dropout(self.dropout_p)
        if self.sinks is not None:
            check_tensor("sinks", self.sinks)

    @property
    def features(self) -> list[str]:
        """What of this a handler class must serve, by the names of its capability table."""
        asked = {
            "softmax_scale": self.softmax_scale is not None,
            "softcap": self.softcap is not None,
            "sinks": self.sinks is not None,
            "dropout": bool(self.dropout_p),
            "return_lse": self.return_lse,
            "return_max_logit": self.return_max_logit,
        }
        return [name for name, given in asked.items() if given]

    @classmethod
    def checked(cls, options: OptionalArguments) -> AttentionOptions:
        """Options from keyword arguments.

        Raises:
            InvalidTypeError: an unknown name.
        """
        if not options:
            return _NONE_ASKED
        unknown = sorted(set(options) - set(cls.__dataclass_fields__))
        if unknown:
            raise InvalidTypeError(
                f"core_attn has no option {', '.join(map(repr, unknown))}",
                fix=f"it takes {', '.join(cls.__dataclass_fields__)}",
            )
        return cls(**options)


def check_tensor(name: str, x: object) -> None:
    """Refuse what attention does not compute with.

    Args:
        name: what it is, for errors.
        x: a query, key or value, or sinks.

    Raises:
        InvalidTypeError: no tensor, or one that is distributed, nested or sparse, or of a dtype that is not served.
    """
    if not isinstance(x, Tensor):
        raise InvalidTypeError(f"{name} must be a tensor", got=type(x).__name__, fix="torch.as_tensor makes one")
    check_plain(x, name)
    if x.dtype not in ATTENTION_DTYPES:
        served = ", ".join(str(dtype).removeprefix("torch.") for dtype in ATTENTION_DTYPES)
        raise InvalidTypeError(
            f"{name} must be floating point, of a dtype that attention computes in",
            got=x.dtype,
            fix=f"cast it to one of {served}",
        )


def _check_int(name: str, value: object, *, least: int, wrong: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidTypeError(f"{name} must be an int", got=repr(value), fix=f"{least} or more")
    if not least <= value < 1 << 63:
        raise InvalidValueError(wrong, got=value, fix=f"pass an int of {least} or more, below 2**63")


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidTypeError(f"{name} must be True or False", got=repr(value), fix=f"say {name}=True to ask for it")


def _check_positive(name: str, value: float | None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidTypeError(f"{name} must be a number", got=repr(value), fix="scale queries for one that is learned")
    if not 0 < value < float("inf"):
        raise InvalidValueError(
            f"{name} must be a positive number",
            got=repr(value),
            fix=f"leave {name} out, or pass a finite number above 0",
        )


def _check_dropout(dropout_p: float | None) -> None:
    if dropout_p is None:
        return
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, Real):
        raise InvalidTypeError("dropout_p must be a number", got=repr(dropout_p), fix="0.1, say; 0 switches it off")
    if not 0 <= dropout_p < 1:
        raise InvalidValueError(
            "dropout_p must be a probability below 1", got=repr(dropout_p), fix="0.1, say; 0 switches it off"
        )


_NONE_ASKED = AttentionOptions()


class CoreAttention(torch.nn.Module):
    """A layer's attention settings, to be handed to ``core_attn``; computes nothing by itself.

    Args:
        softmax_scale: factor on the scores; None is ``D ** -0.5``.
        softcap: scaled scores s become ``softcap * tanh(s / softcap)``; None leaves them as they are.
        dropout_p: probability that an attention weight is dropped in training mode; each call must then name a
            ``dropout_seed``.
        num_sinks: query heads N that get a learnable ``sinks`` parameter, zeros at first; 0 for none.
        record_max_logit: keep ``current_max_attn_logits`` at every call, as if each asked for ``return_max_logit``.

    Attributes:
        sinks: ``[N]`` parameter, or None.
        current_max_attn_logits: ``[N]`` running maximum of the scaled scores per head over all calls that asked for it,
            what QK-clip reads (Kimi K2, arXiv 2507.20534, 2.1); None until one did. Set it to None to start afresh.

    Raises:
        InvalidTypeError: a setting of a wrong type.
        InvalidValueError: a setting out of its range.
    """

    def __init__(
        self,
        *,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        dropout_p: float = 0.0,
        num_sinks: int = 0,
        record_max_logit: bool = False,
    ) -> None:
        super().__init__()
        _check_positive("softmax_scale", softmax_scale)
        _check_positive("softcap", softcap)
        for name, value in (("dropout_p", dropout_p), ("num_sinks", num_sinks)):
            if value is None:
                raise InvalidTypeError(f"{name} must be a number", got="None", fix="leave it out, or pass 0")
        _check_dropout(dropout_p)
        _check_int("num_sinks", num_sinks, least=0, wrong="num_sinks must not be negative")
        _check_bool("record_max_logit", record_max_logit)
        self.softmax_scale = softmax_scale
        self.softcap = softcap
        self.dropout_p = dropout_p
        self.record_max_logit = record_max_logit
        self.register_parameter("sinks", torch.nn.Parameter(torch.zeros(num_sinks)) if num_sinks else None)
        self.current_max_attn_logits: Tensor | None = None

    def drops(self, options: OptionalArguments) -> bool:
        """Whether a call with these options drops weights by this module's setting."""
        return self.training and self.dropout_p > 0 and options.get("dropout_p") is None

    def applied_to(self, options: AttentionOptions) -> AttentionOptions:
        """The call's options, with this module's where the call leaves them open."""
        settings: dict[str, Any] = {}
        for name in ("softmax_scale", "softcap", "sinks"):
            if getattr(options, name) is None:
                settings[name] = getattr(self, name)
        if options.dropout_p is None and self.training:
            settings["dropout_p"] = self.dropout_p
        return replace(options, **settings)

    def record(self, max_logit: Tensor) -> None:
        """Raise the running maximum to what a call has seen."""
        current = self.current_max_attn_logits
        self.current_max_attn_logits = max_logit.clone() if current is None else torch.maximum(current, max_logit)


@runtime_checkable
class AttentionModule(Protocol):
    """Any callable that computes attention over whole documents, in the handler's ``qkv_format``.

    It returns ``[..., heads, D_v]`` in that format. ``cu_seqlens`` are int32 tensors for ``thd`` and None for dense
    formats; padding has been removed.
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_kv: Tensor | None,
        max_seqlen_q: int,
        max_seqlen_kv: int,
        mask: Mask,
    ) -> Tensor:
        """Attention over whole documents."""
