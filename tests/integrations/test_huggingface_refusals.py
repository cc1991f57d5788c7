"""What context parallelism would change without a word is refused by the layer's name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cphandler import InvalidTypeError, InvalidValueError, UnsupportedError
from cphandler.integrations.huggingface import parallelize, unparallelize
from tests.integrations.families import SMALL, batch_of, build

transformers = pytest.importorskip("transformers")

LAYERS = {key: value for key, value in SMALL.items() if key not in ("head_dim", "use_cache")}


def qwen3_next() -> Any:
    config = transformers.Qwen3NextConfig(
        **LAYERS, layer_types=["full_attention", "linear_attention"], num_experts=2, moe_intermediate_size=8
    )
    return transformers.Qwen3NextForCausalLM(config)


def mamba() -> Any:
    return transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2))


def short_convolutions() -> Any:
    config = transformers.Lfm2Config(**LAYERS, layer_types=["full_attention", "conv"])
    return transformers.Lfm2ForCausalLM(config)


def vision_language() -> Any:
    text = {**LAYERS, "model_type": "gemma3_text", "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    return transformers.Gemma3ForConditionalGeneration(config)


def encoder_decoder() -> Any:
    config = transformers.T5Config(vocab_size=61, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def own_attention() -> Any:
    return transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            vocab_size=61, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
        )
    )


def unknown_layer_type() -> Any:
    model = build("qwen3")
    model.config.layer_types = ["full_attention", "compressed_attention"]
    return model


def pooled() -> Any:
    config = transformers.LlamaConfig(**SMALL, num_labels=2)
    return transformers.LlamaForSequenceClassification(config)


def keyword_less() -> Any:
    config = transformers.BloomConfig(vocab_size=61, hidden_size=16, n_layer=1, n_head=2)
    return transformers.BloomForCausalLM(config)


READ_FIRST = {
    qwen3_next: r"model\.layers\.1 .*'linear_attention'.*Qwen3Next",
    mamba: r"backbone\.layers\.0.*Mamba",
    short_convolutions: r"model\.layers\.1 .*'conv'",
    vision_language: r"vision_tower is a tower for pixel_values",
    encoder_decoder: r"decoder\.block.*attends to an encoder",
    own_attention: r"transformer\.h\.0\.attn.* never calls",
    unknown_layer_type: r"model\.layers\.1 .*'compressed_attention'",
    pooled: r"LlamaForSequenceClassification has a head",
    keyword_less: r"self_attention.* never calls|takes no position_ids",
}


@pytest.mark.parametrize("make", READ_FIRST, ids=lambda make: make.__name__)
def test_a_model_is_refused_by_layer_name_before_it_is_touched(make: Any) -> None:
    model = make()
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedError, match=READ_FIRST[make]) as caught:
        parallelize(model, None, backend="local")
    assert caught.value.fix
    assert model.config._attn_implementation == before
    assert "forward" not in vars(model)


def gemma3_with_or_mask() -> Any:
    return build("gemma3", use_bidirectional_attention=True)


def without_its_layer() -> Any:
    """A layer whose forward another package has replaced by one that attends by itself."""
    model = build("llama")
    layer = model.model.layers[1].self_attn
    layer.forward = lambda hidden_states, **_: (layer.o_proj(layer.q_proj(hidden_states)), None)
    return model


def with_dropout() -> Any:
    return build("llama", attention_dropout=0.1)


def with_position_bias() -> Any:
    return passing("position_bias", torch.zeros(1))


def passing(name: str, value: Any) -> Any:
    """A model one of whose layers passes one keyword more to its attention."""
    model = build("llama")
    layer = model.model.layers[1].self_attn
    plain = layer.forward
    layer.forward = lambda *args, **kwargs: plain(*args, **{**kwargs, name: value})
    return model


def with_another_window() -> Any:
    return passing("sliding_window", 4)


def not_causal() -> Any:
    return passing("is_causal", False)


def with_sparse_indices() -> Any:
    return passing("block_indices", torch.zeros(1))


def with_another_mask() -> Any:
    return passing("attention_mask", torch.zeros(1, 1, 27, 27))


AT_THE_CALL = {
    gemma3_with_or_mask: r"model\.layers\.0\.self_attn attends under a mask .*or_masks",
    without_its_layer: r"model\.layers\.1\.self_attn computed no attention",
    with_dropout: r"model\.layers\.0\.self_attn drops attention weights",
    with_position_bias: r"model\.layers\.1\.self_attn passes position_bias",
    with_sparse_indices: r"model\.layers\.1\.self_attn passes block_indices",
    with_another_window: r"model\.layers\.1\.self_attn has a sliding window",
    not_causal: r"model\.layers\.1\.self_attn says whether it is causal",
    with_another_mask: r"model\.layers\.1\.self_attn attends under a mask.*Tensor",
}


@pytest.mark.parametrize("make", AT_THE_CALL, ids=lambda make: make.__name__)
def test_a_layer_is_refused_by_name_at_its_call(make: Any) -> None:
    model = parallelize(make(), None, backend="local")
    with pytest.raises((UnsupportedError, InvalidValueError), match=AT_THE_CALL[make]):
        model(**batch_of("plain"))


PLAIN = batch_of("plain")
IDS = PLAIN["input_ids"]

CALLS = {
    "cache": ({"past_key_values": object()}, UnsupportedError, "no cache"),
    "use_cache": ({"use_cache": True}, UnsupportedError, "no cache"),
    "weights": ({"output_attentions": True}, UnsupportedError, "attention weights"),
    "last logits": ({"logits_to_keep": 1}, UnsupportedError, "logits_to_keep"),
    "pixels": ({"pixel_values": torch.zeros(1, 3, 4, 4)}, UnsupportedError, "pixel_values"),
    "matrix": ({"attention_mask": torch.ones(2, 1, 27, 27)}, UnsupportedError, "attention_mask"),
    "masks by layer type": ({"attention_mask": {"full_attention": None}}, InvalidTypeError, "attention_mask must be a"),
    "labels in a list": ({"labels": PLAIN["labels"].tolist()}, InvalidTypeError, "labels must be a tensor"),
    "local labels": ({"labels": IDS[:, :13]}, InvalidValueError, "labels must be of the batch"),
    "both": ({"inputs_embeds": torch.zeros(2, 27, 32)}, InvalidTypeError, "input_ids and inputs_embeds"),
    "packed and masked": (
        {"position_ids": batch_of("packed")["position_ids"], "attention_mask": torch.ones_like(IDS)},
        InvalidValueError,
        "leave attention_mask out",
    ),
    "two packings": (
        {"position_ids": batch_of("packed")["position_ids"], "cu_seq_lens_q": torch.tensor([0, 5, 54])},
        InvalidValueError,
        "name different documents",
    ),
    "a packing that ends early": ({"cu_seq_lens_q": torch.tensor([0, 5, 27])}, InvalidValueError, "must end at"),
    "unknown": ({"temperature": 2.0}, UnsupportedError, r"model\.layers\.0\.self_attn passes temperature"),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_is_refused_by_name(call: str) -> None:
    more, error, words = CALLS[call]
    model = parallelize(build("llama"), None, backend="local")
    with pytest.raises(error, match=words):
        model(**PLAIN | more)


def test_a_part_of_a_model_is_not_called_alone() -> None:
    model = parallelize(build("llama"), None, backend="local")
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0\.self_attn was called without the batch"):
        model.model(IDS)


def test_another_loss_is_refused() -> None:
    model = parallelize(build("llama"), None, backend="local")
    model.loss_function = lambda *_args, **_kwargs: torch.zeros(())
    with pytest.raises(UnsupportedError, match="loss function of its own"):
        model(**PLAIN)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gather_logits": "sometimes"}, "gather_logits"),
        ({"gradient": "median"}, "gradient"),
        ({"backend": "rings"}, "rings"),
    ],
)
def test_settings_that_mean_nothing(settings: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidValueError, match=words):
        parallelize(build("llama"), None, **settings)  # type: ignore[arg-type]


def test_what_is_no_model_and_what_is_parallelized_already() -> None:
    with pytest.raises(InvalidTypeError, match="a model of transformers"):
        parallelize(torch.nn.Linear(1, 1), None)
    model = build("llama")
    with pytest.raises(InvalidValueError, match="not parallelized"):
        unparallelize(model)
    parallelize(model, None, backend="local")
    with pytest.raises(InvalidValueError, match="already"):
        parallelize(model, None, backend="local")
