"""Dynamic context parallelism: documents to sub-groups of any size and to micro-batches, level in work.

A document is cut over as few ranks as its memory and its share of the work allow; short ones stay whole on one rank and
send nothing. In each micro-batch the ranks are divided into consecutive sub-groups, and every rank has work. What the
layout ``"balanced"`` does inside one batch of all ranks, this does with batches of their own, for engines whose layouts
cannot do it (TransformerEngine), and where a collective of few ranks is worth more than one of all.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch.distributed import ProcessGroup

from cphandler.comm.groups import PartGroups
from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.tokens.counts import checked_count

TOKEN_COST = 6 * 4096.0
"""Query-key pairs that the rest of a token's work is worth: six times a model's width, here 4096.

A layer's matrices have about 12 width**2 weights, its attention 2 width multiplications for each pair."""


@dataclass(frozen=True)
class SubGroup:
    """Consecutive ranks, and the documents that they share in one micro-batch.

    Attributes:
        first: its first rank.
        size: how many ranks.
        documents: numbers of the documents, ascending: the batch of these ranks.
        tokens: of these documents together.
        work: of these documents together, in query-key pairs.
    """

    first: int
    size: int
    documents: tuple[int, ...]
    tokens: int
    work: float

    @property
    def ranks(self) -> range:
        """Its ranks."""
        return range(self.first, self.first + self.size)

    @property
    def local_tokens(self) -> int:
        """Rows on each of its ranks."""
        return -(-self.tokens // self.size)


@dataclass(frozen=True)
class DocumentSchedule:
    """Which ranks take which documents in which micro-batch; the same on every rank.

    Attributes:
        num_ranks: all ranks.
        micro_batches: the sub-groups of each, in order of ranks.
    """

    num_ranks: int
    micro_batches: tuple[tuple[SubGroup, ...], ...]

    def of_rank(self, rank: int) -> list[SubGroup]:
        """The sub-group of a rank in each micro-batch.

        Raises:
            InvalidValueError: no such rank.
        """
        if checked_count("rank", rank) >= self.num_ranks:
            raise InvalidValueError("no such rank", got=rank, fix=f"ranks are 0 to {self.num_ranks - 1}")
        return [next(group for group in groups if rank in group.ranks) for groups in self.micro_batches]

    @property
    def level(self) -> float:
        """How long micro-batches take, of the time if all ranks had the same work in each: 1 where they have."""
        longest = sum(max(group.work / group.size for group in groups) for groups in self.micro_batches)
        mean = sum(group.work for groups in self.micro_batches for group in groups) / self.num_ranks
        return longest / mean if mean else 1.0

    @property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """Every sub-group of several ranks that there is, each once, in one order on all ranks."""
        found = {tuple(group.ranks) for groups in self.micro_batches for group in groups if group.size > 1}
        return tuple(sorted(found))


def assign_documents(
    lengths: Iterable[int],
    num_ranks: int,
    *,
    max_tokens: int | None = None,
    num_micro_batches: int | None = None,
    token_cost: float = TOKEN_COST,
    slack: float = 0.05,
) -> DocumentSchedule:
    """Give documents to sub-groups of ranks and to micro-batches, level in work; deterministic, nothing is sent.

    The work of a document of n tokens is ``n * (n + 1) / 2 + token_cost * n``: the pairs of causal attention, and what
    all else costs in such pairs.

    Args:
        lengths: tokens of each document.
        num_ranks: ranks P that take part, the data-parallel ones included.
        max_tokens: rows that a rank has memory for in a micro-batch; None for no limit.
        num_micro_batches: at least so many; None for as few as memory allows.
        token_cost: see :data:`TOKEN_COST`.
        slack: the busiest rank of a micro-batch may have so much more than the mean, as a part of it; with less, more
            documents are cut.

    Raises:
        InvalidTypeError: counts that are none.
        InvalidValueError: no documents, a document that all ranks together have no memory for, fewer documents than
            micro-batches, or numbers out of their range.
    """
    documents = _checked_lengths(lengths)
    ranks = checked_count("num_ranks", num_ranks, least=1)
    limit = None if max_tokens is None else checked_count("max_tokens", max_tokens, least=1)
    least = 1 if num_micro_batches is None else checked_count("num_micro_batches", num_micro_batches, least=1)
    for name, number in (("token_cost", token_cost), ("slack", slack)):
        _check_number(name, number)
    room = sum(documents) if limit is None else ranks * limit
    if max(documents) > room:
        raise InvalidValueError(
            "a document has more tokens than all ranks have memory for",
            got=f"{max(documents)} tokens and {ranks} ranks of {limit}",
            fix="raise max_tokens, cut the document, or take more ranks",
        )
    work = [length * (length + 1) / 2 + token_cost * length for length in documents]
    batches = _micro_batches(documents, work, room, least)
    divided = (_divided(batch, documents, work, _Limits(ranks, limit, float(slack))) for batch in batches)
    return DocumentSchedule(ranks, tuple(divided))


@dataclass(frozen=True)
class _Limits:
    ranks: int
    tokens: int | None
    slack: float

    def fits(self, tokens: int, size: int) -> bool:
        """Whether so many ranks have memory for so many tokens."""
        return self.tokens is None or -(-tokens // size) <= self.tokens


def _checked_lengths(lengths: Iterable[int]) -> list[int]:
    try:
        given = None if isinstance(lengths, str | bytes) else list(lengths)
    except TypeError:  # also of a tensor that has one number
        given = None
    if given is None:
        raise InvalidTypeError("lengths must be ints", got=type(lengths).__name__, fix="pass each document's tokens")
    documents = [checked_count(f"the length of document {i}", length, least=1) for i, length in enumerate(given)]
    if not documents:
        raise InvalidValueError("there are no documents to give out", got="no lengths", fix="pass one at least")
    return documents


def _check_number(name: str, number: object) -> None:
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise InvalidTypeError(f"{name} must be a number", got=repr(number), fix="leave it out for the default")
    if not 0 <= number < 1 << 62:
        raise InvalidValueError(
            f"{name} must be 0 or above, and finite", got=number, fix="leave it out for the default"
        )


def _micro_batches(lengths: Sequence[int], work: Sequence[float], room: int, least: int) -> list[list[int]]:
    """Documents by micro-batch: as few as memory allows, level in work."""
    if least > len(lengths):
        raise InvalidValueError(
            "there are fewer documents than micro-batches",
            got=f"{len(lengths)} for {least}",
            fix="ask for fewer micro-batches",
        )
    heaviest_first = sorted(range(len(lengths)), key=lambda i: (-work[i], i))
    for number in range(max(least, -(-sum(lengths) // room)), len(lengths) + 1):
        batches: list[list[int]] = [[] for _ in range(number)]
        tokens, load = [0] * number, [0.0] * number
        for document in heaviest_first:
            fitting = [i for i in range(number) if tokens[i] + lengths[document] <= room]
            if not fitting:
                break
            taken = min(fitting, key=lambda i: (load[i], i))
            batches[taken].append(document)
            tokens[taken] += lengths[document]
            load[taken] += work[document]
        else:
            return batches
    raise AssertionError("each document has room in a micro-batch of its own")


def _divided(
    batch: Sequence[int], lengths: Sequence[int], work: Sequence[float], limits: _Limits
) -> tuple[SubGroup, ...]:
    """The sub-groups of a micro-batch: as small as may be, then joined until they are level and fit.

    One of all ranks is level and fits, so that this ends.
    """
    mean = sum(work[i] for i in batch) / limits.ranks
    seeds, rest = _started(batch, lengths, work, limits)
    while True:
        groups = _filled(seeds, rest, limits)
        two = _to_join(groups, mean, limits)
        if two is None:
            break
        others = [seed for i, seed in enumerate(seeds) if i not in two]
        seeds = [*others, _joined(seeds[two[0]], seeds[two[1]])]
    placed, first = [], 0
    for group in sorted(groups, key=lambda group: (-group.size, group.documents[0])):
        placed.append(replace(group, first=first))
        first += group.size
    return tuple(placed)


def _started(
    batch: Sequence[int], lengths: Sequence[int], work: Sequence[float], limits: _Limits
) -> tuple[list[SubGroup], list[SubGroup]]:
    """Long documents alone on as many ranks as their work and memory ask for, single ranks with one, and the rest."""
    mean = sum(work[i] for i in batch) / limits.ranks
    seeds: list[SubGroup] = []
    rest: list[SubGroup] = []
    left = limits.ranks
    for document in batch:  # the heaviest first
        needed = 1 if limits.tokens is None else -(-lengths[document] // limits.tokens)
        wanted = max(needed, math.ceil(work[document] / mean / (1 + limits.slack)))
        size = min(wanted, left)
        one = SubGroup(0, size, (document,), lengths[document], work[document])
        (seeds if size else rest).append(one)
        left -= size
    for _ in range(left):  # more ranks than documents
        fullest = max(range(len(seeds)), key=lambda i: (seeds[i].work / seeds[i].size, -i))
        seeds[fullest] = replace(seeds[fullest], size=seeds[fullest].size + 1)
    return seeds, rest


def _filled(seeds: Sequence[SubGroup], rest: Sequence[SubGroup], limits: _Limits) -> list[SubGroup]:
    """Each document of the rest, the heaviest first, to the ranks of least work that have memory for it."""
    work, tokens = [seed.work for seed in seeds], [seed.tokens for seed in seeds]
    given: list[list[int]] = [[*seed.documents] for seed in seeds]
    least = [(work[i] / seed.size, i) for i, seed in enumerate(seeds)]
    heapq.heapify(least)
    for one in rest:
        full = []
        while least and not limits.fits(tokens[least[0][1]] + one.tokens, seeds[least[0][1]].size):
            full.append(heapq.heappop(least))
        if not least:  # nobody has room: one goes over, and is joined to others
            least, full = full, []
        _, taken = heapq.heappop(least)
        work[taken] += one.work
        tokens[taken] += one.tokens
        given[taken] += one.documents
        for entry in (*full, (work[taken] / seeds[taken].size, taken)):
            heapq.heappush(least, entry)
    documents = [tuple(sorted(numbers)) for numbers in given]
    return [SubGroup(0, seed.size, documents[i], tokens[i], work[i]) for i, seed in enumerate(seeds)]


def _to_join(groups: Sequence[SubGroup], mean: float, limits: _Limits) -> tuple[int, int] | None:
    """The fullest sub-group and the emptiest, of work or of rows; None where all are level and fit, or there is one."""
    if len(groups) == 1:
        return None
    rows = [group.tokens / group.size for group in groups]
    load = [group.work / group.size for group in groups]
    fits = all(limits.fits(group.tokens, group.size) for group in groups)
    if fits and max(load) <= (1 + limits.slack) * mean:
        return None
    by = load if fits else rows
    fullest = max(range(len(groups)), key=lambda i: (by[i], -i))
    return fullest, min((i for i in range(len(groups)) if i != fullest), key=lambda i: (by[i], i))


def _joined(one: SubGroup, other: SubGroup) -> SubGroup:
    documents = tuple(sorted(one.documents + other.documents))
    return SubGroup(0, one.size + other.size, documents, one.tokens + other.tokens, one.work + other.work)


class SubGroups:
    """The process groups of schedules, each made once; every rank of the process group makes the same ones in turn.

    Args:
        pools: the ranks that share documents: ``pools[i]`` has the global rank of each number in a schedule. Several
            where ranks are tensor or pipeline parallel as well; None is all ranks, in order.

    Raises:
        InvalidValueError: no process group, or pools that overlap or differ in size.
    """

    def __init__(self, pools: Sequence[Sequence[int]] | None = None) -> None:
        self._parts = PartGroups(pools)

    def prepare(self, schedule: DocumentSchedule) -> None:
        """Make what a schedule needs and was not made before: a collective of all ranks, at the start of a step.

        Args:
            schedule: the same on every rank.

        Raises:
            InvalidValueError: a schedule of another number of ranks than a pool has.
        """
        if schedule.num_ranks != self._parts.size:
            raise InvalidValueError(
                "the schedule is for another number of ranks",
                got=f"{schedule.num_ranks} for pools of {self._parts.size}",
                fix="pass num_ranks=groups.size to assign_documents",
            )
        for part in schedule.parts:
            self._parts.make(part)

    @property
    def size(self) -> int:
        """Ranks of a pool."""
        return self._parts.size

    @property
    def rank(self) -> int:
        """This rank's number in its pool, as schedules count."""
        return self._parts.rank

    def group(self, sub_group: SubGroup) -> ProcessGroup | None:
        """``cp_group=`` of the handler for a sub-group of this rank; None where it is this rank alone.

        Args:
            sub_group: what the schedule has for this rank; ``local_cp_size`` is its size.

        Raises:
            InvalidValueError: this rank is not in it, or it was not prepared.
        """
        return self._parts.of(tuple(sub_group.ranks))
