"""What torch does around attention: compilers, autocast, recompute, partial gradients, inference mode."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cphandler import SlidingWindow, clear_plan_cache
from cphandler.sharding.heads import HeadSplit
from cphandler.testing import RankPool
from cphandler.testing.cases import Batch, Case, group_of, make_handler
from tests.sweeps import half
from tests.test_options import BACKENDS, LENGTHS, bits, local_tensors


def recompute(case: Case, reentrant: bool | None) -> None:
    """Activation checkpointing, a second backward with retain_graph, and gradients of some inputs only."""
    group, seed = group_of(case)
    if seed < 0:
        return
    handler = make_handler(case, group)
    q, k, v, grad = local_tensors(case, seed, handler)
    plain = torch.autograd.grad(handler.core_attn(None, q, k, v), (q, k, v), grad)
    if reentrant is not None:
        out = checkpoint(lambda *x: handler.core_attn(None, *x), q, k, v, use_reentrant=reentrant)
        out.backward(grad)
        assert bits([q.grad, k.grad, v.grad]) == bits(plain)
        return
    out = handler.core_attn(None, q, k, v)
    first = torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
    second = torch.autograd.grad(out, (q, k, v), grad)
    assert bits(first) == bits(second) == bits(plain)
    for wanted in range(3):
        inputs = [x.detach().requires_grad_(i == wanted) for i, x in enumerate((q, k, v))]
        alone = torch.autograd.grad(handler.core_attn(None, *inputs), inputs[wanted], grad)
        assert bits(alone) == bits([plain[wanted]])
    with torch.no_grad():
        assert bits([handler.core_attn(None, q, k, v)]) == bits([out])


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["retain", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_recompute_and_partial_gradients(ranks: RankPool, backend: str, reentrant: bool | None) -> None:
    ranks.run(recompute, Case(backend, 4, batch=LENGTHS), reentrant)


def score_then_train(backend: str) -> None:
    """A batch that is first scored under inference mode and then trained on, as reinforcement learning does."""
    clear_plan_cache()  # so that all that is kept with the batch is made under inference mode
    group, seed = group_of(Case(cp_size=4))
    case = Case(backend, 4, batch=LENGTHS)
    handler = make_handler(case, group)
    q, k, v, grad = local_tensors(case, seed, handler)
    with torch.inference_mode():
        scored = handler.core_attn(None, q, k, v)
        handler.roll_tensor(q, -1, 0)
        handler.combine(q, 0)
        handler.get_emb_on_this_cp_rank(torch.zeros(70, 8))
    out = handler.core_attn(None, q, k, v)
    assert bits([out]) == bits([scored])
    out.backward(grad)
    handler.roll_tensor(q, -1, 0)[0].sum().backward()
    handler.combine(q, 0, grad="sum").sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_scoring_before_training(ranks: RankPool, backend: str) -> None:
    ranks.run(score_then_train, backend)


def under_autocast() -> None:
    """Autocast stops at the operators: scores, weights and log-sum-exp stay in the accumulator's dtype."""
    group, seed = group_of(Case(cp_size=4))
    case = Case("p2p", 4, batch=LENGTHS, dtype=torch.float32)
    handler = make_handler(case, group)
    q, k, v, grad = local_tensors(case, seed, handler)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            result = handler.core_attn(None, q, k, v, softcap=3.0, return_max_logit=True)
        results.append(bits([result.out, result.max_logit, *torch.autograd.grad(result.out, (q, k, v), grad)]))
    assert results[0] == results[1]


def test_autocast_changes_nothing(ranks: RankPool) -> None:
    ranks.run(under_autocast)


class Compiled(torch.nn.Module):
    """Asks a handler everything that a model may ask."""

    def __init__(self, heads: tuple[int, int]) -> None:
        super().__init__()
        self.heads = [heads[0], heads[1], heads[1]]
        self.qkv = torch.nn.Linear(32, 8 * sum(self.heads))

    def forward(self, x: Tensor, handler: Any) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, 8)).split(self.heads, -2)
        freqs = handler.get_emb_on_this_cp_rank(torch.ones(handler.get_rotary_seq_len(), 8))
        out = handler.core_attn(None, handler.rope(q, freqs), k, v)
        rolled, _ = handler.roll_tensor(x, -1, 0)
        whole: Tensor = handler.combine(handler.dispatch(handler.combine(out.flatten(-2), 0), 0), 0)
        return whole.sum() + rolled.sum()


def compiled_models() -> None:
    """A compiled model takes handler after handler, each made for another batch and never run before."""
    group, _ = group_of(Case(cp_size=4))
    torch.manual_seed(0)
    model = Compiled(heads=(3, 1))  # under Ulysses a rank without heads, and a group of query heads that is cut
    compiled = torch.compile(model, backend="aot_eager")
    for backend in ("p2p", "ulysses"):
        for lengths in ((5, 7), (12,), (3, 9)):
            case = Case(backend, 4, batch=Batch(lengths), mask=SlidingWindow(4))
            x = torch.randn(3, 32)
            losses = [run(x, make_handler(case, group)) for run in (compiled, model)]
            grads = [torch.autograd.grad(loss, model.qkv.weight)[0] for loss in losses]
            torch.testing.assert_close(losses[0], losses[1])
            torch.testing.assert_close(grads[0], grads[1])


def test_a_compiled_model_over_fresh_handlers(ranks: RankPool) -> None:
    ranks.run(compiled_models)


def shapes_without_data(heads: tuple[int, int]) -> None:
    """What a compiler is told of the operators' results, shapes, strides and dtypes, is what they give."""
    group, _ = group_of(Case(cp_size=4))
    split = HeadSplit.of(*heads, 4)
    for layout, tokens in (("contiguous", 16), ("zigzag", 14)):  # rows in place, and rows that are put in order
        handler = make_handler(Case("ulysses", 4, layout=layout, batch=Batch((5, tokens - 5))), group)
        order = handler.shard().order(torch.device("cpu"))  # type: ignore[attr-defined]
        indices = order.places, order.tokens, order.runs
        name, rank = group.group_name, handler.cp_rank
        mine = [split.queries[rank], split.keys[rank]]
        local = [torch.randn(2, handler.num_local_tokens, n, d) for n, d in zip(heads, (8, 5), strict=True)]
        share = [torch.randn(2, tokens, stop - first, d) for (first, stop), d in zip(mine, (8, 5), strict=True)]
        flat = [bound for bounds in (split.queries, split.keys) for pair in bounds for bound in pair]
        operators, check = torch.ops.cphandler, torch.library.opcheck
        check(operators.gather_seq_scatter_heads, (local, flat, *indices, name), test_utils="test_faketensor")
        check(operators.gather_heads_scatter_seq, (share, flat, *indices, name), test_utils="test_faketensor")
        check(operators.slice_heads, (local, flat, rank, name), test_utils="test_faketensor")
        check(operators.unslice_heads, (share, flat, name), test_utils="test_faketensor")


@pytest.mark.parametrize("heads", [(4, 2), (6, 2), (2, 1)], ids=str)
def test_operators_say_what_shapes_they_give(ranks: RankPool, heads: tuple[int, int]) -> None:
    ranks.run(shapes_without_data, heads)


ORDERS = {
    "handler first": "handler = make(); handler.dispatch(x, 0); assert not is_loaded(); ours = compiled()",
    "compiler first": "ours = compiled(); assert is_loaded(); handler = make()",
}


@pytest.mark.parametrize("order", half(ORDERS))
def test_a_handler_and_the_compiler_come_in_any_order(order: str) -> None:
    """In a process of its own, since a compiler that has been loaded stays."""
    program = f"""
import sys, torch
from cphandler import get_cp_handler_cls

def make():
    return get_cp_handler_cls("ring")(qkv_format="thd", cu_seqlens_q=[0, 5, 12])

def run(x, handler):
    y = 2 * handler.dispatch(x, 0)
    freqs = handler.get_emb_on_this_cp_rank(torch.ones(handler.get_rotary_seq_len(), 8))
    y = handler.core_attn(None, handler.rope(y, freqs), y, y)
    return handler.combine(y + handler.roll_tensor(y, -1, 0)[0], 0).sin()

def compiled():
    return torch.compile(run, backend="eager")

def is_loaded():
    return "torch._dynamo" in sys.modules

x = torch.randn(12, 2, 8)
{ORDERS[order]}
for _ in range(2):
    torch.testing.assert_close(ours(x, handler), run(x, handler))
    handler = make()
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1, "nothing was compiled"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "recompile_limit" not in done.stderr
