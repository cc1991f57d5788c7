"""Kernels by name and device."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from torch import Tensor

from cphandler.errors import InvalidTypeError, InvalidValueError, UnsupportedError
from cphandler.kernels.kernel import Kernel
from cphandler.registry import Registry, normal

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
    for key in ((normal(name), device_type), (normal(name), "any")):
        if key in _KERNELS:
            return _KERNELS.get(key, _shown(key))()
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
    wanted = normal(name)
    options = {"deterministic": deterministic, "softcap": softcap, "dropout": dropout}
    if wanted == "auto":
        names = dict.fromkeys(key[0] for key in sorted(_on(q.device.type), key=lambda key: -_PREFERENCES[key]))
        return next((one for one in names if _refusal(one, q, k, v, **options) is None), "reference")
    refusal = _refusal(wanted, q, k, v, **options)
    if refusal is not None:
        raise UnsupportedError(
            f"kernel {name!r} cannot be used here",
            got=refusal,
            fix='use CPConfig(kernel="reference"), or "auto" to be given the fastest that can',
        )
    return wanted


def _refusal(name: str, q: Tensor, k: Tensor, v: Tensor, *, deterministic: bool, **options: bool) -> str | None:
    kernel = get_kernel(name, q.device.type)
    told = kernel.unusable() or (kernel.nondeterminism() if deterministic else None)
    return told or kernel.refusal(q, k, v, **options)
