"""Who holds which row, by the definition of a layout; and tensors that lie strangely in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from cphandler.layouts.layout import Layout

RARE = frozenset({torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64})
"""Dtypes that torch copies and can do little else with."""


class Rows:
    """The rows of one rank, read off a layout's spans one by one.

    Args:
        layout: which rank holds which tokens.
        rank: this rank.
    """

    def __init__(self, layout: Layout, rank: int) -> None:
        self.layout = layout
        tokens = [-1] * layout.num_local_tokens
        for start, length, stride, local in layout.spans[rank].tolist():
            for i in range(length):
                tokens[local + i] = start + i * stride
        self.tokens = torch.tensor(tokens, dtype=torch.int64)
        self.held = (self.tokens >= 0).nonzero().flatten()
        """Local rows that hold a token."""

    def take(self, x: Tensor, dim: int, fill: float = 0) -> Tensor:
        """This rank's rows of a global tensor; pad rows hold ``fill``."""
        rows = x.movedim(dim, 0)
        taken = torch.full((len(self.tokens), *rows.shape[1:]), fill, dtype=x.dtype)
        if x.dtype in RARE:
            for row in self.held.tolist():
                taken[row].copy_(rows[self.tokens[row]])
        else:
            taken[self.held] = rows[self.tokens[self.held]]
        return taken.movedim(0, dim)


def laid(x: Tensor, strides: str) -> Tensor:
    """A tensor of the same values that lies otherwise in memory, rubbish between its elements.

    Args:
        x: the values.
        strides: ``"plain"``; ``"wide"``, a slice of a wider last dim; ``"stacked"``, every second element;
            ``"stepped"``, every second row; ``"permuted"``, dims in another order; ``"shifted"``, not at the start.
    """
    if x.dim() == 0 or strides == "plain":
        return x.contiguous()
    if strides == "permuted":
        order = list(reversed(range(x.dim())))
        return x.permute(order).contiguous().permute(order)
    shape = {
        "stacked": (*x.shape, 2),
        "stepped": (x.shape[0], 3, *x.shape[1:]),
        "wide": (*x.shape[:-1], x.shape[-1] + 5),
        "shifted": (x.numel() + 3,),
    }[strides]
    whole = torch.full(shape, float("nan") if x.is_floating_point() else 1, dtype=x.dtype)
    inside = {
        "stacked": lambda: whole[..., 1],
        "stepped": lambda: whole[:, 1],
        "wide": lambda: whole.narrow(-1, 2, x.shape[-1]),
        "shifted": lambda: whole[3:].view(x.shape),
    }[strides]()
    return inside.copy_(x)


def rubbish(like: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """What stands where no token is: ``"nan"``, ``"inf"``, ``"-inf"``, or ``"mixed"``, those and the largest number."""
    if kind != "mixed":
        return torch.full_like(like, float(kind))
    values = torch.tensor([float("nan"), float("inf"), float("-inf"), torch.finfo(like.dtype).max], dtype=like.dtype)
    return values[torch.randint(0, 4, like.shape, generator=generator)]
