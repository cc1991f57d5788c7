"""Attention under context parallelism beside one process with torch's own kernel, on the same work in the same run.

Prints, per backend and number of ranks, the CPU seconds of forward and forward+backward summed over ranks, as a ratio
to the plain kernel on one rank (median of interleaved repeats), the same ratio as if every rank took as long as the
slowest, and the bytes all ranks sent beside the theoretical count. ``p2p@balanced`` is a backend on a layout.

    python benchmarks/attention.py                      # one causal sequence of 4096 tokens
    python benchmarks/attention.py --kv-heads 2 --ranks 2 --ranks 4
    python benchmarks/attention.py --lengths 900,64,243,1500,1389 --layout zigzag
    python benchmarks/attention.py --pack pile:0 --pack prolong64k:3      # honest lengths, 8192 tokens a rank
    python benchmarks/attention.py --pack pile:0 --backend ring --backend p2p --backend p2p@balanced
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from cphandler import Causal, CPConfig, Documents, get_cp_handler_cls, record_traffic
from cphandler.handler.contract import ContextParallelHandler
from cphandler.testing import RankPool, assert_close, visible_pairs

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
"""Without these, glibc returns every large buffer to the system, and page faults dominate for all alike."""

PACKS = Path(__file__).parent / "data" / "packs"
"""Lengths of packed batches; see the README there."""

COLUMNS = (
    "backend",
    "ranks",
    "fwd\ns",
    "both\ns",
    "fwd\nx",
    "both\nx",
    "slow\nx",
    "sent\nMiB",
    "theory\nMiB",
)


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
        tile: rows of a kernel's tile, which the balanced layout counts area in; None counts pairs.
    """

    backend: str
    ranks: int
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    layout: str | None
    tile: int | None = None

    @property
    def tokens(self) -> int:
        """Global tokens."""
        return sum(self.lengths)

    @property
    def name(self) -> str:
        """The backend, and the layout where it is not the backend's own."""
        return f"{self.backend}@{self.layout}" if self.layout else self.backend

    def settings(self) -> dict[str, Any]:
        """What a handler is told, but for its group."""
        batch = {"qkv_format": "thd", "cu_seqlens_q": self.documents().offsets}
        return {**batch, "layout": self.layout, "config": CPConfig(tile=self.tile)}

    def documents(self) -> Documents:
        """The packed documents."""
        return Documents.from_cu_seqlens([0, *torch.tensor(self.lengths).cumsum(0).tolist()])


@dataclass(frozen=True)
class Contest:
    """Works over the same documents, torch's kernel first.

    Attributes:
        name: what the documents are.
        works: the competitors.
    """

    name: str
    works: tuple[Work, ...]

    def __str__(self) -> str:
        plain = self.works[0]
        documents = f"{len(plain.lengths)} document{'s' if len(plain.lengths) > 1 else ''}"
        heads = f"{plain.heads} query and {plain.kv_heads} key heads of {plain.head_dim}"
        return f"{self.name}: {plain.tokens} tokens in {documents}, causal, {heads}, {plain.dtype}"


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
    handler = get_cp_handler_cls(work.backend)(cp_group=group, **work.settings())
    return handler, [handler.dispatch(x, 0).requires_grad_(i < 3) for i, x in enumerate(tensors)]


def fresh(work: Work) -> tuple[ContextParallelHandler | None, list[Tensor]]:
    """The same without gradients."""
    handler, tensors = prepared(work)
    for x in tensors:
        x.grad = None
    return handler, tensors


def attend(work: Work, handler: ContextParallelHandler | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A forward pass."""
    out: Tensor = plain_attention(work, q, k, v) if handler is None else handler.core_attn(None, q, k, v)
    return out


def measure(work: Work) -> Sample:
    """One forward and backward pass on this rank."""
    handler, (*inputs, grad_out) = fresh(work)
    if dist.get_world_size() > 1:
        dist.barrier()
    with record_traffic() as traffic:
        started = time.process_time()
        out = attend(work, handler, *inputs)
        forward, forward_bytes = time.process_time() - started, traffic.sent_bytes
        out.backward(grad_out)
        both = time.process_time() - started
    return Sample(forward, both, forward_bytes, traffic.sent_bytes)


def result(work: Work) -> list[Tensor]:
    """Global output and gradients, from the first rank, to refuse to time what is wrong."""
    handler, (*inputs, grad_out) = fresh(work)
    out = attend(work, handler, *inputs)
    out.backward(grad_out)
    local = [out.detach(), *(x.grad for x in inputs if x.grad is not None)]
    whole = local if handler is None else [handler.combine(x, 0) for x in local]
    return whole if dist.get_rank() == 0 else []


def forget() -> None:
    """Drop handlers and tensors: the next contest has others."""
    prepared.cache_clear()


def inner_ranks(ranks: int) -> int:
    """Ranks that split heads under ``usp``: the smallest divisor that is at least the square root."""
    return next(number for number in range(1, ranks + 1) if ranks % number == 0 and number * number >= ranks)


@lru_cache
def theoretical_bytes(work: Work) -> tuple[int, int]:
    """Bytes that all ranks send, forward and in all, counted from who sees whom and from nothing of the library's plan.

    Ring: a block makes as many hops as the farthest rank that sees a key of it; gradients start at the nearest such
    rank and make one more hop, home. P2p: each row once to each rank that sees it, its gradient once back. All-gather:
    every block to every other rank, gradients back. Ulysses: every head that another rank computes, once each way. USP:
    Ulysses in the inner groups, and p2p between them.
    """
    if work.ranks == 1:
        return 0, 0
    size = torch.empty(0, dtype=getattr(torch, work.dtype)).element_size()
    accumulator = max(size, 4)
    rows, width, traded = -(-work.tokens // work.ranks), 2 * work.kv_heads * work.head_dim, 0
    if work.backend == "all_gather":
        out = home = work.ranks * (work.ranks - 1) * rows * width
    elif work.backend == "ulysses":
        out, home, traded = 0, 0, heads_traded(work, work.ranks)
    elif work.backend == "ring":
        first, last = hops(work)
        out = sum(last) * rows * width
        home = sum(b - a + 1 for a, b in zip(first, last, strict=True) if b) * rows * width
    elif work.backend == "p2p":
        out = home = rows_seen(work, 1) * width
    elif work.backend == "usp":
        inner = inner_ranks(work.ranks)
        traded = work.ranks // inner * heads_traded(work, inner)
        out = home = rows_seen(work, inner) * 2 * sum(key_heads(work, inner)) * work.head_dim
    else:
        raise typer.BadParameter(f"no theory of {work.backend}")
    forward = (out + traded) * size
    return forward, 2 * forward + home * accumulator


def key_heads(work: Work, sharers: int) -> list[int]:
    """Key heads that the query heads of each of some ranks use."""
    share, group = work.heads // sharers, work.heads // work.kv_heads
    return [((r + 1) * share - 1) // group - r * share // group + 1 for r in range(sharers)]


def heads_traded(work: Work, sharers: int) -> int:
    """Numbers that ranks which share the heads send each other: queries and outputs, keys and values."""
    rows = -(-work.tokens // work.ranks)
    return (sharers - 1) * rows * work.head_dim * 2 * (work.heads + sum(key_heads(work, sharers)))


@lru_cache
def sight(work: Work) -> tuple[Tensor, Tensor]:
    """``[S]`` the rank that holds a token, and ``[ranks, S]`` whose queries see it, from each document's dense mask."""
    handler_cls = get_cp_handler_cls(work.backend)

    @dataclass
    class Seat:
        place: int

        def size(self) -> int:
            return work.ranks

        def rank(self) -> int:
            return self.place

    offsets = work.documents().offsets
    holder = torch.full((work.tokens,), -1)
    for rank in range(work.ranks):
        handler = handler_cls(cp_group=Seat(rank), **work.settings())
        held = handler.dispatch(torch.arange(work.tokens), 0, pad_value=-1)
        holder[held[held >= 0]] = rank
    sees = torch.zeros(work.ranks, work.tokens, dtype=torch.bool)
    for start, length in zip(offsets.tolist(), work.lengths, strict=False):
        dense = visible_pairs(Causal(), Documents.dense(length))
        for rank in range(work.ranks):
            sees[rank, start : start + length] = dense[holder[start : start + length] == rank].any(0)
    return holder, sees


def rows_seen(work: Work, together: int) -> int:
    """Rows of one set of ranks that a query of another sees, over all pairs of sets; ``together`` ranks form a set."""
    holder, sees = sight(work)
    by_set = sees.unflatten(0, (-1, together)).any(1)
    return sum(int(seen[holder // together != number].sum()) for number, seen in enumerate(by_set))


def hops(work: Work) -> tuple[list[int], list[int]]:
    """Per owner, ring distance to the nearest and the farthest rank that sees one of its keys."""
    holder, sees = sight(work)
    first, last = [], []
    for owner in range(work.ranks):
        away = [s for s in range(1, work.ranks) if sees[(owner + s) % work.ranks, holder == owner].any()]
        first.append(min(away, default=0))
        last.append(max(away, default=0))
    return first, last


def collect(
    contest: Contest, pools: dict[int, RankPool], repeats: int, console: Console
) -> dict[Work, list[list[Sample]]]:
    """Check every competitor against the plain kernel, then measure all in turn, ``repeats`` times."""
    samples: dict[Work, list[list[Sample]]] = {work: [] for work in contest.works}
    expected = pools[1].run(result, contest.works[0])[0]
    for work in contest.works:
        actual = pools[work.ranks].run(result, work)[0]
        for name, a, e in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
            assert_close(a, e, what=f"{name} of {work.name} on {work.ranks} ranks, {contest.name}")
    for _ in track(range(repeats), contest.name, console=console, transient=True):
        for work in contest.works:
            samples[work].append(pools[work.ranks].run(measure, work))
    for pool in pools.values():
        pool.run(forget)
    return samples


def sent_bytes(ranks: Sequence[Sample]) -> tuple[int, int]:
    """Bytes all ranks sent, forward and in all."""
    return sum(sample.forward_bytes for sample in ranks), sum(sample.both_bytes for sample in ranks)


def rows_of(samples: dict[Work, list[list[Sample]]]) -> Iterator[tuple[str, ...]]:
    """Table rows: medians of the sums over ranks, ratios repeat by repeat.

    The slowest rank's time counts once for every rank: a layout that is not level makes the others wait.
    """
    plain = next(iter(samples.values()))
    for work, taken in samples.items():
        seconds, ratios = [], []
        for kind in ("forward", "both"):
            times = [sum(getattr(sample, kind) for sample in ranks) for ranks in taken]
            own = [sum(getattr(sample, kind) for sample in ranks) for ranks in plain]
            seconds.append(statistics.median(times))
            ratios.append(statistics.median(a / b for a, b in zip(times, own, strict=True)))
        slowest = [work.ranks * max(sample.both for sample in ranks) for ranks in taken]
        ratios.append(statistics.median(a / b for a, b in zip(slowest, own, strict=True)))
        sent, theory = sent_bytes(taken[-1]), theoretical_bytes(work)
        verdict = "-" if work.ranks == 1 else ("equal" if sent == theory else f"{theory[1] / 2**20:.2f}")
        numbers = [f"{number:.3f}" for number in (*seconds, *ratios)]
        yield work.name, str(work.ranks), *numbers, f"{sent[1] / 2**20:.1f}", verdict


def table_of(contest: Contest, samples: dict[Work, list[list[Sample]]]) -> Table:
    """What a contest came to."""
    table = Table(title=str(contest), box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    for header in COLUMNS:
        table.add_column(header, justify="left" if header == "backend" else "right", no_wrap=True)
    for row in rows_of(samples):
        table.add_row(*row)
    return table


def pack_lengths(pack: str, ranks: int) -> tuple[int, ...]:
    """Document lengths of a pack ``corpus:index`` for a number of ranks."""
    corpus, _, index = pack.partition(":")
    known = sorted(path.stem for path in PACKS.glob("*.json"))
    if corpus not in known:
        raise typer.BadParameter(f"--pack takes corpus:index with a corpus of {', '.join(known)}, got {pack}")
    packs: dict[str, list[list[int]]] = json.loads((PACKS / f"{corpus}.json").read_text())
    chosen = packs.get(str(ranks), [])
    if not index.isdecimal() or int(index) >= len(chosen):
        raise typer.BadParameter(f"{corpus} has packs 0 to 15 for {', '.join(packs)} ranks, got {pack} for {ranks}")
    return tuple(chosen[int(index)])


def works_of(plain: Work, counts: Sequence[int], names: Sequence[str], layout: str | None) -> Iterator[Work]:
    """The plain kernel, one rank of the library, then every backend on every number of ranks.

    Args:
        plain: the plain kernel's work.
        counts: numbers of ranks.
        names: ``backend`` or ``backend@layout``; the usual backends if empty.
        layout: of those that name none; None for the backend's own.
    """
    yield plain
    yield replace(plain, backend="local")
    for count in counts:
        inner = inner_ranks(count)
        sharers = {"ulysses": count, "usp": inner}
        usual = ["ring", "p2p", "all_gather", "ulysses", *(["usp"] if inner < count else [])]
        for name in names or usual:
            backend, _, own = name.partition("@")
            if backend == "local" or plain.heads % sharers.get(backend, 1):
                raise typer.BadParameter(f"{name} cannot serve {plain.heads} heads on {count} ranks")
            yield replace(plain, backend=backend, ranks=count, layout=own or layout)


def main(
    *,
    ranks: Annotated[list[int] | None, typer.Option(help="Ranks; repeat for several.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Backend, or backend@layout; repeat for several.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Document lengths of the packed causal batch.")] = None,
    pack: Annotated[list[str] | None, typer.Option(help="corpus:index of benchmarks/data/packs; on zigzag.")] = None,
    heads: int = 8,
    kv_heads: int = 8,
    head_dim: int = 64,
    dtype: str = "float32",
    layout: Annotated[str | None, typer.Option(help="Layout of backends that name none; else their own.")] = None,
    tile: Annotated[int | None, typer.Option(help="CPConfig.tile, which balanced counts area in.")] = None,
    repeats: Annotated[int, typer.Option(help="Interleaved repeats; medians are shown.")] = 7,
) -> None:
    """Time every backend's attention against torch's own kernel on one rank, one thread a rank."""
    os.environ.update(ALLOCATOR)
    if heads % kv_heads:
        raise typer.BadParameter(f"--heads must be a multiple of --kv-heads, got {heads} and {kv_heads}")
    counts, names = ranks or [2, 4], backend or []
    plain = Work("plain", 1, (), heads, kv_heads, head_dim, dtype, None, tile)
    contests = []
    if lengths or not pack:
        given = replace(plain, lengths=tuple(int(part) for part in (lengths or "4096").split(",")))
        contests.append(Contest("lengths", tuple(works_of(given, counts, names, layout))))
    for name in pack or []:
        for count in counts:
            given = replace(plain, lengths=pack_lengths(name, count))
            contests.append(Contest(name, tuple(works_of(given, [count], names, layout or "zigzag"))))
    console, wrong = Console(), 0
    console.print(f"CPU seconds summed over ranks, and as a ratio (x) to the plain kernel; torch {torch.__version__}")
    with ExitStack() as stack:
        pools = {count: stack.enter_context(RankPool(count, timeout=600)) for count in sorted({1, *counts})}
        for contest in contests:
            samples = collect(contest, pools, repeats, console)
            console.print(table_of(contest, samples))
            wrong += sum(sent_bytes(taken[-1]) != theoretical_bytes(work) for work, taken in samples.items())
    console.print("both: forward and backward. slow: both, of the slowest rank times the ranks.")
    console.print("sent: by all ranks, forward and backward. theory: bytes counted from who sees whom.")
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
