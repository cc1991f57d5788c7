"""Rows of Ulysses that travel run by run: right, with the bits that an index gives, and only where that pays."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from cphandler import CPConfig, clear_plan_cache, get_cp_handler_cls, record_traffic
from cphandler.sharding import order
from cphandler.sharding.order import SequenceOrder
from cphandler.testing import RankPool, partition_group
from cphandler.testing.cases import Batch, Case
from cphandler.testing.laws import check_attention

HOST = torch.device("cpu")

CASES = [
    Case("ulysses", 4, layout="zigzag", batch=Batch((64,))),
    Case("ulysses", 4, layout="zigzag", batch=Batch((64,)), heads=(6, 2)),
    Case("ulysses", 3, layout="zigzag", batch=Batch((24, 6)), heads=(3, 1)),
    Case("ulysses", 4, layout="zigzag", batch=Batch((40,)), heads=(3, 1), sinks=True),
    Case("ulysses", 2, layout="balanced", batch=Batch((11, 30, 7, 16))),
    Case("usp", 4, batch=Batch((64,))),
    Case("usp", 4, batch=Batch((64,)), heads=(2, 1), sinks=True),
    Case("usp", 4, batch=Batch((64,)), heads=(3, 1), qkv_format="sbhd"),
]
"""One or few runs a rank, ranks that share a key head, a rank without heads."""


@pytest.fixture(autouse=True)
def forgetful(ranks: RankPool) -> None:
    """Plans of other limits are not found again."""
    ranks.run(clear_plan_cache)


def short_runs_too() -> mock._patch[int]:
    return mock.patch.object(order, "LONG_RUN", 1)


def held(case: Case) -> None:
    with short_runs_too():
        check_attention(case)
    clear_plan_cache()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_run_by_run(ranks: RankPool, case: Case) -> None:
    ranks.run(held, case)


def passes(backend: str, layout: str | None, tokens: int) -> tuple[int, int, int, list[torch.Tensor]] | None:
    """Messages, bytes, copies by an index, results."""
    group = partition_group([range(4)])
    if group is None:
        return None
    handler = get_cp_handler_cls(backend)(
        cp_group=group, qkv_format="bshd", max_seqlen_q=tokens, layout=layout, config=CPConfig(kernel="torch")
    )
    generator = torch.Generator().manual_seed(dist.get_rank())
    shapes = [(2, handler.num_local_tokens, heads, 8) for heads in (4, 2, 2, 4)]
    q, k, v, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with record_traffic() as traffic, torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        out = handler.core_attn(None, *leaves)
        grads = torch.autograd.grad(out, leaves, grad)
    indexed = sum(event.count for event in seen.key_averages() if event.key == "aten::index_select")
    return traffic.messages, traffic.sent_bytes, indexed, [out.detach(), *grads]


def in_both_ways(backend: str, layout: str | None) -> None:
    by_index = passes(backend, layout, 128)
    clear_plan_cache()
    with short_runs_too():
        by_run = passes(backend, layout, 128)
    clear_plan_cache()
    assert by_index is not None
    assert by_run is not None
    for one, other in zip(by_index[3], by_run[3], strict=True):
        assert torch.equal(one, other)
    assert by_run[1] == by_index[1], "as many bytes"
    assert by_run[0] > by_index[0], "in more messages"
    assert (by_index[2], by_run[2]) == (8, 0), "rows are put in order by an index, or land in order"


@pytest.mark.parametrize(("backend", "layout"), [("ulysses", "zigzag"), ("usp", None)])
def test_the_bits_of_an_index(ranks: RankPool, backend: str, layout: str | None) -> None:
    ranks.run(in_both_ways, backend, layout)


def order_of(tokens: list[int], ranks: int) -> SequenceOrder:
    held = np.array(tokens, dtype=np.int64)
    real = np.flatnonzero(held >= 0)
    places = real[np.argsort(held[real], kind="stable")]
    return SequenceOrder.over(places, held, ranks, HOST)


def test_which_runs() -> None:
    long = order.LONG_RUN
    inside = [*range(long), *range(3 * long, 4 * long), *range(long, 3 * long)]
    found = order_of(inside, 2)
    assert found.runs.tolist() == [[0, 0, long], [long, 3 * long, long], [2 * long, long, 2 * long]]
    assert not found.identity
    assert (found.runs.dtype, found.runs.device) == (torch.int64, HOST)
    assert torch.equal(found.tokens[found.places], torch.arange(4 * long))


@pytest.mark.parametrize(
    ("what", "tokens"),
    [
        ("short runs", [2, 3, 0, 1]),
        ("a pad row", [*range(order.LONG_RUN), -1]),
        ("no rows", []),
        (
            "many runs",
            [start + i for start in (5, 4, 3, 2, 1, 0) for i in range(start * 1000, start * 1000 + order.LONG_RUN)],
        ),
    ],
)
def test_an_index_otherwise(what: str, tokens: list[int]) -> None:
    assert len(order_of(tokens, 1).runs) == 0, what


def test_rows_in_global_order_are_one_run_a_rank_however_short() -> None:
    found = order_of([0, 1, 2, 3], 4)
    assert found.identity
    assert found.runs.tolist() == [[0, 0, 1], [1, 1, 1], [2, 2, 1], [3, 3, 1]]
