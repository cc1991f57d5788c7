"""What a user installs: wheel and source distribution hold the backends, the type marker and the licence."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ["pyproject.toml", "README.md", "LICENSE", "cphandler", "backends"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, links kept, so that building leaves nothing behind."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def build(folder: Path, *options: str) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", *options, str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_wheel_and_sdist(checkout: Path, tmp_path: Path) -> None:
    build(checkout, "--sdist", "--wheel", "--outdir", str(tmp_path))
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as sdist:
        unpacked = tmp_path / "unpacked"
        sdist.extractall(unpacked, filter="data")
    root = next(unpacked.iterdir())
    assert not (root / "backends").exists(), "the sdist has the backends where they are imported from"
    assert (root / "cphandler" / "backends" / "ring.py").is_file()
    build(root, "--wheel", "--outdir", str(tmp_path / "again"))
    listings = []
    for wheel in (next(tmp_path.glob("*.whl")), next((tmp_path / "again").glob("*.whl"))):
        with zipfile.ZipFile(wheel) as archive:
            listings.append(sorted(name for name in archive.namelist() if not name.endswith("RECORD")))
    assert listings[0] == listings[1], "the wheel from the sdist is the wheel from the checkout"
    for name in ("py.typed", "backends/ulysses.py", "kernels/torch_cpu.py", "testing/pool.py", "demo/__main__.py"):
        assert f"cphandler/{name}" in listings[0]
    assert any(name.endswith("licenses/LICENSE") for name in listings[0])
    assert not [name for name in listings[0] if name.startswith(("tests", "backends", "benchmarks"))]
    site = tmp_path / "site"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        archive.extractall(site)
    program = "import cphandler, sys; print(cphandler.__file__); print(cphandler.get_cp_handler_cls('ring').__module__)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(site / "cphandler" / "__init__.py"), "cphandler.backends.ring"]


def test_a_checkout_without_links_does_not_build(checkout: Path, tmp_path: Path) -> None:
    """git writes a link as a small text file where links are off; that must not make a wheel without backends."""
    broken = tmp_path / "broken"
    shutil.copytree(checkout, broken, symlinks=True)
    (broken / "cphandler" / "backends").unlink()
    (broken / "cphandler" / "backends").write_text("../backends")
    with pytest.raises(AssertionError, match="not a directory"):
        build(broken, "--wheel", "--outdir", str(tmp_path))


@pytest.mark.slow
def test_a_typed_client_sees_the_types(tmp_path: Path) -> None:
    client = tmp_path / "client.py"
    client.write_text(
        "from cphandler import get_cp_handler_cls\n"
        "from cphandler.backends.ring import RingHandler\n"
        "handler = get_cp_handler_cls('ring')(qkv_format='thd', cu_seqlens_q=[0, 4])\n"
        "reveal_type(handler.cp_size)\n"
        "RingHandler(qkv_format=3)\n"
    )
    command = [sys.executable, "-m", "mypy", "--no-incremental", "--cache-dir", str(tmp_path / "cache"), str(client)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert 'Revealed type is "int"' in done.stdout or 'Revealed type is "builtins.int"' in done.stdout, done.stdout
    assert 'Argument "qkv_format" to "RingHandler" has incompatible type' in done.stdout
