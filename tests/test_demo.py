"""The main job: documents, packs, and runs that equal one rank."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cphandler.demo.app import app
from cphandler.demo.corpus import packed_batches, source_files
from cphandler.demo.model import GPTConfig
from cphandler.demo.report import compare
from cphandler.demo.training import RunSettings, train
from cphandler.testing import RankPool, partition_group

ROOT = Path(__file__).parent.parent


def run(command: list[str], tmp_path: Path, **environment: str) -> tuple[str, dict]:  # type: ignore[type-arg]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", **environment}
    done = subprocess.run(
        [sys.executable, *command, "--output", str(tmp_path)],
        cwd=ROOT,
        env=settings,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    return done.stdout, json.loads((tmp_path / "demo.json").read_text())


def sent_bytes(settings: RunSettings, batches: list[dict[str, Any]]) -> float:
    return train(settings, batches, group=partition_group([range(settings.cp_size)])).sent_bytes_per_step


def test_real_documents_of_very_different_lengths() -> None:
    files = source_files()
    assert len(files) > 500
    batches = packed_batches(5, 1000)
    assert len(batches) == 5
    for batch in batches:
        assert len(batch["tokens"]) == 1000
        assert int(batch["cu_seqlens"][-1]) > 900, "packs are nearly full"
        assert int(batch["tokens"].max()) < GPTConfig().vocabulary
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(batches, packed_batches(5, 1000), strict=True))


def test_runs_equal_one_rank(tmp_path: Path) -> None:
    options = ["--steps", "5", "--exact-steps", "2", "--seq-len", "241", "--cp-size", "2", "--cp-size", "3"]
    out, report = run(["-m", "cphandler.demo", *options, "--backend", "ring"], tmp_path)
    names = [(row["name"], row["dtype"]) for row in report["runs"]]
    expected = ["one rank", "ring cp2", "ring cp3"]
    assert names == [(name, dtype) for dtype in ("float32", "float64") for name in expected]
    for row in report["runs"]:
        assert row["equal"]
        assert row["losses"][-1] < row["losses"][0]
        if row["name"] != "one rank":
            loss, gradient = (1e-4, 1e-6) if row["dtype"] == "float32" else (1e-9, 1e-12)
            assert row["loss_difference"] <= loss
            assert row["gradient_difference"] <= gradient
            assert row["gradient_difference"] > 0, "compared with itself?"
    assert "ring cp3" in out
    assert "NO" not in out


def test_all_that_a_loop_may_have(tmp_path: Path) -> None:
    """Two batches in a step, sharded parameters, further tokens, another reduction, scores."""
    options = "--steps 3 --dtype float64 --seq-len 150 --cp-size 2 --dp 2 --fsdp --rl --mtp-depth 2"
    more = "--loss sequence_mean_of_token_mean --backend ring --backend ulysses"
    out, report = run(["-m", "cphandler.demo", *options.split(), *more.split()], tmp_path)
    rows = report["runs"]
    assert [row["name"] for row in rows] == ["one rank", "ring cp2", "ulysses cp2"]
    assert all(row["equal"] for row in rows)
    for row in rows[1:]:
        assert len(row["sent_bytes_per_step"]) == 4
        assert 0 < row["gradient_difference"] < 1e-12
        assert row["score_difference"] < 1e-12
    assert re.search(r"score +equal", out)
    assert "runs are slower than one rank" in out


def test_compiled_layers() -> None:
    batches = packed_batches(2, 96)
    model = GPTConfig(layers=1, width=32, heads=2, kv_heads=2, hidden=32)
    one = train(RunSettings(model=model, dtype="float64"), batches)
    settings = RunSettings(backend="ring", cp_size=2, model=model, dtype="float64", compile="aot_eager")
    with RankPool(2) as pool:
        assert compare(settings, pool.run(replicated_scores, settings, batches), one).agrees


def replicated_scores(settings: RunSettings, batches: list[dict[str, Any]]) -> Any:
    return train(settings, batches, group=partition_group([range(settings.cp_size)]))


def test_every_rank_that_holds_all_rows_has_one_ranks_bits() -> None:
    """Losses, gradients, parameters and scores; a run with other bits would be told."""
    batches = packed_batches(2, 96)
    model = GPTConfig(layers=1, width=32, heads=2, kv_heads=2, hidden=32)
    one = train(RunSettings(model=model, score=True), batches)
    settings = RunSettings(backend="ulysses", cp_size=2, layout="replicated", model=model, score=True)
    with RankPool(2) as pool:
        results = pool.run(replicated_scores, settings, batches)
    compared = compare(settings, results, one)
    assert (compared.score_difference, compared.equal_scores, compared.same_bits_due) == (0, 1, True)
    assert all(torch.equal(result.parameters, one.parameters) for result in results)
    results[1].scores[5] += 1e-6
    assert not compare(settings, results, one).agrees


@pytest.mark.slow
def test_a_comm_type_and_a_layout_by_flag(tmp_path: Path) -> None:
    options = ["--steps", "3", "--exact-steps", "0", "--seq-len", "120", "--cp-size", "2"]
    chosen = ["--backend", "local", "--cp-comm-type", "a2a", "--layout", "striped", "--dtype", "float64"]
    _, report = run(["-m", "cphandler.demo", *options, *chosen], tmp_path)
    assert [(row["name"], row["layout"]) for row in report["runs"]] == [
        ("one rank", None),
        ("local/a2a cp2", "striped"),
    ]


@pytest.mark.slow
def test_layouts_beside_each_other(tmp_path: Path) -> None:
    """Equal to one rank on each; what is printed and kept says what each step costs."""
    options = ["--steps", "3", "--exact-steps", "2", "--seq-len", "240", "--cp-size", "2", "--backend", "p2p"]
    out, report = run(["-m", "cphandler.demo", *options, "--layout", "balanced", "--layout", "zigzag"], tmp_path)
    rows = report["runs"]
    assert [row["layout"] for row in rows] == [None, "balanced", "zigzag"] * 2
    assert all(row["equal"] and row["seconds_per_step"] > 0 for row in rows)
    alone, balanced, zigzag = rows[:3]
    assert alone["sent_bytes_per_step"] == [0]
    assert len(balanced["sent_bytes_per_step"]) == len(zigzag["sent_bytes_per_step"]) == 2
    assert 0 < sum(balanced["sent_bytes_per_step"]) <= sum(zigzag["sent_bytes_per_step"])
    for layout in ("balanced", "zigzag"):
        assert len(re.findall(rf"^ *p2p cp2 +{layout} .* yes *$", out, flags=re.MULTILINE)) == 2


def test_bytes_are_of_one_step() -> None:
    """A ring of two sends its block away once and gradients home; nothing of the first steps is counted twice."""
    batches = packed_batches(1, 64)
    model = GPTConfig(layers=1, width=32, heads=2, kv_heads=1, hidden=32)
    settings = RunSettings(backend="ring", cp_size=2, model=model, dtype="float64")
    keys = 32 * 2 * model.head_dim * 8
    with RankPool(2) as pool:
        once, twice = (pool.run(sent_bytes, settings, batches * count) for count in (1, 2))
    assert once == twice
    rest = 2048  # labels over the cuts, counts, and that ranks agree
    assert all(3 * keys <= sent <= 3 * keys + rest for sent in once), "a block forward, again backward, gradients home"


def test_under_torchrun(tmp_path: Path) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cphandler.demo"]
    options = ["--steps", "4", "--exact-steps", "2", "--seq-len", "200", "--backend", "ring", "--backend", "ulysses"]
    out, report = run([*command, *options], tmp_path)
    assert [row["ranks"] for row in report["runs"]] == [1, 2, 2, 1, 2, 2]
    assert all(row["equal"] for row in report["runs"])
    assert out.count("one rank") >= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "carrier"], "unknown backend or comm type"),
        (["--dtype", "int8"], "choose one of float32, float64, bfloat16"),
        (["--layout", "zigzag", "--layout", "diagonal"], "unknown layout"),
        (["--loss", "token_sum"], "unknown loss"),
        (["--compile", "gcc"], "unknown backend of torch.compile"),
    ],
)
def test_refusals(options: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [*options, "--output", str(tmp_path)])
    assert done.exit_code != 0
    assert message in done.output + str(done.exception)
    assert not [*tmp_path.iterdir()]


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('No module named typer', name='typer')\n")
    settings = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "cphandler.demo"]
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=120, check=False)
    assert "got typer; pip install 'cphandler[demo]'" in done.stderr


@pytest.mark.slow
def test_long_sequences(tmp_path: Path) -> None:
    options = ["--steps", "1", "--exact-steps", "0", "--seq-len", "32768", "--cp-size", "4"]
    _, report = run(["-m", "cphandler.demo", *options], tmp_path)
    assert all(row["equal"] for row in report["runs"])
