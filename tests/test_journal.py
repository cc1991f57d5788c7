"""What ranks do differently after a handler's first exchange: told by the next handler's check, or before each call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from cphandler import CPConfig, RankMismatchError, SlidingWindow, get_cp_handler_cls
from cphandler.testing import RankPool, partition_group

WINDOW = SlidingWindow(2)


def make(backend: str, mode: str) -> Any:
    config = CPConfig(check_consistency=mode)  # type: ignore[arg-type]
    group = partition_group([(0, 1), (2, 3)])
    return get_cp_handler_cls(backend)(cp_group=group, qkv_format="thd", cu_seqlens_q=[0, 9, 16], config=config)


def forget(handler: Any) -> None:
    """Let the ranks' journals agree again, as a run would only by ending."""
    journal = handler._consistency._journal
    journal.calls, journal.last = 0, "none"
    journal.start_afresh()


def inputs(handler: Any, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return [
        torch.randn(handler.num_local_tokens, 2, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3)
    ]


def nothing_else(handler: Any) -> None:
    q, k, v = inputs(handler)
    for mask in (WINDOW, None):
        checkpoint(
            lambda q, mask: handler.core_attn(None, q, k, v, mask=mask), q, mask, use_reentrant=False
        ).sum().backward()
    handler.roll_tensor(torch.arange(handler.num_local_tokens))
    handler.combine(q, 0).sum().backward()


def another_mask(handler: Any, odd: bool) -> None:
    q, k, v = inputs(handler)
    handler.core_attn(None, q, k, v)
    handler.core_attn(None, q, k, v, mask=WINDOW if odd else None)


def other_order_of_masks(handler: Any, odd: bool) -> None:
    q, k, v = inputs(handler)
    handler.core_attn(None, q, k, v)
    for mask in (WINDOW, None) if odd else (None, WINDOW):
        handler.core_attn(None, q, k, v, mask=mask)


def another_shift(handler: Any, odd: bool) -> None:
    tokens = torch.arange(handler.num_local_tokens)
    handler.roll_tensor(tokens)
    handler.combine(tokens if odd else tokens + 1, 0, grad="sum" if odd else "replicated")


def other_order_of_backwards(handler: Any, odd: bool) -> None:
    q, k, v = inputs(handler)
    outputs = [handler.core_attn(None, q, k, v) for _ in range(2)]
    for out in outputs if odd else reversed(outputs):
        out.sum().backward()


DIFFERENCES = {
    "another mask": (another_mask, "SlidingWindow"),
    "other order of masks": (other_order_of_masks, "SlidingWindow"),
    "another grad": (another_shift, "grad sum"),
    "other order of backward passes": (other_order_of_backwards, "backward of call"),
}


def told_by_the_next_check(difference: str, backend: str) -> tuple[str, str]:
    """What the next handler of the group says, and what one says after that, when all was the same in between."""
    odd = dist.get_rank() == 1
    DIFFERENCES[difference][0](make(backend, "always"), odd)
    messages = []
    for _ in range(2):
        try:
            nothing_else(make(backend, "always"))
            messages.append("nothing")
        except RankMismatchError as error:
            messages.append(str(error))
            forget(make(backend, "always"))
    return messages[0], messages[1]


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_the_next_check_tells(ranks: RankPool, difference: str) -> None:
    told = ranks.run(told_by_the_next_check, difference, "ulysses")
    for message, after in told[:2]:
        assert "have not made the same calls" in message
        assert "calls before: rank 0 has" in message
        assert DIFFERENCES[difference][1] in message
        assert after == "nothing"
    assert told[2:] == [("nothing", "nothing")] * 2, "the group beside it has nothing to do with this"


def other_dtype(handler: Any, odd: bool) -> None:
    handler.core_attn(None, *inputs(handler))
    handler.core_attn(None, *inputs(handler, torch.float64 if odd else torch.float32))


def one_layer_fewer(handler: Any, odd: bool) -> None:
    q, k, v = inputs(handler)
    handler.core_attn(None, q, k, v)
    if not odd:
        handler.core_attn(None, q, k, v)
    handler.combine(q, 0)


def refuses_later(handler: Any, odd: bool) -> None:
    q, k, v = inputs(handler)
    handler.core_attn(None, q, k, v)
    try:
        handler.core_attn(None, q[1:] if odd else q, k, v)
    except ValueError as error:
        if isinstance(error, RankMismatchError) == odd:
            raise AssertionError("its own error where it is wrong, the other rank's word for it elsewhere") from error
        raise RankMismatchError("told") from error


def backwards_of_other_sizes(handler: Any, odd: bool) -> None:
    """Layers of other numbers of heads: what is sent before anything is compared does not fit."""
    outputs = []
    for heads in (2, 4):
        q, k, v = (x.detach().repeat(1, heads // 2, 1).requires_grad_() for x in inputs(handler))
        outputs.append(handler.core_attn(None, q, k, v))
    for out in outputs if odd else reversed(outputs):
        out.sum().backward()


AT_ONCE = {
    **DIFFERENCES,
    "another dtype": (other_dtype, "float64"),
    "one layer fewer": (one_layer_fewer, "combine"),
    "a refusal": (refuses_later, "told"),
    "backward passes of other sizes": (backwards_of_other_sizes, "backward of call"),
}


def told_before_the_call(difference: str, backend: str) -> str:
    try:
        AT_ONCE[difference][0](make(backend, "each_call"), dist.get_rank() % 2 == 1)
    except RankMismatchError as error:
        forget(make(backend, "each_call"))
        return str(error)
    return "nothing"


@pytest.mark.parametrize("difference", AT_ONCE)
@pytest.mark.parametrize("backend", ["ulysses", "p2p"])
def test_each_call_is_compared_before_it_is_made(ranks: RankPool, difference: str, backend: str) -> None:
    for message in ranks.run(told_before_the_call, difference, backend):
        assert AT_ONCE[difference][1] in message


def all_the_same(mode: str, backend: str) -> str:
    first, second = make(backend, mode), make(backend, mode)
    nothing_else(first)
    nothing_else(second)
    nothing_else(first)
    q, k, v = inputs(first)
    outputs = [handler.core_attn(None, q, k, v) for handler in (first, second)]
    for out in outputs:  # two batches in flight
        out.sum().backward()
    nothing_else(make(backend, mode))
    return "nothing"


@pytest.mark.parametrize("mode", ["always", "first", "never", "each_call"])
def test_ranks_that_do_the_same_hear_nothing(ranks: RankPool, mode: str) -> None:
    assert ranks.run(all_the_same, mode, "ring") == ["nothing"] * 4


def rolls_alone_on_a_layout_of_all_tokens() -> str:
    """A roll that sends nothing, and its backward pass, on one rank only; what comes next is no other for it."""
    group = partition_group([(0, 1), (2, 3)])
    whole = get_cp_handler_cls("ulysses")(
        cp_group=group, qkv_format="thd", cu_seqlens_q=[0, 9, 16], layout="replicated"
    )
    whole.agree()
    if dist.get_rank() % 2:
        x = torch.randn(16, requires_grad=True)
        whole.roll_tensor(x)[0].sum().backward()
    try:
        make("ulysses", "always").agree()
    except RankMismatchError as error:
        forget(make("ulysses", "always"))
        return str(error)
    return "nothing"


def test_a_roll_that_sends_nothing_is_nobodys_call(ranks: RankPool) -> None:
    assert ranks.run(rolls_alone_on_a_layout_of_all_tokens) == ["nothing"] * 4
