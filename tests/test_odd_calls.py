"""Handlers, their methods and what is called around them, with one argument at a time that makes no sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cphandler
from cphandler import (
    AttentionOptions,
    Capabilities,
    Causal,
    CoreAttention,
    connect_zero_loss,
    get_batch_on_this_cp_rank,
    get_cp_handler_cls,
    merge,
)
from tests import test_odd_batches
from tests.nonsense import FILLERS, MOVABLE, NUMBERS, ODD, ODD_TENSORS, SCALES, SIGNED, WHOLE, Row, faults


class Seat:
    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 1


def packed(**arguments: Any) -> Any:
    return get_cp_handler_cls("local")(**{"qkv_format": "thd", "cu_seqlens_q": [0, 5, 12], **arguments})


def two_ranks(**arguments: Any) -> Any:
    return get_cp_handler_cls("ring")(**{"cp_group": Seat(), **arguments})


def heads(count: int = 2, rows: int = 12) -> torch.Tensor:
    return torch.randn(rows, count, 8)


def qkv() -> dict[str, Any]:
    return {"attn_mod": None, "query": heads(), "key": heads(), "value": heads()}


HANDLER = packed()
DIVISORS = {"half", "one and a half", "a whole float", "one", "five"}
IN_TENSORS = {"a number in a tensor", "a nan in a tensor"}
"""One number each; a tensor is not looked into, which would wait for its device."""
DENSE_HANDLER = get_cp_handler_cls("local")(qkv_format="bshd", max_seqlen_q=12)
SEATED = two_ranks(qkv_format="thd", cu_seqlens_q=[0, 5, 12])
SAMPLE_PLAN = cphandler.plan_batch([0, 5, 12], 2)
SAMPLES: dict[str, torch.Tensor] = {}
cphandler.write_sample(SAMPLES, "one", {"ids": torch.arange(12)}, SAMPLE_PLAN, halo=2)
ROWS: dict[str, Row] = {
    "CoreAttention": Row(
        lambda **given: packed().core_attn(CoreAttention(**given).eval(), heads(), heads(), heads()),
        lambda: {"softmax_scale": 0.3, "softcap": 2.0, "dropout_p": 0.1, "num_sinks": 2, "record_max_logit": True},
        {
            "softmax_scale": SCALES,
            "softcap": SCALES,
            "dropout_p": {"half", "zero"},
            "num_sinks": {"zero"},
            "record_max_logit": {"True", "False"},
        },
    ),
    "AttentionOptions": Row(
        AttentionOptions,
        lambda: {"layer_number": 1},
        {"layer_number": {"None", "one", "five"}},
    ),
    "Capabilities": Row(
        Capabilities,
        lambda: {
            "layouts": ("zigzag",),
            "formats": ("thd",),
            "features": frozenset({"sinks"}),
            "instead": {"softcap": "leave it"},
        },
        {"layouts": {"an empty tuple"}, "formats": {"an empty tuple"}, "instead": {"None", "an empty mapping"}},
    ),
    "a packed handler": Row(
        lambda **given: two_ranks(**given).position_ids,
        lambda: {
            "cp_group": None,
            "qkv_format": "thd",
            "cu_seqlens_q": [0, 5, 12],
            "cu_seqlens_kv": [0, 5, 12],
            "cu_seqlens_q_padded": [0, 8, 16],
            "cu_seqlens_kv_padded": [0, 8, 16],
            "max_seqlen_q": 8,
            "max_seqlen_kv": 8,
            "key_padding_mask": None,
            "cross_attention": None,
            "local_cp_size": 1,
            "position_ids": torch.arange(16),
            "mask": "causal",
            "layout": "zigzag",
            "config": None,
        },
        {
            "cp_group": {"None"},
            "cu_seqlens_kv": {"None"},
            "cu_seqlens_kv_padded": {"None"},
            "max_seqlen_q": {"None"},
            "max_seqlen_kv": {"None"},
            "key_padding_mask": {"None"},
            "cross_attention": {"None", "True", "False"},
            "local_cp_size": {"None", "one"},
            "position_ids": {"None"},
            "layout": {"None"},
            "config": {"None"},
        },
    ),
    "a dense handler": Row(
        lambda **given: two_ranks(**given).position_ids,
        lambda: {
            "cp_group": Seat(),
            "qkv_format": "bshd",
            "cu_seqlens_q": None,
            "max_seqlen_q": 12,
            "max_seqlen_kv": 12,
            "key_padding_mask": torch.ones(2, 12, dtype=torch.bool),
            "cross_attention": False,
            "local_cp_size": 2,
            "position_ids": torch.arange(12).expand(2, 12),
            "mask": Causal(),
            "layout": None,
        },
        {
            "cu_seqlens_q": {"None"},
            "max_seqlen_kv": {"None"},
            "key_padding_mask": {"None"},
            "cross_attention": {"None", "False", "True"},
            "local_cp_size": {"None"},
            "position_ids": {"None"},
            "layout": {"None"},
        },
    ),
    "dispatch": Row(
        HANDLER.dispatch,
        lambda: {"tensor": heads(), "seq_dim": 0, "pad_value": 0, "stream": "q"},
        {
            "tensor": MOVABLE,
            "seq_dim": {"zero"},
            "pad_value": FILLERS,
        },
    ),
    "dispatch to two ranks": Row(
        SEATED.dispatch,
        lambda: {"tensor": heads(), "seq_dim": 0, "pad_value": 0, "stream": "q"},
        {
            "tensor": MOVABLE,
            "seq_dim": {"zero"},
            "pad_value": FILLERS,
        },
    ),
    "combine": Row(
        HANDLER.combine,
        lambda: {"tensor": heads(), "seq_dim": 0, "grad": "sum", "stream": "q"},
        {"tensor": MOVABLE, "seq_dim": {"zero"}},
    ),
    "roll_tensor": Row(
        HANDLER.roll_tensor,
        lambda: {"tensor": heads(), "shifts": -1, "dims": 0, "fill_value": 0, "return_sum": True, "stream": "q"},
        {
            "tensor": {"None", *MOVABLE},
            "shifts": {*WHOLE, "minus one", "minus a thousand", "huge", "minus huge", "a list"},
            "dims": {"zero"},
            "fill_value": FILLERS,
            "return_sum": {"True", "False"},
        },
    ),
    "rope": Row(
        HANDLER.rope,
        lambda: {
            "tensor": heads(),
            "freqs": torch.rand(12, 8),
            "interleaved": False,
            "mscale": 1.0,
            "inverse": False,
            "stream": "q",
        },
        {
            "interleaved": {"True", "False"},
            "mscale": SCALES - {"None"},
            "inverse": {"True", "False"},
        },
    ),
    "rope with a pair": Row(
        lambda cos, sin: HANDLER.rope(heads(), (cos, sin)),
        lambda: {"cos": torch.rand(12, 8), "sin": torch.rand(12, 8)},
        {},
    ),
    "apply_rotary_pos_emb": Row(
        HANDLER.apply_rotary_pos_emb,
        lambda: {"tensor": heads(), "freqs": torch.rand(12, 8), "config": None, "stream": "q"},
        {"config": set(ODD)},
    ),
    "get_rotary_seq_len": Row(HANDLER.get_rotary_seq_len, lambda: {"freqs_mode": "packed", "stream": "q"}, {}),
    "get_emb_on_this_cp_rank": Row(
        HANDLER.get_emb_on_this_cp_rank,
        lambda: {"emb": torch.rand(12, 8), "freqs_mode": "packed", "stream": "q"},
        {},
    ),
    "shard": Row(HANDLER.shard, lambda: {"stream": "q"}, {}),
    "core_attn": Row(
        HANDLER.core_attn,
        lambda: {
            **qkv(),
            "layer_number": 1,
            "mask": "full",
            "softmax_scale": 0.3,
            "softcap": 2.0,
            "sinks": torch.zeros(2),
            "dropout_p": 0.1,
            "dropout_seed": 3,
            "return_lse": True,
            "return_max_logit": True,
        },
        {
            "attn_mod": {"None"},
            "layer_number": {"one", "five"},
            "mask": {"None"},
            "softmax_scale": SCALES,
            "softcap": SCALES,
            "sinks": {"None"},
            "dropout_p": {"None", "half", "zero"},
            "dropout_seed": WHOLE,
            "return_lse": {"True", "False"},
            "return_max_logit": {"True", "False"},
        },
    ),
    "core_attn of a dense batch": Row(
        lambda **tensors: DENSE_HANDLER.core_attn(None, **tensors),
        lambda: {name: torch.rand(2, 12, 2, 8) for name in ("query", "key", "value")},
        {},
    ),
    "get_batch_on_this_cp_rank": Row(
        get_batch_on_this_cp_rank,
        lambda: {
            "batch": {"tokens": torch.arange(12), "labels": torch.arange(12)},
            "cp_handler": SEATED,
            "seq_dims": {"tokens": 0},
            "pad_values": {"tokens": 3},
            "streams": {"tokens": "q"},
        },
        {
            "seq_dims": {"None", "an empty mapping"},
            "pad_values": {"None", "an empty mapping"},
            "streams": {"None", "an empty mapping"},
        },
    ),
    "an entry of a batch": Row(
        lambda tokens: get_batch_on_this_cp_rank({"tokens": tokens}, cp_handler=SEATED),
        lambda: {"tokens": torch.arange(12)},
        {
            "tokens": {
                *NUMBERS,
                "None",
                "a word",
                "no word",
                "bytes",
                "nan",
                "inf",
                "complex",
                "True",
                "False",
                "minus one",
                "minus a thousand",
                "huge",
                "minus huge",
                *MOVABLE,
            }
        },
    ),
    "settings of a batch": Row(
        lambda seq_dim, pad_value, stream: get_batch_on_this_cp_rank(
            {"tokens": torch.arange(12)},
            cp_handler=SEATED,
            seq_dims={"tokens": seq_dim},
            pad_values={"tokens": pad_value} if seq_dim is not None else None,
            streams={"tokens": stream} if seq_dim is not None else None,
        ),
        lambda: {"seq_dim": 0, "pad_value": 3, "stream": "q"},
        {
            "seq_dim": {"zero", "minus one", "None"},
            "pad_value": {*WHOLE, "True", "False", "minus one", "minus a thousand", "a whole float"},
        },
    ),
    "get_cp_handler_cls": Row(
        get_cp_handler_cls,
        lambda: {"backend": "local", "cp_comm_type": ["ring", "p2p"], "num_layers": 2},
        {"num_layers": {"None"}},
    ),
    "get_cp_handler_cls of one": Row(
        get_cp_handler_cls, lambda: {"backend": "local", "cp_comm_type": "ring"}, {"cp_comm_type": {"None"}}
    ),
    "CapturedBatch": Row(
        cphandler.CapturedBatch,
        lambda: {
            "handler": packed(),
            "max_documents": 2,
            "max_seqlen": 12,
            "padding": False,
            "masks": (),
            "device": "cpu",
        },
        {
            "max_documents": {"five"},
            "max_seqlen": {"None"},
            "padding": {"None", "True", "False"},
            "masks": {"an empty tuple", "an empty list"},
            "device": {"None"},
        },
    ),
    "CapturedBatch.load": Row(
        cphandler.CapturedBatch(HANDLER, max_documents=2, device="cpu").load, lambda: {"handler": packed()}, {}
    ),
    "merge": Row(
        merge,
        lambda: {"out1": heads(), "lse1": torch.rand(12, 2), "out2": heads(), "lse2": torch.rand(12, 2)},
        {},
    ),
    "available_cp_handlers": Row(
        cphandler.available_cp_handlers, lambda: {"explain": True}, {"explain": {"True", "False"}}
    ),
    "explain": Row(
        HANDLER.explain,
        lambda: {
            "dtype": torch.bfloat16,
            "device": "cpu",
            "heads": 8,
            "kv_heads": 4,
            "head_dim": 64,
            "value_head_dim": 32,
            "softcap": True,
            "dropout": True,
        },
        {
            "device": {"None"},
            "kv_heads": {"None", "one"},
            "head_dim": {"one", "five"},
            "value_head_dim": {"None", "one", "five"},
            "softcap": {"True", "False"},
            "dropout": {"True", "False"},
        },
    ),
    "next_token_labels": Row(
        cphandler.next_token_labels,
        lambda: {"ids": torch.arange(12), "handler": HANDLER, "depths": 2, "ignore_index": -1},
        {"depths": {"None", "one", "five"}, "ignore_index": {"minus one", "minus a thousand"}},
    ),
    "shift_labels": Row(
        cphandler.shift_labels,
        lambda: {"labels": torch.arange(6), "cu_seqlens": [0, 4, 6], "dim": 0, "ignore_index": -1},
        {"cu_seqlens": {"None"}, "dim": {"zero", "minus one"}, "ignore_index": {"minus one", "minus a thousand"}},
    ),
    "token_log_probs": Row(
        cphandler.token_log_probs,
        lambda: {
            "logits": torch.zeros(12, 5),
            "labels": torch.zeros(12, dtype=torch.int64),
            "temperature": 0.5,
            "chunk_size": 3,
            "tp_group": None,
            "vocab_size": 4,
            "exact": False,
            "return_entropy": True,
            "return_top1": True,
        },
        {
            "temperature": DIVISORS,
            "chunk_size": {"None", "one", "five"},
            "tp_group": {"None"},
            "vocab_size": {"None", "one", "five"},
            "exact": {"True", "False"},
            "return_entropy": {"True", "False"},
            "return_top1": {"True", "False"},
        },
    ),
    "reduce_token_loss": Row(
        cphandler.reduce_token_loss,
        lambda: {
            "values": torch.zeros(12),
            "mask": torch.ones(12),
            "handler": HANDLER,
            "reduction": "token_mean",
            "num_tokens": 6,
            "group": None,
        },
        {"num_tokens": DIVISORS | {"None", *IN_TENSORS}, "group": {"None"}},
    ),
    "language_model_loss": Row(
        cphandler.language_model_loss,
        lambda: {
            "logits": torch.zeros(12, 5),
            "labels": torch.zeros(12, dtype=torch.int64),
            "handler": HANDLER,
            "reduction": "fixed",
            "normalizer": 2.0,
            "group": None,
        },
        {"normalizer": DIVISORS | IN_TENSORS, "group": {"None"}},
    ),
    "gather_tokens": Row(
        cphandler.gather_tokens,
        lambda: {"values": heads(), "handler": HANDLER, "nested": False, "padding_value": 0, "grad": "sum"},
        {"values": MOVABLE, "nested": {"False"}, "padding_value": {"None", *FILLERS}},
    ),
    "scatter_tokens": Row(
        cphandler.scatter_tokens,
        lambda: {"values": heads(), "handler": HANDLER, "padded": False, "pad_value": 0, "grad": "partial"},
        {"values": MOVABLE, "padded": {"False"}, "pad_value": FILLERS},
    ),
    "gather_last_tokens": Row(
        cphandler.gather_last_tokens,
        lambda: {"values": torch.zeros(12), "handler": HANDLER, "mask": torch.ones(12)},
        {"mask": {"None"}},
    ),
    "scatter_last_tokens": Row(
        cphandler.scatter_last_tokens,
        lambda: {"scalars": torch.zeros(2), "handler": HANDLER, "mask": torch.ones(12)},
        {"mask": {"None"}},
    ),
    "loss_scale": Row(
        cphandler.loss_scale,
        lambda: {"convention": "megatron", "handler": HANDLER, "group": None, "num_micro_batches": 2},
        {"num_micro_batches": {"one", "five"}, "group": {"None"}},
    ),
    "token_count": Row(
        cphandler.token_count,
        lambda: {"labels_or_mask": torch.zeros(12, dtype=torch.int64), "handler": HANDLER, "group": None},
        {"group": {"None"}},
    ),
    "token_mean": Row(
        cphandler.token_mean,
        lambda: {"values": torch.zeros(12), "mask": torch.ones(12), "handler": HANDLER, "group": None},
        {"group": {"None"}},
    ),
    "token_accuracy": Row(
        cphandler.token_accuracy,
        lambda: {
            "predictions": torch.zeros(12, dtype=torch.int64),
            "labels": torch.zeros(12, dtype=torch.int64),
            "handler": HANDLER,
            "group": None,
        },
        {"group": {"None"}},
    ),
    "token_histogram": Row(
        cphandler.token_histogram,
        lambda: {
            "values": torch.zeros(12),
            "mask": torch.ones(12),
            "handler": HANDLER,
            "edges": [0, 1],
            "group": None,
        },
        {"edges": {"a list"}, "group": {"None"}},
    ),
    "sum_over_tokens": Row(
        cphandler.sum_over_tokens,
        lambda: {"values": torch.zeros(3), "handler": HANDLER, "group": None},
        {"values": {"a tensor of nothing", *IN_TENSORS}, "group": {"None"}},
    ),
    "length_multiple": Row(
        cphandler.length_multiple,
        lambda: {"cp_size": 2, "tp_size": 2, "fp8": 4, "page": 8, "max_multiple": 400},
        {name: {"one", "five"} for name in ("cp_size", "tp_size", "fp8", "page")},
    ),
    "check_same_batch": Row(
        cphandler.check_same_batch,
        lambda: {"batch": {"tokens": torch.arange(4)}, "group": None},
        {"batch": {"an empty mapping", "a mapping"}, "group": {"None"}},
    ),
    "an entry to compare": Row(
        lambda entry: cphandler.check_same_batch({"tokens": entry}, None),
        lambda: {"entry": torch.arange(4)},
        {
            "entry": {
                *SIGNED,
                "None",
                "a word",
                "no word",
                "bytes",
                "nan",
                "inf",
                "complex",
                "True",
                "False",
                *MOVABLE - {"a shapeless tensor"},
                "a tensor of nothing",
                "a number in a tensor",
                "a nan in a tensor",
            }
        },
    ),
    "PackingCollator": Row(
        lambda **given: cphandler.PackingCollator(**given)([torch.arange(4)]),
        lambda: {
            "cp_size": 2,
            "token_budget": 20,
            "multiple_of": 2,
            "pad_to_multiple_of": 5,
            "pad_token": 3,
            "layout": "balanced",
            "mask": "full",
            "cp_comm_type": "ring",
            "tile": 4,
            "kernel_cost": 3,
            "ranks": (0,),
        },
        {
            "cp_size": {"one", "five"},
            "token_budget": {"None", "five"},
            "multiple_of": {"one", "five"},
            "pad_to_multiple_of": {"one", "five"},
            "pad_token": {*WHOLE, "minus one", "minus a thousand"},
            "tile": {"one", "five", "None"},
            "kernel_cost": WHOLE,
            "ranks": {"an empty list", "an empty tuple"},
        },
    ),
    "documents of a collator": Row(
        cphandler.PackingCollator(2),
        lambda: {"documents": [torch.arange(4)]},
        {"documents": {"an empty list", "an empty tuple", "a tensor of nothing"}},
    ),
    "ContextParallelSampler": Row(
        lambda **given: list(cphandler.ContextParallelSampler(**given)),
        lambda: {
            "data": 3,
            "token_budget": 16,
            "lengths": [3, 4, 9],
            "multiple_of": 4,
            "group": Seat(),
            "shuffle": True,
            "seed": 3,
            "drop_last": False,
        },
        {
            "multiple_of": {"one", "five"},
            "group": {"None"},
            "shuffle": {"True", "False"},
            "seed": WHOLE,
            "drop_last": {"True", "False"},
        },
    ),
    "ContextParallelSampler of documents": Row(
        lambda **given: list(cphandler.ContextParallelSampler(**given)),
        lambda: {"data": 3, "batch_size": 2},
        {
            "data": {
                *WHOLE,
                "a list",
                "a ragged list",
                "a list of words",
                "an empty list",
                "an empty tuple",
                "an empty mapping",
                "a mapping",
                "a tensor of nothing",
                "a nan in a tensor",
                "a complex tensor",
                "a bool tensor",
                "an array of words",
            },
            "batch_size": {"one", "five"},
        },
    ),
    "ContextParallelSampler.of_world": Row(
        lambda **given: list(cphandler.ContextParallelSampler.of_world(8, batch_size=2, **given)),
        lambda: {"rank": 1, "world_size": 4, "cp_size": 2, "tp_size": 2},
        {"rank": {"zero", "one"}, "cp_size": {"one"}, "tp_size": {"one"}},
    ),
    "ContextParallelSampler.set_epoch": Row(
        cphandler.ContextParallelSampler(3, batch_size=1).set_epoch,
        lambda: {"epoch": 2, "first_batch": 1},
        {"epoch": WHOLE, "first_batch": WHOLE},
    ),
    "SafetensorsStore": Row(cphandler.SafetensorsStore, lambda: {"folder": "nowhere"}, {"folder": {"a word"}}),
    "write_sample": Row(
        lambda **given: cphandler.write_sample({}, **given),
        lambda: {
            "key": "one",
            "sample": {"ids": torch.arange(12)},
            "plan": SAMPLE_PLAN,
            "halo": 2,
            "loss_mask": torch.ones(12),
            "seq_dims": {"ids": 0},
            "overwrite": False,
        },
        {
            "key": {"a word"},
            "halo": WHOLE,
            "loss_mask": {"None"},
            "seq_dims": {"None", "an empty mapping"},
            "overwrite": {"True", "False"},
        },
    ),
    "a tensor of a sample": Row(
        lambda ids: cphandler.write_sample({}, "one", {"ids": ids}, SAMPLE_PLAN),
        lambda: {"ids": torch.arange(12)},
        {"ids": {"a complex tensor", "a bool tensor", "a float8 tensor"}},
    ),
    "read_manifest": Row(cphandler.read_manifest, lambda: {"store": SAMPLES, "key": "one"}, {}),
    "read_sample": Row(
        cphandler.read_sample,
        lambda: {"store": SAMPLES, "key": "one", "plan": SAMPLE_PLAN, "rank": 1, "halo": 2},
        {"rank": {"zero", "one"}, "halo": {"zero", "one", "None"}},
    ),
    "ShardedSample.ahead": Row(
        lambda **given: cphandler.read_sample(SAMPLES, "one", SAMPLE_PLAN, rank=1).ahead(**given),
        lambda: {"name": "ids", "distance": 2, "fill_value": 3},
        {
            "distance": {"zero", "one"},
            "fill_value": FILLERS - {"half", "one and a half", "nan", "inf", "huge", "minus huge"},
        },
    ),
    "ShardedSample.exists": Row(
        lambda **given: cphandler.read_sample(SAMPLES, "one", SAMPLE_PLAN, rank=1).exists(**given),
        lambda: {"distance": 2},
        {"distance": {"zero", "one"}},
    ),
    "ShardedSample.in_loss": Row(
        lambda **given: cphandler.read_sample(SAMPLES, "one", SAMPLE_PLAN, rank=1).in_loss(**given),
        lambda: {"distance": 2},
        {"distance": {"zero", "one"}},
    ),
    "assign_documents": Row(
        cphandler.assign_documents,
        lambda: {
            "lengths": [7, 3, 3, 2],
            "num_ranks": 3,
            "max_tokens": 6,
            "num_micro_batches": 2,
            "token_cost": 10.0,
            "slack": 0.1,
        },
        {
            "lengths": {"a list"},
            "num_ranks": {"five"},
            "max_tokens": {"None", "five"},
            "num_micro_batches": {"None", "one"},
            "token_cost": DIVISORS | {"zero"},
            "slack": DIVISORS | {"zero"},
        },
    ),
    "connect_zero_loss": Row(
        lambda loss, activations: connect_zero_loss(loss, *[activations]),
        lambda: {"loss": torch.tensor(1.0), "activations": torch.zeros(2, requires_grad=True)},
        {
            "loss": {"a tensor of nothing", "a number in a tensor", "a nan in a tensor", *ODD_TENSORS},
            "activations": {name for name in ODD if "tensor" in name} | ODD_TENSORS.keys(),
        },
    ),
}

ELSEWHERE = {
    "COMMON": "a table",
    "FEATURES": "a table",
    "Attention": "made by handlers",
    "AttentionCall": "made by handlers",
    "AttentionModule": "a protocol",
    "AttentionResult": "what core_attn returns",
    "Availability": "what available_cp_handlers tells",
    "BatchPlan": "made by plan_batch",
    "CPConfig": "refuses as pydantic models do",
    "CPError": "an error",
    "CPMesh": "made by cp_mesh",
    "DocumentSchedule": "made by assign_documents",
    "SubGroup": "made by assign_documents",
    "SubGroups": "asks for ranks: test_dynamic",
    "cp_mesh": "asks for ranks: test_meshes",
    "InvalidTypeError": "an error",
    "InvalidValueError": "an error",
    "MissingPackageError": "an error",
    "RankLostError": "an error",
    "RankMismatchError": "an error",
    "UnsupportedError": "an error",
    "ContextParallelHandler": "abstract",
    "EngineShard": "facts of an engine",
    "Exchange": "abstract",
    "Explanation": "what explain returns",
    "Fragments": "what a handler tells",
    "Full": "takes nothing",
    "Kernel": "abstract",
    "LayoutHandler": "the handlers",
    "Mask": "abstract",
    "PlanStats": "made by plan_batch",
    "SampleManifest": "made by write_sample",
    "TokenLogProbs": "what token_log_probs returns",
    "Traffic": "made by record_traffic",
    "clear_plan_cache": "takes nothing",
    "record_traffic": "takes nothing",
    "register_cp_handler": "with the registries",
    "register_exchange": "with the registries",
    "register_kernel": "with the registries",
}
"""Public names without a row, and why."""


@pytest.mark.parametrize("name", ROWS)
def test_one_odd_argument(name: str) -> None:
    told = faults(ROWS[name])
    assert not told, told


def test_every_public_name_has_a_row() -> None:
    begun = {name.partition(".")[0] for name in (*ROWS, *test_odd_batches.ROWS)}
    assert set(cphandler.__all__) - begun == ELSEWHERE.keys() - begun
