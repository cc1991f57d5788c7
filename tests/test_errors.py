"""Malformed input: each a clear error, before anything is sent, on every rank alike."""

from __future__ import annotations

import ast
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

import cphandler
from cphandler import (
    Bands,
    CPConfig,
    CPError,
    InvalidTypeError,
    InvalidValueError,
    Layout,
    LayoutHandler,
    UnsupportedError,
    errors,
    get_batch_on_this_cp_rank,
    get_cp_handler_cls,
    record_traffic,
)
from cphandler.testing import RankPool, partition_group

CU = [0, 5, 12]


def thd(**arguments: Any) -> Any:
    return get_cp_handler_cls("local")(**{"qkv_format": "thd", "cu_seqlens_q": CU, **arguments})


def dense(**arguments: Any) -> Any:
    return get_cp_handler_cls("local")(**{"qkv_format": "sbhd", "max_seqlen_q": 12, **arguments})


CONSTRUCTION: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "float offsets": (
        lambda: thd(cu_seqlens_q=torch.tensor([0.0, 5.0])),
        TypeError,
        "cu_seqlens_q must hold integers; got float32",
    ),
    "bool offsets": (lambda: thd(cu_seqlens_q=torch.tensor([False, True])), TypeError, "must hold integers; got bool"),
    "offsets in two dims": (
        lambda: thd(cu_seqlens_q=torch.tensor([[0, 5]])),
        ValueError,
        r"must be 1-D; got shape \[1, 2\]",
    ),
    "offsets not from 0": (lambda: thd(cu_seqlens_q=[3, 5]), ValueError, "must start at 0; got 3"),
    "lengths for offsets": (lambda: thd(cu_seqlens_q=[5, 7]), ValueError, "not lengths"),
    "falling offsets": (lambda: thd(cu_seqlens_q=[0, 5, 4]), ValueError, "must not decrease; got 5 then 4 at entry 2"),
    "no offsets": (lambda: thd(cu_seqlens_q=torch.empty(0, dtype=torch.int32)), ValueError, "at least one offset"),
    "missing offsets": (lambda: thd(cu_seqlens_q=None), ValueError, "'thd' needs cu_seqlens_q"),
    "padded too short": (
        lambda: thd(cu_seqlens_q_padded=[0, 4, 12]),
        ValueError,
        "fewer tokens than cu_seqlens_q; got 4 padded, 5 valid",
    ),
    "padded of others": (lambda: thd(cu_seqlens_q_padded=[0, 12]), ValueError, "same documents; got 2 and 1"),
    "max_seqlen too short": (lambda: thd(max_seqlen_q=6), ValueError, "shorter than the longest document; got 6 for 7"),
    "padding mask with thd": (
        lambda: thd(key_padding_mask=torch.ones(1, 12, dtype=torch.bool)),
        ValueError,
        "belongs to the dense",
    ),
    "offsets with a dense format": (
        lambda: dense(cu_seqlens_q=CU),
        ValueError,
        "takes no cu_seqlens_q; use qkv_format='thd'",
    ),
    "dense without a length": (lambda: dense(max_seqlen_q=None), ValueError, "needs max_seqlen_q; pass the global"),
    "dense of a strange length": (
        lambda: dense(max_seqlen_q=-3),
        ValueError,
        "must be at least 0; got -3; pass the global",
    ),
    "padding mask of a shard": (
        lambda: dense(key_padding_mask=torch.ones(2, 6, dtype=torch.bool)),
        ValueError,
        "6 columns for max_seqlen_q 12",
    ),
    "float padding mask": (
        lambda: dense(key_padding_mask=torch.ones(2, 12)),
        TypeError,
        "key_padding_mask must be a bool",
    ),
    "unknown format": (lambda: dense(qkv_format="bhsd"), ValueError, "choose sbhd, bshd or thd"),
    "unknown layout": (lambda: dense(layout="spiral"), ValueError, "choose one of balanced, contiguous, replicated"),
    "unknown mask": (lambda: dense(mask="diagonal"), ValueError, "unknown mask; got 'diagonal'"),
    "config of a wrong type": (lambda: dense(config={"kernel": "auto"}), TypeError, "config must be a CPConfig"),
    "group of a wrong type": (lambda: dense(cp_group=4), TypeError, "must be a ProcessGroup, a DeviceMesh or None"),
    "dynamic size without group": (lambda: dense(local_cp_size=2), ValueError, "got 2 with a group of 1"),
    "unknown backend": (
        lambda: get_cp_handler_cls("nccl"),
        ValueError,
        r"got \('nccl', None\); choose one of \('local', None\)",
    ),
    "unknown comm type": (
        lambda: get_cp_handler_cls("local", "carrier-pigeon"),
        ValueError,
        "unknown backend or comm type",
    ),
    "backend of a wrong type": (lambda: get_cp_handler_cls(3), TypeError, "backend must be a string"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", CONSTRUCTION.values(), ids=CONSTRUCTION.keys())
def test_construction(case: tuple[Callable[[], Any], type[Exception], str]) -> None:
    make, kind, message = case
    with pytest.raises(kind, match=message) as caught:
        make()
    assert isinstance(caught.value, CPError)


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt name": ({"kernal": "auto"}, "no setting is called 'kernal'; choose among kernel, deterministic, "),
    "a kernel without a name": ({"kernel": " "}, "a kernel has a name; leave it at 'auto'"),
    "a kernel by number": ({"kernel": 3}, "should be a valid string"),
    "a word for a bool": ({"deterministic": "yes"}, "should be a valid boolean"),
    "a number for a bool": ({"deterministic": 1}, "should be a valid boolean"),
    "another word": ({"check_consistency": "sometimes"}, "should be 'always', 'first', 'never' or 'each_call'"),
    "a bool of a word": ({"check_consistency": True}, "should be 'always', 'first'"),
    "a bool of seconds": ({"timeout": True}, "should be a valid number"),
    "no seconds": ({"timeout": 0}, "should be greater than or equal to 0.001"),
    "less than a transport counts": ({"timeout": 1e-6}, "should be greater than or equal to 0.001"),
    "seconds in words": ({"timeout": "3"}, "should be a valid number"),
    "for ever": ({"timeout": float("inf")}, "should be a finite number"),
    "no number of seconds": ({"timeout": float("nan")}, "should be a finite number"),
    "longer than a clock goes": ({"timeout": 1e300}, "should be less than or equal to 1000000000"),
    "a bool of rows": ({"tile": True}, "should be a valid integer"),
    "half a row": ({"tile": 1.5}, "should be a valid integer"),
    "no rows": ({"tile": 0}, "should be greater than or equal to 1"),
    "a cost below nothing": ({"kernel_cost": -1}, "should be greater than or equal to 0"),
    "half a pair": ({"kernel_cost": 0.5}, "should be a valid integer"),
    "more than counts": ({"kernel_cost": 2**41}, "should be less than or equal to 1099511627776"),
    "ranks in words": ({"ulysses_degree": "2"}, "should be a valid integer"),
    "no ranks": ({"ulysses_degree": 0}, "should be greater than or equal to 1"),
    "a dtype for its name": ({"gradient_wire_dtype": torch.bfloat16}, "should be 'float32', 'bfloat16' or 'float16'"),
}


@pytest.mark.parametrize("case", SETTINGS.values(), ids=SETTINGS.keys())
def test_settings(case: tuple[dict[str, Any], str]) -> None:
    settings, message = case
    with pytest.raises(ValidationError, match=message):
        CPConfig(**settings)


def test_a_config_is_frozen_and_takes_whole_numbers_of_seconds() -> None:
    config = CPConfig(timeout=3, kernel="mine", tile=128, ulysses_degree=2)
    assert config.timeout == 3.0
    with pytest.raises(ValueError, match="frozen"):
        config.kernel = "torch"  # type: ignore[misc]
    for config_of in (lambda: CPConfig.model_validate({"tile": "4"}), lambda: CPConfig.model_validate_json('{"x": 1}')):
        with pytest.raises(ValidationError):
            config_of()
    assert CPConfig.model_validate_json('{"timeout": 3, "check_consistency": "never"}').timeout == 3.0


def heads(n: int, rows: int = 12, d: int = 8, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, n, d).to(dtype)


CALLS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "int first": (
        lambda h: h.dispatch(0, heads(2)),
        TypeError,
        r"takes the tensor first.*call dispatch\(tensor, seq_dim\)",
    ),
    "int first in combine": (lambda h: h.combine(0, heads(2)), TypeError, "takes the tensor first"),
    "no such dim": (lambda h: h.dispatch(heads(2), 3), ValueError, "no dim 3"),
    "another length": (
        lambda h: h.dispatch(heads(2, 11), 0),
        ValueError,
        r"expects 12 rows in dim 0; got shape \[11, 2, 8\]",
    ),
    "unknown convention": (
        lambda h: h.combine(heads(2), 0, grad="mean"),
        ValueError,
        "choose replicated, sum or scaled",
    ),
    "roll by a float": (lambda h: h.roll_tensor(heads(2), 1.0, 0), TypeError, "shifts must be an int"),
    "roll along another dim": (lambda h: h.roll_tensor(heads(2)), ValueError, "expects 12 rows in dim 2"),
    "rope table too short": (
        lambda h: h.get_emb_on_this_cp_rank(torch.zeros(6, 8)),
        ValueError,
        "got 6 rows, 7 needed",
    ),
    "packed table too short": (
        lambda h: h.get_emb_on_this_cp_rank(torch.zeros(11, 8), freqs_mode="packed"),
        ValueError,
        "got 11 rows, 12 needed",
    ),
    "unknown freqs mode": (
        lambda h: h.get_rotary_seq_len(freqs_mode="sliced"),
        ValueError,
        "choose per_document or packed",
    ),
    "rope table of a strange shape": (
        lambda h: h.get_emb_on_this_cp_rank(torch.zeros(7, 1, 8)),
        ValueError,
        r"\[rows, R\]",
    ),
    "rope with a global table": (
        lambda h: h.rope(heads(2), torch.zeros(7, 8)),
        ValueError,
        "each of the 12 local rows; got 7",
    ),
    "rotary dim too wide": (lambda h: h.rope(heads(2), torch.zeros(12, 10)), ValueError, "got 10 for head dim 8"),
    "odd rotary dim": (lambda h: h.rope(heads(2), torch.zeros(12, 5)), ValueError, "must be even"),
    "rope of integers": (lambda h: h.rope(heads(2).long(), torch.zeros(12, 8)), TypeError, "must be float16, bfloat16"),
    "freqs of a wrong type": (lambda h: h.rope(heads(2), [0.0]), TypeError, "or a pair"),
    "cos and sin of two shapes": (
        lambda h: h.rope(heads(2), (torch.zeros(12, 8), torch.zeros(12, 6))),
        ValueError,
        "one shape",
    ),
    "mixed dtypes": (
        lambda h: h.core_attn(None, heads(2), heads(2), heads(2, dtype=torch.float64)),
        TypeError,
        "share one dtype; got query torch.float32, key torch.float32, value torch.float64",
    ),
    "integers": (
        lambda h: h.core_attn(None, heads(2).long(), heads(2).long(), heads(2).long()),
        TypeError,
        "floating point",
    ),
    "no tensors": (
        lambda h: h.core_attn(None, heads(2), None, heads(2)),
        TypeError,
        "key must be a tensor; got NoneType",
    ),
    "heads that do not divide": (
        lambda h: h.core_attn(None, heads(4), heads(3), heads(3)),
        ValueError,
        "multiple of the key heads; got 4 and 3",
    ),
    "key and value heads": (
        lambda h: h.core_attn(None, heads(4), heads(2), heads(4)),
        ValueError,
        "same heads; got 2 and 4",
    ),
    "head dims": (
        lambda h: h.core_attn(None, heads(2), heads(2, d=4), heads(2)),
        ValueError,
        "one head dim; got 8 and 4",
    ),
    "four dims with thd": (
        lambda h: h.core_attn(None, heads(2)[None], heads(2), heads(2)),
        ValueError,
        r"query must be \[L, heads, D\]",
    ),
    "rows of another batch": (
        lambda h: h.core_attn(None, heads(2, 9), heads(2, 9), heads(2, 9)),
        ValueError,
        "this rank's 12 rows",
    ),
    "a module that cannot be called": (
        lambda h: h.core_attn(3, heads(2), heads(2), heads(2)),
        TypeError,
        "None, a CoreAttention or a callable",
    ),
    "a module asked for lse": (
        lambda h: h.core_attn(lambda *a, **k: a[0], heads(2), heads(2), heads(2), return_lse=True),
        NotImplementedError,
        "is not told of return_lse",
    ),
    "a module that flattens": (
        lambda h: h.core_attn(lambda *a, **k: a[0].flatten(1), heads(2), heads(2), heads(2)),
        ValueError,
        r"got \[12, 16\]; expected \[12, 2, 8\]",
    ),
}


@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS.keys())
def test_calls(case: tuple[Callable[[Any], Any], type[Exception], str]) -> None:
    call, kind, message = case
    with pytest.raises(kind, match=message) as caught:
        call(thd())
    assert isinstance(caught.value, CPError)


def test_batch_sizes_are_compared() -> None:
    with pytest.raises(InvalidValueError, match=r"one batch size; got \[2, 2, 3\]"):
        dense().core_attn(None, torch.zeros(12, 2, 2, 8), torch.zeros(12, 2, 2, 8), torch.zeros(12, 3, 2, 8))
    padded = dense(key_padding_mask=torch.ones(3, 12, dtype=torch.bool))
    x = torch.zeros(12, 2, 2, 8)
    with pytest.raises(InvalidValueError, match="of the 3 rows that the handler's masks have; got"):
        padded.core_attn(None, x, x, x)
    with pytest.raises(InvalidValueError, match="first two dims"):
        padded.roll_tensor(torch.zeros(12), -1, 0)
    real = torch.ones(3, 12, dtype=torch.bool)
    assert padded.core_attn(lambda *a, **k: a[0], *[torch.zeros(12, 3, 2, 8)] * 3).shape == (12, 3, 2, 8)
    real[1, 11] = False
    padded = dense(key_padding_mask=real)
    with pytest.raises(UnsupportedError, match="is not told of key_padding_mask"):
        padded.core_attn(lambda *a, **k: a[0], *[torch.zeros(12, 3, 2, 8)] * 3)


def refused(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    """The call raises here, and nothing was sent."""
    with record_traffic() as traffic, pytest.raises(kind, match=re.escape(message)):
        call()
    assert traffic.by_operation.keys() <= {"check"}, f"sent {traffic}"


def on_every_rank() -> None:
    """Refusals that need several ranks; each is raised by all of them."""
    group = partition_group([range(4)])
    assert group is not None
    never = CPConfig(check_consistency="never")

    def make(backend: str, **arguments: Any) -> Any:
        settings = {"cp_group": group, "qkv_format": "thd", "cu_seqlens_q": [0, 6, 16], "config": never}
        return get_cp_handler_cls(backend)(**{**settings, **arguments})

    ring = make("ring")
    local, whole = torch.randn(4, 6, 8), torch.randn(16, 6, 8)
    refused(lambda: ring.dispatch(local, 0), ValueError, "already dispatched")
    refused(lambda: ring.combine(whole, 0), ValueError, "dispatch the tensor first")
    refused(lambda: ring.core_attn(None, whole, whole, whole), ValueError, "dispatch the tensor first")
    refused(
        lambda: make("ring", cu_seqlens_q=[0, 4]).dispatch(whole, 0),
        ValueError,
        "must be global, taken before the split",
    )
    refused(
        lambda: ring.core_attn(lambda *a, **k: a[0], local, local, local),
        NotImplementedError,
        "use the ulysses backend",
    )
    refused(lambda: make("local"), ValueError, 'get_cp_handler_cls("local", "a2a")')
    refused(lambda: make("ring", local_cp_size=2), ValueError, "local_cp_size must be the size of cp_group")
    refused(lambda: ring.roll_tensor(torch.zeros(4).int(), -1, 0, fill_value=float("nan")), ValueError, "does not fit")
    refused(lambda: ring.dispatch(torch.zeros(16).int(), 0, pad_value=float("nan")), ValueError, "nan does not fit")
    mixed = Layout("mixed", 16, [[(0, 4, 1)], [(4, 4, 1)], [(8, 4, 2)], [(9, 4, 2)]])
    gather = make("all_gather", layout=mixed)
    refused(
        lambda: gather.core_attn(None, local, local, local),
        NotImplementedError,
        "spans of one stride; got strides 1, 2",
    )
    masks = torch.ones(2, 16, dtype=torch.bool)
    padded = get_cp_handler_cls("ring")(
        cp_group=group, qkv_format="bshd", max_seqlen_q=16, key_padding_mask=masks, config=never
    )
    refused(lambda: padded.roll_tensor(torch.zeros(3, 4), -1, 1), ValueError, "first two dims")
    elsewhere = dist.new_group([0, 1])
    if dist.get_rank() > 1:
        refused(lambda: make("ring", cp_group=elsewhere), ValueError, "this process is not in cp_group")
    else:
        dist.destroy_process_group(elsewhere)
        refused(lambda: make("ring", cp_group=elsewhere), ValueError, "cp_group was destroyed")
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    refused(lambda: make("ring", cp_group=mesh), ValueError, "takes a 1-D device mesh; got 2 dims")
    assert make("ring", cp_group=mesh["inner"]).cp_size == 2
    fifth = torch.randn(4, 5, 8)
    for call in (lambda: make("ring").core_attn(None, fifth, fifth[:, :2], fifth[:, :2]),):
        refused(call, ValueError, "multiple of the key heads")


def test_on_every_rank(ranks: RankPool) -> None:
    ranks.run(on_every_rank)


def test_a_group_destroyed_after_construction(ranks: RankPool) -> None:
    ranks.run(destroyed_later)


def destroyed_later() -> None:
    group = dist.new_group([0, 1, 2, 3])
    handler = get_cp_handler_cls("ring")(cp_group=group, qkv_format="thd", cu_seqlens_q=[0, 16])
    dist.destroy_process_group(group)
    x = torch.randn(4, 2, 8)
    refused(lambda: handler.combine(x, 0), ValueError, "does not exist any more")


class Seat:
    """A group object that can only say who it is, as planners and tests use."""

    def __init__(self, size: int, rank: int) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


def test_a_group_that_cannot_communicate_serves_metadata() -> None:
    handler = get_cp_handler_cls("ring")(cp_group=Seat(4, 1), qkv_format="thd", cu_seqlens_q=np.array([0, 6, 16]))
    assert handler.position_ids.tolist() == [1, 4, 1, 8]
    assert handler.dispatch(torch.arange(16), 0).shape == (4,)
    with pytest.raises(InvalidValueError, match="cannot communicate"):
        handler.combine(torch.arange(4), 0)


LOCAL_METADATA = "cu_seqlens_q must be global, taken before the split over ranks"


def test_local_offsets_are_recognised_wherever_they_are_met() -> None:
    """61 global tokens over 4 ranks, and a handler that was given the offsets of one rank's 16."""
    handler = get_cp_handler_cls("ring")(cp_group=Seat(4, 0), qkv_format="thd", cu_seqlens_q=[0, 16])
    rows = torch.zeros(16, 2, 8)
    for call in (
        lambda: handler.dispatch(torch.zeros(61), 0),
        lambda: get_batch_on_this_cp_rank({"tokens": torch.zeros(61)}, cp_handler=handler),
        lambda: handler.core_attn(None, rows, rows, rows),
        lambda: handler.combine(rows, 0),
        lambda: handler.roll_tensor(rows, -1, 0),
    ):
        with pytest.raises(InvalidValueError, match=LOCAL_METADATA):
            call()
    with pytest.raises(InvalidValueError, match="it looks local"):
        handler.dispatch(torch.zeros(61), 0)
    with pytest.raises(InvalidValueError, match="already dispatched"):
        handler.dispatch(torch.zeros(4), 0)


STRANGE: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no dims": (
        lambda: get_batch_on_this_cp_rank({"x": torch.tensor(3)}, cp_handler=thd()),
        ValueError,
        r"batch\['x'\]",
    ),
    "endless band": (lambda: Bands([(0, float("inf"), 0, 4, 0, 0)]), ValueError, "must hold integers"),
    "table in a list": (lambda: thd().get_emb_on_this_cp_rank([0.0]), TypeError, "a tensor or a pair"),
    "layer by name": (
        lambda: thd().core_attn(None, *[heads(2)] * 3, layer_number="a"),
        TypeError,
        "must be an int; got 'a'",
    ),
    "dense with key offsets": (lambda: dense(cu_seqlens_kv=CU), ValueError, "takes no cu_seqlens_kv"),
    "a scale for a module": (
        lambda: thd().core_attn(lambda *a, **k: a[0], *[heads(2)] * 3, softmax_scale=0.5),
        NotImplementedError,
        "is not told of softmax_scale",
    ),
    "a mask that does not fit": (lambda: thd(mask=Bands([(0, 13, 0, 13, 0, 0)])), ValueError, "past the end"),
    "one rank, another order": (
        lambda: thd(layout=Layout("turned", 12, [[(0, 6, 1, 6), (6, 6, 1, 0)]])),
        NotImplementedError,
        "one rank holds all tokens in global order",
    ),
    "a falling span": (lambda: Layout("mine", 4, [[(3, 4, -1)]]), ValueError, "stride below 1"),
}


@pytest.mark.parametrize("case", STRANGE.values(), ids=STRANGE.keys())
def test_strange_input(case: tuple[Callable[[], Any], type[Exception], str]) -> None:
    call, kind, message = case
    with pytest.raises(kind, match=message) as caught:
        call()
    assert isinstance(caught.value, CPError)


def test_metadata_in_any_integer_type() -> None:
    lengths = {"max_seqlen_q": np.int64(7), "max_seqlen_kv": torch.tensor(7)}
    assert thd(cu_seqlens_kv=torch.tensor(CU), **lengths).max_seqlen_q == 7
    with pytest.raises(InvalidValueError, match="max_seqlen_kv is shorter than the longest document; got 6 for 7"):
        thd(max_seqlen_q=7, max_seqlen_kv=6)


def test_handlers_hold_no_state_of_a_model_and_copy_metadata() -> None:
    offsets = torch.tensor([0, 5, 12])
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=offsets)
    offsets[1] = 9
    assert handler.documents.offsets.tolist() == [0, 5, 12]
    assert isinstance(handler, LayoutHandler)
    assert not isinstance(handler, torch.nn.Module)
    for fact in ("cp_size", "cp_rank", "group", "layout", "mask", "position_ids", "num_local_tokens", "kv_layout"):
        with pytest.raises(AttributeError):
            setattr(handler, fact, None)
    with pytest.raises(InvalidTypeError, match="a name or a Layout"):
        get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 4], layout=7)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [InvalidTypeError, InvalidValueError, UnsupportedError, errors.RankLostError])
def test_errors_travel(kind: type[CPError]) -> None:
    """From a worker process, by pickle or by their text alone, as data loaders send them."""
    error = kind("layout must be a name", got=7, fix="pass 'zigzag'")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error) == "layout must be a name; got 7; pass 'zigzag'"
    assert again.fix == "pass 'zigzag'"
    assert str(kind(str(error))) == str(error)


ERRORS = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, CPError)}


def python_files() -> list[Path]:
    """Every file of the package; some Pythons do not follow the link to its backends."""
    package = Path(cphandler.__file__).parent
    return sorted({*package.rglob("*.py"), *(package / "backends").glob("*.py")})


def errors_without_a_fix() -> dict[str, list[int]]:
    """Lines that make one of our errors, by name or with ``got=``, and name no way out."""
    found: dict[str, list[int]] = {}
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            named = {keyword.arg for keyword in node.keywords}
            ours = isinstance(node.func, ast.Name) and node.func.id in ERRORS
            if (ours or "got" in named) and "fix" not in named:
                found.setdefault(f"{path.parent.name}/{path.stem}", []).append(node.lineno)
    return found


def test_every_error_says_the_way_out() -> None:
    assert not errors_without_a_fix()
