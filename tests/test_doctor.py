"""What the command line says of this machine, and that the install lines it names exist."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

import cphandler.backends
import cphandler.kernels
from cphandler.cli import doctor
from cphandler.cli import kernels as table
from cphandler.cli.app import app
from cphandler.kernels import Kernel, candidates, get_kernel, kernel_devices, register_kernel
from cphandler.kernels.packages import FINAL, Package, numbers
from tests.doubles.packages import MODULES, install_broken_packages, kernels_on_cpu

ROOT = Path(__file__).parent.parent


def run(*command: str, path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
    return subprocess.run(
        [sys.executable, "-m", "cphandler", *command],
        cwd=path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_nothing_that_a_broken_package_raises_comes_through(tmp_path: Path) -> None:
    """All optional packages are installed and broken, each in its own way, and print besides."""
    install_broken_packages(tmp_path)
    done = run("doctor", "--json", path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert "greets" not in done.stdout, "what a package prints is no part of the report"
    report = json.loads(done.stdout)
    assert report["versions"]["flash-attn"] == "2.8.3"
    assert report["versions"]["flash_attn_3"] == "3.0.0"
    assert report["versions"]["transformer-engine"] == "2.20.2"
    assert report["versions"]["torch"] == torch.__version__
    backends = {one["name"]: one for one in report["backends"]}
    assert backends["local/ring"]["usable"]
    assert "MemoryError: no room" in backends["broken/ring"]["reason"]
    kernels = {one["name"]: one for one in report["kernels"]["cuda"]}
    told = {
        "flash_attn_2": "cannot be imported (RuntimeError: built for another CUDA)",
        "flash_attn_3": "cannot be imported (SystemExit: no licence)",
        "flash_attn_4": "flash-attn-4 4.0.0b9: only versions from 4.0.0b36 to below 4.1 were read",
    }
    for name, reason in told.items():
        assert not kernels[name]["usable"]
        assert reason in kernels[name]["reason"]
        assert kernels[name]["fix"] == get_kernel(name, "cuda").package.install  # type: ignore[union-attr]
    for one in [*report["devices"], *report["backends"], *report["kernels"]["cuda"], *report["kernels"]["cpu"]]:
        assert one["usable"] == (one["reason"] is None) == (one["fix"] is None), one


def test_a_torch_that_is_broken_is_told(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libtorch.so: cannot open shared object file')")
    done = run("doctor", path=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("torch cannot be imported (OSError: libtorch.so: cannot open")
    assert "Traceback" not in done.stderr


def printed(*command: str) -> str:
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    return result.output


def test_what_is_printed_is_what_is_found() -> None:
    """Every name, reason and fix, unbroken: a command can be copied, brackets and all."""
    report = doctor.examined()
    output = printed("doctor")
    assert json.loads(printed("doctor", "--json")) == report
    for name, version in report["versions"].items():
        assert re.search(rf"^  {re.escape(name)} +{re.escape(version or 'none')}$", output, flags=re.MULTILINE)
    lists = [report["devices"], report["backends"], *report["kernels"].values()]
    for one in (one for found in lists for one in found):
        told = one["details"] if one["usable"] else str(one["reason"])
        mark = "yes" if one["usable"] else "no"
        assert re.search(rf"^  {mark} +{re.escape(one['name'])} *{re.escape(told)}$", output, flags=re.MULTILINE)
        assert not one["fix"] or re.search(rf"^ +{re.escape(one['fix'])}$", output, flags=re.MULTILINE)
    assert [one["name"] for one in report["kernels"]["cpu"]] == ["torch", "reference"]
    names = [one["name"] for one in report["kernels"]["cuda"]]
    assert names.index("flash_attn_3") < names.index("flash_attn_2") < names.index("torch")
    assert {one["name"] for one in report["devices"]} >= {"gloo", "NCCL"}


class Card:
    name, major, minor, total_memory = "a card", 9, 0, 80 * 2**30


def test_a_gpu_and_one_that_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Card)
    with kernels_on_cpu():
        report = doctor.examined()
    assert [one["name"] for one in report["devices"]][:2] == ["cuda:0", "cuda:1"]
    assert report["devices"][0]["details"] == "a card, compute capability 9.0, 80.0 GiB"
    assert all(one["usable"] for one in report["kernels"]["cuda"])

    def broken(index: int) -> Any:
        raise RuntimeError("the GPU fell off the bus")

    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    monkeypatch.setattr(torch.cuda, "get_device_capability", broken)
    report = doctor.examined()
    assert "fell off the bus" in str(report["devices"][0]["reason"])
    assert "fell off the bus" in printed("doctor")


def test_kernels_of_others_are_examined_too() -> None:
    with kernels_on_cpu():
        register_kernel("mine", "xpu", "no_such_package:Kernel")
        report = doctor.examined()
        (mine,) = [one for one in report["kernels"]["xpu"] if one["name"] == "mine"]
    assert not mine["usable"]
    assert "no_such_package" in str(mine["fix"])


def test_the_table_in_the_docs_is_the_one_that_is_printed() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text()
    assert table.as_markdown() in page, "run: python -m cphandler kernels --markdown"
    assert printed("kernels", "--markdown").strip() == table.as_markdown()
    for row, line in zip([table.COLUMNS, *table.table()], printed("kernels").splitlines(), strict=True):
        assert re.fullmatch(" +".join(map(re.escape, filter(None, row))), line)


def test_the_table_is_what_kernels_say_to_a_call() -> None:
    """Every cell, asked of the kernels anew; packages are there as doubles."""
    with kernels_on_cpu():
        for row in table.table():
            if row.name.startswith("double_"):
                continue
            kernel = get_kernel(row.name, row.device)
            for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                x, wide, option = (torch.empty(1, 2, 2, d, dtype=dtype, device="meta") for d in (64, 264, 8))
                assert (str(dtype)[6:] in row.dtypes.split(", ")) == (kernel.refusal(x, x, x) is None)
                if kernel.misfit(x, x, x) is None:
                    said = next((s for s in row.head_dim.split(", ") if str(dtype)[6:] in s), row.head_dim)
                    assert said.startswith("any") == (kernel.refusal(wide, wide, wide) is None)
                    assert (row.softcap == "yes") == (kernel.refusal(option, option, option, softcap=True) is None)
                    assert (row.dropout == "yes") == (kernel.refusal(option, option, option, dropout=True) is None)
            assert (row.deterministic == "yes") == (kernel.nondeterminism() is None)
            with mock.patch.object(torch, "are_deterministic_algorithms_enabled", return_value=True):
                assert (row.deterministic == "no") == (kernel.nondeterminism() is not None)
        for device_type in kernel_devices():
            names = [row.name for row in table.table() if row.device == device_type]
            assert names == [one.name for one in candidates(device_type)]


def extras() -> dict[str, list[str]]:
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())
    found: dict[str, list[str]] = project["project"]["optional-dependencies"]
    return found


def declared_packages() -> list[Package]:
    """Every :class:`Package` that a module of kernels or backends holds, but those that import an optional package."""
    found = []
    for room in (cphandler.kernels, cphandler.backends):
        for module in pkgutil.iter_modules(room.__path__, f"{room.__name__}."):
            try:
                loaded = importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                if str(error.name).startswith("cphandler"):
                    raise
                continue
            found += [x for _, x in inspect.getmembers(loaded) if isinstance(x, Package)]
    return list(dict.fromkeys(found))


def test_install_lines_of_packages() -> None:
    """An extra that exists and holds the package in the versions that are taken, or where its source is."""
    known, released = extras(), {"flash-attn": "flash-attn", "flash-attn-4": "fa4"}
    declared = declared_packages()
    assert {package.module for package in declared} >= set(MODULES)
    for package in declared:
        name = package.distributions[0]
        if name not in released:
            assert re.search(r"https://github\.com/\S+", package.install)
            assert "pip install" not in package.install
            continue
        assert f'"cphandler[{released[name]}]"' in package.install
        (requirement,) = known[released[name]]
        asked, oldest, newest = re.split(">=|,<", requirement)
        ends = (tuple(n for n in numbers(end) if n != FINAL) for end in (oldest, newest))
        assert (asked, *ends) == (name, package.oldest, package.newest)
    assert all(set(package.distributions) <= {d for ds in doctor.PACKAGES.values() for d in ds} for package in declared)


def test_every_extra_that_is_named_exists() -> None:
    """In errors, docstrings, documentation and make's help."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "Makefile", ROOT / "pyproject.toml"]
    sources = [
        *(ROOT / "cphandler").rglob("*.py"),
        *(ROOT / "backends").rglob("*.py"),
        *ROOT.glob("benchmarks/**/*.py"),
    ]
    named: set[str] = set()
    for path in (*pages, *sources):
        for listed in re.findall(r"(?:cphandler|\s\"?\.)\[([a-z0-9,_-]+)\]", path.read_text()):
            wrong = set(listed.split(",")) - extras().keys()
            assert not wrong, f"{path.name} names {wrong}"
            named |= set(listed.split(","))
    assert named >= {"flash-attn", "fa4", "cli", "dev", "te"}


def test_what_needs_a_gpu_is_never_in_dev() -> None:
    known = extras()
    assert known["te"] == ["transformer-engine[pytorch]>=2.9,<3"]
    assert known["gpu"] == ["cphandler[flash-attn,te]"]
    reached, left = set(), ["dev", "demo", "bench", "cli"]
    while left:
        name = left.pop()
        reached.add(name)
        for requirement in known[name]:
            for listed in re.findall(r"^cphandler\[([^]]+)\]", requirement):
                left += [inner for inner in listed.split(",") if inner not in reached]
            assert not re.match("flash|transformer-engine|magi", requirement)
    assert not reached & {"gpu", "te", "flash-attn", "fa4", "peers"}


@pytest.mark.skipif(torch.version.cuda is not None, reason="would install")
def test_make_gpu_extras_refuses_a_torch_without_cuda(tmp_path: Path) -> None:
    folder = tmp_path / "environment"
    command = [
        "make",
        "-o",
        f"{folder}/installed",
        "gpu-extras",
        f"VENV={folder}",
        f"BIN={Path(sys.executable).parent}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode
    assert f"torch {torch.__version__} is built without CUDA" in done.stderr
    assert "pip" not in done.stdout, "nothing was installed"
    listed = subprocess.run([*command, "-n"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "wheel setuptools ninja psutil packaging" in listed
    assert '--no-build-isolation -e ".[gpu]"' in listed


def test_every_kernel_of_a_package_names_it() -> None:
    """Else its install line would be missing where it is told apart from the reason."""
    for device_type in kernel_devices():
        for one in candidates(device_type):
            kernel: Kernel = get_kernel(one.name, device_type)
            module = importlib.import_module(type(kernel).__module__)
            assert kernel.package is getattr(module, "PACKAGE", None)
