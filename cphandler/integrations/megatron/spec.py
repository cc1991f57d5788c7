"""Layer specs of Megatron models, with attention that computes by a handler."""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from cphandler.errors import UnsupportedError
from cphandler.integrations.megatron.attention import CPDotProductAttention, CPMLASelfAttention, CPSelfAttention

REPLACED = {SelfAttention: CPSelfAttention, MLASelfAttention: CPMLASelfAttention}
"""Attention that is served, and what stands in its place."""


def handler_spec(spec: Any) -> Any:
    """A copy of a layer spec whose self attention, multi-latent or not, computes by a handler.

    Args:
        spec: of one layer (``get_gpt_layer_local_spec``, ``get_gpt_layer_with_transformer_engine_spec``), or of a block
            of them. A spec for multi-token prediction is made from the result by Megatron's own functions.

    Raises:
        UnsupportedError: attention that is neither Megatron's ``SelfAttention`` nor its ``MLASelfAttention``: linear
            attention and Mamba read local rows as if they were all.
    """
    if isinstance(spec, TransformerBlockSubmodules):
        made = copy.copy(spec)
        made.layer_specs = [handler_spec(layer) for layer in spec.layer_specs]
        return made
    attention = getattr(getattr(spec, "submodules", None), "self_attention", None)
    if not isinstance(attention, ModuleSpec) or attention.module not in (*REPLACED, *REPLACED.values()):
        found = getattr(attention, "module", attention)
        raise UnsupportedError(
            "handler_spec serves layers with Megatron's SelfAttention or MLASelfAttention",
            got=getattr(found, "__name__", repr(found)),
            fix="for another attention, name CPDotProductAttention as its core_attention and keep Megatron's own batch "
            "functions and rope, without handlers",
        )
    made = copy.copy(spec)
    made.submodules = copy.copy(spec.submodules)
    made.submodules.self_attention = copy.copy(attention)
    made.submodules.self_attention.module = REPLACED.get(attention.module, attention.module)
    made.submodules.self_attention.submodules = copy.copy(attention.submodules)
    made.submodules.self_attention.submodules.core_attention = CPDotProductAttention
    return made
