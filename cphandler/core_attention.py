"""What a model says about its attention: per-call options, and a module that keeps them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, TypedDict, runtime_checkable

import torch
from torch import Tensor

from cphandler.errors import InvalidTypeError, InvalidValueError, UnsupportedError
from cphandler.mask import Mask


class OptionalArguments(TypedDict, total=False):
    """Keyword arguments of ``core_attn``; see :class:`AttentionOptions`."""

    layer_number: int | None
    mask: Mask | str | None
    softmax_scale: float | None
    softcap: float | None
    sinks: Tensor | None
    dropout_p: float
    dropout_seed: int | None
    return_lse: bool
    return_max_logit: bool


@dataclass(frozen=True)
class AttentionOptions:
    """Options of one ``core_attn`` call.

    Attributes:
        layer_number: the layer's number, from 1; selects the algorithm where a handler has one per layer.
        mask: replaces the handler's mask for this call.
        softmax_scale: factor on the scores; None is ``D ** -0.5``.
        softcap: not available yet; must be None.
        sinks: not available yet; must be None.
        dropout_p: not available yet; must be 0.
        dropout_seed: not available yet; must be None.
        return_lse: also return the log-sum-exp of each row.
        return_max_logit: not available yet; must be False.

    Raises:
        UnsupportedError: an option that is not available yet.
        InvalidValueError: a layer number below 1.
    """

    layer_number: int | None = None
    mask: Mask | str | None = None
    softmax_scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: int | None = None
    return_lse: bool = False
    return_max_logit: bool = False

    def __post_init__(self) -> None:
        _refuse_unavailable(self.softcap, self.sinks, self.dropout_p)
        if self.dropout_seed is not None:
            raise UnsupportedError(
                "dropout_seed has no use yet: attention dropout is not available", fix="leave it None"
            )
        if self.return_max_logit:
            raise UnsupportedError(
                "return_max_logit is not available yet", fix="leave it False; return_lse=True is available"
            )
        if self.layer_number is not None and (
            isinstance(self.layer_number, bool) or not isinstance(self.layer_number, int)
        ):
            raise InvalidTypeError("layer_number must be an int", got=repr(self.layer_number))
        if self.layer_number is not None and self.layer_number < 1:
            raise InvalidValueError("layer_number counts from 1", got=self.layer_number)

    @classmethod
    def checked(cls, options: OptionalArguments) -> AttentionOptions:
        """Options from keyword arguments.

        Raises:
            InvalidTypeError: an unknown name.
        """
        unknown = sorted(set(options) - set(cls.__dataclass_fields__))
        if unknown:
            raise InvalidTypeError(
                f"core_attn has no option {', '.join(map(repr, unknown))}",
                fix=f"it takes {', '.join(cls.__dataclass_fields__)}",
            )
        return cls(**options)


def _refuse_unavailable(softcap: float | None, sinks: object, dropout_p: float) -> None:
    if softcap is not None:
        raise UnsupportedError("softcap is not available yet", fix="leave it None")
    if sinks is not None and sinks is not False:
        raise UnsupportedError("attention sinks are not available yet", fix="leave them out")
    if dropout_p:
        raise UnsupportedError("attention dropout is not available yet", got=dropout_p, fix="leave it 0")


class CoreAttention(torch.nn.Module):
    """A layer's attention settings, to be handed to ``core_attn``; computes nothing by itself.

    Args:
        softmax_scale: factor on the scores; None is ``D ** -0.5``.
        softcap: not available yet; must be None.
        dropout_p: not available yet; must be 0.
        sinks: not available yet; must be False. (Later: make a learnable ``sinks`` parameter, one per head.)

    Attributes:
        current_max_attn_logits: running maximum of the scaled scores per head, None until one is recorded.

    Raises:
        UnsupportedError: a setting that is not available yet.
    """

    def __init__(
        self,
        *,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        dropout_p: float = 0.0,
        sinks: bool = False,
    ) -> None:
        super().__init__()
        _refuse_unavailable(softcap, sinks, dropout_p)
        self.softmax_scale = softmax_scale
        self.softcap = softcap
        self.dropout_p = dropout_p
        self.register_parameter("sinks", None)
        self.current_max_attn_logits: Tensor | None = None

    def applied_to(self, options: AttentionOptions) -> AttentionOptions:
        """The call's options, with this module's where the call leaves them open.

        Raises:
            UnsupportedError: an attribute that was set to what is not available yet.
        """
        _refuse_unavailable(self.softcap, self.sinks, self.dropout_p)
        if options.softmax_scale is None:
            return replace(options, softmax_scale=self.softmax_scale)
        return options


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
