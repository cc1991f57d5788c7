"""The layout "balanced" beside dynamic sub-groups, on the same packed documents: what travels, how level, how fast.

Both place the same documents of a pack on the same ranks: ``balanced`` as one batch of all ranks, ``assign_documents``
as batches of sub-groups, zigzag inside. Work is causal pairs and what a token costs beside them. With --steps the
demo's model takes a step of both, after gradients were found equal to one rank's.

    python -m benchmarks.dynamic
    python -m benchmarks.dynamic --steps 5 --tokens 4096
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.packs import RANKS, drawn, packs
from cphandler import (
    SubGroups,
    assign_documents,
    get_cp_handler_cls,
    language_model_loss,
    next_token_labels,
    pack_documents,
    plan_batch,
)
from cphandler.demo.model import GPT, GPTConfig
from cphandler.testing import RankPool, relative_error

TOKEN_COST = 6 * 4096
"""Pairs that all else of a token is worth in a model of width 4096."""

WAYS = ("balanced", "sub-groups", "sub-groups, level rows")
"""What is compared; the last has memory for no more rows than a rank's share and an eighth."""


class Quality(NamedTuple):
    """A way on one pack.

    Attributes:
        moved: rows that ranks receive in a forward pass, as a share of what a ring moves.
        level: how long it takes, as a multiple of the time if all ranks had the same work.
        rows: most rows that a rank holds at a time, as a multiple of its share.
        batches: micro-batches.
    """

    moved: float
    level: float
    rows: float
    batches: float


def offsets(lengths: Sequence[int]) -> list[int]:
    """``cu_seqlens`` of lengths."""
    return [0, *accumulate(lengths)]


def schedule_of(lengths: Sequence[int], ranks: int, way: str, token_cost: float) -> Any:
    """The schedule of sub-groups; a pack is one micro-batch unless its rows are to be level."""
    most = -(-sum(lengths) // ranks) if way.endswith("rows") else None
    return assign_documents(
        lengths, ranks, max_tokens=None if most is None else most + most // 8, token_cost=token_cost
    )


def quality(lengths: Sequence[int], ranks: int, way: str) -> Quality:
    """What a way makes of a pack."""
    total, ring = sum(lengths), sum(lengths) * (ranks - 1)
    if way == "balanced":
        stats = plan_batch(offsets(lengths), ranks, layout="balanced").stats()
        work = [float(area) + TOKEN_COST * total / ranks for area in stats.area]
        return Quality(float(stats.received.sum()) / ring, max(work) / statistics.fmean(work), 1.0, 1)
    schedule = schedule_of(lengths, ranks, way, TOKEN_COST)
    moved = 0
    groups = [group for batch in schedule.micro_batches for group in batch]
    for group in groups:
        if group.size > 1:
            own = offsets([lengths[i] for i in group.documents])
            moved += int(plan_batch(own, group.size, layout="zigzag").stats().received.sum())
    most = max(group.local_tokens for group in groups) * ranks / total
    return Quality(moved / ring, schedule.level, most, len(schedule.micro_batches))


def compared(counts: Sequence[int]) -> Table:
    """Means over the packs that are kept, of the Pile's lengths."""
    table = Table("ranks", "way", "moved", "level", "level, worst pack", "most rows", "micro-batches")
    for ranks in counts:
        for way in WAYS:
            found = [quality(lengths, ranks, way) for lengths in packs("pile", ranks)]
            means = [statistics.fmean(column) for column in zip(*found, strict=True)]
            worst = max(each.level for each in found)
            shown = [f"{means[0]:.3f}", f"{means[1]:.3f}", f"{worst:.3f}", f"{means[2]:.2f}", f"{means[3]:.1f}"]
            table.add_row(str(ranks), way, *shown)
        table.add_section()
    return table


def batches_of(way: str, documents: Sequence[Tensor], groups: SubGroups) -> Iterator[tuple[dict[str, Any], Any]]:
    """This rank's batches of a step, and their handlers."""
    lengths = [len(document) for document in documents]
    if way == "balanced":
        whole = pack_documents(list(documents))
        group = dist.group.WORLD if groups.size > 1 else None
        settings: dict[str, Any] = {"qkv_format": "thd", "cu_seqlens_q": whole["cu_seqlens"]}
        yield whole, get_cp_handler_cls("p2p")(cp_group=group, layout="balanced", **settings)
        return
    schedule = schedule_of(lengths, groups.size, way, 6.0 * GPTConfig().width)
    groups.prepare(schedule)
    for mine in schedule.of_rank(groups.rank):
        batch = pack_documents([documents[i] for i in mine.documents])
        settings = {"qkv_format": "thd", "cu_seqlens_q": batch["cu_seqlens"], "local_cp_size": mine.size}
        yield batch, get_cp_handler_cls("p2p")(cp_group=groups.group(mine), **settings)


def step(way: str, model: GPT, documents: Sequence[Tensor], groups: SubGroups) -> None:
    """Forward and backward over all documents; gradients are parts, to be summed over ranks."""
    total = sum(len(document) - 1 for document in documents)
    for batch, handler in batches_of(way, documents, groups):
        ids = handler.dispatch(batch["tokens"], 0)
        labels = next_token_labels(ids, handler)
        language_model_loss(model(ids, handler), labels, handler, num_tokens=total).backward()


class Timed(NamedTuple):
    """A way's steps on one rank.

    Attributes:
        error: relative error of the worst gradient against one rank's.
        seconds: CPU seconds of each step.
        wall: seconds of each step, from one barrier to the next.
    """

    error: float
    seconds: list[float]
    wall: list[float]


def timed(lengths: Sequence[int], steps: int) -> dict[str, Timed]:
    """On a rank of a pool: each way checked, then all of them in turn."""
    torch.manual_seed(0)
    model, groups = GPT(GPTConfig()), SubGroups()
    documents = [torch.randint(0, 256, (length,)) for length in lengths]
    single = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=offsets(lengths))
    ids, parameters = torch.cat(documents), list(model.parameters())
    total = sum(length - 1 for length in lengths)
    loss = language_model_loss(model(ids, single), next_token_labels(ids, single), single, num_tokens=total)
    right = torch.autograd.grad(loss, parameters)
    found = {}
    for way in WAYS:
        step(way, model, documents, groups)
        for parameter in parameters:
            dist.all_reduce(parameter.grad)
        wrong = max(relative_error(p.grad, grad) for p, grad in zip(parameters, right, strict=True))  # type: ignore[arg-type]
        found[way] = Timed(wrong, [], [])
        model.zero_grad()
    for _ in range(steps):
        for way in WAYS:
            dist.barrier()
            cpu, wall = time.process_time(), time.perf_counter()
            step(way, model, documents, groups)
            found[way].seconds.append(time.process_time() - cpu)
            dist.barrier()
            found[way].wall.append(time.perf_counter() - wall)
            model.zero_grad()
    return found


def shown_steps(lengths: Sequence[int], ranks: int, steps: int) -> Table:
    """Medians over steps.

    Raises:
        ValueError: gradients that are not one rank's.
    """
    with RankPool(ranks, timeout=600) as pool:
        answers = pool.run(timed, list(lengths), steps)
    table = Table("way", "error", "CPU, all ranks", "CPU, busiest rank", "wall")
    for way in WAYS:
        each = [answer[way] for answer in answers]
        if max(one.error for one in each) > 1e-4:
            raise ValueError(f"{way}: gradients are {max(one.error for one in each):.1e} off")
        rows = list(zip(*(one.seconds for one in each), strict=True))
        numbers = [[sum(row) for row in rows], [max(row) for row in rows], each[0].wall]
        medians = [f"{1e3 * statistics.median(column):.0f} ms" for column in numbers]
        table.add_row(way, f"{max(one.error for one in each):.1e}", *medians)
    return table


def main(
    *,
    ranks: Annotated[list[int] | None, typer.Option(help="Numbers of ranks; repeat for several.")] = None,
    steps: Annotated[int, typer.Option(help="Also time so many steps of the demo's model, on 4 ranks.", min=0)] = 0,
    tokens: Annotated[int, typer.Option(help="Tokens of the pack whose steps are timed.", min=64)] = 4096,
    seed: Annotated[int, typer.Option(help="Which pack that is.")] = 0,
) -> None:
    """Compare the two ways."""
    console = Console()
    console.print(compared(ranks or RANKS))
    if steps:
        (lengths,) = drawn("pile", 1, 1, seed, tokens=tokens)
        console.print(f"{tokens} tokens in {len(lengths)} documents, 4 ranks, the demo's model")
        console.print(shown_steps(lengths, 4, steps))


if __name__ == "__main__":
    typer.run(main)
