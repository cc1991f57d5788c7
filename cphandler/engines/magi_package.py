"""MagiAttention as a package: found when it is chosen, and refused with a way out where it cannot be used."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import import_module, metadata
from inspect import Parameter, signature
from typing import Any, NamedTuple

from cphandler.errors import MissingPackageError

TESTED = ((1, 1, 1), (1, 2))
"""Versions whose signatures are known: from the first, and below the second."""

SOURCE = (
    "build it on a machine with CUDA from its source, https://github.com/SandAI-org/MagiAttention (v1.1.1); there is "
    "no release to install, and magi-attention 0.0.1 is an empty placeholder"
)
"""The way out."""

CALLED: Mapping[str, tuple[str, ...]] = {
    "magi_attn_flex_key": (
        "q_ranges",
        "k_ranges",
        "attn_mask_type",
        "total_seqlen_q",
        "total_seqlen_k",
        "num_heads_q",
        "num_heads_kv",
        "head_dim",
        "pad_size",
        "cp_group_or_mesh",
        "dist_attn_config",
    ),
    "make_flex_key_for_new_mask_after_dispatch": (
        "q_ranges",
        "k_ranges",
        "attn_mask_type",
        "key_for_dispatch",
        "num_heads_q",
        "num_heads_kv",
        "head_dim",
    ),
    "dispatch": ("x", "key", "pad_value"),
    "calc_attn": ("q", "k", "v", "key", "sink", "softmax_scale", "return_max_logits"),
}
"""What is called of the package, and by which names arguments are passed."""


class MagiPackage(NamedTuple):
    """What a handler uses of the package.

    Attributes:
        flex_key: makes a key, MagiAttention's plan, on all ranks of a group together.
        further_key: the same for another mask, or other heads, over the rows of a key.
        dispatch: this rank's rows.
        calc_attn: attention over them.
        ranges: intervals from a list of pairs.
        config: makes the package's settings.
    """

    flex_key: Callable[..., Any]
    further_key: Callable[..., Any]
    dispatch: Callable[..., Any]
    calc_attn: Callable[..., Any]
    ranges: Callable[[list[list[int]]], Any]
    config: Callable[..., Any]


def magi_package() -> MagiPackage:
    """The package, imported.

    Raises:
        MissingPackageError: it is not there, is a placeholder, does not import (whatever it raises), has a version that
            was not tried, or lacks what is called.
    """
    try:
        package = import_module("magi_attention")
        _check_version(getattr(package, "__version__", None) or _installed())
        api, common, config = (import_module(f"magi_attention.{name}") for name in ("api", "common", "config"))
        flex_key, further_key, dispatch, calc_attn = called = [getattr(api, name) for name in CALLED]
        found = MagiPackage(
            flex_key, further_key, dispatch, calc_attn, common.AttnRanges.from_ranges, config.DistAttnConfig
        )
    except MissingPackageError:
        raise
    except Exception as error:  # importing compiles and probes devices: anything may come out
        installed = _installed()
        if installed is not None:
            _check_version(installed)
        raise MissingPackageError(
            "the backend 'magi' needs the package magi_attention, and it cannot be imported",
            got=f"{type(error).__name__}: {error}",
            fix=SOURCE,
        ) from error
    for name, function in zip(CALLED, called, strict=True):
        _check_signature(name, function)
    return found


def _installed() -> str | None:
    """The version of the distribution that pip lists; None where there is none."""
    try:
        return metadata.version("magi-attention")
    except metadata.PackageNotFoundError:
        return None


def _check_version(version: str | None) -> None:
    numbers = tuple(map(int, re.findall(r"\d+", (version or "").partition("+")[0])[:3]))
    if not TESTED[0] <= numbers < TESTED[1]:
        first, stop = (".".join(map(str, bound)) for bound in TESTED)
        raise MissingPackageError(
            f"the backend 'magi' knows magi_attention from {first} and below {stop}",
            got=f"version {version}" if version else "a copy that tells no version",
            fix=SOURCE,
        )


def _check_signature(name: str, function: Callable[..., Any]) -> None:
    """Refuse a function that lacks an argument which is passed to it, or wants one which is not."""
    parameters = signature(function).parameters
    wanted = {p.name for p in parameters.values() if p.default is Parameter.empty}
    passed = set(CALLED[name])
    wrong = sorted(passed - set(parameters)) or sorted(wanted - passed)
    if wrong:
        raise MissingPackageError(
            f"this magi_attention has another {name} than those that are known",
            got=f"{name}{signature(function)}, which differs in {wrong[0]!r}",
            fix=SOURCE,
        )
