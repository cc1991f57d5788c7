"""The attention law: every backend equals the dense float64 reference, forward and all gradients."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from cphandler import Layout
from cphandler.testing import RankPool, assert_close, dense_attention, visible_pairs
from cphandler.testing.cases import Batch, Case, group_of, make_handler
from cphandler.testing.laws import check_all, check_attention, check_gradients_of_movement, check_roll
from cphandler.tokens.documents import Documents
from cphandler.tokens.masks import Bands, Causal, Full, SlidingWindow
from tests.sweeps import half

MASKS = (Causal(), Full(), SlidingWindow(3), SlidingWindow(4, 2))
PACKED = (
    Batch((13, 3, 6, 1, 9)),
    Batch((1,)),
    Batch((0, 5, 0)),
    Batch((40,)),
    Batch((7, 0, 9), padded=(8, 4, 16)),
    Batch((2, 1, 1)),
    Batch((0, 0)),
)
DENSE = (
    Batch((11,)),
    Batch((1,)),
    Batch((2,), rows=3),
    Batch((0,)),
    Batch((5,), rows=0),
    Batch(real=("xxxxxxxxx", "xxxxx....", "....xxxxx", "xx..xx.xx", ".........")),
)
BACKENDS = {"ulysses": ("contiguous", "zigzag", "striped"), "ring": ("zigzag", "contiguous", "striped")}
BACKENDS["p2p"] = BACKENDS["all_gather"] = BACKENDS["ring"]
BACKENDS["usp"] = ("zigzag", "contiguous")
SERVED = [(backend, layout) for backend, layouts in BACKENDS.items() for layout in layouts]


def cases(**fixed: object) -> list[Case]:
    batches = PACKED if fixed["qkv_format"] == "thd" else DENSE
    made = [Case(**fixed, mask=mask, batch=batch) for mask in MASKS for batch in batches]  # type: ignore[arg-type]
    if fixed["cp_size"] == 3 and fixed["backend"] in ("ulysses", "usp"):
        made = [Case(**{**vars(case), "heads": (6, 2)}) for case in made]
    return made


@pytest.mark.parametrize(("served", "qkv_format", "cp_size"), half(SERVED, ["thd", "sbhd", "bshd"], [1, 2, 3, 4]))
def test_equals_the_dense_reference(ranks: RankPool, served: tuple[str, str], qkv_format: str, cp_size: int) -> None:
    backend, layout = served
    ranks.run(check_all, cases(backend=backend, layout=layout, qkv_format=qkv_format, cp_size=cp_size))


@pytest.mark.slow
@pytest.mark.parametrize("qkv_format", ["thd", "sbhd", "bshd"])
@pytest.mark.parametrize(("backend", "layout"), SERVED)
def test_equals_the_dense_reference_on_eight_ranks(
    eight_ranks: RankPool, backend: str, layout: str, qkv_format: str
) -> None:
    made = cases(backend=backend, layout=layout, qkv_format=qkv_format, cp_size=8)
    eight_ranks.run(check_all, [Case(**{**vars(case), "heads": (8, 2)}) for case in made])


@pytest.mark.parametrize("qkv_format", ["thd", "sbhd", "bshd"])
def test_local_backend(ranks: RankPool, qkv_format: str) -> None:
    made = cases(backend="local", layout=None, qkv_format=qkv_format, cp_size=1)
    ranks.run(check_all, made + [Case(**{**vars(case), "kernel": "reference"}) for case in made])


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(ranks: RankPool, backend: str, dtype: torch.dtype) -> None:
    batch = Batch((130, 61, 9))
    made = [
        Case(backend=backend, cp_size=4, dtype=dtype, mask=mask, batch=batch, lse=lse)
        for mask in MASKS
        for lse in (False, True)
    ]
    ranks.run(check_all, made)


def custom_layouts(seed: int) -> None:
    """Attention and movement on layouts that callers build: any order of pieces, gaps, pads, interleaved strides."""
    for cp_size in (2, 4):
        group, _ = group_of(Case(cp_size=cp_size))
        for kind in ("pieces", "stripes"):
            for trial in range(3):
                rng = np.random.default_rng([seed, cp_size, trial])
                rows = int(rng.integers(cp_size, 30))
                layout = random_pieces(rng, rows, cp_size) if kind == "pieces" else random_stripes(rng, rows, cp_size)
                cuts = sorted({0, rows, *rng.integers(0, rows, 3).tolist()})
                lengths = tuple(np.diff(cuts).tolist())
                for backend in ("ring", "p2p", "all_gather", "ulysses", *(["usp"] if kind == "pieces" else [])):
                    mask = MASKS[int(rng.integers(len(MASKS)))]
                    settings = (("ulysses_degree", (1, 2)[trial % 2]),) if backend == "usp" else ()
                    case = Case(backend, cp_size, layout=layout, mask=mask, batch=Batch(lengths), config=settings)
                    check_attention(case)
                check_gradients_of_movement(Case("ring", cp_size, layout=layout, batch=Batch(lengths)))
                check_roll(Case("ring", cp_size, layout=layout, batch=Batch(lengths)))
                assert (make_handler(case, group).dispatch(torch.arange(rows), 0, pad_value=-1) >= -1).all()


def random_pieces(rng: np.random.Generator, rows: int, cp_size: int) -> Layout:
    """Runs of tokens on random ranks, in a random local order with pad rows between them."""
    cuts = sorted({0, rows, *rng.integers(0, rows, 6).tolist()})
    spans: list[list[tuple[int, int, int, int]]] = [[] for _ in range(cp_size)]
    ends = [0] * cp_size
    pieces = [(a, b - a) for a, b in pairwise(cuts)]
    for i in rng.permutation(len(pieces)).tolist():
        rank = int(rng.integers(cp_size))
        local = ends[rank] + int(rng.integers(0, 3))
        spans[rank].append((pieces[i][0], pieces[i][1], 1, local))
        ends[rank] = local + pieces[i][1]
    return Layout("pieces", rows, [sorted(s) for s in spans], num_local_tokens=max(ends) + 1)


def random_stripes(rng: np.random.Generator, rows: int, cp_size: int) -> Layout:
    """Several residues a rank, so that a rank's own spans interleave."""
    stride = 2 * cp_size + 1
    spans: list[list[tuple[int, int, int]]] = [[] for _ in range(cp_size)]
    for residue, rank in enumerate(rng.integers(0, cp_size, stride).tolist()):
        if residue < rows:
            spans[rank].append((residue, -(-(rows - residue) // stride), stride))
    return Layout("stripes", rows, spans)


@pytest.mark.parametrize("seed", half([0, 1]))
def test_layouts_that_callers_build(ranks: RankPool, seed: int) -> None:
    ranks.run(custom_layouts, seed)


def test_user_bands(ranks: RankPool) -> None:
    inf = float("inf")
    mask = Bands([(0, 9, 0, 9, -inf, 0), (9, 20, 0, 4, -inf, inf), (9, 20, 9, 20, -5, 2)])
    made = [
        Case(backend=backend, cp_size=cp_size, mask=mask, batch=Batch((12, 8)), layout=layout)
        for backend, layout in SERVED
        for cp_size in (2, 4)
    ]
    ranks.run(check_all, made)


@pytest.mark.parametrize("cp_size", [*(pytest.param(size, marks=pytest.mark.slow) for size in (2, 3)), 4])
def test_more_ranks_than_tokens_and_ranks_that_hold_nothing(ranks: RankPool, cp_size: int) -> None:
    """Documents of length 0 and 1, whole documents on one rank, rows that see nothing: right, and no hang."""
    heads = (6, 3) if cp_size == 3 else (4, 2)
    nothing = Bands([(0, 2, 3, 4, 0, 9)])
    made = [
        Case(
            backend, cp_size, layout=layout, mask=mask, batch=Batch(lengths), heads=heads, sinks=sinks, max_logit=sinks
        )
        for backend, layout in SERVED
        for mask, lengths in (
            (Causal(), (1,)),
            (Full(), (0, 1, 0, 1)),
            (Full(), (0,)),
            (nothing, (4,)),
            (SlidingWindow(0), (3, 2)),
            (Bands([]), (5,)),
        )
        for sinks in (False, True)
    ]
    ranks.run(check_all, made)


def test_the_law_can_fail() -> None:
    """A reference with one pair more must not be met: the tolerance is tight enough to see a single key."""

    q, k, v = (torch.randn(64, 2, 8, dtype=torch.float64) for _ in range(3))
    seen = visible_pairs(Causal(), Documents.dense(64))
    more = seen.clone()
    more[10, 11] = True
    right, _ = dense_attention(q, k, v, seen, qkv_format="thd")
    wrong, _ = dense_attention(q, k, v, more, qkv_format="thd")
    for dtype in (torch.float64, torch.float32):
        with pytest.raises(AssertionError, match="relative L2 error"):
            assert_close(wrong, right, dtype=dtype)
