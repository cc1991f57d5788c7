"""The conformance kit and its plugin: what is right passes, what is broken fails its law, and torch stays out."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

import cphandler
import cphandler.testing
from cphandler import ContextParallelHandler, EngineShard, get_cp_handler_cls
from cphandler.testing import RankPool
from cphandler.testing.cases import Batch
from cphandler.testing.laws import check_attention, check_facts, check_roll
from cphandler.testing.plugin import subject_of
from cphandler.testing.subject import Subject

ROOT = Path(__file__).parent.parent


def run_pytest(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """pytest in a folder of its own, away from this project's settings, with its modules on the path."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", *options]
    path = os.pathsep.join([str(ROOT), str(folder)])
    run = folder / "run"
    run.mkdir(exist_ok=True)
    return subprocess.run(
        command, cwd=run, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )


def run_kit(folder: Path, backend: str, *options: str, tests: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """The kit on a backend: all of it, or some tests by name."""
    chosen = [f"cphandler.testing.test_conformance::{name}" for name in tests] or ["cphandler.testing"]
    return run_pytest(folder, "--pyargs", *chosen, "-v", "--cp-backend", backend, *options)


def outcomes(output: str, outcome: str) -> set[str]:
    """Tests with an outcome, by name."""
    return set(re.findall(rf"::(test_\S+\[[^]]*\]) {outcome}", output))


@pytest.fixture
def documented(tmp_path: Path) -> str:
    """The backend of the documentation, in a package of its own."""
    page = (ROOT / "docs" / "adding-a-backend.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL))
    package = tmp_path / "thirdparty"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "everywhere.py").write_text(code)
    return "thirdparty.everywhere:EverywhereHandler"


def test_the_documented_backend_conforms(tmp_path: Path, documented: str) -> None:
    """One size, layout and format of most laws; the slow test below runs all of it."""
    done = run_kit(tmp_path, documented, "--cp-size=2", "-k", "thd-zigzag or served or (thd and (option or cross))")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    passed = outcomes(done.stdout, "PASSED")
    assert {"test_roll[cp2-thd-zigzag]", "test_option[cp2-thd-sinks]", "test_option[cp2-thd-own_attention]"} <= passed
    assert {"test_attention[cp2-thd-zigzag-SharedQuestion]", "test_cross_attention[cp2-thd]"} <= passed
    assert f"cphandler: --cp-backend {documented}" in done.stdout
    assert len((tmp_path / "thirdparty" / "everywhere.py").read_text().splitlines()) < 60


@pytest.mark.slow
def test_the_documented_backend_conforms_at_every_size(tmp_path: Path, documented: str) -> None:
    done = run_kit(tmp_path, documented)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ulysses", "ring", "p2p", "all_gather", "usp", "local/a2a+ring"])
def test_the_librarys_backends_conform(tmp_path: Path, backend: str) -> None:
    done = run_kit(tmp_path, backend, "--cp-size=4")
    assert done.returncode == 0, done.stdout[-3000:]


BROKEN = """
import torch
from cphandler import Attention, Capabilities
from cphandler.backends.ring import RingHandler


class Lenient(Attention):
    def check_batch(self):
        '''Refuses nothing.'''


class Broken(RingHandler):
    capabilities = Capabilities(formats=("sbhd", "thd"))
    attention_cls = Lenient

    def combine(self, tensor, seq_dim, *, grad="replicated", stream="q"):
        return super().combine(tensor, seq_dim, stream=stream)  # whatever the gradient means

    def roll_tensor(self, tensor, shifts=-1, dims=-1, *, fill_value=0, return_sum=True, stream="q"):
        whole = torch.roll(self.combine(tensor, dims, stream=stream), shifts, dims)  # from document to document
        rolled = self.dispatch(whole, dims, pad_value=fill_value, stream=stream)
        return rolled, rolled.sum() if return_sum else None

    def core_attn(self, attn_mod, query, key, value, **options):
        return super().core_attn(attn_mod, query, key, value, **{**options, "mask": "full"})
"""


FAULTY = [
    "test_gradients_of_movement[cp2-thd-zigzag]",
    "test_roll[cp2-thd-zigzag]",
    "test_attention[cp2-thd-zigzag-Causal]",
    "test_what_is_not_served_is_refused[cp2]",
]
INTACT = [
    "test_round_trip[cp2-thd-zigzag]",
    "test_rope[cp2-thd-zigzag]",
    "test_facts[cp2-thd-zigzag]",
    "test_attention[cp2-thd-zigzag-Full]",
]


@pytest.mark.slow
def test_every_fault_is_found_by_its_law(tmp_path: Path) -> None:
    """Four faults in four methods; what they leave intact passes."""
    (tmp_path / "broken.py").write_text(BROKEN)
    done = run_kit(tmp_path, "broken:Broken", "--cp-size=2", tests=[*FAULTY, *INTACT])
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr
    assert outcomes(done.stdout, "FAILED") == set(FAULTY)
    assert outcomes(done.stdout, "PASSED") == set(INTACT)
    for law in ("check_gradients_of_movement", "check_roll", "check_attention", "check_refused"):
        assert f"the law {law} does not hold for case broken:Broken cp2" in done.stdout
    assert "AssertionError: roll by -1 of torch.int64" in done.stdout
    assert "AssertionError: gradient of combine, scaled" in done.stdout
    assert re.search(r"AssertionError: out of broken:Broken cp2 thd zigzag Causal.*relative L2 error", done.stdout)


class Plain(ContextParallelHandler):
    """A handler without a table, over an engine of its own: another handler, with some refusals."""

    def prepare(self, layout: Any) -> None:
        super().prepare(layout)
        if self.qkv_format != "thd":
            raise NotImplementedError("packed batches only")
        if self.is_cross_attention:
            raise NotImplementedError("self attention only")
        documents = {"cu_seqlens_q": self.documents.valid_offsets, "cu_seqlens_q_padded": self.documents.offsets}
        arguments: dict[str, Any] = {name: offsets.tolist() for name, offsets in documents.items()}
        self._engine = get_cp_handler_cls("ring")(
            cp_group=self.group, qkv_format="thd", mask=self.mask, config=self.config, **arguments
        )

    def shard(self, stream: str = "q") -> EngineShard:
        return EngineShard(self._engine.position_ids, self._engine.valid_mask)

    def dispatch(self, tensor: Tensor, seq_dim: int, **options: Any) -> Tensor:
        return self._engine.dispatch(tensor, seq_dim, **options)

    def combine(self, tensor: Tensor, seq_dim: int, **options: Any) -> Tensor:
        return self._engine.combine(tensor, seq_dim, **options)

    def roll_tensor(self, tensor: Tensor | None, shifts: Any = -1, dims: int = -1, **options: Any) -> Any:
        return self._engine.roll_tensor(tensor, shifts, dims, **options)

    def rope(self, tensor: Tensor, freqs: Any, **options: Any) -> Tensor:
        return self._engine.rope(tensor, freqs, **options)

    def core_attn(self, attn_mod: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        if "softcap" in options:
            raise NotImplementedError("no softcap in this engine")
        return self._engine.core_attn(attn_mod, query, key, value, **options)


def test_a_class_without_a_table(ranks: RankPool) -> None:
    """What it computes is held to the laws; what it refuses is told, and no failure."""
    subject = Subject.named("tests.test_conformance:Plain", sizes=[2], heads=None, config={})
    assert (subject.table, subject.layouts, subject.unserved) == (None, (None,), ((), ()))
    cases = [subject.case(2, **asked) for asked in ({}, {"softcap": 2.0}, {"qkv_format": "sbhd", "batch": Batch((9,))})]
    assert [subject.refusal(case) for case in cases] == [None] * 3
    refusals = subject.hold(ranks, check_attention, cases)
    assert [line.split(": ")[-1] for line in refusals] == ["no softcap in this engine", "packed batches only"]
    assert subject.hold(ranks, check_roll, cases[:1]) == []
    assert "does not list its fragments" in subject.hold(ranks, check_facts, cases[:1])[0]


@pytest.mark.slow
def test_the_kit_skips_what_a_class_without_a_table_refuses(tmp_path: Path) -> None:
    done = run_kit(tmp_path, "tests.test_conformance:Plain", "--cp-size=2", "--cp-size=3", "-rs")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "test_roll[cp3-thd-its own layout]" in outcomes(done.stdout, "PASSED")
    for reason in ("packed batches only", "self attention only", "no softcap in this engine"):
        assert re.search(rf"SKIPPED.* of \d refused: tests.test_conformance:Plain cp3.*{reason}", done.stdout), reason


def imported(name: str) -> str:
    return importlib.import_module(name).__name__


def test_ranks_inherit_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is when they start, whatever put a folder there."""
    (tmp_path / "found_on_the_path.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with RankPool(1, timeout=60) as pool:
        assert pool.run(imported, "found_on_the_path") == ["found_on_the_path"]


def options_of(folder: Path, **given: Any) -> Any:
    """As much of a pytest config as the plugin reads."""
    return SimpleNamespace(getoption=given.get, invocation_params=SimpleNamespace(dir=folder))


def test_the_options_make_a_subject(tmp_path: Path) -> None:
    (tmp_path / "found_by_its_folder.py").write_text("from cphandler.backends.ring import RingHandler as Mine")
    config = [("kernel", "reference"), ("deterministic", "true")]
    subject = subject_of(options_of(tmp_path, cp_backend="found_by_its_folder:Mine", cp_config=config, cp_heads=(8, 4)))
    assert subject.handler_cls is get_cp_handler_cls("ring")
    assert (subject.sizes, subject.heads, subject.case(3).heads) == ((1, 2, 3, 4), (8, 4), (8, 4))
    assert dict(subject.config) == {"kernel": "reference", "deterministic": True}
    assert Subject("ring", subject.handler_cls).case(3).heads == (4, 2)
    sys.path.remove(str(tmp_path))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "these tests need a handler class"),
        ({"cp_backend": "pigeon"}, "unknown backend or comm type"),
        ({"cp_backend": "no_such_module:Handler"}, "No module named 'no_such_module'"),
        ({"cp_backend": "cphandler.backends.ring:RungHandler"}, "RungHandler"),
        ({"cp_backend": "torch:nn"}, "is not a ContextParallelHandler"),
        ({"cp_backend": "ring", "cp_config": [("kernl", "torch")]}, "kernl"),
    ],
    ids=str,
)
def test_wrong_options_are_usage_errors(given: dict[str, Any], message: str) -> None:
    with pytest.raises(pytest.UsageError, match=re.escape(message)):
        subject_of(options_of(ROOT, **given))


@pytest.mark.slow
def test_collecting_the_kit_without_a_backend_is_a_usage_error(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "--pyargs", "cphandler.testing")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--cp-backend mypackage.module:MyHandler" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("option", "message"),
    [("--cp-size=0", "not a number of ranks"), ("--cp-heads=4,3", "N,G"), ("--cp-config=kernel", "NAME=VALUE")],
)
def test_options_are_checked_when_they_are_read(tmp_path: Path, option: str, message: str) -> None:
    done = run_pytest(tmp_path, option)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert message in done.stderr


def test_the_help_lists_the_options(tmp_path: Path) -> None:
    text = run_pytest(tmp_path, "--help").stdout
    group = text.split("laws of context-parallel handlers")[1]
    for option in ("--cp-backend=NAME", "--cp-size=P", "--cp-heads=N,G", "--cp-config=NAME=VALUE"):
        assert option in group


def test_other_runs_load_the_plugin_and_no_torch(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text(
        "import sys\n"
        "def test_other(request):\n"
        "    assert request.config.pluginmanager.hasplugin('cphandler')\n"
        "    assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules)\n"
    )
    done = run_pytest(tmp_path, str(tmp_path / "test_other.py"))
    assert done.returncode == 0, done.stdout
    program = "import cphandler, cphandler.testing.plugin, sys; assert 'torch' not in sys.modules; dir(cphandler)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


PACKAGES = [cphandler, cphandler.testing]


def typed_names(package: ModuleType) -> dict[str, str]:
    """What a type checker is told: each public name, and where it is imported from, as the table writes it."""
    assert package.__file__ is not None
    tree = ast.parse(Path(package.__file__).read_text())
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    names: dict[str, str] = {}
    for node in block.body:
        if isinstance(node, ast.Assign):  # a public name that is another one where it lives
            ((public, home),) = [(target.id, node.value.id) for target in node.targets]  # type: ignore[attr-defined]
            names[public] = f"{names.pop(home)}:{home}"
            continue
        assert isinstance(node, ast.ImportFrom)
        module = (node.module or "").removeprefix(f"{package.__name__}.")
        names |= {a.name: module for a in node.names}
    return names


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_names_that_are_imported_when_used(package: Any) -> None:
    assert typed_names(package) == package._MODULES
    assert sorted(package._MODULES) == sorted(package.__all__) == sorted(set(package.__all__) & set(dir(package)))
    for name, place in package._MODULES.items():
        module, _, attribute = place.partition(":")
        home = importlib.import_module(f"{package.__name__}.{module}")
        assert getattr(package, name) is getattr(home, attribute or name), name
        submodule = Path(package.__file__).parent / name
        assert not submodule.exists(), f"importing the module {name} would replace the name"
        assert not submodule.with_suffix(".py").exists(), f"importing the module {name} would replace the name"
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        package.nonsense  # noqa: B018


def test_merging_is_a_function_whatever_was_imported_first() -> None:
    """A module of this name is beside it in ``cphandler.kernels``."""
    program = "import cphandler.kernels.merge as module, cphandler; assert cphandler.merge is module.merge_attention"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_star_imports_every_name() -> None:
    names: dict[str, Any] = {}
    exec("from cphandler import *", names)
    assert set(cphandler.__all__) <= set(names)
