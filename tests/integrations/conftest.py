"""What takes long to import is imported once, by the process that ranks are copies of."""

from __future__ import annotations

from multiprocessing import forkserver, get_context

import pytest

TORCH = ["torch", "torch.distributed", "torch._dynamo", "cphandler.testing.laws"]

TRANSFORMERS = [
    "transformers.modeling_utils",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "peft",
]


@pytest.fixture(scope="session")
def transformers_in_ranks() -> None:
    """Ranks that are started from now on have transformers, unless there were some before."""
    get_context("forkserver").set_forkserver_preload([*TORCH, *TRANSFORMERS])
    forkserver.ensure_running()
