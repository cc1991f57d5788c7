"""Kernels of whole packs: shapes tasks are cut into, launches, and every such kernel on doubles of its operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cphandler import (
    BlockCausal,
    Causal,
    Chunked,
    Full,
    Mask,
    PrefixLM,
    SlidingWindow,
    plan_batch,
)
from cphandler.kernels.launches import Launch, launches
from cphandler.kernels.registry import get_kernel
from cphandler.kernels.shapes import cut
from cphandler.kernels.task import Task, Tasks
from cphandler.testing import RankPool
from cphandler.testing.cases import Batch, Case
from cphandler.testing.laws import check_all
from cphandler.tokens.intervals import UNBOUNDED, Table
from tests.doubles.packages import KERNELS, kernels_on_cpu, prefixed
from tests.sweeps import one_in
from tests.test_kernels import check

CPU = torch.device("cpu")
SIZE = 24


def pairs(table: Table, size: int = SIZE) -> np.ndarray:
    """How often each query row meets each key row."""
    counts = np.zeros((size, size), dtype=np.int64)
    for q, nq, k, nk, lo, hi in table.tolist():
        apart = np.arange(nk)[None] - np.arange(nq)[:, None]
        counts[q : q + nq, k : k + nk] += (apart >= lo) & (apart <= hi)
    return counts


@st.composite
def tasks(draw: Any) -> Task:
    """A task of which every row sees a key."""
    nq, nk = draw(st.integers(1, 11)), draw(st.integers(1, 11))
    lo = draw(st.one_of(st.just(-UNBOUNDED), st.integers(-12, nk - nq)))
    hi = draw(st.one_of(st.just(UNBOUNDED), st.integers(max(0, lo), 14)))
    return Task(draw(st.integers(0, 12)), nq, draw(st.integers(0, 12)), nk, lo, hi)


@settings(max_examples=300, deadline=None)
@given(tasks())
def test_a_task_is_cut_into_rectangles_and_squares(task: Task) -> None:
    table = Tasks.of(task).table
    parts = cut(table)
    assert (pairs(parts) == pairs(table)).all()
    for part in (Task(*row) for row in parts.tolist()):
        assert part.is_full or part.nq == part.nk
        assert part.is_full or part.lo <= 0 <= part.hi


def test_parts_of_one_window_have_the_same_bounds() -> None:
    window = (-6, 0)
    table = np.array([[0, 20, 0, 20, *window], [20, 9, 40, 15, 0, 6], [29, 9, 60, 15, 0, 6]])
    bounds = {(lo, hi) for *_, lo, hi in cut(table).tolist()}
    assert bounds == {window, (0, UNBOUNDED)}


def local_step(lengths: list[int], mask: Mask, batch: int = 1) -> list[Launch]:
    """The launches of rank 1 of 4 over its own keys, on zigzag."""
    offsets = np.cumsum([0, *lengths]).tolist()
    plan = plan_batch(offsets, cp_size=4, mask=mask, ranks=[1]).plan(1)
    return launches(cut(plan.tasks[plan.tasks[:, 0] == 1][:, 1:]), batch, CPU, 1024)


@pytest.mark.parametrize(("mask", "windows"), [(Causal(), {(-1, 0)}), (Full(), {(-1, -1)})])
def test_a_local_step_is_one_launch_however_many_documents(mask: Mask, windows: set[tuple[int, int]]) -> None:
    lengths = [16 * (i % 7 + 1) for i in range(200)]
    made = local_step(lengths, mask)
    assert {tuple(launch.window) for launch in made} == windows
    assert len(made) == 1
    (launch,) = made
    assert launch.queries.rows == slice(0, sum(lengths) // 4), "a view of all rows, nothing gathered"
    assert launch.offsets is not None
    assert launch.offsets.queries.diff().tolist() == [length // 4 for length in lengths]
    assert launch.offsets.longest_query == 28


def test_a_batch_repeats_the_offsets() -> None:
    one, three = (local_step([16, 32], Causal(), batch)[0].offsets for batch in (1, 3))
    assert one is not None
    assert three is not None
    assert three.queries.tolist() == [0, 4, 12, 16, 24, 28, 36]
    assert one.queries.tolist() == [0, 4, 12]


def test_rows_that_come_twice_come_in_turns() -> None:
    table = Tasks.of(Task(0, 3, 0, 4, -UNBOUNDED, UNBOUNDED), Task(1, 3, 5, 4, -UNBOUNDED, UNBOUNDED)).table
    (launch,) = launches(cut(table), 1, CPU, 1024)
    assert launch.queries.rows is None
    rows = [index.tolist() for _, index in launch.queries.turns]
    assert rows == [[0, 1, 2, 3], [1, 2]]
    assert launch.queries.places is not None
    for chosen, index in launch.queries.turns:
        assert chosen is not None
        assert torch.equal(launch.queries.places[chosen], index)


def compare(cases: list[Case]) -> None:
    with kernels_on_cpu():
        check_all(cases)


TASKS = (
    Task(0, 100, 0, 130, -UNBOUNDED, 30),
    Task(1, 70, 3, 60, -UNBOUNDED, UNBOUNDED),
    Task(0, 90, 0, 120, -20, 40),
    Task(0, 50, 0, 50, -9, 0),
    Task(2, 60, 1, 40, -40, UNBOUNDED),
)


@pytest.mark.parametrize("with_lse", [True, False])
@pytest.mark.parametrize("name", KERNELS)
def test_one_task(name: str, *, with_lse: bool) -> None:
    with kernels_on_cpu():
        kernel = registry_kernel(name)
        dtypes = [torch.float32] if name == "torch_efficient" else [torch.bfloat16, torch.float16]
        dtypes += [torch.float32] if name == "torch" else []
        for task in TASKS:
            for d, d_v in ((16, 16), (20, 9), (8, 30)):
                for dtype in dtypes:
                    options: dict[str, Any] = {"heads": (4, 2), "dtype": dtype, "d": d, "d_v": d_v}
                    check(kernel, task, task.nq + 3, task.nk + 4, with_lse=with_lse, **options)


def registry_kernel(name: str) -> Any:
    return get_kernel(prefixed(name), "cpu")


MASKS = (Causal(), Full(), SlidingWindow(5), SlidingWindow(4, 3), Chunked(7), PrefixLM((4, 1, 2, 0, 3)), BlockCausal(4))
BACKENDS = ("local", "ring", "p2p", "all_gather", "ulysses", "usp")
DENSE = Batch((24,))
LEFT_PADDED = Batch((11,), real=("xxxxxxxxxxx", "....xxxxxxx", "xx..xxx..xx"))


@pytest.mark.parametrize(("name", "backend"), one_in(6, KERNELS, BACKENDS))
def test_the_laws(ranks: RankPool, name: str, backend: str) -> None:
    dtype = torch.float32 if name == "torch_efficient" else torch.bfloat16
    size = 1 if backend == "local" else 4
    cases = []
    for i, mask in enumerate(MASKS):
        options: dict[str, Any] = {"lse": bool(i % 2), "dtype": dtype, "head_dim": 16, "kernel": prefixed(name)}
        form = ("thd", "bshd", "sbhd")[i % 3]
        masked = mask if form == "thd" or not isinstance(mask, PrefixLM) else Causal()
        batch = Batch() if form == "thd" else (DENSE, LEFT_PADDED)[i % 2]
        softcap = 3.0 if name.startswith("flash_attn") and i % 3 == 0 else None
        cases.append(Case(backend, size, form, None, masked, batch, sinks=i == 2, softcap=softcap, **options))
    ranks.run(compare, cases)
