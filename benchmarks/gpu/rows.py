"""What the parts find: rows of text and numbers, written as they come."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OK, WRONG, ABSENT = "ok", "WRONG", "absent"


@dataclass
class Row:
    """One thing that was looked at.

    Attributes:
        part: of the check.
        what: the thing.
        verdict: ok, WRONG, absent, or a figure's name where nothing was asked.
        error: the largest relative L2 error against float64; None where there is none.
        milliseconds: of the library's call.
        ratio: to what the row names.
        note: the rest.
    """

    part: str
    what: str
    verdict: str
    error: float | None = None
    milliseconds: float | None = None
    ratio: float | None = None
    note: str = ""

    def __str__(self) -> str:
        error = "" if self.error is None else f"{self.error:.1e}"
        time_taken = "" if self.milliseconds is None else f"{self.milliseconds:.3f}"
        ratio = "" if self.ratio is None else f"{self.ratio:.3f}"
        return (
            f"{self.part:8} {self.what:58} {self.verdict:7} {error:>8} {time_taken:>9} {ratio:>6} {self.note}".rstrip()
        )


HEAD = f"{'part':8} {'what':58} {'verdict':7} {'error':>8} {'ms':>9} {'ratio':>6}"


@dataclass
class Record:
    """All rows of one run, printed and kept in a file as they come.

    Attributes:
        path: of the JSON file; None for none.
        machine: what the rows were measured on.
    """

    path: Path | None
    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def add(self, row: Row) -> None:
        """Print a row and write all of them."""
        if not self.rows:
            print(HEAD)
        self.rows.append(row)
        print(row, flush=True)
        if self.path is not None:
            seconds = round(time.monotonic() - self.started, 1)
            content = {"machine": self.machine, "seconds": seconds, "rows": [asdict(row) for row in self.rows]}
            self.path.write_text(json.dumps(content, indent=1) + "\n")

    @property
    def wrong(self) -> list[Row]:
        """What was not as it should be."""
        return [row for row in self.rows if row.verdict == WRONG]
