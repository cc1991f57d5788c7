"""Kernels by name and device."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module

from torch import Tensor

from cphandler.errors import InvalidValueError, UnsupportedError
from cphandler.kernels.kernel import Kernel

_KERNELS: dict[tuple[str, str], str] = {
    ("reference", "any"): "cphandler.kernels.reference:ReferenceKernel",
    ("torch", "cpu"): "cphandler.kernels.torch_cpu:TorchCpuKernel",
    ("torch", "cuda"): "cphandler.kernels.torch_cuda:TorchCudaKernel",
}


def register_kernel(name: str, device_type: str, target: str) -> None:
    """Make a kernel known: ``target`` is ``"module:Class"``, imported when first used.

    Args:
        name: what ``CPConfig.kernel`` names.
        device_type: ``"cpu"``, ``"cuda"``, ... or ``"any"``.
        target: a :class:`Kernel` subclass that takes no arguments.
    """
    _KERNELS[name.lower(), device_type] = target
    get_kernel.cache_clear()


def available_kernels(device_type: str) -> list[str]:
    """Names of the kernels for a device."""
    return sorted({name for name, device in _KERNELS if device in (device_type, "any")})


@lru_cache
def get_kernel(name: str, device_type: str) -> Kernel:
    """The kernel of this name for a device.

    Raises:
        InvalidValueError: there is none.
    """
    target = _KERNELS.get((name.lower(), device_type)) or _KERNELS.get((name.lower(), "any"))
    if target is None:
        raise InvalidValueError(
            f"no kernel {name!r} for {device_type} tensors",
            fix=f"CPConfig.kernel may be auto, {', '.join(available_kernels(device_type))}",
        )
    module, _, attribute = target.partition(":")
    kernel: Kernel = getattr(import_module(module), attribute)()
    return kernel


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
    wanted = name.lower()
    options = {"deterministic": deterministic, "softcap": softcap, "dropout": dropout}
    if wanted == "auto":
        known = ("torch", q.device.type) in _KERNELS
        return "torch" if known and _refusal("torch", q, k, v, **options) is None else "reference"
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
    if deterministic and not kernel.deterministic:
        return "deterministic=True, and this kernel is not"
    return kernel.refusal(q, k, v, **options)
