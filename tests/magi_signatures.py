"""Reads the signatures of MagiAttention's public functions from a checkout of its source, without importing it.

``python -m tests.magi_signatures CHECKOUT VERSION COMMIT`` adds that version to ``tests/data/magi_signatures.json``, or
replaces it.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data" / "magi_signatures.json"
FUNCTIONS = Path("magi_attention", "api", "magi_attn_interface.py")
KEY = Path("magi_attention", "dist_attn_runtime_mgr.py")


def functions_of(source: str) -> dict[str, list[list[str]]]:
    """Public functions of a module, but for the deprecated: each parameter as ``[name]`` or ``[name, default]``."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not node.decorator_list:
            defaults = [None] * (len(node.args.args) - len(node.args.defaults)) + list(node.args.defaults)
            found[node.name] = [
                [argument.arg] if default is None else [argument.arg, ast.unparse(default)]
                for argument, default in zip(node.args.args, defaults, strict=True)
            ]
    return found


def fields_of(source: str, name: str) -> list[str]:
    """Fields of a dataclass, in order."""
    (described,) = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name]
    return [n.target.id for n in described.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]


def written(data: dict[str, Any]) -> str:
    """The data as JSON, one function a line."""
    versions = []
    for version, described in data["versions"].items():
        lines = [f"        {json.dumps(name)}: {json.dumps(listed)}" for name, listed in described["functions"].items()]
        parts = [f'      "commit": {json.dumps(described["commit"])}']
        parts += [
            '      "functions": {\n' + ",\n".join(lines) + "\n      }",
            f'      "key": {json.dumps(described["key"])}',
        ]
        versions.append(f"    {json.dumps(version)}: {{\n" + ",\n".join(parts) + "\n    }")
    head = [f"  {json.dumps(name)}: {json.dumps(data[name])}" for name in ("source", "read")]
    return "{\n" + ",\n".join([*head, '  "versions": {\n' + ",\n".join(versions) + "\n  }"]) + "\n}\n"


def add(checkout: Path, version: str, commit: str) -> None:
    """Read a checkout and write the data anew."""
    data = json.loads(DATA.read_text())
    functions = functions_of((checkout / FUNCTIONS).read_text())
    key = fields_of((checkout / KEY).read_text(), "DistAttnRuntimeKey")
    data["versions"][version] = {"commit": commit, "functions": functions, "key": key}
    DATA.write_text(written(data))


if __name__ == "__main__":
    add(Path(sys.argv[1]), *sys.argv[2:4])
