"""The page and the examples run, and give what one rank gives."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from cphandler.testing import RankPool
from tests.integrations.test_huggingface_trainer import launched

pytest.importorskip("transformers")

DOCS = Path(__file__).parent.parent.parent / "docs"


def page_on_rank(code: str) -> float:
    page: dict[str, Any] = {}
    exec(compile(code, "huggingface.md", "exec"), page)
    plain = page["unparallelize"](page["model"]).train()
    wanted = plain(input_ids=page["ids"], position_ids=page["positions"], labels=page["ids"], use_cache=False).loss
    torch.testing.assert_close(page["loss"], wanted, rtol=1e-5, atol=0)
    return float(page["loss"])


def test_the_page(ranks: RankPool) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "huggingface.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    assert len(set(ranks.run(page_on_rank, "\n".join(blocks)))) == 1


def example_on_rank(path: str) -> None:
    with launched():
        made = runpy.run_path(path)
    torch.manual_seed(0)
    plain = type(made["model"])(made["config"])
    plain.config._attn_implementation = "eager"
    labels = made["ids"].masked_fill(made["positions"] == 0, -100)
    loss = plain(input_ids=made["ids"], position_ids=made["positions"], labels=labels, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(made["loss"], loss, rtol=1e-5, atol=0)
    for mine, theirs in zip(made["model"].parameters(), plain.parameters(), strict=True):
        assert (mine.grad - theirs.grad).norm() < 1e-5 * theirs.grad.norm()


def test_the_example(ranks: RankPool) -> None:
    ranks.run(example_on_rank, str(DOCS / "examples" / "huggingface.py"))


WORDS = ["--steps", "3", "--tokens", "256"]


def finetuned(path: str, *words: str) -> list[dict[str, Any]]:
    made = runpy.run_path(path)
    logged: list[dict[str, Any]] = made["finetune"](made["parsed"]([*WORDS, *words]))
    return logged


def finetuned_on_rank(path: str, *words: str) -> list[dict[str, Any]]:
    with launched():
        return finetuned(path, *words)


def test_fine_tuning(ranks: RankPool, tmp_path: Path) -> None:
    path = str(DOCS / "examples" / "finetune.py")
    wanted = finetuned(path, "--output", str(tmp_path / "one"))
    for logged in ranks.run(finetuned_on_rank, path, "--output", str(tmp_path / "four"), "--cp-size", "4"):
        for mine, theirs in zip(logged, wanted, strict=True):
            for name in {"loss", "grad_norm", "eval_loss"} & theirs.keys():
                assert mine[name] == pytest.approx(theirs[name], rel=1e-5)
    groups = ranks.run(finetuned_on_rank, path, "--output", str(tmp_path / "two"), "--cp-size", "2", "--backend", "p2p")
    assert len({str([entry.get("eval_loss") for entry in logged]) for logged in groups}) == 1
    saved = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("one", "four")}
    assert saved["one"] == saved["four"]


def test_the_slurm_file_is_a_script() -> None:
    path = DOCS / "examples" / "finetune.slurm"
    subprocess.run(["bash", "-n", str(path)], check=True)
    asked = set(re.findall(r"--[a-z]+-?[a-z]*", path.read_text().split("finetune.py")[1]))
    assert asked <= set(re.findall(r"--[a-z]+-?[a-z]*", (DOCS / "examples" / "finetune.py").read_text()))
