"""What runs on a rank: a random case's handler made, its calls made in order, and everything compared."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from cphandler.errors import CPError, RankMismatchError, UnsupportedError
from cphandler.handler.contract import ContextParallelHandler
from cphandler.testing.cases import make_handler
from cphandler.testing.fuzz.attention import Attending
from cphandler.testing.fuzz.cases import Call, Move, RandomCase, random_case
from cphandler.testing.fuzz.movement import Moving
from cphandler.testing.fuzz.tensors import Rows
from cphandler.testing.pool import partition_group

REFUSALS = ("splits the query heads evenly over the ranks",)
"""What may be refused as a wrong value, since the case generator does not know what a class serves."""


@dataclass(frozen=True)
class Verdict:
    """One rank's word on one case.

    Attributes:
        wrong: complaints, ``"step: what is off"``.
        refused: refusals, without what they got.
        held: steps that were computed.
        group: the rank's group among the case's parts; -1 for a rank that sat out.
    """

    wrong: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    held: int = 0
    group: int = -1


def hold_many(names: Sequence[tuple[int, int]], backends: Sequence[str], folder: str) -> list[Verdict]:
    """Hold several cases to the laws, one after the other.

    Args:
        names: seed and number of each.
        backends: what they draw from.
        folder: where each rank says which case it is at, for the time that it does not come back.

    Raises:
        Exception: whatever a handler raised that is no refusal. The other ranks then wait in vain.
    """
    place = Path(folder) / f"rank-{dist.get_rank()}"
    file = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    verdicts = []
    try:
        for i, (seed, number) in enumerate(names):
            os.pwrite(file, b"%08d" % i, 0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                verdicts.append(hold(random_case(seed, number, backends)))
    finally:
        os.close(file)
    return verdicts


def hold(case: RandomCase) -> Verdict:
    """Hold one case to the laws."""
    group = partition_group(case.parts)
    mine = next((i for i, part in enumerate(case.parts) if dist.get_rank() in part), -1)
    if mine < 0:
        return Verdict()
    try:
        handler = _made(case, group)
    except CPError as error:
        return Verdict(refused=(_refusal(error),), group=mine)
    return _Held(case, handler, mine).verdict()


def _made(case: RandomCase, group: dist.ProcessGroup | None) -> ContextParallelHandler:
    cross = {"cross_attention": True} if case.base.is_cross else {}
    return make_handler(case.base, None if case.is_alone else group, **cross)


def _refusal(error: CPError) -> str:
    """A refusal in words; anything else goes on as it came."""
    text = str(error)
    if isinstance(error, RankMismatchError):
        raise error
    if isinstance(error, UnsupportedError) or any(known in text for known in REFUSALS):
        return text.split("; ", maxsplit=1)[0]
    raise error


class _Held:
    """A case on this rank.

    Args:
        case: what is asked.
        handler: of this rank.
        mine: number of the rank's group.
    """

    def __init__(self, case: RandomCase, handler: ContextParallelHandler, mine: int) -> None:
        self.case, self.handler, self.mine = case, handler, mine
        self.rows = {"q": Rows(handler.layout, handler.cp_rank), "kv": Rows(handler.kv_layout, handler.cp_rank)}
        self.seed = (case.seed * 1_000_003 + case.number * 1009 + mine * 31) % (1 << 40)
        self.refused: list[str] = []
        self.steps: list[tuple[int, Attending | Moving]] = []

    def verdict(self) -> Verdict:
        """Run all steps, then compare; nothing communicates once a complaint may be made."""
        waiting: list[Attending] = []
        for number, step in enumerate(self.case.steps):
            try:
                self._run(number, step, waiting)
            except CPError as error:
                self.refused.append(_refusal(error))
            if self.case.backward == "at once":
                self._backward(waiting)
        self._backward(waiting)
        wrong = [f"({n + 1}) {text}" for n, step in self.steps for text in step.complaints()]
        return Verdict(tuple(wrong), tuple(self.refused), len(self.steps), self.mine)

    def _run(self, number: int, step: Call | Move, waiting: list[Attending]) -> None:
        seed = self.seed + 101 * number
        if isinstance(step, Call):
            attending = Attending(step, self.handler, self.rows, seed)
            attending.forward()
            waiting.append(attending)
            self.steps.append((number, attending))
        else:
            moving = Moving(step, self.case.base, self.handler, self.rows, seed)
            moving.run()
            self.steps.append((number, moving))

    def _backward(self, waiting: list[Attending]) -> None:
        """Backward of the calls that have not had it, in the case's order."""
        calls = waiting[::-1] if self.case.backward == "reverse" else waiting
        roots = [call.roots() for call in calls]
        for batch in [[pair for pairs in roots for pair in pairs]] if self.case.backward == "together" else roots:
            if batch:
                torch.autograd.backward([root for root, _ in batch], [grad for _, grad in batch])
        for call in calls:
            call.after_backward()
        waiting.clear()
