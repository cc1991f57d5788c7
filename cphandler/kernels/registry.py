"""Kernels by name and device."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from cphandler.errors import InvalidTypeError, InvalidValueError, UnsupportedError
from cphandler.kernels.kernel import Kernel
from cphandler.kernels.packages import A_DEVICE, has_device
from cphandler.registry import BROKEN, Registry, normal

_KERNELS: Registry[tuple[str, str], Kernel] = Registry(
    "kernel",
    lambda: Kernel,
    {
        ("torch", "cpu"): "cphandler.kernels.torch_cpu:TorchCpuKernel",
        ("torch", "cuda"): "cphandler.kernels.torch_cuda:TorchCudaKernel",
        ("torch_flash", "cuda"): "cphandler.kernels.torch_flash:TorchFlashKernel",
        ("torch_efficient", "cuda"): "cphandler.kernels.torch_efficient:TorchEfficientKernel",
        ("torch_cudnn", "cuda"): "cphandler.kernels.torch_cudnn:TorchCudnnKernel",
        ("flash_attn_2", "cuda"): "cphandler.kernels.flash_attn_2:FlashAttn2Kernel",
        ("flash_attn_3", "cuda"): "cphandler.kernels.flash_attn_3:FlashAttn3Kernel",
        ("flash_attn_4", "cuda"): "cphandler.kernels.flash_attn_4:FlashAttn4Kernel",
        ("reference", "any"): "cphandler.kernels.reference:ReferenceKernel",
    },
    made_without=True,
)

_PREFERENCES: dict[tuple[str, str], int] = {
    ("flash_attn_3", "cuda"): 28,
    ("flash_attn_4", "cuda"): 26,
    ("flash_attn_2", "cuda"): 24,
    ("torch", "cpu"): 20,
    ("torch", "cuda"): 20,
    ("torch_flash", "cuda"): 18,
    ("torch_efficient", "cuda"): 16,
    ("torch_cudnn", "cuda"): 14,
    ("reference", "any"): 0,
}
"""``"auto"`` takes the highest that takes the call. Between packages the order is their authors' figures for Hopper."""


def register_kernel(name: str, device_type: str, target: str | type[Kernel], *, preference: int = 10) -> None:
    """Make a kernel known.

    Args:
        name: what ``CPConfig.kernel`` names.
        device_type: ``"cpu"``, ``"cuda"``, ... or ``"any"``.
        target: a :class:`Kernel` subclass that takes no arguments, or ``"module:Class"``, imported when first used.
        preference: ``"auto"`` takes the kernel with the highest one that takes a call. torch's have 20, the reference
            has 0, packages for GPUs lie between 20 and 30: 10 serves what torch's kernels refuse, 30 goes before all.

    Raises:
        InvalidTypeError: a target that is neither, or a preference that is no int.
        InvalidValueError: a name that is no text, or taken on this device by another target.
    """
    for what, text in (("name", name), ("device type", device_type)):
        if not isinstance(text, str) or not text.strip():
            raise InvalidValueError(f"a kernel's {what} must be a non-empty string", got=repr(text), fix='"mine", say')
    if isinstance(preference, bool) or not isinstance(preference, int):
        raise InvalidTypeError("preference must be an int", got=repr(preference), fix="30 goes before torch's kernels")
    key = normal(name), normal(device_type)
    if key[0] == "auto":
        raise InvalidValueError("no kernel can be called auto", got=repr(name), fix="choose another name")
    _KERNELS.register(key, target, _shown(key))
    _PREFERENCES[key] = preference


def available_kernels(device_type: str) -> list[str]:
    """Names of the kernels for a device."""
    return sorted({name for name, _ in _on(device_type)})


def _on(device_type: str) -> Iterator[tuple[str, str]]:
    return (key for key in _KERNELS if key[1] in (device_type, "any"))


def _shown(key: tuple[str, str]) -> str:
    return f"{key[0]!r} for {key[1]}"


@lru_cache
def get_kernel(name: str, device_type: str) -> Kernel:
    """The kernel of this name for a device.

    Raises:
        InvalidValueError: there is none.
    """
    key = _known(name, device_type)
    return _KERNELS.get(key, _shown(key))()


def _known(name: str, device_type: str) -> tuple[str, str]:
    for key in ((normal(name), device_type), (normal(name), "any")):
        if key in _KERNELS:
            return key
    raise InvalidValueError(
        f"no kernel {name!r} for {device_type} tensors",
        fix=f"CPConfig.kernel may be auto, {', '.join(available_kernels(device_type))}",
    )


def likely_kernel(name: str, device_type: str) -> Kernel:
    """The kernel that calls on a device will take, as far as a name tells: for ``"auto"`` the one preferred there.

    Args:
        name: a kernel's name, or ``"auto"``.
        device_type: ``"cpu"``, ``"cuda"``, ...

    Raises:
        InvalidValueError: there is none of this name for the device.
    """
    if normal(name) == "auto":
        name, _ = max(_on(device_type), key=_PREFERENCES.__getitem__)
    return get_kernel(name, device_type)


def check_kernel_name(name: str) -> None:
    """Refuse a name that no kernel has on any device.

    Args:
        name: a kernel's name, or ``"auto"``.

    Raises:
        InvalidValueError: there is none.
    """
    known = sorted({key[0] for key in _KERNELS})
    if normal(name) not in ("auto", *known):
        raise InvalidValueError(
            "unknown kernel",
            got=repr(name),
            fix=f"CPConfig.kernel may be auto, {', '.join(known)}; register_kernel makes others known",
        )


class Asked(NamedTuple):
    """What a call asks of a kernel.

    Attributes:
        q: queries; dtype, device and head dims count.
        k: keys.
        v: values.
        deterministic: take only kernels that give the same bits in two runs.
        softcap: take only kernels that cap scores.
        dropout: take only kernels that drop weights.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    deterministic: bool = False
    softcap: bool = False
    dropout: bool = False


class Candidate(NamedTuple):
    """A kernel for a device, and what it has against a call.

    Attributes:
        name: what ``CPConfig.kernel`` names.
        preference: ``"auto"`` takes the highest that takes the call.
        refusal: why it does not take the call; None where it does.
        fix: what would make it usable here, where it is not; None where it is, or nothing is known.
        error: what was raised when it was loaded or asked; a call that comes to it raises the same.
    """

    name: str
    preference: int
    refusal: str | None = None
    fix: str | None = None
    error: BaseException | None = None


def kernel_devices() -> list[str]:
    """Types of devices that a kernel is registered for by name."""
    return sorted({device_type for _, device_type in _KERNELS} - {"any"})


def candidates(device_type: str, asked: Asked | None = None) -> Iterator[Candidate]:
    """The kernels for a device in the order in which ``"auto"`` tries them, each asked when its turn comes.

    Args:
        device_type: ``"cpu"``, ``"cuda"``, ...
        asked: a call; None asks only what can run here at all. Where its tensors stand in for those of a device that
            is not here, every kernel refuses.
    """
    names = dict.fromkeys(key[0] for key in sorted(_on(device_type), key=lambda key: -_PREFERENCES[key]))
    return (_candidate(name, device_type, asked) for name in names)


def _candidate(name: str, device_type: str, asked: Asked | None) -> Candidate:
    preference = max(_PREFERENCES[key] for key in _on(device_type) if key[0] == name)
    try:
        reason, fix = _unusable(get_kernel(name, device_type), device_type, asked)
        if reason is None and asked is not None:
            reason = _refusal(get_kernel(name, device_type), asked)
        return Candidate(name, preference, reason, fix)
    except BROKEN as error:  # of a kernel of the caller's own, say
        fix = getattr(error, "fix", None) or f"mend the kernel {name!r}, or choose another one by CPConfig.kernel"
        return Candidate(name, preference, f"{type(error).__name__}: {error}", fix, error)


def _unusable(kernel: Kernel, device_type: str, asked: Asked | None) -> tuple[str | None, str | None]:
    """Why a kernel cannot run here, and the way out; twice None where it can."""
    told = kernel.unusable()
    if told is None:
        is_here = (asked is not None and asked.q.device.type == device_type) or has_device(device_type)
        return (None, None) if is_here else (f"torch {torch.__version__} sees no {device_type} device", A_DEVICE)
    install = "" if kernel.package is None else kernel.package.install
    if install and told.endswith(f"; {install}"):  # which may have such marks in it
        return told.removesuffix(f"; {install}"), install
    reason, _, way_out = told.rpartition("; ")
    return (reason, way_out) if reason else (told, None)


def _refusal(kernel: Kernel, asked: Asked) -> str | None:
    told = kernel.nondeterminism() if asked.deterministic else None
    return told or kernel.refusal(asked.q, asked.k, asked.v, softcap=asked.softcap, dropout=asked.dropout)


def select_kernel(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    deterministic: bool = False,
    softcap: bool = False,
    dropout: bool = False,
) -> str:
    """The name of the kernel to use: the one asked for, or for ``"auto"`` the fastest that takes this call.

    Args:
        name: a kernel's name, or ``"auto"``.
        q: queries; dtype, device and head dims count.
        k: keys.
        v: values.
        deterministic: take only kernels that give the same bits in two runs.
        softcap: take only kernels that cap scores.
        dropout: take only kernels that drop weights.

    Raises:
        InvalidValueError: no such kernel.
        UnsupportedError: the kernel asked for does not take these tensors or options, or is not deterministic.
    """
    return _taken(choose(name, q.device.type, Asked(q, k, v, deterministic, softcap, dropout)), shown=name)


def choose(name: str, device_type: str, asked: Asked) -> Candidate:
    """The kernel that a call comes to; it may still refuse the call.

    Args:
        name: a kernel's name, or ``"auto"``.
        device_type: ``"cpu"``, ``"cuda"``, ...
        asked: the call.

    Raises:
        InvalidValueError: no such kernel.
    """
    if normal(name) != "auto":
        _known(name, device_type)
        return _candidate(normal(name), device_type, asked)
    one = None
    for one in candidates(device_type, asked):
        if one.refusal is None or one.error is not None:
            break
    return one or Candidate("reference", 0)


def _taken(candidate: Candidate, *, shown: str) -> str:
    """The name of a kernel that takes the call; raises what another one has against it."""
    if candidate.error is not None:
        raise candidate.error
    if candidate.refusal is not None:
        way_out = 'use CPConfig(kernel="reference"), or "auto" to be given the fastest that can'
        raise UnsupportedError(
            f"kernel {shown!r} cannot be used here",
            got=candidate.refusal,
            fix=way_out if candidate.fix is None else f"{candidate.fix}; or {way_out}",
        )
    return candidate.name
