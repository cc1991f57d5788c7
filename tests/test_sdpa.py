"""Models that call scaled_dot_product_attention, under a handler: against the dense reference, and what is refused."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import CheckpointError, checkpoint

from cphandler import (
    Causal,
    Full,
    InvalidTypeError,
    InvalidValueError,
    Mask,
    SlidingWindow,
    UnsupportedError,
    get_cp_handler_cls,
)
from cphandler.handler.contract import ContextParallelHandler
from cphandler.integrations.sdpa import context_parallel
from cphandler.testing import RankPool, assert_close, dense_attention
from cphandler.testing.cases import Case, group_of
from cphandler.testing.reference import visible_pairs
from cphandler.tokens.documents import Documents

HEADS, GROUPS, DIM, WIDTH = 4, 2, 6, 16
CUTS = [0, 7, 8, 19]
ROWS = 19

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"

Attend = Callable[..., Tensor]


class Layer(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, HEADS * DIM)
        self.keys = nn.Linear(WIDTH, 2 * GROUPS * DIM)
        self.out = nn.Linear(HEADS * DIM, WIDTH)
        self.options = {"is_causal": True, "enable_gqa": True, **options}

    def forward(self, x: Tensor, attend: Attend | None = None) -> Tensor:
        q = self.query(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        k, v = self.keys(x).unflatten(-1, (2, GROUPS, DIM)).permute(2, 0, 3, 1, 4)
        out = attend(q, k, v) if attend else scaled_dot_product_attention(q, k, v, **self.options)
        return x + self.out(out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, checkpointing: str = "", **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(**options) for _ in range(2))
        self.checkpointing = checkpointing

    def forward(self, x: Tensor, attend: Attend | None = None) -> Tensor:
        for layer in self.layers:
            if self.checkpointing:
                x = checkpoint(layer, x, attend, use_reentrant=self.checkpointing == "reentrant")
            else:
                x = layer(x, attend)
        return x


def model_of(checkpointing: str = "", **options: Any) -> Model:
    torch.manual_seed(3)
    return Model(checkpointing, **options).double()


def reference(x: Tensor, grad: Tensor, visible: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """The same model with dense attention over the whole batch."""

    def attend(*qkv: Tensor) -> Tensor:
        out, _ = dense_attention(*(t.transpose(1, 2) for t in qkv), visible, qkv_format="bshd", **options)
        return out.transpose(1, 2)

    model = model_of()
    out = model(x, attend)
    return out.detach(), list(torch.autograd.grad(out, [x, *model.parameters()], grad))


def check(
    handler: ContextParallelHandler, group: Any, mask: Mask, seed: int, model: Model, scale: float | None = None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = 1 if handler.qkv_format == "thd" else 2
    x, grad = (torch.randn(rows, ROWS, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    documents = Documents.from_cu_seqlens(CUTS) if rows == 1 else Documents.dense(ROWS)
    expected, grads = reference(x, grad, visible_pairs(mask, documents), softmax_scale=scale)
    local = handler.dispatch(x.detach(), 1).requires_grad_()
    with context_parallel(model, handler):
        out = model(local)
        real = handler.valid_mask
        assert_close(out[:, real], handler.dispatch(expected, 1)[:, real], what=f"out of {handler.qkv_format} {mask}")
        out.backward(handler.dispatch(grad, 1))
    assert_close(local.grad, handler.dispatch(grads[0], 1), what="gradient of the input")
    for parameter, whole in zip(model.parameters(), grads[1:], strict=True):
        torch.distributed.all_reduce(parameter.grad, group=group)
        assert_close(parameter.grad, whole, what="gradient of a parameter")


def attention_case() -> None:
    group, seed = group_of(Case(cp_size=2))
    shapes: list[dict[str, Any]] = [
        {"qkv_format": "thd", "cu_seqlens_q": CUTS},
        {"max_seqlen_q": ROWS},
        {"qkv_format": "bshd", "max_seqlen_q": ROWS},
    ]
    for number, shape in enumerate(shapes):
        cases: list[tuple[dict[str, Any], Mask]] = [({}, Causal()), ({"is_causal": False, "scale": 0.3}, Full())]
        for options, mask in cases:
            handler = get_cp_handler_cls("ring")(cp_group=group, layout="balanced", **shape)
            check(handler, group, mask, seed + number, model_of(**options), options.get("scale"))
        for checkpointing in ("", "yes"):
            handler = get_cp_handler_cls("ulysses")(cp_group=group, mask=SlidingWindow(4), **shape)
            check(handler, group, SlidingWindow(4), seed + number, model_of(checkpointing))


def test_attention_is_the_dense_reference(ranks: RankPool) -> None:
    ranks.run(attention_case)


def one(**arguments: Any) -> ContextParallelHandler:
    return get_cp_handler_cls("local")(**({"max_seqlen_q": ROWS} | arguments))


def inputs(rows: int = 2) -> Tensor:
    torch.manual_seed(rows)
    return torch.randn(rows, ROWS, WIDTH, dtype=torch.float64)


def hooks(model: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


def test_what_is_outside_is_left_alone() -> None:
    model, other, x = model_of(), model_of(), inputs()
    plain, wide = model(x), model_of(is_causal=False)(x)
    window = one(mask=SlidingWindow(1))
    with context_parallel(model, window):
        inside = model(x)
        assert torch.equal(other(x), plain), "another model"
    assert not torch.allclose(inside, plain)
    assert torch.equal(model(x), plain)
    assert hooks(model) == 0
    with pytest.raises(ZeroDivisionError), context_parallel(model, window):
        raise ZeroDivisionError
    assert hooks(model) == 0
    with pytest.raises(ValueError, match="rows"), context_parallel(model, one(max_seqlen_q=5)):
        model(x)
    assert hooks(model) == 0
    assert torch.equal(model(x), plain), "after an error inside a layer"
    assert not torch.allclose(plain, wide)


def test_an_error_in_the_model_leaves_nothing_active() -> None:
    model, x = model_of(), inputs()
    plain = model(x)
    with context_parallel(model, one(mask=SlidingWindow(1))):
        with pytest.raises(RuntimeError):
            model(x[..., :3])
        q = x[:, None, :, :DIM]
        outside = functional.scaled_dot_product_attention(q, q, q)
        inside = model(x)
    assert torch.equal(outside, functional.scaled_dot_product_attention(q, q, q))
    assert not torch.allclose(inside, plain)


def test_the_inner_one_of_two_counts() -> None:
    model, x = model_of(), inputs()
    narrow, plain = one(mask=SlidingWindow(1)), one()
    with context_parallel(model, narrow):
        expected = model(x)
        with context_parallel(model, plain):
            assert torch.allclose(model(x), model_of()(x))
        assert torch.equal(model(x), expected)
        with context_parallel(model.layers[1], plain):
            mixed = model(x)
        assert torch.equal(model(x), expected)
    by_hand = model.layers[0]
    with context_parallel(by_hand, narrow):
        first = by_hand(x)
    assert torch.allclose(mixed, model.layers[1](first))


def test_recomputation_under_another_handler_is_noticed() -> None:
    """Two batches in flight: forward A, forward B, backward A under B's handler, or under none."""
    model = model_of("yes")
    a, b = inputs(2).requires_grad_(), inputs(2).requires_grad_()
    first, second = one(mask=SlidingWindow(1)), one(mask=SlidingWindow(3))
    with context_parallel(model, first):
        out_a = model(a)
    with context_parallel(model, second):
        out_b = model(b)
        with pytest.raises(CheckpointError):
            out_a.sum().backward()
    with context_parallel(model, first):
        model(a).sum().backward()
    with pytest.raises(CheckpointError):
        out_b.sum().backward()
    with context_parallel(model, first):
        again = model(a)
    with context_parallel(model, first):
        again.sum().backward()
    whole = model_of()
    twin = a.detach().clone().requires_grad_()
    with context_parallel(whole, first):
        whole(twin).sum().backward()
    assert torch.allclose(twin.grad, a.grad / 2)
    with (
        pytest.raises(UnsupportedError, match="use_reentrant=True"),
        context_parallel(model := model_of("reentrant"), first),
    ):
        model(a)


def dropout_case() -> None:
    group, seed = group_of(Case(cp_size=2))
    x = torch.randn(2, ROWS, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    model, outs = model_of(dropout_p=0.4), []
    for handler in (get_cp_handler_cls("ring")(cp_group=group, max_seqlen_q=ROWS), one()):
        with pytest.raises(UnsupportedError, match="needs a seed"), context_parallel(model, handler):
            model(handler.dispatch(x, 1))
        with context_parallel(model, handler, dropout_seed=5):
            outs.append(handler.combine(model(handler.dispatch(x, 1)), 1))
        with context_parallel(model, handler, dropout_seed=6):
            assert not torch.allclose(handler.combine(model(handler.dispatch(x, 1)), 1), outs[-1])
    assert_close(*outs, what="dropout")


def test_dropout_is_the_same_on_any_number_of_ranks(ranks: RankPool) -> None:
    ranks.run(dropout_case)


class Calls(nn.Module):
    """Attention with whatever it is told."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        heads = options.pop("heads", HEADS)
        q = x.view(2, 1, ROWS, WIDTH).expand(-1, HEADS, -1, -1)
        k = q[:, :heads]
        if options.pop("flat", False):
            q = k = q[0]
        return scaled_dot_product_attention(q, k, k, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_mask": torch.ones(ROWS, ROWS, dtype=torch.bool)}, "an attn_mask shows this rank's rows alone"),
        ({"heads": 2}, "queries have more heads than keys; got 4 and 2"),
        ({"flat": True}, r"queries must be \[B, H, L, D\]"),
    ],
)
def test_a_call_is_refused_by_what_is_wrong_with_it(options: dict[str, Any], message: str) -> None:
    model = Calls()
    with context_parallel(model, one()), pytest.raises((UnsupportedError, InvalidValueError), match=message):
        model(inputs(), **options)
    packed = one(qkv_format="thd", cu_seqlens_q=CUTS, max_seqlen_q=None)
    with context_parallel(model, packed), pytest.raises(UnsupportedError, match=r"\[1, H, L, D\] of a packed batch"):
        model(inputs())


def test_a_module_is_refused_by_name() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 1)
    refused: list[tuple[Any, Any, str]] = [
        (encoder, one(), r"layers\.0\.self_attn attends without scaled_dot_product_attention"),
        (one(), one(), "takes a module"),
        (Calls(), None, "takes the batch's handler"),
    ]
    for module, handler, message in refused:
        with pytest.raises((UnsupportedError, InvalidTypeError), match=message), context_parallel(module, handler):
            pass
    linear = nn.Linear(WIDTH, 2).double()
    with context_parallel(linear, one()), pytest.raises(UnsupportedError, match="attended to nothing"):
        linear(inputs())


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(30, WIDTH), nn.Embedding(30, WIDTH)
        self.body, self.head = Model(), nn.Linear(WIDTH, 30)

    def forward(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.tokens(tokens) + self.positions(position_ids)))
        return logits


def example_case() -> None:
    """The script of the documentation, against the plain model on one document at a time."""
    group, seed = group_of(Case(cp_size=2))
    train_step = runpy.run_path(str(EXAMPLES / "plain_pytorch.py"))["train_step"]
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(1, 30, (n,), generator=generator) for n in (9, 1, 4, 11)]
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(Decoder().double())
    total = torch.zeros((), dtype=torch.float64)
    for tokens in documents:
        logits = models[0](tokens[None, :-1], torch.arange(len(tokens) - 1)[None])[0]
        total = total + functional.cross_entropy(logits, tokens[1:], reduction="sum")
    expected = total / sum(len(tokens) - 1 for tokens in documents)
    expected.backward()
    assert_close(train_step(models[1], documents, group), expected.detach(), what="loss")
    for one_rank, parameter in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_close(parameter.grad, one_rank.grad, what="gradient")


def test_the_script_of_the_documentation(ranks: RankPool) -> None:
    ranks.run(example_case)
