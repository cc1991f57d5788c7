"""What describes a batch, with one argument at a time that makes no sense: documents, masks, layouts, plans."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cphandler import (
    AcrossDocuments,
    Balanced,
    Bands,
    BlockCausal,
    Causal,
    Chunked,
    Documents,
    Full,
    Layout,
    PerDocument,
    PrefixLM,
    PrefixTree,
    PrefixWindow,
    SharedQuestion,
    SlidingWindow,
    cu_seqlens_of,
    pack_documents,
    pack_lengths,
    plan_batch,
    unpack_documents,
)
from tests.nonsense import WHOLE, Row, faults


def masked(mask: Any, lengths: tuple[int, ...] = (5, 7)) -> Any:
    """A mask that is used."""
    offsets = [0, *np.cumsum(lengths).tolist()]
    return plan_batch(offsets, 2, mask=mask).stats()


PLAN = plan_batch([0, 5, 12], 2)

ROWS: dict[str, Row] = {
    "Causal": Row(lambda align: masked(Causal(align=align)), lambda: {"align": None}, {"align": {"None"}}),
    "SlidingWindow": Row(
        lambda **given: masked(SlidingWindow(**given)),
        lambda: {"left": 2, "right": 1, "align": None},
        {"left": WHOLE | {"huge"}, "right": WHOLE | {"huge"}, "align": {"None"}},
    ),
    "PrefixLM": Row(lambda prefix: masked(PrefixLM(prefix)), lambda: {"prefix": 2}, {"prefix": WHOLE | {"huge"}}),
    "BlockCausal": Row(
        lambda block: masked(BlockCausal(block)), lambda: {"block": 2}, {"block": {"one", "five", "huge"}}
    ),
    "Chunked": Row(
        lambda **given: masked(Chunked(**given)),
        lambda: {"chunk": 2, "origin": "first_valid"},
        {"chunk": {"one", "five", "huge"}},
    ),
    "PrefixWindow": Row(
        lambda **given: masked(PrefixWindow(**given)),
        lambda: {"prefix": 2, "left": 3},
        {"prefix": WHOLE | {"huge"}, "left": WHOLE | {"huge"}},
    ),
    "SharedQuestion": Row(
        lambda segments: masked(SharedQuestion(segments)),
        lambda: {"segments": (2, 1)},
        {"segments": {"an empty tuple"}},
    ),
    "PrefixTree": Row(
        lambda **given: masked(PrefixTree(**given), (6, 6)), lambda: {"parents": (-1, 0, 0), "lengths": (2, 3, 1)}, {}
    ),
    "a node of a PrefixTree": Row(
        lambda parent, length: masked(PrefixTree((-1, 0, parent), (2, 3, length)), (6, 6)),
        lambda: {"parent": 0, "length": 1},
        {"parent": {"zero", "one", "minus one"}, "length": {"one"}},
    ),
    "SharedQuestion of each": Row(
        lambda first: masked(SharedQuestion((first, (2, 2)))), lambda: {"first": (2, 1)}, {"first": {"an empty tuple"}}
    ),
    "PerDocument": Row(lambda masks: masked(PerDocument(masks)), lambda: {"masks": (Causal(), Full())}, {}),
    "PerDocument of one": Row(lambda mask: masked(PerDocument((mask, Full()))), lambda: {"mask": Causal()}, {}),
    "AcrossDocuments": Row(lambda mask: masked(AcrossDocuments(mask)), lambda: {"mask": Causal()}, {}),
    "Bands": Row(
        lambda bands: masked(Bands(bands)),
        lambda: {"bands": [(0, 3, 0, 3, 0, 0)]},
        {"bands": {"an empty list", "an empty tuple", "an empty mapping", "a tensor of nothing"}},
    ),
    "a band": Row(lambda band: masked(Bands([band])), lambda: {"band": (0, 3, 0, 3, 0, 0)}, {}),
    "a band's numbers": Row(
        lambda q0, q1, k0, k1, lo, hi: masked(Bands([(q0, q1, k0, k1, lo, hi)])),
        lambda: {"q0": 0, "q1": 3, "k0": 0, "k1": 3, "lo": -1, "hi": 0},
        {
            "q0": {"zero", "one", "a whole float"},
            "q1": {*WHOLE, "a whole float"},
            "k0": {"zero", "one", "a whole float"},
            "k1": {*WHOLE, "a whole float"},
            "lo": {"zero", "minus one", "minus a thousand", "minus huge"},
            "hi": {*WHOLE, "a whole float", "minus one", "huge", "inf"},
        },
    ),
    "Balanced": Row(
        lambda masks: plan_batch([0, 5, 12], 2, layout=Balanced(masks)),
        lambda: {"masks": {Causal(): 1}},
        {"masks": {"None", "an empty mapping"}},
    ),
    "Balanced layers": Row(
        lambda layers: plan_batch([0, 5, 12], 2, layout=Balanced({Causal(): layers})),
        lambda: {"layers": 1},
        {"layers": {"one", "five"}},
    ),
    "plan_batch ranks": Row(
        lambda ranks: plan_batch([0, 5, 12], 3, ranks=ranks),
        lambda: {"ranks": (1,)},
        {"ranks": {"an empty list", "an empty tuple", "a list"}},
    ),
    "Layout": Row(
        Layout,
        lambda: {
            "name": "mine",
            "num_tokens": 6,
            "spans": [[(0, 3, 1)], [(3, 3, 1)]],
            "num_local_tokens": 3,
            "replicated": False,
        },
        {"name": {"a word"}, "num_local_tokens": {"None", "five"}, "replicated": {"False"}},
    ),
    "a rank's spans": Row(lambda spans: Layout("mine", 6, [spans, [(3, 3, 1)]]), lambda: {"spans": [(0, 3, 1)]}, {}),
    "a span": Row(lambda span: Layout("mine", 6, [[span], [(3, 3, 1)]]), lambda: {"span": (0, 3, 1)}, {}),
    "a span's numbers": Row(
        lambda start, length, stride, local: Layout("mine", 6, [[(start, length, stride, local)], [(3, 3, 1, 0)]]),
        lambda: {"start": 0, "length": 3, "stride": 1, "local": 0},
        {"start": {"zero"}, "stride": {"one"}, "local": {"zero"}},
    ),
    "Documents": Row(
        Documents,
        lambda: {"offsets": np.array([0, 5, 12]), "runs": np.array([[0, 5], [5, 9]])},
        {"runs": {"a list", "an empty list", "an empty tuple"}},
    ),
    "Documents.from_cu_seqlens": Row(
        Documents.from_cu_seqlens,
        lambda: {"cu_seqlens": [0, 5, 12], "cu_seqlens_padded": [0, 8, 16]},
        {"cu_seqlens_padded": {"None"}},
    ),
    "Documents.dense": Row(Documents.dense, lambda: {"seq_len": 12}, {"seq_len": WHOLE}),
    "Documents.from_attention_mask": Row(
        Documents.from_attention_mask, lambda: {"attention_mask": torch.ones(2, 12, dtype=torch.bool)}, {}
    ),
    "Documents.from_position_ids": Row(Documents.from_position_ids, lambda: {"position_ids": torch.arange(12)}, {}),
    "cu_seqlens_of": Row(
        cu_seqlens_of,
        lambda: {"segment_ids": torch.tensor([1, 1, 2, 0]), "return_padded": True},
        {"return_padded": {"True", "False"}},
    ),
    "cu_seqlens_of positions": Row(cu_seqlens_of, lambda: {"position_ids": torch.arange(12)}, {}),
    "cu_seqlens_of a mask": Row(cu_seqlens_of, lambda: {"attention_mask": torch.ones(2, 6, dtype=torch.bool)}, {}),
    "plan_batch": Row(
        plan_batch,
        lambda: {
            "cu_seqlens": [0, 5, 12],
            "cp_size": 2,
            "layout": "balanced",
            "mask": "causal",
            "cu_seqlens_padded": [0, 8, 16],
            "cp_comm_type": "ring",
            "tile": 4,
            "kernel_cost": 30,
        },
        {
            "cp_size": {"one", "five"},
            "cu_seqlens_padded": {"None"},
            "tile": {"one", "five", "None"},
            "kernel_cost": {"zero", "one", "five"},
        },
    ),
    "BatchPlan.plan": Row(PLAN.plan, lambda: {"rank": 0}, {"rank": {"zero", "one"}}),
    "BatchPlan.stats": Row(
        PLAN.stats,
        lambda: {
            "kv_heads": 2,
            "head_dim": 8,
            "value_dim": 8,
            "itemsize": 2,
            "gradient_itemsize": 4,
            "count_tasks": True,
        },
        {
            "kv_heads": {"one", "five"},
            "head_dim": {"one", "five"},
            "value_dim": {"one", "five", "None"},
            "itemsize": {"one", "five"},
            "gradient_itemsize": {"one", "five", "None"},
            "count_tasks": {"True", "False"},
        },
    ),
    "pack_documents": Row(
        pack_documents,
        lambda: {
            "documents": [torch.arange(3), torch.arange(4)],
            "token_budget": 20,
            "multiple_of": 2,
            "pad_to_multiple_of": 5,
            "pad_token": 0,
        },
        {
            "documents": {"an empty list", "an empty tuple", "a tensor of nothing"},
            "token_budget": {"None"},
            "multiple_of": {"one", "five"},
            "pad_to_multiple_of": {"one", "five"},
            "pad_token": {*WHOLE, "minus one", "minus a thousand"},
        },
    ),
    "a document to pack": Row(
        lambda document: pack_documents([torch.arange(3), document]), lambda: {"document": torch.arange(4)}, {}
    ),
    "a document of several rows": Row(
        lambda **rows: pack_documents([{"tokens": torch.arange(3), "x": torch.arange(3)}, rows]),
        lambda: {"tokens": torch.arange(4), "x": torch.arange(4)},
        {},
    ),
    "which tokens are learned": Row(
        lambda target_mask: pack_documents([{"tokens": torch.arange(4), "target_mask": target_mask}]),
        lambda: {"target_mask": torch.ones(4).bool()},
        {},
    ),
    "pack_lengths": Row(
        pack_lengths,
        lambda: {"lengths": [3, 4], "token_budget": 9},
        {"lengths": {"a list", "an empty list", "an empty tuple", "a tensor of nothing"}, "token_budget": {"five"}},
    ),
    "a length to pack": Row(lambda length: pack_lengths([length, 4], 9), lambda: {"length": 3}, {"length": WHOLE}),
    "unpack_documents": Row(
        unpack_documents,
        lambda: {
            "packed": torch.arange(16),
            "cu_seqlens": [0, 5, 12],
            "cu_seqlens_padded": [0, 8, 16],
            "num_documents": 2,
        },
        {"num_documents": {"None", "zero", "one"}},
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_one_odd_argument(name: str) -> None:
    told = faults(ROWS[name])
    assert not told, told
