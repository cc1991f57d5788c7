"""Rows of a dense batch that differ: a mask of one per row, padded or not; of a batch and of a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cphandler import (
    AcrossDocuments,
    Balanced,
    Causal,
    Chunked,
    Full,
    InvalidValueError,
    Mask,
    PerDocument,
    PrefixLM,
    PrefixTree,
    SharedQuestion,
    SlidingWindow,
    gather_last_tokens,
    get_cp_handler_cls,
    reduce_token_loss,
    scatter_last_tokens,
    token_count,
)
from cphandler.testing import RankPool, assert_close, dense_attention, visible_pairs
from cphandler.testing.cases import Batch, Case, group_of, make_handler
from cphandler.testing.laws import check_all
from cphandler.tokens.documents import Documents

REAL = ("xxxxxxxxxxx", "xxxxxxx....", "....xxxxxxx", "xx..xxx..xx", "...........")
DIFFERENT = PerDocument(
    (Causal(), Full(), Chunked(3, "first_valid"), SlidingWindow(2, 1), PrefixTree((-1, 0, 0), (5, 3, 3)))
)
BACKENDS = ["ring", "p2p", "all_gather", "local/a2a", "local/a2a+p2p"]


def cases() -> list[Case]:
    padded, plain = Batch(real=REAL), Batch((11,), rows=5)
    trees = PerDocument((PrefixTree((-1, 0, 1, 0), (3, 2, 4, 2)), SharedQuestion((4, 3)), Causal()))
    made = [
        Case("local", 1, "bshd", mask=DIFFERENT, batch=plain),
        Case("local", 1, "sbhd", mask=DIFFERENT, batch=padded),
    ]
    for i, backend in enumerate(BACKENDS):
        form, other = ("bshd", "sbhd") if i % 2 else ("sbhd", "bshd")
        layout = "balanced" if i == 1 else None
        made += [
            Case(backend, 4, form, layout, DIFFERENT, plain),
            Case(backend, 2, other, layout, DIFFERENT, padded, sinks=True, dropout_p=0.2, max_logit=True),
            Case(backend, 2, form, mask=PrefixLM((7, 0, 2)), batch=Batch((9,), rows=3)),
            Case(backend, 4, other, mask=trees, batch=Batch((11,), rows=3)),
        ]
    made += [
        Case("p2p", 3, "sbhd", mask=SharedQuestion(((2, 3), (4, 1, 1))), batch=Batch((8,), rows=2), heads=(6, 3)),
        Case("ring", 2, "bshd", mask=Chunked(4, "first_valid"), batch=padded),
        Case("p2p", 4, "bshd", "balanced", Chunked(4, "first_valid"), padded),
        Case("all_gather", 2, "sbhd", mask=AcrossDocuments(Chunked(4, "first_valid")), batch=padded),
        Case("ring", 2, "sbhd", mask=PerDocument((Full(), Causal("top_left"))), batch=Batch((7,), rows=2, keys=(12,))),
        Case(
            "p2p",
            2,
            "bshd",
            mask=PerDocument((Full(),) * 4 + (Causal("bottom_right"),)),
            batch=Batch((7,), keys=(11,), real=REAL),
        ),
    ]
    return made


def test_masks_of_one_per_row(ranks: RankPool) -> None:
    ranks.run(check_all, cases())


def facts() -> None:
    group, _ = group_of(Case(cp_size=4))
    handler = get_cp_handler_cls("ring")(
        cp_group=group, qkv_format="bshd", max_seqlen_q=10, mask=PerDocument((Causal(), Full()))
    )
    pads = handler.dispatch(torch.ones(10), 0) == 0
    assert torch.equal(handler.valid_mask, ~pads.expand(2, -1))
    assert handler.position_ids.dim() == 1
    tokens = torch.arange(20).view(2, 10)
    rolled, _ = handler.roll_tensor(handler.dispatch(tokens, 1), -1, 1)
    expected = torch.where(torch.arange(10) == 9, 0, tokens + 1)
    assert torch.equal(handler.combine(rolled, 1), expected)


def test_facts_of_rows(ranks: RankPool) -> None:
    ranks.run(facts)


def masks_of_calls() -> None:
    """Over a handler of three rows, any mask; over one that knows no rows, one for all of them or a refusal by name."""
    batch = Batch((11,), rows=3)
    case = Case("p2p", 4, "bshd", mask=PerDocument((Causal(), Full(), Causal())), batch=batch, lse=False)
    group, seed = group_of(case)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(3, 11, n, 8, generator=generator, dtype=torch.float64) for n in (4, 2, 2))
    real = torch.tensor([[True] * 11, [False] * 4 + [True] * 7, [True] * 9 + [False] * 2])
    rows = {
        "by the mask": (make_handler(case, group), torch.ones_like(real)),
        "by the padding": (make_handler(case, group, mask=Causal(), key_padding_mask=real), real),
        "no rows": (make_handler(case, group, mask=Causal()), torch.ones_like(real)),
    }
    per_row: list[Mask] = [PerDocument((SlidingWindow(2), Full(), Chunked(3, "first_valid"))), PrefixLM((9, 0, 3))]
    for_all: list[Mask] = [Causal(), PerDocument((Full(),)), AcrossDocuments(SlidingWindow(3)), PrefixLM((4,))]
    for name, (handler, tokens) in rows.items():
        documents = Documents.from_attention_mask(tokens)
        local = [handler.dispatch(x, 1) for x in (q, k, v)]
        for mask in [*for_all, *([] if name == "no rows" else per_row)]:
            every = PerDocument((mask,) * 3) if mask in for_all else mask
            seen = visible_pairs(every, documents).view(3, 11, 3, 11).diagonal(dim1=0, dim2=2).movedim(-1, 0)
            expected = dense_attention(q, k, v, seen, qkv_format="bshd")[0]
            out = handler.core_attn(None, *local, mask=mask)
            assert_close(out, handler.dispatch(expected, 1), what=f"{mask} of a call, rows {name}")
        refused: list[tuple[Mask, str]] = [(PerDocument((Causal(), Full())), "got 2 for 3 documents")]
        if name == "no rows":
            refused = [
                (PerDocument((Causal(), Full())), "got 2 for 1 documents"),
                (per_row[1], "got 3 for 1 documents"),
            ]
        for mask, message in refused:
            with pytest.raises(InvalidValueError, match=f"{message}; give one per document; .*rows of a dense batch"):
                handler.core_attn(None, *local, mask=mask)


def test_masks_of_calls(ranks: RankPool) -> None:
    ranks.run(masks_of_calls)


def make(**arguments: Any) -> Any:
    return get_cp_handler_cls("local")(**{"qkv_format": "sbhd", "max_seqlen_q": 6, **arguments})


def test_rows_that_do_not_match_are_refused() -> None:
    three = PerDocument((Causal(), Full(), Causal()))
    with pytest.raises(InvalidValueError, match="needs one mask per document; got 3 for 2 documents; give one"):
        make(mask=three, key_padding_mask=torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(InvalidValueError, match="got 3 for 2 documents"):
        get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 3, 6], mask=three)
    x = torch.zeros(6, 2, 2, 8)
    with pytest.raises(InvalidValueError, match=r"of the 3 rows that the handler's masks have; got \[2, 2, 2\]"):
        make(mask=three).core_attn(None, x, x, x)
    with pytest.raises(InvalidValueError, match=r"got shape \[6\] .*; pass \[B, L, ...\] or \[L, B, ...\] with B = 3"):
        make(mask=three).roll_tensor(torch.zeros(6), -1, 0)
    with pytest.raises(InvalidValueError, match="got 3 for 1 documents"):
        make(layout=Balanced({three: 1}))
    with pytest.raises(
        InvalidValueError, match=r"do not sum to the length of document 0; .* of documents 1 of a PerDocument"
    ):
        make(mask=PerDocument((Causal(), PrefixTree((-1,), (5,)))))


def test_a_mask_of_one_is_for_all_rows() -> None:
    """As it was before masks could have one for each."""
    handler = make(mask=PerDocument((Full(),)))
    assert handler.valid_mask.shape == (6,)
    for rows in (1, 4):
        q = torch.randn(6, rows, 2, 8, dtype=torch.float64)
        expected = dense_attention(q, q, q, torch.ones(6, 6, dtype=torch.bool), qkv_format="sbhd")[0]
        assert_close(handler.core_attn(None, q, q, q), expected)


def test_no_rows_at_all() -> None:
    handler = make(mask=PerDocument(()))
    x = torch.zeros(6, 0, 2, 8)
    assert handler.core_attn(None, x, x, x).shape == (6, 0, 2, 8)
    assert handler.valid_mask.shape == (0, 6)


def test_a_callable_is_given_the_mask_of_all_rows() -> None:
    mask = PerDocument((Causal(), Full()))
    told = []

    def own(q: torch.Tensor, *_: Any, **told_of: Any) -> torch.Tensor:
        told.append(told_of["mask"])
        return q

    x = torch.randn(6, 2, 2, 8)
    make(mask=mask).core_attn(own, x, x, x)
    assert told == [mask]


@pytest.mark.parametrize("form", ["bshd", "sbhd"])
def test_functions_around_attention_take_the_rows_of_the_batch(form: str) -> None:
    """Neither one row for all nor more rows than there are, which broadcasting would make something of."""
    handler = get_cp_handler_cls("local")(
        qkv_format=form, max_seqlen_q=5, key_padding_mask=torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    )

    def rows(count: int) -> torch.Tensor:
        labels = torch.zeros(count, 5, dtype=torch.int64)
        return labels if form == "bshd" else labels.T

    assert int(token_count(rows(2), handler)) == 8
    assert scatter_last_tokens(torch.ones(2), handler).sum() == 2
    for count in (1, 3):
        for call in (
            lambda: token_count(rows(count), handler),  # noqa: B023
            lambda: reduce_token_loss(rows(count).float(), rows(count) >= 0, handler),  # noqa: B023
            lambda: gather_last_tokens(rows(count).float(), handler),  # noqa: B023
            lambda: scatter_last_tokens(torch.ones(count), handler),  # noqa: B023
        ):
            with pytest.raises(InvalidValueError, match="must have the 2 rows of the batch"):
                call()
