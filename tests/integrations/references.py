"""What the unmodified models of transformers give on one rank, and how far from it another result is."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.integrations.families import batch_of, build

LEAKS_WHERE_PACKED = ("gpt_oss",)
"""Families whose modeling code tells their masks nothing of positions: packed documents see each other there."""

TOLERANCE = 1e-5
"""Relative, in float32."""


@dataclass(frozen=True)
class Expected:
    """Results of one rank: logits ``[B, S, V]``, the loss, and the gradient of each parameter by name."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


def checkpointed(model: Any, checkpointing: str) -> Any:
    """The model under activation checkpointing: ``"off"``, ``"reentrant"`` or ``"non-reentrant"``."""
    if checkpointing != "off":
        reentrant = {"use_reentrant": checkpointing == "reentrant"}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=reentrant)
    return model


@lru_cache(maxsize=64)
def expected(family: str, kind: str, seed: int, checkpointing: str = "off") -> Expected:
    """The unmodified model, on the whole batch; one document at a time where transformers lets them see each other."""
    model, batch = checkpointed(build(family), checkpointing), batch_of(kind, seed)
    if kind == "packed" and family in LEAKS_WHERE_PACKED:
        logits, loss = one_document_at_a_time(model, batch)
    else:
        output = model(**batch)
        logits, loss = output.logits, output.loss
    loss.backward()
    return Expected(logits.detach(), loss.detach(), gradients_of(model))


def one_document_at_a_time(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits and loss where documents are kept apart by calling the model with each alone."""
    ids, starts = (
        batch["input_ids"].reshape(1, -1),
        (batch["position_ids"].reshape(-1) == 0).nonzero().flatten().tolist(),
    )
    outputs = [model(ids[:, start:stop]) for start, stop in zip(starts, [*starts[1:], ids.shape[1]], strict=True)]
    logits = torch.cat([output.logits for output in outputs], 1)
    labels = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].reshape(-1)
    loss = torch.nn.functional.cross_entropy(logits[0], labels)
    if outputs[0].get("router_logits") is not None:
        balance = sys.modules[type(model).__module__].load_balancing_loss_func
        layers = tuple(torch.cat(parts) for parts in zip(*(o.router_logits for o in outputs), strict=True))
        loss = loss + model.router_aux_loss_coef * balance(layers, layers[0].shape[-1], model.num_experts_per_tok)
    return logits.view(*batch["input_ids"].shape, -1), loss


def gradients_of(model: Any) -> dict[str, Tensor]:
    """By name; zeros where a parameter has none."""
    found = model.named_parameters()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in found if p.requires_grad}


def over_ranks(gradients: dict[str, Tensor], group: Any, convention: str = "mean") -> dict[str, Tensor]:
    """Gradients summed over the ranks of a group, or their mean."""
    ranks = dist.get_world_size(group)
    for gradient in gradients.values():
        dist.all_reduce(gradient, group=group)
        gradient.div_(ranks if convention == "mean" else 1)
    return gradients


def check_logits(got: Tensor, wanted: Tensor, batch: dict[str, Tensor]) -> None:
    """Equal at real tokens."""
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    assert got.shape == wanted.shape
    error = (got[real] - wanted[real]).norm() / wanted[real].norm()
    assert error < TOLERANCE, f"logits {error:.1e}"


def check_loss(got: Tensor, wanted: Tensor) -> None:
    """Equal."""
    error = (got - wanted).abs() / wanted.abs()
    assert error < TOLERANCE, f"loss {error:.1e}"


def check_gradients(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Each equal; one that is nothing but rounding is compared with the size of all."""
    assert got.keys() == wanted.keys()
    total = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    worst = [((got[n] - wanted[n]).norm() / max(wanted[n].norm(), 1e-3 * total), n) for n in wanted]
    error, name = max(worst)
    assert error < TOLERANCE, f"gradient of {name} {error:.1e}"
