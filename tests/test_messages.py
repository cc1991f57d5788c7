"""What travels arrives bit for bit, whatever the shape, strides and dtype; sums and gradients are exact."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cphandler import Full, InvalidValueError, get_cp_handler_cls
from cphandler.comm import collectives, membership, transfers
from cphandler.comm.membership import sub_group_name
from cphandler.sharding.heads import HeadSplit, gather_heads_scatter_seq, gather_seq_scatter_heads
from cphandler.sharding.order import SequenceOrder
from cphandler.testing import RankPool, partition_group

MOVED = ["bool", "int64", "uint16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2", "complex64"]
SUMMED = ["int64", "bfloat16", "float64", "float8_e4m3fn", "complex64"]
DIFFERENTIABLE = {"bfloat16", "float64", "complex64"}
ORDERED = {"bool", "int64", "bfloat16", "float64"}


@dataclass(frozen=True)
class Memory:
    """How a tensor of up to three dims lies in memory: as no caller should, and some do.

    Attributes:
        order: which dim is the innermost, the next one, ...
        gaps: elements from one to the next along each dim, over what is needed.
        odd: stride of dims of size 1.
        expanded: a dim with stride 0, where it is not the first; its rows are then alike.
        start: elements in front.
    """

    order: tuple[int, ...]
    gaps: tuple[int, ...]
    odd: tuple[int, ...]
    expanded: int
    start: int

    def holding(self, values: Tensor) -> Tensor:
        """The values in this memory; along an expanded dim the first ones, again and again."""
        shape = list(values.shape)
        if self.expanded < len(shape):
            values = values.narrow(self.expanded, 0, min(1, shape[self.expanded]))
        strides, room = [0] * values.dim(), 1
        for dim in (d for d in self.order if d < values.dim()):
            strides[dim] = self.odd[dim] if values.shape[dim] == 1 else room * self.gaps[dim]
            room = max(room, strides[dim] * values.shape[dim])
        whole = torch.zeros(self.start + room + 1).to(values.dtype)
        held = whole.as_strided(values.shape, strides, self.start)
        return (held.copy_(values) if held.numel() else held).expand(shape)


@dataclass(frozen=True)
class Case:
    """One message: among whom, of what, and how it lies."""

    size: int
    parts: bool
    moved: str
    summed: str
    width: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    memory: Memory
    gradient: Memory
    seed: int


small = st.sampled_from([1, 1, 1, 0, 2, 3])
memories = st.builds(
    Memory,
    order=st.permutations(range(3)).map(tuple),
    gaps=st.tuples(*[st.integers(1, 3)] * 3),
    odd=st.tuples(*[st.integers(0, 7)] * 3),
    expanded=st.integers(0, 3),
    start=st.integers(0, 2),
)
cases = st.builds(
    Case,
    size=st.integers(2, 4),
    parts=st.booleans(),
    moved=st.sampled_from(MOVED),
    summed=st.sampled_from(SUMMED),
    width=st.lists(small, max_size=2).map(tuple),
    counts=st.tuples(*[st.tuples(*[small] * 4)] * 4),
    memory=memories,
    gradient=memories,
    seed=st.integers(0, 2**20),
)


@dataclass
class Seat:
    """This rank's place in a case."""

    name: str
    rank: int
    size: int


def seat_of(case: Case) -> Seat | None:
    """A group of its own, or half of a group of four, seen as a group."""
    if case.parts and case.size == 2:
        group = partition_group([range(4)])
        assert group is not None
        rank, name = dist.get_rank(group), str(group.group_name)
        return Seat(sub_group_name(name, range(rank % 2, 4, 2)), rank // 2, 2)
    partition = {2: ((0, 2), (1, 3)), 3: ((1, 2, 3),), 4: ((0, 1, 2, 3),)}[case.size]
    group = partition_group(partition)
    return None if group is None else Seat(str(group.group_name), dist.get_rank(group), case.size)


def bits(shape: tuple[int, ...], dtype: torch.dtype, seed: tuple[int, ...]) -> Tensor:
    """Any bit pattern that the dtype has, the same for the same seed."""
    count = int(np.prod(shape)) * dtype.itemsize
    raw = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 256, count, dtype=np.uint8)
    return torch.tensor(raw.tolist(), dtype=torch.uint8).view(dtype).reshape(shape)


def whole_numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: tuple[int, ...]) -> Tensor:
    """Small whole numbers, whose sums every dtype holds."""
    values = torch.from_numpy(np.random.default_rng(seed).integers(-3, 4, shape))
    return (values * (1 - 2j) if dtype.is_complex else values).to(dtype)


def raw(x: Tensor) -> bytes:
    x = x.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return x.view(torch.uint8).numpy().tobytes() if x.numel() else b""


def check(got: Tensor, expected: Tensor, what: str) -> None:
    """Shape, dtype and every bit."""
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), what
    assert raw(got) == raw(expected), f"{what}: {got} is not {expected}"


def exchanged(everyone: list[Tensor], counts: list[list[int]], rank: int) -> Tensor:
    """What a rank gets when each rank s sends ``counts[s][t]`` of its rows to each t."""
    return torch.cat([x.split(row)[rank] for x, row in zip(everyone, counts, strict=True)])


def gradient_of(got: Tensor, leaf: Tensor, memory: Memory, seat: Seat, seed: int, shapes: Any) -> Any:
    """Backward with a gradient that lies oddly; every rank's such gradient, and what this rank's leaf got."""
    grads = [memory.holding(whole_numbers(shape, got.dtype, (seed, 9, r))) for r, shape in enumerate(shapes)]
    return grads, torch.autograd.grad(got, leaf, grads[seat.rank])[0]


def uneven(case: Case, seat: Seat, operation: Any) -> None:
    """Rows to every rank, other numbers for each."""
    counts = [list(row[: seat.size]) for row in case.counts[: seat.size]]
    back = [list(column) for column in zip(*counts, strict=True)]
    sides = counts[seat.rank], back[seat.rank], seat.name
    shapes = [(sum(row), *case.width) for row in counts]
    dtype = getattr(torch, case.moved)
    xs = [case.memory.holding(bits(shape, dtype, (case.seed, r))) for r, shape in enumerate(shapes)]
    check(operation(xs[seat.rank], *sides), exchanged(xs, counts, seat.rank), "exchange")
    dtype = getattr(torch, case.summed)
    if case.summed in DIFFERENTIABLE:
        leaf = case.memory.holding(whole_numbers(shapes[seat.rank], dtype, (case.seed,))).requires_grad_()
        arrived = [(sum(row), *case.width) for row in back]
        grads, got = gradient_of(operation(leaf, *sides), leaf, case.gradient, seat, case.seed, arrived)
        check(got, exchanged(grads, back, seat.rank), "gradient of an exchange")


def even(case: Case, seat: Seat) -> None:
    """Gathers, sums, shifts and maxima of tensors with one shape."""
    rows, shift = case.counts[0][0], case.counts[0][1]
    shape, wide = (rows, *case.width), (rows * seat.size, *case.width)
    dtype, ranks = getattr(torch, case.moved), range(seat.size)
    xs = [case.memory.holding(bits(shape, dtype, (case.seed, r))) for r in ranks]
    check(collectives.all_gather(xs[seat.rank], seat.name), torch.cat(xs), "all_gather")
    sender = (seat.rank - shift) % seat.size
    check(collectives.ring_shift(xs[seat.rank], shift, seat.name), xs[sender], "ring_shift")
    dtype = getattr(torch, case.summed)
    parts = [case.memory.holding(whole_numbers(wide, dtype, (case.seed, r))) for r in ranks]
    chunks = [
        (sum(part.to(torch.complex128) for part in parts)).chunk(seat.size)[r] if rows else parts[0] for r in ranks
    ]
    total = chunks[seat.rank]
    total = (total if dtype.is_complex else total.real).to(dtype)
    check(collectives.reduce_scatter(parts[seat.rank], seat.name), total, "reduce_scatter")
    if case.summed in ORDERED:
        largest = torch.stack([part.double() for part in parts]).amax(0).to(dtype)
        check(collectives.maximum(parts[seat.rank], seat.name), largest, "maximum")
    if case.summed in DIFFERENTIABLE:
        gradients_of_even(case, seat, parts)


def gradients_of_even(case: Case, seat: Seat, parts: list[Tensor]) -> None:
    rows, shift = case.counts[0][0], case.counts[0][1]
    shape, wide = (rows, *case.width), (rows * seat.size, *case.width)
    leaf = parts[seat.rank].detach().requires_grad_()
    scattered = collectives.reduce_scatter(leaf, seat.name)
    grads, got = gradient_of(scattered, leaf, case.gradient, seat, case.seed, [shape] * seat.size)
    check(got, torch.cat(grads), "gradient of reduce_scatter")
    leaf = case.memory.holding(parts[0][:rows]).requires_grad_()
    gathered = collectives.all_gather(leaf, seat.name)
    grads, got = gradient_of(gathered, leaf, case.gradient, seat, case.seed, [wide] * seat.size)
    mine = slice(rows * seat.rank, rows * (seat.rank + 1))
    check(got, sum(grads[1:], grads[0])[mine], "gradient of all_gather")
    shifted = collectives.ring_shift(leaf, shift, seat.name)
    grads, got = gradient_of(shifted, leaf, case.gradient, seat, case.seed, [shape] * seat.size)
    check(got, grads[(seat.rank + shift) % seat.size], "gradient of ring_shift")


def posted(case: Case, seat: Seat) -> None:
    """Tensors that the caller packs."""
    shape, dtype = (case.counts[0][0], *case.width), getattr(torch, case.moved)
    xs = [case.memory.holding(bits(shape, dtype, (case.seed, r))) for r in range(seat.size)]
    other, received = (seat.rank + 1) % seat.size, torch.zeros(shape).to(dtype)
    if 1 in shape:  # contiguous to torch, with strides of its own
        received = received.as_strided(
            shape, [5 if n == 1 else s for n, s in zip(shape, received.stride(), strict=True)]
        )
    before = (seat.rank - 1) % seat.size
    transfers.post([(xs[seat.rank], other)], [(received, before)], seat.name).wait()
    check(received, xs[before], "post")


def whole_case(case: Case) -> None:
    """Every operation on one case; the error names the case."""
    seat = seat_of(case)
    if seat is None:
        return
    try:
        for operation in (collectives.all_to_all, collectives.exchange_rows):
            uneven(case, seat, operation)
        even(case, seat)
        posted(case, seat)
    except Exception as error:
        raise AssertionError(f"rank {seat.rank} in {case}") from error


def all_of(messages: list[Case]) -> None:
    for case in messages:
        whole_case(case)


@settings(max_examples=2, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(st.lists(cases, min_size=30, max_size=30))
def test_any_message(ranks: RankPool, messages: list[Case]) -> None:
    """Many cases a call, and no shrinking: ranks that failed are started anew, and the error names its case."""
    ranks.run(all_of, messages)


def as_on_other_transports() -> list[bytes]:
    """What NCCL is asked to do, done by gloo: collectives of torch, and sends in one batch."""
    group, on_gloo = partition_group([range(4)]), membership.on_gloo
    assert group is not None
    draw, plain = random.Random(5), Memory((2, 0, 1), (1, 2, 1), (3, 0, 5), 3, 1)
    membership.on_gloo = lambda *_: False
    try:
        for size, moved, summed in itertools.product((2, 3, 4), ("int64", "float8_e5m2"), ("bfloat16", "float64")):
            counts = tuple(tuple(draw.choice((0, 1, 1, 3)) for _ in range(4)) for _ in range(4))
            whole_case(Case(size, draw.random() < 0.5, moved, summed, (1, 2), counts, plain, plain, draw.randrange(99)))
        return collectives.agree(bytes([1 + dist.get_rank(group)]), str(group.group_name))
    finally:
        membership.on_gloo = on_gloo


def test_any_message_as_on_other_transports(ranks: RankPool) -> None:
    assert ranks.run(as_on_other_transports) == [[b"\x01", b"\x02", b"\x03", b"\x04"]] * 4


def one_odd_row() -> None:
    plain = Memory((0, 1, 2), (1, 1, 1), (3, 3, 3), 3, 0)
    ones = ((1,) * 4,) * 4
    for moved, width in itertools.product(MOVED, ((1,), (1, 1))):
        whole_case(Case(4, False, moved, "float64", width, ones, plain, plain, 7))


def test_one_row_with_any_stride(ranks: RankPool) -> None:
    """Torch calls a tensor of one element contiguous whatever its strides, and keeps them when it flattens it."""
    odd = torch.zeros(9).as_strided((1, 1), (7, 5))
    assert odd.is_contiguous()
    assert odd.view(-1).stride() == (5,)
    ranks.run(one_odd_row)


def special_views() -> None:
    """Views that conjugate or negate when they are read."""
    group = partition_group([range(4)])
    assert group is not None
    rank, name = dist.get_rank(group), str(group.group_name)
    z = torch.tensor([[1 + 2j, 3 - 4j]]) * (rank + 1)
    everyone = torch.cat([torch.tensor([[1 + 2j, 3 - 4j]]) * (r + 1) for r in range(4)])
    check(collectives.all_gather(z.conj(), name), everyone.conj().resolve_conj(), "conjugate")
    check(collectives.all_gather(z.conj().imag, name), (-everyone.imag).contiguous(), "negative")
    received = torch.zeros(1, 2, dtype=z.dtype)
    transfers.post([(z.conj(), (rank + 1) % 4)], [(received, (rank - 1) % 4)], name).wait()
    check(received, everyone[(rank - 1) % 4][None].conj().resolve_conj(), "conjugate, posted")


def test_lazy_views(ranks: RankPool) -> None:
    ranks.run(special_views)


def largest_of_some() -> list[float]:
    """One rank has NaN; one number; two parts of a group."""
    group = partition_group([range(4)])
    assert group is not None
    rank, name = dist.get_rank(group), str(group.group_name)
    values = torch.tensor([float("nan") if rank == 2 else rank, -1.0 - rank])
    largest = collectives.maximum(values, name)
    part = collectives.maximum(torch.tensor(float(rank)), sub_group_name(name, range(rank % 2, 4, 2)))
    assert part.shape == ()
    return [*largest.tolist(), part.item()]


def test_the_largest_is_the_same_everywhere(ranks: RankPool) -> None:
    for rank, (first, second, part) in enumerate(ranks.run(largest_of_some)):
        assert math.isnan(first)
        assert (second, part) == (-1.0, 2.0 + rank % 2)


def no_run_of_memory() -> str:
    group = partition_group([range(4)])
    assert group is not None
    with pytest.raises(InvalidValueError) as refused:
        transfers.post([], [(torch.zeros(4, 4).T[:, :2], 0)], str(group.group_name))
    return str(refused.value)


def test_a_receiver_with_gaps_is_refused(ranks: RankPool) -> None:
    assert all("strides [1, 4]; pass x.contiguous()" in message for message in ranks.run(no_run_of_memory))


def rolled_row() -> list[int]:
    """The packed shape ``[1, L]`` of labels."""
    group = partition_group([(1, 2, 3)])
    if group is None:
        return []
    handler = get_cp_handler_cls("local", "ring")(cp_group=group, qkv_format="thd", cu_seqlens_q=[0, 24])
    labels = torch.arange(24)[None]
    rolled, _ = handler.roll_tensor(handler.dispatch(labels, 1), -1, 1)
    return handler.combine(rolled, 1)[0].tolist()  # type: ignore[no-any-return]


def test_rolled_labels_of_one_packed_row(ranks: RankPool) -> None:
    assert ranks.run(rolled_row)[1:] == [[*range(1, 24), 0]] * 3


def few_keys() -> float:
    """(13, 6) query rows over (3, 1) keys: some ranks hold a single key row."""
    group = partition_group([range(4)])
    handler = get_cp_handler_cls("ulysses")(
        cp_group=group, qkv_format="thd", cu_seqlens_q=[0, 13, 19], cu_seqlens_kv=[0, 3, 4], mask=Full()
    )
    draw = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(n, 4, 8, generator=draw, dtype=torch.float64, requires_grad=True) for n in (19, 4, 4))
    local = [handler.dispatch(x, 0, stream=s) for x, s in zip((q, k, v), ("q", "kv", "kv"), strict=True)]
    out = handler.combine(handler.core_attn(None, *local), 0)
    grad = torch.randn(out.shape, generator=draw, dtype=torch.float64)
    got = torch.autograd.grad(out, (q, k, v), grad)
    parts = []
    for rows, keys in ((slice(0, 13), slice(0, 3)), (slice(13, 19), slice(3, 4))):
        weights = torch.softmax(torch.einsum("qnd,knd->nqk", q[rows], k[keys]) / 8**0.5, -1)
        parts.append(torch.einsum("nqk,knd->qnd", weights, v[keys]))
    dense = torch.cat(parts)
    wanted = torch.autograd.grad(dense, (q, k, v), grad)
    return max(float((a - b).abs().max()) for a, b in zip((out, *got), (dense, *wanted), strict=True))


def test_cross_attention_over_few_keys(ranks: RankPool) -> None:
    assert max(ranks.run(few_keys)) < 1e-10


def resharded() -> None:
    """One row, one head and one channel a rank: every message is one number with an odd stride."""
    group = partition_group([range(4)])
    assert group is not None
    rank, name = dist.get_rank(group), str(group.group_name)
    split, places = HeadSplit.of(4, 4, 4), torch.arange(4)
    order = SequenceOrder.over(places.numpy(), places.numpy(), 4, torch.device("cpu"))
    assert order.identity
    x = (torch.arange(4.0, dtype=torch.float64) + 10 * rank).as_strided((1, 1, 4, 1), (9, 7, 1, 3)).requires_grad_()
    (mine,) = gather_seq_scatter_heads([x], [split.queries], order, name)
    check(mine, torch.tensor([10.0 * r + rank for r in range(4)], dtype=torch.float64).view(1, 4, 1, 1), "to heads")
    (back,) = gather_heads_scatter_seq([mine * 2], split.queries, order, name)
    check(back, x.detach() * 2, "to tokens")
    grad = torch.ones(4, dtype=torch.float64).as_strided((1, 1, 4, 1), (5, 3, 1, 2))
    check(torch.autograd.grad(back, x, grad)[0], torch.full((1, 1, 4, 1), 2.0, dtype=torch.float64), "gradient")


def test_the_reshard_of_single_rows(ranks: RankPool) -> None:
    ranks.run(resharded)
