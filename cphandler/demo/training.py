"""One training run on the ranks of a group, and what is measured of it."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cphandler import ContextParallelHandler, get_cp_handler_cls, record_traffic
from cphandler.demo.model import GPT, GPTConfig
from cphandler.demo.step import Objective, Totals, batch_loss, rows_are_alone, scores_of, sum_gradients
from cphandler.training.reductions import Reduction
from cphandler.training.scales import loss_scale

ALONE = "one rank"
"""Name of the run that others are compared with."""


@dataclass(frozen=True)
class RunSettings:
    """What a run does.

    Attributes:
        backend: backend name for :func:`get_cp_handler_cls`.
        cp_comm_type: comm type, or None.
        cp_size: ranks that share a batch.
        layout: layout name, or None for the backend's default.
        dtype: ``"float32"``, ``"float64"`` or ``"bfloat16"``.
        learning_rate: of AdamW.
        model: sizes.
        seed: of the initial weights.
        batches_per_step: packed batches of a step; data-parallel ranks share them out.
        reduction: of the loss over tokens and sequences.
        fsdp: whether parameters, gradients and the optimizer's state are sharded over all ranks.
        compile: backend of torch.compile for each layer; None for none.
        score: whether the first batch's log-probabilities are kept.
    """

    backend: str = "local"
    cp_comm_type: str | None = None
    cp_size: int = 1
    layout: str | None = None
    dtype: str = "float32"
    learning_rate: float = 1e-3
    model: GPTConfig = field(default_factory=GPTConfig)
    seed: int = 0
    batches_per_step: int = 1
    reduction: Reduction = "token_mean"
    fsdp: bool = False
    compile: str | None = None
    score: bool = False

    @property
    def name(self) -> str:
        """How tables and plots call the run."""
        if self.cp_size == 1 and self.backend == "local":
            return ALONE
        comm = f"/{self.cp_comm_type}" if self.cp_comm_type else ""
        return f"{self.backend}{comm} cp{self.cp_size}"

    def handler(self, batch: dict[str, Any], group: dist.ProcessGroup | None) -> ContextParallelHandler:
        """The handler of one packed batch on the ranks of ``group``."""
        handler = get_cp_handler_cls(self.backend, self.cp_comm_type)(
            cp_group=group,
            qkv_format="thd",
            cu_seqlens_q=batch["cu_seqlens"],
            cu_seqlens_q_padded=batch["cu_seqlens_padded"],
            layout=self.layout,
        )
        if self.compile:
            handler.plan()  # so that a compiled layer meets no planning
        return handler


@dataclass
class RunResult:
    """What one rank measured; losses, gradients and parameters are the same on all ranks.

    Attributes:
        losses: of each step.
        first_gradient: ``[parameters]`` gradient of the first step, summed over ranks.
        parameters: ``[parameters]`` after the last step.
        layout: name of the layout that the handlers had.
        tokens_per_second: global tokens over wall time, the first step not counted.
        seconds_per_step: median wall time, planning included, the first step not counted.
        sent_bytes_per_step: mean of what this rank sent for context parallelism; the sum of gradients is not counted.
        peak_memory: bytes: resident memory of the process on a CPU, allocated memory on a GPU.
        scores: ``[T]`` log-probabilities of the first batch's labels under the initial weights, where asked for.
        rows_alone: whether a row of a linear layer has the same bits among a rank's rows as among all, as probed.
    """

    losses: list[float]
    first_gradient: Tensor
    parameters: Tensor
    layout: str
    tokens_per_second: float
    seconds_per_step: float
    sent_bytes_per_step: float
    peak_memory: int
    scores: Tensor | None = None
    rows_alone: bool = False


def train(
    settings: RunSettings,
    batches: list[dict[str, Any]],
    *,
    group: dist.ProcessGroup | None = None,
    data_group: dist.ProcessGroup | None = None,
    device: str = "cpu",
    on_step: Callable[[], None] | None = None,
) -> RunResult:
    """Train on every batch once.

    Args:
        settings: what to do; every rank passes the same.
        batches: global batches, the same on every rank.
        group: the context-parallel group; None for one rank.
        data_group: the ranks that hold the same part of other batches; None for one rank.
        device: where this rank computes.
        on_step: called after each step.
    """
    run = _Run(settings, group, data_group, device)
    losses: list[float] = []
    seconds: list[float] = []
    first_gradient, layout, scores, alone = torch.empty(0), "", None, False
    if settings.score:
        handler = settings.handler(batches[0], group)
        scores = scores_of(run.model, batches[0], handler, device)
        alone = rows_are_alone(run.model, len(batches[0]["tokens"]), handler.num_local_tokens)
    count = settings.batches_per_step
    reset_peak_memory(device)
    with record_traffic() as traffic:
        for start in range(0, len(batches), count):
            started = time.perf_counter()
            loss, layout = run.backward(batches[start : start + count])
            losses.append(loss)
            if not seconds:
                first_gradient = flat(parameter.grad for parameter in run.model.parameters()).cpu()
            run.optimizer.step()
            seconds.append(time.perf_counter() - started)
            if on_step is not None:
                on_step()
    later = sum(len(batch["tokens"]) for batch in batches[count:])
    return RunResult(
        losses,
        first_gradient,
        flat(run.model.parameters()).cpu(),
        layout,
        tokens_per_second=later / max(sum(seconds[1:]), 1e-9),
        seconds_per_step=statistics.median(seconds[1:] or seconds),
        sent_bytes_per_step=traffic.sent_bytes / len(losses),
        peak_memory=peak_memory(device),
        scores=scores,
        rows_alone=alone,
    )


class _Run:
    """A model in training on this rank."""

    def __init__(
        self,
        settings: RunSettings,
        group: dist.ProcessGroup | None,
        data_group: dist.ProcessGroup | None,
        device: str,
    ) -> None:
        torch.manual_seed(settings.seed)
        self._settings, self._group, self._data_group, self._device = settings, group, data_group, device
        self.model = GPT(settings.model).to(device, getattr(torch, settings.dtype))
        self._sharded = settings.fsdp and group is not None
        if settings.compile:
            for layer in self.model.layers:
                layer.compile(backend=settings.compile, fullgraph=True)
        if self._sharded:
            self._shard(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95))

    def _shard(self, device: str) -> None:
        """Each layer's parameters over all ranks."""
        fully_shard = import_module("torch.distributed.fsdp").fully_shard  # long to import, and few runs need it
        meshes = import_module("torch.distributed.device_mesh")
        mesh = meshes.init_device_mesh(device.split(":", maxsplit=1)[0], (dist.get_world_size(),))
        for layer in self.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def backward(self, batches: list[dict[str, Any]]) -> tuple[float, str]:
        """Gradients of a step from its batches, those of this rank's data-parallel place; the loss, and the layout."""
        settings, data = self._settings, self._data_group
        place, places = (0, 1) if data is None else (dist.get_rank(data), dist.get_world_size(data))
        objective = Objective(settings.reduction, Totals.of(batches, settings.model.mtp_depth), data)
        total, layout = 0.0, ""
        self.optimizer.zero_grad()
        for batch in batches[place::places]:
            handler = settings.handler(batch, self._group)
            loss = batch_loss(self.model, batch, handler, self._device, objective)
            factor = loss_scale("mean" if self._sharded else "sum", handler, group=data)
            (loss * factor).backward()
            total, layout = total + float(loss.detach()), handler.layout.name
        if not self._sharded:
            sum_gradients(self.model, [group for group in (self._group, data) if group is not None])
        return total, layout


def flat(tensors: Any) -> Tensor:
    """All tensors in one vector, whole where they are sharded."""
    whole = (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for tensor in tensors)
    return torch.cat([tensor.detach().reshape(-1) for tensor in whole])


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
