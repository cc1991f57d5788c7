"""Batches met before: what is found again, what is not, what is freed, and batches planned ahead in another process."""

from __future__ import annotations

import base64
import gc
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from cphandler import (
    Balanced,
    BatchPlan,
    Causal,
    CPConfig,
    Documents,
    Full,
    InvalidTypeError,
    InvalidValueError,
    Layout,
    Mask,
    PerDocument,
    PrefixLM,
    SlidingWindow,
    clear_plan_cache,
    get_cp_handler_cls,
    pack_documents,
    plan_batch,
)
from cphandler.attention import plans as attention_plans
from cphandler.plan import batch_plan, plan
from cphandler.plan.plan import STAGE, Plan
from cphandler.plan.tasks import OWNER
from cphandler.sharding import cache as caches
from cphandler.sharding import shard
from cphandler.sharding.cache import BatchCache
from cphandler.testing import RankPool
from cphandler.testing.cases import Batch, Case, draw, group_of, make_handler
from tests.test_copies import COPIED, compare, expected, run
from tests.test_errors import Seat

LENGTHS = (13, 3, 6, 1, 9)
HOST = torch.device("cpu")


def offsets(lengths: Any) -> list[int]:
    return [0, *accumulate(lengths)]


def handler_of(lengths: Any = LENGTHS, size: int = 3, rank: int = 1, backend: str = "p2p", **given: Any) -> Any:
    return get_cp_handler_cls(backend)(
        cp_group=Seat(size, rank), qkv_format="thd", cu_seqlens_q=offsets(lengths), **given
    )


def used(handler: Any) -> dict[str, Any]:
    """What a step asks of a handler on one rank, without what travels."""
    handler.plan()
    (plans,) = handler.attention._plans.values()
    tokens = torch.arange(handler.documents.num_tokens)
    return {
        "plan": plans.plan(handler.mask),
        "positions": handler.position_ids,
        "valid": handler.valid_mask,
        "fragments": torch.stack([torch.from_numpy(np.array(column)) for column in handler.fragments]),
        "rows": handler.dispatch(tokens, 0, pad_value=-1),
        "order": handler.shards.queries.order(HOST).tokens,
        "route": handler._route("q", (-1,), HOST).kept_sources,
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is made from now on, by name; the cache is empty before and after."""
    clear_plan_cache()
    names: list[str] = []

    def noted(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            names.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    noted(attention_plans, "make_plan")
    noted(batch_plan, "make_plan")
    for module, name in ((caches, "place"), (caches, "stream_bands"), (shard, "visible_bands"), (shard, "device_copy")):
        noted(module, name)
    yield names
    clear_plan_cache()


LAYOUTS: list[Any] = ["zigzag", "Balanced", Balanced({Causal(): 1, SlidingWindow(2): 3}), "contiguous", "mine"]


@pytest.mark.parametrize("backend", ["p2p", "ring", "all_gather", "ulysses", "usp"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_batch_that_comes_again_costs_nothing(made: list[str], backend: str, layout: Any) -> None:
    def mine() -> Any:
        halves = [[(0, 10, 1)], [(10, 20, 1)], [(30, 2, 1)], []]
        return Layout("mine", 32, halves) if layout == "mine" else layout

    first = used(handler_of(size=4, backend=backend, layout=mine(), mask=SlidingWindow(4)))
    assert made.count("place") == made.count("make_plan") == 1
    assert made.count("stream_bands") + made.count("visible_bands") <= 1 + 2 * isinstance(layout, Balanced)
    made.clear()
    again = used(handler_of(size=4, backend=backend, layout=mine(), mask=SlidingWindow(4)))
    assert not made
    same(first, again)
    assert again["plan"] is first["plan"]


def test_what_makes_a_batch_another_one(made: list[str]) -> None:
    """Each of these differs from the first in one thing, and what is found again is nobody else's."""
    padded = (14, 3, 7, 2, 9)
    others: list[dict[str, Any]] = [
        {},
        {"lengths": (13, 3, 6, 2, 8)},
        {"lengths": (13, 3, 6, 1, 4, 5)},
        {"cu_seqlens_q_padded": offsets(padded)},
        {"lengths": (12, 3, 6, 1, 9), "cu_seqlens_q_padded": offsets(LENGTHS)},
        {"size": 4},
        {"rank": 0},
        {"layout": "contiguous"},
        {"layout": "balanced"},
        {"layout": "balanced", "mask": Full()},
        {"layout": "balanced", "config": CPConfig(tile=4)},
        {"layout": Balanced({Full(): 1})},
        {"mask": SlidingWindow(3)},
        {"backend": "ring"},
    ]
    first = [used(handler_of(**given)) for given in others]
    count = len(caches.cache)
    again = [used(handler_of(**given)) for given in others]
    clear_plan_cache()
    anew = []
    for given in others:
        anew.append(used(handler_of(**given)))
        clear_plan_cache()
    for one, other, fresh in zip(first, again, anew, strict=True):
        same(one, fresh)
        same(other, fresh)
    assert count == len(others) - 3, "the last three share a batch with one before"


def test_padded_rows_and_cross_attention(made: list[str]) -> None:
    def dense(real: list[list[int]], **given: Any) -> Any:
        keys = torch.tensor(real, dtype=torch.bool)
        cls = get_cp_handler_cls("p2p")
        return cls(cp_group=Seat(2, 1), max_seqlen_q=6, key_padding_mask=keys, layout="balanced", **given)

    one, other = [[1, 1, 1, 1, 1, 0], [1, 1, 0, 1, 0, 0]], [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]
    results = {}
    for real in (one, other, one, other):
        handler = dense(real)
        handler.plan()
        got = handler.valid_mask, handler.attention._plans.popitem()[1].plan(Causal())
        kept = results.setdefault(str(real), got)
        assert all(map(torch.equal, got, kept))
    assert made.count("place") == made.count("make_plan") == 2
    assert not torch.equal(results[str(one)][0], results[str(other)][0])
    crossed = [dense(one, max_seqlen_kv=6, cross_attention=True, mask="full") for _ in range(2)]
    assert made.count("place") == 3
    assert crossed[0].shards.queries is crossed[1].shards.queries is not crossed[0].shards.keys


class Window(Mask):
    """A caller's own: it can change, and all of them are equal."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Window)

    def __hash__(self) -> int:
        return 1

    def bands(self, queries: Documents, keys: Documents) -> Any:
        return SlidingWindow(self.left).bands(queries, keys)


class Unhashable(Window):
    __hash__ = None  # type: ignore[assignment]


class Subclass(Layout):
    pass


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("layout", ["zigzag", "balanced"])
def test_masks_of_a_callers_own_are_nobody_elses(made: list[str], layout: str, wrapped: bool) -> None:
    def planned(left: int, own: bool) -> Any:
        mask: Mask = Window(left) if own else SlidingWindow(left)
        mask = PerDocument((mask,) * len(LENGTHS)) if wrapped else mask
        handler = handler_of(mask=mask, layout=layout)
        return used(handler) | {
            "layout": torch.tensor([len(handler.layout.spans[0]), *handler.layout.spans[0].ravel()])
        }

    for left in (1, 8, 2, 8):
        same(planned(left, True), planned(left, False))


def test_what_cannot_be_a_key() -> None:
    with pytest.raises(InvalidTypeError, match=r"a mask must be hashable.*got Unhashable; let the class be a frozen"):
        handler_of(mask=Unhashable(1))
    with pytest.raises(InvalidTypeError, match="hashable"):
        handler_of().plan(Unhashable(1))
    count = len(caches.cache)
    handler_of(layout=Subclass("mine", 32, [[(0, 32, 1)], [], []]))
    assert len(caches.cache) == count


def test_what_a_caller_edits_is_his_own() -> None:
    clear_plan_cache()
    before = {name: value.clone() for name, value in used(handler_of()).items()}
    handler = handler_of()
    for value in (handler.position_ids, handler.valid_mask, handler.dispatch(torch.arange(32), 0)):
        value.zero_()
    shared = [handler.shards.queries.tokens, handler.shards.visible_bands(Causal()), *handler.fragments]
    for table in [*shared, *handler.layout.spans, handler.layout.inverse, handler.documents.offsets]:
        with pytest.raises(ValueError, match="read-only"):
            table[...] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            table[:1].setflags(write=True)
    planned = plan_batch(offsets(LENGTHS), 3, ranks="all")
    for travelled in (planned, pickle.loads(pickle.dumps(planned))):
        for table in (travelled.bands, travelled.plan(1).tasks, travelled.plan(1).tasks_of(0), travelled.plan(1).sends):
            with pytest.raises(ValueError, match="read-only"):
                table[...] = 0
    same(before, used(handler_of()))
    clear_plan_cache()
    same(before, used(handler_of()))


def test_eviction_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    small = BatchCache(most_batches=2)
    monkeypatch.setattr(caches, "cache", small)
    first = handler_of((5, 7))
    for lengths in ((4, 4), (5, 7), (6, 6)):  # the second makes the first the one used last
        handler_of(lengths)
    assert len(small) == 2
    assert handler_of((5, 7)).shards.queries is first.shards.queries
    handler_of((4, 4))
    assert handler_of((6, 6)).shards.queries is not first.shards.queries
    assert handler_of((5, 7)).shards.queries is not first.shards.queries
    caches.cache.clear()
    assert len(small) == 0


def test_eviction_by_bytes_frees_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that were made after a batch was kept count too, and go with it once no handler holds them."""
    small = BatchCache(most_bytes=1 << 62)
    monkeypatch.setattr(caches, "cache", small)
    handler = handler_of((300, 400), backend="all_gather", config=CPConfig(kernel="reference"))
    at_first = small.nbytes
    tensors = used(handler)
    (plans,) = handler.attention._plans.values()
    places = plans.places(HOST)
    assert places is not None
    assert small.nbytes >= at_first + tensors["plan"].nbytes + places.nbytes + 700 * 8 * 4
    watched = [weakref.ref(x) for x in (tensors["plan"], tensors["order"], tensors["route"], places)]
    del handler, tensors, plans, places
    gc.collect()
    assert all(x() is not None for x in watched), "kept for the next handler"
    small.most_bytes = small.nbytes + 100
    handler_of((301, 400))
    assert len(small) == 1
    gc.collect()
    assert all(x() is None for x in watched)
    small.most_bytes = 100
    assert used(handler_of((9, 9)))
    assert len(small) == 0, "one that is too large alone is not kept"


@pytest.mark.parametrize("limit", ["bytes", "values"])
def test_a_batch_that_grows_mask_by_mask_is_let_go(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    """One shape with another mask each time is one batch: what is kept with it has a limit while it is used."""
    small = BatchCache(most_bytes=1 << 14) if limit == "bytes" else BatchCache(most_values=40)
    monkeypatch.setattr(caches, "cache", small)
    cls, handlers = get_cp_handler_cls("local"), []
    for i in range(60):
        handler = cls(qkv_format="bshd", max_seqlen_q=300, mask=PrefixLM((i, 2 * i)))
        handlers.append(handler)
        handler.plan()
        kept = list(small._kept.values())
        assert limit == "bytes" or sum(batch.num_values for batch in kept) <= 60
        assert limit == "values" or small.nbytes <= (1 << 14) + 2000, "and one plan more"
    shards = {id(handler.shards.queries) for handler in handlers}
    assert 1 < len(shards) < 30, "let go now and then, not each time"
    handlers[0].plan()


def test_plans_of_masks_that_are_equal_are_prepared_once() -> None:
    handler = handler_of()
    for _ in range(20):
        handler.plan(SlidingWindow(4))
        handler.plan("full")
    assert len(handler.attention._prepared_others) == 2


def test_tables_of_the_loop_go_with_the_batch() -> None:
    clear_plan_cache()
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 40, 200], mask=SlidingWindow(9))
    x = torch.randn(200, 2, 16)
    handler.core_attn(None, x, x, x)
    (plans,) = handler.attention._plans.values()
    packed = plans.plan(handler.mask)
    kept = attention_plans.bytes_kept_with(packed)
    assert caches.cache.nbytes > packed.nbytes + kept
    watched = weakref.ref(packed)
    del handler, plans, packed
    gc.collect()
    assert watched() is not None
    clear_plan_cache()
    gc.collect()
    assert watched() is None


def test_many_documents_and_threads(made: list[str]) -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 10_000).tolist()
    results: list[tuple[Any, Any]] = []
    start = threading.Barrier(4)

    def work(i: int) -> None:
        start.wait()
        for turn in range(3):
            some = (lengths, LENGTHS, LENGTHS[::-1])[(i + turn) % 3]
            handler = handler_of(some, 8, 5)
            results.append((str(some[:2]), used(handler)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 12, "no thread raised"
    for name, got in results:
        other = next(value for key, value in results if key == name)
        same(got, other)
        assert got["plan"] is other["plan"]
    made.clear()
    used(handler_of(lengths, 8, 5))
    assert not made


def test_ranks_and_groups_of_one_process() -> None:
    """Two seats of one size, and two ranks: the plans of one name no rows of the other."""
    clear_plan_cache()
    handlers = [handler_of(rank=rank) for rank in (0, 1, 0, 1, 2)]
    held = [handler.shards.queries.held_tokens.tolist() for handler in handlers]
    assert held[:2] == held[2:4]
    assert sorted([*held[1], *held[2], *held[4]]) == list(range(32))
    assert [handler.cp_rank for handler in handlers] == [0, 1, 0, 1, 2]
    assert len({id(handler.shards.queries) for handler in handlers}) == 3


def test_tasks_and_runs_are_grouped_once() -> None:
    """Also those of a plan whose tables are in no order."""
    generator = np.random.default_rng(0)
    ordered = plan_batch(offsets((70, 33, 2, 19)), 4).plan(2)
    turned = Plan(4, 2, *(generator.permutation(t) for t in (ordered.tasks, ordered.hops)), *(
        ordered.stages, generator.permutation(ordered.sends), generator.permutation(ordered.receives)
    ))  # fmt: skip
    for each in (ordered, turned):
        for owner in range(5):
            assert each.tasks_of(owner).tolist() == each.tasks[each.tasks[:, OWNER] == owner].tolist()
        for stage in range(len(each.stages) + 1):
            for runs, sent in ((each.sends, True), (each.receives, False)):
                assert each.runs(stage, sent=sent).tolist() == runs[runs[:, STAGE] == stage][:, 1:].tolist()


def test_plan_makes_nothing_twice_and_sends_nothing(made: list[str]) -> None:
    layers = get_cp_handler_cls("local", ["p2p", "a2a", "ring", "all_gather", "p2p"])
    handler = layers(cp_group=Seat(2, 0), qkv_format="thd", cu_seqlens_q=offsets(LENGTHS))
    for _ in range(2):
        assert handler.plan() is None
        assert made.count("make_plan") == 4, "one for each algorithm"
    handler.plan("full")
    assert made.count("make_plan") == 8
    handler_of().plan(mask=SlidingWindow(1))
    for backend in ("local", "usp", "a2a"):
        size = {"local": 1}.get(backend, 4)
        get_cp_handler_cls(backend)(cp_group=Seat(size, 0), max_seqlen_q=9).plan("causal")
    with pytest.raises(InvalidValueError, match="PerDocument needs one mask per document"):
        handler.plan(PerDocument((Causal(),)))
    with pytest.raises(InvalidValueError, match="unknown mask"):
        handler.plan("causual")


def planned_first(case: Case) -> None:
    """What plan() makes is what calls need: they make no plan of their own, and are right."""
    group, seed = group_of(case)
    if seed < 0:
        return
    clear_plan_cache()
    handler = make_handler(case, group)
    handler.plan()
    handler.plan("full")
    count, real = [0], attention_plans.make_plan

    def counted(*given: Any, **named: Any) -> Any:
        count[0] += 1
        return real(*given, **named)

    data = draw(case, seed)
    attention_plans.make_plan = counted
    try:
        compare(run(handler, data), expected(handler, case, data), f"{case} after plan()")
        x = handler.dispatch(data.query, handler.seq_dim)
        keys = [handler.dispatch(x, handler.seq_dim, stream="kv") for x in (data.key, data.value)]
        handler.core_attn(None, x, *keys, mask="full", layer_number=1)
    finally:
        attention_plans.make_plan = real
    assert count == [0]
    clear_plan_cache()
    compare(run(handler, data), expected(handler, case, data), f"{case} after the cache was cleared")


@pytest.mark.parametrize("case", COPIED, ids=str)
def test_planned_before_the_first_call(ranks: RankPool, case: Case) -> None:
    ranks.run(planned_first, replace(case, kernel="auto"))


IN_A_WORKER = """
import base64, pickle, sys
from cphandler import SlidingWindow, plan_batch
offsets, size, layout, comm_types = pickle.loads(base64.b64decode(sys.argv[1]))
asked = {"layout": layout, "mask": SlidingWindow(5), "ranks": "all"}
planned = {name: pickle.dumps(plan_batch(offsets, size, cp_comm_type=name, **asked)) for name in comm_types}
sys.stdout.buffer.write(pickle.dumps(planned))
"""

PLANNED = Case("p2p", 3, "thd", batch=Batch((13, 0, 7, 11)), layout="balanced", mask=SlidingWindow(5), heads=(3, 3))


@pytest.fixture(scope="module")
def sent() -> dict[str, bytes]:
    """One batch planned for each way that keys travel, in another process."""
    asked = offsets(PLANNED.batch.lengths), PLANNED.cp_size, PLANNED.layout, ("p2p", "ring", "all_gather")
    told = base64.b64encode(pickle.dumps(asked)).decode()
    done = subprocess.run([sys.executable, "-c", IN_A_WORKER, told], capture_output=True, check=True)
    planned: dict[str, bytes] = pickle.loads(done.stdout)
    return planned


def attended(case: Case, sent: bytes, makes: int) -> None:
    """With a plan of another process and without one, against the definition."""
    group, seed = group_of(case)
    if seed < 0:
        return
    data, count, real = draw(case, seed), [0], attention_plans.make_plan

    def counted(*given: Any, **named: Any) -> Any:
        count[0] += 1
        return real(*given, **named)

    for turn in range(2):
        clear_plan_cache()
        attention_plans.make_plan = counted
        try:
            ahead = make_handler(case, group, layout=pickle.loads(sent))
            results = run(ahead, data)
        finally:
            attention_plans.make_plan = real
        assert count[0] == (turn + 1) * makes
        compare(results, expected(ahead, case, data), f"{case} planned ahead")
        clear_plan_cache()
        plain = make_handler(case, group, layout=ahead.layout)
        assert all(map(torch.equal, run(plain, data), results))


@pytest.mark.parametrize(
    ("backend", "comm_type", "mask", "makes"),
    [
        ("p2p", "p2p", SlidingWindow(5), 0),
        ("ring", "ring", SlidingWindow(5), 0),
        ("ring", "p2p", SlidingWindow(5), 1),
        ("p2p", "p2p", Causal(), 1),
        ("all_gather", "all_gather", SlidingWindow(5), 0),
        ("ulysses", "p2p", SlidingWindow(5), 1),
    ],
)
def test_planned_in_another_process(
    ranks: RankPool, sent: dict[str, bytes], backend: str, comm_type: str, mask: Mask, makes: int
) -> None:
    ranks.run(attended, replace(PLANNED, backend=backend, mask=mask), sent[comm_type], makes)


class Packs(Dataset[Any]):
    """Packs that are planned where they are made."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = pack_documents([torch.arange(n) for n in (index + 5, 9, 3)])
        return batch | {"plan": plan_batch(batch["cu_seqlens"], 3, layout="balanced", ranks=(2,))}

    def __len__(self) -> int:
        return 3


def test_packs_are_planned_by_the_workers_of_a_data_loader(made: list[str]) -> None:
    """By forked ones, while another thread has the cache locked: a worker begins with locks of its own."""
    first = used(handler_of((5, 9, 3), rank=2, layout="balanced"))
    with caches.cache._lock:
        loader = iter(DataLoader(Packs(), batch_size=None, num_workers=1, multiprocessing_context="fork"))
    for index, batch in enumerate(loader):
        clear_plan_cache()
        made.clear()
        plan = batch.pop("plan")
        assert plan.ranks == (2,)
        cls = get_cp_handler_cls("p2p")
        handler = cls(cp_group=Seat(3, 2), qkv_format="thd", cu_seqlens_q=batch["cu_seqlens"], layout=plan)
        got = used(handler)
        assert not {"make_plan", "visible_bands", "stream_bands"} & set(made)
        same(got, used(handler_of((index + 5, 9, 3), rank=2, layout="balanced")))
        if index == 0:
            same(got, first)


def test_a_forked_process_begins_anew() -> None:
    small = BatchCache()
    handler = handler_of()
    batch = small.keep("key", caches.Batch(handler.shards.queries, handler.shards.keys, handler.shards.memo))
    with small._lock:
        small.after_fork()
        assert small.find("key") is None
        assert small.keep("key", batch) is batch


def test_plans_of_some_ranks_travel() -> None:
    planned = plan_batch(offsets(LENGTHS), 4, ranks=(1, 3))
    assert pickle.loads(pickle.dumps(planned)).ranks == planned.ranks == (1, 3)
    assert planned.plan(2) is planned.plan(2)
    assert planned.ranks == (1, 2, 3)
    assert plan_batch(offsets(LENGTHS), 4).ranks == ()
    assert plan_batch(offsets(LENGTHS), 4, ranks="all").ranks == (0, 1, 2, 3)
    for wrong, error in ((("a",), InvalidTypeError), ("some", InvalidTypeError), (3, InvalidTypeError)):
        with pytest.raises(error, match="rank"):
            plan_batch(offsets(LENGTHS), 4, ranks=wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match="no such rank"):
        plan_batch(offsets(LENGTHS), 4, ranks=(4,))


@pytest.mark.parametrize(
    ("differs", "arguments"),
    [
        ("number of ranks.*a plan for 3 ranks, and a group of 2", {"size": 2, "rank": 0}),
        ("documents.*a plan of 5 documents, and 4", {"lengths": (13, 3, 6, 10)}),
        ("documents.*document 1 of 3 tokens, and of 4", {"lengths": (13, 4, 5, 1, 9)}),
        ("padding", {"lengths": (12, 3, 6, 1, 9), "cu_seqlens_q_padded": offsets(LENGTHS)}),
    ],
)
def test_a_plan_of_another_batch_is_refused(differs: str, arguments: dict[str, Any]) -> None:
    planned = plan_batch(offsets(LENGTHS), 3)
    with pytest.raises(InvalidValueError, match=f"another batch, by its {differs}.*; give plan_batch the offsets"):
        handler_of(layout=planned, **arguments)
    assert handler_of(layout=planned).layout == planned.layout


def test_a_plan_is_of_one_packed_stream() -> None:
    planned = plan_batch([0, 8], 2)
    cls, seat = get_cp_handler_cls("p2p"), Seat(2, 0)
    assert cls(cp_group=seat, max_seqlen_q=8, layout=planned).layout == planned.layout, "one document"
    with pytest.raises(InvalidValueError, match=r"rows with padding or masks of their own.*layout=plan\.layout"):
        cls(cp_group=seat, max_seqlen_q=8, key_padding_mask=torch.ones(2, 8, dtype=torch.bool), layout=planned)
    with pytest.raises(InvalidValueError, match="one packed stream, and this batch has cross attention"):
        cls(cp_group=seat, max_seqlen_q=8, max_seqlen_kv=6, mask="full", layout=planned)


def test_a_plan_under_another_mask_gives_its_layout_alone(made: list[str]) -> None:
    planned: BatchPlan = plan_batch(offsets(LENGTHS), 3, layout="balanced", mask=Full(), ranks="all")
    made.clear()
    got = used(handler_of(layout=planned, mask=SlidingWindow(2)))
    assert made.count("make_plan") == 1
    clear_plan_cache()
    same(got, used(handler_of(layout=planned.layout, mask=SlidingWindow(2))))


def test_plans_know_how_large_they_are() -> None:
    made = plan.make_plan(plan_batch([0, 50], 2).bands, *(plan_batch([0, 50], 2).layout,) * 2, 0, needs="stages")
    assert made.nbytes == sum(x.nbytes for x in (made.tasks, made.hops, made.stages, made.sends, made.receives))
