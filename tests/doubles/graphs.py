"""A CUDA graph on a CPU: operators are recorded with the tensors they read and wrote, and run again on the same ones.

As on a GPU, a replay decides nothing: what the library's code decided while it was recorded is decided, numbers are
constants, and only what tensors hold may differ. Memory that an operator does not write holds NaN in a replay.
Messages, the reshard of Ulysses and the doubles of kernels are each one recorded step, with the arguments they had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from cphandler.attention import attention
from cphandler.comm import transfers
from cphandler.handler import layout_handler
from cphandler.operators import functions
from tests.doubles import flash, packages

OPENED = {f"cphandler::{name}": functions[name] for name in ("attention_forward", "attention_backward")}
"""Operators whose insides are recorded."""

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "masked_select")
"""What a capture refuses: the host would wait for the device, or a shape follow from what it holds."""

UNWRITTEN = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Graph(TorchDispatchMode):
    """What was recorded, and how to run it again."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._steps: list[Callable[[], None]] = []
        self._kept: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in OPENED:
            with self:
                return OPENED[name](*args, **kwargs)
        short = name.partition("::")[2]
        assert short not in WAITS, f"{name} in a capture"
        result = func(*args, **kwargs)
        self.names.append(name)
        outputs = [x for x in tree_flatten(result)[0] if isinstance(x, Tensor)]
        self._kept.append((args, kwargs, outputs))
        if short in UNWRITTEN:
            self._steps.append(lambda: _spoil(outputs))
        elif func._schema.is_mutable:
            self._steps.append(lambda: func(*args, **kwargs))
        elif not all(_is_in(x, args) for x in outputs):  # else views of what is written by then
            self._steps.append(lambda: _again(func, args, kwargs, outputs))
        return result

    def leaf(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that is one step, as an operator is."""

        def call(*args: Any) -> Any:
            with torch.utils._python_dispatch._disable_current_modes():
                result = function(*args)
            outputs = [x for x in tree_flatten(result)[0] if isinstance(x, Tensor)]
            self.names.append(function.__name__)
            self._kept.append((args, outputs))
            self._steps.append(lambda: _again(function, args, {}, outputs))
            return result

        return call

    def step(self, run: Callable[[], None]) -> None:
        """Run something that has no operator of its own, now and in each replay."""
        self.names.append("message")
        self._steps.append(run)
        with torch.utils._python_dispatch._disable_current_modes():
            run()

    def replay(self) -> None:
        """Run all of it again."""
        with torch.no_grad():
            for step in self._steps:
                step()


def _spoil(outputs: list[Tensor]) -> None:
    for x in outputs:
        if x.is_floating_point():
            x.fill_(float("nan"))


def _is_in(x: Tensor, args: Any) -> bool:
    """Whether a tensor shares memory with an argument; those without any all have address 0."""
    memory = x.untyped_storage().data_ptr()
    tensors = [y for y in tree_flatten(args)[0] if isinstance(y, Tensor)]
    return memory != 0 and any(y.untyped_storage().data_ptr() == memory for y in tensors)


def _again(func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
    made = [x for x in tree_flatten(func(*args, **kwargs))[0] if isinstance(x, Tensor)]
    for place, value in zip(outputs, made, strict=True):
        assert place.shape == value.shape
        if place.data_ptr() != value.data_ptr():
            place.copy_(value)


class _Transfer:
    """Sends and receives of a graph, which are one step when they are waited for."""

    def __init__(self, run: Callable[[], None], graph: Graph) -> None:
        self._run, self._graph = run, graph

    def wait(self) -> None:
        self._graph.step(self._run)


@contextmanager
def captured() -> Iterator[Graph]:
    """What runs here is recorded, and the library believes that CPU tensors are captured."""
    graph, post = Graph(), transfers.post

    def posted(sends: Any, receives: Any, group_name: str) -> Any:
        return _Transfer(lambda: post(sends, receives, group_name).wait(), graph)

    believes = {"CAPTURED": "cpu", "is_capturing": lambda: True}
    with (
        mock.patch.multiple(attention, **believes),
        mock.patch.multiple(layout_handler, **believes),
        mock.patch.object(transfers, "post", posted),
        mock.patch.object(packages, "_forward", graph.leaf(packages._forward)),
        mock.patch.object(packages, "_backward", graph.leaf(packages._backward)),
        graph,
    ):
        yield graph


def room() -> Any:
    """The doubles of flash kernels take offsets with room."""
    return mock.patch.object(flash, "ROOM", True)
