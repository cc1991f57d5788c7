"""The benchmark of the demo's step: every run beside one rank, and what is wrong is not timed."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer

from benchmarks import model
from benchmarks.batches import batches, pile_lengths
from benchmarks.model import Contest, rows_of, sizes
from benchmarks.packs import packs
from benchmarks.steps import Apart, Sample, Trainer, exact, refuse_wrong, run_named
from cphandler.demo.model import GPTConfig
from cphandler.demo.training import RunSettings
from cphandler.errors import InvalidValueError

SMALL = RunSettings(model=GPTConfig(layers=1, width=32, heads=4, kv_heads=2, hidden=40))


@pytest.mark.slow
def test_steps_beside_one_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model, "ALLOCATOR", {})  # of the processes that a benchmark starts, not of this one
    rows, picture = tmp_path / "model.json", tmp_path / "model.png"
    named = {"documents": ["pile"], "run": ["p2p@balanced"], "json_file": rows, "plot": picture}
    model.main(**named, seq_len=[512], at_tokens=512, ranks=[2], layers=1, steps=2)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 110
    alone, pair, apart = json.loads(rows.read_text())["rows"]
    assert (alone["run"], pair["run"], pair["ranks"]) == ("one rank", "p2p@balanced", 2)
    assert (apart["run"], apart["ranks"], apart["sent_bytes"]) == ("apart", 2, 0)
    assert alone["cpu_ratio"] == alone["speedup"] == 1.0
    assert alone["sent_bytes"] == 0
    assert 0 < pair["peak_bytes"] < 0.75 * alone["peak_bytes"], "half the rows on each rank"
    assert picture.stat().st_size > 10_000


def test_ranks_apart_do_all_the_work_each() -> None:
    given = batches("dense", 64, 2)
    samples: dict[RunSettings | Apart, list[list[Sample]]] = {
        SMALL: [[Sample(1.0, 0.9, 0.1, 0, 0.0, 0.0)], [Sample(2.0, 1.8, 0.2, 0, 0.0, 0.0)]],
        Apart(2): [
            [Sample(t, 0.9 * t, 0.1, 0, 0.0, 0.0) for t in (1.0, 1.25)],
            [Sample(2.5, 2.25, 0.3, 0, 0.0, 0.0)] * 2,
        ],
    }
    alone, apart = rows_of(Contest("dense", 64, (SMALL,)), given, samples, {SMALL: 7})
    assert (alone.speedup, alone.peak_bytes) == (1.0, 7)
    assert (apart.run, apart.ranks, apart.peak_bytes) == ("apart", 2, None)
    assert apart.speedup == pytest.approx(2 / 1.25)
    assert apart.tokens_per_second == pytest.approx(statistics.median([64 / 0.625, 64 / 1.25]))
    assert (alone.fixed_seconds, apart.fixed_seconds) == pytest.approx((0.15, 0.2))
    assert apart.ranks / apart.slowest_ratio == pytest.approx(2 / 1.25)
    assert apart.ranks / apart.cpu_ratio == pytest.approx(2 / statistics.median([1.125, 1.25]))


def test_wrong_gradients_are_not_timed() -> None:
    batch = batches("dense", 64, 1)[0]
    expected = Trainer(exact(SMALL), None).gradient(batch)
    loss, gradient = Trainer(SMALL, None).gradient(batch)
    refuse_wrong("right", expected, [(loss, gradient)])
    for wrong in (gradient * (1 + 1e-5), torch.full_like(gradient, torch.nan), gradient.flip(0)):
        with pytest.raises(AssertionError, match=r"wrong: gradient on rank 1 off"):
            refuse_wrong("wrong", expected, [(loss, gradient), (loss, wrong)])
    for other in (loss + 1e-5, float("nan")):
        with pytest.raises(AssertionError, match=r"wrong: loss on rank 0 off"):
            refuse_wrong("wrong", expected, [(other, gradient)])


def test_every_step_has_another_batch_of_as_many_tokens() -> None:
    for kind in ("pile", "dense"):
        first, second = batches(kind, 300, 2, seed=3)
        assert len(first["tokens"]) == len(second["tokens"]) == 300
        assert not torch.equal(first["tokens"], second["tokens"])
    assert pile_lengths(16384, 1) == packs("pile", 2)[1]
    assert sum(pile_lengths(1000, 1)) == 1000


def test_tokens_grow_and_ranks_grow() -> None:
    assert sizes([64, 128], [2, 4], 2, 128) == {64: [2], 128: [2, 4]}
    assert sizes([64], [4], 2, 256) == {64: [2], 256: [4]}


def test_what_cannot_run_is_refused() -> None:
    assert run_named("ring", 2, SMALL) == replace(SMALL, backend="ring", cp_size=2, layout="zigzag")
    with pytest.raises(InvalidValueError, match="choose one of zigzag"):
        run_named("ring@replicated", 2, SMALL)
    with pytest.raises(typer.BadParameter, match="--documents takes pile, sources, dense"):
        model.main(documents=["books"])
    with pytest.raises(typer.BadParameter, match="no --plot"):
        model.main(speedup=True, plot=Path("model.png"))
