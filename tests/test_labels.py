"""Labels of the next tokens, against a definition that knows no ranks."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cphandler import (
    InvalidTypeError,
    InvalidValueError,
    get_cp_handler_cls,
    next_token_labels,
    record_traffic,
    shift_labels,
)
from cphandler.testing import RankPool, partition_group

LAYOUTS = ("zigzag", "contiguous", "striped", "balanced")
LENGTHS = [13, 1, 6, 0, 2, 9]
SPLIT = {2: ((0, 2), (1, 3)), 3: ((1, 2, 3),), 4: ((0, 1, 2, 3),)}


def offsets(lengths: list[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def expected(ids: Tensor, starts: list[int], depth: int) -> Tensor:
    """Document by document, token by token."""
    labels = torch.full_like(ids, -100)
    for start, end in pairwise(starts):
        for t in range(start, end - depth):
            labels[t] = ids[t + depth]
    return labels


def packed(size: int, layout: str) -> None:
    group = partition_group(SPLIT[size])
    if group is None:
        return
    starts = offsets(LENGTHS)
    handler = get_cp_handler_cls("ring")(
        cp_group=group, qkv_format="thd", cu_seqlens_q=torch.tensor(starts), layout=layout
    )
    ids = torch.arange(7, 7 + starts[-1], dtype=torch.int32)
    local = handler.dispatch(ids, 0)
    single = next_token_labels(local, handler)
    assert single.dtype == torch.int64
    assert torch.equal(handler.combine(single, 0), expected(ids, starts, 1).long())
    pads = ~handler.valid_mask
    assert (single[pads] == -100).all()
    several = next_token_labels(local, handler, depths=3, ignore_index=-1)
    with record_traffic() as one:
        next_token_labels(local, handler)
    with record_traffic() as three:
        next_token_labels(local, handler, depths=3)
    assert three.messages <= one.messages + size, "one exchange, whatever the depths: only neighbours may be others"
    for depth in (1, 2, 3):
        wanted = expected(ids, starts, depth).long()
        wanted[wanted == -100] = -1
        assert torch.equal(handler.combine(several[depth - 1], 0), wanted)
    row = next_token_labels(local.unsqueeze(0), handler)
    assert torch.equal(row[0], single), "the packed shape of Megatron and Hugging Face"
    labels = shift_labels(ids.long(), starts)
    assert torch.equal(handler.dispatch(labels, 0, pad_value=-100), single)


def dense(size: int, form: str) -> None:
    group = partition_group(SPLIT[size])
    if group is None:
        return
    real = torch.tensor([[1] * 11, [0] * 4 + [1] * 7, [1] * 5 + [0] * 6, [1, 1, 0, 0, 1, 1, 1, 0, 0, 1, 1]]).bool()
    handler = get_cp_handler_cls("ring")(cp_group=group, qkv_format=form, max_seqlen_q=11, key_padding_mask=real)
    ids = torch.arange(44).view(4, 11)
    wanted = torch.full_like(ids, -100)
    for b in range(4):
        for t in range(10):
            if real[b, t] and real[b, t + 1]:
                wanted[b, t] = ids[b, t + 1]
    given, answer = (ids, wanted) if form == "bshd" else (ids.t(), wanted.t())
    dim = 1 if form == "bshd" else 0
    labels = next_token_labels(handler.dispatch(given, dim), handler)
    assert torch.equal(handler.combine(labels, dim), answer)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_next_token_of_the_same_document(ranks: RankPool, size: int) -> None:
    for layout in LAYOUTS:
        ranks.run(packed, size, layout)


@pytest.mark.parametrize("form", ["bshd", "sbhd"])
def test_padding_is_no_label(ranks: RankPool, form: str) -> None:
    ranks.run(dense, 3, form)


def test_one_rank_and_replicated() -> None:
    starts = offsets(LENGTHS)
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=torch.tensor(starts))
    ids = torch.arange(starts[-1])
    assert torch.equal(next_token_labels(ids, handler), expected(ids, starts, 1))
    shuffled = torch.roll(ids, -1)
    assert not torch.equal(next_token_labels(ids, handler), shuffled), "documents are kept apart"


def test_shifted_in_any_dim() -> None:
    labels = torch.arange(12).view(2, 6)
    assert shift_labels(labels, [0, 4, 6]).tolist() == [[1, 2, 3, -100, 5, -100], [7, 8, 9, -100, 11, -100]]
    assert torch.equal(shift_labels(labels.t(), [0, 4, 6], dim=0), shift_labels(labels, [0, 4, 6]).t())
    assert shift_labels(labels).tolist() == [[1, 2, 3, 4, 5, -100], [7, 8, 9, 10, 11, -100]]
    assert labels.tolist()[0] == [0, 1, 2, 3, 4, 5], "what was given stays"
    assert shift_labels(torch.empty(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ids": torch.ones(3)}, InvalidTypeError, "ids must be integers; got torch.float32"),
        ({"depths": True}, InvalidTypeError, "depths must be an int; got True"),
        ({"depths": 0}, InvalidValueError, "depths must be at least 1; got 0"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 3]))
    with pytest.raises(error, match=re.escape(message)):
        next_token_labels(**{"ids": torch.arange(3), "handler": handler, **options})


def test_offsets_that_end_early() -> None:
    with pytest.raises(InvalidValueError, match="offsets must end at the number of tokens; got 4, and 6 tokens"):
        shift_labels(torch.arange(6), [0, 4])


@pytest.mark.parametrize(("page", "least"), [("training.md", 7), ("rl.md", 4)])
def test_the_pages(page: str, least: int) -> None:
    text = (Path(__file__).parent.parent / "docs" / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= least
    exec("\n".join(blocks), {})
