"""What TransformerEngine's DotProductAttention takes, version by version, read from its wheels; nothing is imported.

``python tests/data/refresh_transformer_engine.py VERSION ...`` downloads the wheels of these versions (a megabyte each:
Python sources only) and adds them to ``transformer_engine.json`` beside this file, in place of what was there.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

DATA = Path(__file__).with_name("transformer_engine.json")
SOURCE = "transformer_engine/pytorch/attention/dot_product_attention/dot_product_attention.py"
METHODS = ("__init__", "forward", "set_context_parallel_group")


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def signatures(source: str) -> dict[str, str]:
    """Arguments of the methods, without their types: ``"query_layer, attention_mask=None"``."""
    (kind,) = [
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "DotProductAttention"
    ]
    found = {}
    for node in kind.body:
        if isinstance(node, ast.FunctionDef) and node.name in METHODS:
            for argument in [*node.args.args, *node.args.kwonlyargs]:
                argument.annotation = None
            found[node.name] = ast.unparse(node.args).removeprefix("self, ")
    assert set(found) == set(METHODS)
    return found


def downloaded(version: str) -> str:
    """The source file of a version."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*command, f"transformer-engine=={version}"], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(SOURCE).decode()


def main(versions: list[str]) -> None:
    known = json.loads(DATA.read_text()) if DATA.exists() else {}
    known |= {version: signatures(downloaded(version)) for version in versions}
    ordered = {version: known[version] for version in sorted(known, key=numbers)}
    DATA.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
