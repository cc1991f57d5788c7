"""The command line."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

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
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("")
    for name in names:
        table.add_column(name.replace("/", "\n"), justify="center")
    kind = ""
    for row in support():
        if row.kind != kind:
            kind = row.kind
            table.add_row(f"[bold]{kind}[/bold]")
        marks = ["yes" if served else "[dim]no[/dim]" for served in row.served]
        table.add_row(f"  {row.name}", *marks)
    Console().print(table)
