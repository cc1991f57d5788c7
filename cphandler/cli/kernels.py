"""The kernels that are built in, side by side, for people and for the documentation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from cphandler.kernels import Kernel, candidates, get_kernel, kernel_devices
from cphandler.precision import ATTENTION_DTYPES

HEAD_DIMS = (64, 128, 192, 256, 512, 1024)
"""Which of them are tried; what takes the last is said to take any."""


class Row(NamedTuple):
    """A kernel for a device.

    Attributes:
        name: what ``CPConfig.kernel`` names.
        device: type of device.
        preference: ``"auto"`` takes the highest that takes the call.
        dtypes: what it computes in.
        head_dim: the largest.
        windows: whether windows are as fast as full and causal attention.
        softcap: whether it caps scores.
        dropout: whether it drops weights.
        deterministic: whether two runs give the same bits.
        install: how its package is installed; empty where torch is all it needs.
    """

    name: str
    device: str
    preference: str
    dtypes: str
    head_dim: str
    windows: str
    softcap: str
    dropout: str
    deterministic: str
    install: str


COLUMNS = (
    "kernel",
    "device",
    "preference",
    "dtypes",
    "head dim",
    "windows",
    "softcap",
    "dropout",
    "deterministic",
    "package, and how it is installed",
)


def table() -> Iterator[Row]:
    """The table, row by row, by device and in order of preference."""
    for device_type in kernel_devices():
        for name, preference, *_ in candidates(device_type):
            yield _row(get_kernel(name, device_type), name, device_type, preference)


def _row(kernel: Kernel, name: str, device_type: str, preference: int) -> Row:
    dtypes = [dtype for dtype in ATTENTION_DTYPES if _takes(kernel, dtype, HEAD_DIMS[0])]
    package = kernel.package
    return Row(
        name,
        device_type,
        str(preference),
        ", ".join(_short(dtype) for dtype in dtypes),
        _by_dtype({dtype: _widest(kernel, dtype) for dtype in dtypes}),
        _by_dtype({dtype: "yes" if kernel.fuses_windows(dtype) else "densely" for dtype in dtypes}),
        "no" if "softcap" in kernel.refuses else "yes",
        "no" if "dropout" in kernel.refuses else "yes",
        _deterministic(kernel),
        "" if package is None else f"{package.distributions[0]}: {package.install}",
    )


def _deterministic(kernel: Kernel) -> str:
    told = kernel.nondeterminism()
    if kernel.deterministic:
        return "yes"
    return "by torch's setting" if told is None or "torch.use_deterministic_algorithms" in told else "no"


def _takes(kernel: Kernel, dtype: torch.dtype, head_dim: int) -> bool:
    x = torch.empty(1, 0, 1, head_dim, dtype=dtype, device="meta")
    return kernel.misfit(x, x, x) is None


def _widest(kernel: Kernel, dtype: torch.dtype) -> str:
    widest = max(head_dim for head_dim in HEAD_DIMS if _takes(kernel, dtype, head_dim))
    return "any" if widest == HEAD_DIMS[-1] else f"up to {widest}"


def _by_dtype(told: dict[torch.dtype, str]) -> str:
    """One word for all dtypes, or the first one's and what differs from it."""
    first = next(iter(told.values()), "")
    return ", ".join([first, *(f"{said} in {_short(dtype)}" for dtype, said in told.items() if said != first)])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def as_markdown() -> str:
    """The table as Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in table():
        name, *cells, install = row
        package, _, line = install.partition(": ")
        shown = f"`{line}`" if line.startswith("pip ") else line
        lines.append("| " + " | ".join([f"`{name}`", *cells, f"{package}: {shown}" if package else "torch"]) + " |")
    return "\n".join(lines)


def as_text() -> str:
    """The table in columns; lines are not broken, so that a command can be copied."""
    rows = [COLUMNS, *table()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
