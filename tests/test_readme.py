"""The README's training step and the documentation's backend run as they are printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cphandler import get_cp_handler_cls
from cphandler.handler import factory
from cphandler.testing import RankPool, assert_close, partition_group
from cphandler.testing.cases import Batch, Case
from cphandler.testing.laws import check_attention

ROOT = Path(__file__).parent.parent


def python_blocks(path: str) -> str:
    """All Python code of a page."""
    return "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), flags=re.DOTALL))


def train(code: str, steps: int, group: dist.ProcessGroup | None) -> tuple[list[float], torch.Tensor]:
    page: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), page)
    torch.manual_seed(0)
    model = page["TinyModel"]().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(0, 64, (n,), generator=generator) for n in (17, 3, 1, 30)]
    losses = [page["training_step"](model, optimizer, documents, group) for _ in range(steps)]
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()])


def train_on_rank(code: str, steps: int, parts: list[tuple[int, ...]]) -> tuple[list[float], torch.Tensor]:
    return train(code, steps, partition_group(parts))


@pytest.mark.parametrize("parts", [[(0, 1), (2, 3)], [(0, 1, 2, 3)]], ids=["cp2", "cp4"])
def test_the_training_step(ranks: RankPool, parts: list[tuple[int, ...]]) -> None:
    code = python_blocks("README.md")
    losses, parameters = train(code, 8, None)
    assert losses[-1] < losses[0]
    for rank_losses, rank_parameters in ranks.run(train_on_rank, code, 8, parts):
        assert rank_losses == pytest.approx(losses, rel=1e-9)
        assert_close(rank_parameters, parameters, what="parameters after training")


def hold_to_the_law(code: str) -> None:
    if ("everywhere", None) not in factory.available_cp_handlers():
        exec(compile(code, "adding-a-backend.md", "exec"), {"__name__": "documentation"})
    for cp_size in (1, 2, 4):
        for qkv_format in ("thd", "sbhd"):
            for layout in ("contiguous", "zigzag"):
                check_attention(Case("everywhere", cp_size, qkv_format, layout, batch=Batch((13, 3, 6))))


def test_the_documented_backend(ranks: RankPool) -> None:
    code = python_blocks("docs/adding-a-backend.md")
    assert len(code.splitlines()) < 60
    ranks.run(hold_to_the_law, code)


def test_the_errors_in_the_readme() -> None:
    """The README's error text is what the library says."""
    text = " ".join((ROOT / "README.md").read_text().split())
    handler = get_cp_handler_cls("ring")(cp_group=_Seat(), qkv_format="thd", cu_seqlens_q=[0, 16])
    with pytest.raises(ValueError, match="dispatch expects") as caught:
        handler.dispatch(torch.zeros(64, 8), 0)
    assert str(caught.value) in text


class _Seat:
    def size(self) -> int:
        return 4

    def rank(self) -> int:
        return 0


def test_assert_close_is_not_blind() -> None:
    """The comparison above would see one wrong row."""
    right = torch.randn(50, 4, dtype=torch.float64)
    wrong = right.clone()
    wrong[7] = 0
    with pytest.raises(AssertionError):
        assert_close(wrong, right)


def _anchors(text: str) -> set[str]:
    """Of each heading, as it is linked to."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md"))
)


@pytest.mark.parametrize("page", PAGES)
def test_pages_have_live_links_and_no_placeholders(page: str) -> None:
    path = ROOT / page
    text = path.read_text()
    for link, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text):
        if link.startswith("http"):
            continue
        target = path.parent / link if link else path
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target.read_text()), f"{link}#{anchor}"
    assert not re.findall(r"\b(?:TODO|FIXME|XXX|TBD|[A-Z]+_TABLE)\b", text)
