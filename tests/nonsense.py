"""Arguments that make no sense, and the rule for them.

An odd value either works as documented, where a row says so, or raises an error of the library that says the way out:
never one from inside, never silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from cphandler import CPError


def steady(value: object) -> str:
    """What a value looks like without its address: a test's name must be the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


ODD: dict[str, Any] = {
    "None": None,
    "a word": "x",
    "no word": "",
    "bytes": b"x",
    "a list of words": ["x"],
    "an empty list": [],
    "an empty tuple": (),
    "an empty mapping": {},
    "a mapping": {"x": 1},
    "a list": [1, 2],
    "a ragged list": [[1, 2], [3]],
    "half": 0.5,
    "one and a half": 1.5,
    "a whole float": 2.0,
    "nan": float("nan"),
    "inf": float("inf"),
    "complex": 1j,
    "True": True,
    "False": False,
    "zero": 0,
    "one": 1,
    "five": 5,
    "minus one": -1,
    "minus a thousand": -1000,
    "huge": 10**30,
    "minus huge": -(10**30),
    "a class": int,
    "a function": len,
    "an object": object(),
    "a tensor of nothing": torch.zeros(0),
    "a number in a tensor": torch.tensor(1.5),
    "a nan in a tensor": torch.tensor([float("nan")]),
    "a complex tensor": torch.zeros(12, 2, 8, dtype=torch.complex64),
    "a bool tensor": torch.ones(12, 2, 8, dtype=torch.bool),
    "an array of words": np.array(["x"]),
}
"""What nobody means, one way or another."""

ODD_TENSORS: dict[str, Any] = {
    "a sparse tensor": torch.zeros(12, 2, 8).to_sparse(),
    "a float8 tensor": torch.zeros(12, 2, 8).to(torch.float8_e4m3fn),
    "a shapeless tensor": torch.empty(12, 2, 8, device="meta"),
}
"""Tensors that hold nothing to compute with; where a tensor is asked for."""

WHOLE = {"zero", "one", "five"}
"""Counts."""

NUMBERS = WHOLE | {"half", "one and a half", "a whole float"}

SIGNED = {*NUMBERS, "minus one", "minus a thousand", "huge", "minus huge"}

FILLERS = {*SIGNED, "nan", "inf", "True", "False"}
"""What a row of float32 may hold."""

MOVABLE = {"a complex tensor", "a bool tensor", "a float8 tensor", "a shapeless tensor"}
"""Rows of any dtype can be cut, moved and put together."""

SCALES = {*NUMBERS, "huge", "None"} - {"zero"}


class Row(NamedTuple):
    """One function.

    Attributes:
        call: takes its arguments by name.
        valid: arguments that make sense together, made anew for each call.
        takes: by argument, the odd values that are not odd there.
    """

    call: Callable[..., Any]
    valid: Callable[[], dict[str, Any]]
    takes: dict[str, set[str]]


def odd_values(valid: Any) -> dict[str, Any]:
    """What to try in the place of a valid argument."""
    return ODD | ODD_TENSORS if isinstance(valid, torch.Tensor) else ODD


def fault(row: Row, argument: str, name: str) -> str | None:
    """What is wrong with what a function does to an odd value; None for nothing."""
    given = row.valid()
    given[argument] = odd_values(given[argument])[name]
    try:
        row.call(**given)
    except CPError as error:
        if name in row.takes.get(argument, ()):
            return f"refused: {error}"
        return None if error.fix else f"no way out: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:90]}"
    return None if name in row.takes.get(argument, ()) else "silence"


def faults(row: Row) -> str:
    """What is wrong with any argument, one in a line; checks first that the valid ones are."""
    row.call(**row.valid())
    found = [
        f"{argument}={odd}: {told}"
        for argument, valid in row.valid().items()
        for odd in odd_values(valid)
        if (told := fault(row, argument, odd))
    ]
    return "\n".join(found)
