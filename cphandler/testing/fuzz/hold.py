"""What runs on a rank: a random case's handler made, its calls made in order, and everything compared."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from cphandler.errors import CPError, UnsupportedError
from cphandler.handler.contract import ContextParallelHandler
from cphandler.testing.cases import make_handler
from cphandler.testing.fuzz.attention import Attending
from cphandler.testing.fuzz.cases import Call, Look, RandomCase, Step, Turn
from cphandler.testing.fuzz.drawing import random_case
from cphandler.testing.fuzz.facts import Truth
from cphandler.testing.fuzz.movement import Comparing, Looking, Moving
from cphandler.testing.fuzz.tensors import Rows
from cphandler.testing.fuzz.turning import Turning
from cphandler.testing.pool import partition_group


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
    seed = (case.seed * 1_000_003 + case.number * 1009 + mine * 31) % (1 << 40)
    truth = Truth(case, seed)
    try:
        handlers = [_made(truth, group)]
        if case.second == "twin":
            handlers.append(_made(truth, group))
    except CPError as error:
        return Verdict(refused=(_refusal(error),), group=mine)
    if case.second == "copy":
        handlers.insert(0, copy.deepcopy(handlers[0]))
    return _Held(truth, handlers, mine, seed).verdict()


def _made(truth: Truth, group: dist.ProcessGroup | None) -> ContextParallelHandler:
    """The case's handler; what it was given is then written over, which must change nothing."""
    case, arguments = truth.case, truth.arguments()
    handler = make_handler(case.base, _given_group(case, group), **arguments)
    for given in arguments.values():
        if isinstance(given, Tensor):
            given.zero_()
        elif isinstance(given, np.ndarray):
            given.fill(0)
        elif isinstance(given, list):
            given.clear()
    return handler


def _given_group(case: RandomCase, group: dist.ProcessGroup | None) -> Any:
    """A process group, or a mesh of it."""
    if case.group == "none":
        return None
    if case.group == "group":
        return group
    if case.group not in _meshes.setdefault(group, {}):
        _meshes[group][case.group] = _mesh(case.group, group)
    return _meshes[group][case.group]


_meshes: dict[Any, dict[str, DeviceMesh]] = {}
"""The meshes that were made, by their group."""


def _mesh(kind: str, group: dist.ProcessGroup | None) -> DeviceMesh:
    """A mesh of a group; of two dims, of all four ranks."""
    assert group is not None
    if kind == "mesh":
        return DeviceMesh.from_group(group, "cpu", mesh_dim_names=("cp",))
    outer, inner = partition_group(((0, 2), (1, 3))), partition_group(((0, 1), (2, 3)))
    assert outer is not None
    assert inner is not None
    names = ("outer", "inner")
    return DeviceMesh.from_group([outer, inner], "cpu", mesh=[[0, 1], [2, 3]], mesh_dim_names=names)


def _refusal(error: CPError) -> str:
    """A refusal in words, without what it got; anything else goes on as it came."""
    if isinstance(error, UnsupportedError):
        return str(error).split("; ", maxsplit=1)[0]
    raise error


class _Held:
    """A case on this rank.

    Args:
        truth: what is asked, and what is true of its tokens.
        handlers: of this rank, over one batch; steps take turns with them.
        mine: number of the rank's group.
        seed: of the group's data.
    """

    def __init__(self, truth: Truth, handlers: list[ContextParallelHandler], mine: int, seed: int) -> None:
        self.truth, self.case, self.handlers, handler = truth, truth.case, handlers, handlers[0]
        self.mine, self.seed = mine, seed
        self.rows = {"q": Rows(handler.layout, handler.cp_rank), "kv": Rows(handler.kv_layout, handler.cp_rank)}
        self.refused: list[str] = []
        self.steps: list[tuple[int, Attending | Comparing]] = []

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

    def _run(self, number: int, step: Step, waiting: list[Attending]) -> None:
        seed, handler = self.seed + 101 * number, self.handlers[number % len(self.handlers)]
        if isinstance(step, Call):
            attending = Attending(step, handler, self.rows, seed)
            attending.forward()
            waiting.append(attending)
            self.steps.append((number, attending))
            return
        running: Looking | Turning | Moving
        if isinstance(step, Look):
            running = Looking(step, self.truth, handler, self.rows)
        else:
            kind: Any = Turning if isinstance(step, Turn) else Moving
            running = kind(step, self.truth, handler, self.rows, seed)
        running.run()
        self.steps.append((number, running))

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
