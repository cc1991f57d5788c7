"""What one forward and backward pass costs, counted and not timed: a change that makes a number grow fails here.

Numbers may fall: then the table is to follow. What Python and torch do by themselves is compared only with the versions
that development is pinned to.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cphandler import get_cp_handler_cls, record_traffic
from cphandler.testing import RankPool, partition_group

ROOT = Path(__file__).parent.parent

BATCHES = {"one document": (1536,), "packed": (700, 3, 250, 1, 390, 192), "equal": (24,) * 64}

ALLOCATIONS = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty")


class Cost(NamedTuple):
    """Of the costliest rank, or of all where it says so.

    Attributes:
        kernels: calls of the attention kernel.
        messages: sent by all ranks.
        sent: bytes, by all ranks.
        copies: tensors copied.
        allocations: tensors made.
        calls: of Python functions.
    """

    kernels: int
    messages: int
    sent: int
    copies: int
    allocations: int
    calls: int


def fresh(q: Tensor) -> Tensor:
    return q.detach().clone().requires_grad_()


def costs(backend: str, size: int, lengths: tuple[int, ...]) -> dict[str, int] | None:
    """This rank's part, of the third step over a batch: all that can be kept is kept by then."""
    group = partition_group([range(size)])
    if group is None:
        return None
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    handler = get_cp_handler_cls(backend)(cp_group=group, qkv_format="thd", cu_seqlens_q=offsets)
    generator = torch.Generator().manual_seed(dist.get_rank())
    rows = handler.num_local_tokens
    q, k, v, grad = (torch.randn(rows, heads, 32, generator=generator) for heads in (4, 2, 2, 4))

    def step() -> None:
        tensors = [fresh(x) for x in (q, k, v)]
        handler.core_attn(None, *tensors).backward(grad)

    step(), step()
    with record_traffic() as traffic, profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    counts = Counter({event.key: event.count for event in seen.key_averages()})
    calls = 0

    def called(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    least = None
    gc.collect()
    gc.disable()  # what it happens to finalize in a step is none of the step's
    try:
        for _ in range(5):
            calls = 0
            sys.setprofile(called)
            step()
            sys.setprofile(None)
            least = calls if least is None else min(least, calls)
    finally:
        gc.enable()
    return {
        "kernels": sum(n for name, n in counts.items() if "flash_attention_for_cpu" in name),
        "messages": traffic.messages,
        "sent": traffic.sent_bytes,
        "copies": counts["aten::copy_"],
        "allocations": sum(counts[name] for name in ALLOCATIONS),
        "calls": least,
    }


MOST: dict[tuple[str, int, str], Cost] = {
    ("local", 1, "one document"): Cost(2, 0, 0, 3, 16, 236),
    ("local", 1, "packed"): Cost(32, 0, 0, 83, 186, 1178),
    ("local", 1, "equal"): Cost(2, 0, 0, 3, 16, 271),
    ("ring", 2, "one document"): Cost(14, 12, 2359296, 37, 95, 902),
    ("ring", 2, "packed"): Cost(28, 12, 2359296, 68, 172, 1216),
    ("ring", 2, "equal"): Cost(4, 12, 2359296, 5, 35, 776),
    ("ring", 4, "one document"): Cost(12, 72, 7077888, 22, 92, 1088),
    ("ring", 4, "packed"): Cost(40, 72, 7077888, 77, 250, 1785),
    ("p2p", 2, "one document"): Cost(14, 12, 1769472, 33, 93, 920),
    ("p2p", 2, "packed"): Cost(28, 12, 1769472, 58, 172, 1261),
    ("p2p", 2, "equal"): Cost(4, 12, 1769472, 4, 41, 659),
    ("p2p", 4, "one document"): Cost(12, 72, 5308416, 18, 94, 1204),
    ("p2p", 4, "packed"): Cost(40, 72, 5311488, 64, 254, 1954),
    ("all_gather", 2, "one document"): Cost(14, 12, 2359296, 37, 101, 922),
    ("all_gather", 2, "packed"): Cost(28, 12, 2359296, 68, 178, 1242),
    ("all_gather", 2, "equal"): Cost(4, 12, 2359296, 5, 41, 796),
    ("ulysses", 2, "one document"): Cost(2, 16, 2359296, 19, 48, 633),
    ("ulysses", 2, "packed"): Cost(32, 16, 2359296, 99, 218, 1575),
    ("ulysses", 2, "equal"): Cost(2, 16, 2359296, 19, 48, 668),
    ("ulysses", 4, "one document"): Cost(2, 96, 4718592, 27, 80, 659),
    ("ulysses", 4, "packed"): Cost(32, 96, 4718592, 107, 250, 1601),
    ("ulysses", 4, "equal"): Cost(2, 96, 4718592, 27, 80, 694),
    ("usp", 4, "one document"): Cost(14, 56, 4128768, 49, 133, 1279),
    ("usp", 4, "packed"): Cost(26, 56, 4131840, 72, 201, 1566),
}
"""What a pass cost when it was last looked at, in this order: see :class:`Cost`."""


def pinned() -> bool:
    constraints = (ROOT / "constraints.txt").read_text()
    torch_version = torch.__version__.partition("+")[0]
    return sys.version_info[:2] == (3, 11) and f"torch=={torch_version}\n" in constraints


@pytest.mark.parametrize(("backend", "size", "batch"), MOST)
def test_nothing_costs_more_than_it_did(ranks: RankPool, backend: str, size: int, batch: str) -> None:
    parts = [part for part in ranks.run(costs, backend, size, BATCHES[batch]) if part is not None]
    assert len(parts) == size
    found = Cost(
        **{name: max(part[name] for part in parts) for name in ("kernels", "copies", "allocations", "calls")},
        **{name: sum(part[name] for part in parts) for name in ("messages", "sent")},
    )
    fields = Cost._fields if pinned() else ("kernels", "messages", "sent")
    more = {
        name: f"{getattr(found, name)} instead of {getattr(MOST[backend, size, batch], name)}"
        for name in fields
        if getattr(found, name) > getattr(MOST[backend, size, batch], name)
    }
    assert not more, f"{backend} on {size} ranks, {batch}: {more}; all of it: {found}"
