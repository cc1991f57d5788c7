"""``python -m benchmarks.gpu``: one table of what holds on this GPU, and a JSON file beside it."""

from __future__ import annotations

import argparse
import platform
import sys
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import cphandler
from benchmarks.gpu.graphs import check_graphs
from benchmarks.gpu.kernels import check_kernels, check_one_rank
from benchmarks.gpu.ranks import check_demo, check_ranks
from benchmarks.gpu.ring import check_ring, time_ring
from benchmarks.gpu.rows import WRONG, Record, Row
from benchmarks.gpu.waits import check_waits

PARTS: dict[str, tuple[Callable[..., None], ...]] = {
    "kernels": (check_kernels, check_one_rank),
    "waits": (check_waits,),
    "graphs": (check_graphs,),
    "ring": (check_ring, time_ring),
    "ranks": (check_ranks,),
    "demo": (check_demo,),
}


def machine(device: torch.device) -> dict[str, Any]:
    """What the rows were measured on."""
    facts = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "cphandler": cphandler.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": platform.processor() or platform.machine(),
    }
    if device.type == "cuda":
        facts |= {"device": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
        facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    return facts


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; 1 where something is wrong.

    Args:
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, of {', '.join(PARTS)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="sizes for a look, not for a report")
    parser.add_argument("--json", type=Path, help="write every row here, as they come")
    chosen = parser.parse_args(arguments)
    unknown = sorted(set(chosen.only.split(",")) - set(PARTS))
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    device = torch.device(chosen.device)
    facts = machine(device)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    record = Record(chosen.json, facts)
    for part in chosen.only.split(","):
        for check in PARTS[part]:
            try:
                check(record, device, small=chosen.small)
            except Exception as error:  # the other parts still have something to say
                traceback.print_exc()
                record.add(Row(part, check.__name__, WRONG, note=f"{type(error).__name__}: {error}".splitlines()[0]))
    print("never run here: NCCL between several ranks, which one GPU cannot do")
    print(f"{len(record.wrong)} wrong of {len(record.rows)}")
    return 1 if record.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
