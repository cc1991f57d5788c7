"""How the error of bfloat16 attention depends on the number of ranks, against float64.

Prints, per backend, the largest relative L2 error over ranks of the output and of each gradient at 1, 2, 4 and 8 ranks,
and its ratio to one rank with the same kernel.

    python -m benchmarks.precision
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cphandler.testing import RankPool, dense_gradients, partition_group, relative_error
from cphandler.testing.cases import Batch, Case, draw, make_handler, visible

NAMES = ("out", "dq", "dk", "dv")


def reference(case: Case) -> list[Tensor]:
    """Output, dq, dk and dv in float64."""
    q, k, v, grad, *_ = draw(case, 0)
    out, _, grads = dense_gradients((q, k, v), visible(case), grad, qkv_format=case.qkv_format)
    return [out, *grads]


def errors(case: Case, expected: list[Tensor]) -> list[float]:
    """Relative L2 errors of output, dq, dk and dv over all tokens; none on a rank that is not needed."""
    group = partition_group([range(case.cp_size)])
    if group is None:
        return []
    q, k, v, grad, *_ = draw(case, 0)
    handler = make_handler(case, group)
    local = [handler.dispatch(x, 0).requires_grad_() for x in (q, k, v)]
    actual = handler.core_attn(None, *local)
    found = [actual, *torch.autograd.grad(actual, local, handler.dispatch(grad, 0))]
    whole = [handler.combine(x, 0) for x in found]
    return [relative_error(a, e) for a, e in zip(whole, expected, strict=True)]


def main(
    *,
    backend: Annotated[list[str] | None, typer.Option(help="Backends; repeat for several.")] = None,
    lengths: Annotated[str, typer.Option(help="Document lengths of the packed causal batch.")] = "1500,380,168",
) -> None:
    """Compare bfloat16 errors of one and of several ranks; fail above 1.5 times one rank's."""
    batch = Batch(tuple(int(part) for part in lengths.split(",")))
    table = Table(
        title="Relative L2 error in bfloat16, in thousandths (ratio to one rank)",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    for header in ("backend", "ranks", *NAMES):
        table.add_column(header, justify="left" if header == "backend" else "right", no_wrap=True)
    settings: dict[str, Any] = {"batch": batch, "dtype": torch.bfloat16, "head_dim": 64, "heads": (8, 8)}
    worst = 0.0
    with RankPool(8, timeout=600) as pool:
        expected = reference(Case("local", 1, **settings))
        alone = pool.run(errors, Case("local", 1, **settings), expected)[0]
        table.add_row("one rank", "1", *(f"{1000 * error:.2f}" for error in alone))
        for name in backend or ["ring", "p2p"]:
            for ranks in (2, 4, 8):
                per_rank = pool.run(errors, Case(name, ranks, **settings), expected)
                found = [max(column) for column in zip(*filter(None, per_rank), strict=True)]
                ratios = [error / base for error, base in zip(found, alone, strict=True)]
                worst = max(worst, *ratios)
                cells = (f"{1000 * error:.2f} ({ratio:.2f})" for error, ratio in zip(found, ratios, strict=True))
                table.add_row(name, str(ranks), *cells)
    Console().print(table)
    if worst > 1.5:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
