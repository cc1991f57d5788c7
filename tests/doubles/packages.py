"""Stand-ins for flash-attn 2, 3 and 4: modules with the signatures of the private functions that are called.

Signatures were read in flash-attn 2.8.3 (``flash_attn/flash_attn_interface.py``), in the repository's ``hopper`` folder
(3.0.0, two states of it) and in flash-attn-4 4.0.0b36 (``flash_attn/cute/interface.py``).
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from cphandler.kernels import flash_attn_2, flash_attn_3, flash_attn_4, packages, registry
from cphandler.kernels.registry import get_kernel, register_kernel
from tests.doubles.flash import (
    Call,
    checked,
    dense_backward,
    dense_forward,
    offsets_checked,
    packed_backward,
    packed_forward,
)
from tests.doubles.operators import HALF, counted, operators_on_cpu


def _forward(
    q: Tensor, k: Tensor, v: Tensor, starts: tuple[Any, Any], longest: tuple[Any, Any], call: Call
) -> tuple[Tensor, Tensor]:
    counted.append("forward")
    checked(q, k, v, dtypes=HALF)
    if starts[0] is None:
        assert q.dim() == 4
        return dense_forward(q, k, v, call)
    for start, rows, most in zip(starts, (q, k), longest, strict=True):
        offsets_checked(start, len(rows), most)
    return packed_forward(q, k, v, starts, call)


def _backward(
    grad_out: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    starts: tuple[Any, Any],
    call: Call,
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    counted.append("backward")
    checked(*qkv, dtypes=HALF)
    assert out.shape == grad_out.shape == qkv[0].shape
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    assert grad_lse is None or grad_lse.shape == lse.shape
    if starts[0] is None:
        return dense_backward(grad_out, qkv, out, lse, call, grad_lse)
    return packed_backward(grad_out, qkv, out, lse, starts, call, grad_lse)


def _written(into: tuple[Tensor, Tensor, Tensor], grads: tuple[Tensor, Tensor, Tensor]) -> None:
    for place, grad in zip(into, grads, strict=True):
        assert place.is_contiguous()
        place.copy_(grad)


def flash_attn_2_module() -> dict[str, Callable[..., Any]]:
    """``flash_attn.flash_attn_interface`` of 2.8.3."""

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        assert (dropout_p, alibi_slopes, return_softmax) == (0.0, None, False)
        call = Call(causal, window_size_left, window_size_right, softmax_scale, softcap)
        out, lse = _forward(q, k, v, (None, None), (None, None), call)
        return out, lse, torch.empty(0), torch.empty(2)

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, alibi_slopes, return_softmax) == (0.0, None, False)
        call = Call(causal, window_size_left, window_size_right, softmax_scale, softcap)
        out, lse = _forward(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), call)
        return out, lse, torch.empty(0), torch.empty(2)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        call = Call(causal, window_size_left, window_size_right, softmax_scale, softcap)
        _written((dq, dk, dv), _backward(dout, (q, k, v), out, softmax_lse, (None, None), call))
        return torch.empty(0)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        call = Call(causal, window_size_left, window_size_right, softmax_scale, softcap)
        starts = cu_seqlens_q, cu_seqlens_k
        _written((dq, dk, dv), _backward(dout, (q, k, v), out, softmax_lse, starts, call))
        return torch.empty(0)

    return {name: made for name, made in locals().items() if callable(made)}


def flash_attn_3_module() -> dict[str, Callable[..., Any]]:
    """``flash_attn_interface`` of the folder ``hopper``, a recent state."""

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
        k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None,
        sm_margin=0,
    ):  # fmt: skip
        assert num_splits == 1
        call = Call(causal, window_size_left, window_size_right, softmax_scale, softcap)
        out, lse = _forward(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), call)
        return out, lse, torch.empty(0), torch.empty(0)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        call = Call(is_causal, window_size_left, window_size_right, softmax_scale, softcap)
        _written((dq, dk, dv), _backward(dout, (q, k, v), out, softmax_lse, (cu_seqlens_q, cu_seqlens_k), call))
        return torch.empty(0)

    return {name: made for name, made in locals().items() if callable(made)}


def flash_attn_3_older_module() -> dict[str, Callable[..., Any]]:
    """The same, an older state: the window as a pair, and ``causal`` in both."""

    def _flash_attn_forward(
        q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k,
        max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary,
        q_descale, k_descale, v_descale, softmax_scale, causal, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
        rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        assert num_splits == 1
        call = Call(causal, *window_size, softmax_scale, softcap)
        out, lse = _forward(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), call)
        return out, lse

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k,
        dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        call = Call(causal, *window_size, softmax_scale, softcap)
        _written((dq, dk, dv), _backward(dout, (q, k, v), out, softmax_lse, (cu_seqlens_q, cu_seqlens_k), call))
        return dq, dk, dv, torch.empty(0)

    return {name: made for name, made in locals().items() if callable(made)}


def flash_attn_4_module() -> dict[str, Callable[..., Any]]:
    """``flash_attn.cute.interface`` of 4.0.0b36, without what concerns paged keys, scales and modifiers."""

    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
        window_size_left=None, window_size_right=None, learnable_sink=None, num_splits=1, pack_gqa=None,
        return_lse=False,
    ):  # fmt: skip
        assert return_lse
        assert num_splits == 1
        sides = (-1 if side is None else side for side in (window_size_left, window_size_right))
        call = Call(causal, *sides, softmax_scale, softcap or 0.0)
        out, lse = _forward(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), call)
        return out, lse, None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, dlse=None,
        learnable_sink=None,
    ):  # fmt: skip
        sides = (-1 if side is None else side for side in (window_size_left, window_size_right))
        call = Call(causal, *sides, softmax_scale, softcap)
        return *_backward(dout, (q, k, v), out, lse, (cu_seqlens_q, cu_seqlens_k), call, dlse), None, None

    return {name: made for name, made in locals().items() if callable(made)}


MODULES = {
    "flash_attn.flash_attn_interface": ("flash-attn", "2.8.3.post2", flash_attn_2_module),
    "flash_attn_interface": ("flash_attn_3", "3.0.0", flash_attn_3_module),
    "flash_attn.cute.interface": ("flash-attn-4", "4.0.0b36", flash_attn_4_module),
}
"""Distribution, version and functions by module."""

KERNELS = ("torch", "torch_flash", "torch_efficient", "torch_cudnn", "flash_attn_2", "flash_attn_3", "flash_attn_4")
"""Kernels for CUDA that run on the doubles."""

Modules = dict[str, tuple[str, str, "Callable[[], dict[str, Any]] | BaseException"]]

CACHES = (packages.installed, packages.missing, packages.parameters, get_kernel)


def prefixed(name: str) -> str:
    """The name under which a kernel for CUDA takes CPU tensors."""
    return f"double_{name}"


BROKEN_PACKAGES = {
    "flash_attn": ("flash-attn", "2.8.3", "raise RuntimeError('built for another CUDA')"),
    "flash_attn_interface": ("flash_attn_3", "3.0.0", "sys.exit('no licence')"),
    "flash_attn_cute": ("flash-attn-4", "4.0.0b9", ""),
    "transformer_engine": ("transformer-engine", "2.20.2", "raise RuntimeError('an empty package')"),
    "magi_attention": ("magi-attention", "0.0.1", "raise OSError('libmagi.so: cannot open shared object file')"),
    "broken_backend": ("broken-backend", "1.0", "raise MemoryError('no room')"),
}
"""Distribution, version and what importing it does, by module; the last one announces a backend."""


def install_broken_packages(folder: Path) -> None:
    """Write packages that are listed as installed, print when they are imported, note it in ``sys``, and raise."""
    for module, (distribution, version, does) in BROKEN_PACKAGES.items():
        noted = (
            f"import sys\nsys.__dict__.setdefault('broken', []).append(__name__)\nprint('{module} greets')\n{does}\n"
        )
        (folder / f"{module}.py").write_text(noted)
        metadata = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        if module == "broken_backend":
            entry = "[cphandler.backends]\nbroken:ring = broken_backend:Handler\n"
            (metadata / "entry_points.txt").write_text(entry)


@contextmanager
def kernels_on_cpu(
    capability: int | None = 90, modules: Modules = MODULES, *, as_they_are: bool = False
) -> Iterator[list[str]]:
    """The kernels for CUDA take CPU tensors, as ``double_torch_flash`` and so on; gives the names of calls.

    Args:
        capability: compute capability that is claimed; None for no GPU.
        modules: what is installed: distribution, version and functions by module, or what importing it raises.
        as_they_are: packages' kernels take CPU tensors under their own names and preferences.
    """
    versions = {distribution: version for distribution, version, _ in modules.values()}
    before = registry._KERNELS, registry._PREFERENCES

    def version(name: str) -> str:
        if name not in versions:
            raise packages.PackageNotFoundError(name)
        return versions[name]

    with ExitStack() as stack:
        made: dict[str, ModuleType] = {}
        broken = {path: found for path, (_, _, found) in modules.items() if isinstance(found, BaseException)}
        for path, (_, _, functions) in modules.items():
            if isinstance(functions, BaseException):
                continue
            for end in range(1, len(path.split(".")) + 1):
                made.setdefault(name := ".".join(path.split(".")[:end]), ModuleType(name))
            vars(made[path]).update(functions())
        stack.enter_context(imported(made))
        stack.enter_context(mock.patch.object(packages, "import_module", _importing(broken)))
        stack.enter_context(mock.patch.object(packages, "version", version))
        stack.enter_context(mock.patch.object(packages, "capability", return_value=capability))
        stack.enter_context(mock.patch.object(registry, "_KERNELS", copy.deepcopy(before[0])))
        stack.enter_context(mock.patch.object(registry, "_PREFERENCES", dict(before[1])))
        calls = stack.enter_context(operators_on_cpu())
        _forget()
        for name in KERNELS:
            target = type(get_kernel(name, "cuda"))
            register_kernel(prefixed(name), "cpu", target, preference=-1)
            if as_they_are and name.startswith("flash_attn"):
                register_kernel(name, "cpu", target, preference=before[1][name, "cuda"])
        try:
            yield calls
        finally:
            _forget()
    _forget()


def _importing(broken: dict[str, BaseException]) -> Callable[[str], ModuleType]:
    """``import_module`` that raises for some modules, as often as they are asked for."""

    def import_module(name: str) -> ModuleType:
        if name in broken:
            raise broken[name]
        return importlib.import_module(name)

    return import_module


@contextmanager
def imported(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Modules as if imported; what else is imported meanwhile stays."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def _forget() -> None:
    for cache in CACHES:
        cache.cache_clear()


__all__ = ["KERNELS", "MODULES", "flash_attn_2", "flash_attn_3", "flash_attn_4", "kernels_on_cpu", "prefixed"]
