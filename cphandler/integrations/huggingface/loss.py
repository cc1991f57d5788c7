"""Losses of the whole batch from a rank's outputs, in the gradient convention that was asked for."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from cphandler.errors import UnsupportedError
from cphandler.integrations.huggingface.batch import BatchOnRank
from cphandler.integrations.huggingface.package import transformers_module
from cphandler.training.labels import IGNORED
from cphandler.training.reductions import language_model_loss, sum_over_tokens


class _Scaled(torch.autograd.Function):
    """A value as it is, with a gradient that is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def with_gradient_times(x: Tensor, factor: float) -> Tensor:
    """``x`` itself, whose gradient is multiplied by a factor."""
    if factor == 1.0 or not x.requires_grad:
        return x
    scaled: Tensor = _Scaled.apply(x, factor)  # type: ignore[no-untyped-call]
    return scaled


def check_loss_function(model: Any) -> None:
    """Refuse a model that computes another loss than cross entropy of the next token.

    Raises:
        UnsupportedError: it does; which one.
    """
    usual = transformers_module("loss.loss_utils").ForCausalLMLoss
    used = getattr(model, "loss_function", usual)
    if used is not usual:
        raise UnsupportedError(
            f"{type(model).__name__} has a loss function of its own",
            got=getattr(used, "__name__", repr(used)),
            fix='leave out labels, pass gather_logits="always" to parallelize, and compute it from the whole logits',
        )


def next_token_loss(logits: Tensor, labels: Tensor, batch: BatchOnRank, num_items: Any = None) -> Tensor:
    """Cross entropy over the labels of the whole batch, from local logits; the value is the same on every rank.

    Args:
        logits: ``[B, L, V]`` local.
        labels: ``[B, S]`` global, those of what each token predicts.
        batch: theirs.
        num_items: what the sum is divided by in place of the number of labels.
    """
    count = (labels != IGNORED).sum() if num_items is None else num_items
    local = batch.cut(labels, pad_value=IGNORED).to(logits.device)
    return language_model_loss(logits, local, batch.handler, num_tokens=count)


def router_loss(model: Any, router_logits: tuple[Tensor, ...], batch: BatchOnRank) -> Tensor:
    """The load-balancing loss of a mixture of experts over all real tokens of the batch, on every rank alike.

    A ratio of sums (Switch Transformer, arXiv 2101.03961, equations 4 to 6, over all layers): each sum is made the
    batch's before it is divided, where a mean of ranks' own ratios is another number.

    Raises:
        UnsupportedError: the model balances in another way.
    """
    _check_balance(model)
    real = batch.real.reshape(-1, 1).float()
    experts, top = router_logits[0].shape[-1], model.num_experts_per_tok
    chosen, weight = real.new_zeros(experts), real.new_zeros(experts)
    for logits in router_logits:
        weights = torch.softmax(logits.to(real.device), dim=-1)
        best = weights.topk(top, dim=-1).indices
        chosen = chosen.scatter_add(0, best.reshape(-1), real.expand(-1, top).reshape(-1))
        weight = weight + (weights.float() * real).sum(0)
    rows = real.sum().reshape(1) * len(router_logits)
    sums = sum_over_tokens(torch.cat([chosen, weight, rows]), batch.handler)
    chosen, weight, rows = sums.split([experts, experts, 1])
    loss: Tensor = (chosen / rows * (weight / rows)).sum() * experts
    return loss


def _check_balance(model: Any) -> None:
    known = transformers_module("models.mixtral.modeling_mixtral").load_balancing_loss_func.__code__
    used = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    code = getattr(used, "__code__", None)
    same = code is not None and (code.co_code, code.co_names) == (known.co_code, known.co_names)
    if not same or not hasattr(model, "num_experts_per_tok") or not hasattr(model, "router_aux_loss_coef"):
        raise UnsupportedError(
            f"{type(model).__name__} balances its experts by a loss that is not Mixtral's",
            got="output_router_logits=True",
            fix="pass output_router_logits=False",
        )
