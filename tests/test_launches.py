"""What one call asks of a GPU: launches, tables and waits, counted on operators that compute nothing."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from cphandler import (
    Causal,
    CPConfig,
    Full,
    InvalidValueError,
    Mask,
    PerDocument,
    SlidingWindow,
    clear_plan_cache,
    get_cp_handler_cls,
)
from cphandler.kernels import launches
from cphandler.kernels.buffer import Buffer, on_device
from cphandler.kernels.varlen import VarlenKernel, _is_aligned
from cphandler.testing import RankPool, relative_error
from tests.doubles import operators
from tests.doubles.packages import kernels_on_cpu

WAITS = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")
"""Operators that wait for a device, had they tensors on one."""

LENGTHS = [16 * (i % 7 + 1) for i in range(40)]


def hollow_forward(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, *rest: Any, **options: Any) -> Any:
    operators.counted.append("forward")
    shape = (q.shape[1], len(q)) if starts is not None else (len(q), q.shape[2], q.shape[1])
    none = torch.empty(0)
    return torch.zeros_like(q), q.new_zeros(shape, dtype=torch.float32), none, none.clone(), none.clone()


def hollow_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
    operators.counted.append("backward")
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


HOLLOW = {"_flash_attention_forward": hollow_forward, "_flash_attention_backward": hollow_backward}


def step(backend: str, mask: Mask, lengths: list[int]) -> dict[str, Any]:
    """Of the second of two equal calls: launches by name, waits, and tables that went to the device."""
    with mock.patch.dict(operators.DOUBLES, HOLLOW), kernels_on_cpu() as calls:
        clear_plan_cache()
        group = None if backend == "local" else torch.distributed.group.WORLD
        handler = get_cp_handler_cls(backend)(
            cp_group=group,
            qkv_format="thd",
            cu_seqlens_q=torch.tensor([0, *np.cumsum(lengths)]),
            mask=mask,
            config=CPConfig(kernel="double_torch_flash"),
        )
        rows = handler.num_local_tokens
        q, k, v = (torch.randn(rows, n, 16, dtype=torch.bfloat16, requires_grad=True) for n in (8, 4, 4))

        def call() -> None:
            torch.autograd.grad(handler.core_attn(None, q, k, v), (q, k, v), torch.zeros(rows, 8, 16).bfloat16())

        call()
        calls.clear()
        with (
            mock.patch.object(launches, "on_device", side_effect=launches.on_device) as tables,
            profile(activities=[ProfilerActivity.CPU]) as seen,
        ):
            call()
        waits = [event.name for event in seen.events() if event.name in WAITS]
        made = {name: calls.count(name) for name in ("forward", "backward")}
        return {"launches": made, "waits": waits, "tables": tables.call_count}


@pytest.mark.parametrize("number", [1, 40])
@pytest.mark.parametrize("mask", [Causal(), Full(), SlidingWindow(1000), SlidingWindow(9)], ids=str)
def test_one_rank_makes_one_launch(mask: Mask, number: int) -> None:
    """A window wider than a document is a causal launch."""
    found = step("local", mask, LENGTHS[-number:] if number > 1 else [64])
    assert found["launches"] == {"forward": 1, "backward": 1}
    assert found["waits"] == []
    assert found["tables"] == 0


@pytest.mark.parametrize("mask", [Causal(), Full(), SlidingWindow(20), SlidingWindow(5, 2)], ids=str)
def test_documents_shorter_than_a_window_go_with_the_others(mask: Mask) -> None:
    """What a window hides of them is what another one does: one launch, and all rows lie side by side."""
    assert step("local", mask, [16, 1, 40, 1, 2, 1, 3])["launches"] == {"forward": 1, "backward": 1}


def answers(kernel: str, lengths: list[int], mask: Mask) -> list[Tensor]:
    """Output and gradients in bfloat16."""
    generator = torch.Generator().manual_seed(3)
    offsets = [0, *np.cumsum(lengths).tolist()]
    handler = get_cp_handler_cls("local")(
        qkv_format="thd", cu_seqlens_q=offsets, mask=mask, config=CPConfig(kernel=kernel)
    )
    q, k, v, grad = (torch.randn(offsets[-1], n, 16, generator=generator).bfloat16() for n in (4, 2, 2, 4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = handler.core_attn(None, *leaves)
    assert isinstance(out, Tensor)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(3)], ids=str)
def test_many_documents_are_several_launches(monkeypatch: pytest.MonkeyPatch, mask: Mask) -> None:
    """So that neither a grid nor what a backward pass holds for each task grows with them."""
    lengths = [5, 1, 9, 2, 7, 1, 1, 12, 3, 4]
    whole = answers("reference", lengths, mask)
    monkeypatch.setattr(VarlenKernel, "most_tasks", 4)
    with kernels_on_cpu() as calls:
        clear_plan_cache()
        parts = answers("double_torch_flash", lengths, mask)
    assert calls.count("flash forward") == calls.count("flash backward") == 3
    for part, expected in zip(parts, whole, strict=True):
        assert relative_error(part.double(), expected.double()) < 0.01


def test_cudnn_is_given_no_packed_sequences_and_none_of_one_row() -> None:
    lengths = [5, 1, 9, 2]
    whole = answers("reference", lengths, Causal())
    with kernels_on_cpu() as calls:
        clear_plan_cache()
        parts = answers("double_torch_cudnn", lengths, Causal())
    assert (calls.count("cudnn forward"), calls.count("cudnn backward")) == (3, 3)
    for part, expected in zip(parts, whole, strict=True):
        assert relative_error(part.double(), expected.double()) < 0.01


def test_rows_that_vectors_cannot_be_read_from_are_copied() -> None:
    rows = torch.randn(6, 2, 2, 24).bfloat16()
    aligned = rows[..., :16], rows[::2], rows[:, :1], rows.transpose(1, 2), rows[:, :, :, 8:16]
    assert all(_is_aligned(x) for x in aligned)
    odd = torch.randn(6, 2, 2, 20).bfloat16()[..., :16]
    for x in (rows[..., 1:17], odd, rows.transpose(-1, -2)):
        assert not _is_aligned(x)


def test_a_step_of_an_exchange_makes_one_launch(ranks: RankPool) -> None:
    """Four steps of a ring: the local one is causal, the others are rectangles, whatever the number of documents."""
    for found in ranks.run(step, "ring", Causal(), LENGTHS):
        assert found["launches"] == {"forward": 4, "backward": 4}
        assert found["waits"] == []
        assert found["tables"] == 0


@pytest.mark.parametrize(("backend", "steps"), [("ulysses", 1), ("p2p", 4), ("all_gather", 4)])
def test_other_exchanges(ranks: RankPool, backend: str, steps: int) -> None:
    """One launch for each rank whose keys are seen; Ulysses has all of them at once."""
    for found in ranks.run(step, backend, Causal(), LENGTHS):
        assert found["launches"] == {"forward": steps, "backward": steps}
        assert found["waits"] == []
        assert found["tables"] == 0


def test_all_tables_of_a_block_come_in_one_copy() -> None:
    """Of several windows over padded documents: offsets, rows to gather and rows to add to, forward and backward."""
    with mock.patch.dict(operators.DOUBLES, HOLLOW), kernels_on_cpu():
        clear_plan_cache()
        offsets = {"cu_seqlens_q": [0, 16, 36, 50, 64, 84], "cu_seqlens_q_padded": [0, 18, 39, 54, 68, 90]}
        config = CPConfig(kernel="double_torch_flash")
        mask = PerDocument((SlidingWindow(9), SlidingWindow(3), SlidingWindow(9), SlidingWindow(3), Full()))
        handler = get_cp_handler_cls("local")(qkv_format="thd", mask=mask, config=config, **offsets)
        q = torch.randn(90, 2, 16, dtype=torch.bfloat16, requires_grad=True)
        with mock.patch.object(Buffer, "write", autospec=True, side_effect=Buffer.write) as written:
            handler.core_attn(None, q, q, q).sum().backward()
    assert written.call_count == 1
    assert len(written.call_args.args[1]) > 4


class Copies(TorchDispatchMode):
    """Counts what is copied."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += "copy" in func._schema.name
        return func(*args, **kwargs or {})


def test_a_buffer_is_one_copy_to_another_device() -> None:
    """A device without memory of its own stands for one that has some."""
    tables = [np.arange(7), np.arange(3, dtype=np.int32), np.ones((2, 5), dtype=np.bool_), np.zeros(0, dtype=np.int64)]
    with Copies() as copies, torch.device("meta"):  # the default device is not where tables are laid out
        views = on_device(tables, torch.device("meta"))
    assert copies.number == 1
    assert [(list(x.shape), x.dtype) for x in views] == [
        ([7], torch.int64),
        ([3], torch.int32),
        ([2, 5], torch.bool),
        ([0], torch.int64),
    ]
    for view, table in zip(on_device(tables, torch.device("cpu")), tables, strict=True):
        assert torch.equal(view, torch.from_numpy(table))
        assert view.data_ptr() % 16 == 0 or not len(table)


def test_a_buffer_takes_tables_of_its_shapes() -> None:
    buffer = Buffer([np.arange(3), np.arange(2)], torch.device("cpu"))
    for wrong in ([np.arange(3)], [np.arange(3), np.arange(3)], [np.arange(3), np.arange(2, dtype=np.int32)]):
        with pytest.raises(InvalidValueError, match="tables must have the shapes of those whose place they take"):
            buffer.write(wrong)
    buffer.write([np.arange(3) + 5, np.arange(2) + 9])
    assert [view.tolist() for view in buffer.views] == [[5, 6, 7], [9, 10]]


def test_where_the_table_of_the_log_sum_exp_has_each_row_is_found_once() -> None:
    """Every layer asks, forward and backward: the efficient kernel's table has a row for each sequence."""
    with kernels_on_cpu():
        clear_plan_cache()
        config = CPConfig(kernel="double_torch_efficient")
        searches = []
        for lengths in ([5, 11], [9, 7]):
            handler = get_cp_handler_cls("local")(
                qkv_format="thd", cu_seqlens_q=[0, *np.cumsum(lengths)], mask=Causal(), config=config
            )
            for _ in range(2):
                q, k, v = (torch.randn(16, 2, 16, requires_grad=True) for _ in range(3))
                with profile(activities=[ProfilerActivity.CPU]) as seen:
                    out = handler.core_attn(None, q, k, v)
                    torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
                searches.append([event.name for event in seen.events()].count("aten::searchsorted"))
        assert searches == [1, 0, 1, 0]
