"""What is here and what is not: versions, devices, backends and kernels, each that is not with the way out."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from typing import TypedDict

import numpy as np
import pydantic
import torch
from rich.console import Console
from rich.text import Text

from cphandler import __version__
from cphandler.handler.factory import available_cp_handlers
from cphandler.kernels import candidates, kernel_devices
from cphandler.kernels.packages import version_of
from cphandler.registry import BROKEN

PACKAGES = {
    "triton": ("triton", "pytorch-triton"),
    "flash-attn": ("flash-attn",),
    "flash_attn_3": ("flash_attn_3", "flash-attn-3"),
    "flash-attn-4": ("flash-attn-4",),
    "transformer-engine": ("transformer-engine",),
    "magi-attention": ("magi-attention",),
}
"""Packages that are not needed, each by the names under which it is released."""


class Finding(TypedDict):
    """A device, a backend or a kernel.

    Keys:
        name: its name.
        usable: whether it can be used here.
        reason: what is wrong; None where nothing is.
        fix: what can be done about it; None where nothing is wrong.
        details: what else there is to say; empty for nothing.
    """

    name: str
    usable: bool
    reason: str | None
    fix: str | None
    details: str


class Report(TypedDict):
    """All of it, as ``doctor --json`` prints it.

    Keys:
        versions: by name; None for what is not installed.
        devices: GPUs, and what ranks talk over.
        backends: by ``backend`` or ``backend/comm type``.
        kernels: by type of device, in order of preference.
    """

    versions: dict[str, str | None]
    devices: list[Finding]
    backends: list[Finding]
    kernels: dict[str, list[Finding]]


def examined() -> Report:
    """Look at everything. Packages are imported: what they print goes to standard error, what they raise is told."""
    with redirect_stdout(sys.stderr):
        return Report(
            versions=_versions(),
            devices=[
                *_found("CUDA devices", _cuda_devices),
                *_found("gloo", _gloo),
                *_found("NCCL", _nccl),
            ],
            backends=_found("backends", _backends),
            kernels={device_type: [*_kernels(device_type)] for device_type in kernel_devices()},
        )


def _versions() -> dict[str, str | None]:
    names: dict[str, str | None] = {
        "cphandler": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "CUDA of torch's build": torch.version.cuda,
        "pydantic": pydantic.VERSION,
        "numpy": np.__version__,
    }
    for name, distributions in PACKAGES.items():
        found = (version_of(distribution) for distribution in distributions)
        names[name] = next((text for text in found if text is not None), None)
    return names


def _finding(name: str, details: str = "", reason: str | None = None, fix: str | None = None) -> Finding:
    return Finding(name=name, usable=reason is None, reason=reason, fix=fix, details=details)


def _found(what: str, look: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """What is found, or the one finding that looking failed: a driver, and metadata, may be broken too."""
    try:
        return [*look()]
    except BROKEN as error:
        told = f"{type(error).__name__}: {error}"
        return [_finding(what, reason=told, fix="mend the driver or the package that raises it")]


def _cuda_devices() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            yield _finding(
                "CUDA devices", "", f"torch {torch.__version__} is built without CUDA", "install a CUDA build"
            )
        else:
            yield _finding("CUDA devices", "", "torch sees none", "see that nvidia-smi lists one, and the driver's age")
        return
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        details = f"{card.name}, compute capability {card.major}.{card.minor}, {card.total_memory / 2**30:.1f} GiB"
        yield _finding(f"cuda:{index}", details)


def _gloo() -> Iterator[Finding]:
    if torch.distributed.is_available() and torch.distributed.is_gloo_available():
        yield _finding("gloo", "ranks on CPUs")
    else:
        yield _finding("gloo", "", "torch is built without it", "install a build of torch that has torch.distributed")


def _nccl() -> Iterator[Finding]:
    if not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
        yield _finding("NCCL", "", "torch is built without it", "install a CUDA build of torch")
    else:
        yield _finding("NCCL", ".".join(map(str, torch.cuda.nccl.version())) + ", ranks on GPUs")


def _backends() -> Iterator[Finding]:
    for one in available_cp_handlers(explain=True):
        name = f"{one.backend}/{one.comm_type}" if one.comm_type else one.backend
        yield _finding(name, reason=one.reason, fix=one.fix)


def _kernels(device_type: str) -> Iterator[Finding]:
    for one in candidates(device_type):
        yield _finding(one.name, f"preference {one.preference}", one.refusal, one.fix)


def show(report: Report, console: Console) -> None:
    """Print a report. Lines are not broken, so that a command can be copied.

    Args:
        report: what was found.
        console: where to.
    """
    console.print(Text("versions", style="bold"))
    width = max(map(len, report["versions"]))
    for name, version in report["versions"].items():
        console.print(Text(f"  {name:{width}}  {version or 'none'}", style="" if version else "dim"))
    kernels = {f"kernels for {name}, in the order of auto": found for name, found in report["kernels"].items()}
    for title, found in {"devices": report["devices"], "backends": report["backends"], **kernels}.items():
        console.print(Text(title, style="bold"))
        width = max((len(one["name"]) for one in found), default=0)
        for one in found:
            mark = Text("  yes  ", style="green") if one["usable"] else Text("  no   ", style="red")
            told = one["details"] if one["usable"] else str(one["reason"])
            console.print(mark + Text(f"{one['name']:{width}}  {told}".rstrip()), soft_wrap=True)
            if one["fix"]:
                console.print(Text(f"       {'':{width}}  {one['fix']}", style="dim"), soft_wrap=True)
