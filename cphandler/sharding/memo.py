"""What follows from a batch: made once, found by name, counted in bytes, and freed with the batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from functools import cached_property
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")
Owner = TypeVar("Owner", bound=Any)


class Memo:
    """Values by name, made when they are first asked for; several threads may ask.

    What a memo holds is shared by all that hold the same batch: arrays are read-only, tensors are not to be written to.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}
        self._growing: list[Callable[[], int]] = []
        self._counted = 0
        self._lock = Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Memo:
        """Itself: what follows from a batch follows for whoever holds it."""
        return self

    def __len__(self) -> int:
        """How many values are held."""
        return len(self._made)

    def __bool__(self) -> bool:
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        return self._counted + sum(size() for size in list(self._growing))

    def count(self, nbytes: int) -> None:
        """Count what is held elsewhere for as long as this is."""
        with self._lock:
            self._counted += nbytes

    def find(self, key: Hashable) -> Any:
        """The value of a name; None where nothing was made."""
        return self._made.get(key)

    def get(self, key: Hashable, make: Callable[[], T], *, size: Callable[[T], int] | None = None) -> T:
        """The value of a name.

        Args:
            key: the name.
            make: makes the value, not None; what it raises is not remembered.
            size: bytes of what is kept with the value, where that grows.
        """
        found: T | None = self._made.get(key)
        if found is not None:
            return found
        made = make()
        if any(isinstance(part, Tensor) and type(part) is not Tensor for part in _parts(made)):
            return made  # under a mode that puts something in the place of tensors, for as long as it lasts
        with self._lock:  # of two threads that made one, both get the first
            kept: T = self._made.setdefault(key, made)
            if kept is made:
                self._counted += sum(part.nbytes for part in _parts(made))
                if size is not None:
                    self._growing.append(lambda: size(made))
        return kept

    def on(self, key: Hashable, device: torch.device, make: Callable[[], T]) -> T:
        """The value of a name on a device: tensors copied there, complete when ``make`` returns.

        On CUDA they may be asked for on another stream than they were made on; it is then told, so that their memory is
        not given away before that stream has read them.
        """
        if device.type != "cuda":
            return self.get((key, device), make)
        stream = torch.cuda.current_stream(device)
        maker, value = self.get((key, device), lambda: (stream, make()))
        if maker != stream:
            for part in _parts(value):
                if isinstance(part, Tensor):
                    part.record_stream(stream)
        return value


def _parts(value: Any) -> Iterator[Any]:
    """The arrays and tensors in a value, and what else knows its size."""
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from _parts(each)
    elif hasattr(value, "nbytes"):
        yield value


def counted(make: Callable[[Owner], np.ndarray[Any, Any]]) -> cached_property[Any]:
    """A cached property that is an array, counted in its owner's ``memo`` when it is made."""

    def made(owner: Owner) -> np.ndarray[Any, Any]:
        array = make(owner)
        owner.memo.count(array.nbytes)
        return array

    made.__doc__ = make.__doc__
    return cached_property(made)
