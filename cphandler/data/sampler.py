"""Which documents each rank draws: ranks of one context-parallel group the same, data-parallel ranks others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from cphandler.comm.groups import GroupSource, Place, resolve_group
from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.tokens.counts import checked_count, checked_flag
from cphandler.tokens.packing import check_sequence, pack_lengths

WINDOW = 1024
"""Documents, neighbours after shuffling, among which packs are made: enough to fill them, few enough to mix."""

OTHER_AXES = ("cp", "tp", "pp", "ep", "ring", "ulysses")
"""How axes of a mesh are called along which all ranks need the same documents, or another stage's."""


class ContextParallelSampler(Sampler[list[int]]):
    """Batches of documents for a ``DataLoader``'s ``batch_sampler=``.

    It splits by data-parallel rank and by nothing else, so that all ranks of a context-parallel group draw the same
    documents, without a message. Sizes tell which rank that is (:meth:`of_world`), or a group does. Every data-parallel
    rank has as many batches as the others. Where documents do not suffice, the last ranks have a batch without any: no
    document comes twice, and sums over all ranks count each once. :class:`PackingCollator` makes padding of it.

    Args:
        data: the data set, or how many documents it has.
        batch_size: documents of a batch; or else
        token_budget: tokens of a batch, with ``lengths``: as many documents as :func:`pack_lengths` puts into one.
        lengths: tokens of each document.
        multiple_of: as the collator pads each document, so that a batch stays inside the budget.
        group: the data-parallel group, a mesh of its axes (``mesh["dp"]``), or anything with a size and a rank; None
            for one rank.
        shuffle: another order in each epoch; otherwise the data set's.
        seed: of the order; the same on every rank.
        drop_last: leave out the last batch if it is not full, and batches that not all ranks would have.

    Raises:
        InvalidTypeError: arguments of another type.
        InvalidValueError: both forms of a batch or none, other lengths than documents, a document longer than the
            budget, a group of another axis.
    """

    def __init__(
        self,
        data: Sized | int,
        *,
        batch_size: int | None = None,
        token_budget: int | None = None,
        lengths: Sequence[int] | None = None,
        multiple_of: int = 1,
        group: GroupSource = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.num_documents = _documents_of(data)
        self.dp_rank, self.dp_size = _place(group)
        self.shuffle = checked_flag("shuffle", shuffle)
        self.drop_last = checked_flag("drop_last", drop_last)
        self.seed = checked_count("seed", seed)
        self.epoch = self.first_batch = 0
        if (batch_size is None) == (token_budget is None) or (token_budget is None) != (lengths is None):
            given = {"batch_size": batch_size, "token_budget": token_budget, "lengths": lengths}
            raise InvalidValueError(
                "a batch is so many documents, or so many tokens",
                got=" and ".join(name for name, value in given.items() if value is not None) or "neither",
                fix="pass batch_size=, or token_budget= with lengths=",
            )
        self.batch_size = None if batch_size is None else checked_count("batch_size", batch_size, least=1)
        self.token_budget = None if token_budget is None else checked_count("token_budget", token_budget, least=1)
        self.multiple_of = checked_count("multiple_of", multiple_of, least=1)
        self.lengths: list[int] = [] if lengths is None else self._checked_lengths(lengths)
        self._kept: tuple[int, list[list[int]]] | None = None

    @classmethod
    def of_world(
        cls,
        data: Sized | int,
        *,
        rank: int,
        world_size: int,
        cp_size: int,
        tp_size: int = 1,
        **settings: Any,
    ) -> ContextParallelSampler:
        """A sampler from sizes alone, for ranks in the order data, context, tensor parallel, the last fastest.

        Args:
            data: as above.
            rank: this process among all.
            world_size: processes; a multiple of ``cp_size * tp_size``.
            cp_size: context-parallel ranks P.
            tp_size: tensor-parallel ranks.
            settings: as above, all but ``group``.

        Raises:
            InvalidTypeError: arguments of another type.
            InvalidValueError: sizes that do not divide the world, a rank that is not in it, and as above.
        """
        world_size, cp_size, tp_size = (
            checked_count(name, value, least=1)
            for name, value in {"world_size": world_size, "cp_size": cp_size, "tp_size": tp_size}.items()
        )
        rank = checked_count("rank", rank)
        if world_size % (cp_size * tp_size) or rank >= world_size:
            raise InvalidValueError(
                "cp_size * tp_size must divide world_size, and rank be one of it",
                got=f"rank {rank} of {world_size}, cp_size {cp_size}, tp_size {tp_size}",
                fix="pass torch.distributed's rank and world size, and the sizes of the mesh",
            )
        if "group" in settings:
            raise InvalidTypeError(
                "of_world takes no group", got="group", fix="pass the group to ContextParallelSampler itself"
            )
        place = Place(world_size // (cp_size * tp_size), rank // (cp_size * tp_size))
        return cls(data, group=place, **settings)

    def set_epoch(self, epoch: int, *, first_batch: int = 0) -> None:
        """Choose the order; to be called on all ranks before each epoch.

        Args:
            epoch: under a token budget the number of batches may be another in each.
            first_batch: where to begin, for a run that goes on from a checkpoint: the batches that each rank has done.

        Raises:
            InvalidTypeError: no ints.
            InvalidValueError: below 0.
        """
        self.epoch = checked_count("epoch", epoch)
        self.first_batch = checked_count("first_batch", first_batch)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(batch) for batch in self._own())

    def __len__(self) -> int:
        return len(self._own())

    def _own(self) -> list[list[int]]:
        """This rank's batches of the epoch that are still to come."""
        epoch = self.epoch if self.shuffle else 0
        if self._kept is None or self._kept[0] != epoch:
            self._kept = epoch, self._made(epoch)
        return self._kept[1][self.dp_rank :: self.dp_size][self.first_batch :]

    def _made(self, epoch: int) -> list[list[int]]:
        """The batches of all ranks, a multiple of their number."""
        chance = np.random.default_rng((self.seed, epoch))
        order = np.arange(self.num_documents)
        if self.shuffle:
            chance.shuffle(order)
        batches = self._chunks(order.tolist()) if self.token_budget is None else self._packs(order.tolist(), chance)
        if self.drop_last:
            return batches[: len(batches) // self.dp_size * self.dp_size]
        return batches + [[] for _ in range(-len(batches) % self.dp_size)]

    def _chunks(self, order: list[int]) -> list[list[int]]:
        size = self.batch_size or 1
        chunks = [order[first : first + size] for first in range(0, len(order), size)]
        return chunks[:-1] if self.drop_last and chunks and len(chunks[-1]) < size else chunks

    def _packs(self, order: list[int], chance: np.random.Generator) -> list[list[int]]:
        """Batches full of tokens. A window's come by their longest document, so that a shuffled order is mixed anew."""
        packs: list[list[int]] = []
        for first in range(0, len(order), WINDOW):
            window = order[first : first + WINDOW]
            made = pack_lengths([self.lengths[i] for i in window], self.token_budget or 1)
            packs += [[window[i] for i in pack] for pack in made]
        return [packs[i] for i in chance.permutation(len(packs))] if self.shuffle else packs

    def _checked_lengths(self, lengths: Sequence[int]) -> list[int]:
        check_sequence("lengths", lengths, "the tokens of each document")
        given = [checked_count(f"lengths[{i}]", length) for i, length in enumerate(lengths)]
        if len(given) != self.num_documents:
            raise InvalidValueError(
                "lengths must be as many as documents",
                got=f"{len(given)} for {self.num_documents}",
                fix="pass the tokens of each document of the data set",
            )
        padded = [-(-length // self.multiple_of) * self.multiple_of for length in given]
        longest = max(padded, default=0)
        if longest > (self.token_budget or 0):
            raise InvalidValueError(
                "a document is longer than the token budget",
                got=f"{longest} tokens for a budget of {self.token_budget}",
                fix="cut long documents first, or raise the budget",
            )
        return padded


def _place(group: Any) -> tuple[int, int]:
    """Rank and size among those that draw different documents; a mesh of several such axes counts them row by row."""
    names = tuple(getattr(group, "mesh_dim_names", None) or ())
    wrong = [name for name in names if str(name).lower() in OTHER_AXES]
    if wrong:
        raise InvalidValueError(
            "ranks along this axis need the same documents, not others",
            got=f"a mesh with {', '.join(map(repr, names))}",
            fix='pass the data-parallel axes alone, mesh["dp"], say',
        )
    if len(names) > 1:
        coordinate = group.get_coordinate()
        if coordinate is None:
            raise InvalidValueError(
                "this process is not in the mesh", got=str(group), fix="pass a mesh that contains this rank"
            )
        rank, size = 0, 1
        for axis, at in enumerate(coordinate):
            rank, size = rank * group.size(axis) + at, size * group.size(axis)
        return rank, size
    resolved = resolve_group(group)
    return resolved.rank, resolved.size


def _documents_of(data: object) -> int:
    """The length of a data set, or the number itself."""
    fix = "pass what DataLoader gets, or how many documents it has"
    if isinstance(data, Sized) and not isinstance(data, (str, bytes)):
        try:
            return len(data)
        except TypeError:  # a tensor of one number
            return checked_count("data", data, fix=fix)
    return checked_count("data", data, fix=fix)
