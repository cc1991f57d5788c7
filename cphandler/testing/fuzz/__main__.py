"""``python -m cphandler.testing.fuzz``: random cases for some minutes, or one of them again."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from itertools import count, islice

from cphandler.testing.fuzz.campaign import RANKS, Campaign
from cphandler.testing.fuzz.drawing import random_case
from cphandler.testing.pool import RankPool

SILENCE = 20.0
"""Seconds between two lines of progress where there is no terminal."""


def arguments() -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(prog="python -m cphandler.testing.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, help="how long to go on; 1 where neither this nor --cases is given")
    parser.add_argument("--cases", type=int, help="how many cases")
    parser.add_argument("--seed", type=int, help="of the cases; a random one where it is not given")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", action="append", default=[], metavar="SEED:NUMBER", help="only this one; repeatable")
    parser.add_argument("--backend", action="append", default=[], help="draw from these: a name or module:Class")
    parser.add_argument("--show", action="store_true", help="print cases without running them")
    return parser.parse_args()


@contextmanager
def progress(cases: int | None, minutes: float | None) -> Iterator[Callable[[int, Campaign], None]]:
    """Something that is told how many cases were run: a bar where rich and a terminal are there, else a line."""
    started = told = time.monotonic()
    total = 0

    def line(campaign: Campaign) -> str:
        rate = total / max(time.monotonic() - started, 1e-9)
        return f"{total} cases, {len(campaign.tally.wrong)} wrong, {rate:.1f} a second"

    def plain(done: int, campaign: Campaign) -> None:
        nonlocal total, told
        total += done
        if time.monotonic() - told > SILENCE:
            told = time.monotonic()
            print(line(campaign), flush=True)

    if find_spec("rich") is None or not sys.stdout.isatty():
        yield plain
        return
    with import_module("rich.progress").Progress() as bar:
        task = bar.add_task("", total=cases or (minutes or 1.0) * 60)

        def drawn(done: int, campaign: Campaign) -> None:
            nonlocal total
            total += done
            bar.update(task, completed=total if cases else time.monotonic() - started, description=line(campaign))

        yield drawn


def repeat(names: list[str], backends: list[str]) -> bool:
    """Hold single cases again; whether all are right."""
    right = True
    with RankPool(RANKS) as pool:
        for name in names:
            seed, number = (int(part) for part in name.split(":"))
            print(random_case(seed, number, backends))
            campaign = Campaign(pool, seed, backends=backends)
            list(campaign.run(iter([number])))
            right &= not campaign.tally.wrong
            print("wrong" if campaign.tally.wrong else f"right, refused: {dict(campaign.tally.reasons)}")
    return right


def main() -> int:
    """Run, and sum up; 1 where something is wrong."""
    asked = arguments()
    if asked.case and not asked.show:
        return 0 if repeat(asked.case, asked.backend) else 1
    seed = random.SystemRandom().randrange(10**6) if asked.seed is None else asked.seed
    print(f"seed {seed}", flush=True)
    numbers = count(asked.first) if asked.cases is None else iter(range(asked.first, asked.first + asked.cases))
    if asked.show:
        for number in islice(numbers, asked.cases or 20):
            print(random_case(seed, number, asked.backend))
        return 0
    minutes = asked.minutes or (None if asked.cases else 1.0)
    started = time.monotonic()
    with RankPool(RANKS) as pool, progress(asked.cases, minutes) as tick:
        campaign = Campaign(pool, seed, backends=asked.backend)
        for done in campaign.run(numbers, until=started + minutes * 60 if minutes else float("inf")):
            tick(done, campaign)
    return summary(campaign, time.monotonic() - started)


def summary(campaign: Campaign, seconds: float) -> int:
    """Print what a run has seen; its exit code."""
    tally = campaign.tally
    total = tally.run + tally.refused
    print(f"seed {campaign.seed}: {total} cases in {seconds:.0f} s, {total / seconds:.1f} a second")
    print(f"  held to the laws: {tally.run}, of which wrong: {len(tally.wrong)}; refused by name: {tally.refused}")
    for reason, times in tally.reasons.most_common():
        print(f"  {times:6d} refused: {reason}")
    for name in tally.wrong:
        print(f"  wrong: {name}")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
