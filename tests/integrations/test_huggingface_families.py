"""Families of transformers, parallelized: logits, loss and every gradient equal the unmodified model's on one rank."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cphandler.integrations.huggingface import parallelize
from cphandler.testing import RankPool
from cphandler.testing.pool import partition_group
from tests.integrations.families import FAMILIES, batch_of, build
from tests.integrations.references import (
    check_gradients,
    check_logits,
    check_loss,
    checkpointed,
    expected,
    gradients_of,
    over_ranks,
)

pytest.importorskip("transformers")

PLACEMENTS = {
    "ring2": (2, {"backend": "ring"}),
    "ring4": (4, {"backend": "ring"}),
    "p2p4": (4, {"backend": "p2p"}),
    "ulysses2": (2, {"backend": "ulysses"}),
    "usp4": (4, {"backend": "usp"}),
    "balanced2": (2, {"backend": "p2p", "layout": "balanced"}),
    "p2p2": (2, {"backend": "p2p"}),
    "ulysses4": (4, {"backend": "ulysses"}),
    "balanced4": (4, {"backend": "ring", "layout": "balanced"}),
    "gathered4": (4, {"backend": "all_gather"}),
}
"""Ranks and settings, the first six in the cover."""

KINDS = ("packed", "right", "left", "holes", "plain")

CHECKPOINTING = ("off", "non-reentrant", "reentrant")

CONVENTIONS = ("mean", "sum")


def cover() -> list[tuple[str, str, str, str]]:
    """Each family with each placement of the cover, and in turn each kind of batch and of checkpointing."""
    chosen = []
    for number, family in enumerate(FAMILIES):
        for turn, placement in enumerate(list(PLACEMENTS)[:6]):
            kind = KINDS[(number + turn) % 5]
            chosen.append((family, placement, kind, CHECKPOINTING[(number + turn) % 3]))
    return chosen


def group_of(ranks: int) -> Any:
    """This rank's group of so many: all, or a half of four."""
    return partition_group([range(first, first + ranks) for first in range(0, 4, ranks)])


def equal_to_one_rank(family: str, placement: str, kind: str, checkpointing: str, gradient: str) -> None:
    ranks, settings = PLACEMENTS[placement]
    group, seed = group_of(ranks), dist.get_rank() // ranks
    wanted, batch = expected(family, kind, seed, checkpointing), batch_of(kind, seed)
    model = parallelize(checkpointed(build(family), checkpointing), group, gradient=gradient, **settings)
    loss = model(**batch).loss
    loss.backward()
    check_loss(loss, wanted.loss)
    check_gradients(over_ranks(gradients_of(model), group, gradient), wanted.gradients)
    with torch.no_grad():
        check_logits(model.eval()(**batch).logits, wanted.logits, batch)


@pytest.mark.parametrize(("family", "placement", "kind", "checkpointing"), cover())
def test_a_family_equals_one_rank(ranks: RankPool, family: str, placement: str, kind: str, checkpointing: str) -> None:
    convention = CONVENTIONS[len(family + placement) % 2]
    ranks.run(equal_to_one_rank, family, placement, kind, checkpointing, convention)


def test_the_cover_has_each_family_with_each_value() -> None:
    runs = cover()
    assert len(runs) >= 60
    for family in FAMILIES:
        own = [run for run in runs if run[0] == family]
        assert {run[1] for run in own} == set(list(PLACEMENTS)[:6])
        assert {run[2] for run in own} == set(KINDS)
        assert {run[3] for run in own} == set(CHECKPOINTING)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_one_rank(ranks: RankPool, family: str, placement: str, checkpointing: str) -> None:
    for kind, convention in itertools.product(KINDS, CONVENTIONS):
        ranks.run(equal_to_one_rank, family, placement, kind, checkpointing, convention)
