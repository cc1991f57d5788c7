"""What travels: every byte that a rank sends directly, counted again from the dense mask and who holds what."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from cphandler import (
    BlockCausal,
    Causal,
    Chunked,
    CPConfig,
    Documents,
    Full,
    Mask,
    PrefixLM,
    SharedQuestion,
    SlidingWindow,
    record_traffic,
)
from cphandler.comm import transfers
from cphandler.layouts.layout import make_layout
from cphandler.plan.plan import FROM, TO, Plan, make_plan
from cphandler.testing import RankPool, assert_close, dense_gradients, visible_pairs
from cphandler.testing.cases import (
    PARTITIONS,
    Batch,
    Case,
    draw,
    group_of,
    handler_class,
    make_handler,
    offsets,
    visible,
)

PACKS = Path(__file__).parent.parent / "benchmarks" / "data" / "packs"
LENGTHS = (70, 33, 2, 19)
BATCHES = [Batch(LENGTHS), Batch(LENGTHS, padded=(72, 40, 2, 25))]
MASKS: list[Mask] = [
    Causal(),
    Full(),
    SlidingWindow(9, 3),
    PrefixLM(20),
    Chunked(16),
    BlockCausal(8),
    SharedQuestion(((20, 10, 15), (5, 9, 4, 6), (1,), (3, 3, 3))),
]
PADDED = Batch(real=("xxxxxxxxxxxxxxx....", "....xxxxxxxx.......", "xxxxxxxxxxxxxxxxxxx", "xx...xxx....xxxxx.x"))

BLOCKS = 2
"""Received blocks whose memory may be held at once: one arrives, one is computed."""

PARTS = 2
"""Messages of a block: keys and values leave from where they are, and arrive where they are read."""

Rows: TypeAlias = dict[tuple[int, int], int]
"""How many rows go from one rank of a group to another."""


@dataclass
class Trip:
    """What one rank did in a forward or a backward pass.

    Attributes:
        sent: bytes.
        messages: sent, each to one peer.
        posts: sends and receives that started together, in order.
        largest: elements of the largest message received.
        alive: most received messages whose memory was held at once.
    """

    sent: int = 0
    messages: int = 0
    posts: list[tuple[int, int]] = field(default_factory=list)
    largest: int = 0
    alive: int = 0


@dataclass
class Share:
    """One rank's part in a case: its group and place, the tokens it holds, and what it did.

    ``sends`` and ``receives`` are the plan's rows per peer, ``local_rows`` is L.
    """

    place: tuple[int, int]
    queries: list[int]
    keys: list[int]
    local_rows: int
    forward: Trip
    backward: Trip
    sends: dict[int, int] = field(default_factory=dict)
    receives: dict[int, int] = field(default_factory=dict)


@contextmanager
def watched() -> Iterator[Trip]:
    """Count what this rank sends and look at every batch of sends and receives."""
    trip, post = Trip(), transfers.post
    held: set[StorageWeakRef] = set()

    def looked_at(sends: Any, receives: Any, group_name: str) -> transfers.Transfer:
        trip.posts.append((len(sends), len(receives)))
        for tensor, _ in receives:
            trip.largest = max(trip.largest, tensor.numel())
            held.add(StorageWeakRef(tensor.untyped_storage()))
        trip.alive = max(trip.alive, sum(not storage.expired() for storage in held))
        return post(sends, receives, group_name)

    transfers.post = looked_at
    try:
        with record_traffic() as traffic:
            yield trip
    finally:
        transfers.post = post
    trip.sent, trip.messages = traffic.sent_bytes, traffic.messages


def share_of(case: Case) -> Share | None:
    """Attention forward and backward on this rank; None where it sits out."""
    group, seed = group_of(case)
    if seed < 0:
        return None
    handler = make_handler(case, group)
    data = draw(case, seed)
    streams = ("q", "kv", "kv", "q") if case.is_cross else ("q",) * 4
    local = [handler.dispatch(x, handler.seq_dim, stream=s) for x, s in zip(data, streams, strict=False)]
    q, k, v = (x.requires_grad_() for x in local[:3])
    handler.agree("test")
    with watched() as forward:
        out = handler.core_attn(None, q, k, v)
    with watched() as backward:
        out.backward(local[3])
    dist.barrier(group)
    tokens = [torch.arange(n) for n in (handler.layout.num_tokens, handler.kv_layout.num_tokens)]
    queries, keys = (handler.dispatch(x, 0, pad_value=-1, stream=s) for x, s in zip(tokens, streams, strict=False))
    place = next(i for i, part in enumerate(PARTITIONS[case.cp_size]) if dist.get_rank() in part), handler.cp_rank
    share = Share(place, queries.tolist(), keys.tolist(), len(keys), forward, backward)
    if case.backend == "p2p":
        plan = Plan.from_tensor(handler.attention.make_plans(ordered=False).plan(case.mask))
        share.sends, share.receives = planned(plan, TO), planned(plan, FROM)
    return share


def planned(plan: Plan, column: int) -> dict[int, int]:
    """Rows that the plan sends to each peer, or receives from it."""
    peers = [(stage, peer) for stage, peer in enumerate(plan.stages[:, column].tolist()) if peer >= 0]
    assert len({peer for _, peer in peers}) == len(peers), "a peer is met once"
    return {peer: int(plan.runs(stage, sent=column == TO)[:, 1].sum()) for stage, peer in peers}


def groups(ranks: RankPool, case: Case) -> list[list[Share]]:
    """The shares of each group that runs the case, in rank order."""
    shares = [share for share in ranks.run(share_of, case) if share is not None]
    return [
        sorted((share for share in shares if share.place[0] == number), key=lambda share: share.place)
        for number in range(len(PARTITIONS[case.cp_size]))
    ]


def seen_rows(case: Case, group: list[Share], together: int = 1) -> Rows:
    """Rows of one set of ranks that any query of another sees, from the dense mask; ``together`` ranks form a set."""
    seen = visible(case)
    seen = seen if seen.dim() == 3 else seen.unsqueeze(0)
    sets = [group[first : first + together] for first in range(0, len(group), together)]
    queries = [[t for share in ranks for t in share.queries if t >= 0] for ranks in sets]
    keys = [[t for share in ranks for t in share.keys if t >= 0] for ranks in sets]
    return {
        (owner, other): int(seen[:, queries[other]][:, :, keys[owner]].any(1).sum())
        for owner in range(len(sets))
        for other in range(len(sets))
        if owner != other
    }


def row_width(case: Case, key_heads: int | None = None) -> int:
    """Numbers in one row of keys and values together."""
    copies = 1 if case.qkv_format == "thd" or case.batch.real is not None else case.batch.rows
    return copies * (key_heads or case.heads[1]) * (case.head_dim + (case.value_dim or case.head_dim))


def sizes_of(case: Case) -> tuple[int, int]:
    """Bytes of one number of a row, and of a gradient under way."""
    wire = dict(case.config).get("gradient_wire_dtype")
    return case.dtype.itemsize, getattr(torch, wire).itemsize if wire else max(4, case.dtype.itemsize)


def check_direct(case: Case, group: list[Share]) -> None:
    """The bytes, messages and blocks of a p2p case, and the plan's own count."""
    rows, width, (size, grad_size) = seen_rows(case, group), row_width(case), sizes_of(case)
    for rank, share in enumerate(group):
        there = {other: rows[rank, other] for other in range(len(group)) if other != rank and rows[rank, other]}
        here = {owner: rows[owner, rank] for owner in range(len(group)) if owner != rank and rows[owner, rank]}
        assert share.sends == there, f"the plan's sends of rank {rank}: {case}"
        assert share.receives == here, f"the plan's receives of rank {rank}: {case}"
        out, home = sum(there.values()) * width, sum(here.values()) * width
        assert share.forward.sent == out * size, f"forward bytes of rank {rank}: {case}"
        assert share.backward.sent == out * size + home * grad_size, f"backward bytes of rank {rank}: {case}"
        assert share.forward.messages == PARTS * len(there), f"one block to each rank that needs some: {case}"
        back = PARTS * (len(there) + len(here))
        assert share.backward.messages == back, f"gradients come back the way rows went: {case}"
        copies = len(case.batch.real) if case.batch.real and case.qkv_format != "thd" else 1
        for trip, blocks in ((share.forward, BLOCKS), (share.backward, BLOCKS + 1)):  # gradients arrive as well
            assert all(max(post) <= PARTS for post in trip.posts), f"one block each way in a stage: {case}"
            assert trip.largest <= copies * share.local_rows * width, f"a block holds at most L rows: {case}"
            assert trip.alive <= PARTS * blocks, f"blocks held at once, whatever the number of ranks: {case}"


def check_below_ring(case: Case, direct: list[Share], ring: list[Share]) -> None:
    forward, ring_forward = (sum(share.forward.sent for share in group) for group in (direct, ring))
    both, ring_both = (sum(share.forward.sent + share.backward.sent for share in group) for group in (direct, ring))
    assert forward <= ring_forward, f"forward, more than round the ring: {case}"
    assert both <= ring_both, f"forward and backward, more than round the ring: {case}"


def check(ranks: RankPool, case: Case) -> None:
    """Hold a p2p case to its counts in every group that runs it, and to a ring's."""
    rings = groups(ranks, replace(case, backend="ring", config=()))
    for direct, ring in zip(groups(ranks, case), rings, strict=True):
        check_direct(case, direct)
        if not case.config:
            check_below_ring(case, direct, ring)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "striped"])
@pytest.mark.parametrize("cp_size", [2, 3, 4])
def test_each_row_that_is_seen_travels_once(ranks: RankPool, cp_size: int, layout: str) -> None:
    for mask in MASKS:
        for batch in BATCHES:
            check(ranks, Case("p2p", cp_size, layout=layout, mask=mask, batch=batch, dtype=torch.float32))


@pytest.mark.parametrize("qkv_format", ["sbhd", "bshd"])
@pytest.mark.parametrize("cp_size", [2, 3, 4])
def test_rows_of_a_dense_batch_travel_together(ranks: RankPool, cp_size: int, qkv_format: str) -> None:
    """Padding is not sent, row of the batch by row; without padding all rows of the batch need the same tokens."""
    for mask in (Causal(), SlidingWindow(2, 1), Full()):
        for layout in ("zigzag", "contiguous", "striped"):
            for batch in (PADDED, Batch((19,), rows=3)):
                check(ranks, Case("p2p", cp_size, qkv_format, layout, mask, batch, dtype=torch.float32))


@pytest.mark.parametrize("cp_size", [2, 4])
def test_only_keys_travel_in_cross_attention(ranks: RankPool, cp_size: int) -> None:
    batch = Batch((30, 0, 7, 18), keys=(11, 4, 0, 40))
    for mask in (Full(), Causal("top_left"), SlidingWindow(3, 2, "bottom_right")):
        for layout in ("zigzag", "contiguous"):
            check(ranks, Case("p2p", cp_size, layout=layout, mask=mask, batch=batch, dtype=torch.float32))


@pytest.mark.parametrize("corpus", ["pile", "prolong64k", "prolong512k"])
def test_the_plan_of_honest_lengths(corpus: str) -> None:
    """The rows that a pack's plan sends and receives, counted from the dense mask of each document."""
    packs = json.loads((PACKS / f"{corpus}.json").read_text())
    for cp_size, mask in ((2, Causal()), (2, SlidingWindow(512)), (4, Causal())):
        documents = Documents.from_cu_seqlens(offsets(packs[str(cp_size)][0]))
        layout = make_layout("zigzag", documents.offsets, cp_size)
        holder = torch.from_numpy(layout.inverse // layout.num_local_tokens)
        rows = torch.zeros(cp_size, cp_size, dtype=torch.int64)
        for held in holder.split(documents.lengths.tolist()):
            seen = visible_pairs(mask, Documents.dense(len(held)))
            for rank in range(cp_size):
                rows[rank] += torch.bincount(held[seen[held == rank].any(0)], minlength=cp_size)
        bands = mask.bands(documents, documents)
        for rank in range(cp_size):
            plan = make_plan(bands, layout, layout, rank, needs="stages")
            there, here = (
                {peer: int(n) for peer, n in enumerate(part) if peer != rank} for part in (rows[:, rank], rows[rank])
            )
            assert planned(plan, TO) == there
            assert planned(plan, FROM) == here
            assert len(plan.stages) == cp_size - 1


@pytest.mark.parametrize("wire", [None, "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradients_travel_in_the_dtype_of_the_wire(ranks: RankPool, dtype: torch.dtype, wire: str | None) -> None:
    """Without one, in the accumulator's: 16-bit keys have gradients of 32 bits."""
    config = (("gradient_wire_dtype", wire),) if wire else ()
    for layout in ("zigzag", "contiguous"):
        check(ranks, Case("p2p", 4, layout=layout, batch=BATCHES[0], dtype=dtype, value_dim=24, config=config))


def test_documents_that_live_on_one_rank_cost_nothing(ranks: RankPool) -> None:
    for mask in (Causal(), Full(), PrefixLM(3)):
        whole = Case("p2p", 4, layout="contiguous", mask=mask, batch=Batch((16, 10, 6, 16, 8, 8)))
        for share in groups(ranks, whole)[0]:
            assert share.forward == share.backward == Trip()
        one_is_cut = replace(whole, batch=Batch((16, 10, 10, 12, 8, 8)))
        sent = [share.forward.sent for share in groups(ranks, one_is_cut)[0]]
        assert [bytes_ > 0 for bytes_ in sent] == [False, True, isinstance(mask, Full), False]


@pytest.mark.parametrize(("heads", "config"), [((4, 4), ()), ((4, 2), ()), ((8, 2), (("ulysses_degree", 4),))])
def test_heads_inside_and_rows_outside(
    ranks: RankPool, heads: tuple[int, int], config: tuple[tuple[str, Any], ...]
) -> None:
    """Ulysses x p2p: L rows of the neighbours' heads inside, the unions' rows of this rank's key heads outside."""
    inner = dict(config).get("ulysses_degree", 2)
    for mask in (Causal(), SlidingWindow(9, 3), Full()):
        for layout in ("zigzag", "contiguous"):
            for wire in ((), (("gradient_wire_dtype", "bfloat16"),)):
                case = Case("usp", 4, "thd", layout, mask, BATCHES[1], heads, dtype=torch.float32, config=config + wire)
                (group,) = groups(ranks, case)
                check_two_levels(case, group, inner)


def check_two_levels(case: Case, group: list[Share], inner: int) -> None:
    rows, (size, grad_size) = seen_rows(case, group, inner), sizes_of(case)
    queries = case.heads[0] // inner
    keys = max(1, case.heads[1] // inner)  # a key head that several ranks use travels to each of them
    moved = (inner - 1) * group[0].local_rows * case.head_dim * (2 * queries + 2 * keys)
    for rank, share in enumerate(group):
        outer = rank // inner
        there, here = (
            sum(count for pair, count in rows.items() if pair[side] == outer) * row_width(case, keys) for side in (0, 1)
        )
        assert share.forward.sent == (moved + there) * size, f"forward bytes of rank {rank}: {case}"
        assert share.backward.sent == (moved + there) * size + here * grad_size, f"backward of rank {rank}: {case}"


def test_gathered_gradients_travel_in_the_dtype_of_the_wire(ranks: RankPool) -> None:
    for wire in (None, "bfloat16"):
        config = (("gradient_wire_dtype", wire),) if wire else ()
        case = Case("all_gather", 4, batch=BATCHES[0], dtype=torch.float32, config=config)
        for share in groups(ranks, case)[0]:
            block = 3 * share.local_rows * row_width(case)
            assert share.forward.sent == block * 4
            assert share.backward.sent == block * (4 + (2 if wire else 4))


def results(case: Case) -> list[Tensor]:
    """Global output and gradients."""
    group, seed = group_of(case)
    handler = make_handler(case, group)
    q, k, v, grad = draw(case, seed)[:4]
    local = [handler.dispatch(x, 0).requires_grad_() for x in (q, k, v)]
    out = handler.core_attn(None, *local)
    grads = torch.autograd.grad(out, local, handler.dispatch(grad, 0))
    expected = dense_gradients((q, k, v), visible(case), grad, qkv_format=case.qkv_format)
    whole = [handler.combine(x, 0).detach() for x in (out, *grads)]
    for name, a, e in zip(("out", "dq", "dk", "dv"), whole, (expected[0], *expected[2]), strict=True):
        assert_close(a, e, dtype=torch.bfloat16 if case.config else case.dtype, what=f"{name} of {case}")
    return whole


@pytest.mark.parametrize("backend", ["p2p", "all_gather", "usp"])
def test_a_narrow_wire_rounds_gradients_of_keys_and_nothing_else(ranks: RankPool, backend: str) -> None:
    wide = Case(backend, 4, batch=BATCHES[0], dtype=torch.float32)
    narrow = replace(wide, config=(("gradient_wire_dtype", "bfloat16"),))
    out, dq, dk, dv = ranks.run(results, wide)[0]
    narrow_out, narrow_dq, narrow_dk, narrow_dv = ranks.run(results, narrow)[0]
    assert torch.equal(out, narrow_out)
    assert torch.equal(dq, narrow_dq)
    assert not torch.equal(dk, narrow_dk)
    assert not torch.equal(dv, narrow_dv)


def on_a_wire_as_wide_as_sums(backend: str) -> None:
    """The accumulator's own dtype by name changes no bit."""
    case = Case(backend, 4, batch=BATCHES[0], dtype=torch.float32)
    named = replace(case, config=(("gradient_wire_dtype", "float32"),))
    for a, b in zip(results(case), results(named), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["p2p", "usp"])
def test_the_accumulators_dtype_by_name(ranks: RankPool, backend: str) -> None:
    ranks.run(on_a_wire_as_wide_as_sums, backend)


@pytest.mark.parametrize("backend", ["ring", "ulysses", "local", "local/a2a+ring"])
def test_sums_that_travel_further_take_no_narrow_wire(backend: str) -> None:
    with pytest.raises(NotImplementedError, match=r"gradient_wire_dtype.*p2p or all_gather"):
        handler_class(backend)(qkv_format="thd", cu_seqlens_q=[0, 4], config=CPConfig(gradient_wire_dtype="bfloat16"))
