"""Gradients of what moves: which part each rank gets, derivatives of gradients, and forward mode, which is refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from cphandler import UnsupportedError, get_cp_handler_cls, record_traffic
from cphandler.testing import RankPool, assert_close, dense_attention, visible_pairs
from cphandler.testing.cases import Batch, Case, documents_of, group_of, make_handler
from cphandler.testing.reference import dense_roll

BATCH = Batch((5, 1, 4, 3))


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def derivatives(whole: Callable[[Tensor], Tensor], x: Tensor, weights: Tensor, seeds: range) -> list[Tensor]:
    """The first three derivatives of a loss in which all rows meet, each along a random direction."""
    found, value = [], ((whole(x) @ random(0, 13, 13) + whole(x).sum()).pow(3) * weights).sum()
    for seed in seeds:
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        found.append(gradient)
        value = (gradient * random(seed, *x.shape)).sum()
    return found


def higher_derivatives(cp_size: int, dim: int) -> None:
    """Of a program that cuts, rolls, multiplies and combines: those of one rank, whatever ``grad`` says."""
    case = Case("ring", cp_size, batch=BATCH)
    group, seed = group_of(case)
    if seed < 0:
        return
    handler, documents = make_handler(case, group), documents_of(case)
    x = random(seed, 13, 13).requires_grad_()
    parts = [random(seed + rank, 13, 13) for rank in range(cp_size)]
    seeds = range(seed + 100, seed + 103)

    def dense(x: Tensor) -> Tensor:
        return (dense_roll(x, documents, -1, dim) * x).sin()

    for cut, put_together in product(("full", "partial"), ("replicated", "sum")):

        def whole(x: Tensor) -> Tensor:
            local = handler.dispatch(x, dim, grad=cut, pad_value=3)  # noqa: B023 (called before the next turn)
            product = (handler.roll_tensor(local, -1, dim)[0] * local).sin()
            return handler.combine(product, dim, grad=put_together)  # noqa: B023

        weights = parts[handler.cp_rank] if put_together == "sum" else parts[0]
        expected = derivatives(dense, x, sum(parts) if put_together == "sum" else parts[0], seeds)
        for order, (actual, wanted) in enumerate(zip(derivatives(whole, x, weights, seeds), expected, strict=True), 1):
            total = actual.detach().clone()
            if cut == "partial":
                dist.all_reduce(total, group=group)
            assert_close(total, wanted, what=f"derivative {order} of {cut} and {put_together} on {cp_size} ranks")


@pytest.mark.parametrize(("cp_size", "dim"), [(2, 0), (3, 1)])
def test_derivatives_of_any_order_are_those_of_one_rank(ranks: RankPool, cp_size: int, dim: int) -> None:
    ranks.run(higher_derivatives, cp_size, dim)


def curvature() -> None:
    """A penalty on a gradient is no linear form of it: the gradient must be whole where it is squared."""
    case = Case("ring", 3, batch=BATCH)
    group, seed = group_of(case)
    if seed < 0:
        return
    handler = make_handler(case, group)
    x, weights = random(seed, 13, 2).requires_grad_(), random(seed + 1, 13, 2)

    def penalised(loss: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    actual = penalised((handler.dispatch(x, 0).pow(3) * handler.dispatch(weights, 0)).sum())
    assert_close(actual, penalised((x.pow(3) * weights).sum()), what="gradient of a penalty on a gradient")


def scaled_once() -> None:
    """A gradient that waits for an average may be looked at, and is not differentiated again."""
    case = Case("ring", 3, batch=BATCH)
    group, seed = group_of(case)
    if seed < 0:
        return
    handler = make_handler(case, group)
    local = handler.dispatch(random(seed, 13, 2), 0).requires_grad_()
    whole = handler.combine(local, 0, grad="scaled")
    (gradient,) = torch.autograd.grad(whole.square().sum(), local, create_graph=True)
    assert_close(gradient.detach(), 2 * 3 * local.detach(), what="the scaled gradient")
    with pytest.raises(UnsupportedError, match=r"cannot be differentiated again.*use grad='replicated' or grad='sum'"):
        gradient.sum().backward()


@pytest.mark.parametrize("law", [curvature, scaled_once])
def test_gradients_of_gradients(ranks: RankPool, law: Callable[[], None]) -> None:
    ranks.run(law)


class Model(torch.nn.Module):
    """Words and images made into rows before the cut, attention and a head after it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.words = torch.nn.Embedding(7, 8, dtype=torch.float64)
        self.tower = torch.nn.Linear(5, 8, dtype=torch.float64)
        self.head = torch.nn.Linear(8, 3, dtype=torch.float64)

    def rows(self, tokens: Tensor, pixels: Tensor, places: Tensor) -> Tensor:
        """``[T, 8]``, words but for the images' places."""
        return self.words(tokens).index_copy(0, places, self.tower(pixels).tanh())

    def logits(self, handler: Any, rows: Tensor) -> Tensor:
        """``[L, 3]``."""
        heads = rows.unflatten(-1, (2, 4))
        return self.head(rows + handler.core_attn(None, heads, heads, heads).flatten(-2))


def towers(cp_size: int) -> None:
    """A tower's gradients beside a head's, on ranks that hold images and on one that holds none."""
    case = Case("ring", cp_size, layout="contiguous", batch=Batch((9, 5, 4)))
    group, seed = group_of(case)
    if seed < 0:
        return
    handler = make_handler(case, group)
    tokens = torch.randint(7, (18,), generator=torch.Generator().manual_seed(seed))
    places = torch.tensor([1, 2, 3, 5])
    pixels, weights = random(seed + 1, 4, 5), random(seed + 2, 18, 3)
    wanted, one_rank = Model(seed), get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 9, 14, 18])
    (wanted.logits(one_rank, wanted.rows(tokens, pixels, places)) * weights).sum().backward()
    for grad in ("full", "partial"):
        model = Model(seed)
        rows = handler.dispatch(model.rows(tokens, pixels, places), 0, grad=grad)
        loss = (model.logits(handler, rows) * handler.dispatch(weights, 0)).sum()
        loss.backward()
        has_images = bool((handler.dispatch(torch.isin(torch.arange(18), places), 0, pad_value=False)).any())
        assert has_images == (handler.cp_rank == 0), "the layout keeps all images on the first rank"
        if grad == "partial":
            assert (model.tower.weight.grad != 0).any() == has_images, "another rank's images have no gradient here"
        for name, parameter in model.named_parameters():
            if grad == "partial" or name.startswith("head"):
                dist.all_reduce(parameter.grad, group=group)
            assert_close(parameter.grad, wanted.get_parameter(name).grad, what=f"{name} under grad={grad}")


@pytest.mark.parametrize("cp_size", [2, 3])
def test_towers_before_the_cut(ranks: RankPool, cp_size: int) -> None:
    ranks.run(towers, cp_size)


def nothing_is_sent() -> None:
    """A partial gradient is a rank's own affair: no message, and a rank without a gradient keeps nobody waiting."""
    case = Case("ring", 4, batch=BATCH)
    group, seed = group_of(case)
    handler = make_handler(case, group)
    x = random(seed, 13, 2).requires_grad_(handler.cp_rank != 1)
    with record_traffic() as traffic:
        local = handler.dispatch(x, 0, grad="partial")
        if local.requires_grad:
            local.backward(handler.dispatch(torch.ones_like(x), 0, pad_value=float("nan")))
    assert traffic.messages == 0
    if handler.cp_rank != 1:
        expected = torch.zeros(13)
        expected[handler.dispatch(torch.arange(13), 0, pad_value=-1)[handler.valid_mask]] = 1
        assert torch.equal(x.grad, expected[:, None].expand(13, 2).double())
    replicated = make_handler(Case("ulysses", 4, layout="replicated", batch=BATCH), group)
    for grad in ("full", "partial"):
        assert replicated.dispatch(x, 0, grad=grad) is x


def test_partial_gradients_are_not_sent(ranks: RankPool) -> None:
    ranks.run(nothing_is_sent)


def memory() -> None:
    """What comes back is contiguous in every dim, so that a model's ``view`` does not depend on the ranks."""
    case = Case("ring", 4, batch=BATCH)
    group, _ = group_of(case)
    for handler in (make_handler(case, group), make_handler(Case("ring", 4, layout="contiguous", batch=BATCH), group)):
        for dim in range(3):
            x = torch.randn(2, 13, 13, 3).select(0, 0).movedim(0, dim).requires_grad_()
            local = handler.dispatch(x, dim)
            for moved in (local, handler.roll_tensor(local, -1, dim)[0], handler.combine(local, dim)):
                assert moved.is_contiguous()
                moved.view(-1)
            (gradient,) = torch.autograd.grad(handler.combine(local, dim).sum(), x)
            assert gradient.is_contiguous()


def test_what_moves_comes_back_contiguous(ranks: RankPool) -> None:
    ranks.run(memory)


def refuses(call: Callable[[], Any], method: str) -> None:
    with record_traffic() as traffic, pytest.raises(UnsupportedError, match=f"{method} has no forward-mode derivative"):
        call()
    assert traffic.by_operation.keys() <= {"check"}


def duals() -> None:
    group, _ = group_of(Case(cp_size=4))
    for backend in ("ring", "p2p", "all_gather", "ulysses"):
        handler = make_handler(Case(backend, 4, batch=BATCH), group)
        local, rows = torch.randn(handler.num_local_tokens, 4, 8), torch.randn(13, 4, 8)
        with forward_ad.dual_level():
            dual, whole = (forward_ad.make_dual(x, torch.randn_like(x)) for x in (local, rows))
            refuses(lambda: handler.dispatch(whole, 0), "dispatch")  # noqa: B023
            refuses(lambda: handler.combine(dual, 0), "combine")  # noqa: B023
            refuses(lambda: handler.roll_tensor(dual, -1, 0), "roll_tensor")  # noqa: B023
            for q, k, v in ((dual, local, local), (local, dual, local), (local, local, dual)):
                refuses(lambda: handler.core_attn(None, q, k, v), "core_attn")  # noqa: B023
        refuses(lambda: torch.func.jvp(lambda x: handler.combine(x, 0), (local,), (local,)), "combine")  # noqa: B023
        handler.combine(local, 0)  # nothing was left behind
    ulysses = make_handler(Case("ulysses", 4, batch=BATCH), group)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(local, local)
        refuses(lambda: ulysses.core_attn(lambda q, *_, **__: q, dual, dual, dual), "core_attn")


def test_forward_mode_is_refused_where_it_would_be_lost(ranks: RankPool) -> None:
    ranks.run(duals)


def test_forward_mode_on_one_rank() -> None:
    """Refused by the built-in kernels; whatever is torch alone has its tangent."""
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 5, 6, 10, 13])
    x, tangent = random(0, 13, 4, 8), random(1, 13, 4, 8)
    seen = visible_pairs(handler.mask, handler.documents)

    def own(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        return dense_attention(q, k, v, seen, qkv_format="thd")[0]

    refuses(lambda: torch.func.jvp(lambda x: handler.core_attn(None, x, x, x), (x,), (x,)), "core_attn")
    sinks = torch.zeros(4, dtype=torch.float64)
    refuses(
        lambda: torch.func.jvp(lambda s: handler.core_attn(None, x, x, x, sinks=s), (sinks,), (sinks,)), "core_attn"
    )

    def program(x: Tensor) -> Tensor:
        rolled = handler.roll_tensor(handler.dispatch(x, 0), -1, 0)[0]
        return handler.combine(handler.core_attn(own, rolled, x, x), 0)

    def dense(x: Tensor) -> Tensor:
        return own(dense_roll(x, handler.documents, -1, 0), x, x)

    _, actual = torch.func.jvp(program, (x,), (tangent,))
    assert_close(actual, torch.func.jvp(dense, (x,), (tangent,))[1], what="the tangent on one rank")


def twice() -> None:
    """Attention by the library's kernels is differentiated once; a callable's as often as torch can."""
    case = Case("ulysses", 2, batch=BATCH, heads=(2, 2))
    group, seed = group_of(case)
    rows = random(seed, 13, 2, 4)
    for backend in ("ring", "ulysses"):
        handler = make_handler(Case(backend, 2, batch=BATCH), group)
        local = handler.dispatch(rows, 0).requires_grad_()
        (gradient,) = torch.autograd.grad(handler.core_attn(None, local, local, local).sum(), local, create_graph=True)
        with pytest.raises(UnsupportedError, match="core_attn cannot be differentiated again; pass a callable"):
            gradient.sum().backward()
    handler = make_handler(case, group)
    seen = visible_pairs(handler.mask, handler.documents)

    def own(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        return dense_attention(q, k, v, seen, qkv_format="thd")[0]

    def second(x: Tensor, whole: Callable[[Tensor], Tensor]) -> Tensor:
        (gradient,) = torch.autograd.grad(whole(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.pow(3).sum(), x)[0]

    def whole(x: Tensor) -> Tensor:
        local = handler.dispatch(x, 0)
        return handler.combine(handler.core_attn(own, local, local, local), 0)

    rows.requires_grad_()
    assert_close(second(rows, whole), second(rows, lambda x: own(x, x, x)), what="a second derivative under Ulysses")


def test_attention_differentiated_twice(ranks: RankPool) -> None:
    ranks.run(twice)
