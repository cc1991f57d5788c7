"""Batches made in a loader's workers, and what ranks do with them."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from cphandler import (
    BatchPlan,
    Causal,
    ContextParallelSampler,
    CPError,
    Full,
    PackingCollator,
    PrefixLM,
    check_same_batch,
    get_batch_on_this_cp_rank,
    get_cp_handler_cls,
    pack_documents,
    plan_batch,
    unpack_documents,
)
from cphandler.data.manifest import checksum_of
from cphandler.testing import RankPool, assert_close, dense_attention, partition_group, visible_pairs

LENGTHS = [9, 1, 14, 4, 0, 7, 3, 20, 5, 2, 11]


def document(index: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(index)
    n = LENGTHS[index]
    return {
        "tokens": torch.randint(0, 50, (n,), generator=generator),
        "q": torch.randn(n, 2, 8, generator=generator, dtype=torch.float64),
        "k": torch.randn(n, 2, 8, generator=generator, dtype=torch.float64),
        "v": torch.randn(n, 2, 8, generator=generator, dtype=torch.float64),
    }


DATA = [document(i) for i in range(len(LENGTHS))]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    assert one.keys() == other.keys()
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) else a.layout == b.layout if isinstance(a, BatchPlan) else a == b
        for a, b in zip(one.values(), other.values(), strict=True)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_pack_and_plan(workers: int) -> None:
    collator = PackingCollator(3, pad_to_multiple_of=6, layout="balanced", mask="full", ranks=(1,))
    sampler = ContextParallelSampler(DATA, batch_size=4, seed=2)
    context = "fork" if workers else None
    loader = DataLoader(
        DATA,  # type: ignore[arg-type]
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=workers,
        multiprocessing_context=context,
    )
    batches = list(loader)
    assert len(batches) == 3
    for batch, indices in zip(batches, sampler, strict=True):
        wanted = pack_documents([DATA[i] for i in indices], pad_to_multiple_of=6)
        plan = plan_batch(
            wanted["cu_seqlens"], 3, layout="balanced", mask="full", cu_seqlens_padded=wanted["cu_seqlens_padded"]
        )
        assert same(batch, {**wanted, "plan": plan})
        assert batch["plan"].ranks == (1,)
        assert batch["plan"].mask == Full()


@pytest.mark.slow
def test_spawned_workers_too() -> None:
    collator = PackingCollator(2)
    loader = DataLoader(DATA, 4, collate_fn=collator, num_workers=1, multiprocessing_context="spawn")  # type: ignore[arg-type]
    assert all(same(a, b) for a, b in zip(loader, DataLoader(DATA, 4, collate_fn=collator), strict=True))  # type: ignore[arg-type]


def test_it_travels() -> None:
    collator = PackingCollator(2, token_budget=64, multiple_of=4, pad_token=7, mask=Causal(), layout="contiguous")
    assert same(pickle.loads(pickle.dumps(collator))(DATA[:3]), collator(DATA[:3]))


def prefixes(batch: Any) -> PrefixLM:
    """Half of each document is seen by all of it; nothing of the padding at the end."""
    return PrefixLM(tuple((batch["cu_seqlens"].diff() // 2).tolist()))


def test_a_mask_of_each_batch() -> None:
    collator = PackingCollator(2, token_budget=40, mask=prefixes)
    for documents in (DATA[:3], DATA[3:5]):
        plan = pickle.loads(pickle.dumps(collator))(documents)["plan"]
        wanted = PrefixLM((*(len(document["tokens"]) // 2 for document in documents), 0))
        assert plan.mask == wanted
        again = plan_batch(plan.documents.valid_offsets, 2, cu_seqlens_padded=plan.documents.offsets, mask=wanted)
        assert (plan.bands == again.bands).all()
    with pytest.raises(CPError, match="mask"):
        PackingCollator(2, mask=len)(DATA[:2])  # type: ignore[arg-type]


@pytest.mark.parametrize(("options", "tokens"), [({}, 1), ({"pad_to_multiple_of": 8}, 8), ({"token_budget": 12}, 12)])
def test_no_documents_are_padding(options: dict[str, int], tokens: int) -> None:
    for documents in ([], [DATA[4]]):
        batch = PackingCollator(4, pad_token=3, **options)(documents)
        assert batch["tokens"].tolist() == [3] * tokens
        assert not batch["loss_mask"].any()
        assert batch["plan"].documents.num_valid_tokens == 0
        assert batch["num_documents"] == len(documents)


def attended(layout: str, parts: list[tuple[int, ...]], budget: int | None) -> list[tuple[list[int], dict[str, Any]]]:
    """Every batch of this rank's loader, attended to under context parallelism and beside it."""
    group = partition_group(parts)
    assert group is not None
    size = dist.get_world_size(group)
    place = {"rank": dist.get_rank(), "world_size": 4, "cp_size": size}
    sampler = ContextParallelSampler.of_world(DATA, batch_size=3, seed=5, **place)
    collator = PackingCollator(size, token_budget=budget, layout=layout, ranks=(dist.get_rank(group),))
    batches: list[tuple[list[int], dict[str, Any]]] = []
    loader = DataLoader(DATA, batch_sampler=sampler, collate_fn=collator)  # type: ignore[arg-type]
    for indices, batch in zip(sampler, loader, strict=True):
        kept = {name: batch[name] for name in ("tokens", "cu_seqlens", "cu_seqlens_padded")}
        plan = batch.pop("plan")
        handler = get_cp_handler_cls("p2p")(
            cp_group=group,
            qkv_format="thd",
            cu_seqlens_q=batch["cu_seqlens"],
            cu_seqlens_q_padded=batch["cu_seqlens_padded"],
            layout=plan,
        )
        local = get_batch_on_this_cp_rank(batch, cp_handler=handler)
        if indices and any(LENGTHS[i] for i in indices):
            out = handler.combine(handler.core_attn(None, local["q"], local["k"], local["v"]), 0)
            seen = visible_pairs(Causal(), plan.documents)
            wanted, _ = dense_attention(batch["q"], batch["k"], batch["v"], seen, qkv_format="thd")
            assert_close(out, wanted)
            assert torch.equal(handler.combine(local["labels"], 0), batch["labels"])
            assert torch.equal(handler.combine(local["position_ids"], 0), batch["position_ids"])
        batches.append((indices, kept))
    return batches


@pytest.mark.parametrize(
    ("layout", "parts", "budget"),
    [("zigzag", [(0, 1), (2, 3)], None), ("balanced", [(0, 1), (2, 3)], 60), ("contiguous", [(0, 1, 2, 3)], None)],
)
def test_from_data_set_to_attention(
    ranks: RankPool, layout: str, parts: list[tuple[int, ...]], budget: int | None
) -> None:
    answers = ranks.run(attended, layout, parts, budget)
    for part in parts:
        for member in part[1:]:
            for mine, theirs in zip(answers[part[0]], answers[member], strict=True):
                assert mine[0] == theirs[0]
                assert same(mine[1], theirs[1]), "one group, one batch"
    drawn = [i for part in parts for indices, _ in answers[part[0]] for i in indices]
    assert sorted(drawn) == list(range(len(DATA)))


def compared(changes: dict[int, dict[str, Any]], parts: list[tuple[int, ...]]) -> str:
    group = partition_group(parts)
    batch: Any = PackingCollator(2, pad_to_multiple_of=4)(DATA[:3])
    batch |= {"epoch": 3, "name": "x", "weights": torch.ones(5).to(torch.bfloat16)}
    batch |= changes.get(dist.get_rank(), {})
    try:
        check_same_batch(batch, group)
    except CPError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_ranks_that_hold_other_numbers_are_told_which(ranks: RankPool) -> None:
    parts = [(0, 2), (1, 3)]
    assert ranks.run(compared, {}, parts) == [""] * 4
    weights = torch.ones(5).to(torch.bfloat16)
    weights[3] = 1.0078125
    for change, names in (
        ({"weights": weights}, "batch['weights']: rank 0 has bfloat16 [5] #"),
        ({"weights": torch.ones(5)}, "batch['weights']: rank 0 has bfloat16 [5] #"),
        ({"epoch": 4}, "batch['epoch']: rank 0 has 3; rank 1 has 4".replace("; ", ", ")),
        ({"plan": plan_batch([0, 24], 2, layout="contiguous")}, "batch['plan']: rank 0 has zigzag of 2 ranks #"),
    ):
        answers = ranks.run(compared, {2: change}, parts)
        assert answers[1] == answers[3] == "", "the other group is well"
        assert answers[0] == answers[2]
        assert answers[0].startswith("RankMismatchError: the ranks of the context-parallel group do not hold the same")
        assert names in answers[0], answers[0]
    answers = ranks.run(compared, {2: {"ids": [1, 2]}}, parts)
    assert answers[2].startswith("InvalidTypeError: batch['ids'] cannot be compared; got list")
    assert "rank 1: InvalidTypeError: batch['ids'] cannot be compared" in answers[0]


def test_a_group_that_cannot_send_is_no_comparison() -> None:
    with pytest.raises(CPError, match="cannot reach each other"):
        check_same_batch({}, Seat())


class Seat:
    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 0


def test_the_way_back() -> None:
    batch = PackingCollator(2, token_budget=64, multiple_of=4)(DATA[:6])
    back = unpack_documents(
        batch["q"], batch["cu_seqlens"], batch["cu_seqlens_padded"], num_documents=batch["num_documents"]
    )
    assert all(torch.equal(rows, given["q"]) for rows, given in zip(back, DATA[:6], strict=True))
    assert batch["plan"].documents.lengths.tolist() == [12, 4, 16, 4, 0, 8, 20]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"cp_size": 0}, "cp_size must be at least 1"),
        ({"layout": "zig"}, "unknown layout"),
        ({"mask": "cause"}, "cause"),
        ({"ranks": (2,)}, "there is no such rank; got 2"),
        ({"token_budget": 9, "pad_to_multiple_of": 2}, "make the budget 10"),
        ({"cp_comm_type": "a2a"}, "no plan says what moves"),
        ({"layout": plan_batch([0, 9], 2).layout}, "made for another batch"),
    ],
)
def test_settings_are_refused_before_a_worker_starts(options: dict[str, Any], told: str) -> None:
    with pytest.raises(CPError, match=re.escape(told)):
        PackingCollator(**{"cp_size": 2, **options})


def test_the_page() -> None:
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 6
    exec("\n".join(blocks), {})


def test_digests_of_lazily_conjugated_tensors() -> None:
    lazy = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex64).conj()
    check_same_batch({"x": lazy}, None)
    assert checksum_of({"x": lazy}) == checksum_of({"x": lazy.resolve_conj()})
    assert checksum_of({"x": lazy.imag}) == checksum_of({"x": lazy.resolve_conj().imag.clone()})
