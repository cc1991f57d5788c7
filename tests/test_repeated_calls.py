"""Calls like an earlier one pass without being looked at again: whatever differs from it must still be seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cphandler import CoreAttention, Full, SlidingWindow, get_cp_handler_cls
from cphandler.attention import attention
from cphandler.testing import assert_close, dense_attention, visible_pairs
from cphandler.testing.cases import Batch, Case, documents_of

LENGTHS = (9, 1, 6)


def handler_of() -> Any:
    return get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 9, 10, 16])


def tensors(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, heads, 8, generator=generator, dtype=torch.float64).to(dtype) for heads in (4, 2, 2)]


def right(qkv: list[Tensor], mask: Any = None, **options: Any) -> Tensor:
    case = Case(batch=Batch(LENGTHS), **({} if mask is None else {"mask": mask}))
    seen = visible_pairs(case.mask, documents_of(case))
    return dense_attention(*qkv, seen, qkv_format="thd", **options)[0]


CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "a window": ({"mask": SlidingWindow(2)}, {"mask": SlidingWindow(2)}),
    "another window": ({"mask": SlidingWindow(4)}, {"mask": SlidingWindow(4)}),
    "a name": ({"mask": "full"}, {"mask": Full()}),
    "a scale": ({"softmax_scale": 0.7}, {"softmax_scale": 0.7}),
    "another scale": ({"softmax_scale": 1}, {"softmax_scale": 1.0}),
    "a cap": ({"softcap": 2.0}, {"softcap": 2.0}),
    "a layer": ({"layer_number": 3}, {}),
}


def test_calls_of_many_kinds_in_any_order() -> None:
    handler = handler_of()
    for turn in range(3):
        for seed, (asked, meant) in enumerate(CALLS.values()):
            qkv = tensors(10 * turn + seed)
            assert_close(handler.core_attn(None, *qkv, **asked), right(qkv, **meant))
        qkv = tensors(turn, torch.float32)
        got = handler.core_attn(None, *qkv)
        assert_close(got, right([x.double() for x in qkv]), dtype=torch.float32)


def test_dims_and_heads_that_change() -> None:
    handler = handler_of()
    for heads, keys, dim in ((4, 2, 8), (4, 4, 8), (2, 1, 8), (4, 2, 5), (4, 2, 8)):
        qkv = [torch.randn(16, number, dim, dtype=torch.float64) for number in (heads, keys, keys)]
        assert_close(handler.core_attn(None, *qkv), right(qkv))


def test_more_kinds_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MOST_KINDS", 2)
    handler = handler_of()
    for i in range(12):
        qkv, scale = tensors(i), 0.1 * (1 + i % 4)
        assert_close(handler.core_attn(None, *qkv, softmax_scale=scale), right(qkv, softmax_scale=scale))
    assert len(handler.attention._passed) <= 2


def test_a_module_and_sinks_that_are_edited() -> None:
    handler, core, sinks = handler_of(), CoreAttention(softmax_scale=0.3), torch.zeros(4, dtype=torch.float64)
    for scale in (0.3, 0.9, 0.3):
        core.softmax_scale = scale
        sinks += scale
        qkv = tensors(1)
        wanted = right(qkv, softmax_scale=scale, sinks=sinks)
        assert_close(handler.core_attn(core, *qkv, sinks=sinks), wanted)


REFUSED: dict[str, tuple[dict[str, Any], Callable[[list[Tensor]], list[Any]], str]] = {
    "a layer that is no int": ({"layer_number": True}, list, "layer_number must be an int"),
    "a scale that is no number": ({"softmax_scale": True}, list, "softmax_scale must be a number"),
    "a cap below 0": ({"softcap": -2.0}, list, "softcap must be a positive number"),
    "a flag that is none": ({"return_lse": 0}, list, "return_lse must be True or False"),
    "an unknown name": ({"scale": 1.0}, list, "no option 'scale'"),
    "fewer rows": ({}, lambda qkv: [qkv[0][:15], *qkv[1:]], "this rank's 16 rows"),
    "another dtype": ({}, lambda qkv: [qkv[0].float(), *qkv[1:]], "share one dtype"),
    "no tensor": ({}, lambda qkv: [qkv[0].tolist(), *qkv[1:]], "must be a tensor"),
    "a sparse one": ({}, lambda qkv: [qkv[0].to_sparse(), *qkv[1:]], "must be a dense tensor"),
    "an unknown mask": ({"mask": "diagonal"}, list, "unknown mask"),
    "no module": ({}, list, "attn_mod must be None"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_wrong_is_refused_after_calls_that_were_right(what: str) -> None:
    """Among them calls that are equal as far as ``==`` goes: True is 1, 0 is False."""
    asked, changed, words = REFUSED[what]
    handler = handler_of()
    for right_ones in ({}, {"layer_number": 1}, {"softmax_scale": 1}, {"softcap": 2.0}, {"return_lse": False}):
        for _ in range(2):
            handler.core_attn(None, *tensors(0), **right_ones)
    for _ in range(2):
        with pytest.raises((ValueError, TypeError), match=words):
            handler.core_attn(3 if what == "no module" else None, *changed(tensors(0)), **asked)
    assert_close(handler.core_attn(None, *tensors(3)), right(tensors(3)))


def test_what_is_kept_holds_no_tensor_of_a_call() -> None:
    handler = handler_of()
    for grad in (False, True):
        q, k, v = (x.requires_grad_(grad) for x in tensors(0))
        handler.core_attn(None, q, k, v, return_lse=True)
    (known,) = handler.attention._passed.values()
    assert all(x.numel() == 0 for x in known[:3])


def test_a_call_without_a_gradient_leaves_no_node() -> None:
    handler, (q, k, v) = handler_of(), tensors(0)
    assert handler.core_attn(None, q, k, v).grad_fn is None
    q.requires_grad_()
    assert handler.core_attn(None, q, k, v).grad_fn is not None
    with torch.no_grad():
        assert handler.core_attn(None, q, k, v).grad_fn is None
    with torch.inference_mode():
        assert handler.core_attn(None, q, k, v).is_inference()
