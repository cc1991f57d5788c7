"""The testing kit itself: the pool of ranks, tolerances, and references that can fail."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from cphandler.testing import RankError, RankPool, assert_close, partition_group, relative_error


def square(x: int) -> tuple[int, int]:
    return dist.get_rank(), x * x


def fail_on_two() -> None:
    if dist.get_rank() == 2:
        raise ValueError("rank two is unhappy")
    dist.barrier()


def stuck_on_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def die_on_zero() -> None:
    if dist.get_rank() == 0:
        os._exit(7)
    dist.barrier()


def test_results_come_in_rank_order_and_the_pool_lives_on() -> None:
    with RankPool(3, timeout=30) as pool:
        assert pool.run(square, 5) == [(0, 25), (1, 25), (2, 25)]
        before = [process.pid for process in pool._processes]
        assert pool.run(square, 6) == [(0, 36), (1, 36), (2, 36)]
        assert [process.pid for process in pool._processes] == before
        started = time.monotonic()
        with pytest.raises(RankError, match=r"rank 2 of 3 failed:[\s\S]*rank two is unhappy") as caught:
            pool.run(fail_on_two)
        assert caught.value.ranks == [2]
        assert time.monotonic() - started < 10, "does not wait for the others, which sit in a barrier"
        assert pool.run(square, 7) == [(0, 49), (1, 49), (2, 49)], "restarted"
        with pytest.raises(RankError, match=r"rank 1 of 3 did not come back in time[\s\S]*stuck_on_one"):
            pool.run(stuck_on_one, timeout=1.0)
        with pytest.raises(RankError, match=r"failed:[\s\S]*in raises_nothing[\s\S]*DID NOT RAISE ValueError"):
            pool.run(raises_nothing)
        with pytest.raises(RankError, match="rank 0 of 3 died with exit code 7"):
            pool.run(die_on_zero)
        assert pool.run(square, 1) == [(0, 1), (1, 1), (2, 1)]
        pool._processes[1].kill()
        pool._processes[1].join()
        with pytest.raises(RankError, match="rank 1 of 3 died"):
            pool.run(square, 2)
        assert pool.run(square, 3) == [(0, 9), (1, 9), (2, 9)]
        processes = list(pool._processes)
    assert not any(process.is_alive() for process in processes)


def raises_nothing() -> None:
    with pytest.raises(ValueError, match="expected"):
        dist.get_rank()


def groups() -> tuple[int, int] | None:
    group = partition_group([(1, 2)])
    assert partition_group([(1, 2)]) is group
    return None if group is None else (dist.get_rank(group), dist.get_world_size(group))


def test_partitions() -> None:
    with RankPool(3, timeout=30) as pool:
        assert pool.run(groups) == [None, (0, 2), (1, 2)]


def test_tolerances_can_fail() -> None:
    expected = torch.randn(100, dtype=torch.float64)
    assert_close(expected * (1 + 1e-11), expected)
    assert_close((expected * (1 + 1e-6)).float(), expected)
    with pytest.raises(AssertionError, match=r"relative L2 error 1\.00e-05 above 2e-06"):
        assert_close((expected.float() * (1 + 1e-5)), expected.float())
    one_off = expected.clone()
    one_off[3] += 1e-6
    with pytest.raises(AssertionError, match="relative"):
        assert_close(one_off, expected)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(expected[:3], expected)
    with pytest.raises(AssertionError, match="not finite"):
        assert_close(torch.full_like(expected, float("nan")), expected)
    with pytest.raises(AssertionError, match="infinities or NaN differ"):
        assert_close(torch.zeros(2), torch.tensor([0.0, float("-inf")]))
    assert_close(torch.tensor([0.0, float("-inf")]), torch.tensor([0.0, float("-inf")]))
    with pytest.raises(AssertionError):
        assert_close(torch.full((4,), 1e-3), torch.zeros(4))
    big = torch.zeros(10**6, dtype=torch.float64)
    big[0], big[1] = 1e6, 1.0
    off = big.clone()
    off[1] = 1.0001
    assert relative_error(off, big) < 1e-9
