"""Functions as operators of torch: what compilers, checkpointing and dispatch modes see as one step.

``torch.library.custom_op`` does the same. Of a small call it takes 16 us without a gradient and 55 with one, on a Xeon
core with torch 2.13, where the registrations here take 6 and 18: no check at each call of what never changes, the
dispatcher asked once where autograd has its place, no tree of arguments where a list is flat. It also loads the
compiler at the first call of an operator. Tests let ``torch.library.opcheck`` look for what the checks would find.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from cphandler.tracing import untraced

_LIBRARY = torch.library.Library("cphandler", "FRAGMENT")

_below_autograd = torch._C._AutoDispatchBelowAutograd
"""Private to torch, and what its own registrations call an operator's kernel under: autograd's place is passed by."""

Operator: TypeAlias = Any
"""What ``torch.ops`` has of an operator, for which torch has no public name."""


functions: dict[str, Callable[..., Any]] = {}
"""What operators run, by their names, for those who look inside."""


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Make a function an operator ``cphandler::name``, for every device; with :func:`differentiable`, of autograd too.

    The schema follows from its annotations. Arguments have no defaults, none is written to, and no result shares memory
    with an argument.
    """

    def made(function: Callable[..., Any]) -> Operator:
        functions[name] = function
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, untraced(function), "CompositeExplicitAutograd")
        return getattr(torch.ops.cphandler, name).default

    return made


def fake(overload: Operator) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a function say what an operator gives, in shapes, strides and dtypes, for tensors without data."""

    def made(function: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(overload, function, lib=_LIBRARY)
        return function

    return made


def differentiable(
    overload: Operator,
    backward: Callable[..., tuple[Any, ...]],
    save: Callable[[Any, tuple[Any, ...], Any], None],
    *,
    takes_list: bool = False,
) -> Callable[..., Any]:
    """Give an operator its derivative; a call of which nothing needs a gradient leaves no trace of it.

    The function that is returned is the operator again, at the place that autograd has in it: the dispatcher is asked
    once and not twice.

    Args:
        overload: the operator.
        backward: from the context and the results' gradients to a gradient, or None, for each argument.
        save: keeps in the context what that needs of the arguments and the results.
        takes_list: the first argument is a list of tensors, and alone is differentiated; so are the results, which
            ``backward`` gets the gradients of as a list, and the first of what it gives.
    """
    name = overload.name().removeprefix("cphandler::")
    node = _node(name, overload, backward, save, takes_list=takes_list)

    def choose(*inputs: Any) -> Any:
        if torch.is_grad_enabled():
            for x in inputs[0] if takes_list else inputs:
                if isinstance(x, Tensor) and x.requires_grad:
                    if takes_list:
                        return list(node.apply(len(inputs[0]), *inputs[0], *inputs[1:]))
                    return node.apply(*inputs)
        with _below_autograd():
            return overload(*inputs)

    choose.__qualname__ = f"differentiable.{name}"  # by which it is kept out of graphs
    outside = untraced(choose)
    _LIBRARY.impl(name, outside, "Autograd")

    def call(*inputs: Any) -> Any:
        return overload(*inputs) if torch.compiler.is_compiling() else outside(*inputs)

    return call


def _node(
    name: str,
    overload: Operator,
    backward: Callable[..., Any],
    save: Callable[..., None],
    *,
    takes_list: bool,
) -> Any:
    """What autograd keeps of a call: a function of single tensors, behind their number where they come as a list."""

    def forward(ctx: Any, *inputs: Any) -> Any:
        with _below_autograd():
            results = overload(*inputs)
        save(ctx, inputs, results)
        return results

    def forward_of_list(ctx: Any, number: int, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(forward(ctx, list(inputs[:number]), *inputs[number:]))

    def backward_of_list(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        first, *rest = backward(ctx, list(grads))
        return None, *first, *rest

    ways: tuple[Any, Any] = (forward_of_list, backward_of_list) if takes_list else (forward, backward)
    methods = {"forward": staticmethod(ways[0]), "backward": staticmethod(ways[1])}
    return type(name, (torch.autograd.Function,), methods)
