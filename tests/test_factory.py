"""Backends by name, registration, entry points, and the rest of the public face."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cphandler
from cphandler import (
    ContextParallelHandler,
    InvalidValueError,
    LayoutHandler,
    available_cp_handlers,
    connect_zero_loss,
    get_cp_handler_cls,
)
from cphandler.handler.factory import find_cp_handler_cls


class MyHandler(LayoutHandler):
    """A third-party backend."""

    comm_type = "mine"

    def core_attn(self, attn_mod: Any, query: Any, key: Any, value: Any, **options: Any) -> Any:
        return query


def test_names_are_forgiving() -> None:
    ring = get_cp_handler_cls("local", "ring")
    assert get_cp_handler_cls("Ring") is ring
    assert get_cp_handler_cls("TORCH", "ring") is ring
    ulysses = get_cp_handler_cls("ulysses")
    assert get_cp_handler_cls("local", "a2a") is ulysses
    assert get_cp_handler_cls("local", "Ulysses") is ulysses
    gather = get_cp_handler_cls("all_gather")
    assert get_cp_handler_cls("local", "allgather") is get_cp_handler_cls("All-Gather") is gather
    assert get_cp_handler_cls().__name__ == "LocalHandler"
    assert all(issubclass(find_cp_handler_cls(*pair), ContextParallelHandler) for pair in available_cp_handlers())


def test_what_exists_is_listed() -> None:
    listed = available_cp_handlers()
    assert {("local", None), ("local", "a2a"), ("local", "ring"), ("local", "all_gather")} <= set(listed)
    with pytest.raises(InvalidValueError, match=r"or one of 'a2a', .*'usp' alone"):
        get_cp_handler_cls("transformer_engine", "p2p")


def test_a_backend_of_ones_own_has_everything_but_attention() -> None:
    handler = MyHandler(qkv_format="thd", cu_seqlens_q=[0, 3, 5])
    assert handler.roll_tensor(torch.arange(1, 6))[0].tolist() == [2, 3, 0, 5, 0]
    assert handler.comm_type == "mine"
    assert handler.get_rotary_seq_len() == 3


def test_the_abstract_class_demands_its_methods() -> None:
    with pytest.raises(TypeError, match="abstract"):
        ContextParallelHandler(qkv_format="thd", cu_seqlens_q=[0, 4])  # type: ignore[abstract]
    assert ContextParallelHandler.__abstractmethods__ >= {"dispatch", "combine", "roll_tensor", "core_attn"}


def test_every_public_name_exists_and_is_documented() -> None:
    for name in cphandler.__all__:
        assert getattr(cphandler, name).__doc__, name


def test_connect_zero_loss() -> None:
    hidden = torch.tensor([float("inf"), float("nan"), 1.0], requires_grad=True)
    ignored = torch.zeros(2)
    loss = connect_zero_loss(torch.tensor(3.0, requires_grad=True), hidden, ignored)
    assert loss.item() == 3.0
    loss.backward()
    assert hidden.grad.tolist() == [0.0, 0.0, 0.0]
    constant = connect_zero_loss(torch.tensor(0.0), hidden * 2)
    constant.backward()
    assert hidden.grad[2] == 0
    later = torch.ones(2, requires_grad=True) * 1
    loss = connect_zero_loss(torch.tensor(1.0), later)
    later.add_(1)
    loss.backward()
    poisoned = torch.tensor(0.0) + 0.0 * hidden.sum()
    assert poisoned.isnan(), "what it replaces"
    with pytest.raises(TypeError, match="connects to tensors"):
        connect_zero_loss(torch.tensor(0.0), 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="floating-point"):
        connect_zero_loss(torch.tensor(1))
