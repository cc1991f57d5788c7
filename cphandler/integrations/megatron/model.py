"""A Megatron model that takes micro-batches with handlers."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.models.gpt import gpt_model
from megatron.core.transformer import multi_token_prediction
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from torch.nn import Module

from cphandler.errors import InvalidTypeError, UnsupportedError
from cphandler.integrations.megatron.attention import CPDotProductAttention
from cphandler.integrations.megatron.roll import MEGATRONS, roll_and_count, roll_tensor
from cphandler.integrations.megatron.rope import HandledRotary, handled_rotary_cls
from cphandler.integrations.megatron.spec import REPLACED

M = TypeVar("M", bound=Module)

ROLL = ["tensor", "shifts", "dims", "cp_group", "packed_seq_params"]
"""Parameters of the ``roll_tensor`` that is replaced."""


class _HandledPrediction(MultiTokenPredictionLayer):  # type: ignore[misc]
    """A layer of multi-token prediction that keeps the micro-batch's parameters out of what recomputation saves.

    Megatron's own hands them to autograd, which saves tensors alone, so that no packed batch is recomputed there.
    """

    def _checkpointed_forward(self, forward_func: Any, *args: Any, **kwargs: Any) -> Any:
        kept = {"packed_seq_params": kwargs.pop("packed_seq_params", None)}
        names = list(kwargs)

        def forward(*values: Any) -> Any:
            return forward_func(**dict(zip(names, values, strict=True)), **kept)

        return super()._checkpointed_forward(forward, *args, **kwargs)


def with_handlers(model: M) -> M:
    """The same ``GPTModel``, ready for ``packed_seq_params=packed_params(handler)``.

    Its rotary embedding gives a micro-batch with a handler the angles of this rank's rows. Where it predicts several
    tokens, ``roll_tensor`` is replaced in the two modules of Megatron that call it, once for the process; the
    replacement keeps nothing and asks the parameters of each call, so that micro-batches without a handler, of this
    model or another, go on as before. Layers that predict further tokens may then be recomputed too. Parameters,
    buffers and state dict are untouched.

    Args:
        model: built from :func:`handler_spec`, on any pipeline stage.

    Raises:
        InvalidTypeError: no ``GPTModel``.
        UnsupportedError: a layer whose attention is not the spec's, named by its place in the model; a rotary embedding
            or a ``roll_tensor`` that this library does not know.
    """
    if not isinstance(model, gpt_model.GPTModel):
        raise InvalidTypeError(
            "with_handlers takes a GPTModel", got=type(model).__name__, fix="unwrap it, and call this before DDP does"
        )
    _check_attention(model)
    rotary = getattr(model, "rotary_pos_emb", None)
    if rotary is not None and not isinstance(rotary, HandledRotary):
        if type(rotary) not in (RotaryEmbedding, YarnRotaryEmbedding):
            raise UnsupportedError(
                "the model's rotary embedding is not served",
                got=type(rotary).__name__,
                fix='position_embedding_type "rope", "yarn", "learned_absolute" or "none"',
            )
        rotary_cls: type = type(rotary)
        rotary.__class__ = handled_rotary_cls(rotary_cls)
    if model.config.mtp_num_layers:
        _replace_rolls()
        for layer in model.mtp.layers if model.mtp_process else ():
            if type(layer) is MultiTokenPredictionLayer:
                layer.__class__ = _HandledPrediction
    return model


def _check_attention(model: Module) -> None:
    """Every layer has the spec's attention, and nothing else mixes rows."""
    blocks = [block for block in (getattr(model, "decoder", None), getattr(model, "mtp", None)) if block is not None]
    names = {id(module): name for name, module in model.named_modules()}
    for layer in (layer for block in blocks for layer in block.layers):
        inner = getattr(layer, "transformer_layer", layer)
        attention = getattr(inner, "self_attention", inner)
        own = isinstance(attention, tuple(REPLACED.values()))
        served = own and isinstance(attention.core_attention, CPDotProductAttention)
        if not served:
            raise UnsupportedError(
                f"{names[id(attention)]} is not an attention that computes by a handler",
                got=type(attention).__name__,
                fix="build the model from handler_spec(layer_spec)",
            )


def _replace_rolls() -> None:
    """Put the replacements where Megatron looks the name up; a second time changes nothing."""
    for module, replacement in ((gpt_model, roll_and_count), (multi_token_prediction, roll_tensor)):
        found: Any = module.roll_tensor
        if found is replacement:
            continue
        if found is not MEGATRONS or list(inspect.signature(found).parameters) != ROLL:
            raise UnsupportedError(
                f"{module.__name__}.roll_tensor is not the one that this library knows",
                got=f"{found.__module__}.{found.__qualname__}",
                fix="use a megatron-core release that cphandler[megatron] names, with its own roll_tensor",
            )
        module.roll_tensor = replacement
