"""Handlers that are copied, kept, and in flight together."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cphandler import BatchPlan, Causal, CPConfig, SlidingWindow, UnsupportedError, get_cp_handler_cls, plan_batch
from cphandler.testing import RankPool, assert_close
from cphandler.testing.cases import Batch, Case, Data, draw, group_of, make_handler, visible
from cphandler.testing.laws import same_bits
from cphandler.testing.reference import dense_gradients
from tests.test_errors import Seat

Results = list[Tensor]


def forward(handler: Any, data: Data) -> tuple[Results, Tensor]:
    """Local inputs, and attention over them after a roll of the values."""
    dim = handler.seq_dim
    tensors = zip((data.query, data.key, data.value), ("q", "kv", "kv"), strict=True)
    inputs = [handler.dispatch(x, dim, stream=stream).clone().requires_grad_() for x, stream in tensors]
    return inputs, handler.core_attn(None, *inputs, layer_number=1)


def run(handler: Any, data: Data) -> Results:
    """Output and gradients on this rank."""
    inputs, out = forward(handler, data)
    out.backward(handler.dispatch(data.grad_out, handler.seq_dim))
    return [out.detach(), *(x.grad for x in inputs)]


def expected(handler: Any, case: Case, data: Data) -> Results:
    """The same by the definition."""
    dim = handler.seq_dim
    tensors = (data.query, data.key, data.value)
    out, _, grads = dense_gradients(tensors, visible(case), data.grad_out, qkv_format=case.qkv_format)
    streams = zip((out, *grads[:3]), ("q", "q", "kv", "kv"), strict=True)
    return [handler.dispatch(x, dim, stream=stream) for x, stream in streams]


def compare(actual: Results, wanted: Results, what: str) -> None:
    for name, a, w in zip(("out", "dq", "dk", "dv"), actual, wanted, strict=True):
        assert_close(a, w, what=f"{name} of {what}")


COPIED = [
    Case("ring", 2),
    Case("p2p", 2, layout="balanced", mask=SlidingWindow(3)),
    Case("all_gather", 2, "bshd", batch=Batch(real=("xxxxxxxxx", "xxxxx....", "xx..xx.xx"))),
    Case("ulysses", 2, layout="replicated"),
    Case("usp", 4, config=(("ulysses_degree", 2),)),
    Case(("p2p", "a2a"), 4),
    Case("ring", 2, batch=Batch((5, 4), keys=(3, 6)), mask=Causal(align="bottom_right")),
]


def copied(case: Case) -> None:
    """A copy made before the first call, one made after it, and one that outlives the first: each is right alone."""
    group, seed = group_of(case)
    if seed < 0:
        return
    data, handler = draw(case, seed), make_handler(case, group)
    early = copy.deepcopy(handler)
    assert early.group is handler.group
    assert type(early) is type(handler)
    wanted = expected(handler, case, data)
    first = run(handler, data)
    compare(first, wanted, f"{case}")
    model = torch.nn.Module()
    model.cp_handler, model.batch = handler, {"handler": handler, "x": torch.ones(2)}
    late = copy.deepcopy(model)
    assert late.cp_handler is late.batch["handler"], "one object stays one object"
    assert late.cp_handler is not handler
    several = {"early": early, "late": late.cp_handler, "shallow": copy.copy(handler)}
    for name, other in several.items():
        other.position_ids.zero_()
        for a, b in zip(run(other, data), first, strict=True):
            assert same_bits(a, b), f"{name} copy of {case}"
    del handler, model, early, late
    gc.collect()
    compare(run(several["shallow"], data), wanted, f"what is left of {case}")


@pytest.mark.parametrize("case", COPIED, ids=str)
def test_a_copy_is_a_handler_of_its_own_in_the_same_group(ranks: RankPool, case: Case) -> None:
    ranks.run(copied, case)


def checked_alone() -> None:
    """A copy made before the first exchange has a check of its own, and each knows what it has done itself."""
    case = Case("ring", 4, config=(("check_consistency", "always"),))
    group, seed = group_of(case)
    handler = make_handler(case, group)
    other = copy.deepcopy(handler)
    x = handler.dispatch(draw(case, seed).query, 0)
    other.combine(x, 0)
    assert handler._consistency.pending
    assert not other._consistency.pending
    handler.combine(x, 0)
    after = copy.deepcopy(handler)
    assert not after._consistency.pending


def test_a_copy_is_checked_alone(ranks: RankPool) -> None:
    ranks.run(checked_alone)


def test_copies_share_what_cannot_change_and_nothing_else() -> None:
    handler = get_cp_handler_cls("ring")(
        cp_group=Seat(2, 1), qkv_format="thd", cu_seqlens_q=[0, 7, 11], position_ids=torch.arange(11)
    )
    other = copy.deepcopy(handler)
    assert other.config is handler.config
    assert other.mask is handler.mask
    assert other.layout is handler.layout
    assert other.attention is not handler.attention
    assert other.attention.host is other
    assert torch.equal(other.position_ids, handler.position_ids)
    assert handler.global_positions is not None
    after = copy.deepcopy(handler)
    for each in (handler, other, after):
        assert not each.global_positions.flags.writeable, "else positions not asked for yet could be edited"
    kept = {name: value for name, value in vars(handler).items() if isinstance(value, dict)}
    assert kept, "a handler remembers something"
    for name, value in kept.items():
        assert vars(other)[name] is not value, f"{name} is one for both"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_handler_is_not_pickled(protocol: int) -> None:
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 7], config=CPConfig())
    saves: list[Callable[[Any], Any]] = [
        lambda x: pickle.dumps(x, protocol),
        lambda x: torch.save({"handler": x}, io.BytesIO(), pickle_protocol=max(2, protocol)),
    ]
    for save in saves:
        with pytest.raises(UnsupportedError, match=r"cannot be pickled.*send the BatchPlan that plan_batch makes"):
            save(handler)
    assert isinstance(pickle.loads(pickle.dumps(plan_batch([0, 7], 2))), BatchPlan), "what the error says travels"


FLIGHTS = ("ring", "p2p", "ulysses")


def in_flight(backend: str) -> None:
    """Two batches of other lengths, masks and layouts: backward passes in the order of the forward ones, and turned."""
    made = [
        Case(backend, 2, batch=Batch((13, 3, 6))),
        Case(backend, 2, batch=Batch((4, 7)), mask=SlidingWindow(2), layout="contiguous"),
    ]
    group, seed = group_of(made[0])
    for order in ((0, 1), (1, 0)):
        handlers = [make_handler(case, group) for case in made]
        data = [draw(case, seed + i) for i, case in enumerate(made)]
        flights = [forward(handler, each) for handler, each in zip(handlers, data, strict=True)]
        for i in order:
            inputs, out = flights[i]
            out.backward(handlers[i].dispatch(data[i].grad_out, 0))
            actual = [out.detach(), *(x.grad for x in inputs)]
            compare(actual, expected(handlers[i], made[i], data[i]), f"batch {i} of two in flight, order {order}")


@pytest.mark.parametrize("backend", FLIGHTS)
def test_two_handlers_in_flight(ranks: RankPool, backend: str) -> None:
    ranks.run(in_flight, backend)
