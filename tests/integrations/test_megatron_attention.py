"""Core attention of Megatron's specs against the dense reference, and everything it refuses."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cphandler import (
    Causal,
    Full,
    InvalidTypeError,
    InvalidValueError,
    Mask,
    MissingPackageError,
    SlidingWindow,
    UnsupportedError,
    get_cp_handler_cls,
)
from cphandler.testing import RankPool, assert_close, dense_attention
from cphandler.testing.reference import visible_pairs
from cphandler.tokens.documents import Documents

pytest.importorskip("megatron.core")

from megatron.core import parallel_state, utils
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from cphandler.integrations.megatron import (
    CPDotProductAttention,
    CPSelfAttention,
    apply_rotary_pos_emb,
    context_parallel_batch,
    cp_config,
    cp_handler_cls,
    handler_of,
    handler_spec,
    packed_params,
    roll_tensor,
    with_handlers,
)
from cphandler.integrations.megatron import batch as batch_functions
from cphandler.integrations.megatron.roll import MEGATRONS
from tests.integrations.gpt import config_of, gpt, megatron, packed

CUTS = torch.tensor([0, 8, 24, 32])
HEADS, GROUPS, DIM = 4, 2, 8


def attention_of(config: Any, mask_type: AttnMaskType = AttnMaskType.causal, **arguments: Any) -> Any:
    return CPDotProductAttention(config, 1, mask_type, "self", **arguments).double()


def check(module: Any, params: Any, handler: Any, visible: Tensor, **expectation: Any) -> None:
    """One call against the dense reference, gradients of queries, keys, values and sinks included."""
    generator = torch.Generator().manual_seed(dist.get_rank() // 2)
    shape = (32,) if handler.qkv_format == "thd" else (32, 2)
    whole = [torch.randn(*shape, n, DIM, generator=generator, dtype=torch.float64) for n in (HEADS, GROUPS, GROUPS)]
    grad = torch.randn(*shape, HEADS, DIM, generator=generator, dtype=torch.float64)
    local = [handler.dispatch(x, 0).clone().requires_grad_() for x in whole]
    out = module(*local, None, packed_seq_params=params)
    assert out.shape == (*local[0].shape[:-2], HEADS * DIM)
    whole = [x.requires_grad_() for x in whole]
    sinks = module.softmax_offset
    twin = None if sinks is None else sinks.detach().clone().double().requires_grad_()
    expected, _ = dense_attention(*whole, visible, qkv_format=handler.qkv_format, sinks=twin, **expectation)
    assert_close(out.unflatten(-1, (HEADS, DIM)), handler.dispatch(expected.detach(), 0), what="out")
    out.backward(handler.dispatch(grad, 0).flatten(-2))
    expected.backward(grad)
    for x, y in zip(local, whole, strict=True):
        assert_close(x.grad, handler.dispatch(y.grad, 0), what="gradient")
    if isinstance(sinks, torch.nn.Parameter):
        part = sinks.grad.clone()
        dist.all_reduce(part, group=handler.group)
        assert_close(part, twin.grad, what="sinks")


def attention_case() -> None:
    with megatron(cp=2):
        group = parallel_state.get_context_parallel_group()
        shapes: list[tuple[dict[str, Any], Documents]] = [
            ({"qkv_format": "thd", "cu_seqlens_q": CUTS}, Documents.from_cu_seqlens(CUTS)),
            ({"max_seqlen_q": 32}, Documents.dense(32)),
        ]
        for shape, documents in shapes:
            handler = get_cp_handler_cls("ring")(cp_group=group, layout="balanced", **shape)
            params = packed_params(handler)
            cases: list[tuple[dict[str, Any], AttnMaskType, Mask]] = [
                ({}, AttnMaskType.causal, Causal()),
                ({"softmax_type": "learnable"}, AttnMaskType.no_mask, Full()),
                ({"softmax_type": "off-by-one", "window_size": (5, 0)}, AttnMaskType.causal, SlidingWindow(5)),
                ({"window_size": (-1, 3)}, AttnMaskType.no_mask, SlidingWindow(32, 3)),
            ]
            for settings, mask_type, mask in cases:
                config = config_of(context_parallel_size=2, cp_comm_type="p2p", **settings)
                module = attention_of(config, mask_type, cp_comm_type="p2p", softmax_scale=0.3)
                assert [name for name, _ in module.named_parameters()] == (
                    ["softmax_offset"] if settings.get("softmax_type") == "learnable" else []
                )
                check(module, params, handler, visible_pairs(mask, documents), softmax_scale=0.3)
            own = get_cp_handler_cls("p2p")(cp_group=group, mask=SlidingWindow(3), **shape)
            visible = visible_pairs(SlidingWindow(3), documents)
            check(attention_of(config_of(context_parallel_size=2)), packed_params(own), own, visible)
            with pytest.raises(UnsupportedError, match="layer 1 has a window, and the batch a mask of its own"):
                check(attention_of(config_of(window_size=(5, 0))), packed_params(own), own, visible)
        without_a_handler(group)


def without_a_handler(group: Any) -> None:
    """Megatron's own batch, zigzag, and its own parameters."""
    for comm_type in (None, "a2a", "all_gather"):
        config = config_of(context_parallel_size=2)
        module = attention_of(config, cp_comm_type=comm_type)
        zigzag = get_cp_handler_cls("p2p")(cp_group=group, max_seqlen_q=32)
        check(module, None, zigzag, visible_pairs(Causal(), Documents.dense(32)))
        params = PackedSeqParams("thd", CUTS, CUTS, None, None, 16, 16)
        zigzag = get_cp_handler_cls("p2p")(cp_group=group, qkv_format="thd", cu_seqlens_q=CUTS)
        check(module, params, zigzag, visible_pairs(Causal(), Documents.from_cu_seqlens(CUTS)))


def test_attention_is_the_dense_reference(ranks: RankPool) -> None:
    ranks.run(attention_case)


def logits_case() -> None:
    with megatron(cp=2):
        group = parallel_state.get_context_parallel_group()
        handler = get_cp_handler_cls("p2p")(cp_group=group, max_seqlen_q=8)
        module = attention_of(config_of(context_parallel_size=2, log_max_attention_logit=True))
        assert module.current_max_attn_logits is None
        largest = []
        for seed in (0, 1):
            generator = torch.Generator().manual_seed(seed)
            q, k, v = (torch.randn(8, 1, n, DIM, generator=generator) for n in (HEADS, GROUPS, GROUPS))
            scores = torch.einsum("sbnd,tbnd->bnst", q, k.repeat_interleave(2, 2)) * DIM**-0.5
            largest.append(scores.masked_fill(torch.ones(8, 8).triu(1).bool(), -1e9).amax((0, 2, 3)))
            module(
                *(handler.dispatch(x, 0).requires_grad_() for x in (q, k, v)), None, None, None, packed_params(handler)
            )
        found = module.current_max_attn_logits
        assert found.shape == (HEADS,)
        assert not found.requires_grad
        assert torch.allclose(found.float(), torch.maximum(*largest), rtol=1e-5)


def test_the_largest_logits_are_kept_over_calls(ranks: RankPool) -> None:
    ranks.run(logits_case)


def dropout_case() -> None:
    with megatron(cp=2):
        group = parallel_state.get_context_parallel_group()
        module = attention_of(config_of(context_parallel_size=2, attention_dropout=0.5))
        generator = torch.Generator().manual_seed(0)
        whole = [torch.randn(10, 1, n, DIM, generator=generator) for n in (HEADS, GROUPS, GROUPS)]
        outs = {}
        for name in ("ring", "local"):
            handler = get_cp_handler_cls(name)(cp_group=group if name == "ring" else None, max_seqlen_q=10)
            local = [handler.dispatch(x, 0) for x in whole]
            with pytest.raises(InvalidValueError, match="attention dropout needs a seed that all ranks share"):
                module(*local, None, packed_seq_params=packed_params(handler))
            out = module(*local, None, packed_seq_params=packed_params(handler, dropout_seed=5))
            other = module(*local, None, packed_seq_params=packed_params(handler, dropout_seed=6))
            assert not torch.equal(out, other)
            outs[name] = handler.combine(out, 0)
        assert torch.allclose(outs["ring"], outs["local"], atol=1e-6), "the same weights for any number of ranks"
        module.eval()
        module(*local, None, packed_seq_params=packed_params(handler))


def test_dropout_is_the_same_on_any_number_of_ranks(ranks: RankPool) -> None:
    ranks.run(dropout_case)


def refusals_case() -> None:
    with megatron(cp=4):
        group = parallel_state.get_context_parallel_group()
        handler = get_cp_handler_cls("ring")(cp_group=group, max_seqlen_q=32)
        params, x = packed_params(handler), torch.randn(8, 1, HEADS, DIM).double()
        module = attention_of(config_of(context_parallel_size=4))
        with pytest.raises(UnsupportedError, match="attention_bias is not served"):
            module(x, x, x, None, attention_bias=x, packed_seq_params=params)
        with pytest.raises(UnsupportedError, match="mask type is not served; got arbitrary"):
            module(x, x, x, None, AttnMaskType.arbitrary, packed_seq_params=params)
        with pytest.raises(UnsupportedError, match="attention_mask beside padding would be read by nobody"):
            module(x, x, x, torch.ones(1), AttnMaskType.padding, packed_seq_params=params)
        with pytest.raises(UnsupportedError, match="num_splits belongs to a decode kernel"):
            module(x, x, x, None, packed_seq_params=params, num_splits=2)
        with pytest.raises(UnsupportedError, match="num_splits belongs to a decode kernel"):
            attention_of(config_of(), num_splits=1)
        gathers = attention_of(config_of(context_parallel_size=4), cp_comm_type="all_gather")
        with pytest.raises(InvalidValueError, match="communicates otherwise than the config says; got RingHandler"):
            gathers(x, x, x, None, packed_seq_params=params)
        refused_models()
        views(group)


def refused_models() -> None:
    linear = get_gpt_layer_local_spec()
    linear.submodules.self_attention.module = torch.nn.Linear
    with pytest.raises(UnsupportedError, match="SelfAttention or MLASelfAttention; got Linear"):
        handler_spec(linear)
    with pytest.raises(InvalidTypeError, match="with_handlers takes a GPTModel"):
        with_handlers(torch.nn.Linear(1, 1))
    theirs = gpt(config_of())
    with pytest.raises(UnsupportedError, match=r"decoder\.layers\.0\.self_attention is not an attention that computes"):
        with_handlers(theirs)
    ours = gpt(config_of(), handler_spec)
    names = list(ours.state_dict())
    assert with_handlers(with_handlers(ours)) is ours
    assert list(ours.state_dict()) == names == list(theirs.state_dict())


def views(group: Any) -> None:
    """``ContextParallelBatch`` as later releases have it; here a record of its signature."""
    whole = packed((8, 16, 8), 0)
    cuts = whole.pop("cu_seqlens")
    cls = get_cp_handler_cls("p2p")
    made = {
        name: cls(cp_group=group, qkv_format="thd", cu_seqlens_q=cuts, layout=name) for name in ("zigzag", "contiguous")
    }
    views = context_parallel_batch(whole, made, "contiguous", batch_cls=RecordedBatch)
    assert views.boundary_layout == "contiguous"
    assert views.thd_plan is None
    assert torch.equal(
        views.batches_by_layout["contiguous"]["tokens"], whole["tokens"].chunk(group.size(), 1)[group.rank()]
    )
    assert handler_of(views.packed_seq_params_by_layout["zigzag"]) is made["zigzag"]
    with pytest.raises(MissingPackageError, match="has no ContextParallelBatch"):
        context_parallel_batch(whole, made)
    with pytest.raises(InvalidValueError, match="'zigzag' is contiguous"):
        context_parallel_batch(whole, {"zigzag": made["contiguous"]})
    striped = cls(cp_group=group, qkv_format="thd", cu_seqlens_q=cuts, layout="balanced")
    with pytest.raises(UnsupportedError, match="no name for this layout; got balanced"):
        context_parallel_batch(whole, {"zigzag": striped})
    odd = cls(cp_group=group, qkv_format="thd", cu_seqlens_q=[0, 9, 32])
    with pytest.raises(UnsupportedError, match="lengths that divide by 8; got 9, 23"):
        context_parallel_batch(whole, {"zigzag": odd})


class RecordedBatch:
    """``megatron/core/context_parallel``, commit 010994d5: the constructor's parameters."""

    def __init__(
        self,
        boundary_layout: str,
        batches_by_layout: dict[str, Any],
        packed_seq_params_by_layout: dict[str, Any],
        thd_plan: Any = None,
    ) -> None:
        self.boundary_layout = boundary_layout
        self.batches_by_layout = batches_by_layout
        self.packed_seq_params_by_layout = packed_seq_params_by_layout
        self.thd_plan = thd_plan


def test_what_it_cannot_do_is_refused_by_name(ranks: RankPool) -> None:
    ranks.run(refusals_case)


def test_comm_types_of_a_config() -> None:
    assert cp_handler_cls(config_of()).comm_type == "p2p"
    assert cp_handler_cls(config_of(cp_comm_type="allgather")).comm_type == "all_gather"
    layers = cp_handler_cls(config_of(mtp_num_layers=1), ["a2a", "p2p"])
    assert [cls.comm_type for cls in layers.classes] == ["a2a", "p2p", "p2p"]
    with pytest.raises(InvalidValueError, match="one comm type for each layer; got 1 for 2 layers"):
        cp_handler_cls(config_of(), ["p2p"])
    with pytest.raises(InvalidTypeError, match="must be a name, or a list"):
        cp_handler_cls(config_of(), 3)
    sizes = {"hierarchical_context_parallel_sizes": [4, 2]}
    assert cp_config(config_of(cp_comm_type="a2a+p2p", **sizes)).ulysses_degree == 4
    assert cp_config(config_of(cp_comm_type="p2p", **sizes)).ulysses_degree is None
    assert cp_config(config_of(deterministic_mode=True), timeout=3.0).deterministic


def test_a_list_of_comm_types_is_read_one_layer_too_far_by_megatron(ranks: RankPool) -> None:
    ranks.run(list_case)


def list_case() -> None:
    """Why a list is given to ``cp_handler_cls``, and not to the config a model is built from."""
    with megatron(cp=2), pytest.raises(IndexError):
        gpt(config_of(context_parallel_size=2, cp_comm_type=["p2p", "a2a"]), handler_spec)


def test_signatures_are_megatrons() -> None:
    def parameters(method: Any) -> list[str]:
        return list(inspect.signature(method).parameters)

    for name in ("__init__", "forward"):
        theirs, ours = (parameters(getattr(cls, name)) for cls in (DotProductAttention, CPDotProductAttention))
        shared = 7 if name == "__init__" else len(theirs)  # up to softmax_scale; callers name what follows
        assert ours[:shared] == theirs[:shared]
        assert set(theirs) <= set(ours)
    assert parameters(SelfAttention.forward) == [*parameters(CPSelfAttention.forward)[:-1], "inference_params"]
    assert parameters(roll_tensor) == parameters(MEGATRONS)
    for module, name in ((utils, "get_batch_on_this_cp_rank"), (utils, "get_thd_batch_on_this_cp_rank")):
        theirs, ours = parameters(getattr(module, name)), parameters(getattr(batch_functions, name))
        assert ours[: len(theirs)] == theirs
    ours = parameters(apply_rotary_pos_emb)
    assert ours[:6] == parameters(rope_utils.apply_rotary_pos_emb)
