"""TransformerEngine as it is installed: which version, on what hardware, and the modules that are made of it.

The package is imported when a backend that computes with it is chosen, never before. What is known of it is from its
sources, versions 2.9 to 2.20; ``docs/transformer-engine.md`` says what has been run.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from types import ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from cphandler.errors import MissingPackageError
from cphandler.kernels.packages import numbers

MODULE = "transformer_engine.pytorch"
DISTRIBUTIONS = ("transformer-engine", "transformer-engine-torch")
OLDEST, NEWEST = (2, 9), (2, 20)
"""Versions whose sources were read; first and last."""

INSTALL = 'pip install --no-build-isolation "cphandler[te]"'


class Engine(NamedTuple):
    """TransformerEngine as it is installed.

    Attributes:
        attention: its ``DotProductAttention``.
        version: major and minor.
    """

    attention: Any
    version: tuple[int, int]

    def __str__(self) -> str:
        return f"TransformerEngine {self.version[0]}.{self.version[1]}"


_engines: WeakKeyDictionary[ModuleType, Engine] = WeakKeyDictionary()


def engine() -> Engine:
    """TransformerEngine, imported and of a version that is known; looked for until it is found.

    Raises:
        MissingPackageError: see :func:`_probed`.
    """
    module = sys.modules.get(MODULE)
    found = None if module is None else _engines.get(module)
    if found is None:
        found = _probed()
        _engines[sys.modules[MODULE]] = found
    return found


def _probed() -> Engine:
    """What is installed: its version first, since importing a part of it raises whatever it likes.

    Raises:
        MissingPackageError: it is missing, cannot be imported, or is of another version.
    """
    found = {name: _version_of(name) for name in DISTRIBUTIONS}
    installed = ", ".join(f"{name} {number}" if number else f"no {name}" for name, number in found.items())
    number = next((number for number in found.values() if number), "")
    if not number:
        raise MissingPackageError("this backend needs TransformerEngine", got=installed, fix=f"install it: {INSTALL}")
    known = (*numbers(number), 0, 0)[:2]
    if not OLDEST <= known <= NEWEST:
        raise MissingPackageError(
            "TransformerEngine is of a version that this backend was not written for",
            got=installed,
            fix=f"install one of {dotted(OLDEST)} to {dotted(NEWEST)}: {INSTALL}",
        )
    try:
        return Engine(import_module(MODULE).DotProductAttention, (known[0], known[1]))
    except Exception as error:  # RuntimeError and FileNotFoundError have been seen, where a part of it is missing
        raise MissingPackageError(
            "TransformerEngine is installed and cannot be imported",
            got=f"{installed}: {type(error).__name__}: {error}",
            fix=f"it needs a CUDA build of torch, cuDNN and its compiled part, transformer-engine-torch: {INSTALL}",
        ) from error


def _version_of(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def dotted(numbers: tuple[int, int]) -> str:
    """A version as it is written."""
    return f"{numbers[0]}.{numbers[1]}"


class Hardware:
    """What TransformerEngine computes on. A test without a GPU puts another one in the place of :data:`hardware`."""

    devices: tuple[str, ...] = ("cuda",)
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    head_dim_multiple: int = 8

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def side_stream(self, device: torch.device) -> Any:
        """The stream that every other step runs on; one per device."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


hardware = Hardware()


class Wanted(NamedTuple):
    """What a ``DotProductAttention`` is made for; equal ones share a module."""

    heads: int
    key_heads: int
    dims: tuple[int, int]
    scale: float
    has_sinks: bool
    max_logit: bool
    crossing: bool
    layer: int | None
    device: torch.device
    deterministic: bool


@lru_cache(maxsize=256)
def attention_module(kind: Any, wanted: Wanted) -> Any:
    """A ``DotProductAttention`` of TransformerEngine's, made once.

    Args:
        kind: its class.
        wanted: what it must fit.
    """
    with torch.cuda.device(wanted.device) if wanted.device.type == "cuda" else nullcontext():
        return kind(
            num_attention_heads=wanted.heads,
            kv_channels=wanted.dims[0] if wanted.dims[0] == wanted.dims[1] else wanted.dims,
            num_gqa_groups=wanted.key_heads,
            attention_dropout=0.0,
            layer_number=wanted.layer,
            attention_type="cross" if wanted.crossing else "self",
            softmax_scale=wanted.scale,
            softmax_type="learnable" if wanted.has_sinks else "vanilla",
            return_max_logit=wanted.max_logit,
        )


def is_deterministic() -> bool:
    """Whether a module that is made now uses only kernels that give the same bits twice, as TransformerEngine says."""
    allowed = os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    return allowed == "0" or torch.are_deterministic_algorithms_enabled()


TAKEN = ("qkv_format", "cu_seqlens_q", "cu_seqlens_q_padded", "max_seqlen_q", "attn_mask_type", "window_size")


@lru_cache
def not_taken(kind: Any) -> list[str]:
    """Arguments that we pass and a class's ``forward`` does not take."""
    parameters = signature(kind.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return []
    return [name for name in (*TAKEN, "pad_between_seqs") if name not in parameters]
