"""Public names: what type checkers are told is what is imported, and every list of masks is the one list."""

from __future__ import annotations

import ast
import inspect
from importlib import import_module
from pathlib import Path

import cphandler
from cphandler import Documents, Mask
from cphandler.cli.support import support
from cphandler.testing import visible_pairs
from cphandler.testing.test_conformance import masks_over
from cphandler.tokens import masks
from cphandler.tokens.masks import MASKS
from tests.test_support import masks_over as masks_of_the_table

ROOT = Path(__file__).parent.parent


def told_to_type_checkers() -> dict[str, str]:
    """Public name -> ``module:attribute``, from the imports that never run."""
    tree = ast.parse((ROOT / "cphandler" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    told, renamed = {}, {}
    for node in block.body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                where = f"{(node.module or '').removeprefix('cphandler.')}:{alias.name}"
                assert alias.asname in (None, alias.name)
                (told if alias.asname else renamed)[alias.name] = where
        else:
            assert isinstance(node, ast.Assign)
            told[ast.unparse(node.targets[0])] = renamed.pop(ast.unparse(node.value))
    assert not renamed, "imported, and neither public nor renamed"
    return told


def test_type_checkers_are_told_what_is_imported() -> None:
    table = {name: where if ":" in where else f"{where}:{name}" for name, where in cphandler._MODULES.items()}
    assert told_to_type_checkers() == table
    assert sorted(cphandler.__all__) == sorted(table)
    assert set(cphandler.__all__) <= set(dir(cphandler))
    for name, where in table.items():
        module, _, attribute = where.partition(":")
        assert getattr(cphandler, name) is getattr(import_module(f"cphandler.{module}"), attribute)


def test_every_mask_is_public_and_in_every_list() -> None:
    names = {mask.__name__ for mask in MASKS}
    of_the_module = {
        name for name, value in vars(masks).items() if inspect.isclass(value) and issubclass(value, Mask)
    } - {"Mask"}
    assert names == {name for name in of_the_module if not name.startswith("_")}
    assert names <= set(cphandler.__all__)
    assert names == {row.name for row in support() if row.kind == "mask"}
    assert names == {name.partition(",")[0] for name in masks_over((8, 9))}
    assert names == set(masks_of_the_table(5))
    page = (ROOT / "docs" / "attention.md").read_text()
    assert all(f"{name}(" in page for name in names)


def test_the_reference_defines_every_mask() -> None:
    lengths = (8, 9)
    documents = Documents.from_cu_seqlens([0, 8, 17])
    for mask in masks_over(lengths).values():
        seen = visible_pairs(mask, documents)
        assert seen.any()
        assert seen.shape == (17, 17)
