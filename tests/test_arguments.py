"""What methods are handed: fill values, dims, tensors of strange kinds, a default device that is not the data's."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Shard as Sharded
from torch.distributed.tensor import distribute_tensor

from cphandler import InvalidTypeError, InvalidValueError, get_cp_handler_cls, record_traffic
from cphandler.testing import RankPool
from cphandler.testing.cases import Batch, Case, group_of, make_handler
from cphandler.testing.laws import same_bits
from tests.nonsense import steady
from tests.test_errors import Seat


def handler_of(size: int = 2, **arguments: Any) -> Any:
    """A handler that is one of several, without a group to talk to."""
    given = {"qkv_format": "thd", "cu_seqlens_q": [0, 5, 12, 13], **arguments}
    return get_cp_handler_cls("ring")(cp_group=Seat(size, size - 1), **given)


NO_NUMBERS = ["x", None, torch.tensor(0), [0], Decimal(1), object()]
UNFIT: list[tuple[Any, torch.dtype]] = [
    (float("nan"), torch.int64),
    (0.5, torch.int32),
    (2**63, torch.int64),
    (10**400, torch.int64),
    (10**400, torch.float64),
    (-1, torch.uint8),
    (-1, torch.uint16),
    (1j, torch.float32),
    (1j, torch.bool),
    (1e5, torch.float16),
    (1e39, torch.float32),
    (complex(0, 1e39), torch.complex64),
    (float("inf"), torch.float8_e4m3fn),
    (500, torch.float8_e4m3fn),
]
FITTING: list[tuple[Any, torch.dtype]] = [
    (np.int64(-100), torch.int64),
    (-100.0, torch.int64),
    (2**63 - 1, torch.int64),
    (2**64 - 1, torch.uint64),
    (np.float32(0.5), torch.float64),
    (np.bool_(True), torch.bool),
    (True, torch.float32),
    (-0.0, torch.float16),
    (float("-inf"), torch.float16),
    (float("nan"), torch.bfloat16),
    (float("nan"), torch.float8_e4m3fn),
    (float("inf"), torch.float8_e5m2),
    (448, torch.float8_e4m3fn),
    (1 + 2j, torch.complex64),
]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=steady)
def test_what_is_no_fill_value(value: Any) -> None:
    handler = handler_of()
    for call in (
        lambda: handler.dispatch(torch.zeros(13), 0, pad_value=value),
        lambda: handler.roll_tensor(torch.zeros(7), fill_value=value),
    ):
        with pytest.raises(InvalidTypeError, match=r"rows can be filled with a number only; got .*; pass 0 or -100"):
            call()


@pytest.mark.parametrize(("value", "dtype"), UNFIT, ids=str)
def test_fill_values_that_a_dtype_cannot_hold(value: Any, dtype: torch.dtype) -> None:
    handler = handler_of()
    for call in (
        lambda: handler.dispatch(torch.zeros(13).to(dtype), 0, pad_value=value),
        lambda: handler.roll_tensor(torch.zeros(7).to(dtype), fill_value=value, return_sum=False),
    ):
        with pytest.raises(InvalidValueError, match=f"does not fit the tensor's dtype; got {dtype}; pass a number"):
            call()


@pytest.mark.parametrize(("value", "dtype"), FITTING, ids=str)
def test_fill_values_to_the_bit(value: Any, dtype: torch.dtype) -> None:
    handler = handler_of()
    plain = value.item() if isinstance(value, np.generic) else value
    wanted = torch.tensor([plain], dtype=dtype)
    last = handler.dispatch(torch.zeros(13).to(dtype), 0, pad_value=value)[-1:]
    assert same_bits(last, wanted), "the pad row"
    whole = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 2])
    rolled, _ = whole.roll_tensor(torch.zeros(2).to(dtype), fill_value=value, return_sum=False)
    assert same_bits(rolled[-1:], wanted), "the row that nothing reaches"


STRANGE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "roll a list": (lambda h: h.roll_tensor([1, 2, 3]), r"takes the tensor first.*got list, int; .*as_tensor"),
    "roll an array": (lambda h: h.roll_tensor(np.zeros(7)), "got ndarray, int"),
    "dispatch a list": (lambda h: h.dispatch([1], 0), "got list, int"),
    "dispatch nothing": (lambda h: h.dispatch(None, 0), "got NoneType, int"),
    "a float for a dim": (lambda h: h.dispatch(torch.zeros(13), 0.0), r"sequence dim must be an int; got 0\.0; pass 0"),
    "True for a dim": (lambda h: h.combine(torch.zeros(7), True), "sequence dim must be an int; got True"),
    "no dim": (lambda h: h.combine(torch.zeros(7), None), "sequence dim must be an int; got None"),
    "a dim by name": (lambda h: h.roll_tensor(torch.zeros(7), dims="seq"), "must be an int; got 'seq'"),
    "shifts by name": (
        lambda h: h.roll_tensor(torch.zeros(7), "one"),
        "shifts must be an int, or a list or tuple of them; got 'one'; pass -1",
    ),
    "sparse": (
        lambda h: h.dispatch(torch.eye(13).to_sparse(), 0),
        r"must be a dense tensor; got torch.sparse_coo; call to_dense\(\)",
    ),
    "sparse rows": (lambda h: h.roll_tensor(torch.eye(7).to_sparse_csr(), -1, 0), "got torch.sparse_csr"),
    "nested": (
        lambda h: h.dispatch(torch.nested.nested_tensor([torch.zeros(5, 2), torch.zeros(8, 2)]), 0),
        r"got a nested tensor; pass values\(\)",
    ),
    "jagged": (
        lambda h: h.combine(torch.nested.nested_tensor([torch.zeros(3), torch.zeros(4)], layout=torch.jagged), 0),
        "got a nested tensor",
    ),
    "sparse queries": (
        lambda h: h.core_attn(None, *[torch.zeros(7, 2, 8).to_sparse()] * 3),
        "query must be a dense tensor",
    ),
}


@pytest.mark.filterwarnings("ignore:.*prototype.*|.*beta.*:UserWarning")
@pytest.mark.parametrize("case", STRANGE.values(), ids=STRANGE.keys())
def test_strange_arguments(case: tuple[Callable[[Any], Any], str]) -> None:
    call, message = case
    with pytest.raises(InvalidTypeError, match=message):
        call(handler_of())


def test_any_shift() -> None:
    """Beyond a document's end nothing comes, however far."""
    padded = {"qkv_format": "bshd", "max_seqlen_q": 4, "key_padding_mask": torch.ones(1, 4, dtype=torch.bool)}
    for given in ({"qkv_format": "thd", "cu_seqlens_q": [0, 1, 4]}, padded, {"qkv_format": "sbhd", "max_seqlen_q": 4}):
        handler = get_cp_handler_cls("local")(**given)
        for shift in (4, 5, 10**30, 2**63, -(10**30), -(2**63)):
            rolled, total = handler.roll_tensor(torch.ones(1, 4), shift, fill_value=7)
            assert rolled.tolist() == [[7.0] * 4]
            assert total == 28


MISPLACED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "heads first": (
        lambda h: h.core_attn(None, *[torch.zeros(4, 7, 8)] * 3),
        r"query must hold this rank's 7 rows in dim 0; .*dim 1 has that length: .*query is \[L, heads, D\]",
    ),
    "batch first": (lambda h: h.dispatch(torch.zeros(2, 13), 0), "expects 13 rows in dim 0; .*dim 1 has that length"),
    "rows of a batch": (
        lambda h: h.dispatch(torch.zeros(2, 24), 0),
        r"got shape \[2, 24\]; dims 0 and 1 have that length together",
    ),
    "roll along the heads": (lambda h: h.roll_tensor(torch.zeros(7, 4)), "in dim 1; .*dim 0 has that length"),
}


@pytest.mark.parametrize("case", MISPLACED.values(), ids=MISPLACED.keys())
def test_a_sequence_in_another_dim_is_looked_for_before_metadata_is_blamed(
    case: tuple[Callable[[Any], Any], str],
) -> None:
    call, message = case
    flat = message.count("together")
    with pytest.raises(InvalidValueError, match=message) as caught:
        call(handler_of(cu_seqlens_q=[0, 24, 48]) if flat else handler_of())
    assert "must be global" not in str(caught.value)


def test_a_dim_of_the_right_size_explains_no_local_tensor() -> None:
    handler = handler_of(4, cu_seqlens_q=[0, 12])
    with pytest.raises(InvalidValueError, match="already dispatched"):
        handler.dispatch(torch.zeros(3, 12), 0)


def distributed_tensors() -> None:
    group, _ = group_of(Case(cp_size=4))
    handler = make_handler(Case("ring", 4, batch=Batch((13,))), group)
    mesh = dist.init_device_mesh("cpu", (4,))
    x = distribute_tensor(torch.zeros(13, 4, 8), mesh, [Sharded(1)])
    rows = distribute_tensor(torch.zeros(4, 4, 8), mesh, [Sharded(1)])
    for call in (
        lambda: handler.dispatch(x, 0),
        lambda: handler.combine(rows, 0),
        lambda: handler.roll_tensor(rows, -1, 0),
        lambda: handler.core_attn(None, rows, rows, rows),
    ):
        with record_traffic() as traffic, pytest.raises(InvalidTypeError, match=r"a DTensor; call to_local\(\) first"):
            call()
        assert traffic.by_operation.keys() <= {"check"}
    assert handler.dispatch(torch.zeros(13), 0).shape == (4,)


def default_devices() -> None:
    """A model is often built under a default device; data that comes then is where it is, and right."""
    group, seed = group_of(Case(cp_size=2))
    x = torch.randn(11, 2, 8, generator=torch.Generator().manual_seed(seed))
    table = torch.randn(7, 8)

    def results(handler: Any) -> list[Tensor]:
        local = handler.dispatch(x, 0, pad_value=3)
        turned = handler.rope(local, handler.get_emb_on_this_cp_rank(table))
        bytes_ = handler.dispatch(x.to(torch.float8_e4m3fn), 0, pad_value=3)
        out = handler.core_attn(None, turned, local, local, dropout_p=0.5, dropout_seed=1, layer_number=1)
        facts = handler.position_ids, handler.valid_mask
        return [local, bytes_, turned, out, handler.combine(out, 0), handler.roll_tensor(local, -1, 0)[0], *facts]

    for backend in ("ring", "p2p", "all_gather", "ulysses", "usp"):

        def made() -> Any:
            arguments = {"cp_group": group, "qkv_format": "thd", "cu_seqlens_q": [0, 7, 11]}
            return get_cp_handler_cls(backend)(**arguments)  # noqa: B023 (called before the next turn)

        expected = results(made())
        with torch.device("meta"):
            for actual, wanted in zip(results(made()), expected, strict=True):
                assert actual.device.type == "cpu", backend
                assert same_bits(actual, wanted), backend


@pytest.mark.parametrize("law", [distributed_tensors, default_devices])
def test_on_every_rank(ranks: RankPool, law: Callable[[], None]) -> None:
    ranks.run(law)
