"""Ranks that are late, gone, or raise in the middle of an exchange: the others are told whom they waited for."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cphandler import CPConfig, Full, RankLostError, get_cp_handler_cls, register_kernel
from cphandler.comm import collectives, transfers
from cphandler.comm.endings import ended_on_error
from cphandler.comm.groups import two_levels
from cphandler.comm.membership import limited_name, members, sub_group_name
from cphandler.kernels.reference import ReferenceKernel
from cphandler.testing import RankPool, partition_group

LIMIT = 1.5
"""Seconds: long beside what a busy machine needs to schedule four processes."""

SOON = 20.0
"""Seconds: short beside the minute that a group of these tests waits by itself."""


def new_group() -> dist.ProcessGroup:
    """A group that a test may lose."""
    group = dist.new_group(list(range(dist.get_world_size())), timeout=timedelta(seconds=60))
    assert isinstance(group, dist.ProcessGroup)
    return group


class Told:
    """What a call raised, and after how many seconds."""

    def __init__(self, call: Callable[[], Any]) -> None:
        started = time.monotonic()
        self.kind, self.message = "", ""
        self.ranks: list[int] = []
        self.late = False
        try:
            call()
        except Exception as error:
            self.kind, self.message = type(error).__name__, str(error)
            if isinstance(error, RankLostError):
                self.ranks, self.late = error.ranks, error.late
        self.seconds = time.monotonic() - started


def late_where(late: bool, call: Callable[[], Any]) -> Told:
    """A call that some ranks make only when the others are through with theirs."""
    if late:
        dist.barrier()
    told = Told(call)
    if not late:
        dist.barrier()
    return told


def two_are_late() -> Told:
    name = limited_name(str(new_group().group_name), LIMIT)
    return late_where(dist.get_rank() in (1, 2), lambda: collectives.agree(b"payload", name))


def test_several_late_ranks_count_once_and_only_they_are_named(ranks: RankPool) -> None:
    answers = ranks.run(two_are_late)
    for rank in (0, 3):
        told = answers[rank]
        assert told.kind == "RankMismatchError"
        assert (
            f"rank 1, 2 of the context-parallel group did not reach the consistency check of rank {rank}"
            in told.message
        )
        assert "got nothing within 1.5 seconds" in told.message
        assert "make the process group again" in told.message
        assert LIMIT * 0.9 < told.seconds < LIMIT * 1.9
    for rank in (1, 2):  # the others have given up
        told = answers[rank]
        assert told.kind == "RankMismatchError"
        assert told.message.startswith("rank 0")
        assert "a closed connection" in told.message


def a_part_agrees() -> tuple[list[bytes], Told]:
    """Two parts of a group ask each other only; then one of one part is late."""
    rank, group = dist.get_rank(), new_group()
    part = limited_name(sub_group_name(str(group.group_name), range(rank % 2, 4, 2)), LIMIT)
    answers = collectives.agree(bytes([10 + rank]), part)
    return answers, late_where(rank == 3, lambda: collectives.agree(bytes([10 + rank]), part))


def test_a_part_of_a_group_agrees(ranks: RankPool) -> None:
    answers = ranks.run(a_part_agrees)
    assert [rows for rows, _ in answers] == [[bytes([10]), bytes([12])], [bytes([11]), bytes([13])]] * 2
    assert [told.kind for _, told in answers] == ["", "RankMismatchError", "", "RankMismatchError"]
    assert "rank 3 of the context-parallel group did not reach the consistency check of rank 1" in answers[1][1].message


def life(rank: int, folder: str) -> None:
    """A rank that ends, or one that finds that out."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    name = str(dist.group.WORLD.group_name)
    collectives.agree(b"payload", name)
    if rank == 1:
        os._exit(3)
    while not Path(folder, "ended").exists():
        time.sleep(0.01)
    told = Told(lambda: collectives.agree(b"payload", name))
    Path(folder, f"told-{rank}").write_text(f"{told.kind}: {told.message}")


def test_a_rank_that_has_ended(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(dist.get_rank)  # processes then start in milliseconds, as copies of one that has loaded torch
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=life, args=(rank, str(tmp_path)), daemon=True) for rank in range(3)]
    for process in processes:
        process.start()
    processes[1].join(timeout=60)
    (tmp_path / "ended").touch()
    for process in processes:
        process.join(timeout=60)
    for rank, named in ((0, "1|1, 2"), (2, "1|0, 1")):  # the one that finds out first ends as well, and may be seen to
        message = (tmp_path / f"told-{rank}").read_text()
        start = rf"RankMismatchError: rank ({named}) of the context-parallel group did not reach"
        assert re.match(start, message), message
        assert "a closed connection: it ended, raised, or has itself given up waiting" in message


def a_step(rank: int, folder: str, fate: str) -> None:
    """A step, then one of two layers in which rank 1 meets its fate: between the layers, or before."""
    with Path(folder, f"printed-{rank}").open("w") as errors:
        os.dup2(errors.fileno(), sys.stderr.fileno())
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    group = dist.group.WORLD
    q, k, v = (torch.randn(16, 2, 8, requires_grad=True) for _ in range(3))
    handler = get_cp_handler_cls("ring")(cp_group=group, qkv_format="thd", cu_seqlens_q=[0, 10, 48])
    handler.core_attn(None, q, k, v).sum().backward()  # what torch loads at the first call takes seconds
    dist.barrier()
    if rank == 1:
        Path(folder, "begun").write_text(str(time.monotonic()))
    first = 20 if rank == 1 and fate == "has another batch" else 10
    handler = get_cp_handler_cls("ring")(cp_group=group, qkv_format="thd", cu_seqlens_q=[0, first, 48])
    hidden = handler.core_attn(None, q, k, v)
    if rank == 1 and fate == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and fate == "raises":
        raise ArithmeticError("the model failed")
    handler.core_attn(None, hidden, k, v).sum().backward()


OTHERS = {
    "is killed": "RankLostError: rank {rank} of the context-parallel group waited for rank",
    "raises": "RankLostError: rank {rank} of the context-parallel group waited for rank",
    "has another batch": "RankMismatchError: the ranks of the context-parallel group do not hold the same batch",
}
"""What every rank but rank 1 prints, by what happens to that one."""


@pytest.mark.parametrize("fate", OTHERS)
def test_a_rank_in_the_middle_of_a_step(ranks: RankPool, tmp_path: Path, fate: str) -> None:
    """Every process ends by itself, soon, with what is wrong in the last line that it prints."""
    ranks.run(dist.get_rank)  # processes then start in milliseconds, as copies of one that has loaded torch
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=a_step, args=(rank, str(tmp_path), fate), daemon=True) for rank in range(3)]
    for process in processes:
        process.start()
    running, ended = {process.sentinel: rank for rank, process in enumerate(processes)}, {}
    while running and (ready := wait(list(running), timeout=60)):
        for sentinel in ready:
            ended[running.pop(sentinel)] = time.monotonic()  # type: ignore[index]
    for process in processes:
        process.kill()
    begun = float((tmp_path / "begun").read_text())
    printed = [(tmp_path / f"printed-{rank}").read_text().strip().splitlines()[-1:] for rank in range(3)]
    for rank in (0, 2):
        print(f"rank 1 {fate}: rank {rank} ends after {ended[rank] - begun:.2f} s: {printed[rank][0]}")
        assert OTHERS[fate].format(rank=rank) in printed[rank][0]
        assert ended[rank] - begun < SOON
        assert processes[rank].exitcode == 1
    assert processes[1].exitcode == (-signal.SIGKILL if fate == "is killed" else 1)
    own = {"is killed": [], "raises": ["ArithmeticError: the model failed"], "has another batch": printed[0]}
    assert [line.rpartition("cphandler.errors.")[2] for line in printed[1]] == [
        line.rpartition("cphandler.errors.")[2] for line in own[fate]
    ]


def operations(name: str, rank: int) -> dict[str, Callable[[], Any]]:
    x, many = torch.zeros(4, 3), torch.zeros(400_000)
    return {
        "all_to_all": lambda: collectives.all_to_all(x, [1] * 4, [1] * 4, name),
        "all_to_all of much": lambda: collectives.all_to_all(many, [100_000] * 4, [100_000] * 4, name),
        "exchange_rows": lambda: collectives.exchange_rows(x, [1] * 4, [1] * 4, name),
        "all_gather": lambda: collectives.all_gather(many, name),
        "reduce_scatter": lambda: collectives.reduce_scatter(x, name),
        "maximum": lambda: collectives.maximum(x, name),
        "ring_shift": lambda: collectives.ring_shift(x, 1, name),
        "post": lambda: transfers.post([(x, (rank + 1) % 4)], [(x.clone(), (rank - 1) % 4)], name).wait(),
    }


def one_is_late_everywhere() -> dict[str, Told]:
    """Rank 2 is late in every operation, each on a group of its own and all at once."""
    rank, told = dist.get_rank(), {}
    kinds = list(operations("", 0))
    groups = {kind: str(new_group().group_name) for kind in kinds}
    for name in groups.values():  # what is loaded at the first call takes seconds
        collectives.all_gather(torch.zeros(1), name)
    names = {kind: limited_name(name, LIMIT) for kind, name in groups.items()}
    if rank == 2:
        dist.barrier()

    def call(kind: str) -> None:
        told[kind] = Told(operations(names[kind], rank)[kind])
        if rank != 2:
            told[f"{kind} again"] = Told(operations(names[kind], rank)[kind])

    threads = [threading.Thread(target=call, args=(kind,)) for kind in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if rank != 2:
        dist.barrier()
    return told


def test_every_operation_names_a_late_rank(ranks: RankPool) -> None:
    answers = ranks.run(one_is_late_everywhere)
    for kind in operations("", 0):
        for rank in (0, 1, 3):
            told = answers[rank][kind]
            if kind in ("ring_shift", "post") and rank == 0:  # has nothing to do with rank 2
                continue
            assert told.kind == "RankLostError", f"{kind} on rank {rank}: {told.message}"
            assert told.ranks == [2], f"{kind} on rank {rank}: {told.message}"
            assert told.late
            assert f"rank {rank} of the context-parallel group waited for rank 2" in told.message
            assert "nothing within 1.5 seconds" in told.message
            assert "make the process group again" in told.message
            assert told.seconds < 2 * LIMIT + 1
            again = answers[rank][f"{kind} again"]
            assert again.kind == "RankLostError", "a lost group does not come back"
            assert again.seconds < LIMIT, "and does not wait again"
        assert answers[2][kind].kind == "RankLostError", f"{kind}: the others have given up"
        assert not answers[2][kind].late


class Faulty(ReferenceKernel):
    """Raises or rests on rank 1, in one call of one pass; later blocks are waited for by others."""

    known = False
    fault = ""
    countdown = 0

    def forward(self, *args: Any) -> None:
        self.fail("forward")
        super().forward(*args)

    def backward(self, *args: Any) -> None:
        self.fail("backward")
        super().backward(*args)

    def fail(self, where: str) -> None:
        if not self.fault.startswith(where) or dist.get_rank() != 1:
            return
        Faulty.countdown -= 1
        if Faulty.countdown == 0 and self.fault.endswith("rests"):
            dist.barrier()
        elif Faulty.countdown == 0:
            raise ArithmeticError("the kernel failed")


def fails_over_a_block(comm_type: str, fault: str, timeout: float | None, width: int) -> tuple[Told, Told, bool]:
    """What a step raises, what the next call does, and whether memory allocated since is left alone."""
    if not Faulty.known:
        register_kernel("faulty", "any", Faulty, preference=-1)  # "auto" never takes it
        Faulty.known = True
    Faulty.fault, Faulty.countdown = fault, 1 if comm_type in ("all_gather", "ulysses") else 2
    handler = get_cp_handler_cls(comm_type)(
        cp_group=new_group(),
        qkv_format="thd",
        cu_seqlens_q=[0, 64],
        mask=Full(),
        config=CPConfig(kernel="faulty", timeout=timeout),
    )
    q, k, v = (torch.randn(16, 2, d, requires_grad=True) for d in (8, 8, width))
    handler.agree("a step")
    step = Told(lambda: handler.core_attn(None, q, k, v).sum().backward())
    if fault.endswith("rests") and dist.get_rank() != 1:
        dist.barrier()
    fresh = [torch.full((n, 2, width), 7.0) for n in (1, 2, 4, 8, 16, 16)]
    time.sleep(0.2)
    after = Told(lambda: handler.combine(torch.zeros(16), 0))
    return step, after, all(bool((x == 7.0).all()) for x in fresh)


FAULTS = [
    ("ring", "forward raises", 20.0, 8),
    ("ring", "backward raises", None, 8),
    ("p2p", "forward raises", None, 8),
    ("p2p", "backward raises", 20.0, 8),
    ("all_gather", "forward raises", None, 8),
    ("all_gather", "backward raises", 20.0, 8),
    ("ulysses", "forward raises", None, 8),  # between its two exchanges, where nothing is under way
    ("ulysses", "backward raises", None, 8),
    ("ring", "forward raises", None, 30_000),  # more than a connection holds: a message is half sent, and gloo alone
    ("p2p", "backward raises", None, 30_000),  # does not tell who waits for the other half
]


@pytest.mark.parametrize(("comm_type", "fault", "timeout", "width"), FAULTS)
def test_a_rank_that_raises_over_a_block(
    ranks: RankPool, comm_type: str, fault: str, timeout: float | None, width: int
) -> None:
    answers = ranks.run(fails_over_a_block, comm_type, fault, timeout, width)
    assert answers[1][0].message == "the kernel failed"
    named = set()
    for rank in (0, 2, 3):
        step, after, _ = answers[rank]
        assert step.kind == "RankLostError", step.message
        assert f"rank {rank} of the context-parallel group waited for" in step.message
        assert "make the process group again" in step.message
        assert step.seconds < SOON, "ended at once, with a limit or without"
        named |= set(step.ranks)
        assert after.kind == "RankLostError"
    assert 1 in named
    assert all(untouched for _, _, untouched in answers)


def raises_for_one_that_does_not_run() -> Told:
    """Rank 1 raises while two messages of rank 0 are on their way to it, and rank 0 gets no time on any core."""
    rank, name, parts = dist.get_rank(), str(new_group().group_name), torch.zeros(2, 8)
    collectives.agree(b"payload", name)
    process = torch.tensor([os.getpid()])
    dist.broadcast(process, 0)
    sent = transfers.post([(part, 1) for part in parts], [], name) if rank == 0 else None
    dist.barrier()

    def over_a_block() -> None:
        with ended_on_error(name):
            transfers.post([], [(part, 0) for part in parts], name)
            raise ArithmeticError("the kernel failed")

    if rank == 1:
        os.kill(int(process), signal.SIGSTOP)
        threading.Timer(1.0, os.kill, (int(process), signal.SIGCONT)).start()
        return Told(over_a_block)
    return Told(lambda: sent.wait() if sent else None)


def test_a_rank_that_raises_tells_one_that_does_not_run(ranks: RankPool) -> None:
    """Gloo sends the first message to a closed connection, and then does not tell who waits for the second."""
    waited, raised, *_ = ranks.run(raises_for_one_that_does_not_run)
    assert raised.message == "the kernel failed"
    assert waited.kind in ("", "RankLostError"), waited.message
    assert waited.seconds < SOON


@pytest.mark.parametrize("fault", ["forward rests", "backward rests"])
def test_a_rank_that_rests_over_a_block(ranks: RankPool, fault: str) -> None:
    answers = ranks.run(fails_over_a_block, "ring", fault, LIMIT, 8)
    for rank in (0, 2, 3):
        step, after, _ = answers[rank]
        assert step.kind == after.kind == "RankLostError", step.message
        assert step.seconds < SOON
    assert answers[2][0].ranks == [1], "who is next to it"
    assert answers[2][0].late
    assert answers[1][0].kind == "RankLostError", "the others have given up"


def without_a_limit(timeout: float | None) -> Told:
    """A rank that writes a long checkpoint, say."""
    handler = get_cp_handler_cls("ring")(
        cp_group=new_group(), qkv_format="thd", cu_seqlens_q=[0, 64], config=CPConfig(timeout=timeout)
    )
    if dist.get_rank() == 2:
        time.sleep(LIMIT)
    return Told(lambda: handler.combine(handler.dispatch(torch.zeros(64), 0), 0))


def test_none_waits_as_long_as_the_group(ranks: RankPool) -> None:
    assert [told.message for told in ranks.run(without_a_limit, None)] == [""] * 4


def limits_of(config: CPConfig) -> list[float | None]:
    """Two handlers of one group keep limits of their own, sub-groups have that of their group."""
    group = partition_group([range(4)])
    settings: dict[str, Any] = {"cp_group": group, "qkv_format": "thd", "cu_seqlens_q": [0, 64]}
    first, second = (get_cp_handler_cls("ring")(config=c, **settings) for c in (config, None))
    levels = two_levels(first.ranks, 2)
    names = [first.ranks.name, levels.inner.name, levels.outer.name, second.ranks.name]
    return [members(name).limit for name in names]


def test_a_limit_belongs_to_a_handler(ranks: RankPool) -> None:
    assert ranks.run(limits_of, CPConfig(timeout=7.5)) == [[7.5, 7.5, 7.5, None]] * 4
