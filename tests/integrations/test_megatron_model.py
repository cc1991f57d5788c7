"""Megatron's GPTModel with a handler for each micro-batch, beside one rank."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cphandler.testing import RankPool

pytest.importorskip("megatron.core")

from megatron.core import parallel_state
from megatron.core.models.gpt import gpt_model
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

from cphandler.integrations.megatron import (
    cp_config,
    cp_handler_cls,
    get_batch_on_this_cp_rank,
    handler_spec,
    packed_params,
    roll_tensor,
    with_handlers,
)
from tests.integrations.gpt import (
    assert_alike,
    causal_mask,
    config_of,
    dense,
    dense_spec,
    gpt,
    loss_of,
    mean_over,
    megatron,
    packed,
    padded,
    total_over,
)

LENGTHS = (13, 2, 6, 9, 5)
ROWS, LENGTH = 2, 19
"""Neither divides by twice the ranks: what Megatron itself refuses."""


@lru_cache
def reference(
    kind: str, mtp: bool, seed: int, model_settings: tuple[tuple[str, Any], ...] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of Megatron's own model and attention on one rank; packed: one document at a time.

    To be called where Megatron is set up for one rank: that is a collective, and what is remembered is not.
    """
    model = gpt(config_of(mtp_num_layers=1 if mtp else None, **dict(model_settings)), dense_spec)
    batch = batch_of(kind, seed)
    parts = _documents(batch) if "cu_seqlens" in batch else [batch]
    number, shares = batch["loss_mask"].sum(), [part["loss_mask"][:, 1:].sum() for part in parts]
    losses = []
    for part, share in zip(parts, shares, strict=True):
        MTPLossAutoScaler.set_loss_scale(share / sum(shares))  # the part divides by its own count
        counted = part["loss_mask"] if share > 0 else torch.ones_like(part["loss_mask"])  # 0 / 0, at weight 0
        mask = causal_mask(part["tokens"].shape[1])
        out = model(part["tokens"], part["position_ids"], mask, labels=part["labels"], loss_mask=counted)
        loss = loss_of(out, part["loss_mask"], number)
        loss.backward()
        losses.append(loss.detach())
    MTPLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    return torch.stack(losses).sum(), mean_over(None, model)


def batch_of(kind: str, seed: int) -> dict[str, Any]:
    if kind in ("dense", "even"):
        return dense(ROWS, LENGTH if kind == "dense" else 16, seed)
    return packed(LENGTHS, seed)


def _documents(batch: dict[str, Any]) -> list[dict[str, Any]]:
    keys = ("tokens", "labels", "loss_mask", "position_ids")
    return [{key: batch[key][:, a:b] for key in keys} for a, b in pairwise(batch["cu_seqlens"].tolist())]


def handler_for(config: Any, batch: dict[str, Any], group: Any, **settings: Any) -> Any:

    shape = {"max_seqlen_q": batch["tokens"].shape[1]}
    if "cu_seqlens" in batch:
        physical = batch.get("cu_seqlens_padded")
        shape = {"qkv_format": "thd", "cu_seqlens_q": batch["cu_seqlens"], "cu_seqlens_q_padded": physical}
    cls = cp_handler_cls(config, settings.pop("cp_comm_type", None))
    return cls(cp_group=group, config=cp_config(config), **shape, **settings)


def forward(model: Any, batch: dict[str, Any], handler: Any, *, carried: bool = True) -> Tensor:
    """One micro-batch: the local part of the loss; without a handler in its parameters Megatron cuts and turns."""

    local = get_batch_on_this_cp_rank(batch, cp_handler=handler)
    out = model(
        local["tokens"],
        local["position_ids"],
        None,
        labels=local["labels"],
        loss_mask=local["loss_mask"],
        packed_seq_params=packed_params(handler) if carried else None,
    )
    share = total_over(handler, local["loss_mask"].sum()) / handler.cp_size
    return loss_of(out, local["loss_mask"], share)


def train_case(kind: str, cp_size: int, mtp: bool, settings: dict[str, Any], layout: str | None = None) -> None:
    comm_type = settings.pop("list", None)
    described = tuple((name, settings[name]) for name in ("multi_latent_attention", "rope_type") if name in settings)
    seed = 3 + dist.get_rank() // cp_size
    with megatron():
        expected, expected_grads = reference(kind, mtp, seed, described)
    with megatron(cp=cp_size):
        group = parallel_state.get_context_parallel_group()
        config = config_of(context_parallel_size=cp_size, mtp_num_layers=1 if mtp else None, **settings)
        model = with_handlers(gpt(config, handler_spec))
        batch = batch_of(kind, seed)
        batch = padded(batch, 8) if kind == "padded" else batch
        handler = handler_for(config, batch, group, layout=layout, cp_comm_type=comm_type)
        loss = forward(model, batch, handler, carried=kind != "even")
        loss.backward()
        total = total_over(handler, loss) / cp_size
        assert torch.allclose(total, expected, rtol=1e-5), f"{total} for {expected}"
        assert_alike(mean_over(group, model), expected_grads, f"{kind} {cp_size} {settings}")


CASES = [
    ("dense", 2, False, {}, None),
    ("packed", 2, True, {"cp_comm_type": "a2a"}, None),
    ("dense", 4, True, {"cp_comm_type": "all_gather"}, None),
    ("packed", 4, False, {"cp_comm_type": "a2a+p2p", "hierarchical_context_parallel_sizes": [2, 2]}, None),
    ("padded", 2, True, {}, None),
    ("packed", 1, True, {}, None),
    ("even", 2, False, {"cp_comm_type": "all_gather"}, None),
    ("dense", 2, False, {"multi_latent_attention": True}, None),
    ("packed", 2, True, {"multi_latent_attention": True, "rope_type": "yarn"}, "balanced"),
    ("packed", 4, True, {"list": ["p2p", "ring"]}, "balanced"),
    (
        "packed",
        2,
        True,
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        None,
    ),
    ("packed", 4, False, {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}, None),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_model_trains_like_one_rank(ranks: RankPool, case: tuple[Any, ...]) -> None:
    ranks.run(train_case, *case)


def own_count_case() -> None:
    """Megatron's own count on each rank: a mean of means, which the comparison above must see."""
    seed = 3 + dist.get_rank() // 2
    with megatron():
        _, expected = reference("packed", True, seed)
    with megatron(cp=2):
        group = parallel_state.get_context_parallel_group()
        model = with_handlers(gpt(config_of(context_parallel_size=2, mtp_num_layers=1), handler_spec))
        batch = packed(LENGTHS, seed)
        with patch.object(gpt_model, "roll_tensor", roll_tensor):
            forward(model, batch, handler_for(model.config, batch, group)).backward()
        found = mean_over(group, model)
        with pytest.raises(AssertionError, match="own count: "):
            assert_alike(found, expected, "own count", 1e-3)


def test_the_comparison_sees_a_ranks_own_count(ranks: RankPool) -> None:
    ranks.run(own_count_case)


def per_token_case() -> None:
    """``calculate_per_token_loss``: sums of losses, and gradients summed over ranks, to be divided by all tokens."""
    settings = {"calculate_per_token_loss": True, "mtp_num_layers": 1}
    batch = packed(LENGTHS, 3 + dist.get_rank() // 2)
    with megatron():
        whole = gpt(config_of(**settings))
        for part in _documents(batch):
            mask = causal_mask(part["tokens"].shape[1])
            named = {"labels": part["labels"], "loss_mask": part["loss_mask"]}
            loss_of(whole(part["tokens"], part["position_ids"], mask, **named), part["loss_mask"], 1.0).backward()
        expected = mean_over(None, whole)
    with megatron(cp=2):
        group = parallel_state.get_context_parallel_group()
        model = with_handlers(gpt(config_of(context_parallel_size=2, **settings), handler_spec))
        handler = handler_for(model.config, batch, group)
        local = get_batch_on_this_cp_rank(batch, cp_handler=handler)
        named = {
            "labels": local["labels"],
            "loss_mask": local["loss_mask"],
            "packed_seq_params": packed_params(handler),
        }
        loss_of(model(local["tokens"], local["position_ids"], None, **named), local["loss_mask"], 1.0).backward()
        assert_alike({name: 2 * grad for name, grad in mean_over(group, model).items()}, expected, "sums")


def test_sums_over_tokens(ranks: RankPool) -> None:
    ranks.run(per_token_case)


def in_flight_case() -> None:
    """Two pipeline stages in one process: forward A, forward B, backward A, backward B; then B's layout is another."""
    seeds = [3 + dist.get_rank() // 2, 13 + dist.get_rank() // 2]
    with megatron():
        expected = [reference("packed", True, seeds[0]), reference("dense", True, seeds[1])]
    with megatron(cp=2):
        group = parallel_state.get_context_parallel_group()
        config = config_of(context_parallel_size=2, mtp_num_layers=1, num_layers=1)
        whole = gpt(config_of(context_parallel_size=2, mtp_num_layers=1), handler_spec)
        first = with_handlers(gpt(config_of(context_parallel_size=2, num_layers=1), handler_spec, post_process=False))
        last = with_handlers(gpt(config, handler_spec, pre_process=False))
        _split(whole, first, last)
        batches = [packed(LENGTHS, seeds[0]), dense(ROWS, LENGTH, seeds[1])]
        handlers = [handler_for(config, batches[0], group, layout="balanced"), handler_for(config, batches[1], group)]
        losses = []
        for batch, handler in zip(batches, handlers, strict=True):
            local, params = get_batch_on_this_cp_rank(batch, cp_handler=handler), packed_params(handler)
            hidden = first(local["tokens"], local["position_ids"], None, packed_seq_params=params)
            sent = hidden.detach().requires_grad_()
            last.set_input_tensor(sent)
            out = last(
                local["tokens"],
                local["position_ids"],
                None,
                labels=local["labels"],
                loss_mask=local["loss_mask"],
                packed_seq_params=params,
            )
            share = total_over(handler, local["loss_mask"].sum()) / 2
            losses.append((loss_of(out, local["loss_mask"], share), hidden, sent))
        for (loss, hidden, sent), (value, _), handler in zip(losses, expected, handlers, strict=True):
            assert torch.allclose(total_over(handler, loss) / 2, value, rtol=1e-5)
            loss.backward()
            hidden.backward(sent.grad)
        both = {name: expected[0][1][name] + expected[1][1][name] for name in expected[0][1]}
        assert_alike(_joined(mean_over(group, first), mean_over(group, last)), both, "two micro-batches")


def _split(whole: Any, first: Any, last: Any) -> None:
    """The layers of a model of two, over two models of one; the embedding is on both, as Megatron's is with MTP."""
    state = whole.state_dict()
    for stage, number in ((first, 0), (last, 1)):
        wanted = {}
        for name in stage.state_dict():
            wanted[name] = state[name.replace("decoder.layers.0.", f"decoder.layers.{number}.")]
        stage.load_state_dict(wanted)


def _joined(first: dict[str, Tensor], last: dict[str, Tensor]) -> dict[str, Tensor]:
    found = dict(first)
    for name, grad in last.items():
        place = name.replace("decoder.layers.0.", "decoder.layers.1.")
        found[place] = found[place] + grad if place in found else grad
    return found


def test_two_micro_batches_in_flight(ranks: RankPool) -> None:
    ranks.run(in_flight_case)


def sequence_parallel_case() -> None:
    """Tensor parallel 2 x context parallel 2, with sequence parallel."""
    with megatron():
        expected, expected_grads = reference("packed", False, 3)
        whole = gpt(config_of()).state_dict()
    with megatron(tp=2, cp=2):
        group, tp = parallel_state.get_context_parallel_group(), parallel_state.get_tensor_model_parallel_group()
        config = config_of(context_parallel_size=2, tensor_model_parallel_size=2, sequence_parallel=True)
        model = with_handlers(gpt(config, handler_spec))
        model.load_state_dict({name: _part(model, name, value, tp) for name, value in whole.items()}, strict=False)
        batch = packed(LENGTHS, 3)
        handler = handler_for(config, batch, group)
        loss = forward(model, batch, handler)
        loss.backward()
        assert torch.allclose(total_over(handler, loss) / 2, expected, rtol=1e-5)
        found = mean_over(group, model)
        for name, parameter in model.named_parameters():
            if getattr(parameter, "sequence_parallel", False):
                dist.all_reduce(found[name], group=tp)
        assert_alike(found, {n: _part(model, n, grad, tp) for n, grad in expected_grads.items()}, "tensor parallel")


def _part(model: Any, name: str, value: Any, group: Any) -> Any:
    """A tensor-parallel rank's part of a whole weight, or of its gradient."""
    parameter = dict(model.named_parameters()).get(name)
    if parameter is None or not getattr(parameter, "tensor_model_parallel", False):
        return value
    return value.chunk(group.size(), dim=parameter.partition_dim)[group.rank()]


def test_tensor_and_sequence_parallel_beside_context_parallel(ranks: RankPool) -> None:
    ranks.run(sequence_parallel_case)
