"""The Trainer: losses, gradient norms, evaluation, predictions and metrics of one rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cphandler import InvalidValueError, UnsupportedError
from cphandler.integrations import huggingface
from cphandler.integrations.huggingface import parallelize
from cphandler.testing import RankPool
from cphandler.testing.pool import partition_group
from tests.integrations.families import batch_of, build

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
states = pytest.importorskip("accelerate.state")


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    with RankPool(2, timeout=200) as pool:
        yield pool


@contextmanager
def launched() -> Iterator[None]:
    """The environment that torchrun makes; nothing of it, nor of accelerate's state, stays."""
    rank = str(dist.get_rank())
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(dist.get_world_size()), "MASTER_ADDR": "localhost"}
    os.environ.update(told)
    try:
        yield
    finally:
        for name in told:
            del os.environ[name]
        for state in (states.AcceleratorState, states.GradientState, states.PartialState):
            state._reset_state()


def collated(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def metrics_of(results: Any) -> dict[str, float]:
    """What one rank gives at tokens that have labels; what padding predicts is nobody's."""
    labels = results.label_ids[:, 1:]
    rows = results.predictions[:, :-1][labels != -100]
    right = rows.argmax(-1) == labels[labels != -100]
    return {"count": len(rows), "right": float(right.mean()), "size": float(np.abs(rows).mean())}


def trained(
    kind: str, folder: str, cp_size: int, *, resume: bool = False, even: bool = False, **settings: Any
) -> dict[str, Any]:
    """Five steps, an evaluation and a prediction; with ``cp_size`` 0 by transformers' own Trainer.

    ``even``: the last batch of an evaluation is as large as the others.
    """
    model, trainer_cls = build("llama"), transformers.Trainer
    gather = "always" if settings.get("label_smoothing_factor") else "eval"
    if cp_size:
        trainer_cls = huggingface.Trainer
        world = dist.get_world_size()
        group = partition_group([range(first, first + cp_size) for first in range(0, world, cp_size)])
        parallelize(model, group, gather_logits=gather)  # type: ignore[arg-type]
    rows = [{name: x[0] for name, x in batch_of(kind, seed, rows=1).items()} for seed in range(32)]
    told: dict[str, Any] = {
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "linear",
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "include_num_input_tokens_seen": "all",
    }
    arguments = transformers.TrainingArguments(output_dir=folder, **told | settings)
    trainer = trainer_cls(
        model,
        arguments,
        train_dataset=rows[8:],
        eval_dataset=rows[: 8 if even else 5],
        data_collator=collated,
        compute_metrics=metrics_of,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    found = trainer.predict(rows[:4])
    real = found.label_ids[:, 1:] != -100
    return {
        "steps": [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry],
        "evaluation": {k: v for k, v in trainer.evaluate().items() if "second" not in k and "runtime" not in k},
        "predictions": found.predictions[:, :-1][real],
        "prediction": {k: v for k, v in found.metrics.items() if "second" not in k and "runtime" not in k},
        "tokens": trainer.state.num_input_tokens_seen,
        "flos": trainer.state.total_flos,
    }


def trained_on_rank(kind: str, folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    with launched():
        return trained(kind, folder, 2, **settings)


def check_equal(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    np.testing.assert_allclose(got["steps"], wanted["steps"], rtol=1e-5)
    np.testing.assert_allclose(got["predictions"], wanted["predictions"], atol=1e-5)
    for name in ("evaluation", "prediction"):
        assert got[name].keys() == wanted[name].keys()
        for key in wanted[name]:
            np.testing.assert_allclose(got[name][key], wanted[name][key], rtol=1e-5, err_msg=key)
    assert got["tokens"] == wanted["tokens"]
    assert got["flos"] == wanted["flos"]


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "checkpointed": {"gradient_checkpointing": True},
    "smoothed": {"label_smoothing_factor": 0.1},
    "counted alone": {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("kind", ["packed", "right"])
@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_train_as_one(two_ranks: RankPool, tmp_path: Path, kind: str, name: str) -> None:
    wanted = trained(kind, str(tmp_path), 0, **SETTINGS[name])
    for got in two_ranks.run(trained_on_rank, kind, str(tmp_path), SETTINGS[name]):
        check_equal(got, wanted)


@pytest.mark.parametrize(("kind", "accumulation"), [("packed", 2), ("right", 1)])
def test_two_groups_of_two_train_as_one(ranks: RankPool, tmp_path: Path, kind: str, accumulation: int) -> None:
    """Groups see different batches: two of two rows are one of four."""
    told = {"gradient_accumulation_steps": accumulation, "even": True}
    wide = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    wanted = trained(kind, str(tmp_path), 0, **told | wide)  # type: ignore[arg-type]
    for got in ranks.run(trained_on_rank, kind, str(tmp_path), told):
        check_equal(got, wanted)


def test_training_goes_on_from_a_checkpoint(two_ranks: RankPool, tmp_path: Path) -> None:
    wanted = trained("packed", str(tmp_path / "one"), 0)
    saving = {"save_strategy": "steps", "save_steps": 3}
    two_ranks.run(trained_on_rank, "packed", str(tmp_path), saving)
    assert (tmp_path / "checkpoint-3").is_dir()
    for path in tmp_path.glob("checkpoint-5"):
        path.rename(tmp_path / "last")
    for got in two_ranks.run(trained_on_rank, "packed", str(tmp_path), saving | {"resume": True}):
        check_equal(got, wanted)


def by_accelerate(folder: str) -> list[float]:
    """A model that is not parallelized, where accelerate's configuration has a "cp" dim."""
    rows = [{name: x[0] for name, x in batch_of("packed", seed, rows=1).items()} for seed in range(4)]
    with launched():
        config = accelerate.ParallelismConfig(cp_size=2)
        told = transformers.TrainingArguments(
            folder,
            max_steps=2,
            report_to=[],
            use_cpu=True,
            logging_steps=1,
            parallelism_config=config,
            save_strategy="no",
        )
        trainer = huggingface.Trainer(build("llama"), told, train_dataset=rows, data_collator=collated)
        trainer.train()
        assert trainer.accelerator.parallelism_config is None
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_parallelism_config_parallelizes_the_model(two_ranks: RankPool, tmp_path: Path) -> None:
    rows = [{name: x[0] for name, x in batch_of("packed", seed, rows=1).items()} for seed in range(4)]
    told = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], use_cpu=True, logging_steps=1, save_strategy="no"
    )
    trainer = transformers.Trainer(build("llama"), told, train_dataset=rows, data_collator=collated)
    trainer.train()
    wanted = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for losses in two_ranks.run(by_accelerate, str(tmp_path)):
        assert losses == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind", ["packed", "right"])
def test_mixed_precision(two_ranks: RankPool, tmp_path: Path, kind: str) -> None:
    """accelerate wraps the forward pass once more; losses are one rank's as far as bfloat16 goes."""
    wanted = trained(kind, str(tmp_path), 0, bf16=True)
    for got in two_ranks.run(trained_on_rank, kind, str(tmp_path), {"bf16": True}):
        np.testing.assert_allclose(got["steps"], wanted["steps"], rtol=2e-2)
        assert got["evaluation"]["eval_loss"] == pytest.approx(wanted["evaluation"]["eval_loss"], rel=2e-3)


def refused(folder: str) -> None:
    group = partition_group([(0, 1)])
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (build("llama"), {}, InvalidValueError, "not parallelized"),
        (parallelize(build("llama"), group, gradient="sum"), {}, InvalidValueError, "averages gradients"),
        (parallelize(build("llama"), group), {"label_smoothing_factor": 0.1}, UnsupportedError, "label_smoothing"),
        (parallelize(build("llama"), group), {"eval_use_gather_object": True}, UnsupportedError, "gather"),
        (None, {}, UnsupportedError, "model_init"),
    ]
    with launched():
        for model, settings, error, words in cases:
            told = transformers.TrainingArguments(output_dir=folder, report_to=[], use_cpu=True, **settings)
            with pytest.raises(error, match=words):
                huggingface.Trainer(model, told)
        told = transformers.TrainingArguments(output_dir=folder, report_to=[], use_cpu=True)
        with pytest.raises(UnsupportedError, match="compute_loss_func"):
            huggingface.Trainer(parallelize(build("llama"), group), told, compute_loss_func=lambda *_: 0)


def test_settings_of_the_trainer_that_cannot_be_served(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(refused, str(tmp_path))
