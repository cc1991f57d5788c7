"""What the fused kernels inside torch ask for on every device: blocks that are full or square, and plain tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cphandler.kernels.task import Task
from cphandler.tokens.intervals import UNBOUNDED

NO_DROPOUT = {"dropout": "dropout: its generator is its own, and the mask would depend on the number of ranks"}
"""What every fused kernel refuses, and what it says."""

OPTIONS = {"softcap": "softcap", **NO_DROPOUT}
"""What the kernels inside torch refuse."""


def follows_torch() -> str | None:
    """Why two runs may differ, for operators of torch that obey its process-wide setting; None where it is on."""
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    if strict:
        return None
    return "deterministic=True, and its backward pass is only under torch.use_deterministic_algorithms(True)"


def causal_square(task: Task) -> int:
    """Side of the largest square on a causal task's diagonal; 0 for tasks that are not bounded above only."""
    if task.lo != -UNBOUNDED or task.hi == UNBOUNDED:
        return 0
    return min(task.nq, task.nk - task.hi)


def around_square(task: Task, side: int) -> Iterator[Task]:
    """A causal task as the full blocks left of and below its square, and the square."""
    if task.hi > 0:
        yield Task(task.q, task.nq, task.k, task.hi, -UNBOUNDED, UNBOUNDED)
    yield Task(task.q, side, task.k + task.hi, side, -UNBOUNDED, 0)
    if side < task.nq:
        yield Task(task.q + side, task.nq - side, task.k + task.hi, task.nk - task.hi, -UNBOUNDED, UNBOUNDED)


def is_square_causal(block: Task) -> bool:
    """What the causal flag of a kernel means everywhere: ``nq == nk`` and row i sees keys 0 to i."""
    return block.lo == -UNBOUNDED and block.hi == 0 and block.nq == block.nk


def unit_stride(x: Tensor) -> Tensor:
    """``x`` with a last stride of 1, as ``[B, heads, rows, D]``."""
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


def padded(x: Tensor, channels: int) -> Tensor:
    """``x`` with zeros after its last dim, up to a number of channels; ``x`` itself where it has that many."""
    missing = channels - x.shape[-1]
    return x if missing == 0 else torch.nn.functional.pad(x, (0, missing))


def narrowed(x: Tensor, channels: int) -> Tensor:
    """The first channels of ``x``, without what :func:`padded` appended."""
    return x if x.shape[-1] == channels else x[..., :channels]
