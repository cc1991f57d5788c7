"""The attention law: every backend equals the dense float64 reference, forward and all gradients."""

from __future__ import annotations

import pytest
import torch

from cphandler.mask import Bands, Causal, Full, SlidingWindow
from cphandler.sequence import Documents
from cphandler.testing import RankPool, assert_close, dense_attention, visible_pairs
from tests.laws import Batch, Case, check_all

MASKS = (Causal(), Full(), SlidingWindow(3), SlidingWindow(4, 2))
PACKED = (
    Batch((13, 3, 6, 1, 9)),
    Batch((1,)),
    Batch((0, 5, 0)),
    Batch((40,)),
    Batch((7, 0, 9), padded=(8, 4, 16)),
    Batch((2, 1, 1)),
)
DENSE = (
    Batch((11,)),
    Batch((1,)),
    Batch(real=("xxxxxxxxx", "xxxxx....", "....xxxxx", "xx..xx.xx", ".........")),
)
BACKENDS = {"ulysses": ("contiguous", "zigzag", "striped"), "ring": ("zigzag", "contiguous", "striped")}
BACKENDS["all_gather"] = BACKENDS["ring"]
SERVED = [(backend, layout) for backend, layouts in BACKENDS.items() for layout in layouts]


def cases(**fixed: object) -> list[Case]:
    batches = PACKED if fixed["qkv_format"] == "thd" else DENSE
    made = [Case(**fixed, mask=mask, batch=batch) for mask in MASKS for batch in batches]  # type: ignore[arg-type]
    if fixed["cp_size"] == 3 and fixed["backend"] == "ulysses":
        made = [Case(**{**vars(case), "heads": (6, 2)}) for case in made]
    return made


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("qkv_format", ["thd", "sbhd", "bshd"])
@pytest.mark.parametrize(("backend", "layout"), SERVED)
def test_equals_the_dense_reference(ranks: RankPool, backend: str, layout: str, qkv_format: str, cp_size: int) -> None:
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


HEADS = [(8, 8), (8, 2), (8, 1), (12, 6), (12, 4), (28, 4), (7, 7)]


@pytest.mark.parametrize("cp_size", [2, 3, 4])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_head_counts(ranks: RankPool, heads: tuple[int, int], cp_size: int) -> None:
    backends = ["ring", "all_gather"] + (["ulysses"] if heads[0] % cp_size == 0 else [])
    made = [
        Case(backend=b, cp_size=cp_size, heads=heads, batch=Batch((17, 6)), lse=lse)
        for b in backends
        for lse in (False, True)
    ]
    ranks.run(check_all, made)


@pytest.mark.parametrize("backend", ["ring", "all_gather", "ulysses"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(ranks: RankPool, backend: str, dtype: torch.dtype) -> None:
    made = [
        Case(backend=backend, cp_size=4, dtype=dtype, mask=mask, batch=Batch((130, 61, 9)), lse=False) for mask in MASKS
    ]
    ranks.run(check_all, made)


def test_user_bands(ranks: RankPool) -> None:
    inf = float("inf")
    mask = Bands([(0, 9, 0, 9, -inf, 0), (9, 20, 0, 4, -inf, inf), (9, 20, 9, 20, -5, 2)])
    made = [
        Case(backend=backend, cp_size=cp_size, mask=mask, batch=Batch((12, 8)), layout=layout)
        for backend, layout in SERVED
        for cp_size in (2, 4)
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
