"""The benchmark over real links: what it refuses, what it takes down, and that its messages travel where it says."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import typer
from rich.console import Console

from benchmarks import links, network
from benchmarks.links import LinkError, Links
from benchmarks.waits import record_waits
from cphandler.demo.model import GPTConfig
from cphandler.demo.training import RunSettings
from cphandler.testing import RankError, RankPool

ROOT = Path(__file__).parent.parent
HOLD = """
import sys, time
from benchmarks.links import Links, ended_in_order
with ended_in_order(), Links(3):
    print("up", flush=True)
    time.sleep(60)
"""


def left_of(process: int) -> list[str]:
    """Namespaces of a process that are still there."""
    return [path.name for path in Path("/run/netns").glob(f"cphandler-{process}-*")]


@pytest.fixture
def two() -> Iterator[Links]:
    """Two ranks' links, where this machine can make any; nothing of them is left."""
    with ExitStack() as stack:
        try:
            links.require()
            made = stack.enter_context(Links(2))
        except LinkError as error:
            assert not left_of(os.getpid())
            pytest.skip(str(error))
        yield made
    assert not left_of(os.getpid())


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("shutil.which", lambda tool: None, "no ip and no tc on the PATH; install iproute2"),
        ("os.geteuid", lambda: 1000, "only root can make network namespaces; got user 1000; run it as root"),
    ],
)
def test_where_there_can_be_no_links(
    attribute: str, value: object, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(network, "ALLOCATOR", {})
    monkeypatch.setattr("shutil.which", lambda tool: tool)
    monkeypatch.setattr(attribute, value)
    with pytest.raises(typer.Exit) as left:
        network.main(run=["ring"])
    assert left.value.exit_code == network.CANNOT == 2
    assert message in capsys.readouterr().err


def test_a_command_that_the_system_refuses(two: Links) -> None:
    with pytest.raises(LinkError, match=r"the system refuses: tc -n cphandler-.* rate 1furlong"):
        two.limit("1furlong")


def blocked(seconds: float) -> tuple[float, float, int]:
    """Seconds that a rank waits for one that comes later, and in a sum of gradients; bytes on its wire."""
    mine, theirs = torch.zeros(1 << 20), torch.zeros(1 << 20)
    before, rank = links.wire_bytes(), dist.get_rank()
    with record_waits() as waits:
        if rank == 1:
            time.sleep(seconds)
        work = dist.irecv(theirs, group=links.group(), group_src=1 - rank)
        other = dist.isend(mine, group=links.group(), group_dst=1 - rank)
        assert work is not None
        assert other is not None
        work.wait()
        other.wait()
        exposed = waits.exposed
        dist.all_reduce(mine, group=links.group())
    assert waits.exposed == exposed, "the sum of gradients is counted apart"
    dist.barrier()
    return waits.exposed, waits.summing, links.wire_bytes() - before


def test_messages_take_the_link_at_its_rate_and_a_crash_leaves_nothing(two: Links) -> None:
    with RankPool(2, timeout=60) as pool:
        pool.run(links.join, two.namespaces)
        two.limit("200mbit")
        (early, summing, on_wire), (_, _, other) = pool.run(blocked, 1.0)
        assert early > 1.0
        assert summing > 0.0
        assert min(on_wire, other) > 8 << 20, "four million bytes of a message, and at least as many of a sum"
        assert pool.run(links.bits_per_second, 1 << 22)[0] < 240e6
        with pytest.raises(RankError, match="died with exit code 3"):
            pool.run(os._exit, 3)


@pytest.mark.slow
def test_a_step_over_links(two: Links) -> None:
    base = RunSettings(model=GPTConfig(layers=1, width=32, heads=4, kv_heads=2, hidden=40))
    runs = [network.run_named(name, 2, base) for name in ("ring", "ulysses")]
    said = io.StringIO()
    task = network.Task(["dense"], ["unlimited", "100mbit"], base, runs, 256, 1)
    alone, rows = network.on_links(Console(file=said, width=network.WIDTH), task)
    assert alone["dense"] > 0
    assert [(row.rate, row.run) for row in rows] == [
        (rate, run) for rate in ("unlimited", "100mbit") for run in ("ring@zigzag", "ulysses@contiguous")
    ]
    for row in rows:
        assert 0 < row.exposed_seconds + row.summing_seconds < row.step_seconds
        assert 0 < row.sent_bytes < row.wire_bytes
    assert max(map(len, said.getvalue().splitlines())) <= 110


@pytest.mark.slow
def test_an_interrupt_leaves_nothing(two: Links) -> None:
    """Three links on a bridge, and a second signal while they are taken down."""
    numbers, command = (signal.SIGINT, signal.SIGTERM), [sys.executable, "-c", HOLD]
    with ExitStack() as stack:
        started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in numbers]
        for process in started:
            stack.enter_context(process)
            stack.callback(process.kill)
        for number, process in zip(numbers, started, strict=True):
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            assert len(left_of(process.pid)) == 4
            process.send_signal(number)
            time.sleep(0.01)
            process.send_signal(number)
            process.wait(timeout=60)
            assert process.returncode != 0
            assert not left_of(process.pid)


def test_every_backend_on_every_layout() -> None:
    two, four = network.every_run(2), network.every_run(4)
    assert {"ring@zigzag", "ring@striped", "p2p@balanced", "all_gather@contiguous", "ulysses@zigzag"} <= set(two)
    assert set(four) - set(two) == {"usp@zigzag", "usp@contiguous", "usp@balanced"}
