"""Documents to sub-groups and micro-batches: each once, within memory, level, and trained as on one rank."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from benchmarks.dynamic import quality
from benchmarks.packs import packs
from cphandler import (
    DocumentSchedule,
    InvalidTypeError,
    InvalidValueError,
    SubGroups,
    assign_documents,
    get_cp_handler_cls,
    language_model_loss,
    next_token_labels,
    pack_documents,
)
from cphandler.testing import RankPool
from tests.test_combinations import Batch, Combination, Dense, Model, mesh_of


def drawn(seed: int, count: int, sigma: float = 1.2) -> list[int]:
    """Lognormal lengths."""
    lengths = np.random.default_rng(seed).lognormal(6.0, sigma, count)
    return [max(1, round(length)) for length in lengths.tolist()]


def check(schedule: DocumentSchedule, lengths: list[int], max_tokens: int | None) -> None:
    """What every schedule promises."""
    given = [document for groups in schedule.micro_batches for group in groups for document in group.documents]
    assert sorted(given) == list(range(len(lengths))), "each document once"
    for groups in schedule.micro_batches:
        assert [rank for group in groups for rank in group.ranks] == list(range(schedule.num_ranks))
        for group in groups:
            assert group.documents, "all ranks have work"
            assert list(group.documents) == sorted(group.documents)
            assert group.tokens == sum(lengths[i] for i in group.documents)
            assert group.local_tokens == -(-group.tokens // group.size)
            assert max_tokens is None or group.local_tokens <= max_tokens
    for rank in range(schedule.num_ranks):
        own = schedule.of_rank(rank)
        assert len(own) == len(schedule.micro_batches)
        assert all(rank in group.ranks for group in own)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8, 13])
def test_every_schedule_keeps_its_promises(ranks: int) -> None:
    sizes = set()
    for seed, count in itertools.product(range(6), (1, 2, 7, 40)):
        lengths = drawn(seed, count)
        for most in (None, max(1, -(-max(lengths) // ranks)), max(lengths)):
            schedule = assign_documents(lengths, ranks, max_tokens=most, token_cost=1000.0)
            check(schedule, lengths, most)
            assert schedule == assign_documents(np.array(lengths), ranks, max_tokens=most, token_cost=1000.0)
            for groups in schedule.micro_batches:
                mean = sum(group.work for group in groups) / ranks
                assert max(group.work / group.size for group in groups) <= 1.05 * mean * (1 + 1e-12)
                sizes |= {group.size for group in groups}
    assert ranks < 8 or sizes & {3, 5, 6, 7}, "sizes are not powers of two alone"


def test_short_documents_stay_whole() -> None:
    schedule = assign_documents([64] * 32, 8)
    assert {group.size for groups in schedule.micro_batches for group in groups} == {1}
    assert schedule.level == 1.0
    assert schedule.parts == ()


def test_a_long_document_takes_the_ranks_that_its_work_asks_for() -> None:
    lengths = [6000, *[250] * 48]
    schedule = assign_documents(lengths, 6, token_cost=6 * 1024)
    (groups,) = schedule.micro_batches
    long = next(group for group in groups if 0 in group.documents)
    work = [n * (n + 1) / 2 + 6 * 1024 * n for n in lengths]
    assert long.size == 3
    assert long.size == -(-work[0] * 6 // sum(work))
    assert schedule.parts == ((0, 1, 2),)
    linear = assign_documents(lengths, 6, token_cost=1e9)  # as long as it is, in tokens
    assert next(group for group in linear.micro_batches[0] if 0 in group.documents).size == 2


def test_memory_makes_micro_batches() -> None:
    lengths = drawn(3, 60)
    room = -(-sum(lengths) // 4 // 3)  # of a rank, so that three micro-batches would only just do
    schedule = assign_documents(lengths, 4, max_tokens=max(room, -(-max(lengths) // 4)))
    assert len(schedule.micro_batches) >= 3
    assert len(assign_documents(lengths, 4, num_micro_batches=5).micro_batches) == 5


def test_beside_balanced_on_honest_lengths() -> None:
    """The page's row of eight ranks."""
    found = [[quality(lengths, 8, way) for lengths in packs("pile", 8)] for way in ("balanced", "sub-groups")]
    balanced, groups = ([round(sum(column) / 16, 3) for column in zip(*way, strict=True)] for way in found)
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    worst = max(each.level for each in found[1])
    cells = [f"{balanced[0]:.3f}", f"{balanced[1]:.3f}", f"{balanced[2]:.2f}", f"{groups[0]:.3f}"]
    cells = ["8", *(cell.removeprefix("0") for cell in cells), f"{groups[1]:.3f} ({worst:.3f})", f"{groups[2]:.2f}"]
    assert f"| {' | '.join(cells)} |" in page


GOOD: dict[str, Any] = {"lengths": [5, 3], "num_ranks": 2}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"lengths": []}, InvalidValueError, "there are no documents to give out"),
        ({"lengths": 5}, InvalidTypeError, "lengths must be ints; got int"),
        ({"lengths": [5, 0]}, InvalidValueError, "the length of document 1 must be at least 1; got 0"),
        ({"lengths": [5, 2.5]}, InvalidTypeError, "the length of document 1 must be an int; got 2.5"),
        ({"num_ranks": 0}, InvalidValueError, "num_ranks must be at least 1"),
        ({"max_tokens": 2}, InvalidValueError, "more tokens than all ranks have memory for; got 5 tokens and 2 ranks"),
        ({"num_micro_batches": 3}, InvalidValueError, "fewer documents than micro-batches; got 2 for 3"),
        ({"token_cost": -1.0}, InvalidValueError, "token_cost must be 0 or above, and finite; got -1.0"),
        ({"token_cost": float("nan")}, InvalidValueError, "token_cost must be 0 or above, and finite; got nan"),
        ({"slack": "much"}, InvalidTypeError, "slack must be a number; got 'much'"),
    ],
)
def test_what_is_refused(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        assign_documents(**{**GOOD, **changed})


def groups_refuse() -> None:
    groups = SubGroups()
    schedule = assign_documents([50, 3, 3], 4, token_cost=0.0)
    assert [group.size for group in schedule.micro_batches[0]] == [4] or schedule.parts
    mine = schedule.of_rank(groups.rank)[0]
    if mine.size > 1:
        with pytest.raises(InvalidValueError, match=r"the sub-group was not made; .* let every rank prepare"):
            groups.group(mine)
    with pytest.raises(InvalidValueError, match="for another number of ranks; got 3 for pools of 4"):
        groups.prepare(assign_documents([5, 3], 3))
    with pytest.raises(InvalidValueError, match="no such rank; got 4"):
        schedule.of_rank(4)
    for pools, message in (
        ([[0, 1], [1, 2]], "share no rank"),
        ([[0], [1, 2, 3]], "of one size"),
        ([[1, 0], [2, 3]], "ascending"),
        ([[0, 1], [2, 4]], "ranks are 0 to 3"),
        ([[(dist.get_rank() + 1) % 4]], "this rank is in no pool"),
    ):
        with pytest.raises(InvalidValueError, match=message):
            SubGroups(pools)


def test_groups_that_cannot_be(ranks: RankPool) -> None:
    ranks.run(groups_refuse)


def pools_of_two() -> list[int]:
    """Ranks 0, 2 and 1, 3 share documents; a sub-group of both is made in both pools at once."""
    groups = SubGroups([[0, 2], [1, 3]])
    schedule = assign_documents([40], groups.size)
    groups.prepare(schedule)
    (mine,) = schedule.of_rank(groups.rank)
    made = groups.group(mine)
    handler = get_cp_handler_cls("ring")(cp_group=made, qkv_format="thd", cu_seqlens_q=[0, 40], local_cp_size=mine.size)
    assert len(handler.combine(handler.dispatch(torch.arange(40), 0), 0)) == 40
    return dist.get_process_group_ranks(made)


def test_pools_beside_each_other(ranks: RankPool) -> None:
    assert ranks.run(pools_of_two) == [[0, 2], [1, 3]] * 2


TRAINED = [31, 4, 9, 1, 12, 2, 5, 18, 3, 7]
"""Documents of two micro-batches on sub-groups of one, three and four ranks."""


def document(seed: int, length: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 19, (length,), generator=generator)
    return Batch([length], ids, torch.rand(length, generator=generator) < 0.6)


def sub_groups_train(reducer: str, backend: str) -> tuple[set[int], float, float, bytes]:
    """Sizes of this rank's sub-groups, how far loss and gradients are off, and the gradients' bits."""
    documents = [document(40 + i, length) for i, length in enumerate(TRAINED)]
    total = sum(int((one.labels >= 0).sum()) for one in documents)
    torch.manual_seed(7)
    model = Model().double()
    reference = torch.zeros((), dtype=torch.float64)
    for one in documents:
        logits = model(one.ids, Dense(one.lengths))
        reference = reference + nn.functional.cross_entropy(logits, one.labels, reduction="sum") / total
    wanted = torch.autograd.grad(reference, list(model.parameters()))
    if reducer == "fsdp":
        mesh = mesh_of(Combination(dp=4, cp=1))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh.dp_cp)
        fully_shard(model, mesh=mesh.dp_cp)
    groups, loss, sizes = SubGroups(), torch.zeros((), dtype=torch.float64), set()
    schedule = assign_documents(TRAINED, groups.size, max_tokens=12, token_cost=5.0)
    groups.prepare(schedule)
    for mine in schedule.of_rank(groups.rank):
        batch = pack_documents([documents[i].ids for i in mine.documents])
        counts = torch.cat([documents[i].counts for i in mine.documents])
        handler = get_cp_handler_cls(backend)(
            cp_group=groups.group(mine),
            qkv_format="thd",
            cu_seqlens_q=batch["cu_seqlens"],
            local_cp_size=mine.size,
        )
        part = loss_of(batch["tokens"], counts, model, handler, total)
        (part * (4 if reducer == "fsdp" else 1)).backward()
        loss, sizes = loss + part.detach() / mine.size, sizes | {mine.size}
    dist.all_reduce(loss)
    found = [parameter.grad for parameter in model.parameters()]
    if reducer == "sum":
        for grad in found:
            dist.all_reduce(grad)
    whole = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in found]
    apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(whole, wanted, strict=True))
    return sizes, float((loss - reference).abs()), apart, b"".join(grad.numpy().tobytes() for grad in whole)


def loss_of(ids: torch.Tensor, counts: torch.Tensor, model: nn.Module, handler: Any, total: int) -> torch.Tensor:
    local = handler.dispatch(ids, 0)
    labels = next_token_labels(local, handler).masked_fill(~handler.dispatch(counts, 0, pad_value=0), -100)
    return language_model_loss(model(local, handler), labels, handler, num_tokens=total)


@pytest.mark.parametrize(("reducer", "backend"), [("sum", "p2p"), ("sum", "ulysses"), ("fsdp", "ring")])
def test_sub_groups_train_as_one_rank(ranks: RankPool, reducer: str, backend: str) -> None:
    answers = ranks.run(sub_groups_train, reducer, backend)
    assert set().union(*(sizes for sizes, _, _, _ in answers)) == {1, 3, 4}
    for _, loss, apart, bits in answers:
        assert loss < 1e-10
        assert apart < 1e-10
        assert bits == answers[0][3]
