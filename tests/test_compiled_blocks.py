"""A transformer block that takes the handler, compiled without a graph break, and once for all packings of a length.

Results are those of a dense score matrix on one rank, forward and backward.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from cphandler import CoreAttention, CPConfig, Full, Mask, PrefixLM, SlidingWindow, clear_plan_cache, get_cp_handler_cls
from cphandler.testing import RankPool, dense_attention, partition_group, visible_pairs
from cphandler.testing.cases import Batch, Case, documents_of
from tests.test_combinations import HEAD_DIM, WIDTH, Dense, Layer, offsets

PACKINGS = ([13, 3, 6, 1, 9], [32], [1, 1, 20, 10], [16, 16])
"""Of one length: none of them but the first may be compiled for."""


def angles(rows: int) -> Tensor:
    return torch.arange(rows).double()[:, None] * torch.tensor([1.0, 0.3, 0.1] * 2).double()


OTHER_LENGTHS = ([32], [20, 10], [1, 24], [41], [13, 5])
"""Even and odd ones, so that some ranks have a pad row."""


def compiled(
    backend: str, size: int, layout: str | None, compiler: str, packings: Sequence[list[int]] = PACKINGS
) -> tuple[int, float] | None:
    """How often a layer was compiled, and how far it is off at most."""
    group = partition_group([range(size)])
    if group is None:
        return None
    torch._dynamo.reset()
    torch.manual_seed(3)
    layer, counter = Layer().double(), CompileCounterWithBackend(compiler)
    fast = torch.compile(layer, backend=counter, fullgraph=True)
    apart = 0.0
    for number, lengths in enumerate(packings):
        generator = torch.Generator().manual_seed(number)
        x, grad = (torch.randn(sum(lengths), WIDTH, generator=generator).double() for _ in range(2))
        handler = get_cp_handler_cls(backend)(
            cp_group=group, qkv_format="thd", cu_seqlens_q=offsets(lengths), layout=layout
        )
        handler.plan()
        whole = x.clone().requires_grad_()
        expected = layer(whole, torch.cat([angles(n) for n in lengths]), Dense(lengths))
        wanted = torch.autograd.grad(expected, [whole, *layer.parameters()], grad)
        local = handler.dispatch(x, 0).requires_grad_()
        freqs = handler.get_emb_on_this_cp_rank(angles(handler.get_rotary_seq_len()))
        out = fast(local, freqs, handler)
        found = list(torch.autograd.grad(out, [local, *layer.parameters()], handler.dispatch(grad, 0)))
        for part in found[1:]:
            torch.distributed.all_reduce(part, group=group)
        real = handler.valid_mask
        pairs = [(out[real], handler.dispatch(expected, 0)[real]), (found[0], handler.dispatch(wanted[0], 0))]
        pairs += zip(found[1:], wanted[1:], strict=True)
        apart = max(apart, *(float((a - b).abs().max() / b.abs().max()) for a, b in pairs))
    return counter.frame_count, apart


EXCHANGES = [
    ("ring", 2, None, "aot_eager"),
    ("p2p", 2, "balanced", "aot_eager"),
    ("ulysses", 2, None, "aot_eager"),
    ("all_gather", 2, None, "aot_eager"),
    ("usp", 4, None, "aot_eager"),
    ("p2p", 2, None, "inductor"),
]


@pytest.mark.parametrize(("backend", "size", "layout", "compiler"), EXCHANGES)
def test_a_block_is_compiled_once(ranks: RankPool, backend: str, size: int, layout: str | None, compiler: str) -> None:
    answers = [answer for answer in ranks.run(compiled, backend, size, layout, compiler) if answer is not None]
    assert len(answers) == size
    for times, apart in answers:
        assert times == 1
        assert apart < 1e-10


@pytest.mark.parametrize(("backend", "size", "most"), [("ring", 2, 2), ("ulysses", 2, 4)])
def test_other_lengths_become_a_symbol(ranks: RankPool, backend: str, size: int, most: int) -> None:
    """Under Ulysses rows are put in order where there is a pad row, which is a graph of its own."""
    answers = ranks.run(compiled, backend, size, None, "aot_eager", OTHER_LENGTHS)
    for times, apart in (answer for answer in answers if answer is not None):
        assert times <= most
        assert apart < 1e-10


class Block(nn.Module):
    """Attention with options, between two matrices."""

    def __init__(self, core: CoreAttention | None, options: dict[str, Any]) -> None:
        super().__init__()
        self.core, self.options = core, options
        self.qkv, self.out = nn.Linear(WIDTH, 8 * HEAD_DIM), nn.Linear(4 * HEAD_DIM, WIDTH)

    def forward(self, x: Tensor, handler: Any) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, HEAD_DIM)).split([4, 2, 2], -2)
        result = handler.core_attn(self.core, q, k, v, **self.options)
        out = result if isinstance(result, Tensor) else result.out + result.lse.clamp(min=-9.0).unsqueeze(-1)
        projected: Tensor = self.out(out.flatten(-2))
        return projected


OPTIONS: dict[str, tuple[CoreAttention | None, dict[str, Any], dict[str, Any]]] = {
    "nothing": (None, {}, {}),
    "a module": (CoreAttention(softmax_scale=0.3, softcap=2.0, num_sinks=4), {}, {}),
    "a window of the call's": (None, {"mask": SlidingWindow(4)}, {}),
    "a mask by name": (None, {"mask": "full"}, {}),
    "a window of the handler's": (None, {}, {"mask": SlidingWindow(4)}),
    "scale and cap of the call's": (None, {"softmax_scale": 0.3, "softcap": 2.0, "layer_number": 3}, {}),
    "the log-sum-exp": (None, {"return_lse": True}, {}),
    "the largest score": (CoreAttention(record_max_logit=True), {"return_lse": True, "return_max_logit": True}, {}),
    "a named kernel": (None, {}, {"config": CPConfig(kernel="reference", deterministic=True)}),
    "dropout that is off": (CoreAttention(dropout_p=0.3).eval(), {}, {}),
}
FORMS = {"thd": {"cu_seqlens_q": [0, 5, 24]}, "sbhd": {"max_seqlen_q": 12}, "bshd": {"max_seqlen_q": 12}}


CALLS = [*((name, "thd") for name in OPTIONS), *((name, form) for name in ("a module",) for form in ("sbhd", "bshd"))]


@pytest.mark.parametrize(("name", "form"), CALLS)
def test_options_and_formats(name: str, form: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(5)
    core, options, settings = OPTIONS[name]
    if core is not None and core.sinks is not None:
        nn.init.normal_(core.sinks)
    block = Block(core, options).double()
    arguments: dict[str, Any] = {"qkv_format": form, **FORMS[form], **settings}
    handler = get_cp_handler_cls("local")(**arguments)
    handler.plan(options.get("mask"))
    shape = {"thd": (24,), "sbhd": (12, 2), "bshd": (2, 12)}[form]
    x = torch.randn(*shape, WIDTH, dtype=torch.float64, requires_grad=True)
    fast = torch.compile(block, backend="aot_eager", fullgraph=True)
    results = [fast(x, handler), block(x, handler), self_made(block, x, form, settings.get("mask"))]
    grad, inputs = torch.randn_like(x), [x, *block.parameters()]
    grads = [torch.autograd.grad(result, inputs, grad) for result in results]
    for result, found in zip(results[:2], grads[:2], strict=True):
        torch.testing.assert_close(result, results[2], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found, grads[2], rtol=1e-9, atol=1e-9)


def with_masks() -> dict[str, list[dict[str, Any]]]:
    """Batches of one shape, and what differs from one to the next."""
    packed = {"qkv_format": "thd", "cu_seqlens_q": [0, 5, 24]}
    real = [torch.arange(12) < torch.tensor([[12], [valid]]) for valid in (3, 7)]
    return {
        "numbers of a mask": [{"mask": PrefixLM((2, 3)), **packed}, {"mask": PrefixLM((3, 9)), **packed}],
        "the mask": [{"mask": Full(), **packed}, {"mask": SlidingWindow(3), **packed}],
        "padding": [{"qkv_format": "bshd", "max_seqlen_q": 12, "key_padding_mask": rows} for rows in real],
    }


@pytest.mark.parametrize("what", with_masks())
def test_what_differs_between_batches_is_not_compiled_again(what: str) -> None:
    torch._dynamo.reset()
    block, counter = Block(None, {}).double(), CompileCounterWithBackend("aot_eager")
    fast = torch.compile(block, backend=counter, fullgraph=True)
    results = []
    for settings in with_masks()[what]:
        handler = get_cp_handler_cls("local")(**settings)
        handler.plan()
        torch.manual_seed(2)
        x = torch.randn(*((24,) if what != "padding" else (2, 12)), WIDTH, dtype=torch.float64, requires_grad=True)
        results.append(fast(x, handler))
        torch.testing.assert_close(results[-1], block(x, handler), rtol=1e-9, atol=1e-9)
        grads = [torch.autograd.grad(made.square().sum(), x) for made in (results[-1], block(x, handler))]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)
    assert not torch.equal(*results)
    assert counter.frame_count == 1


@pytest.mark.parametrize("comm_type", [None, ["ring", "ulysses"]], ids=["alike", "by layer"])
def test_handlers_that_are_gone_before_the_backward_pass(comm_type: list[str] | None) -> None:
    """Forward passes of several batches, then all backward passes, of which only the graphs hold the plans."""
    torch._dynamo.reset()
    block, counter = Block(None, {"layer_number": 2}).double(), CompileCounterWithBackend("aot_eager")
    fast, waiting = torch.compile(block, backend=counter, fullgraph=True), []
    for rows in (24, 30, 18, 41):
        handler = get_cp_handler_cls("local", comm_type)(qkv_format="thd", cu_seqlens_q=[0, 5, rows])
        handler.plan()
        x = torch.randn(rows, WIDTH, dtype=torch.float64, requires_grad=True)
        right = torch.autograd.grad(block(x, Dense([5, rows - 5])).square().sum(), x)
        waiting.append((x, fast(x, handler).square().sum(), right))
        del handler
        clear_plan_cache()
        gc.collect()
    for x, loss, right in waiting:
        torch.testing.assert_close(torch.autograd.grad(loss, x), right, rtol=1e-9, atol=1e-9)
    assert counter.frame_count == 2, "a length, and then a symbol for it"


def self_made(block: Block, x: Tensor, form: str, mask: Mask | None) -> Tensor:
    """The block over a dense score matrix."""

    class Reference:
        def core_attn(self, core: CoreAttention | None, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
            asked = options.get("mask", mask)
            seen = Full() if asked == "full" else asked
            lengths = (5, 19) if form == "thd" else (12,)
            case = Case(qkv_format=form, batch=Batch(lengths), **({} if seen is None else {"mask": seen}))
            names = ("softmax_scale", "softcap", "sinks")
            chosen = {name: options.get(name, getattr(core, name, None)) for name in names}
            visible = visible_pairs(case.mask, documents_of(case))
            out, lse = dense_attention(q, k, v, visible, qkv_format=form, **chosen)
            return out if "return_lse" not in options else Results(out, lse)

    result: Tensor = block(x, Reference())
    return result


class Results:
    """An output and its log-sum-exp."""

    def __init__(self, out: Tensor, lse: Tensor) -> None:
        self.out, self.lse = out, lse


def asks(question: Callable[[Any, Tensor], Any]) -> Callable[..., Any]:
    return lambda x, handler: question(handler, x.unflatten(-1, (-1, HEAD_DIM)))


BREAKS: dict[str, Callable[..., Any]] = {
    "dispatch": asks(lambda handler, x: handler.dispatch(x, 0)),
    "combine": asks(lambda handler, x: handler.combine(x, 0)),
    "roll_tensor": asks(lambda handler, x: handler.roll_tensor(x, -1, 0)),
    "get_emb_on_this_cp_rank": asks(lambda handler, x: handler.get_emb_on_this_cp_rank(x[:, 0])),
    "dropout": asks(lambda handler, x: handler.core_attn(None, x, x, x, dropout_p=0.1, dropout_seed=1, layer_number=1)),
    "a callable": asks(lambda handler, x: handler.core_attn(lambda q, k, v, **_: q + k + v, x, x, x)),
    "a mask that was not planned": asks(lambda handler, x: handler.core_attn(None, x, x, x, mask=SlidingWindow(3))),
}


@pytest.mark.parametrize("what", BREAKS)
def test_what_breaks_a_graph_says_so(what: str) -> None:
    torch._dynamo.reset()
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 5, 24])
    handler.plan()
    x = torch.randn(24, WIDTH)
    with pytest.raises(Exception, match=r"is kept out of graphs: plan\(\) prepares attention for a compiled block"):
        torch.compile(BREAKS[what], backend="eager", fullgraph=True)(x, handler)
    torch._dynamo.reset()
    broken = torch.compile(BREAKS[what], backend="eager")(x, handler)
    torch.testing.assert_close(broken, BREAKS[what](x, handler))


SHAPES: dict[str, dict[str, Tensor]] = {
    "rows of other ranks": {"query": torch.randn(30, 4, 6)},
    "fewer rows": {"key": torch.randn(23, 2, 6)},
    "another head dim": {"key": torch.randn(24, 2, 4)},
    "heads that do not divide": {"key": torch.randn(24, 3, 6), "value": torch.randn(24, 3, 6)},
    "another dtype": {"key": torch.randn(24, 2, 6).double()},
    "another number of dims": {"query": torch.randn(1, 24, 4, 6)},
}


@pytest.mark.parametrize("what", SHAPES)
def test_a_wrong_shape_is_refused_by_a_compiled_block_too(what: str) -> None:
    """Before anything is computed, and before anything is sent, since it is told while the block is traced."""
    torch._dynamo.reset()
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 5, 24])
    handler.plan()
    tensors = {name: torch.randn(24, heads, 6) for name, heads in (("query", 4), ("key", 2), ("value", 2))}
    fast = torch.compile(lambda **qkv: handler.core_attn(None, **qkv), backend="eager", fullgraph=True)
    fast(**tensors)
    with pytest.raises(Exception, match=r"do not have the handler's rows|must share one dtype"):
        fast(**tensors | SHAPES[what])


@pytest.mark.parametrize(("backend", "one_graph"), [("p2p", True), ("ulysses", False)])
def test_where_the_handler_works_elsewhere(backend: str, one_graph: bool) -> None:
    """Metadata and group on the host say nothing of the model: only what is kept on a device must be where it is."""
    torch._dynamo.reset()
    handler = get_cp_handler_cls(backend)(qkv_format="thd", cu_seqlens_q=[0, 5, 24])
    handler.device = torch.device("meta")
    handler.plan()
    block, x = Block(None, {}).double(), torch.randn(24, WIDTH).double()
    fast = torch.compile(block, backend="eager", fullgraph=one_graph)
    torch.testing.assert_close(fast(x, handler), block(x, handler))


def test_a_copied_plan_is_refused() -> None:
    """Hooks on saved tensors may put copies in their place, and a compiled graph saves the head of a plan alone."""
    torch._dynamo.reset()
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 5, 24])
    handler.plan()
    block = Block(None, {}).double()
    fast = torch.compile(block, backend="aot_eager", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        out = fast(torch.randn(24, WIDTH, dtype=torch.float64), handler)
    with pytest.raises(ValueError, match="a compiled block's plan was copied without what belongs to it"):
        out.sum().backward()
