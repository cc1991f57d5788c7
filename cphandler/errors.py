"""Errors that say what is wrong, what was got, and the way out."""

from __future__ import annotations

from collections.abc import Sequence


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


class RankLostError(CPError, RuntimeError):
    """A rank did not do its part of an exchange: it is late, it raised or ended, or the link to it is cut.

    Whatever was under way is lost, so that messages no longer match: make the process group again.

    Attributes:
        ranks: the ranks of the group that this one waited for; empty where the transport cannot tell.
        late: True where time ran out, False where the connection was closed.
    """

    def __init__(
        self, what: str, *, got: object = None, fix: str | None = None, ranks: Sequence[int] = (), late: bool = False
    ) -> None:
        super().__init__(what, got=got, fix=fix)
        self.ranks = list(ranks)
        self.late = late
