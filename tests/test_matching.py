"""Matchings: every message in one stage, no rank busy twice in a stage, no stage more than the busiest rank needs."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cphandler.plan.matching import matchings
from cphandler.tokens.intervals import Flags, Table

sizes, seeds = st.integers(1, 40), st.integers(0, 2**32 - 1)


def at_random(size: int, share: float, seed: int) -> Flags:
    """Each rank wants a share of the others' messages."""
    wanted: Flags = np.random.default_rng(seed).random((size, size)) < share
    return wanted


def permuted(size: int, times: int, seed: int) -> Flags:
    """Every rank about as busy as any other, so that no stage has a rank to spare."""
    generator = np.random.default_rng(seed)
    wanted = np.zeros((size, size), dtype=bool)
    for _ in range(times):
        wanted[np.arange(size), generator.permutation(size)] = True
    return wanted


def shift_of(size: int) -> Table:
    """``[P, P]``: receiver minus sender, round the ring."""
    result: Table = (np.arange(size)[:, None] - np.arange(size)[None]) % size
    return result


def messages_of(wanted: Flags) -> Flags:
    """All that travels: nobody sends to himself."""
    messages: Flags = wanted & ~np.eye(len(wanted), dtype=bool)
    return messages


def check(wanted: Flags) -> Table:
    """Hold stages to all that makes them matchings, and few."""
    before = wanted.copy()
    stage = matchings(wanted)
    assert (wanted == before).all(), "the argument is left as it was"
    messages = messages_of(wanted)
    assert stage.shape == wanted.shape
    assert ((stage >= 0) == messages).all(), "every wanted message has a stage, and no other has"
    busiest = int(max(messages.sum(0).max(), messages.sum(1).max()))
    assert set(stage[messages].tolist()) == set(range(busiest)), "as many stages as the busiest rank has messages"
    for number in range(busiest):
        assert (stage == number).sum(0).max() <= 1, "a rank sends at most one message in a stage"
        assert (stage == number).sum(1).max() <= 1, "a rank receives at most one message in a stage"
    assert (matchings(wanted) == stage).all(), "two ranks that ask get one answer"
    return stage


@settings(max_examples=200, deadline=None)
@given(st.builds(at_random, sizes, st.sampled_from([0.0, 0.03, 0.1, 0.3, 0.6, 0.9, 0.99]), seeds))
def test_any_wishes(wanted: Flags) -> None:
    check(wanted)


@settings(max_examples=200, deadline=None)
@given(st.builds(permuted, sizes, st.integers(1, 20), seeds))
def test_wishes_that_leave_nobody_idle(wanted: Flags) -> None:
    check(wanted)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_all_wishes_of_a_few_ranks(size: int) -> None:
    pairs = np.argwhere(messages_of(np.ones((size, size), dtype=bool)))
    for number in range(1 << len(pairs)):
        wanted = np.zeros((size, size), dtype=bool)
        wanted[tuple(pairs[[bool(number >> bit & 1) for bit in range(len(pairs))]].T)] = True
        check(wanted)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 40), st.data())
def test_whole_shifts_stay_whole(size: int, data: st.DataObject) -> None:
    """Where every rank wants the same neighbours, a stage is one shift, the nearest first."""
    shifts = sorted(data.draw(st.sets(st.integers(1, size - 1), min_size=1)))
    stage = check(np.isin(shift_of(size), shifts))
    for number, shift in enumerate(shifts):
        assert (stage[shift_of(size) == shift] == number).all()


@pytest.mark.parametrize("size", [1, 2, 3, 8, 64])
def test_everybody_wants_everybodys(size: int) -> None:
    stage = check(np.ones((size, size), dtype=bool))
    assert (stage == shift_of(size) - 1).all()


def test_contiguous_and_causal() -> None:
    """Rank r wants what all ranks before it have."""
    before = np.tri(7, k=-1, dtype=bool)
    assert (check(before) == np.where(before, shift_of(7) - 1, -1)).all()


def first_come(wanted: Flags) -> int:
    """Stages where each message, the nearest first, takes the first stage free at both ends."""
    taken: list[tuple[set[int], set[int]]] = []
    pairs = [(int((r - s) % len(wanted)), int(s), int(r)) for r, s in np.argwhere(messages_of(wanted))]
    for _, sender, receiver in sorted(pairs):
        free = (stage for stage in taken if sender not in stage[0] and receiver not in stage[1])
        senders, receivers = next(free, (set(), set()))
        if not senders:
            taken.append((senders, receivers))
        senders.add(sender)
        receivers.add(receiver)
    return len(taken)


def test_stages_are_rearranged_where_first_come_needs_more() -> None:
    wanted = np.zeros((4, 4), dtype=bool)
    wanted[tuple(np.array([(0, 1), (0, 2), (1, 3), (2, 1), (2, 3), (3, 2)]).T)] = True
    assert check(wanted).max() + 1 == 2 < first_come(wanted)
    longer = permuted(40, 10, seed=1)
    assert check(longer).max() + 1 == 10 < first_come(longer)


@pytest.mark.parametrize("wanted", [at_random(64, 0.5, 0), at_random(64, 0.95, 3), permuted(64, 100, 1)])
def test_sixty_four_ranks_take_less_than_a_second(wanted: Flags) -> None:
    started = time.process_time()
    matchings(wanted)
    assert time.process_time() - started < 1.0
    check(wanted)
