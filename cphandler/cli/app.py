"""The command line."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from cphandler.cli import doctor, kernels
from cphandler.cli.support import as_markdown, built_in, support

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Context parallelism: what there is.")


@app.callback()
def main() -> None:
    """Context parallelism: what there is."""


@app.command("support")
def show_support(
    *, markdown: Annotated[bool, typer.Option(help="Print Markdown, as in docs/support.md.")] = False
) -> None:
    """Which backend serves which layout, format, mask and option."""
    if markdown:
        print(as_markdown())
        return
    names = list(built_in())
    for backend in dict.fromkeys(name.partition("/")[0] for name in names):
        shown = [i for i, name in enumerate(names) if name.partition("/")[0] == backend]
        Console().print(_table(backend, [names[i] for i in shown], shown))


def _table(backend: str, names: list[str], columns: list[int]) -> Table:
    """What the handlers of one backend serve."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(backend, no_wrap=True)
    for name in names:
        table.add_column(name.partition("/")[2] or ("one rank" if backend == "local" else ""), justify="center")
    kind = ""
    for row in support():
        if row.kind != kind:
            kind = row.kind
            table.add_row(f"[bold]{kind}[/bold]")
        marks = ["yes" if row.served[i] else "[dim]no[/dim]" for i in columns]
        table.add_row(f"  {row.name}", *marks)
    return table


@app.command("kernels")
def show_kernels(
    *, markdown: Annotated[bool, typer.Option(help="Print Markdown, as in docs/kernels.md.")] = False
) -> None:
    """What computes attention on each device, in order of preference."""
    print(kernels.as_markdown() if markdown else kernels.as_text())


@app.command("doctor")
def show_what_is_here(
    *, as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False
) -> None:
    """Versions, devices, backends and kernels: what can be used here, and what the others lack."""
    report = doctor.examined()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        doctor.show(report, Console())
