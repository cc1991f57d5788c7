"""CUDA graphs: dense batches go in, what would replay one batch's documents for another is refused by name."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch

from cphandler import UnsupportedError, get_cp_handler_cls
from cphandler.attention import attention, loop
from cphandler.handler import layout_handler
from cphandler.testing import RankPool, partition_group


def call(handler: Any) -> torch.Tensor:
    rows = handler.num_local_tokens
    shape = (rows, 2, 16) if handler.qkv_format == "thd" else (1, rows, 2, 16)
    return handler.core_attn(None, *(torch.randn(shape) for _ in range(3)))


def captured() -> Any:
    return mock.patch.multiple(attention, CAPTURED="cpu", is_capturing=lambda: True)


@pytest.mark.parametrize("backend", ["local", "ring", "p2p", "all_gather", "ulysses"])
def test_packed_batches_are_refused_by_name(backend: str) -> None:
    handler = get_cp_handler_cls(backend)(qkv_format="thd", cu_seqlens_q=[0, 5, 12])
    call(handler)
    with captured(), pytest.raises(UnsupportedError, match="Handler: a CUDA graph of this batch would replay its docu"):
        call(handler)
    call(handler)


def test_padding_is_refused_and_dense_batches_are_not() -> None:
    real = torch.ones(1, 12, dtype=torch.bool)
    dense = get_cp_handler_cls("local")(qkv_format="bshd", max_seqlen_q=12)
    with captured():
        call(dense)
    real[0, 9:] = False
    padded = get_cp_handler_cls("local")(qkv_format="bshd", max_seqlen_q=12, key_padding_mask=real)
    with captured(), pytest.raises(UnsupportedError, match="would replay its padding for every other batch"):
        call(padded)


def test_compiled_blocks_are_refused_by_name() -> None:
    """The operator tells, since a traced call checks nothing when it runs."""
    believed = mock.patch.multiple(loop, CAPTURED="cpu", is_capturing=lambda: True)
    for form, told in (("thd", "a compiled block: a CUDA graph of this batch"), ("bshd", "")):
        where = {"cu_seqlens_q": [0, 5, 12]} if form == "thd" else {"max_seqlen_q": 12}
        handler = get_cp_handler_cls("local")(qkv_format=form, **where)
        handler.plan()
        block = torch.compile(call, fullgraph=True, backend="eager")
        block(handler)
        with believed, pytest.raises(UnsupportedError, match=told) if told else nullcontext():
            block(handler)


def agreed_before(size: int) -> None:
    group = partition_group([range(size)])
    handler = get_cp_handler_cls("ring")(cp_group=group, qkv_format="bshd", max_seqlen_q=12)
    capturing = mock.patch.object(layout_handler, "is_capturing", return_value=True)
    with capturing, pytest.raises(UnsupportedError, match=r"call handler.agree\(\) before the capture"):
        call(handler)
    handler.agree()
    with capturing, captured():
        call(handler)


def test_ranks_agree_before_a_capture(ranks: RankPool) -> None:
    ranks.run(agreed_before, 4)
