"""Attention under context parallelism beside one process with torch's own kernel, on the same work in the same run.

Prints, per backend and number of ranks, the CPU seconds of forward and forward+backward summed over ranks, as a ratio
to the plain kernel on one rank (median of interleaved repeats), and the bytes all ranks sent beside the theoretical
count.

    python benchmarks/attention.py                      # one causal sequence of 4096 tokens
    python benchmarks/attention.py --kv-heads 2 --ranks 2 --ranks 4
    python benchmarks/attention.py --lengths 900,64,243,1500,1389 --layout zigzag
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from cphandler import Causal, Documents, get_cp_handler_cls, record_traffic
from cphandler.handler import ContextParallelHandler
from cphandler.testing import RankPool, assert_close, visible_pairs

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
"""Without these, glibc returns every large buffer to the system, and page faults dominate for all alike."""


@dataclass(frozen=True)
class Work:
    """What everybody computes.

    Attributes:
        backend: ``"plain"`` for torch's kernel on one rank, or a backend of the library.
        ranks: how many.
        lengths: documents of the packed causal batch.
        heads: query heads.
        kv_heads: key heads.
        head_dim: channels of a head.
        dtype: name of the dtype.
        layout: layout name, or None for the backend's own.
    """

    backend: str
    ranks: int
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    layout: str | None

    @property
    def tokens(self) -> int:
        """Global tokens."""
        return sum(self.lengths)

    def documents(self) -> Documents:
        """The packed documents."""
        return Documents.from_cu_seqlens([0, *torch.tensor(self.lengths).cumsum(0).tolist()])


@dataclass
class Sample:
    """One rank's measurements: CPU seconds and bytes sent."""

    forward: float
    both: float
    forward_bytes: int
    both_bytes: int


def plain_attention(work: Work, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's scaled dot product attention, one call per document."""
    outs = []
    for qi, ki, vi in zip(*(x.split(work.lengths) for x in (q, k, v)), strict=True):
        query, key, value = (x.unsqueeze(0).transpose(1, 2) for x in (qi, ki, vi))
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=work.heads != work.kv_heads
        )
        outs.append(out.transpose(1, 2).squeeze(0))
    return torch.cat(outs)


@lru_cache(maxsize=64)
def prepared(work: Work) -> tuple[ContextParallelHandler | None, list[Tensor]]:
    """This rank's handler and tensors, made once."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(work.tokens, heads, work.head_dim) for heads in (work.heads, work.kv_heads, work.kv_heads, work.heads)]
    tensors = [torch.randn(shape, generator=generator).to(getattr(torch, work.dtype)) for shape in shapes]
    if work.backend == "plain":
        return None, [x.requires_grad_(i < 3) for i, x in enumerate(tensors)]
    group = dist.group.WORLD if work.ranks > 1 else None
    handler = get_cp_handler_cls(work.backend)(
        cp_group=group, qkv_format="thd", cu_seqlens_q=work.documents().offsets, layout=work.layout
    )
    return handler, [handler.dispatch(x, 0).requires_grad_(i < 3) for i, x in enumerate(tensors)]


def measure(work: Work) -> Sample:
    """One forward and backward pass on this rank."""
    handler, (q, k, v, grad_out) = prepared(work)
    for x in (q, k, v):
        x.grad = None
    if dist.get_world_size() > 1:
        dist.barrier()
    with record_traffic() as traffic:
        started = time.process_time()
        out = plain_attention(work, q, k, v) if handler is None else handler.core_attn(None, q, k, v)
        forward, forward_bytes = time.process_time() - started, traffic.sent_bytes
        out.backward(grad_out)
        both = time.process_time() - started
    return Sample(forward, both, forward_bytes, traffic.sent_bytes)


def result(work: Work) -> list[Tensor]:
    """Global output and gradients, to refuse to time what is wrong."""
    measure(work)
    handler, (q, k, v, _) = prepared(work)
    if handler is None:
        return [plain_attention(work, q, k, v).detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]
    out = handler.core_attn(None, q, k, v)
    return [handler.combine(x, 0).detach() for x in (out, *(x.grad for x in (q, k, v) if x.grad is not None))]


def theoretical_bytes(work: Work) -> tuple[int, int]:
    """Bytes that all ranks send, forward and in all, counted from who sees whom and from nothing of the library's plan.

    Ring: a block makes as many hops as the farthest rank that sees a key of it; gradients start at the nearest such
    rank and make one more hop, home. All-gather: every block to every other rank, gradients back. Ulysses: every head
    that another rank computes, once each way.
    """
    size = torch.empty(0, dtype=getattr(torch, work.dtype)).element_size()
    accumulator = max(size, 4)
    rows, ranks = -(-work.tokens // work.ranks), work.ranks
    block = rows * 2 * work.kv_heads * work.head_dim
    if work.backend == "all_gather":
        travels = ranks * (ranks - 1) * block
        return travels * size, 2 * travels * size + travels * accumulator
    if work.backend == "ulysses":
        share = work.heads // ranks
        group = work.heads // work.kv_heads
        keys = sum(((r + 1) * share - 1) // group - r * share // group + 1 for r in range(ranks))
        moved = (ranks - 1) * rows * work.head_dim * (2 * work.heads + 2 * keys)
        return moved * size, 2 * moved * size
    first, last = hops(work)
    keys_out, grads_home = sum(last), sum(b - a + 1 for a, b in zip(first, last, strict=True) if b)
    return keys_out * block * size, 2 * keys_out * block * size + grads_home * block * accumulator


def hops(work: Work) -> tuple[list[int], list[int]]:
    """Per owner, ring distance to the nearest and the farthest rank that sees one of its keys, from the dense mask."""
    handler_cls = get_cp_handler_cls(work.backend)

    @dataclass
    class Seat:
        place: int

        def size(self) -> int:
            return work.ranks

        def rank(self) -> int:
            return self.place

    seen = visible_pairs(Causal(), work.documents())
    offsets = work.documents().offsets
    held = [
        handler_cls(cp_group=Seat(r), qkv_format="thd", cu_seqlens_q=offsets, layout=work.layout).dispatch(
            torch.arange(work.tokens), 0, pad_value=-1
        )
        for r in range(work.ranks)
    ]
    held = [tokens[tokens >= 0] for tokens in held]
    first, last = [], []
    for owner, keys in enumerate(held):
        away = [s for s in range(1, work.ranks) if seen[held[(owner + s) % work.ranks]][:, keys].any()]
        first.append(min(away, default=0))
        last.append(max(away, default=0))
    return first, last


def collect(works: list[Work], repeats: int, console: Console) -> dict[Work, list[list[Sample]]]:
    """Check every competitor against the plain kernel, then measure all in turn, ``repeats`` times."""
    samples: dict[Work, list[list[Sample]]] = {work: [] for work in works}
    with ExitStack() as stack:
        pools = {n: stack.enter_context(RankPool(n, timeout=600)) for n in sorted({work.ranks for work in works})}
        expected = pools[1].run(result, works[0])[0]
        for work in works:
            for name, a, e in zip(
                ("out", "dq", "dk", "dv"), pools[work.ranks].run(result, work)[0], expected, strict=True
            ):
                assert_close(a, e, what=f"{name} of {work}")
        for _ in track(range(repeats), "measuring", console=console, transient=True):
            for work in works:
                samples[work].append(pools[work.ranks].run(measure, work))
    return samples


def rows_of(samples: dict[Work, list[list[Sample]]]) -> Iterator[tuple[Any, ...]]:
    """Table rows: medians of the sums over ranks, ratios repeat by repeat."""
    works = list(samples)
    plain = samples[works[0]]
    for work in works:
        forward = [sum(s.forward for s in ranks) for ranks in samples[work]]
        both = [sum(s.both for s in ranks) for ranks in samples[work]]
        ratios = [
            statistics.median(a / sum(getattr(s, kind) for s in b) for a, b in zip(times, plain, strict=True))
            for kind, times in (("forward", forward), ("both", both))
        ]
        slowest = statistics.median(max(s.both for s in ranks) for ranks in samples[work])
        sent = [sum(getattr(s, kind) for s in samples[work][-1]) for kind in ("forward_bytes", "both_bytes")]
        theory = theoretical_bytes(work) if work.ranks > 1 else (0, 0)
        yield work, statistics.median(forward), statistics.median(both), ratios, slowest, sent, theory


def main(
    *,
    ranks: Annotated[list[int] | None, typer.Option(help="Ranks; repeat for several.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Backends; repeat for several.")] = None,
    lengths: Annotated[str, typer.Option(help="Document lengths of the packed causal batch.")] = "4096",
    heads: int = 8,
    kv_heads: int = 8,
    head_dim: int = 64,
    dtype: str = "float32",
    layout: Annotated[str | None, typer.Option(help="Layout; the backend's own if not given.")] = None,
    repeats: Annotated[int, typer.Option(help="Interleaved repeats; medians are shown.")] = 7,
) -> None:
    """Time every backend's attention against torch's own kernel on one rank, one thread a rank."""
    os.environ.update(ALLOCATOR)
    documents = tuple(int(part) for part in lengths.split(","))
    if heads % kv_heads:
        raise typer.BadParameter(f"--heads must be a multiple of --kv-heads, got {heads} and {kv_heads}")
    shape = (documents, heads, kv_heads, head_dim, dtype)
    works = [Work("plain", 1, *shape, None), Work("local", 1, *shape, None)]
    for count in ranks or [2, 4]:
        for name in backend or ["ring", "all_gather", "ulysses"]:
            if name == "local" or (name == "ulysses" and heads % count):
                raise typer.BadParameter(f"{name} cannot serve {heads} heads on {count} ranks")
            works.append(Work(name, count, *shape, layout))
    console = Console()
    console.print(
        f"{sum(documents)} tokens in {len(documents)} documents, causal, {heads} query and {kv_heads} key heads of "
        f"{head_dim}, {dtype}, torch {torch.__version__}, one thread a rank"
    )
    samples = collect(works, repeats, console)
    title = "CPU seconds summed over ranks, and as a ratio to the plain kernel"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    headers = (
        "backend",
        "ranks",
        "fwd\ns",
        "both\ns",
        "fwd\nx",
        "both\nx",
        "slowest\ns",
        "fwd\nMiB",
        "both\nMiB",
        "theory\nMiB",
    )
    for header in headers:
        table.add_column(header, justify="left" if header == "backend" else "right", no_wrap=True)
    for work, forward, both, ratios, slowest, sent, theory in rows_of(samples):
        mebibytes = [f"{count / 2**20:.2f}" for count in sent]
        verdict = "-" if work.ranks == 1 else ("equal" if tuple(sent) == theory else f"{theory[1] / 2**20:.2f}")
        row = (f"{forward:.3f}", f"{both:.3f}", f"{ratios[0]:.3f}", f"{ratios[1]:.3f}", f"{slowest:.3f}")
        table.add_row(work.backend, str(work.ranks), *row, *mebibytes, verdict)
    console.print(table)
    console.print("both: forward and backward. theory: bytes counted from who sees whom.")
    wrong = [work for work, *_, sent, theory in rows_of(samples) if work.ranks > 1 and tuple(sent) != theory]
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
