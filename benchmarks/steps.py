"""The demo's training step, one at a time on the ranks of a pool, so that runs can take turns; checked, and measured.

A step makes a handler for a new batch (its plan included), runs the model forward, the loss and the model backward,
sums gradients over ranks, and lets AdamW update the weights.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.waits import record_waits
from cphandler import get_cp_handler_cls, record_traffic
from cphandler.demo.model import GPT
from cphandler.demo.step import batch_gradient, sum_gradients, training_step
from cphandler.demo.training import RunSettings, flat
from cphandler.errors import InvalidValueError
from cphandler.testing import RankPool, relative_error

GRADIENT_LIMIT = 1e-6
"""Largest relative L2 error of the first step's float32 gradient to that of one rank in float64."""

LOSS_LIMIT = 2e-6
"""Largest error of the first step's mean loss, nats per byte."""


@dataclass(frozen=True)
class Sample:
    """What one rank measured of one step.

    Attributes:
        seconds: wall time.
        cpu_seconds: of all threads of the process.
        fixed_seconds: of these in the handler and its plan, the sum of gradients and the optimizer: as much on any
            number of ranks.
        sent_bytes: payload sent for context parallelism; the sum of gradients is not counted.
        exposed_seconds: blocked in waits for transfers of context parallelism.
        summing_seconds: in the sum of gradients over ranks.
    """

    seconds: float
    cpu_seconds: float
    fixed_seconds: float
    sent_bytes: int
    exposed_seconds: float
    summing_seconds: float


class Trainer:
    """A model in training on this rank.

    Args:
        settings: what to train with; the same on every rank.
        group: the context-parallel group; None for one rank.
    """

    def __init__(self, settings: RunSettings, group: dist.ProcessGroup | None) -> None:
        torch.manual_seed(settings.seed)
        self._settings, self._group = settings, group
        self._model = GPT(settings.model).to(dtype=getattr(torch, settings.dtype))
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95))

    def gradient(self, batch: dict[str, Any]) -> tuple[float, Tensor]:
        """Mean loss and ``[parameters]`` gradient of a batch, summed over ranks."""
        self._optimizer.zero_grad()
        loss = training_step(self._model, batch, self._settings.handler(batch, self._group), "cpu")
        return loss, flat(parameter.grad for parameter in self._model.parameters())

    def drop_gradients(self) -> None:
        """Hold weights and the optimizer's state only."""
        self._optimizer.zero_grad()

    def step(self, batch: dict[str, Any]) -> Sample:
        """Train on a batch."""
        with record_traffic() as traffic, record_waits() as waits:
            started, cpu_started = time.perf_counter(), time.process_time()
            handler = self._settings.handler(batch, self._group)
            self._optimizer.zero_grad()
            shared = -time.process_time()
            batch_gradient(self._model, batch, handler, "cpu")
            shared += time.process_time()
            if handler.cp_size > 1:
                sum_gradients(self._model, [handler.group])
            self._optimizer.step()
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        return Sample(seconds, cpu_seconds, cpu_seconds - shared, traffic.sent_bytes, waits.exposed, waits.summing)


@lru_cache(maxsize=64)
def trainer(settings: RunSettings, group: dist.ProcessGroup | None) -> Trainer:
    """This rank's trainer of a run, kept from step to step."""
    return Trainer(settings, group)


def world(settings: RunSettings) -> dist.ProcessGroup | None:
    """The pool's own group, where a run has several ranks."""
    return dist.group.WORLD if settings.cp_size > 1 else None


def step(settings: RunSettings, batch: dict[str, Any]) -> Sample:
    """A step on every rank of a pool, which start together."""
    own = trainer(settings, world(settings))
    dist.barrier()
    return own.step(batch)


def step_apart(settings: RunSettings, batch: dict[str, Any]) -> Sample:
    """One rank's whole step on every rank of a pool at once; they send each other nothing."""
    own = trainer(settings, None)
    dist.barrier()
    return own.step(batch)


def gradient(settings: RunSettings, batch: dict[str, Any]) -> tuple[float, Tensor]:
    """A new model's loss and gradient on every rank of a pool."""
    return Trainer(settings, world(settings)).gradient(batch)


def forget() -> None:
    """Drop all trainers."""
    trainer.cache_clear()


@contextmanager
def muted() -> Iterator[None]:
    """Nothing on standard error: torch's profiler says there when it starts and stops. Exceptions come through."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak(settings: RunSettings, batch: dict[str, Any]) -> int:
    """Most bytes of tensors that a step holds at once on this rank, beside what was there before it.

    Weights and the optimizer's state are there before; activations, gradients, and what attention and its exchange hold
    are counted, each allocation as torch's profiler reports it: the same number on a busy machine.
    """
    own = trainer(settings, world(settings))
    own.step(batch)
    own.drop_gradients()
    with muted(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        own.step(batch)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held: dict[int, int] = {}
    level = highest = 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=itemgetter("ts")):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        level += size if size > 0 else -held.pop(address, 0)
        if size > 0:
            held[address] = size
        highest = max(highest, level)
    return highest


def refuse_wrong(name: str, expected: tuple[float, Tensor], actual: Sequence[tuple[float, Tensor]]) -> None:
    """Refuse to time what is wrong.

    Args:
        name: what to call the run.
        expected: loss and gradient of one rank in float64.
        actual: those of each rank of the run, in float32.

    Raises:
        AssertionError: a rank's loss or gradient is off, or not a number.
    """
    for rank, (loss, found) in enumerate(actual):
        error, away = relative_error(found, expected[1]), abs(loss - expected[0])
        assert error <= GRADIENT_LIMIT, f"{name}: gradient on rank {rank} off by {error:.1e}"
        assert away <= LOSS_LIMIT, f"{name}: loss on rank {rank} off by {away:.1e}"


def exact(settings: RunSettings) -> RunSettings:
    """One rank in float64 with the same weights: what every run must come to."""
    return replace(settings, backend="local", cp_size=1, layout=None, dtype="float64")


def run_named(name: str, cp_size: int, base: RunSettings) -> RunSettings:
    """The run that ``backend`` or ``backend@layout`` stands for.

    Raises:
        InvalidValueError: a layout that the backend does not serve.
    """
    backend, _, layout = name.partition("@")
    handler_cls = get_cp_handler_cls(backend)
    served: tuple[str, ...] = handler_cls.capabilities.layouts  # type: ignore[attr-defined]
    layout = layout or handler_cls.default_layout  # type: ignore[attr-defined]
    if layout not in served:
        raise InvalidValueError(
            f"{backend} does not serve this layout", got=repr(layout), fix=f"choose one of {', '.join(served)}"
        )
    return replace(base, backend=backend, cp_size=cp_size, layout=layout)


@dataclass(frozen=True)
class Apart:
    """A run in which every rank does the whole of one rank's work and sends nothing: what the cores give at once.

    Attributes:
        cp_size: ranks.
    """

    cp_size: int


def label(settings: RunSettings | Apart) -> str:
    """How tables and plots call a run; the number of ranks stands beside it."""
    if isinstance(settings, Apart):
        return "apart"
    return "one rank" if settings.cp_size == 1 else f"{settings.backend}@{settings.layout}"


def in_turns(
    runs: Sequence[RunSettings],
    given: Sequence[dict[str, Any]],
    pools: dict[int, RankPool],
    apart: Sequence[int] = (),
) -> dict[RunSettings | Apart, list[list[Sample]]]:
    """Every run's samples, a list of ranks for each batch; the first batch warms up and is not counted.

    All runs train on a batch before any goes on to the next one, each time another first.

    Args:
        runs: the competitors, one rank first.
        given: the batches.
        pools: of so many ranks.
        apart: numbers of ranks that also do the whole of the first run's work each.
    """
    turns: list[tuple[RunSettings | Apart, Any, RunSettings]]
    turns = [(run, step, run) for run in runs]
    turns += [(Apart(count), step_apart, runs[0]) for count in apart]
    samples: dict[RunSettings | Apart, list[list[Sample]]] = {run: [] for run, *_ in turns}
    for i, batch in enumerate(given):
        first = i % len(turns)
        for run, function, settings in (*turns[first:], *turns[:first]):
            samples[run].append(pools[run.cp_size].run(function, settings, batch))
    return {run: taken[1:] for run, taken in samples.items()}
