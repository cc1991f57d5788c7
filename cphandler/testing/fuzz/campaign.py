"""A run of random cases on a pool of ranks: what is wrong is told at once, and the run goes on."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from cphandler.testing.fuzz.cases import RandomCase
from cphandler.testing.fuzz.drawing import random_case
from cphandler.testing.fuzz.hold import Verdict, hold_many
from cphandler.testing.pool import RankError, RankPool

BATCH = 24
"""Cases of one trip to the ranks."""

RANKS = 4

SHOWN = 8
"""Complaints that are printed of one case."""


@dataclass
class Tally:
    """What a run has seen.

    Attributes:
        run: cases of which something was computed.
        refused: cases of which nothing was.
        reasons: refusals by what they say, with the names of the cases they were seen in counted.
        wrong: the names of cases that are wrong, with what is.
    """

    run: int = 0
    refused: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    wrong: dict[str, list[str]] = field(default_factory=dict)

    def add(self, case: RandomCase, verdicts: Sequence[Verdict]) -> list[str]:
        """Count a case; what is wrong with it."""
        present = [verdict for verdict in verdicts if verdict.group >= 0]
        complaints = _complaints(verdicts)
        if len({verdict.refused for verdict in present}) > 1:
            said = "; ".join(f"rank {rank} {list(v.refused)}" for rank, v in enumerate(verdicts) if v.group >= 0)
            complaints.append(f"refused by some ranks and not by others: {said}")
        for reason in set(present[0].refused):
            self.reasons[reason] += 1
        if any(verdict.held for verdict in present) or complaints:
            self.run += 1
        else:
            self.refused += 1
        if complaints:
            self.wrong[case.name] = complaints
        return complaints


class Campaign:
    """Cases of one seed, in order.

    Args:
        pool: four ranks.
        seed: of all cases.
        backends: what they draw from; empty for all.
        tell: takes what is wrong, in a few lines.
        batch: cases of one trip to the ranks.
        timeout: seconds that a trip may take.
    """

    def __init__(
        self,
        pool: RankPool,
        seed: int,
        *,
        backends: Sequence[str] = (),
        tell: Callable[[str], None] = print,
        batch: int = BATCH,
        timeout: float = 90.0,
    ) -> None:
        self.pool, self.seed, self.backends, self.tell = pool, seed, tuple(backends), tell
        self.batch, self.timeout = batch, timeout
        self.tally = Tally()

    def run(self, numbers: Iterator[int], *, until: float = float("inf")) -> Iterator[int]:
        """Hold the cases of these numbers to the laws; after each trip, how many it had.

        Args:
            numbers: of the cases.
            until: when to stop, by ``time.monotonic``.
        """
        while time.monotonic() < until and (batch := list(islice(numbers, self.batch))):
            self._hold(batch)
            yield len(batch)

    def _hold(self, batch: list[int]) -> None:
        """Hold a batch; where a rank raises or hangs, the case that it was at is wrong and the others are held anew."""
        while batch:
            names = [(self.seed, number) for number in batch]
            with tempfile.TemporaryDirectory(prefix="cphandler-fuzz-") as folder:
                try:
                    reports = self.pool.run(hold_many, names, self.backends, folder, timeout=self.timeout)
                except RankError as error:
                    at = _position(Path(folder), error)
                    self._count(batch[at], [Verdict(wrong=(_told(error),), group=0)])
                    if len(batch) > 1 and at:
                        self._hold(batch[:at])
                    batch = batch[at + 1 :]
                    continue
            for number, verdicts in zip(batch, zip(*reports, strict=True), strict=True):
                self._count(number, verdicts)
            return

    def _count(self, number: int, verdicts: Sequence[Verdict]) -> None:
        case = random_case(self.seed, number, self.backends)
        complaints = self.tally.add(case, verdicts)
        if complaints:
            shown = [f"  {text}" for text in complaints[:SHOWN]]
            more = [f"  and {len(complaints) - SHOWN} more"] if len(complaints) > SHOWN else []
            self.tell("\n".join([f"WRONG {case}", *shown, *more, f"  repeat: {self.repeat(case)}"]))

    def repeat(self, case: RandomCase) -> str:
        """The command that holds one case again."""
        drawn = "".join(f" --backend {name}" for name in self.backends)
        return f"python -m cphandler.testing.fuzz --case {case.name}{drawn}"


def _complaints(verdicts: Sequence[Verdict]) -> list[str]:
    """What ranks complain of, each complaint once, with the ranks that have it."""
    ranks: dict[str, list[int]] = {}
    for rank, verdict in enumerate(verdicts):
        for text in verdict.wrong:
            ranks.setdefault(text, []).append(rank)
    return [f"rank {' '.join(map(str, who))}: {text}" for text, who in ranks.items()]


def _position(folder: Path, error: RankError) -> int:
    """Which case of the batch the failed rank was at; of several stuck ones, the one that came least far."""
    places = [folder / f"rank-{rank}" for rank in error.ranks]
    return min((int(place.read_text() or 0) for place in places if place.exists()), default=0)


def _told(error: RankError) -> str:
    """The end of a rank's traceback, or where the stuck ranks are."""
    lines = str(error).splitlines()
    if "did not come back" in lines[0]:
        places = [line.strip() for line in lines if "cphandler" in line and "/testing/" not in line]
        return "\n    ".join([lines[0], *places[:12]])
    frames = [line.strip() for line in lines if line.strip().startswith("File") and "/testing/fuzz/" not in line]
    return "\n    ".join([lines[0], *frames[-4:], lines[-1]])
