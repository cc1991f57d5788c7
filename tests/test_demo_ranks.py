"""Ranks of the demo under torchrun: they end in order, and one that is lost is named."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from cphandler.demo.app import TorchrunRanks
from cphandler.testing import RankPool

ROOT = Path(__file__).parent.parent

ORDERLY = """
import weakref
from pathlib import Path

import torch.distributed as dist

from cphandler.demo.app import TorchrunRanks
from cphandler.demo.corpus import packed_batches
from cphandler.demo.training import RunSettings


def threads():
    return {(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}


ranks = TorchrunRanks()
with ranks:
    for settings in (RunSettings(), RunSettings(backend="ulysses", cp_size=2)):
        ranks.run(settings, packed_batches(1, 64) if ranks.is_first else [])
    group, during = weakref.ref(dist.group.WORLD), threads()
assert "pt_gloo_runloop" in during
assert group() is None, "somebody holds the group"
assert not {"pt_gloo_runloop", "gloo_tcp_loop"} & threads()
"""


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def settings_of(rank: int, size: int, port: str) -> dict[str, str]:
    """What torchrun tells a rank."""
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def test_ranks_end_in_order() -> None:
    """A thread of a group that somebody still holds may end its process by SIGABRT."""
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", ORDERLY],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **settings_of(rank, 2, port)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors


@pytest.fixture
def forked(ranks: RankPool) -> None:
    """Processes that start in milliseconds: copies of one that has loaded what the pool's ranks need."""
    ranks.run(dist.get_rank)


def life(rank: int, port: str, folder: str, raises: bool) -> None:
    """Rank 1 rests or raises while the others wait in a collective with a limit of a day."""
    os.environ.update(settings_of(rank, 3, port))
    with Path(folder, str(rank)).open("w") as errors:
        os.dup2(errors.fileno(), sys.stderr.fileno())
    with TorchrunRanks(interval=0.2, limit=2.0):
        Path(folder, f"{rank}-is-here").touch()
        if rank == 1 and raises:
            raise ArithmeticError("an error of its own")
        if rank == 1:
            time.sleep(120)
        dist.barrier()


def errors_of_others(folder: Path, lost: signal.Signals | None) -> dict[int, str]:
    """What is printed by each rank that ends, where rank 1 raises or is lost by a signal."""
    context, port = multiprocessing.get_context("forkserver"), free_port()
    ranks = [
        context.Process(target=life, args=(rank, port, str(folder), lost is None), daemon=True) for rank in range(3)
    ]
    for process in ranks:
        process.start()
    while not all((folder / f"{rank}-is-here").exists() for rank in range(3)):
        time.sleep(0.01)
    if lost is not None:
        assert ranks[1].pid is not None
        os.kill(ranks[1].pid, lost)
    ending = [rank for rank in range(3) if rank != 1 or lost is None]
    for rank in ending:
        ranks[rank].join(timeout=60)
    codes = [ranks[rank].exitcode for rank in ending]
    for process in ranks:
        process.kill()
    assert set(codes) == {1}
    return {rank: (folder / str(rank)).read_text() for rank in ending}


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_lost_rank_is_named(tmp_path: Path, how: signal.Signals) -> None:
    errors = errors_of_others(tmp_path, how)
    for rank in (0, 2):
        assert f"RankLostError: rank {rank} of 3 does not hear from rank 1; got nothing for 2 seconds" in errors[rank]


@pytest.mark.usefixtures("forked")
def test_a_rank_that_raises_says_so_and_is_named(tmp_path: Path) -> None:
    errors = errors_of_others(tmp_path, None)
    assert "ArithmeticError: an error of its own" in errors[1]
    assert "does not hear" not in errors[1]
    for rank in (0, 2):
        assert f"RankLostError: rank {rank} of 3 does not hear from rank 1" in errors[rank]
