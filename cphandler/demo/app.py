"""The demo's command line: which runs, on which ranks."""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cphandler import get_cp_handler_cls
from cphandler.demo.corpus import packed_batches
from cphandler.demo.model import GPTConfig
from cphandler.demo.pulse import Pulse
from cphandler.demo.report import Comparison, compare, print_table, write_json, write_plot
from cphandler.demo.training import ALONE, RunResult, RunSettings, train
from cphandler.errors import InvalidValueError
from cphandler.layouts.layout import LAYOUTS
from cphandler.testing import RankPool, partition_group
from cphandler.training.reductions import REDUCTIONS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Groups: TypeAlias = tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]
"""A context-parallel and a data-parallel group."""

LOSSES = [name for name in REDUCTIONS if name != "token_sum"]
"""Reductions whose size does not grow with the batch, so that limits mean the same for all."""

RUN_LIMIT = 24 * 3600.0
"""Seconds one run may take before its ranks are ended."""


@app.command()
def demo(
    *,
    backend: Annotated[list[str] | None, typer.Option(help="Backend; repeat for several.")] = None,
    cp_comm_type: Annotated[str | None, typer.Option(help="Comm type, for backends that have several.")] = None,
    cp_size: Annotated[list[int] | None, typer.Option(help="Ranks; repeat for several. Under torchrun: all.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of a packed batch.", min=2)] = 2048,
    longest: Annotated[int | None, typer.Option(help="Tokens of the longest document; else a batch's.", min=1)] = None,
    steps: Annotated[int, typer.Option(help="Training steps, one packed batch each.", min=1)] = 50,
    exact_steps: Annotated[int, typer.Option(help="Steps of the same runs in float64; 0 for none.", min=0)] = 10,
    dtype: Annotated[str, typer.Option(help="float32, float64 or bfloat16.")] = "float32",
    layout: Annotated[
        list[str] | None, typer.Option(help="Layout; repeat for several. Else the backend's own.")
    ] = None,
    dp: Annotated[int, typer.Option(help="Data-parallel groups, each with a batch of its own in a step.", min=1)] = 1,
    mtp_depth: Annotated[int, typer.Option(help="Further tokens that are predicted too.", min=0)] = 0,
    loss: Annotated[str, typer.Option(help=f"Reduction: {', '.join(LOSSES)}.")] = "token_mean",
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Shard parameters over all ranks (FSDP2).")] = False,
    compile_: Annotated[
        str | None, typer.Option("--compile", help="torch.compile each layer by a backend: inductor, aot_eager.")
    ] = None,
    rl: Annotated[
        bool, typer.Option("--rl", help="Also score the first batch, and compare log-probabilities.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for the picture and the JSON file.")] = Path("demo_output"),
) -> None:
    """Train a small GPT on packed real documents on one rank, then under context parallelism, and compare.

    The documents are the sources of Python's standard library. Starts its own ranks on this machine; under torchrun it
    uses the ranks it is given, with NCCL on GPUs and gloo otherwise. Exits with 1 if a run differs from one rank.
    """
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    sizes = [int(os.environ["WORLD_SIZE"]) // dp] if distributed else (cp_size or [2, 4])
    layouts: list[str | None] = [*layout] if layout else [None]
    common: dict[str, Any] = {
        "model": GPTConfig(mtp_depth=mtp_depth),
        "batches_per_step": dp,
        "reduction": loss,
        "fsdp": fsdp,
        "compile": compile_,
        "score": rl,
    }
    wanted = [
        RunSettings(backend=name, cp_comm_type=cp_comm_type, cp_size=size, layout=placed, dtype=dtype, **common)
        for size in sizes
        for name in (backend or ["ulysses", "ring"])
        for placed in layouts
    ]
    check(wanted[0], loss, dp if distributed else 1)
    for settings in wanted:
        check_names(settings, cp_size if distributed else None)
    launcher = TorchrunRanks() if distributed else LocalRanks()
    console = Console(quiet=not launcher.is_first)
    comparisons: list[Comparison] = []
    kinds = [(dtype, steps)] + ([("float64", exact_steps)] if exact_steps and dtype != "float64" else [])
    with launcher:
        for kind, count in kinds:
            each = f"{dp} x {seq_len:,}" if dp > 1 else f"{seq_len:,}"
            console.print(f"{count} steps of {each} tokens in {kind}, one thread a rank on CPUs")
            batches = packed_batches(count * dp, seq_len, longest) if launcher.is_first else []
            runs = [replace(settings, dtype=kind) for settings in wanted]
            comparisons += compare_runs(launcher, runs, batches)
    if launcher.is_first:
        arguments = {"seq_len": seq_len, "steps": steps, "exact_steps": exact_steps, "dp": dp, **asdict(wanted[0])}
        show(console, comparisons, output, arguments)
    if not all(row.agrees for row in comparisons):
        raise typer.Exit(1)


def check(settings: RunSettings, loss: str, dp: int) -> None:
    """Refuse settings that no run can have, before any rank starts.

    Raises:
        InvalidValueError: an unknown dtype, reduction or compiler, or ranks that the data-parallel groups do not share.
    """
    for name, value, known in (
        ("dtype", settings.dtype, ("float32", "float64", "bfloat16")),
        ("loss", loss, LOSSES),
        ("backend of torch.compile", settings.compile or "inductor", torch.compiler.list_backends(exclude_tags=())),
    ):
        if value not in known:
            raise InvalidValueError(f"unknown {name}", got=repr(value), fix=f"choose one of {', '.join(known)}")
    if dp > 1 and int(os.environ["WORLD_SIZE"]) % dp:
        raise InvalidValueError(
            "data-parallel groups must have the same number of ranks",
            got=f"--dp {dp} and {os.environ['WORLD_SIZE']} ranks",
            fix="choose a --dp that divides them",
        )


def check_names(settings: RunSettings, cp_size: list[int] | None) -> None:
    """Refuse a run that cannot be, before any rank starts.

    Raises:
        InvalidValueError: an unknown backend or layout, or a cp size that is not torchrun's.
    """
    get_cp_handler_cls(settings.backend, settings.cp_comm_type)
    if settings.layout is not None and settings.layout.lower().replace("-", "_") not in LAYOUTS:
        raise InvalidValueError("unknown layout", got=repr(settings.layout), fix=f"choose one of {', '.join(LAYOUTS)}")
    if cp_size is not None and cp_size != [settings.cp_size]:
        raise InvalidValueError(
            "under torchrun the cp size is the number of ranks over --dp", got=cp_size, fix="leave --cp-size out"
        )


def compare_runs(launcher: Any, runs: list[RunSettings], batches: list[dict[str, Any]]) -> list[Comparison]:
    """The one-rank run, then each of the others beside it."""
    alone = replace(runs[0], backend="local", cp_comm_type=None, cp_size=1, layout=None, fsdp=False, compile=None)
    reference = launcher.run(alone, batches)
    comparisons = [compare(alone, reference, None)] if launcher.is_first else []
    for settings in runs:
        results = launcher.run(settings, batches)
        if launcher.is_first:
            comparisons.append(compare(settings, results, reference[0]))
    return comparisons


def show(console: Console, comparisons: list[Comparison], output: Path, arguments: dict[str, Any]) -> None:
    """Table, picture and JSON."""
    output.mkdir(parents=True, exist_ok=True)
    print_table(console, comparisons)
    write_json(output / "demo.json", comparisons, arguments)
    write_plot(output / "demo.png", comparisons)
    console.print(f"wrote {output / 'demo.png'} and {output / 'demo.json'}")


def train_with_progress(settings: RunSettings, batches: list[dict[str, Any]], groups: Groups, device: str) -> RunResult:
    """Train; the first rank shows a progress bar."""
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=dist.get_rank() != 0) as progress:
        task = progress.add_task(
            f"{settings.name} {settings.layout or ''}", total=len(batches) // settings.batches_per_step
        )
        group, data_group = groups
        return train(
            settings,
            batches,
            group=group,
            data_group=data_group,
            device=device,
            on_step=lambda: progress.advance(task),
        )


def train_on_pool(settings: RunSettings, batches: list[dict[str, Any]]) -> RunResult:
    """A run on all ranks of a pool."""
    return train_with_progress(settings, batches, groups_of(settings, partition_group), "cpu")


def groups_of(settings: RunSettings, make: Callable[[list[range]], dist.ProcessGroup | None]) -> Groups:
    """This rank's context-parallel and data-parallel group, neighbours in the first; None for those of one rank.

    Args:
        settings: say how many ranks share a batch.
        make: makes this rank's group from those of all.
    """
    cp, world = settings.cp_size, dist.get_world_size()
    context = [range(start, start + cp) for start in range(0, world, cp)]
    data = [range(place, world, cp) for place in range(cp)]
    return make(context) if cp > 1 else None, make(data) if world > cp else None


class LocalRanks:
    """Ranks that the demo starts on this machine, kept from run to run."""

    is_first = True

    def __init__(self) -> None:
        self._pools: dict[int, RankPool] = {}

    def __enter__(self) -> None:
        """Nothing starts before a run needs it."""

    def __exit__(self, *error: object) -> None:
        for pool in self._pools.values():
            pool.close()

    def run(self, settings: RunSettings, batches: list[dict[str, Any]]) -> list[RunResult]:
        """Every rank's result."""
        ranks = settings.cp_size * (1 if settings.name == ALONE else settings.batches_per_step)
        pool = self._pools.setdefault(ranks, RankPool(ranks))
        return pool.run(train_on_pool, settings, batches, timeout=RUN_LIMIT)


class TorchrunRanks:
    """The ranks torchrun started, on one machine or several.

    Args:
        interval: seconds from one sign of life between ranks to the next.
        limit: seconds to wait for one.
    """

    def __init__(self, interval: float = 5.0, limit: float = 30.0) -> None:
        self._interval, self._limit = interval, limit
        self.is_first = int(os.environ["RANK"]) == 0
        on_gpu = torch.cuda.is_available()
        self._device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if on_gpu else "cpu"
        self._backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        self._groups: dict[tuple[range, ...], dist.ProcessGroup | None] = {}

    def _group(self, parts: list[range]) -> dist.ProcessGroup | None:
        """This rank's group of a division of the ranks, made once."""
        if len(parts) == 1:
            return dist.group.WORLD
        key = tuple(parts)
        if key not in self._groups:
            made = [dist.new_group([*part], timeout=timedelta(seconds=RUN_LIMIT)) for part in parts]
            self._groups[key] = next(x for x, part in zip(made, parts, strict=True) if dist.get_rank() in part)
        return self._groups[key]

    def __enter__(self) -> None:
        if self._device != "cpu":
            torch.cuda.set_device(self._device)
        else:
            torch.set_num_threads(1)
        # The other ranks wait while the first one trains alone; the pulse tells of one that is lost.
        dist.init_process_group(self._backend, timeout=timedelta(seconds=RUN_LIMIT))
        self._pulse = Pulse(self._interval, self._limit)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:  # what waits for the other ranks cannot be ended in order
            traceback.print_exception(error)
            sys.stdout.flush()
            self._pulse.look()
            os._exit(1)
        self._pulse.stop()
        # A group's threads end with the last reference to it, and one that lets go of a tensor while Python shuts down
        # ends the process by SIGABRT. Handlers refer to themselves, and hold the group until they are collected.
        del self._pulse
        self._groups.clear()
        gc.collect()
        dist.destroy_process_group()

    def run(self, settings: RunSettings, batches: list[dict[str, Any]]) -> list[RunResult]:
        """Every rank's result on the first rank; the first rank's documents are everyone's."""
        if settings.name == ALONE and dist.get_world_size() > 1:
            alone = None, None
            results = [train_with_progress(settings, batches, alone, self._device)] if self.is_first else []
            dist.barrier()
            return results
        shared = [batches]
        dist.broadcast_object_list(shared, src=0)
        result = train_with_progress(settings, shared[0], groups_of(settings, self._group), self._device)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, result)
        return gathered
