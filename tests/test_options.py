"""What may be asked of core_attn beside plain attention: strides, modules, options, masks by layer, traffic."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cphandler import (
    AttentionResult,
    Causal,
    Chunked,
    CoreAttention,
    CPConfig,
    Full,
    InvalidTypeError,
    InvalidValueError,
    PrefixWindow,
    SlidingWindow,
    clear_plan_cache,
    get_batch_on_this_cp_rank,
    get_cp_handler_cls,
    merge,
    record_traffic,
)
from cphandler.attention import loop
from cphandler.testing import RankPool, assert_close, dense_attention, dense_gradients, dense_max_logit
from cphandler.testing.cases import Batch, Case, draw, group_of, make_handler, visible
from cphandler.testing.laws import OwnAttention

BACKENDS = ["ring", "p2p", "all_gather", "ulysses", "usp"]
LENGTHS = Batch((70, 33, 2, 19))


def local_tensors(case: Case, seed: int, handler: Any) -> list[Tensor]:
    return [handler.dispatch(x, handler.seq_dim).requires_grad_(i < 3) for i, x in enumerate(draw(case, seed)[:4])]


def bits(tensors: Any) -> list[bytes]:
    return [x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for x in tensors]


def strange_strides(case: Case) -> None:
    """Transposed, expanded and sliced inputs, and an expanded gradient, against the reference."""
    group, seed = group_of(case)
    if seed < 0:
        return
    handler = make_handler(case, group)
    q, k, v, *_ = draw(case, seed)
    k = k[:, :1].expand_as(k)
    grad = torch.ones(()).double().expand(q.shape)
    expected = dense_gradients((q, k, v), visible(case), grad, qkv_format=case.qkv_format)
    local = [handler.dispatch(x, 0) for x in (q, k, v)]
    odd = [
        local[0].transpose(0, -1).contiguous().transpose(0, -1).requires_grad_(),
        local[1][:, :1].expand_as(local[1]).detach().requires_grad_(),
        torch.stack([local[2], local[2]], -1)[..., 0].detach().requires_grad_(),
    ]
    out = handler.core_attn(None, *odd)
    grads = torch.autograd.grad(out, odd, torch.ones(()).double().expand_as(out))
    for name, a, e in zip(("out", "dq", "dk", "dv"), (out, *grads), (expected[0], *expected[2]), strict=True):
        rows = handler.dispatch(torch.ones(len(e)), 0).bool()
        assert_close(a[rows], handler.dispatch(e, 0)[rows], what=f"{name} of {case}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_with_strange_strides(ranks: RankPool, backend: str) -> None:
    ranks.run(strange_strides, Case(backend, 2, batch=LENGTHS))


class PlainAttention:
    """A caller's own attention over whole documents; knows nothing of ranks."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Any, **offsets: Any) -> Tensor:
        self.seen = {"shape": tuple(q.shape), "mask": mask, **offsets}
        times = q.shape[-2] // k.shape[-2]
        k, v = k.repeat_interleave(times, -2), v.repeat_interleave(times, -2)
        if offsets["cu_seqlens_q"] is None:
            seq_first = self.seen["shape"][0] != 2
            q, k, v = (x.transpose(0, 1) if seq_first else x for x in (q, k, v))
            out = self.attend(q, k, v)
            return out.transpose(0, 1) if seq_first else out
        parts = [x.split(offsets["cu_seqlens_q"].diff().tolist()) for x in (q, k, v)]
        return torch.cat([self.attend(a[None], b[None], c[None])[0] for a, b, c in zip(*parts, strict=True)])

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bsnd,btnd->bnst", q, k) * q.shape[-1] ** -0.5
        hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
        return torch.einsum("bnst,btnd->bsnd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


def module_case(case: Case) -> None:
    group, seed = group_of(case)
    if seed < 0:
        return
    handler = make_handler(case, group)
    q, k, v, grad = local_tensors(case, seed, handler)
    built_in = handler.core_attn(None, q, k, v)
    module = PlainAttention()
    own = handler.core_attn(module, q, k, v)
    assert_close(own, built_in, what="a caller's module")
    for a, b in zip(
        torch.autograd.grad(own, (q, k, v), grad), torch.autograd.grad(built_in, (q, k, v), grad), strict=True
    ):
        assert_close(a, b, what="gradients through a caller's module")
    share = case.heads[0] // case.cp_size
    assert module.seen["shape"][-2] == share, "each rank's module sees its heads"
    assert module.seen["mask"] == Causal()
    if case.qkv_format == "thd":
        assert module.seen["cu_seqlens_q"].dtype == torch.int32
        assert module.seen["cu_seqlens_q"].diff().tolist() == list(case.batch.lengths), "valid lengths, padding removed"
        assert module.seen["max_seqlen_q"] == max(case.batch.lengths)


@pytest.mark.parametrize("qkv_format", ["thd", "sbhd", "bshd"])
@pytest.mark.parametrize(("backend", "cp_size"), [("local", 1), ("ulysses", 1), ("ulysses", 2), ("ulysses", 4)])
def test_a_callers_own_attention(ranks: RankPool, backend: str, cp_size: int, qkv_format: str) -> None:
    for batch in (Batch((13, 3, 6)), Batch((7, 0, 9), padded=(8, 4, 16))) if qkv_format == "thd" else (Batch((11,)),):
        ranks.run(module_case, Case(backend, cp_size, qkv_format, batch=batch))


def tables_of_a_batch(case: Case) -> None:
    """What the kernel and the exchange keep on a device serves all layers, and goes with the batch."""
    group, seed = group_of(case)
    clear_plan_cache()
    gc.collect()
    before = set(loop._in_use.keys())
    handler = make_handler(case, group)
    q, k, v, grad = local_tensors(case, seed, handler)
    for layer in range(2):
        handler.core_attn(None, q, k, v).backward(grad)
        (packed,) = set(loop._in_use.keys()) - before
        tables = [table for kept in (loop._in_use[packed].rows, loop._in_use[packed].masks) for table in kept]
        assert len(loop._in_use[packed].masks) > 0, "no mask: this case tests nothing"
        assert len(loop._in_use[packed].rows) > 0, "few runs: this case tests nothing"
        if layer == 0:
            first = [weakref.ref(table) for table in tables]
        else:
            assert all(a() is b for a, b in zip(first, tables, strict=True))
    del handler, packed, tables
    gc.collect()
    assert all(table() is not None for table in first), "the same batch may come again"
    clear_plan_cache()
    gc.collect()
    assert all(table() is None for table in first)


def test_tables_on_devices_go_with_the_batch(ranks: RankPool) -> None:
    ranks.run(tables_of_a_batch, Case("p2p", 4, batch=Batch((40,) * 20), mask=SlidingWindow(1)))


class LearnedAttention(torch.nn.Module):
    """A caller's own attention that has a parameter and talks to the other ranks."""

    def __init__(self, qkv_format: str, group: Any) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.full((), 0.8, dtype=torch.float64))
        self.attention, self.group, self.calls = OwnAttention(qkv_format), group, 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **told: Any) -> Tensor:
        self.calls += 1
        everyone = torch.ones(())
        if self.group is not None:
            dist.all_reduce(everyone, group=self.group)
        normed = [torch.nn.functional.normalize(x, dim=-1) for x in (q, k)]
        return self.attention(normed[0] * self.factor, normed[1], v, **told) * everyone


def learned_module(case: Case) -> None:
    """Ranks without heads call it too, so that its messages and its gradients are alike on every rank."""
    group, seed = group_of(case)
    handler, alone = make_handler(case, group), make_handler(replace(case, cp_size=1, layout=None), None)
    module, whole = (LearnedAttention(case.qkv_format, part) for part in (group, None))
    q, k, v, grad = local_tensors(case, seed, handler)
    handler.core_attn(module, q, k, v).backward(grad)
    data = draw(case, seed)
    leaves = [x.requires_grad_() for x in data[:3]]
    (alone.core_attn(whole, *leaves) * case.cp_size).backward(data.grad_out)
    assert module.calls == 1
    assert module.factor.grad is not None, "a rank without heads must give its parameters a gradient"
    assert whole.factor.grad is not None
    total = module.factor.grad.clone()
    dist.all_reduce(total, group=group)
    assert_close(total, whole.factor.grad, what="gradient of the module's parameter")
    for a, e in zip((q, k, v), leaves, strict=True):
        assert a.grad is not None
        assert e.grad is not None
        assert_close(a.grad, handler.dispatch(e.grad, handler.seq_dim), what="gradients through the module")


@pytest.mark.parametrize("layout", ["contiguous", "replicated"])
@pytest.mark.parametrize("heads", [(6, 2), (2, 1)], ids=str)
def test_a_module_of_ones_own_where_heads_do_not_divide(ranks: RankPool, heads: tuple[int, int], layout: str) -> None:
    ranks.run(learned_module, Case("ulysses", 4, "sbhd", layout, batch=Batch((11,)), heads=heads))


def test_core_attention_carries_the_scale() -> None:
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 9])
    x = torch.randn(9, 2, 8, dtype=torch.float64)
    module = CoreAttention(softmax_scale=0.7)
    assert list(module.parameters()) == []
    assert module.state_dict() == {}
    assert torch.equal(handler.core_attn(module, x, x, x), handler.core_attn(None, x, x, x, softmax_scale=0.7))
    assert torch.equal(
        handler.core_attn(module, x, x, x, softmax_scale=0.2), handler.core_attn(None, x, x, x, softmax_scale=0.2)
    )
    assert not torch.equal(handler.core_attn(module, x, x, x), handler.core_attn(None, x, x, x))


def test_a_mask_for_one_call_and_the_named_tuple() -> None:
    handler = get_cp_handler_cls("local")(qkv_format="sbhd", max_seqlen_q=9)
    x = torch.randn(9, 2, 2, 8, dtype=torch.float64)
    full = get_cp_handler_cls("local")(qkv_format="sbhd", max_seqlen_q=9, mask=Full())
    assert torch.equal(handler.core_attn(None, x, x, x, mask="full"), full.core_attn(None, x, x, x))
    result = handler.core_attn(None, x, x, x, return_lse=True, layer_number=3)
    assert isinstance(result, AttentionResult)
    assert result.lse.shape == result.out.shape[:-1]
    assert result.lse.dtype == torch.float64
    assert result.max_logit is None


def test_the_gradient_of_the_lse_alone() -> None:
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 5, 12])
    case = Case("local", 1, batch=Batch((5, 7)))
    q, k, v, _, grad_lse, _ = draw(case, 0)
    expected = dense_gradients((q, k, v), visible(case), torch.zeros_like(q), grad_lse, qkv_format="thd")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    lse = handler.core_attn(None, *leaves, return_lse=True).lse
    for a, e in zip(torch.autograd.grad(lse, leaves, grad_lse), expected[2], strict=True):
        assert_close(a, e) if e.any() else None
        assert e.any() or not a.any()


def test_positions_of_a_batch_are_the_callers_own() -> None:
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 4])
    get_batch_on_this_cp_rank({"tokens": torch.arange(4)}, cp_handler=handler)["position_ids"].add_(100)
    assert handler.position_ids.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("backend", ["local", *BACKENDS])
def test_every_backend_serves_one_rank_without_a_group(backend: str) -> None:
    handler = get_cp_handler_cls(backend)(qkv_format="bshd", max_seqlen_q=9)
    q, k, v = (torch.randn(2, 9, n, 8, requires_grad=True) for n in (4, 2, 2))
    handler.core_attn(None, q, k, v).sum().backward()
    assert all(x.grad is not None for x in (q, k, v))
    assert handler.combine(handler.dispatch(q, 1), 1) is q
    assert handler.roll_tensor(torch.arange(18).view(2, 9))[0][:, -1].tolist() == [0, 0]


WRONG = [
    ({"softcap": 0.0}, InvalidValueError, "positive number; got 0.0"),
    ({"softcap": float("inf")}, InvalidValueError, "positive number; got inf"),
    ({"softcap": "30"}, InvalidTypeError, "softcap must be a number"),
    ({"sinks": torch.zeros(3)}, InvalidValueError, r"one number per query head.* got shape \[3\].* expected \[2\]"),
    ({"sinks": torch.zeros(2, dtype=torch.int64)}, InvalidTypeError, "sinks must be floating point"),
    (
        {"sinks": torch.zeros(2).to(torch.float8_e5m2)},
        InvalidTypeError,
        "sinks must be .*; got torch.float8_e5m2; cast",
    ),
    ({"sinks": torch.zeros(2).to_sparse()}, InvalidTypeError, "sinks must be a dense tensor"),
    ({"sinks": True}, InvalidTypeError, "sinks must be .*; got bool"),
    ({"return_lse": "no"}, InvalidTypeError, "return_lse must be True or False; got 'no'"),
    ({"return_lse": None}, InvalidTypeError, "return_lse must be True or False; got None"),
    ({"return_max_logit": 1}, InvalidTypeError, "return_max_logit must be True or False; got 1"),
    ({"dropout_p": ""}, InvalidTypeError, "dropout_p must be a number; got ''"),
    ({"dropout_p": False}, InvalidTypeError, "dropout_p must be a number; got False"),
    ({"dropout_p": 0.1}, InvalidValueError, "a dropout_seed and a layer_number; got dropout_p 0.1, seed None"),
    ({"dropout_p": 0.1, "dropout_seed": 3}, InvalidValueError, "got dropout_p 0.1, seed 3, layer None; pass"),
    ({"softmax_scale": 0.0}, InvalidValueError, "softmax_scale must be a positive number; got 0.0"),
    ({"softmax_scale": torch.ones(())}, InvalidTypeError, "must be a number; .*; scale queries"),
    ({"dropout_p": 1.0, "dropout_seed": 1}, InvalidValueError, "a probability below 1; got 1.0"),
    ({"dropout_p": -0.1, "dropout_seed": 1}, InvalidValueError, "a probability below 1"),
    ({"dropout_p": 0.1, "dropout_seed": -1}, InvalidValueError, "must not be negative"),
    ({"dropout_p": 0.1, "dropout_seed": 1.5}, InvalidTypeError, "dropout_seed must be an int"),
    ({"layer_number": 0}, InvalidValueError, "counts from 1"),
    ({"window": 4}, InvalidTypeError, "no option 'window'; it takes layer_number, mask"),
]


@pytest.mark.parametrize(("options", "kind", "message"), WRONG, ids=lambda x: str(x)[:20])
def test_options_that_are_wrong(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 4])
    x = torch.randn(4, 2, 8)
    with pytest.raises(kind, match=message) as caught:
        handler.core_attn(None, x, x, x, **options)
    assert caught.value.fix  # type: ignore[attr-defined]


UNSERVED = [
    torch.zeros(4, 2, 8).to(torch.float8_e4m3fn),
    torch.zeros(4, 2, 8).to(torch.float8_e5m2),
    torch.zeros(4, 2, 8, dtype=torch.complex64),
    torch.zeros(4, 2, 8, dtype=torch.bool),
    torch.zeros(4, 2, 8, dtype=torch.int8),
]


@pytest.mark.parametrize("x", UNSERVED, ids=lambda x: str(x.dtype))
def test_dtypes_that_attention_does_not_compute_in(x: Tensor) -> None:
    """Refused whatever computes, and in each of the three places."""
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 4])
    message = f"must be floating point.*; got {x.dtype}; cast it to one of float16, bfloat16, float32, float64"
    for module in (None, PlainAttention(), CoreAttention()):
        for i, name in enumerate(("query", "key", "value")):
            tensors = [torch.zeros(4, 2, 8)] * 3
            tensors[i] = x
            with pytest.raises(InvalidTypeError, match=f"{name} {message}"):
                handler.core_attn(module, *tensors)


def test_kernels_are_known_when_a_handler_is_made() -> None:
    settings: dict[str, Any] = {"qkv_format": "thd", "cu_seqlens_q": [0, 4]}
    for backend in ("local", "ulysses", "usp", "ring"):
        with pytest.raises(
            InvalidValueError, match=r"got 'refrence'; CPConfig.kernel may be auto, .*reference.*, torch"
        ):
            get_cp_handler_cls(backend)(**settings, config=CPConfig(kernel="refrence"))
    with pytest.raises(InvalidValueError, match="unknown kernel; got 'refrence'"):
        get_cp_handler_cls("local", ["a2a", "ring"])(**settings, config=CPConfig(kernel="refrence"))
    x = torch.randn(4, 2, 8)
    shouted = get_cp_handler_cls("local")(**settings, config=CPConfig(kernel="Reference"))
    plain = get_cp_handler_cls("local")(**settings, config=CPConfig(kernel="reference"))
    assert torch.equal(shouted.core_attn(None, x, x, x), plain.core_attn(None, x, x, x))


def test_kernels_with_a_generator_of_their_own_refuse_dropout() -> None:
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 4], config=CPConfig(kernel="torch"))
    x = torch.randn(4, 2, 8)
    for options in ({"dropout_p": 0.1, "dropout_seed": 0, "layer_number": 1}, {"softcap": 5.0}):
        with pytest.raises(NotImplementedError, match=r'CPConfig\(kernel="reference"\)'):
            handler.core_attn(None, x, x, x, **options)


def test_core_attention_carries_every_setting() -> None:
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 9])
    x = torch.randn(9, 2, 8, dtype=torch.float64)
    module = CoreAttention(softcap=2.0, dropout_p=0.5, num_sinks=2, record_max_logit=True).double()
    assert dict(module.named_parameters()).keys() == {"sinks"}
    with pytest.raises(ValueError, match="dropout needs a dropout_seed"):
        handler.core_attn(module, x, x, x)
    named = {"softcap": 2.0, "sinks": module.sinks, "dropout_p": 0.5}
    trained = handler.core_attn(module, x, x, x, dropout_seed=3, layer_number=1)
    assert torch.equal(trained, handler.core_attn(None, x, x, x, dropout_seed=3, layer_number=1, **named))
    without = handler.core_attn(module, x, x, x, dropout_p=0.0)
    module.eval()
    scored = handler.core_attn(module, x, x, x)
    assert torch.equal(scored, without)
    assert torch.equal(scored, handler.core_attn(None, x, x, x, softcap=2.0, sinks=module.sinks))
    assert not torch.equal(scored, trained)
    scored.sum().backward()
    assert module.sinks is not None
    assert module.sinks.grad is not None
    largest = handler.core_attn(None, x, x, x, return_max_logit=True).max_logit
    assert module.current_max_attn_logits is not None
    assert torch.equal(module.current_max_attn_logits, largest)
    handler.core_attn(module, 2 * x, x, x)
    assert torch.equal(module.current_max_attn_logits, 2 * largest)
    handler.core_attn(module, x, x, x)
    assert torch.equal(module.current_max_attn_logits, 2 * largest), "a running maximum"
    with pytest.raises(ValueError, match="softcap must be"):
        CoreAttention(softcap=-1.0)
    with pytest.raises(ValueError, match="a probability"):
        CoreAttention(dropout_p=1.5)
    with pytest.raises(ValueError, match="num_sinks must not be negative"):
        CoreAttention(num_sinks=-1)
    with pytest.raises(TypeError, match="num_sinks must be an int"):
        CoreAttention(num_sinks="all")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="record_max_logit must be True or False"):
        CoreAttention(record_max_logit="no")  # type: ignore[arg-type]


def record_on_every_rank() -> None:
    group, seed = group_of(Case(cp_size=4))
    for backend in BACKENDS:
        case = Case(backend, 4, batch=LENGTHS)
        handler = make_handler(case, group)
        q, k, v, _ = local_tensors(case, seed, handler)
        module = CoreAttention(record_max_logit=True)
        out = handler.core_attn(module, q, k, v)
        assert isinstance(out, Tensor), "recorded, not returned"
        data = draw(case, seed)
        expected = dense_max_logit(data.query, data.key, visible(case), qkv_format="thd")
        assert module.current_max_attn_logits is not None
        assert_close(module.current_max_attn_logits, expected, what=f"largest logits of {backend}")


def test_the_largest_logits_are_recorded_on_every_rank(ranks: RankPool) -> None:
    ranks.run(record_on_every_rank)


def own_branch(case: Case) -> None:
    """A branch of the caller's, merged: each query also sees one cached key of its own, as EAGLE's training does."""
    group, seed = group_of(case)
    if seed < 0:
        return
    data, handler = draw(case, seed), make_handler(case, group)
    rows, heads = data.query.shape[:2]
    scale = data.query.shape[-1] ** -0.5
    cached_key, cached_value = torch.randn_like(data.query), torch.randn_like(data.query)
    dist.broadcast(cached_key, group=group, group_src=0)
    dist.broadcast(cached_value, group=group, group_src=0)

    def with_branch(q: Tensor, out: Tensor, lse: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return merge(out, lse, value, (q * key).sum(-1) * scale)[0]

    local = [handler.dispatch(x, 0).requires_grad_() for x in (*data[:3], cached_key, cached_value)]
    result = handler.core_attn(None, *local[:3], return_lse=True)
    merged = with_branch(local[0], result.out, result.lse, *local[3:])
    grads = torch.autograd.grad(merged, local, handler.dispatch(data.grad_out, 0))

    leaves = [x.clone().requires_grad_() for x in (*data[:3], cached_key, cached_value)]
    scores = (
        torch.einsum("qhd,khd->hqk", leaves[0], leaves[1].repeat_interleave(heads // leaves[1].shape[1], 1)) * scale
    )
    own = ((leaves[0] * leaves[3]).sum(-1) * scale).T.unsqueeze(-1)
    weights = torch.cat([scores.masked_fill(~visible(case), float("-inf")), own], -1).softmax(-1)
    values = leaves[2].repeat_interleave(heads // leaves[2].shape[1], 1)
    whole = torch.einsum("hqk,khd->qhd", weights[..., :rows], values) + weights[..., rows:].transpose(0, 1) * leaves[4]
    expected = torch.autograd.grad(whole, leaves, data.grad_out)
    assert_close(merged, handler.dispatch(whole, 0), what=f"merged branch of {case}")
    for a, e in zip(grads, expected, strict=True):
        assert_close(a, handler.dispatch(e, 0), what=f"gradient through a merged branch of {case}")


@pytest.mark.parametrize("backend", ["ring", "ulysses"])
def test_a_branch_of_ones_own(ranks: RankPool, backend: str) -> None:
    ranks.run(own_branch, Case(backend, 2, batch=Batch((12, 7, 1))))


def loss_of_some_ranks(case: Case) -> None:
    """Some ranks' losses use the log-sum-exp alone, others' the output: the same messages go in the backward pass."""
    group, seed = group_of(case)
    handler = make_handler(case, group)
    data = draw(case, seed)
    q, k, v, _ = local_tensors(case, seed, handler)
    result = handler.core_attn(None, q, k, v, return_lse=True)
    uses_lse = handler.cp_rank % 2 == 0
    rows = handler.dispatch(torch.arange(len(data.query)), 0, pad_value=-1)
    (result.lse[rows >= 0].sum() if uses_lse else result.out.sum()).backward()
    of_lse = torch.zeros(len(data.query))
    for rank in range(0, case.cp_size, 2):
        tokens = handler.layout.positions(rank)
        of_lse[torch.from_numpy(tokens[tokens >= 0])] = 1
    grad_lse = of_lse[:, None].expand_as(data.grad_lse).to(case.dtype)
    grad_out = (1 - of_lse)[:, None, None].expand_as(data.grad_out).to(case.dtype)
    _, _, grads = dense_gradients(data[:3], visible(case), grad_out, grad_lse, qkv_format="thd")
    for x, e in zip((q, k, v), grads, strict=True):
        assert x.grad is not None
        assert_close(x.grad, handler.dispatch(e, 0), dtype=case.dtype, what=str(case))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_that_differ_from_rank_to_rank(ranks: RankPool, backend: str, dtype: torch.dtype) -> None:
    ranks.run(loss_of_some_ranks, Case(backend, 4, batch=LENGTHS, dtype=dtype))


def masks_by_layer() -> None:
    """Different masks from layer to layer over one handler and one layout."""
    group, seed = group_of(Case(cp_size=4))
    case = Case("p2p", 4, batch=LENGTHS)
    handler = make_handler(case, group)
    q, k, v, _ = local_tensors(case, seed, handler)
    data = draw(case, seed)
    for mask in (Causal(), SlidingWindow(9), Chunked(16), PrefixWindow(3, 5), Causal()):
        expected, _ = dense_attention(*data[:3], visible(replace(case, mask=mask)), qkv_format="thd")
        assert_close(handler.core_attn(None, q, k, v, mask=mask), handler.dispatch(expected, 0), what=str(mask))


def test_masks_from_layer_to_layer(ranks: RankPool) -> None:
    ranks.run(masks_by_layer)


def replicated_case() -> None:
    group, _ = group_of(Case(cp_size=4))
    handler = get_cp_handler_cls("ulysses")(
        cp_group=group, qkv_format="thd", cu_seqlens_q=[0, 3, 9], layout="replicated"
    )
    x = torch.randn(9, 4, 8, requires_grad=True)
    assert handler.dispatch(x, 0) is x
    assert handler.combine(x, 0, grad="sum") is x
    assert (handler.num_local_tokens, handler.effective_cp_size, handler.sequence_sharded) == (9, 1, False)
    assert handler.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5]
    assert handler.roll_tensor(torch.arange(1, 10))[0].tolist() == [2, 3, 0, 5, 6, 7, 8, 9, 0]
    handler.core_attn(None, x, x, x).sum().backward()
    for backend in ("ring", "all_gather", "p2p", "usp"):
        with pytest.raises(NotImplementedError, match="use the ulysses backend"):
            get_cp_handler_cls(backend)(cp_group=group, qkv_format="thd", cu_seqlens_q=[0, 3, 9], layout="replicated")


def test_the_replicated_layout(ranks: RankPool) -> None:
    ranks.run(replicated_case)


def ring_bytes(case: Case) -> tuple[int, int]:
    group, seed = group_of(case)
    handler = make_handler(case, group)
    q, k, v, grad = local_tensors(case, seed, handler)
    handler.agree("test")
    with record_traffic() as traffic:
        out = handler.core_attn(None, q, k, v)
        forward = traffic.sent_bytes
        out.backward(grad)
    dist.barrier()
    return forward, traffic.sent_bytes - forward


def test_a_ring_sends_no_block_that_nobody_sees(ranks: RankPool) -> None:
    """Contiguous: a window reaches one neighbour, causal blocks never come back, whole short documents cost nothing."""
    block = 16 * (2 + 2) * 8 * 8  # 16 rows, two key heads and two value heads of 8 channels, float64
    cases = {
        SlidingWindow(3): (Batch((64,)), [1, 1, 1, 0]),
        Causal(): (Batch((64,)), [1, 2, 3, 0]),
        Full(): (Batch((16, 16, 16, 16)), [0, 0, 0, 0]),
    }
    for mask, (batch, sends) in cases.items():
        case = Case("ring", 4, layout="contiguous", mask=mask, batch=batch)
        assert [forward for forward, _ in ranks.run(ring_bytes, case)] == [n * block for n in sends], mask
    zigzag = ranks.run(ring_bytes, Case("ring", 4, layout="zigzag", batch=Batch((64,))))
    assert [forward for forward, _ in zigzag] == [3 * block] * 4
    assert [backward for _, backward in zigzag] == [6 * block] * 4, "keys three hops, their gradients three hops"
