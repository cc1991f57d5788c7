"""Ranks given different batches: an error on every rank after one tiny collective, and no hang."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cphandler import (
    Bands,
    CPConfig,
    Full,
    Layout,
    Mask,
    RankMismatchError,
    gather_last_tokens,
    get_batch_on_this_cp_rank,
    get_cp_handler_cls,
    record_traffic,
    reduce_token_loss,
    token_count,
)
from cphandler.testing import RankPool, partition_group


def message_of(call: Any) -> str:
    try:
        call()
    except RankMismatchError as error:
        return str(error)
    except (TypeError, ValueError) as error:
        return f"own: {error}"
    return "nothing"


def make(group: Any, lengths: list[int], **arguments: Any) -> Any:
    offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    settings = {"cp_group": group, "qkv_format": "thd", "cu_seqlens_q": offsets}
    return get_cp_handler_cls("ring")(**{**settings, **arguments})


def different_offsets() -> str:
    rank = dist.get_rank()
    handler = make(partition_group([range(4)]), [7, 9] if rank != 2 else [8, 8])
    x = torch.randn(4, 2, 8)
    return message_of(lambda: handler.core_attn(None, x, x, x))


def test_different_documents(ranks: RankPool) -> None:
    ranks.run(dist.get_rank)  # starts the pool
    started = time.monotonic()
    messages = ranks.run(different_offsets)
    assert len(set(messages)) == 1
    assert "do not hold the same batch" in messages[0]
    assert "cu_seqlens_q: rank 0 and 1 and 3 has [0, 7, 16]" in messages[0]
    assert "rank 2 has [0, 8, 16]" in messages[0]
    assert "mask" not in messages[0].split("got")[1].split(";")[0]
    assert time.monotonic() - started < 10


def different_in(what: str) -> str:
    odd = dist.get_rank() == 1
    arguments: dict[str, Any] = {}
    if what == "mask" and odd:
        arguments["mask"] = "full"
    if what == "layout" and odd:
        arguments["layout"] = "contiguous"
    if (what == "config" and odd) or what == "option":
        arguments["config"] = CPConfig(kernel="reference")
    handler = make(partition_group([range(4)]), [16], **arguments)
    x = torch.randn(4, 2, 8, dtype=torch.float64 if what == "call" and odd else torch.float32)
    if what == "order" and odd:
        return message_of(lambda: handler.combine(x, 0))
    if what == "after get_batch":
        get_batch_on_this_cp_rank({"tokens": torch.arange(16)}, cp_handler=handler)
        x = x[:, :1] if odd else x
    if what.endswith("combine"):
        shape = torch.zeros(4, 3) if odd else x
        return message_of(
            lambda: handler.combine(x.int() if odd and what.startswith("dtype") else shape if "shape" in what else x, 0)
        )
    if what == "roll":
        return message_of(lambda: handler.roll_tensor(x, -2 if odd else -1, 0))
    options: dict[str, Any] = {"return_lse": True} if what == "option" and odd else {}
    if what == "mask of a call" and odd:
        options = {"mask": "full"}
    if options or what == "option":
        return message_of(lambda: handler.core_attn(None, x, x, x, **options))
    return message_of(lambda: handler.core_attn(None, x, x, x))


EXPECTED = {
    "mask": "mask: rank 0 and 2 and 3 has Causal(align=None) #",
    "layout": "rank 1 has contiguous",
    "config": "'kernel': 'reference'",
    "call": "rank 1 has core_attn (float64",
    "order": "rank 1 has combine",
    "option": "reference, scale 0.353553, return_lse), Causal(align=None)",
    "mask of a call": "Full()",
    "after get_batch": "rank 1 has core_attn (float32 [1, 4, 1, 8]",
    "dtype of combine": "rank 1 has combine dim 0 of int32 [4, 2, 8]",
    "shape of combine": "rank 1 has combine dim 0 of float32 [4, 3]",
    "roll": "rank 1 has roll_tensor by -2",
}


@pytest.mark.parametrize("what", EXPECTED)
def test_other_differences(ranks: RankPool, what: str) -> None:
    messages = ranks.run(different_in, what)
    assert len(set(messages)) == 1
    assert EXPECTED[what] in messages[0]


def other_algorithms(what: str) -> str:
    odd = dist.get_rank() == 1
    group, arguments = partition_group([range(4)]), {"qkv_format": "thd", "cu_seqlens_q": [0, 16]}
    comm_types: Any = ["ring", "ring"] if odd else ["ring", "p2p"]
    if what == "a list and a class":
        comm_types = "ring" if odd else ["ring", "ring"]
    if what in LAYOUTS:
        comm_types, arguments["layout"] = "ring", LAYOUTS[what](odd)
    handler = get_cp_handler_cls("local", comm_types)(cp_group=group, **arguments)
    tokens = torch.zeros(handler.num_local_tokens)
    return message_of(lambda: handler.combine(tokens, 0))


SPANS = [[(4 * rank, 4, 1)] for rank in range(4)]
LAYOUTS: dict[str, Any] = {"rows of a layout": lambda odd: Layout("mine", 16, SPANS, num_local_tokens=6 if odd else 5)}


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("another layer", "rank 1 has LayeredHandler RingHandler RingHandler(thd)"),
        ("a list and a class", "rank 1 has RingHandler(thd)"),
        ("rows of a layout", "rank 1 has mine of 6 rows"),
    ],
)
def test_other_algorithms_and_layouts(ranks: RankPool, what: str, told: str) -> None:
    messages = ranks.run(other_algorithms, what)
    assert len(set(messages)) == 1
    assert told in messages[0]


def one_rank_refuses(method: str) -> str:
    """What only one rank can see raises there, and the others hear of it."""
    handler = make(partition_group([range(4)]), [16])
    odd = dist.get_rank() == 3
    x = torch.randn(4, 2, 8)
    if method == "core_attn":
        return message_of(lambda: handler.core_attn(None, x, x, x.double() if odd else x))
    if method == "get_batch":
        batch = {"tokens": torch.zeros(16 if not odd else 15, dtype=torch.int64)}

        def step() -> None:
            local = get_batch_on_this_cp_rank(batch, cp_handler=handler)
            handler.core_attn(None, x, x, x + local["tokens"].view(-1, 1, 1))

        return message_of(step)
    if method == "token_count":
        labels = torch.zeros(4) if odd else torch.zeros(4, dtype=torch.int64)
        return message_of(lambda: token_count(labels, handler))
    if method == "reduce_token_loss":
        return message_of(lambda: reduce_token_loss(x[:, 0, 0], torch.ones(3 if odd else 4), handler))
    if method == "gather_last_tokens":
        return message_of(lambda: gather_last_tokens(torch.zeros(5 if odd else 4), handler))
    return message_of(lambda: handler.combine(x[:3] if odd else x, 0))


REFUSED = ["core_attn", "combine", "get_batch", "token_count", "reduce_token_loss", "gather_last_tokens"]


@pytest.mark.parametrize("method", REFUSED)
def test_a_refusal_of_one_rank_reaches_the_others(ranks: RankPool, method: str) -> None:
    *others, own = ranks.run(one_rank_refuses, method)
    assert own.startswith("own: ")
    assert len(set(others)) == 1
    assert "another rank of the context-parallel group refused this call; got rank 3: Invalid" in others[0]
    assert own.removeprefix("own: ")[:60] in others[0]


class Reversed(Mask):
    """A caller's mask without a readable name."""

    def bands(self, queries: Any, keys: Any) -> Any:
        return Full().bands(queries, keys)


def other_documents_in_a_function(method: str) -> str:
    """As many tokens on every rank, so that sums could be made of what does not belong together."""
    handler = make(partition_group([range(4)]), [7, 9] if dist.get_rank() != 2 else [4, 4, 8])
    functions: dict[str, Any] = {
        "token_count": lambda: token_count(torch.zeros(4, dtype=torch.int64), handler),
        "reduce_token_loss": lambda: reduce_token_loss(torch.zeros(4), torch.ones(4), handler),
        "gather_last_tokens": lambda: gather_last_tokens(torch.zeros(4), handler),
    }
    return message_of(functions[method])


@pytest.mark.parametrize("method", ["token_count", "reduce_token_loss", "gather_last_tokens"])
def test_functions_of_training_compare_batches_too(ranks: RankPool, method: str) -> None:
    messages = ranks.run(other_documents_in_a_function, method)
    assert len(set(messages)) == 1
    assert "do not hold the same batch" in messages[0]
    assert "rank 2 has [0, 4, 8, 16]" in messages[0]


def own_mask() -> str:
    handler = make(partition_group([range(4)]), [16], mask=Reversed())
    x = torch.randn(4, 2, 8)
    return message_of(lambda: handler.core_attn(None, x, x, x))


def test_masks_are_compared_by_what_they_say(ranks: RankPool) -> None:
    assert ranks.run(own_mask) == ["nothing"] * 4


def many_documents() -> str:
    odd = dist.get_rank() == 1
    handler = make(
        partition_group([range(4)]),
        [5] * 3000 + ([7, 9] if odd else [9, 7]),
        mask=Bands([(i, i + 1, i, i + 1, 0, 0) for i in range(500)]),
    )
    x = torch.randn(handler.num_local_tokens, 1, 8)
    return message_of(lambda: handler.core_attn(None, x, x, x))


def test_long_facts_still_name_ranks(ranks: RankPool) -> None:
    messages = ranks.run(many_documents)
    assert len(set(messages)) == 1
    assert "cu_seqlens_q: rank 0 and 2 and 3 has [0, 5, 10, 15, 20, 25, ...] #" in messages[0]


def how_often(mode: str) -> list[int]:
    group = dist.new_group([0, 1, 2, 3])
    counts = []
    for _ in range(2):
        handler = make(group, [16], config=CPConfig(check_consistency=mode))  # type: ignore[arg-type]
        x = torch.randn(4, 2, 8)
        with record_traffic() as traffic:
            handler.core_attn(None, x, x, x)
            handler.core_attn(None, x, x, x)
        counts.append(traffic.by_operation.get("check", 0))
    return counts


@pytest.mark.parametrize(("mode", "times"), [("always", [1, 1]), ("first", [1, 0]), ("never", [0, 0])])
def test_how_often(ranks: RankPool, mode: str, times: list[int]) -> None:
    per_check = 3 * 1024
    assert ranks.run(how_often, mode) == [[n * per_check for n in times]] * 4


def a_rank_stays_away() -> str:
    group = dist.new_group([0, 1, 2, 3])
    if dist.get_rank() == 2:
        time.sleep(3)
        return "away"
    handler = make(group, [16], config=CPConfig(timeout=1.0))
    return message_of(lambda: handler.combine(torch.zeros(4), 0))


def test_a_rank_that_does_not_come_is_named() -> None:
    with RankPool(4, timeout=30) as pool:
        messages = pool.run(a_rank_stays_away)
    assert messages[2] == "away"
    for message in (messages[0], messages[1], messages[3]):
        assert "rank 2 of the context-parallel group did not reach" in message
        assert "got nothing within 1 seconds" in message


def unchecked(mode: str) -> list[str]:
    lengths = [7, 9] if dist.get_rank() else [16]
    handler = make(partition_group([range(4)]), lengths, config=CPConfig(check_consistency=mode))  # type: ignore[arg-type]
    x = torch.arange(16)

    def round_trip() -> None:
        if not torch.equal(handler.combine(handler.dispatch(x, 0), 0), x):
            raise ValueError("tokens are mixed up")

    return [message_of(round_trip) for _ in range(2)]


def test_without_the_check_the_same_mistake_goes_unnoticed(ranks: RankPool) -> None:
    """The negative control: what the check prevents is a wrong result without any error."""
    assert ranks.run(unchecked, "never") == [["own: tokens are mixed up"] * 2] * 4
    for told in ranks.run(unchecked, "always"):
        assert all("do not hold the same batch" in message for message in told), "the second time as well"


def refused_then_different() -> list[str]:
    """Rank 3 refuses once; then all make the same call over batches that differ."""
    rank = dist.get_rank()
    handler = make(partition_group([range(4)]), [7, 9] if rank else [16])
    x = torch.arange(4)
    first = message_of(lambda: handler.combine(x[:3] if rank == 3 else x, 0))
    return [first, message_of(lambda: handler.combine(x, 0))]


def test_what_was_refused_is_compared_when_it_is_tried_again(ranks: RankPool) -> None:
    *others, own = ranks.run(refused_then_different)
    assert own[0].startswith("own: ")
    assert all("refused this call" in told[0] for told in others)
    assert all("do not hold the same batch" in told[1] for told in (*others, own))


def other_streams() -> str:
    """Two streams of as many local rows: which one is meant is all that differs."""
    arguments = {"cu_seqlens_q": [0, 9, 16], "cu_seqlens_kv": [0, 7, 16], "mask": Full()}
    handler = make(partition_group([range(4)]), [], **arguments)
    return message_of(lambda: handler.combine(torch.zeros(4), 0, stream="kv" if dist.get_rank() == 1 else "q"))


def test_streams_are_compared(ranks: RankPool) -> None:
    for message in ranks.run(other_streams):
        assert "rank 1 has combine dim 0 of stream kv" in message
