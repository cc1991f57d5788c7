"""Errors that say what is wrong, what was got, and the way out."""

from __future__ import annotations


class CPError(Exception):
    """Base of every error this library raises on purpose.

    Args:
        what: what is wrong, a full clause.
        got: the offending value, printed as it is.
        fix: what the caller can do about it.

    Attributes:
        fix: as given; None for an error that came from another process by its text.
    """

    def __init__(self, what: str, *, got: object = None, fix: str | None = None) -> None:
        parts = [what]
        if got is not None:
            parts.append(f"got {got}")
        if fix is not None:
            parts.append(fix)
        super().__init__("; ".join(parts))
        self.fix = fix


class InvalidValueError(CPError, ValueError):
    """An argument has the right type and a wrong value."""


class InvalidTypeError(CPError, TypeError):
    """An argument has a wrong type or dtype."""


class UnsupportedError(CPError, NotImplementedError):
    """The request is legal, but this backend, kernel or release cannot do it."""


class MissingPackageError(CPError, ImportError):
    """An optional package that the chosen backend needs cannot be imported."""


class RankMismatchError(InvalidValueError):
    """The ranks of one group do not hold the same batch, or one of them refused it."""
