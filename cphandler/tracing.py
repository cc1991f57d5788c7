"""Planning is integers on the host, and a compiler that traced it would trace numpy. Here it is kept out of graphs.

``torch.compiler.disable`` does that, but calling it imports the compiler, which takes as long as importing all of this
library. So functions are marked, and the marks take effect at the first call in a process that has loaded the compiler.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_functions: dict[str, Callable[..., Any]] = {}
"""Marked functions by name."""

REASON = "{} is kept out of graphs: plan() prepares attention for a compiled block, all else goes before or after it"
"""What a compiler that may not break its graph says of a marked function."""

_outside: dict[str, Callable[..., Any]] = {}
"""The same functions, kept out of graphs; empty until the compiler is loaded."""


def untraced(function: Callable[P, T]) -> Callable[P, T]:
    """Mark a function that never belongs into a graph: a compiled model breaks its graph around it."""
    name = f"{function.__module__}.{function.__qualname__}"
    _functions[name] = function
    if _outside:
        _outside[name] = torch.compiler.disable(function, reason=REASON.format(name))

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        # No word of torch here: the compiler would take each function and each kind of argument for one more version of
        # these lines, where it now leaves them alone for good once it meets them without a tensor.
        run = _outside[name] if _outside else _kept_out(name) if _is_compiler_loaded() else function
        result: T = run(*args, **kwargs)
        return result

    return call


def _is_compiler_loaded() -> bool:
    """Also true while a compiler traces this, which takes the first condition for true and does not look at modules."""
    return torch.compiler.is_dynamo_compiling() or "torch._dynamo" in sys.modules


def _kept_out(name: str) -> Callable[..., Any]:
    """Let all marks take effect; the function of this name, kept out of graphs."""
    made = {mark: torch.compiler.disable(function, reason=REASON.format(mark)) for mark, function in _functions.items()}
    _outside.update(made)  # all at once: other threads call too
    return _outside[name]
