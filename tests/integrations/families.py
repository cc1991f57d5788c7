"""Model families of transformers on random tiny configurations, and batches of each kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

VOCABULARY = 61

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}

_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9}

_ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": 9}),
    "gemma2": ("Gemma2", _ALTERNATING | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3", _ALTERNATING | {"query_pre_attn_scalar": 8}),
    "gpt_oss": ("GptOss", _ALTERNATING | _ROUTED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral": ("Mixtral", _ROUTED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 11}),
    "qwen3_moe": (
        "Qwen3Moe",
        _ROUTED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "head_dim": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 6,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
        },
    ),
    "cohere2": ("Cohere2", _ALTERNATING),
    "olmo3": ("Olmo3", _ALTERNATING),
    "phi3": ("Phi3", {"sliding_window": 9, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "llama4": (
        "Llama4",
        {
            "layer_types": ["chunked_attention", "full_attention"],
            "attention_chunk_size": 8,
            "no_rope_layers": [1, 0],
            "floor_scale": 4,
            "attn_scale": 0.3,
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 2,
        },
    ),
}
"""By name: the prefix of the classes, and what the tiny configuration has beside the sizes that all share."""


def build(family: str, seed: int = 0, **changes: Any) -> Any:
    """A model in float32 whose parameters are random and the same in every process."""
    transformers = pytest.importorskip("transformers")
    prefix, settings = FAMILIES[family]
    text = {"Gemma3": "Gemma3Text", "Llama4": "Llama4Text"}.get(prefix, prefix)
    config = getattr(transformers, f"{text}Config")(**SMALL | settings | changes, attn_implementation="eager")
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = 0.3 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
        offset = 1.0 if parameter.dim() < 2 else 0.0
        parameter.data = offset + scale * torch.randn(parameter.shape, generator=generator)
    return model.train()


def batch_of(kind: str, seed: int = 0, rows: int = 2, length: int = 27) -> dict[str, Tensor]:
    """A global batch: packed, padded right, padded left, padded with holes, or plain."""
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    if kind == "plain":
        return {"input_ids": ids, "labels": ids.clone()}
    if kind == "packed":
        lengths = [[11, 2, length - 13], [1, length - 1]]
        rows_of = [torch.cat([torch.arange(n) for n in lengths[row % 2]]) for row in range(rows)]
        positions = torch.stack(rows_of)
        return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}
    mask = torch.ones(rows, length, dtype=torch.int64)
    for row in range(rows):
        empty = 3 + 4 * row
        if kind == "right":
            mask[row, length - empty :] = 0
        else:
            mask[row, :empty] = 0
        if kind == "holes":
            mask[row, 14:17] = 0
    first = (mask.cumsum(1) == 1) & (mask == 1)
    labels = ids.masked_fill(mask == 0, -100).masked_fill(first, -100)
    labels = labels.masked_fill(torch.cat([torch.zeros(rows, 1), 1 - mask[:, :-1]], 1).bool(), -100)
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}
