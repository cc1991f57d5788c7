"""dispatch, combine, roll_tensor, rope and the read-only facts, on every layout and format."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from cphandler import Layout, get_cp_handler_cls
from cphandler.testing import RankPool, assert_close
from cphandler.testing.cases import Batch, Case, group_of, make_handler
from cphandler.testing.laws import (
    check_attention,
    check_facts,
    check_gradients_of_movement,
    check_roll,
    check_rope,
    check_round_trip,
)
from tests.sweeps import one_in

LAYOUTS = ("zigzag", "contiguous", "striped")
PACKED = (
    Batch((13, 3, 6, 1, 9)),
    Batch((1,)),
    Batch((0, 5, 0)),
    Batch((40,)),
    Batch((7, 0, 9), padded=(8, 4, 16)),
    Batch((2, 1)),
    Batch((0,)),
)
DENSE = (Batch((11,)), Batch((16,)), Batch((1,)))
PADDED = (Batch(real=("xxxxxxxxx", "xxxxx....", "....xxxxx", "xx..xx.xx", ".........")),)


def cases(qkv_format: str, cp_size: int, layout: str) -> list[Case]:
    batches = PACKED if qkv_format == "thd" else DENSE + PADDED
    backend = "ring" if cp_size > 1 else "local"
    return [Case(backend, cp_size, qkv_format, layout, batch=batch) for batch in batches]


def run_each(made: list[Case]) -> None:
    """Every law of this file over many cases, on the ranks."""
    for case in made:
        try:
            check_round_trip(case)
            check_gradients_of_movement(case)
            check_roll(case)
            check_facts(case)
            if sum(case.batch.lengths) or case.batch.real:
                check_rope(case)
        except Exception as error:
            raise AssertionError(f"case {case}") from error


@pytest.mark.parametrize(("layout", "qkv_format", "cp_size"), one_in(4, LAYOUTS, ["thd", "sbhd", "bshd"], [1, 2, 3, 4]))
def test_movement(ranks: RankPool, layout: str, qkv_format: str, cp_size: int) -> None:
    ranks.run(run_each, cases(qkv_format, cp_size, layout))


@pytest.mark.slow
@pytest.mark.parametrize("qkv_format", ["thd", "sbhd", "bshd"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_movement_on_eight_ranks(eight_ranks: RankPool, layout: str, qkv_format: str) -> None:
    eight_ranks.run(run_each, cases(qkv_format, 8, layout))


EMPTY = (Layout("rows", 0, [[], []], num_local_tokens=3), Layout("nothing", 0, [[], []]))
LOPSIDED = (
    Layout("one has all", 5, [[(0, 5, 1)], []], num_local_tokens=6),
    Layout("the other has all", 5, [[], [(0, 5, 1, 2)]], num_local_tokens=8),
)


def no_tokens() -> None:
    """Rows without tokens hold what they are told to, forward and backward, whatever memory held before."""
    group, _ = group_of(Case(cp_size=2))
    for layout in EMPTY:
        rows = layout.num_local_tokens
        handler = make_handler(Case("ring", 2, layout=layout, batch=Batch(())), group)
        for dtype in (torch.float32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16):
            for shape, dim in (((0, 2000), 0), ((40, 0, 50), 1), ((0, 0), 0)):
                torch.full((40, rows, 50), float("nan"))  # what unwritten memory would show
                local = handler.dispatch(torch.empty(shape, dtype=dtype), dim, pad_value=1)
                expected = torch.ones(*shape[:dim], rows, *shape[dim + 1 :])
                assert torch.equal(local.to(torch.complex64), expected.to(torch.complex64)), f"{dtype} {shape}"
                whole = handler.combine(local, dim)
                assert (whole.shape, whole.dtype) == (shape, dtype)
                rolled, total = handler.roll_tensor(local, -1, dim, fill_value=1, return_sum=dtype == torch.int64)
                assert torch.equal(rolled.to(torch.complex64), expected.to(torch.complex64)), f"{dtype} {shape}"
                assert total is None or total == expected.sum()
        for grad in ("replicated", "sum", "scaled"):
            local = torch.ones(2, rows, 2000, requires_grad=True)
            torch.full((2, rows, 2000), float("nan"))
            handler.combine(local, 1, grad=grad).sum().backward()
            assert torch.equal(local.grad, torch.zeros(2, rows, 2000)), grad


def rows_of_nobody() -> None:
    """All laws where there is nothing to hold, and where one rank holds nothing."""
    for layouts, lengths in ((EMPTY, ()), (EMPTY, (0, 0)), (LOPSIDED, (5,)), (LOPSIDED, (2, 0, 3))):
        run_each([Case("ring", 2, layout=layout, batch=Batch(lengths)) for layout in layouts])
        for layout in layouts:
            for backend in ("ring", "p2p", "all_gather", "ulysses"):
                check_attention(Case(backend, 2, layout=layout, batch=Batch(lengths), sinks=True, max_logit=True))


def dims_of_nothing() -> None:
    """Other dims may have size 0, forward and backward."""
    group, _ = group_of(Case(cp_size=2))
    handler = make_handler(Case("ring", 2, batch=Batch((3, 2))), group)
    for shape, dim in (((5, 0), 0), ((0, 5), 1), ((2, 5, 0), -2)):
        x = torch.zeros(shape, requires_grad=True)
        for grad in ("replicated", "sum", "scaled"):
            rolled, _ = handler.roll_tensor(handler.dispatch(x, dim), -1, dim)
            whole = handler.combine(rolled, dim, grad=grad)
            assert whole.shape == shape
            whole.sum().backward()
            assert x.grad.shape == shape


@pytest.mark.parametrize("law", [no_tokens, rows_of_nobody, dims_of_nothing])
def test_nothing_to_hold(ranks: RankPool, law: Callable[[], None]) -> None:
    ranks.run(law)


GOLDENS = [
    # (cp_size, valid offsets, physical offsets, per rank: local rows and the same rolled by -1)
    (1, [0, 3, 5], None, [([1, 2, 3, 4, 5], [2, 3, 0, 5, 0])]),
    (1, [0, 3, 8], None, [([1, 2, 3, 4, 5, 6, 7, 8], [2, 3, 0, 5, 6, 7, 8, 0])]),
    (
        2,
        [0, 8, 20],
        None,
        [
            ([1, 2, 7, 8, 11, 12, 13, 20, 21, 22], [2, 3, 8, 0, 12, 13, 14, 21, 22, 0]),
            ([3, 4, 5, 6, 14, 15, 16, 17, 18, 19], [4, 5, 6, 7, 15, 16, 17, 18, 19, 20]),
        ],
    ),
    (
        2,
        [0, 7, 18],
        [0, 8, 20],
        [
            ([1, 2, 7, 0, 11, 12, 13, 20, 21, 0], [2, 3, 0, 0, 12, 13, 14, 21, 0, 0]),
            ([3, 4, 5, 6, 14, 15, 16, 17, 18, 19], [4, 5, 6, 7, 15, 16, 17, 18, 19, 20]),
        ],
    ),
]


def golden(cp_size: int, cu: list[int], padded: list[int] | None, rows: list[tuple[list[int], list[int]]]) -> None:

    group, seed = group_of(Case(cp_size=cp_size))
    if seed < 0:
        return
    backend = "ring" if cp_size > 1 else "local"
    handler = get_cp_handler_cls(backend)(cp_group=group, qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_q_padded=padded)
    before, after = rows[handler.cp_rank]
    rolled, total = handler.roll_tensor(torch.tensor(before))
    assert rolled.tolist() == after
    assert total.item() == sum(after)


@pytest.mark.parametrize("case", GOLDENS, ids=["one rank", "odd lengths", "zigzag", "padded offsets"])
def test_packed_roll_as_megatron_gives_it(ranks: RankPool, case: tuple) -> None:  # type: ignore[type-arg]
    ranks.run(golden, *case)


def test_roll_of_nothing_and_without_sum() -> None:
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 3, 5])
    assert handler.roll_tensor(None) == (None, None)
    x = torch.tensor([1.0, 2, 3, 4, 5])
    assert handler.roll_tensor(x, return_sum=False)[1] is None
    assert handler.roll_tensor(x, shifts=1)[0].tolist() == [0, 1, 2, 0, 4]
    assert handler.roll_tensor(x.to(torch.bool))[1].item() == 3


@pytest.mark.parametrize("cp_size", [2, 3, 4])
def test_roll_passes_gradcheck(ranks: RankPool, cp_size: int) -> None:
    ranks.run(roll_gradcheck, cp_size)


def roll_gradcheck(cp_size: int) -> None:
    """Finite differences need every rank to move one element of one rank at a time, in step."""

    case = Case("ring", cp_size, batch=Batch((5, 1, 4)))
    group, seed = group_of(case)
    if seed < 0:
        return
    handler = make_handler(case, group)

    def whole(x: torch.Tensor) -> torch.Tensor:
        local = handler.dispatch(x, 0)
        return handler.combine(handler.roll_tensor(local, -1, 0)[0], 0)

    x = torch.randn(10, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(whole, (x,))


def test_one_rank_moves_nothing() -> None:
    handler = get_cp_handler_cls("local")(qkv_format="sbhd", max_seqlen_q=6)
    x = torch.randn(6, 2)
    assert handler.dispatch(x, 0) is x
    assert handler.combine(x, 0) is x
    assert handler.group is None
    assert handler.num_local_tokens == 6


def test_megatrons_name_for_rope_reads_the_config() -> None:

    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 4, 6])
    x = torch.randn(6, 2, 8, dtype=torch.float64)
    angles = torch.randn(6, 4, dtype=torch.float64)
    table = torch.cat([angles, angles], -1)
    assert torch.equal(handler.apply_rotary_pos_emb(x, table), handler.rope(x, table))
    paired = table.view(6, 2, 4).transpose(1, 2).reshape(6, 8)
    interleaved = SimpleNamespace(rotary_interleaved=True)
    assert torch.equal(handler.apply_rotary_pos_emb(x, paired, interleaved), handler.rope(x, paired, interleaved=True))
    latent = SimpleNamespace(multi_latent_attention=True)
    taken_apart = torch.cat([x[..., 0::2], x[..., 1::2]], -1)
    assert torch.equal(handler.apply_rotary_pos_emb(x, table, latent), handler.rope(taken_apart, table))
    yarn = SimpleNamespace(rope_type="yarn", rotary_scaling_factor=40.0, mscale=1.0, mscale_all_dim=0.0)
    scaled = handler.apply_rotary_pos_emb(x, table, yarn)
    factor = 0.1 * torch.log(torch.tensor(40.0, dtype=torch.float64)) + 1
    torch.testing.assert_close(scaled, handler.rope(x, table) * factor)


def test_rope_keeps_a_float64_table() -> None:
    """Angles of late positions lose all their digits in float32."""
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 8])
    x = torch.randn(8, 2, 8)
    angles = (torch.arange(8)[:, None] + 10_000_000) * torch.rand(4, dtype=torch.float64)
    table = torch.cat([angles, angles], -1)
    expected = handler.rope(x.double(), table)
    assert_close(handler.rope(x, table), expected, what="rope from angles")
    assert_close(handler.rope(x, (table.cos(), table.sin())), expected, what="rope from cos and sin")


def test_rope_in_bfloat16_computes_in_float32() -> None:
    handler = get_cp_handler_cls("local")(qkv_format="sbhd", max_seqlen_q=512)
    x = torch.randn(512, 1, 2, 16)
    angles = torch.arange(512)[:, None] * (10000.0 ** -(torch.arange(8) / 8))
    table = torch.cat([angles, angles], -1)
    exact = handler.rope(x.bfloat16().float(), table)
    rounded = handler.rope(x.bfloat16(), table)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded, exact.bfloat16(), rtol=0, atol=0)
