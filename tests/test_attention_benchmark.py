"""The benchmark of attention: backends on layouts beside each other, and bytes counted without the library's plan."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "attention.py"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_a_backend_on_a_layout_of_its_own() -> None:
    """The script itself exits with 1 where the bytes sent differ from the theory."""
    named = ["ring", "p2p", "p2p@balanced", "ring@balanced", "usp@balanced"]
    chosen = [part for name in named for part in ("--backend", name)]
    done = bench("--lengths", "90,31,2,40,37", "--heads", "2", "--kv-heads", "2", "--repeats", "1", *chosen)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    rows = re.findall(r"^ *(\S+) +([124]) .* (\d+\.\d) +(equal|-) *$", done.stdout, flags=re.MULTILINE)
    expected = [("plain", "1"), ("local", "1"), *((name, size) for size in "24" for name in named)]
    assert [row[:2] for row in rows] == expected
    assert all(verdict == "equal" for _, size, _, verdict in rows if size != "1")


@pytest.mark.slow
def test_balanced_moves_less_than_zigzag() -> None:
    chosen = ["--backend", "p2p", "--backend", "p2p@balanced", "--layout", "zigzag", "--ranks", "2"]
    done = bench("--lengths", "600,300,350,280,520", "--heads", "2", "--kv-heads", "2", "--repeats", "1", *chosen)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    sent = dict(re.findall(r"^ *(p2p@\S+) +2 .* (\d+\.\d) +equal *$", done.stdout, flags=re.MULTILINE))
    assert 2 * float(sent["p2p@balanced"]) < float(sent["p2p@zigzag"])


@pytest.mark.slow
def test_a_layout_that_there_is_not() -> None:
    done = bench("--lengths", "64", "--ranks", "2", "--repeats", "1", "--backend", "p2p@diagonal")
    assert done.returncode != 0
    assert "unknown layout" in done.stderr
