"""Planning is integers on the host, and a compiler that traced it would trace numpy. Here it is kept out of graphs.

``torch.compiler.disable`` does that, but importing it takes as long as all of this library. So functions are marked,
and the marks take effect when a handler is made in a process that has loaded the compiler.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_calls: dict[str, Callable[..., Any]] = {}
_kept_out: set[str] = set()


def untraced(function: Callable[P, T]) -> Callable[P, T]:
    """Mark a function that never belongs into a graph: a compiled model breaks its graph around it."""
    name = f"{function.__module__}.{function.__qualname__}"
    _calls[name] = function

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        result: T = _calls[name](*args, **kwargs)
        return result

    return call


def keep_out_of_graphs() -> None:
    """Let the marks take effect, where there is a compiler that could trace."""
    if "torch._dynamo" not in sys.modules:
        return
    for name in _calls.keys() - _kept_out:
        _calls[name] = torch.compiler.disable(_calls[name])
        _kept_out.add(name)
