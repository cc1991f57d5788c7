"""Training with everything else that people train with: gradients and loss are one rank's, whatever is combined.

One rank's means: all batches of the step through the same model in one process, over a dense score matrix.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from cphandler import (
    Causal,
    Documents,
    get_cp_handler_cls,
    language_model_loss,
    next_token_labels,
    record_traffic,
)
from cphandler.testing import RankPool, dense_attention, dense_rope, visible_pairs
from cphandler.training.meshes import CPMesh, cp_mesh

VOCABULARY, WIDTH, HEAD_DIM = 19, 24, 6


class Layer(nn.Module):
    """Attention of four heads over two, and a feed-forward part; knows a handler and nothing else of parallelism."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.RMSNorm(WIDTH, eps=1e-6), nn.RMSNorm(WIDTH, eps=1e-6)
        self.query = nn.Linear(WIDTH, 4 * HEAD_DIM)
        self.key, self.value = nn.Linear(WIDTH, 2 * HEAD_DIM), nn.Linear(WIDTH, 2 * HEAD_DIM)
        self.output = nn.Linear(4 * HEAD_DIM, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH, bias=False)

    def forward(self, x: Tensor, freqs: Tensor, handler: Any) -> Tensor:
        y = self.norm(x)
        q, k, v = (part(y).unflatten(-1, (-1, HEAD_DIM)) for part in (self.query, self.key, self.value))
        out = handler.core_attn(None, handler.rope(q, freqs), handler.rope(k, freqs), v)
        x = x + self.output(out.flatten(-2))
        hidden: Tensor = x + self.down(torch.tanh(self.up(self.norm2(x))))
        return hidden


class Model(nn.Module):
    """Two layers over token numbers."""

    def __init__(self, recompute: bool | None = None) -> None:
        super().__init__()
        self.recompute = recompute
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor, handler: Any) -> Tensor:
        x = self.embedding(ids)
        angles = torch.arange(handler.get_rotary_seq_len()).double()[:, None] * torch.tensor([1.0, 0.3, 0.1] * 2)
        freqs = handler.get_emb_on_this_cp_rank(angles.to(x.dtype))
        for layer in self.layers:
            if self.recompute is None:
                x = layer(x, freqs, handler)
            else:
                x = checkpoint(layer, x, freqs, handler, use_reentrant=self.recompute)
        logits: Tensor = self.head(x)
        return logits


class Dense:
    """In a handler's place on one rank: the definition of each method."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.visible = visible_pairs(Causal(), Documents.from_cu_seqlens(offsets(lengths)))

    def get_rotary_seq_len(self) -> int:
        return max(self.lengths)

    def get_emb_on_this_cp_rank(self, table: Tensor) -> Tensor:
        return torch.cat([table[:length] for length in self.lengths])

    def rope(self, x: Tensor, freqs: Tensor) -> Tensor:
        return dense_rope(x, freqs[:, : freqs.shape[-1] // 2], seq_dim=0)

    def core_attn(self, module: None, *qkv: Tensor, layer_number: int | None = None) -> Tensor:
        return dense_attention(*qkv, self.visible, qkv_format="thd")[0]


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])


@dataclass(frozen=True)
class Batch:
    """Packed documents, and the tokens whose prediction counts.

    Attributes:
        lengths: of the documents.
        ids: all tokens.
        counts: ``[T]`` bool: whether the label beside a token counts.
    """

    lengths: list[int]
    ids: Tensor
    counts: Tensor

    @property
    def labels(self) -> Tensor:
        """By the definition: the next token of the same document where there is one and it counts."""
        labels = torch.full_like(self.ids, -100)
        start = 0
        for length in self.lengths:
            labels[start : start + length - 1] = self.ids[start + 1 : start + length]
            start += length
        return labels.masked_fill(~self.counts, -100)


LENGTHS = {"short": [1, 9, 1, 1, 7, 2]}
"""Documents of a kind; the others draw theirs."""


def drawn(kind: str, seed: int) -> Batch:
    """Another number of tokens for every seed, and mostly the front of the documents masked, so that ranks differ."""
    generator = torch.Generator().manual_seed(seed)
    some = torch.randint(2, 15, (4,), generator=generator).tolist()
    lengths = LENGTHS.get(kind, [*some, 3])
    ids = torch.randint(0, VOCABULARY, (sum(lengths),), generator=generator)
    counts = torch.rand(len(ids), generator=generator) < torch.linspace(0.2, 1.0, len(ids))
    if kind == "a document without":
        counts[: lengths[0] + lengths[1]] = False
    if kind in ("one token", "none"):
        counts[:] = False
        counts[0] = kind == "one token"  # the first document has a second token
    return Batch(lengths, ids, counts)


@dataclass(frozen=True)
class Combination:
    """One way to train a step on four ranks.

    Attributes:
        dp: data-parallel ranks.
        cp: ranks of a sequence.
        tp: ranks of a layer.
        ulysses: ranks of the inner level, on a mesh of two.
        backend: the handler's.
        layout: the handler's.
        reducer: who reduces gradients: ``"fsdp"`` and ``"hsdp"`` (fully_shard over one dim and two), ``"ddp"``, or
            ``"sum"``, one all-reduce at the end.
        batches: kinds of the micro-batches of each data-parallel rank.
        order: ``"alternating"`` forward and backward; ``"one backward"`` of all losses; ``"pipeline"``: all forward,
            then all backward in the same order.
        recompute: activation checkpointing, reentrant or not.
        compiled: whether each layer is compiled, without a graph break, before it is sharded.
        dtype: of everything.
        factor: on each loss, in place of the right one.
        local_means: whether each rank's mean over its own tokens is taken for the loss.
    """

    dp: int = 2
    cp: int = 2
    tp: int = 1
    ulysses: int | None = None
    backend: str = "ring"
    layout: str | None = None
    reducer: str = "sum"
    batches: tuple[str, ...] = ("any",)
    order: str = "alternating"
    recompute: bool | None = None
    compiled: bool = False
    dtype: torch.dtype = torch.float64
    factor: float | None = None
    local_means: bool = False

    def micro_batches(self, dp_rank: int) -> list[Batch]:
        return [drawn(kind, 100 * dp_rank + i) for i, kind in enumerate(self.batches)]

    @property
    def right_factor(self) -> float:
        """What undoes the mean that a reducer takes, where gradients are parts that sum to the whole."""
        if self.reducer == "sum":
            return 1.0
        return float(self.dp) if self.layout == "replicated" else float(self.dp * self.cp)


def model_of(case: Combination, *, recompute: bool | None = None) -> Model:
    torch.manual_seed(7)
    return Model(recompute).to(case.dtype)


def expected(case: Combination) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the whole step and its gradients on one rank, in float64."""
    model = model_of(replace(case, dtype=torch.float64))
    batches = [batch for rank in range(case.dp) for batch in case.micro_batches(rank)]
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        logits = model(batch.ids, Dense(batch.lengths))
        total = total + nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
    loss = total / max(1, sum(int((batch.labels >= 0).sum()) for batch in batches))
    grads = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return loss.detach(), dict(zip((name for name, _ in model.named_parameters()), grads, strict=True))


_meshes: dict[tuple[int | None, ...], CPMesh] = {}


def mesh_of(case: Combination) -> CPMesh:
    """Made once in a pool's life, by all ranks together."""
    key = case.dp, case.cp, case.tp, case.ulysses
    if key not in _meshes:
        _meshes[key] = cp_mesh(dp=case.dp, cp=case.cp, tp=case.tp, ulysses=case.ulysses)
    return _meshes[key]


SHARDED = {"query": ColwiseParallel, "key": ColwiseParallel, "value": ColwiseParallel, "up": ColwiseParallel}


def wrapped(case: Combination, mesh: CPMesh) -> nn.Module:
    model = model_of(case, recompute=case.recompute)
    if case.tp > 1:
        for layer in model.layers:
            rows = {name: RowwiseParallel() for name in ("output", "down")}
            parallelize_module(layer, mesh.tp, {**{name: kind() for name, kind in SHARDED.items()}, **rows})
    if case.compiled:
        torch._dynamo.reset()
        for number, layer in enumerate(model.layers):
            model.layers[number] = torch.compile(layer, backend="aot_eager", fullgraph=True)
    if case.reducer in ("fsdp", "hsdp"):
        over = mesh.dp_cp if case.reducer == "fsdp" else mesh.hybrid
        for layer in model.layers:
            fully_shard(layer, mesh=over)
        fully_shard(model, mesh=over)
    if case.reducer == "ddp":
        return DistributedDataParallel(model, process_group=mesh.dp_cp.get_group())
    return model


@contextlib.contextmanager
def unsynchronized(model: nn.Module, *, last: bool) -> Any:
    """What a loop does around all micro-batches of a step but the last one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    with contextlib.nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync():
        yield


def loss_of(case: Combination, model: nn.Module, batch: Batch, handler: Any, total: int) -> Tensor:
    ids = handler.dispatch(batch.ids, 0)
    counts = handler.dispatch(batch.counts, 0, pad_value=0)
    labels = next_token_labels(ids, handler).masked_fill(~counts, -100)
    logits = model(ids, handler)
    if case.local_means:
        return nn.functional.cross_entropy(logits, labels, reduction="sum") / (labels >= 0).sum().clamp(min=1)
    return language_model_loss(logits, labels, handler, num_tokens=max(1, total))


def step(case: Combination, model: nn.Module, mesh: CPMesh) -> Tensor:
    """All micro-batches forward and backward; the sum of this data-parallel rank's losses."""
    batches = case.micro_batches(mesh.dp.get_local_rank())
    every = [batch for rank in range(case.dp) for batch in case.micro_batches(rank)]
    total = sum(int((batch.labels >= 0).sum()) for batch in every)
    handler_cls: Any = get_cp_handler_cls(case.backend)
    group = mesh.levels if handler_cls.two_level and mesh.levels is not None else mesh.cp
    factor = case.right_factor if case.factor is None else case.factor
    losses, waiting = torch.zeros((), dtype=case.dtype), []
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        with unsynchronized(model, last=last):
            handler = handler_cls(
                cp_group=group, qkv_format="thd", cu_seqlens_q=offsets(batch.lengths), layout=case.layout
            )
            handler.plan()
            loss = loss_of(case, model, batch, handler, total)
            losses = losses + loss.detach()
            waiting.append(factor * loss)
            if case.order == "alternating":
                waiting.pop().backward()
    if case.order == "one backward":
        torch.stack(waiting).sum().backward()
    for i, loss in enumerate(waiting if case.order == "pipeline" else []):
        with unsynchronized(model, last=i == len(waiting) - 1):
            loss.backward()
    return losses


def gradients(case: Combination, model: nn.Module, mesh: CPMesh) -> dict[str, Tensor]:
    """Whole gradients after reduction, by the model's own names."""
    module = model.module if isinstance(model, DistributedDataParallel) else model
    found = {}
    for given, parameter in module.named_parameters():
        name = given.replace("_orig_mod.", "")
        assert parameter.grad is not None, f"{name} has no gradient"
        grad = parameter.grad
        if case.reducer == "sum":
            part = grad.to_local() if isinstance(grad, DTensor) else grad
            dist.all_reduce(part, group=mesh.dp_cp.get_group())
        found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


def compared(case: Combination, truth: tuple[Tensor, dict[str, Tensor]]) -> tuple[float, float, str, int]:
    """How far a rank's loss and gradients are off, relative to the largest; a digest of them; messages it sent."""
    mesh = mesh_of(case)
    model = wrapped(case, mesh)
    with record_traffic() as traffic:
        loss = step(case, model, mesh)
    dist.all_reduce(loss, group=mesh.dp.get_group())
    found = gradients(case, model, mesh)
    assert found.keys() == truth[1].keys()
    largest = max(float(grad.abs().max()) for grad in truth[1].values()) or 1.0
    apart = max(float((found[name] - grad).abs().max()) / largest for name, grad in truth[1].items())
    assert all(bool(torch.isfinite(grad).all()) for grad in found.values())
    bits = hashlib.sha256(b"".join(found[name].detach().numpy().tobytes() for name in sorted(found)))
    return float((loss - truth[0]).abs()), apart, bits.hexdigest(), traffic.messages


FLIGHT = {"batches": ("any", "short")}
COMBINATIONS: dict[str, Combination] = {
    "fully_shard over dp 2 x cp 2, ring": Combination(reducer="fsdp"),
    "fully_shard over dp 2 x cp 2, p2p": Combination(reducer="fsdp", backend="p2p"),
    "fully_shard over dp 2 x cp 2, ulysses": Combination(reducer="fsdp", backend="ulysses"),
    "fully_shard over cp 4, p2p, balanced": Combination(1, 4, reducer="fsdp", backend="p2p", layout="balanced"),
    "fully_shard over ring 2 x ulysses 2": Combination(1, 4, ulysses=2, reducer="fsdp", backend="usp"),
    "hybrid sharding: replicated over dp 2, sharded over cp 2": Combination(reducer="hsdp", backend="p2p"),
    "DDP over dp 2 x cp 2, no_sync": Combination(reducer="ddp", **FLIGHT),
    "DDP over cp 4, all_gather, two batches in flight": Combination(
        1, 4, reducer="ddp", backend="all_gather", order="one backward", **FLIGHT
    ),
    "reentrant checkpointing, ring": Combination(recompute=True, **FLIGHT),
    "checkpointing, fully_shard, p2p": Combination(reducer="fsdp", backend="p2p", recompute=False, **FLIGHT),
    "accumulation, fully_shard, two batches in flight": Combination(reducer="fsdp", order="one backward", **FLIGHT),
    "the order of a pipeline, ulysses": Combination(backend="ulysses", order="pipeline", **FLIGHT),
    "the order of a pipeline, fully_shard, checkpointing": Combination(
        reducer="fsdp", order="pipeline", recompute=False, **FLIGHT
    ),
    "compiled layers, fully_shard, checkpointing, two batches in flight": Combination(
        reducer="fsdp", backend="p2p", recompute=False, compiled=True, order="one backward", **FLIGHT
    ),
    "tensor parallel 2 x cp 2, ring": Combination(1, 2, 2, **FLIGHT),
    "tensor parallel 2 x cp 2, ulysses": Combination(1, 2, 2, backend="ulysses"),
    "the replicated layout, DDP": Combination(reducer="ddp", backend="ulysses", layout="replicated"),
    "documents of one token": Combination(1, 4, batches=("short",), backend="p2p"),
    "a document without a token that counts": Combination(reducer="fsdp", batches=("a document without",)),
    "tokens that count on one rank alone": Combination(1, 4, reducer="fsdp", batches=("one token",)),
    "a batch without tokens that count": Combination(reducer="ddp", batches=("any", "none")),
    "a step without tokens that count": Combination(reducer="fsdp", batches=("none",)),
    "float32, fully_shard, p2p": Combination(reducer="fsdp", backend="p2p", dtype=torch.float32, **FLIGHT),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_gradients_are_one_ranks(ranks: RankPool, name: str) -> None:
    case = COMBINATIONS[name]
    tolerance = 1e-10 if case.dtype == torch.float64 else 1e-5
    answers = ranks.run(compared, case, expected(case))
    for loss, apart, _, messages in answers:
        assert loss < tolerance
        assert apart < tolerance
        assert messages, "nothing went through the handler"
    assert len({bits for _, _, bits, _ in answers}) == 1, "ranks hold other gradients"


WRONG = {
    "the factor is forgotten": Combination(reducer="fsdp", factor=1.0),
    "the factor is cp alone": Combination(reducer="ddp", factor=2.0),
    "a factor for parts on the replicated layout": Combination(
        reducer="ddp", backend="ulysses", layout="replicated", factor=4.0
    ),
    "a factor where gradients are summed": Combination(factor=4.0),
    "the mean of each rank's own mean": Combination(reducer="ddp", local_means=True, factor=1.0),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_easily_done_wrong_shows(ranks: RankPool, name: str) -> None:
    for _, apart, _, _ in ranks.run(compared, WRONG[name], expected(WRONG[name])):
        assert apart > 0.05
