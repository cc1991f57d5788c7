"""Batches that are padded, documents with several rows per token, and the way back."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cphandler import InvalidTypeError, InvalidValueError, length_multiple, pack_documents, unpack_documents

SIZES = st.sampled_from([1, 2, 3, 4, 6, 8, 12])


@settings(max_examples=50, deadline=None)
@given(SIZES, SIZES, SIZES, SIZES)
def test_the_least_length_that_serves_all(cp_size: int, tp_size: int, fp8: int, page: int) -> None:
    got = length_multiple(cp_size=cp_size, tp_size=tp_size, fp8=fp8, page=page)

    def serves(tokens: int) -> bool:
        rows, rest = divmod(tokens, cp_size * tp_size)
        return not rest and rows % fp8 == 0 and tokens % page == 0

    assert serves(got)
    assert not any(serves(tokens) for tokens in range(1, got))


@pytest.mark.parametrize(
    ("factors", "told"),
    [
        (
            {"cp_size": 4, "tp_size": 4, "page": 1170},
            (
                "got cp_size 4 * tp_size 4 and page 1170: 9360, and at most 8192; "
                "drop page=1170, which leaves 16, or raise max_multiple"
            ),
        ),
        (
            {"cp_size": 8, "fp8": 128, "page": 256, "max_multiple": 512},
            (
                "got cp_size 8 * fp8 128 and page 256: 1024, and at most 512; "
                "drop fp8=128, which leaves 256, or raise max_multiple"
            ),
        ),
        (
            {"cp_size": 3, "max_multiple": 2},
            "got cp_size 3: 3, and at most 2; drop cp_size=3, which leaves 1, or raise max_multiple",
        ),
        (
            {"page": 9, "max_multiple": 8},
            "got page 9: 9, and at most 8; drop page=9, which leaves 1, or raise max_multiple",
        ),
    ],
)
def test_a_multiple_that_explodes(factors: dict[str, int], told: str) -> None:
    with pytest.raises(InvalidValueError, match=re.escape(told)):
        length_multiple(**factors)


def documents_of(lengths: list[int]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [
        {
            "tokens": torch.randint(1, 90, (n,), generator=generator),
            "target_mask": torch.rand(n, generator=generator) < 0.6,
            "hidden": torch.randn(n, 2, 3, generator=generator).to(torch.bfloat16),
            "weights": torch.rand(n, generator=generator, dtype=torch.float64),
        }
        for n in lengths
    ]


@pytest.mark.parametrize("lengths", [[5, 1, 0, 7], [4], [0], [1, 1, 1]])
@pytest.mark.parametrize("form", [{}, {"multiple_of": 4}, {"pad_to_multiple_of": 6}, {"token_budget": 40}], ids=str)
def test_rows_beside_tokens(lengths: list[int], form: dict[str, int]) -> None:
    documents = documents_of(lengths)
    batch = pack_documents(documents, pad_token=91, **form)
    assert "target_mask" not in batch
    back = {
        name: unpack_documents(
            batch[name], batch["cu_seqlens"], batch["cu_seqlens_padded"], num_documents=batch["num_documents"]
        )
        for name in ("tokens", "hidden", "weights", "labels", "loss_mask")
    }
    for i, document in enumerate(documents):
        for name in ("tokens", "hidden", "weights"):
            assert torch.equal(back[name][i], document[name])
            assert back[name][i].dtype == document[name].dtype
        for t, label in enumerate(back["labels"][i].tolist()):
            last = t + 1 == len(document["tokens"])
            wanted = document["tokens"][t + 1] if not last and document["target_mask"][t + 1] else -100
            assert label == wanted
            assert back["loss_mask"][i][t] == (wanted != -100)
    held = int(batch["cu_seqlens"][-1])
    assert len(batch["tokens"]) - held == int((batch["tokens"] == 91).sum())
    assert len(batch["tokens"]) % form.get("pad_to_multiple_of", 1) == 0
    assert float(batch["weights"].sum()) == pytest.approx(float(sum(d["weights"].sum() for d in documents)))


def test_the_end_of_a_batch_is_a_document() -> None:
    batch = pack_documents([torch.arange(5), torch.arange(3)], multiple_of=2, pad_to_multiple_of=8)
    assert batch["cu_seqlens"].tolist() == [0, 5, 8, 8]
    assert batch["cu_seqlens_padded"].tolist() == [0, 6, 10, 16]
    assert batch["position_ids"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    assert batch["num_documents"] == 2
    assert pack_documents([torch.arange(8)], pad_to_multiple_of=4)["cu_seqlens_padded"] is None


@pytest.mark.parametrize(
    ("documents", "options", "error", "told"),
    [
        ([torch.arange(3)], {"token_budget": 9, "pad_to_multiple_of": 4}, InvalidValueError, "make the budget 12"),
        ([{"tokens": torch.arange(3), "labels": torch.arange(3)}], {}, InvalidValueError, "target_mask says which"),
        ([{"ids": torch.arange(3)}], {}, InvalidTypeError, "document 0 must be a mapping with tokens"),
        ([{"tokens": torch.arange(3)}, torch.arange(2)], {}, InvalidTypeError, "document 1 must be a mapping"),
        ([{"tokens": torch.arange(3)}, {"tokens": torch.arange(2), "x": 1}], {}, InvalidTypeError, "document 1 must"),
        (
            [{"tokens": torch.arange(3), "x": torch.zeros(2)}],
            {},
            InvalidValueError,
            "x of document 0 must have a row for each token; got 2 rows for 3 tokens",
        ),
        (
            [{"tokens": torch.arange(1), "x": torch.zeros(1)}, {"tokens": torch.arange(1), "x": torch.zeros(1, 2)}],
            {},
            InvalidTypeError,
            "x of document 1 must be a tensor with a row for each token, of one dtype in all",
        ),
        ([{"tokens": torch.arange(1), "x": 3}], {}, InvalidTypeError, "x of document 0 must be a tensor"),
        ([{"tokens": torch.arange(1), "target_mask": torch.ones(1)}], {}, InvalidTypeError, "target_mask must be bool"),
    ],
)
def test_what_is_refused(documents: list[Any], options: dict[str, int], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=re.escape(told)):
        pack_documents(documents, **options)


def test_more_documents_than_there_are() -> None:
    with pytest.raises(InvalidValueError, match="fewer documents; got 3 of 2"):
        unpack_documents(torch.arange(4), [0, 1, 4], num_documents=3)
