"""What a device holds over a transport of the host: every message by a copy, as if tensors here were elsewhere."""

from __future__ import annotations

from unittest import mock

import torch

from cphandler.comm import staging
from cphandler.comm.staging import Staging
from cphandler.testing import RankPool
from cphandler.testing.cases import Case
from cphandler.testing.laws import check_all, check_gradients_of_movement, check_roll

CASES = [Case(backend, 4) for backend in ("ring", "p2p", "all_gather", "ulysses", "usp")]


class Counted(Staging):
    """Counts what passes through the host."""

    messages = 0

    def arriving(self, x: torch.Tensor) -> torch.Tensor:
        Counted.messages += 1
        return super().arriving(x)


class Lost(Staging):
    """Forgets to bring what has come to the device."""

    def land(self) -> None:
        pass


def staged(kind: type[Staging]) -> int:
    Counted.messages = 0
    with mock.patch.object(staging, "through_host", side_effect=lambda *_: kind()):
        check_all(CASES)
        for case in CASES:
            check_gradients_of_movement(case)
            check_roll(case)
    return Counted.messages


def fails() -> bool:
    try:
        staged(Lost)
    except AssertionError:
        return True
    return False


def test_every_exchange_by_way_of_the_host(ranks: RankPool) -> None:
    assert all(messages > 20 for messages in ranks.run(staged, Counted))


def test_a_copy_that_is_forgotten_is_found(ranks: RankPool) -> None:
    assert ranks.run(fails) == [True] * 4


def test_nothing_is_staged_where_the_host_has_it() -> None:
    staging = Staging()
    x = torch.arange(5.0)
    copy = staging.leaving(x)
    staging.settle()
    room = staging.arriving(x)
    room.copy_(copy + 1)
    assert torch.equal(x, torch.arange(5.0))
    staging.land()
    assert torch.equal(x, torch.arange(5.0) + 1)
