"""Who draws which documents: the ranks of a context-parallel group the same, all others none of them."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader

from cphandler import ContextParallelSampler, InvalidTypeError, InvalidValueError
from cphandler.testing import RankPool, partition_group

LENGTHS = [1 + (7 * i) % 19 for i in range(53)]
FORMS: dict[str, dict[str, Any]] = {
    "documents": {"batch_size": 3},
    "tokens": {"token_budget": 40, "lengths": LENGTHS},
}


class Seat:
    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def drawn(dp_size: int, epoch: int = 0, **settings: Any) -> list[list[list[int]]]:
    """Batches by data-parallel rank."""
    samplers = [ContextParallelSampler(53, group=Seat(rank, dp_size), **settings) for rank in range(dp_size)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    batches = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(own) for own in batches]
    return batches


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dp_size", [1, 2, 3, 5])
@pytest.mark.parametrize("shuffle", [True, False])
def test_each_document_once_and_as_many_batches_everywhere(form: str, dp_size: int, shuffle: bool) -> None:
    batches = drawn(dp_size, shuffle=shuffle, **FORMS[form])
    assert len({len(own) for own in batches}) == 1
    together = sorted(i for own in batches for batch in own for i in batch)
    assert together == list(range(53)), "none is left out, none comes twice"
    assert all(batch for own in batches for batch in own[:-1]), "only a last batch may be without documents"
    for own in batches:
        for batch in own:
            assert sum(LENGTHS[i] for i in batch) <= 40 if form == "tokens" else len(batch) <= 3


@pytest.mark.parametrize("form", FORMS)
def test_what_is_dropped(form: str) -> None:
    batches = drawn(4, drop_last=True, **FORMS[form])
    assert len({len(own) for own in batches}) == 1
    together = [i for own in batches for batch in own for i in batch]
    assert len(set(together)) == len(together)
    assert all(batch for own in batches for batch in own)
    if form == "documents":
        assert len(together) == 48, "17 full batches of 3 are 4 for each of 4 ranks"


@pytest.mark.parametrize("form", FORMS)
def test_epochs_and_seeds(form: str) -> None:
    settings = FORMS[form]
    first = drawn(2, **settings)
    assert first == drawn(2, **settings)
    assert first != drawn(2, epoch=1, **settings)
    assert first != drawn(2, seed=1, **settings)
    assert drawn(2, epoch=3, shuffle=False, **settings) == drawn(2, shuffle=False, **settings)
    assert drawn(2, epoch=1, seed=0, **settings) != drawn(2, epoch=0, seed=1, **settings)


@pytest.mark.parametrize("form", FORMS)
def test_a_run_that_goes_on(form: str) -> None:
    sampler = ContextParallelSampler(53, group=Seat(1, 2), **FORMS[form])
    sampler.set_epoch(4)
    whole = list(sampler)
    sampler.set_epoch(4, first_batch=3)
    assert list(sampler) == whole[3:]
    assert len(sampler) == len(whole) - 3
    sampler.set_epoch(5)
    assert list(sampler)[:3] != whole[:3]
    sampler.set_epoch(4, first_batch=len(whole))
    assert list(sampler) == []


def test_the_order_of_a_data_set() -> None:
    assert drawn(1, shuffle=False, batch_size=20) == [[list(range(20)), list(range(20, 40)), list(range(40, 53))]]


def test_budgets_are_filled() -> None:
    batches = [batch for own in drawn(1, token_budget=40, lengths=LENGTHS) for batch in own]
    assert len(batches) <= -(-sum(LENGTHS) // 40) + 1


def test_documents_that_will_be_padded_stay_inside_the_budget() -> None:
    batches = [batch for own in drawn(1, token_budget=40, lengths=LENGTHS, multiple_of=8) for batch in own]
    assert all(sum(-(-LENGTHS[i] // 8) * 8 for i in batch) <= 40 for batch in batches)
    assert len(batches) > len([batch for own in drawn(1, token_budget=40, lengths=LENGTHS) for batch in own])


def test_what_was_handed_out_is_the_callers() -> None:
    sampler = ContextParallelSampler([0] * 10, batch_size=5)
    before = copy.deepcopy(list(sampler))
    for batch in sampler:
        batch.clear()
    assert list(sampler) == before


@pytest.mark.parametrize(("cp_size", "tp_size"), [(2, 2), (4, 1), (1, 8), (8, 1), (3, 1)])
def test_sizes_tell_who_draws_what(cp_size: int, tp_size: int) -> None:
    world = 12 if cp_size == 3 else 8
    batches = []
    for rank in range(world):
        place = {"rank": rank, "world_size": world, "cp_size": cp_size, "tp_size": tp_size}
        batches.append(list(ContextParallelSampler.of_world(53, batch_size=4, **place)))
    inner = cp_size * tp_size
    for rank in range(world):
        assert batches[rank] == batches[rank - rank % inner], "one group, one batch"
    firsts = [i for own in batches[::inner] for batch in own for i in batch]
    assert sorted(firsts) == list(range(53)), "others draw others"


def test_a_data_loader_takes_it() -> None:
    data = [torch.tensor(i) for i in range(53)]
    sampler = ContextParallelSampler(data, batch_size=7, seed=3)
    loader = DataLoader(data, batch_sampler=sampler)  # type: ignore[arg-type]
    seen = [batch.tolist() for batch in loader]
    assert seen == list(sampler)
    sampler.set_epoch(1)
    assert [batch.tolist() for batch in loader] == list(sampler) != seen


def on_a_mesh() -> list[list[list[int]]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    by_mesh = list(ContextParallelSampler(20, batch_size=3, group=mesh["dp"]))
    assert by_mesh == list(ContextParallelSampler(20, batch_size=3, group=mesh.get_group("dp")))
    assert by_mesh == list(
        ContextParallelSampler.of_world(20, batch_size=3, rank=dist.get_rank(), world_size=4, cp_size=2)
    )
    for wrong in (mesh["cp"], mesh):
        with pytest.raises(InvalidValueError, match="need the same documents"):
            ContextParallelSampler(20, batch_size=3, group=wrong)
    hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    each = list(ContextParallelSampler(20, batch_size=3, group=hybrid))
    assert each == list(ContextParallelSampler(20, batch_size=3, group=Seat(dist.get_rank(), 4)))
    strided = partition_group([(0, 2), (1, 3)])
    assert by_mesh == list(ContextParallelSampler(20, batch_size=3, group=strided))
    return by_mesh


def test_meshes_and_groups(ranks: RankPool) -> None:
    batches = ranks.run(on_a_mesh)
    assert batches[0] == batches[1] != batches[2] == batches[3]
    assert sorted(i for own in batches[::2] for batch in own for i in batch) == list(range(20))


@pytest.mark.parametrize(
    ("settings", "error", "told"),
    [
        ({}, InvalidValueError, "a batch is so many documents, or so many tokens; got neither"),
        (
            {"batch_size": 2, "token_budget": 3, "lengths": [1] * 5},
            InvalidValueError,
            "got batch_size and token_budget",
        ),
        ({"token_budget": 3}, InvalidValueError, "got token_budget; pass batch_size=, or token_budget= with lengths="),
        ({"batch_size": 2, "lengths": [1] * 5}, InvalidValueError, "got batch_size and lengths"),
        ({"token_budget": 3, "lengths": [1] * 4}, InvalidValueError, "as many as documents; got 4 for 5"),
        ({"token_budget": 3, "lengths": [1, 2, 4, 1, 1]}, InvalidValueError, "got 4 tokens for a budget of 3"),
        ({"data": "words", "batch_size": 2}, InvalidTypeError, "data must be an int; got 'words'"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=re.escape(told)):
        ContextParallelSampler(**{"data": 5, **settings})


@pytest.mark.parametrize("place", [(0, 6, 4, 1), (8, 8, 2, 2), (0, 8, 3, 1)])
def test_sizes_that_are_no_mesh(place: tuple[int, int, int, int]) -> None:
    rank, world_size, cp_size, tp_size = place
    with pytest.raises(InvalidValueError, match="must divide world_size, and rank be one of it"):
        ContextParallelSampler.of_world(
            5, batch_size=1, rank=rank, world_size=world_size, cp_size=cp_size, tp_size=tp_size
        )
