"""One training run on the ranks of a group, and what is measured of it."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cphandler import ContextParallelHandler, get_batch_on_this_cp_rank, get_cp_handler_cls, record_traffic
from cphandler.demo.model import GPT, GPTConfig


@dataclass(frozen=True)
class RunSettings:
    """What a run does.

    Attributes:
        backend: backend name for :func:`get_cp_handler_cls`.
        cp_comm_type: comm type, or None.
        cp_size: ranks.
        layout: layout name, or None for the backend's default.
        dtype: ``"float32"``, ``"float64"`` or ``"bfloat16"``.
        learning_rate: of AdamW.
        model: sizes.
        seed: of the initial weights.
    """

    backend: str = "local"
    cp_comm_type: str | None = None
    cp_size: int = 1
    layout: str | None = None
    dtype: str = "float32"
    learning_rate: float = 1e-3
    model: GPTConfig = field(default_factory=GPTConfig)
    seed: int = 0

    @property
    def name(self) -> str:
        """How tables and plots call the run."""
        if self.cp_size == 1 and self.backend == "local":
            return "one rank"
        comm = f"/{self.cp_comm_type}" if self.cp_comm_type else ""
        return f"{self.backend}{comm} cp{self.cp_size}"

    def handler(self, batch: dict[str, Any], group: dist.ProcessGroup | None) -> ContextParallelHandler:
        """The handler of one packed batch on the ranks of ``group``."""
        return get_cp_handler_cls(self.backend, self.cp_comm_type)(
            cp_group=group,
            qkv_format="thd",
            cu_seqlens_q=batch["cu_seqlens"],
            cu_seqlens_q_padded=batch["cu_seqlens_padded"],
            layout=self.layout,
        )


@dataclass
class RunResult:
    """What one rank measured; losses, gradients and parameters are the same on all ranks.

    Attributes:
        losses: mean loss per token of each step.
        first_gradient: ``[parameters]`` gradient of the first step, summed over ranks.
        parameters: ``[parameters]`` after the last step.
        layout: name of the layout that the handlers had.
        tokens_per_second: global tokens over wall time, the first step not counted.
        seconds_per_step: median wall time, planning included, the first step not counted.
        sent_bytes_per_step: mean of what this rank sent for context parallelism; the sum of gradients is not counted.
        peak_memory: bytes: resident memory of the process on a CPU, allocated memory on a GPU.
    """

    losses: list[float]
    first_gradient: Tensor
    parameters: Tensor
    layout: str
    tokens_per_second: float
    seconds_per_step: float
    sent_bytes_per_step: float
    peak_memory: int


def train(
    settings: RunSettings,
    batches: list[dict[str, Any]],
    *,
    group: dist.ProcessGroup | None = None,
    device: str = "cpu",
    on_step: Callable[[], None] | None = None,
) -> RunResult:
    """Train on every batch once.

    Args:
        settings: what to do; every rank of ``group`` passes the same.
        batches: global batches, the same on every rank.
        group: the context-parallel group; None for one rank.
        device: where this rank computes.
        on_step: called after each step.
    """
    torch.manual_seed(settings.seed)
    model = GPT(settings.model).to(device, getattr(torch, settings.dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95))
    losses: list[float] = []
    seconds: list[float] = []
    first_gradient, layout = torch.empty(0), ""
    reset_peak_memory(device)
    with record_traffic() as traffic:
        for batch in batches:
            started = time.perf_counter()
            handler = settings.handler(batch, group)
            optimizer.zero_grad()
            losses.append(training_step(model, batch, handler, device))
            if not seconds:
                first_gradient = flat(parameter.grad for parameter in model.parameters()).cpu()
                layout = handler.layout.name
            optimizer.step()
            seconds.append(time.perf_counter() - started)
            if on_step is not None:
                on_step()
    return RunResult(
        losses,
        first_gradient,
        flat(model.parameters()).cpu(),
        layout,
        tokens_per_second=sum(len(batch["tokens"]) for batch in batches[1:]) / max(sum(seconds[1:]), 1e-9),
        seconds_per_step=statistics.median(seconds[1:] or seconds),
        sent_bytes_per_step=traffic.sent_bytes / len(batches),
        peak_memory=peak_memory(device),
    )


def training_step(model: nn.Module, batch: dict[str, Any], handler: ContextParallelHandler, device: str) -> float:
    """Forward, backward and the reduction over ranks; returns the mean loss over all tokens of the batch.

    Each rank sums the loss of its own tokens and divides by the number of labels in the global batch; gradients are
    then summed over ranks. Nothing is averaged twice.
    """
    label_count = int((batch["labels"] != -100).sum())
    local = get_batch_on_this_cp_rank(batch, cp_handler=handler)
    logits = model(local["tokens"].to(device), cp_handler=handler)
    labels = local["labels"].to(device)
    loss = nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / max(1, label_count)
    loss.backward()
    total = loss.detach().double()
    if handler.cp_size > 1:
        parameters = list(model.parameters())
        gradient = flat(parameter.grad for parameter in parameters)
        dist.all_reduce(gradient, group=handler.group)
        dist.all_reduce(total, group=handler.group)
        for parameter, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)
    return float(total)


def flat(tensors: Any) -> Tensor:
    """All tensors in one vector."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def reset_peak_memory(device: str) -> None:
    """Start to measure anew where the system can."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return
    marker = Path("/proc/self/clear_refs")
    if marker.exists():
        marker.write_text("5")


def peak_memory(device: str) -> int:
    """Bytes since :func:`reset_peak_memory`: allocated on a GPU, else the process's largest resident size."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
