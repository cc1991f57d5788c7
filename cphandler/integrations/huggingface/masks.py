"""Masks of transformers, which are functions put together from functions, as masks of this library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cphandler.tokens.masks import Causal, Chunked, Full, Mask, SlidingWindow

_ORIGIN = "transformers.masking_utils"

_OF_THE_BATCH = ("packed_sequence_mask_function", "padding_mask_function")
"""Which tokens are real and whose they are: the handler knows it, of the whole batch."""

_PARTS = {
    "causal_mask_function": ("causal", ""),
    "bidirectional_mask_function": ("full", ""),
    "sliding_window_overlay": ("window", "sliding_window"),
    "sliding_window_bidirectional_overlay": ("both_sides", "sliding_window"),
    "chunked_overlay": ("chunk", "chunk_size"),
}
"""What a mask is made of, by the name of the function that makes it, and the variable that holds its number."""


class _UnknownError(Exception):
    """A mask function that is not known; says which."""


@dataclass(frozen=True)
class RefusedMask:
    """A mask that is not served, to be refused by the name of the layer that gets it.

    Attributes:
        reason: what it is.
    """

    reason: str


def mask_of(function: Callable[..., Any]) -> Mask | RefusedMask:
    """The mask that a ``mask_function`` of transformers means.

    Args:
        function: what transformers' mask makers hand to a mask interface.
    """
    try:
        found = dict(_parts(function))
    except _UnknownError as error:
        return RefusedMask(str(error))
    kinds = frozenset(found)
    window, sides = found.get("window", 0), found.get("both_sides", 0)
    known: dict[frozenset[str], Mask] = {
        frozenset({"causal"}): Causal(),
        frozenset({"full"}): Full(),
        frozenset({"full", "both_sides"}): SlidingWindow(sides, sides),
    }
    if kinds == {"causal", "window"}:  # a window of W tokens holds the token itself
        return SlidingWindow(window - 1)
    if kinds == {"causal", "chunk"}:
        return Chunked(found["chunk"], origin="first_valid")
    return known.get(kinds, RefusedMask(f"a mask of {' and '.join(sorted(kinds)) or 'nothing known'}"))


def _parts(function: Callable[..., Any]) -> Iterator[tuple[str, int]]:
    """What a mask function is the intersection of.

    Raises:
        _UnknownError: a function that is not known.
    """
    name, inner = _maker(function)
    if name == "and_masks":
        for part in inner["mask_functions"]:
            yield from _parts(part)
    elif name == "remap_positions_for_packed_sequence":
        yield from _parts(inner["mask_function"])
    elif name in _PARTS:
        kind, variable = _PARTS[name]
        yield kind, int(inner[variable]) if variable else 0
    elif name not in _OF_THE_BATCH:
        raise _UnknownError(f"a mask made with {name}")


def _maker(function: Callable[..., Any]) -> tuple[str, dict[str, Any]]:
    """Name of the function of transformers that made a mask function, and the variables it was made with.

    Raises:
        _UnknownError: it was made elsewhere.
    """
    qualified = getattr(function, "__qualname__", type(function).__name__)
    module = getattr(function, "__module__", "")
    if module != _ORIGIN:
        raise _UnknownError(f"a mask made with {module}.{qualified}")
    cells = getattr(function, "__closure__", None) or ()
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return qualified.split(".")[0], {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
