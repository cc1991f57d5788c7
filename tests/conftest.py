"""Fixtures: pools of persistent ranks, one per size, started when first used."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cphandler.testing import RankPool

torch.set_num_threads(1)  # the pools' ranks and other workers want the cores; threads that wait would only spin


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Four ranks; sub-groups of them serve every cp size up to four."""
    with RankPool(4, timeout=120) as pool:
        yield pool


@pytest.fixture(scope="session")
def eight_ranks() -> Iterator[RankPool]:
    with RankPool(8, timeout=300) as pool:
        yield pool
