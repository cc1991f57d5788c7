"""The attention function and the mask function that transformers calls, registered under one name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cphandler.errors import InvalidValueError, UnsupportedError
from cphandler.integrations.huggingface.batch import BatchOnRank
from cphandler.integrations.huggingface.masks import RefusedMask, mask_of
from cphandler.integrations.huggingface.package import transformers_module
from cphandler.tokens.masks import Mask, SlidingWindow

NAME = "cphandler"
"""What ``config._attn_implementation`` says of a parallelized model."""

BATCH = "cp_batch"
"""The keyword argument in which the batch travels through the model."""

LAYER = "_cp_layer"
"""Attribute of an attention layer that holds its name in the model."""

_NOT_OF_ATTENTION = frozenset(
    {
        "position_ids",
        "position_embeddings",
        "cache_position",
        "use_cache",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "token_type_ids",
        "layer_idx",
    }
)
"""What travels with the keywords of attention and changes nothing in it."""


def register() -> None:
    """Make the name known to transformers, in both of its interfaces: one alone would drop every mask in silence."""
    transformers_module("modeling_utils").AttentionInterface.register(NAME, attention_forward)
    transformers_module("masking_utils").AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(*_args: Any, mask_function: Callable[..., Any] | None = None, **_kwargs: Any) -> Mask | RefusedMask:
    """What transformers hands to each layer as its mask: who sees whom, of the whole batch, without a matrix."""
    if mask_function is None:
        return RefusedMask("a mask without a mask function")
    return mask_of(mask_function)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of a layer over the whole batch, whoever holds it.

    Args:
        module: the layer.
        query: ``[B, N, L, D]``.
        key: ``[B, G, L, D]``.
        value: ``[B, G, L, D_v]``.
        attention_mask: what :func:`attention_mask` gave.
        dropout: of weights; only 0 is served.
        scaling: factor on the scores.
        options: other keywords that a layer passes: ``sliding_window``, ``softcap``, ``s_aux``, ``is_causal``, the
            batch, and what is no matter of attention.

    Returns:
        ``[B, L, N, D_v]``, and None in place of weights.

    Raises:
        InvalidValueError: keywords that contradict the mask.
        UnsupportedError: a mask, or a keyword, that is not served, by the layer's name; a call without a batch.
    """
    layer = getattr(module, LAYER, type(module).__name__)
    batch = options.pop(BATCH, None)
    if not isinstance(batch, BatchOnRank):
        raise UnsupportedError(
            f"{layer} was called without the batch's handler",
            got=f"{type(module).__name__} outside of the forward that parallelize wraps",
            fix="call the model that was parallelized, not a part of it; two models must not share one config object, "
            "and a layer that hands no keywords on to attention cannot be parallelized",
        )
    mask = _checked_mask(layer, attention_mask)
    settings = _options(layer, mask, options)
    if dropout:
        raise UnsupportedError(
            f"{layer} drops attention weights", got=f"dropout={dropout}", fix="set config.attention_dropout = 0"
        )
    if getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True):
        query = _at_true_positions(module, query, batch)
    number = getattr(module, "layer_idx", None)
    if isinstance(number, int):
        settings["layer_number"] = number + 1
    rows = (_autocast(x).transpose(1, 2) for x in (query, key, value))
    local = [x.squeeze(0) if batch.packed else x for x in rows]
    out = batch.handler.core_attn(None, *local, mask=mask, softmax_scale=scaling, **settings)
    batch.called.add(layer)
    return out.unsqueeze(0) if batch.packed else out, None


def _autocast(x: Tensor) -> Tensor:
    """In the dtype of autocast where that is on: as torch casts for attention, and rope has left queries in float32."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))


def _checked_mask(layer: str, mask: Any) -> Mask:
    if isinstance(mask, Mask):
        return mask
    got = mask.reason if isinstance(mask, RefusedMask) else f"{type(mask).__name__} in place of a mask"
    raise UnsupportedError(
        f"{layer} attends under a mask that cannot be cut",
        got=got,
        fix="served are causal, sliding, chunked and full masks that transformers.masking_utils makes",
    )


def _options(layer: str, mask: Mask, given: dict[str, Any]) -> dict[str, Any]:
    """Options of ``core_attn`` from the keywords of a layer; each is honoured, or refused by name."""
    given = {name: value for name, value in given.items() if value is not None and name not in _NOT_OF_ATTENTION}
    window, causal = given.pop("sliding_window", None), given.pop("is_causal", None)
    if window is not None and not (isinstance(mask, SlidingWindow) and mask.left in (window - 1, window)):
        raise InvalidValueError(
            f"{layer} has a sliding window, and its mask has another one",
            got=f"sliding_window={window} under {mask}",
            fix="let config.layer_types and the layer agree",
        )
    if causal is not None and bool(causal) != mask.is_causal:
        raise InvalidValueError(
            f"{layer} says whether it is causal, and its mask says the opposite",
            got=f"is_causal={causal} under {mask}",
            fix="set config.is_causal",
        )
    settings = {"softcap": given.pop("softcap", None), "sinks": given.pop("s_aux", None)}
    given = {name: value for name, value in given.items() if value is not False}
    if given:
        raise UnsupportedError(
            f"{layer} passes {', '.join(sorted(given))} to its attention, which is not served",
            got=", ".join(type(given[name]).__name__ for name in sorted(given)),
            fix="served are scaling, sliding_window, softcap, s_aux and is_causal",
        )
    return {name: value for name, value in settings.items() if value is not None}


def _at_true_positions(module: Any, query: Tensor, batch: BatchOnRank) -> Tensor:
    """Queries that were scaled by their number among local rows, scaled by their number in their row of the batch.

    Llama 4 does so where layers have no rope (arXiv 2501.19399), and counts the rows it is given.
    """
    local = torch.arange(query.shape[2], device=query.device)
    columns = batch.columns.to(query.device)

    def scale(positions: Tensor) -> Tensor:
        steps = torch.floor((positions.float() + 1.0) / module.floor_scale)
        scaled: Tensor = torch.log1p(steps) * module.attn_scale + 1.0
        return scaled

    factor = scale(columns) / scale(local)
    return (query * factor.view(1, 1, -1, 1)).to(query.dtype)
