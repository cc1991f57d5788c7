"""A pool of persistent ranks: processes that stay in one gloo group and run functions on demand."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import io
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

GROUP_TIMEOUT = 60.0
"""Seconds a collective inside a rank may take before gloo gives up."""


class RankError(RuntimeError):
    """A function failed on some rank, or did not come back from it.

    Attributes:
        ranks: the ranks that failed or are stuck, the first one first.
    """

    def __init__(self, message: str, ranks: Sequence[int]) -> None:
        super().__init__(message)
        self.ranks = list(ranks)


class RankPool:
    """Runs functions on every rank of a group of processes that live as long as the pool.

    Starting a process that imports torch takes seconds; a call on a running pool takes milliseconds. After any failure
    the ranks are killed and started again at the next call, since a group is of no use once a rank has left it.

    Args:
        size: number of ranks.
        timeout: seconds a call may take.
    """

    def __init__(self, size: int, *, timeout: float = 60.0) -> None:
        self.size = size
        self.timeout = timeout
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> RankPool:  # noqa: PYI034 (Self is not in Python 3.10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float | None = None) -> list[Any]:
        """Call ``function(*args)`` on every rank and return what each returned, in rank order.

        Args:
            function: importable by name; asks ``torch.distributed`` for its rank.
            args: picklable.
            timeout: seconds, in place of the pool's.

        Raises:
            RankError: with the traceback of the first rank that failed, or the stack of those that did not come back.
        """
        if not self._processes:
            self._start()
        request = pickle.dumps((function, args))
        try:
            for rank, connection in enumerate(self._connections):
                self._ask(rank, connection, request)
            return self._collect(time.monotonic() + (self.timeout if timeout is None else timeout))
        except BaseException:  # an interrupted call would leave its answers to the next one
            self._kill()
            raise

    def _ask(self, rank: int, connection: Connection, request: bytes) -> None:
        try:
            connection.send_bytes(request)
        except OSError:
            code = self._processes[rank].exitcode
            raise RankError(f"rank {rank} of {self.size} died between calls, exit code {code}", [rank]) from None

    def close(self) -> None:
        """End the ranks."""
        for connection in self._connections:
            with contextlib.suppress(OSError):  # a rank that died has closed its end
                connection.send_bytes(b"")
        for process in self._processes:
            process.join(timeout=2.0)
        self._kill()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        # all but backends, and what torch loads by itself at the first call of an operator: seconds, in each rank
        context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "cphandler.testing.laws"])
        self._folder = tempfile.TemporaryDirectory(prefix="cphandler-ranks-")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, self._folder.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _collect(self, deadline: float) -> list[Any]:
        waiting = {connection: rank for rank, connection in enumerate(self._connections)}
        results: dict[int, Any] = {}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self._raise_stuck(sorted(waiting.values()))
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                results[rank] = self._answer(connection, rank)
        return [results[rank] for rank in range(self.size)]

    def _answer(self, connection: Connection, rank: int) -> Any:
        try:
            succeeded, value = pickle.loads(connection.recv_bytes())
        except EOFError:
            self._processes[rank].join(timeout=1.0)
            code = self._processes[rank].exitcode
            raise RankError(f"rank {rank} of {self.size} died with exit code {code}", [rank]) from None
        if succeeded:
            return value
        raise RankError(f"rank {rank} of {self.size} failed:\n{value}", [rank])

    def _raise_stuck(self, ranks: list[int]) -> None:
        """Ask the stuck ranks for their stacks, end the pool, and say where each one is."""
        assert self._folder is not None
        for rank in ranks:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        stacks = [f"rank {rank}:\n{_stack_file(self._folder.name, rank).read_text()}" for rank in ranks]
        names = ", ".join(map(str, ranks))
        raise RankError(f"rank {names} of {self.size} did not come back in time\n" + "\n".join(stacks), ranks)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes.clear()
        self._connections.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _stack_file(folder: str, rank: int) -> Path:
    return Path(folder) / f"stack-{rank}"


def _serve(rank: int, size: int, folder: str, connection: Connection) -> None:
    """A rank's life: join the group, answer requests until an empty one comes."""
    torch.set_num_threads(1)
    with _stack_file(folder, rank).open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=GROUP_TIMEOUT),
        )
        while request := connection.recv_bytes():
            connection.send_bytes(_reply(request))
        _groups.clear()
        gc.collect()  # a group's threads end with the last reference to it, and must not outlive Python
        dist.destroy_process_group()


def _reply(request: bytes) -> bytes:
    try:
        function, args = pickle.loads(request)
        return pickle.dumps((True, function(*args)))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # pytest's "did not raise" is no Exception
        buffer = io.StringIO()
        traceback.print_exc(file=buffer)
        return pickle.dumps((False, buffer.getvalue()))


_groups: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup | None] = {}


def partition_group(parts: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
    """This rank's group when the ranks are divided so; None for a rank in no part.

    To be called on every rank of a pool. Groups are made once per partition and kept.
    """
    key = tuple(tuple(part) for part in parts)
    if key not in _groups:
        made = [dist.new_group(list(part), timeout=timedelta(seconds=GROUP_TIMEOUT)) for part in key]
        rank = dist.get_rank()
        _groups[key] = next((group for group, part in zip(made, key, strict=True) if rank in part), None)
    return _groups[key]
