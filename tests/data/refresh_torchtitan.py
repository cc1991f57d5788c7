"""What torchtitan's classes around context parallelism take, read from its sources; nothing is imported.

``python tests/data/refresh_torchtitan.py CHECKOUT COMMIT`` reads a checkout and writes ``torchtitan.json`` beside this
file anew.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

DATA = Path(__file__).with_name("torchtitan.json")
METHODS = {
    "torchtitan/distributed/context_parallel.py": (
        "ContextParallelLoadBalancer.generate_permutation",
        "HeadTailCPLoadBalancer.__init__",
    ),
    "torchtitan/models/common/attention/attention.py": (
        "VarlenInnerAttention.__init__",
        "VarlenInnerAttention.forward",
    ),
    "torchtitan/models/common/attention/cp_attention.py": ("CPAttention.prepare_cp_metadata",),
}


def signatures(source: str, wanted: tuple[str, ...]) -> dict[str, str]:
    """Arguments of methods, without their types: ``"self, config, *, seq_len"``."""
    found = {}
    for kind in ast.parse(source).body:
        for node in kind.body if isinstance(kind, ast.ClassDef) else ():
            if isinstance(node, ast.FunctionDef) and f"{kind.name}.{node.name}" in wanted:
                given = node.args
                for argument in [*given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]:
                    argument.annotation = None
                found[f"{kind.name}.{node.name}"] = ast.unparse(given)
    assert set(found) == set(wanted), f"missing: {set(wanted) - set(found)}"
    return found


def main(checkout: str, commit: str) -> None:
    files = {
        path: {"commit": commit, "methods": signatures((Path(checkout) / path).read_text(), wanted)}
        for path, wanted in METHODS.items()
    }
    DATA.write_text(json.dumps(files, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:3])
