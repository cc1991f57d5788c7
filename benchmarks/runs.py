"""A contest run: everybody checked first, then all measured in turn, in another order in each repeat."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf, isnan
from typing import Any, NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks import bare, floors, seats
from benchmarks.floors import Calls, Price
from benchmarks.reference import expected
from benchmarks.seats import Part, Sample
from benchmarks.works import Absent, Contest, Work
from cphandler.testing import TOLERANCES, RankPool, assert_close, relative_error
from cphandler.testing.pool import RankError

T = TypeVar("T")
RESULTS = ("out", "dq", "dk", "dv")


class Errors(NamedTuple):
    """Relative L2 errors against float64.

    Attributes:
        out: of the output.
        grad: of the worst gradient.
    """

    out: float
    grad: float

    def wrong(self, dtype: str) -> list[str]:
        """What is further off than the dtype's tolerance, or not a number; empty where all is well."""
        bound = TOLERANCES[getattr(torch, dtype)]
        named = {"output": self.out, "gradients": self.grad}
        return [name for name, error in named.items() if not error <= bound]


@dataclass
class Result:
    """What a competitor came to.

    Attributes:
        samples: per repeat, one of each rank.
        errors: against float64; None where it was checked against the plain kernel only.
        peak: bytes of memory above inputs and outputs, on the rank that needs most; None where it was not measured.
        calls: the kernel calls of each rank, of the library's backends; None for others.
        bare: the same calls and messages with nothing around them, of the library's backends on several ranks.
    """

    samples: list[list[Sample]] = field(default_factory=list)
    errors: Errors | None = None
    peak: int | None = None
    calls: tuple[Calls, ...] | None = None
    bare: Result | None = None

    def cpu(self) -> list[float]:
        """CPU seconds of forward and backward in each repeat, summed over ranks."""
        return [sum(sample.both for sample in ranks) for ranks in self.samples]

    def kernel(self) -> list[float]:
        """Of these, in the attention kernel's calls."""
        return [sum(sample.kernel for sample in ranks) for ranks in self.samples]

    def rest(self) -> list[float]:
        """Of these, in the threads that compute, outside of the kernel's calls."""
        return [sum(sample.own - sample.kernel for sample in ranks) for ranks in self.samples]

    def gloo(self) -> list[float]:
        """Of these, in other threads."""
        return [sum(sample.both - sample.own for sample in ranks) for ranks in self.samples]

    def outside(self) -> list[float]:
        """Of these, outside of the attention kernel's calls: what context parallelism adds."""
        return [sum(sample.both - sample.kernel for sample in ranks) for ranks in self.samples]

    def slowest(self) -> list[float]:
        """CPU seconds if every rank took as long as the slowest."""
        return [len(ranks) * max(sample.both for sample in ranks) for ranks in self.samples]

    def wall(self) -> list[float]:
        """Seconds until the last rank was done, in each repeat."""
        return [max(sample.wall for sample in ranks) for ranks in self.samples]

    def sent(self) -> tuple[int, int]:
        """Bytes all ranks sent in the last repeat, forward and in all, as the library counts its own."""
        last = self.samples[-1]
        return sum(sample.forward_bytes for sample in last), sum(sample.both_bytes for sample in last)

    def wire(self) -> int | None:
        """Bytes all ranks gave to their sockets in the last repeat."""
        written = [sample.wire_bytes for sample in self.samples[-1]]
        return None if None in written else sum(number for number in written if number is not None)


class Floor(NamedTuple):
    """What kernel calls and bytes cost alone.

    Attributes:
        kernel: CPU seconds of the kernel's calls in each repeat, summed over ranks.
        gloo: of the bytes.
        slowest: of both, if every rank took as long as the slowest.
    """

    kernel: list[float]
    gloo: list[float]
    slowest: list[float]

    def cpu(self) -> list[float]:
        """Both."""
        return [k + g for k, g in zip(self.kernel, self.gloo, strict=True)]


@dataclass
class Run:
    """A contest that was run.

    Attributes:
        contest: what was run.
        results: by competitor, in the contest's order.
        absent: peers that took no part.
        kernels: CPU seconds of the kernel calls alone in each repeat, by the calls of all ranks.
        prices: what gloo's bytes cost in each repeat, on every rank, by number of ranks.
    """

    contest: Contest
    results: dict[Work, Result] = field(default_factory=dict)
    absent: list[Absent] = field(default_factory=list)
    kernels: dict[tuple[Calls, ...], list[list[float]]] = field(default_factory=dict)
    prices: dict[int, list[list[Price]]] = field(default_factory=dict)

    @property
    def plain(self) -> Result:
        """Torch's kernel on one rank."""
        return self.results[self.contest.works[0]]

    def of(self, ranks: int) -> dict[Work, Result]:
        """The plain kernel, one rank of the library, and the competitors on a number of ranks."""
        return {work: result for work, result in self.results.items() if work.ranks in (1, ranks)}

    def price(self, ranks: int) -> list[float]:
        """CPU seconds that all ranks together take for a byte, in each repeat: the cheaper of the two ways."""
        ways = [
            [sum(p[way] for p in repeat) / sum(p[way + 1] for p in repeat) for repeat in self.prices[ranks]]
            for way in (0, 2)
        ]
        return min(ways, key=lambda seconds: sorted(seconds)[len(seconds) // 2])

    def floor(self, work: Work) -> Floor | None:
        """What a backend's kernel calls and bytes cost alone; None where it has none."""
        result = self.results[work]
        if work.ranks == 1 or not result.calls or not any(result.calls):
            return None
        kernels, prices = self.kernels[result.calls], self.price(work.ranks)
        sent = [sample.both_bytes for sample in result.samples[-1]]
        slowest = [
            work.ranks * max(seconds + price * count for seconds, count in zip(ranks, sent, strict=True))
            for ranks, price in zip(kernels, prices, strict=True)
        ]
        return Floor([sum(ranks) for ranks in kernels], [sum(sent) * price for price in prices], slowest)


def turns(competitors: Sequence[T], repeat: int) -> list[T]:
    """The order of a repeat: each starts elsewhere, and every second one runs backwards.

    So nobody always follows the same other one, or always comes when the machine has been busy for long.
    """
    start = repeat * max(1, round(0.382 * len(competitors))) % max(1, len(competitors))
    order = [*competitors[start:], *competitors[:start]]
    return order[::-1] if repeat % 2 else order


def whole(parts: Sequence[Part], work: Work) -> list[Tensor]:
    """Output and gradients in global order, from what each rank has.

    Raises:
        ValueError: the ranks do not hold each token once.
    """
    held = torch.cat([part.tokens[part.tokens >= 0] for part in parts]).long()
    if not torch.equal(held.sort().values, torch.arange(work.tokens)):
        raise ValueError(f"the ranks of {work.name} do not hold each of {work.tokens} tokens once")
    found = []
    for i in range(len(RESULTS)):
        rows = torch.cat([part.tensors[i][part.tokens >= 0] for part in parts])
        found.append(torch.empty_like(rows).index_copy_(0, held, rows))
    return found


def errors_of(actual: Sequence[Tensor], right: Sequence[Tensor]) -> Errors:
    """How far a result is from the reference."""
    out, *grads = (relative_error(a, r) for a, r in zip(actual, right, strict=True))
    return Errors(out, max(grads, key=lambda error: inf if isnan(error) else error))


def run_contest(
    contest: Contest,
    absent: Iterable[Absent],
    pools: dict[int, RankPool],
    *,
    repeats: int,
    thorough: bool,
    console: Console,
) -> Run:
    """Check every competitor, then measure all in turn.

    Args:
        contest: the competitors.
        absent: peers that are known to take no part.
        pools: by number of ranks.
        repeats: how often.
        thorough: check against float64, measure memory, and time floors; else check against the plain kernel.
        console: where progress is shown.

    Raises:
        AssertionError: a backend of the library is wrong. A peer that is wrong is measured and marked.
    """
    run = Run(contest, absent=list(absent))
    plain = contest.works[0]
    right = expected(plain, seats.global_tensors(plain)) if thorough else whole(pools[1].run(seats.part, plain), plain)
    for work in track(contest.works, f"{contest.name}: checks", console=console, transient=True):
        _check(run, work, pools[work.ranks], right, thorough=thorough)
    del right
    for work in run.results if thorough else ():  # compilers of peers settle, and a pool that was started anew warms up
        pools[work.ranks].run(seats.measure, work)
        if run.results[work].bare is not None:
            pools[work.ranks].run(bare.measure, work)
    for repeat in track(range(repeats), contest.name, console=console, transient=True):
        for take in turns(_measures(run, pools, thorough=thorough), repeat):
            take()
    for pool in pools.values():
        for module in (seats, bare, floors):
            pool.run(module.forget)
    return run


def _check(run: Run, work: Work, pool: RankPool, right: Sequence[Tensor], *, thorough: bool) -> None:
    """One pass whose result is looked at; a peer that fails in it is absent, a backend that is wrong ends the run."""
    result = Result()
    try:
        parts = pool.run(seats.part, work)
        actual = whole(parts, work)
        peaks = pool.run(seats.peak, work) if thorough else [None]
    except (RankError, ValueError) as error:
        if work.peer is None:
            raise
        run.absent.append(Absent(work.name, work.ranks, f"fails: {str(error).strip().splitlines()[-1]}"))
        return
    for name, a, r in zip(RESULTS, actual, right, strict=True):
        if work.peer is None:
            dtype = getattr(torch, work.dtype)
            assert_close(a, r, dtype=dtype, what=f"{name} of {work.name} on {work.ranks} ranks, {run.contest.name}")
    if thorough:
        result.errors = errors_of(actual, right)
        result.peak = None if None in peaks else max(number for number in peaks if number is not None)
    if thorough and work.is_ours and work.ranks > 1:
        result.calls, result.bare = tuple(pool.run(bare.kernel_calls, work)), Result()
    run.results[work] = result


def _measures(run: Run, pools: dict[int, RankPool], *, thorough: bool) -> list[Callable[[], None]]:
    """Everything that is timed once in a repeat."""

    def taking(into: list[Any], ranks: int, function: Callable[..., Any], *args: Any) -> Callable[[], None]:
        return lambda: into.append(pools[ranks].run(function, *args))

    takes = [taking(result.samples, work.ranks, seats.measure, work) for work, result in run.results.items()]
    if not thorough:
        return takes
    plain = run.contest.works[0]
    takes += [
        taking(result.bare.samples, work.ranks, bare.measure, work)
        for work, result in run.results.items()
        if result.bare is not None
    ]
    prices = [
        taking(run.prices.setdefault(ranks, []), ranks, floors.gloo_price, plain)
        for ranks in sorted({work.ranks for work in run.results} - {1})
    ]
    kernels = [
        taking(run.kernels.setdefault(calls, []), len(calls), floors.replay, calls, plain.dtype)
        for calls in dict.fromkeys(result.calls for result in run.results.values() if result.calls)
    ]
    return [*takes, *prices, *kernels]
