"""What takes long to import is imported once, by the process that ranks are copies of."""

from __future__ import annotations

from multiprocessing import forkserver, get_context

import pytest

TORCH = ["torch", "torch.distributed", "torch._dynamo", "cphandler.testing.laws"]

STACKS = [
    "transformers.modeling_utils",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "peft",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.gpt_model",
]
"""A stack that is not installed is left out."""


@pytest.fixture(scope="session", autouse=True)
def stacks_in_ranks() -> None:
    """Ranks that are started from now on have the stacks, unless there were some before."""
    get_context("forkserver").set_forkserver_preload([*TORCH, *STACKS])
    forkserver.ensure_running()
