"""What runs on the ranks: each law of the contract against the dense float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cphandler.attention.loop import AttentionResult
from cphandler.handler.contract import ContextParallelHandler, FreqsMode
from cphandler.layouts.layout import LEVEL_LAYOUTS
from cphandler.testing.cases import (
    Case,
    Data,
    documents_of,
    draw,
    group_of,
    kept_weights,
    make_handler,
    spread,
    valid_tokens,
    visible,
)
from cphandler.testing.reference import (
    dense_attention,
    dense_gradients,
    dense_max_logit,
    dense_roll,
    dense_rope,
    visible_pairs,
)
from cphandler.testing.tolerance import assert_close
from cphandler.tokens.documents import Documents
from cphandler.tokens.masks import Mask

Stage = Literal["construction", "call"]
"""Where a handler refuses what it does not serve."""


def check_attention(case: Case) -> None:
    """``core_attn``, forward and backward, on local rows; pad and padding rows hold NaN and must give exact zeros."""
    group, seed = group_of(case)
    if seed < 0:
        return
    data, seen = draw(case, seed), visible(case)
    handler = make_handler(case, group)
    dim = 1 if case.qkv_format == "bshd" else 0
    inputs, sinks, result = _computed(case, handler, data, seed)
    expected_out, expected_lse, grads = _expected(case, data, seen, seed)
    actual = [result.out, *(x.grad for x in inputs)]
    for name, a, e in zip(("out", "dq", "dk", "dv"), actual, [expected_out, *grads[:3]], strict=True):
        stream = "q" if name in ("out", "dq") else "kv"
        assert a is not None, f"{name} of {case}: there is none"
        assert_close(a, handler.dispatch(e, dim, stream=stream), dtype=case.dtype, what=f"{name} of {case}")
        valid = handler.valid_mask if stream == "q" else handler.kv_valid_mask
        assert (a[~spread(valid, a, case.qkv_format)] == 0).all(), f"{name} of {case}: padding rows are not zero"
        assert a.dtype == case.dtype, f"{name} of {case}: dtype {a.dtype}"
    if case.lse:
        assert result.lse is not None, f"lse of {case}: there is none"
        wanted = handler.dispatch(expected_lse, dim, pad_value=float("-inf"))
        assert_close(result.lse, wanted, dtype=case.dtype, what=f"lse of {case}")
    if case.sinks:
        _check_sinks(case, handler, sinks, grads[3])
    if case.max_logit:
        assert result.max_logit is not None, f"largest logit of {case}: there is none"
        largest = dense_max_logit(
            data.query.double(), data.key.double(), seen, qkv_format=case.qkv_format, softmax_scale=case.scale
        )
        assert_close(result.max_logit, largest, dtype=case.dtype, what=f"largest logit of {case}")


def _computed(
    case: Case, handler: ContextParallelHandler, data: Data, seed: int
) -> tuple[list[Tensor], Tensor, AttentionResult]:
    """Local inputs with their gradients, the sinks, and what ``core_attn`` gave."""
    dim = handler.seq_dim

    def local(x: Tensor, stream: str) -> Tensor:
        valid = spread(valid_tokens(case, stream), x, case.qkv_format)
        poisoned = x.masked_fill(~valid, float("nan"))
        return handler.dispatch(poisoned, dim, pad_value=float("nan"), stream=stream)

    tensors = {"q": data.query, "k": data.key, "v": data.value}
    inputs = [local(x, "q" if name == "q" else "kv").requires_grad_() for name, x in tensors.items()]
    sinks = data.sinks.clone().requires_grad_()
    options: dict[str, Any] = {"return_lse": case.lse, "return_max_logit": case.max_logit}
    options |= {"softmax_scale": case.scale, "softcap": case.softcap, "layer_number": case.layer_number}
    options |= {"dropout_p": case.dropout_p, "dropout_seed": seed} if case.dropout_p else {}
    options |= {"sinks": sinks} if case.sinks else {}
    asked = {name: value for name, value in options.items() if value is not None and value is not False}
    module = OwnAttention(case.qkv_format) if case.own else None
    returned = handler.core_attn(module, *inputs, **asked)
    named = case.lse or case.max_logit
    kind = AttentionResult if named else Tensor
    assert isinstance(returned, kind), f"core_attn of {case}: {type(returned).__name__} in place of {kind.__name__}"
    result = returned if isinstance(returned, AttentionResult) else AttentionResult(returned, None, None)
    roots, grads = [result.out], [local(data.grad_out, "q")]
    if case.lse and result.lse is not None:
        roots, grads = [*roots, result.lse], [*grads, local(data.grad_lse, "q")]
    torch.autograd.backward(roots, grads)
    return inputs, sinks, result


class OwnAttention:
    """A caller's own attention over whole documents: the dense reference; knows nothing of ranks.

    Args:
        qkv_format: order of dims.
    """

    def __init__(self, qkv_format: str) -> None:
        self.qkv_format = qkv_format

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_kv: Tensor | None,
        max_seqlen_q: int,
        max_seqlen_kv: int,
        mask: Mask,
    ) -> Tensor:
        """See :class:`cphandler.AttentionModule`."""
        if cu_seqlens_q is None or cu_seqlens_kv is None:
            queries, keys = Documents.dense(max_seqlen_q), Documents.dense(max_seqlen_kv)
        else:
            queries, keys = (Documents.from_cu_seqlens(offsets) for offsets in (cu_seqlens_q, cu_seqlens_kv))
        seen = visible_pairs(mask, queries, key_documents=keys)
        return dense_attention(q, k, v, seen, qkv_format=self.qkv_format)[0]


def _expected(case: Case, data: Data, seen: Tensor, seed: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, log-sum-exp and gradients by the definition."""
    return dense_gradients(
        (data.query, data.key, data.value),
        seen,
        data.grad_out,
        data.grad_lse if case.lse else None,
        qkv_format=case.qkv_format,
        softmax_scale=case.scale,
        softcap=case.softcap,
        sinks=data.sinks if case.sinks else None,
        keep=kept_weights(case, seed),
        dropout_p=case.dropout_p,
    )


def _check_sinks(case: Case, handler: ContextParallelHandler, sinks: Tensor, expected: Tensor) -> None:
    """Each rank has its part of the gradient; on the replicated layout every rank has all of it."""
    total = torch.zeros_like(sinks, dtype=torch.float64) if sinks.grad is None else sinks.grad.double()
    if handler.sequence_sharded:
        dist.all_reduce(total, group=handler.group)
    assert_close(total, expected, dtype=case.dtype, what=f"gradient of the sinks of {case}")


def check_all(cases: list[Case]) -> None:
    """Hold many cases to the attention law in one trip to the ranks."""
    for case in cases:
        try:
            check_attention(case)
        except Exception as error:
            raise AssertionError(f"case {case}") from error


def check_determinism(case: Case) -> None:
    """Two handlers over one batch give the same bits, forward and backward."""
    group, seed = group_of(case)
    if seed < 0:
        return
    runs = []
    for _ in range(2):
        inputs, _, result = _computed(case, make_handler(case, group), draw(case, seed), seed)
        runs.append([result.out, *(x.grad for x in inputs)])
    for name, a, b in zip(("out", "dq", "dk", "dv"), *runs, strict=True):
        assert a is not None, f"{name} of {case}: there is none"
        assert b is not None, f"{name} of {case}: there is none in the second run"
        assert same_bits(a.detach(), b.detach()), f"{name} of {case}: two runs have different bits"


def check_refused(case: Case, stage: Stage) -> None:
    """What a class does not serve raises NotImplementedError, where it can be known first, on every rank."""
    group, seed = group_of(case)
    if seed < 0:
        return
    try:
        handler = make_handler(case, group)
    except NotImplementedError:
        assert stage == "construction", f"refused at construction, served there by the capability table: {case}"
        return
    assert stage == "call", f"constructed, and not served by the capability table: {case}"
    try:
        _computed(case, handler, draw(case, seed), seed)
    except NotImplementedError:
        return
    raise AssertionError(f"computed, and not served by the capability table: {case}")


def hold_all(law: Callable[[Case], None], plan: Sequence[tuple[Case, Stage | None]], lenient: bool) -> list[str]:
    """Hold many cases to a law, or to being refused, in one trip to the ranks.

    Args:
        law: one of this module's.
        plan: cases, each with the stage at which it must be refused; None for one that is served.
        lenient: a served case may be refused nonetheless, by a class that has no table of what it serves.

    Returns:
        The refusals of served cases, in words.

    Raises:
        AssertionError: naming the law and the case.
    """
    refusals = []
    for case, stage in plan:
        name = law.__name__ if stage is None else check_refused.__name__
        try:
            if stage is None:
                law(case)
            else:
                check_refused(case, stage)
        except Exception as error:
            if not (lenient and isinstance(error, NotImplementedError)):
                raise AssertionError(f"the law {name} does not hold for case {case}") from error
            refusals.append(f"{case}: {error}")
    return refusals


def _rows(handler: ContextParallelHandler, stream: str) -> int:
    """Local rows of a stream."""
    return handler.num_local_tokens if stream == "q" else handler.kv_num_local_tokens


def check_round_trip(case: Case) -> None:
    """``combine(dispatch(x))`` has the bits of x, for any dtype, dim and strides; shares are level."""
    group, seed = group_of(case)
    if seed < 0:
        return
    handler = make_handler(case, group)
    for stream in case.streams:
        rows, local_rows = documents_of(case, stream).num_tokens, _rows(handler, stream)
        if case.layout_of(stream) in LEVEL_LAYOUTS:
            assert local_rows == -(-rows // case.cp_size), f"shares are not level: {case}"
        for x in _of_every_kind(rows, seed):
            for dim in range(x.dim()):
                moved = x.movedim(0, dim)
                for seq_dim in (dim, dim - x.dim()):
                    local = handler.dispatch(moved, seq_dim, stream=stream)
                    assert local.shape[dim] == local_rows, f"dispatch gives {local.shape[dim]} rows: {case}"
                    back = handler.combine(local, seq_dim, stream=stream)
                    assert (back.dtype, back.shape) == (x.dtype, moved.shape), f"kind of a round trip: {case}"
                    assert same_bits(back, moved), f"round trip of {x.dtype} in dim {seq_dim}: {case}"
        held = handler.combine(handler.dispatch(torch.ones(rows), 0, stream=stream), 0, stream=stream)
        assert held.sum() == rows, f"tokens lost or held twice: {case}"


def _of_every_kind(rows: int, seed: int) -> list[Tensor]:
    """Global tensors ``[S, ...]`` of many dtypes, shapes, strides and special values."""
    generator = torch.Generator().manual_seed(seed)
    special = torch.randn(rows, 3, generator=generator)
    special.view(-1)[::5] = float("nan")
    special.view(-1)[1::5] = -0.0
    special.view(-1)[2::5] = float("inf")
    return [
        special,
        special.to(torch.bfloat16),
        torch.randint(-(2**62), 2**62, (rows, 2), generator=generator),
        torch.rand(rows, 2, 2, generator=generator) > 0.5,
        torch.randn(rows, 2, generator=generator, dtype=torch.complex64),
        torch.randn(rows, 2, generator=generator).to(torch.float8_e4m3fn),
        torch.randint(0, 2**16, (rows,), generator=generator).to(torch.uint16),
        torch.randn(rows, 1, 1, generator=generator).expand(rows, 2, 5),
        torch.arange(rows),
    ]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype and shape hold the same bytes, NaN and signed zeros included."""
    if a.numel() == 0:
        return True
    a, b = (x.clone(memory_format=torch.contiguous_format).flatten() for x in (a, b))  # a size-1 dim keeps any stride
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def check_gradients_of_movement(case: Case) -> None:
    """Backward of dispatch is the full gradient on every rank, or its own part; combine's three conventions."""
    group, seed = group_of(case)
    if seed < 0:
        return
    handler = make_handler(case, group)
    parts = handler.effective_cp_size
    for stream in case.streams:
        rows = documents_of(case, stream).num_tokens
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, rows, 3, generator=generator, dtype=torch.float64)
        grad = torch.randn(2, rows, 3, generator=generator, dtype=torch.float64)
        leaf = x.clone().requires_grad_()
        handler.dispatch(leaf, 1, stream=stream).backward(
            handler.dispatch(grad, 1, pad_value=float("nan"), stream=stream)
        )
        assert torch.equal(_grad(leaf), grad), f"gradient of dispatch: {case}"
        _check_partial(case, handler, stream, x, grad)
        for convention, factor in (("replicated", 1.0), ("scaled", float(parts))):
            local = handler.dispatch(x, 1, stream=stream).clone().requires_grad_()
            handler.combine(local, -2, grad=convention, stream=stream).backward(grad)  # type: ignore[arg-type]
            wanted = handler.dispatch(grad * factor, 1, stream=stream)
            assert torch.equal(_grad(local), wanted), f"gradient of combine, {convention}: {case}"
        local = handler.dispatch(x, 1, stream=stream).clone().requires_grad_()
        handler.combine(local, 1, grad="sum", stream=stream).backward(grad * (1 + handler.cp_rank))
        everyone = case.cp_size * (case.cp_size + 1) // 2 if handler.sequence_sharded else 1 + handler.cp_rank
        wanted = handler.dispatch(grad * everyone, 1, stream=stream)
        assert_close(_grad(local), wanted, what=f"gradient of combine, sum: {case}")


def _check_partial(case: Case, handler: ContextParallelHandler, stream: str, x: Tensor, grad: Tensor) -> None:
    """A rank's part of the gradient of dispatch: that of its own rows, zeros elsewhere."""
    leaf, tokens = x.clone().requires_grad_(), torch.arange(x.shape[1])
    handler.dispatch(leaf, 1, grad="partial", stream=stream).backward(
        handler.dispatch(grad, 1, pad_value=float("nan"), stream=stream)
    )
    own = torch.isin(tokens, handler.dispatch(tokens, 0, pad_value=-1, stream=stream))
    wanted = torch.where(own[None, :, None], grad, 0.0)
    assert torch.equal(_grad(leaf), wanted), f"partial gradient of dispatch: {case}"


def _grad(leaf: Tensor) -> Tensor:
    """A leaf's gradient, which must be there."""
    assert leaf.grad is not None, "no gradient"
    return leaf.grad


def check_roll(case: Case) -> None:
    """Rolls of every shape, dtype and shift equal the loop over documents; the sum is local; gradients flow."""
    group, seed = group_of(case)
    if seed < 0:
        return
    handler = make_handler(case, group)
    for stream in case.streams:
        law = _Rolls(case, handler, stream)
        law.check_values(torch.Generator().manual_seed(seed))
        law.check_rare_dtypes(torch.Generator().manual_seed(seed))
        law.check_several(torch.Generator().manual_seed(seed))
        law.check_gradient(torch.Generator().manual_seed(seed))


class _Rolls(NamedTuple):
    """The law of rolls, on one stream."""

    case: Case
    handler: ContextParallelHandler
    stream: str

    @property
    def sizes(self) -> tuple[int, int]:
        """Rows of the batch, and global tokens."""
        return len(self.case.batch.real or "xx"), documents_of(self.case, self.stream).num_tokens

    def expected(self, x: Tensor, shift: int, dim: int, fill: float = 0) -> Tensor:
        """This rank's rows of the rolled global tensor."""
        documents, valid = documents_of(self.case, self.stream), valid_tokens(self.case, self.stream)
        whole = rolled_reference(self.case, x, shift, dim % x.dim(), fill, documents, valid)
        return self.handler.dispatch(whole, dim, pad_value=fill, stream=self.stream)

    def rolled(self, x: Tensor, shift: int | list[int], dim: int, **options: Any) -> tuple[Tensor, Tensor | None]:
        """A local tensor rolled by the handler."""
        rolled, total = self.handler.roll_tensor(x, shift, dim, stream=self.stream, **options)
        assert rolled is not None, f"roll gives nothing: {self.case}"
        return rolled, total

    def check_values(self, generator: torch.Generator) -> None:
        """Values and sums."""
        rows = self.sizes[1]
        for x, dim in self._tensors(generator):
            for shift in (-1, -2, 1, -rows, 5):
                for fill in (0, -100) if x.dtype == torch.int64 else (0,):
                    local = self.handler.dispatch(x, dim, stream=self.stream)
                    actual, total = self.rolled(local, shift, dim, fill_value=fill)
                    wanted = self.expected(x, shift, dim, fill)
                    assert same_bits(actual, wanted), f"roll by {shift} of {x.dtype} {list(x.shape)}: {self.case}"
                    assert total is not None, f"no sum of a roll: {self.case}"
                    assert torch.equal(total, wanted.contiguous().sum()), f"sum of a roll by {shift}: {self.case}"

    def check_several(self, generator: torch.Generator) -> None:
        """Several shifts at once are each of them, in a dim of their own in front, sums and gradients too."""
        shifts = [-1, 3, 0, -2]
        for x, dim in self._tensors(generator):
            local = self.handler.dispatch(x, dim, stream=self.stream)
            actual, totals = self.rolled(local, shifts, dim)
            wanted = torch.stack([self.expected(x, shift, dim) for shift in shifts])
            assert same_bits(actual, wanted), f"rolls by {shifts} of {x.dtype} {list(x.shape)}: {self.case}"
            sums = torch.stack([one.contiguous().sum() for one in wanted])
            assert totals is not None, f"no sums of rolls: {self.case}"
            assert torch.equal(totals, sums), f"sums of rolls by {shifts}: {self.case}"
        x, *grads = (torch.randn(*self.sizes, 2, generator=generator, dtype=torch.float64) for _ in range(5))
        leaf = self.handler.dispatch(x, 1, stream=self.stream).clone().requires_grad_()
        rolled, _ = self.rolled(leaf, shifts, 1, return_sum=False)
        rolled.backward(torch.stack([self.handler.dispatch(grad, 1, stream=self.stream) for grad in grads]))
        back = sum(self.expected(grad, -shift, 1) for grad, shift in zip(grads, shifts, strict=True))
        torch.testing.assert_close(_grad(leaf), back, rtol=1e-12, atol=1e-12)

    def _tensors(self, generator: torch.Generator) -> Iterator[tuple[Tensor, int]]:
        """Global tensors and their sequence dims; without padding also such as have no batch dim."""
        batch, rows = self.sizes
        integers = torch.randint(1, 100, (batch, rows), generator=generator)
        yield integers, 1
        yield integers.T.contiguous(), 0
        yield torch.rand(batch, rows, generator=generator) > 0.5, 1
        yield torch.randn(batch, rows, 3, generator=generator, dtype=torch.float64), 1
        yield torch.randn(rows, batch, 3, generator=generator, dtype=torch.float32), 0
        yield torch.randn(batch, rows, 1, generator=generator).expand(batch, rows, 4), -2
        if self.case.batch.real is None:
            yield integers[0], -1
            yield integers[0].to(torch.float16), 0
            yield torch.randn(rows, 3, generator=generator), 0

    def check_rare_dtypes(self, generator: torch.Generator) -> None:
        """Dtypes that torch stores and can do little else with."""
        integers = torch.randint(1, 100, self.sizes, generator=generator)
        for dtype in (torch.float8_e4m3fn, torch.uint16):
            local = self.handler.dispatch(integers.to(dtype), 1, stream=self.stream)
            moved, _ = self.rolled(local, -1, 1, return_sum=False)
            wanted = self.expected(integers, -1, 1).to(dtype)
            assert same_bits(moved, wanted), f"roll of {dtype}: {self.case}"

    def check_gradient(self, generator: torch.Generator) -> None:
        """The gradient rolls back."""
        x, grad = (torch.randn(*self.sizes, 2, generator=generator, dtype=torch.float64) for _ in range(2))
        leaf = self.handler.dispatch(x, 1, stream=self.stream).clone().requires_grad_()
        rolled, total = self.rolled(leaf, -2, 1, return_sum=False)
        assert total is None, f"a sum that was not asked for: {self.case}"
        rolled.backward(self.handler.dispatch(grad, 1, stream=self.stream))
        assert torch.equal(_grad(leaf), self.expected(grad, 2, 1)), f"gradient of a roll: {self.case}"


def rolled_reference(
    case: Case, x: Tensor, shift: int, dim: int, fill: float, documents: Documents, valid: Tensor
) -> Tensor:
    """A global tensor rolled by the definition; row of the batch by row where each has padding of its own."""
    if case.batch.real is None or case.qkv_format == "thd":
        return dense_roll(x, documents, shift, dim, fill)
    rows = x.movedim(1 - dim, 0)
    rolled = []
    for row, real in zip(rows, valid, strict=True):
        runs = Documents.from_attention_mask(real.unsqueeze(0)).runs
        rolled.append(dense_roll(row, Documents(documents.offsets, runs), shift, 0, fill))
    return torch.stack(rolled).movedim(0, 1 - dim)


def check_rope(case: Case) -> None:
    """Rope on local rows equals the dispatched rope of the whole, both pairings, partial, scaled, and its inverse."""
    group, seed = group_of(case)
    if seed < 0:
        return
    handler, data = make_handler(case, group), draw(replace(case, head_dim=12), seed)
    modes: tuple[FreqsMode, ...] = ("per_document", "packed")
    for mode in modes:
        for stream in case.streams:
            x = data.query if stream == "q" else data.key
            for rotary in (12, 8):
                for interleaved in (False, True):
                    _check_rope(case, handler, x, (mode, stream), rotary=rotary, interleaved=interleaved)


def _check_rope(
    case: Case,
    handler: ContextParallelHandler,
    x: Tensor,
    kind: tuple[FreqsMode, str],
    *,
    rotary: int,
    interleaved: bool,
) -> None:
    """One table in its three forms."""
    (mode, stream), dim = kind, handler.seq_dim
    documents = documents_of(case, stream)
    length = handler.get_rotary_seq_len(freqs_mode=mode, stream=stream)
    assert length == (documents.num_tokens if mode == "packed" else documents.max_length), f"rows of a table: {case}"
    inverse_frequencies = 0.7 ** torch.arange(rotary // 2, dtype=torch.float64)
    angles = _positions(documents)[:, None] * inverse_frequencies
    expected = dense_rope(x, angles, seq_dim=dim, interleaved=interleaved)
    table = torch.arange(length)[:, None] * inverse_frequencies if mode == "per_document" else angles
    whole = table.repeat_interleave(2, -1) if interleaved else torch.cat([table, table], -1)
    for freqs in (whole, whole[:, None, None], (whole.cos(), whole.sin())):
        local = handler.get_emb_on_this_cp_rank(freqs, freqs_mode=mode, stream=stream)
        turned = handler.rope(handler.dispatch(x, dim, stream=stream), local, interleaved=interleaved, stream=stream)
        wanted = handler.dispatch(expected, dim, stream=stream)
        assert_close(turned, wanted, dtype=torch.float64, what=f"rope of {case}")
        options: dict[str, Any] = {"interleaved": interleaved, "mscale": 1.3, "stream": stream}
        again = handler.rope(handler.rope(turned, local, **options), local, inverse=True, **options)
        assert_close(again, turned, dtype=torch.float64, what=f"rope and its inverse of {case}")


def _positions(documents: Documents) -> Tensor:
    """``[S]`` position of each token in its document."""
    return torch.cat([torch.arange(n) for n in documents.lengths.tolist()] + [torch.arange(0)])


def check_facts(case: Case) -> None:
    """Positions, validity, sizes and fragments describe the rows that dispatch gives."""
    group, seed = group_of(case)
    if seed < 0:
        return
    handler = make_handler(case, group)
    assert (handler.cp_size, handler.cp_rank) == (case.cp_size, dist.get_rank(group)), f"size and rank: {case}"
    if case.layout is not None:
        replicated = case.layout_of("q") == "replicated"
        assert handler.sequence_sharded == (case.cp_size > 1 and not replicated), f"sequence_sharded: {case}"
    parts = case.cp_size if handler.sequence_sharded else 1
    assert handler.effective_cp_size == parts, f"effective_cp_size: {case}"
    assert handler.is_cross_attention == case.is_cross, f"is_cross_attention: {case}"
    for stream in ("q", "kv"):  # in self attention the facts of the keys are those of the queries
        own = stream if case.is_cross else "q"
        prefix = "" if stream == "q" else "kv_"
        positions, valid = _positions(documents_of(case, stream)), valid_tokens(case, stream)
        wanted = handler.dispatch(positions, 0, stream=own)
        assert torch.equal(getattr(handler, f"{prefix}position_ids"), wanted), f"{prefix}position_ids: {case}"
        wanted = handler.dispatch(valid, valid.dim() - 1, pad_value=False, stream=own)
        assert torch.equal(getattr(handler, f"{prefix}valid_mask"), wanted), f"{prefix}valid_mask: {case}"
    for stream in case.streams:
        _check_fragments(case, handler, stream)


def _check_fragments(case: Case, handler: ContextParallelHandler, stream: str) -> None:
    """The fragments name the tokens that dispatch gives, each inside its document."""
    documents, fragments = documents_of(case, stream), handler.fragments if stream == "q" else handler.kv_fragments
    tokens = handler.dispatch(torch.arange(documents.num_tokens), 0, pad_value=-1, stream=stream)
    rebuilt = torch.full((_rows(handler, stream),), -1)
    for document, start, length, stride, local in zip(*(column.tolist() for column in fragments), strict=True):
        first = int(documents.offsets[document]) + start
        rebuilt[local : local + length] = first + stride * torch.arange(length)
        last = first + stride * (length - 1)
        assert last < documents.offsets[document + 1], f"a fragment leaves its document: {case}"
    assert torch.equal(rebuilt, tokens), f"fragments: {case}"
