"""The package flash-attn itself, as released, over CPU kernels: its own signatures and wrappers, where it is installed.

Its compiled module is not needed: ``FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE pip install
--no-build-isolation --no-deps flash-attn`` installs its Python alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from cphandler.kernels import packages
from cphandler.kernels.flash_attn_2 import PACKAGE, FlashAttn2Kernel
from tests.doubles.flash import Call, dense_backward, dense_forward, packed_backward, packed_forward
from tests.doubles.packages import imported
from tests.test_kernels import check
from tests.test_varlen import TASKS


class Compiled(ModuleType):
    """``flash_attn_2_cuda``: what the package's Python calls, with positional arguments in its order."""

    @staticmethod
    def fwd(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        _, _, _, scale, causal, left, right, softcap, _, _ = rest
        out, lse = dense_forward(q, k, v, Call(causal, left, right, scale, softcap))
        return out, lse, torch.empty(0), torch.empty(2)

    @staticmethod
    def varlen_fwd(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        _, starts_q, starts_k, _, _, _, _, _, _, _, scale, _, causal, left, right, softcap, _, _ = rest
        call = Call(causal, left, right, scale, softcap)
        return *packed_forward(q, k, v, (starts_q, starts_k), call), torch.empty(0), torch.empty(2)

    @staticmethod
    def bwd(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> Any:
        dq, dk, dv, _, _, scale, causal, left, right, softcap, *_ = rest
        grads = dense_backward(grad_out, (q, k, v), out, lse, Call(causal, left, right, scale, softcap))
        for place, grad in zip((dq, dk, dv), grads, strict=True):
            place.copy_(grad)
        return dq, dk, dv, torch.empty(0)

    @staticmethod
    def varlen_bwd(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> Any:
        dq, dk, dv, starts_q, starts_k, _, _, _, _, scale, _, causal, left, right, softcap, *_ = rest
        call = Call(causal, left, right, scale, softcap)
        grads = packed_backward(grad_out, (q, k, v), out, lse, (starts_q, starts_k), call)
        for place, grad in zip((dq, dk, dv), grads, strict=True):
            place.copy_(grad)
        return dq, dk, dv, torch.empty(0)


@pytest.fixture
def front_end() -> Iterator[None]:
    """The installed package with a compiled module of ours."""
    try:
        version("flash-attn")
    except PackageNotFoundError:
        pytest.skip("flash-attn is not installed")
    with (
        imported({"flash_attn_2_cuda": Compiled("flash_attn_2_cuda")}),
        mock.patch.object(packages, "capability", return_value=90),
    ):
        module = __import__(PACKAGE.module, fromlist=["_flash_attn_forward"])
        operators = (
            "_flash_attn_forward",
            "_flash_attn_varlen_forward",
            "_flash_attn_backward",
            "_flash_attn_varlen_backward",
        )
        for name in operators:  # declared for CUDA alone
            operator = getattr(module, name)
            torch.library.register_kernel(operator, "cpu", operator._init_fn)
        yield


@pytest.mark.usefixtures("front_end")
@pytest.mark.parametrize("with_lse", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_package_as_released(dtype: torch.dtype, *, with_lse: bool) -> None:
    kernel = FlashAttn2Kernel()
    assert kernel.unusable() is None
    for task in TASKS:
        for d, d_v in ((16, 16), (20, 9)):
            check(kernel, task, task.nq + 3, task.nk + 4, heads=(4, 2), dtype=dtype, d=d, d_v=d_v, with_lse=with_lse)
