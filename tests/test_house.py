"""The house: imports go down, files are nouns, functions are short, importing is cheap and loads nothing optional."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.doubles.packages import install_broken_packages

ROOT = Path(__file__).parent.parent

FLOORS: list[set[str]] = [
    {"errors", "config", "precision", "tracing"},
    {"registry", "tensors", "operators"},
    {"tokens"},
    {"layouts", "kernels", "comm"},
    {"plan", "sharding"},
    {"attention"},
    {"handler", "engines"},
    {"backends", "training", "data"},
    {"__init__"},
    {"cli", "integrations", "testing"},
    {"__main__", "demo"},
]
"""Rooms by floor, lowest first: a folder, or a file beside the folders. A room imports from floors below its own."""


def room_of(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


def floor_of() -> dict[str, int]:
    return {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module of the package, by dotted name without the package's own."""
    found = {}
    for path in [*(ROOT / "cphandler").rglob("*.py"), *(ROOT / "backends").rglob("*.py")]:
        if "backends" in path.parts and "cphandler" in path.relative_to(ROOT).parts:
            continue  # the link to the folder beside it
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[1:] if parts[0] == "cphandler" else parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = path
    return found


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, type-checking imports included."""
    found, known = set(), modules()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "cphandler":
            base = node.module.removeprefix("cphandler").lstrip(".")
            names = {f"{base}.{alias.name}".lstrip(".") for alias in node.names}
            found |= {name if name in known else base or "__init__" for name in names}
        if isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("cphandler.") for alias in node.names if alias.name.startswith("cphandler")
            }
    return found


def test_every_module_is_in_a_room() -> None:
    assert {room_of(module) for module in modules()} == set(floor_of())


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_down(name: str) -> None:
    floors = floor_of()
    for imported in imports_of(modules()[name]):
        here, there = room_of(name), room_of(imported)
        assert here == there or floors[there] < floors[here], f"{name} (floor {floors[here]}) imports {imported}"


@pytest.mark.parametrize("room", sorted(floor_of()))
def test_files_of_a_folder_import_each_other_in_no_circle(room: str) -> None:
    inside = {name: imports_of(path) for name, path in modules().items() if room_of(name) == room and name != room}
    left = {name: imported & inside.keys() for name, imported in inside.items()}
    while left:
        free = {name for name, imported in left.items() if not imported & left.keys()}
        assert free, f"a circle among {', '.join(sorted(left))}"
        left = {name: imported for name, imported in left.items() if name not in free}


def test_kernels_know_neither_ranks_nor_transport() -> None:
    for name, path in modules().items():
        if room_of(name) == "kernels":
            assert {room_of(imported) for imported in imports_of(path)} <= {
                "kernels",
                "tokens",
                "errors",
                "precision",
                "registry",
            }
            assert "distributed" not in path.read_text(), name


def test_backends_never_import_each_other() -> None:
    for name, path in modules().items():
        if name.startswith("backends."):
            assert not [i for i in imports_of(path) if i.startswith("backends")], name


ABOUT_GROUPS = {"new_group", "get_backend_config", "group", "distributed_c10d"}


def test_only_comm_calls_collectives() -> None:
    """Other modules may ask a group for its rank and size; data moves in one place."""
    allowed = {
        "get_rank",
        "get_world_size",
        "ProcessGroup",
        "GroupMember",
        "get_process_group_ranks",
        "is_available",
        "is_initialized",
    }
    for name, path in modules().items():
        if name in ("comm.collectives", "comm.transfers") or room_of(name) in ("testing", "demo"):
            continue
        makes_groups = ABOUT_GROUPS if name in ("comm.groups", "comm.membership") else set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dist":
                assert node.attr in allowed | makes_groups, f"{name} uses dist.{node.attr}"


def test_tables_come_to_a_device_in_one_way() -> None:
    """A copy from memory that is not pinned waits for everything that a GPU has been told before."""
    ways = set()
    for name, path in modules().items():
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in ("to", "cuda"):
                made = {node.attr for node in ast.walk(call.func.value) if isinstance(node, ast.Attribute)}
                ways |= {name} if "from_numpy" in made else set()
    assert ways <= {"tokens.packing"}, "device_copy of cphandler.tensors pins it"  # there to another dtype, on the host


def test_files_are_nouns() -> None:
    banned = {"utils", "util", "helpers", "common", "misc", "base"}
    assert not [name for name in modules() if name.split(".")[-1] in banned]


def test_functions_are_sentences() -> None:
    """About 40 lines of code, docstring not counted."""
    long = []
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
                if lines > 45:
                    long.append(f"{name}.{node.name}: {lines}")
    assert not long


def test_adding_a_backend_costs_less_than_sixty_lines() -> None:
    for path in (ROOT / "backends").glob("*.py"):
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        assert len(lines) < 60, path.name


def test_the_link_and_the_guard_of_backends() -> None:
    link = ROOT / "cphandler" / "backends"
    assert link.is_symlink()
    assert link.resolve() == (ROOT / "backends").resolve()
    refused = subprocess.run(
        [sys.executable, "-c", "import backends"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "import cphandler.backends" in refused.stderr


def test_importing_is_cheap_and_needs_no_optional_package(tmp_path: Path) -> None:
    """Time beside torch's own import, tried up to five times, since a busy machine slows both; and what was loaded.

    Compiled files are kept between tries, as they are for whoever imports it, also where the environment forbids them.

    What is optional is there and broken: it would be noticed where it is tried, and what it raises is swallowed.
    """
    install_broken_packages(tmp_path)
    program = (
        "import time, sys; s = time.process_time(); import torch; t = time.process_time();"
        "from cphandler import *; d = (time.process_time() - t) / (t - s);"
        "[get_cp_handler_cls(*pair) for pair in available_cp_handlers() if pair[0] == 'local'];"
        "optional = {'typer', 'rich', 'matplotlib', 'pytest', 'hypothesis', 'transformer_engine', 'flash_attn',"
        "'flash_attn_interface', 'flash_attn_3', 'magi_attention', 'safetensors'};"
        "print(d, sorted(optional & set(sys.modules)) + getattr(sys, 'broken', []))"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    shares = []
    for _ in range(5):
        command = [sys.executable, "-c", program]
        kept = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path / "compiled")}
        environment = os.environ | {"PYTHONPATH": path} | kept
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        share, _, loaded = done.stdout.strip().partition(" ")
        assert loaded == "[]"
        shares.append(float(share))
        if shares[-1] < 0.25:
            return
    pytest.fail(f"shares of torch's import: {shares}")
