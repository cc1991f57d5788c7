"""What the benchmark asks of another project's context parallelism."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.metadata import PackageNotFoundError, version
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """One causal sequence on some ranks.

    Attributes:
        ranks: how many share it.
        tokens: of the whole sequence.
        heads: query heads.
        kv_heads: key heads.
        head_dim: channels of a head.
    """

    ranks: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int


class Peer(ABC):
    """Another project's attention over one causal sequence that lies on several ranks.

    A class says whether it can serve and imports nothing; an instance lives in a rank's process.

    Attributes:
        name: what the tables call it.
        distribution: the package that it is installed by, whose version is reported.
        needs: further packages that it imports.
    """

    name: ClassVar[str]
    distribution: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def versions(cls) -> dict[str, str]:
        """The installed versions of its packages, by name; those that are not installed are left out."""
        found = {}
        for name in (cls.distribution, *cls.needs):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                continue
        return found

    @classmethod
    def availability(cls, ranks: int, heads: int, kv_heads: int) -> str | None:
        """Why it cannot serve; None where it can.

        Args:
            ranks: how many share the sequence.
            heads: query heads.
            kv_heads: key heads.
        """
        found = cls.versions()
        absent = [name for name in (cls.distribution, *cls.needs) if name not in found]
        if absent:
            return f"{' and '.join(absent)} not installed"
        return cls.refusal(ranks, heads, kv_heads)

    @classmethod
    def refusal(cls, ranks: int, heads: int, kv_heads: int) -> str | None:
        """Why it cannot serve these heads on these ranks, installed or not; None where it can."""
        del ranks, heads, kv_heads
        return None

    @abstractmethod
    def connect(self, shape: Shape) -> None:
        """Import the project and make its groups; called once on every rank, before anything else.

        Args:
            shape: what will be computed.
        """

    @abstractmethod
    def tokens(self, shape: Shape, rank: int) -> Tensor:
        """``[L]`` which tokens of the sequence a rank holds, in its order: the peer's layout.

        Args:
            shape: the sequence and its ranks.
            rank: the holder.
        """

    @abstractmethod
    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention of this rank's queries over the whole sequence, differentiable.

        Args:
            query: local rows as :meth:`arranged` put them.
            key: the same with key heads.
            value: as the key.

        Returns:
            The output as :meth:`arranged_output` would put it.
        """

    def arranged(self, rows: Tensor) -> Tensor:
        """Rows ``[L, N, D]`` in the order of dims that the peer takes; here ``[1, L, N, D]``."""
        return rows.unsqueeze(0)

    def rows(self, arranged: Tensor) -> Tensor:
        """``[L, N, D]``: the inverse of :meth:`arranged`, for gradients."""
        return arranged.squeeze(0)

    def arranged_output(self, rows: Tensor) -> Tensor:
        """Rows ``[L, N, D]`` as the output lies; here ``[1, L, N, D]``."""
        return rows.unsqueeze(0)

    def output_rows(self, out: Tensor) -> Tensor:
        """``[L, N, D]``: the inverse of :meth:`arranged_output`."""
        return out.squeeze(0)


def contiguous_tokens(shape: Shape, rank: int) -> Tensor:
    """The layout of Ulysses: rank r holds the r-th part."""
    return torch.arange(shape.tokens).chunk(shape.ranks)[rank]


def heads_first(rows: Tensor) -> Tensor:
    """Rows ``[L, N, D]`` as a view ``[1, N, L, D]``, which is how projections of a model lie."""
    return rows.unsqueeze(0).transpose(1, 2)


def rows_first(x: Tensor) -> Tensor:
    """The inverse of :func:`heads_first`."""
    return x.transpose(1, 2).squeeze(0)


def indivisible(what: str, number: int, ranks: int) -> str | None:
    """The refusal of an algorithm that gives each rank as many heads as every other one."""
    return f"needs ranks that divide {what}, got {ranks} and {number}" if number % ranks else None
