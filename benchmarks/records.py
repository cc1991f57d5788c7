"""Contests as JSON: the machine, the versions, every sample, and what the tables show."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.intervals import paired_ratio
from benchmarks.peers import peer_cls
from benchmarks.runs import Result, Run
from benchmarks.tables import above, against, least_ratio, outside_against, ratios, rivals
from benchmarks.works import Work


def machine() -> dict[str, Any]:
    """Processor, cores and system."""
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in _lines(info) if line.startswith("model name")]
    return {"processor": models[0] if models else platform.processor(), "cores": os.cpu_count(), "system": _system()}


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _system() -> str:
    return f"{platform.system()} {platform.machine()}"


def versions(peers: Iterable[str]) -> dict[str, str]:
    """Of Python, torch, the library, and the packages of peers that are installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cphandler": version("cphandler")}
    for path in peers:
        found = {**peer_cls(path).versions(), **found}
    return found


def record(runs: Sequence[Run], peers: Iterable[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Everything about some contests, for ``json``.

    Args:
        runs: the contests.
        peers: import paths of the peers that were asked for.
        settings: repeats, threads and the like.
    """
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(peers),
        "settings": settings,
        "contests": [_contest(run) for run in runs],
    }


def write(path: Path, runs: Sequence[Run], peers: Iterable[str], settings: dict[str, Any]) -> None:
    """Write :func:`record` to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record(runs, peers, settings), indent=1) + "\n")


def _contest(run: Run) -> dict[str, Any]:
    plain = run.contest.works[0]
    counts = sorted({work.ranks for work in run.results} - {1})
    return {
        "name": run.contest.name,
        "lengths": list(plain.lengths),
        "heads": plain.heads,
        "kv_heads": plain.kv_heads,
        "head_dim": plain.head_dim,
        "dtype": plain.dtype,
        "competitors": [_competitor(run, work, result) for work, result in run.results.items()],
        "absent": [asdict(absent) for absent in run.absent],
        "cpu_seconds_per_gigabyte": {str(n): [1e9 * price for price in run.price(n)] for n in counts if run.prices},
        "against_peers": [
            {
                "ranks": n,
                "competitor": work.name,
                "peer": peer.name,
                **against(run, work, peer)._asdict(),
                "outside_the_kernel": outside_against(run, work, peer)._asdict(),
            }
            for n in counts
            for work in rivals(run, n)[0]
            for peer in rivals(run, n)[1]
        ],
    }


def _competitor(run: Run, work: Work, result: Result) -> dict[str, Any]:
    floor, errors = run.floor(work), result.errors
    plain = run.plain.cpu()
    return {
        "name": work.name,
        "kind": "peer" if work.peer else "ours" if work.is_ours else "plain",
        "ranks": work.ranks,
        "layout": work.layout,
        "errors": None if errors is None else errors._asdict(),
        "wrong": [] if errors is None else errors.wrong(work.dtype),
        "cpu_seconds": result.cpu(),
        "cpu_ratio": {"least": least_ratio(result.cpu(), plain), **paired_ratio(result.cpu(), plain)._asdict()},
        "slowest_ratio": statistics.median(ratios(result.slowest(), plain)),
        "wall_seconds": result.wall(),
        "sent_bytes": result.wire() if work.ranks > 1 else 0,
        "counted_bytes": result.sent()[1] if work.is_ours else None,
        "peak_bytes": result.peak,
        "kernel_cpu_seconds": result.kernel(),
        "rest_cpu_seconds": result.rest(),
        "gloo_cpu_seconds": result.gloo(),
        "floor_cpu_seconds": None if floor is None else floor.cpu(),
        "floor_slowest_seconds": None if floor is None else floor.slowest,
        "bare_cpu_seconds": None if result.bare is None else result.bare.cpu(),
        "bare_outside_cpu_seconds": None if result.bare is None else result.bare.outside(),
        "above": {name: interval._asdict() for name, interval in above(run, work).items()},
        "floor_ratio": None if floor is None else statistics.median(ratios(floor.cpu(), plain)),
        "samples": [[asdict(sample) for sample in ranks] for ranks in result.samples],
    }
