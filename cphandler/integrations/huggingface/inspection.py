"""A model read before it is touched: its attention layers by name, and what context parallelism would change."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from torch import nn

from cphandler.errors import InvalidTypeError, UnsupportedError
from cphandler.integrations.huggingface.package import transformers_module

LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
"""Values of ``config.layer_types`` that are attention under a mask."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_NOT_ATTENTION = re.compile(
    r"Mamba|SSM|R[Ww][Kk][Vv]|Recurrent|R[Gg]\s?[Ll][Rr][Uu]|Delta(Net|Rule)|GatedDelta|KimiDelta|LinearAttention"
    r"|LightningAttention|Retention|Hyena|ShortConv|Indexer|Compress|SparseAttention|[xms]LSTM"
)
"""Names of classes that mix tokens in another way than by softmax attention over all keys a mask lets them see."""

_ATTENTION = re.compile(r"attention(?!.*(norm|mask|output|mlp|embedding))", re.IGNORECASE)

_COUNTS = ("arange", "cumsum", "roll", "conv1d")

_INTERFACE = ("ALL_ATTENTION_FUNCTIONS", "attention_interface")

_WAY_OUT = (
    "ranks hold a part of the tokens each, so that it would compute something else without a word: train it without "
    "context parallelism, or parallelize a part of it that has attention alone"
)


def base_of(model: Any) -> Any:
    """The transformers model itself, inside adapters of peft.

    Raises:
        InvalidTypeError: no model of transformers, or one that is wrapped already.
    """
    found = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(found, transformers_module().PreTrainedModel):
        raise InvalidTypeError(
            "parallelize takes a model of transformers",
            got=type(found).__name__,
            fix="parallelize it before it is wrapped by DistributedDataParallel or torch.compile",
        )
    return found


def attention_layers(model: Any) -> dict[str, nn.Module]:
    """The layers whose attention goes through transformers' interface, by name.

    Args:
        model: a decoder of transformers, with a language-model head or without.

    Raises:
        UnsupportedError: what context parallelism would change without a word, by the layer's name.
    """
    whole = transformers_module().PreTrainedModel
    parts = {name: module for name, module in model.named_modules() if not isinstance(module, whole)}
    layers = {name: module for name, module in parts.items() if _mentions(type(module), _INTERFACE)}
    _check_encoder(model)
    _check_layer_types(model)
    _check_towers(model)
    for name, module in parts.items():
        reason = _refusal(name, module, layers)
        if reason:
            raise UnsupportedError(f"{name} is {reason}", got=type(module).__name__, fix=_WAY_OUT)
    _check_call(model)
    if not layers:
        raise UnsupportedError(
            "no attention layer of the model goes through transformers' attention interface",
            got=type(model).__name__,
            fix="models with _supports_attention_backend do",
        )
    return layers


def counting_layer(model: Any) -> str:
    """Name of a layer that makes positions from tokens or their mask where none are given; empty without one."""
    for name, module in model.named_modules():
        embeds = "embedding" in type(module).__name__.lower()
        if embeds and _mentions(type(module), ("create_position_ids_from_input_ids", "cumsum")):
            return str(name)
    return ""


def _check_encoder(model: Any) -> None:
    """Refuse what attends to another stream of tokens.

    Raises:
        UnsupportedError: an encoder-decoder.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        name = type(model).__name__
        raise UnsupportedError(
            f"{_first_cross_attention(model)} attends to an encoder", got=f"{name}, an encoder-decoder", fix=_WAY_OUT
        )


def _check_towers(model: Any) -> None:
    """Refuse models that read something else than tokens.

    Raises:
        UnsupportedError: a tower for pixels, sounds or the like, by its name.
    """
    whole = transformers_module().PreTrainedModel
    for name, module in model.named_modules():
        inputs = getattr(module, "main_input_name", "input_ids")
        if isinstance(module, whole) and module is not model and inputs not in ("input_ids", "inputs_embeds"):
            raise UnsupportedError(f"{name} is a tower for {inputs}", got=type(module).__name__, fix=_WAY_OUT)


def _check_call(model: Any) -> None:
    """A decoder whose head gives logits of each token, and whose call takes positions and hands keywords on.

    Raises:
        UnsupportedError: heads that pool tokens, and other calls.
    """
    name = type(model).__name__
    heads = [cls.__name__ for cls in type(model).__mro__]
    known = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    if model.base_model is not model and not any(head.endswith(known) for head in heads):
        raise UnsupportedError(
            f"{name} has a head that is not the logits of each token",
            got=name,
            fix=f"parallelize model.{model.base_model_prefix} and put the head on the whole hidden states",
        )
    parameters = inspect.signature(model.forward).parameters
    kinds = [parameter.kind for parameter in parameters.values()]
    if inspect.Parameter.VAR_KEYWORD not in kinds or "position_ids" not in parameters:
        raise UnsupportedError(
            f"the forward of {name} takes no position_ids, or hands no keywords on to its layers",
            got=", ".join(parameters),
            fix=_WAY_OUT,
        )


def _first_cross_attention(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if "attention" in type(module).__name__.lower()]
    return next(
        (name for name in names if re.search(r"cross|encdec|encoder_attn|decoder", name.lower())), "the decoder"
    )


def _check_layer_types(model: Any) -> None:
    """Layers that the configuration gives a type, which is one of attention.

    Raises:
        UnsupportedError: another type, named with its layer.
    """
    for number, kind in enumerate(getattr(model.config, "layer_types", None) or ()):
        if kind not in LAYER_TYPES:
            layer = next(
                (name for name, _ in model.named_modules() if name.endswith(f"layers.{number}")), f"layer {number}"
            )
            raise UnsupportedError(
                f"{layer} is of the layer type {kind!r}",
                got=type(model).__name__,
                fix=f"served are {', '.join(LAYER_TYPES)}; {_WAY_OUT}",
            )


def _refusal(name: str, module: nn.Module, layers: dict[str, nn.Module]) -> str:
    """What a module is that reads tokens of other ranks, or counts them; empty where there is nothing to refuse."""
    cls = type(module)
    if name in layers and not hasattr(module, "attn_temperature_tuning"):  # whose counting is put right
        return "attention that counts the rows it is given" if _mentions(cls, _COUNTS) else ""
    around = any(other.startswith(f"{name}.") or name.startswith(f"{other}.") for other in layers)
    kinds = {
        "a convolution": isinstance(module, _CONVOLUTIONS) and not _is_pointwise(module),
        "a recurrent layer": isinstance(module, nn.RNNBase),
        "another layer than softmax attention": _NOT_ATTENTION.search(cls.__name__) is not None,
        "attention that never calls transformers' attention interface": isinstance(module, nn.MultiheadAttention)
        or (_ATTENTION.search(cls.__name__) is not None and name not in layers and not around),
    }
    return next((kind for kind, found in kinds.items() if found), "")


def _is_pointwise(module: Any) -> bool:
    return all(size == 1 for size in module.kernel_size)


def _mentions(cls: type, words: tuple[str, ...]) -> bool:
    """Whether a function of a class, without those of ``nn.Module``, names one of the words."""
    return any(word in names for names in _names_in(cls) for word in words)


def _names_in(cls: type) -> Iterator[tuple[str, ...]]:
    for owner in cls.__mro__:
        if owner.__module__.startswith("torch."):
            continue
        for value in vars(owner).values():
            function = inspect.unwrap(value) if callable(value) else value
            if isinstance(function, FunctionType):
                code = function.__code__
                yield (*code.co_names, *code.co_varnames)
