"""What runs on the ranks: each law of the contract against the dense float64 reference.

Ranks of one context-parallel group draw the same global data from a seed and cut it, so that each holds other rows;
groups that run at the same time draw different data.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cphandler import CPConfig, Layout, get_cp_handler_cls
from cphandler.handler import ContextParallelHandler
from cphandler.mask import Causal, Mask
from cphandler.sequence import Documents
from cphandler.testing import (
    assert_close,
    dense_gradients,
    dense_roll,
    dense_rope,
    partition_group,
    visible_pairs,
)

PARTITIONS = {
    1: ((0,), (1,), (2,), (3,)),
    2: ((0, 2), (1, 3)),  # two groups at once, neither consecutive
    3: ((1, 2, 3),),  # without global rank 0
    4: ((0, 1, 2, 3),),
    8: (tuple(range(8)),),
}
"""How the ranks of a pool are divided for each cp size."""


@dataclass(frozen=True)
class Batch:
    """A global batch: documents of a packed stream, or rows of a dense batch with or without padding."""

    lengths: tuple[int, ...] = (13, 3, 6, 1, 9)
    padded: tuple[int, ...] | None = None
    real: tuple[str, ...] | None = None  # dense: one string per row, "x" a real token, "." padding
    rows: int = 2

    @property
    def name(self) -> str:
        if self.real is not None:
            return "|".join(self.real)
        return f"{list(self.lengths)}" + (f" in {list(self.padded)}" if self.padded else "")


@dataclass(frozen=True)
class Case:
    """One combination to hold to the laws."""

    backend: str = "ring"
    cp_size: int = 2
    qkv_format: str = "thd"
    layout: str | Layout | None = None
    mask: Mask = field(default_factory=Causal)
    batch: Batch = field(default_factory=Batch)
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 8
    dtype: torch.dtype = torch.float64
    kernel: str = "auto"
    lse: bool = True

    def __str__(self) -> str:
        layout = self.layout or "default"
        kind = f"{self.backend} cp{self.cp_size} {self.qkv_format} {layout} {self.mask} heads {self.heads} {self.dtype}"
        return f"{kind} {self.batch.name}"


def offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()] if lengths else [0], dtype=torch.int32)


def metadata(case: Case) -> dict[str, Any]:
    """The handler's arguments that describe the batch."""
    batch = case.batch
    if case.qkv_format == "thd":
        padded = offsets(batch.padded) if batch.padded else None
        return {"cu_seqlens_q": offsets(batch.lengths), "cu_seqlens_q_padded": padded}
    if batch.real is None:
        return {"max_seqlen_q": sum(batch.lengths)}
    return {"max_seqlen_q": len(batch.real[0]), "key_padding_mask": real_tokens(batch)}


def real_tokens(batch: Batch) -> Tensor:
    return torch.tensor([[c == "x" for c in row] for row in batch.real or ()])


def documents_of(case: Case) -> Documents:
    """The packed stream the reference compares by: for dense batches one document of length S."""
    if case.qkv_format == "thd":
        arguments = metadata(case)
        return Documents.from_cu_seqlens(arguments["cu_seqlens_q"], arguments["cu_seqlens_q_padded"])
    return Documents.dense(metadata(case)["max_seqlen_q"])


def visible(case: Case) -> Tensor:
    """Who sees whom: ``[S, S]``, or ``[B, S, S]`` with a key-padding mask."""
    documents = documents_of(case)
    if case.qkv_format == "thd" or case.batch.real is None:
        return visible_pairs(case.mask, documents)
    return torch.stack([visible_pairs(case.mask, documents, row) for row in real_tokens(case.batch)])


def valid_tokens(case: Case) -> Tensor:
    """``[S]`` or ``[B, S]`` bool: real tokens."""
    documents = documents_of(case)
    if case.batch.real is not None and case.qkv_format != "thd":
        return real_tokens(case.batch)
    valid = torch.zeros(documents.num_tokens, dtype=torch.bool)
    for start, stop in documents.runs.tolist():
        valid[start:stop] = True
    return valid


def spread(mask: Tensor, like: Tensor, qkv_format: str) -> Tensor:
    """A ``[S]`` or ``[B, S]`` mask in the shape of a tensor in a format."""
    if mask.dim() == 2 and qkv_format == "sbhd":
        mask = mask.T
    if mask.dim() == 1 and qkv_format != "thd":
        mask = mask.unsqueeze(1 if qkv_format == "sbhd" else 0)
    return mask.reshape(*mask.shape, *[1] * (like.dim() - mask.dim())).expand_as(like)


def group_of(case: Case) -> tuple[Any, int]:
    """This rank's group and a seed that its group alone has; ``(None, -1)`` for a rank that sits out."""
    parts = PARTITIONS[case.cp_size]
    group = partition_group(parts)
    mine = next((i for i, part in enumerate(parts) if dist.get_rank() in part), -1)
    return group, 1000 * mine + case.cp_size


def make_handler(case: Case, group: Any, **arguments: Any) -> ContextParallelHandler:
    handler_cls = get_cp_handler_cls(case.backend)
    settings: dict[str, Any] = {"mask": case.mask, "layout": case.layout, "config": CPConfig(kernel=case.kernel)}
    described = {**metadata(case), **settings, **arguments}
    return handler_cls(cp_group=group, qkv_format=case.qkv_format, **described)  # type: ignore[arg-type]


def draw(case: Case, seed: int) -> list[Tensor]:
    """Global query, key, value, output gradient and log-sum-exp gradient."""
    generator = torch.Generator().manual_seed(seed)
    rows = documents_of(case).num_tokens
    batch = len(case.batch.real) if case.batch.real is not None else case.batch.rows
    lead = {"thd": (rows,), "sbhd": (rows, batch), "bshd": (batch, rows)}[case.qkv_format]
    n, g = case.heads
    shapes = [(*lead, h, case.head_dim) for h in (n, g, g, n)] + [(*lead, n)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype) for shape in shapes]


def check_attention(case: Case) -> None:
    """``core_attn``, forward and backward, on local rows; pad and padding rows hold NaN and must give exact zeros."""
    group, seed = group_of(case)
    if seed < 0:
        return
    q, k, v, grad_out, grad_lse = draw(case, seed)
    seen = visible(case)
    expected = dense_gradients((q, k, v), seen, grad_out, grad_lse if case.lse else None, qkv_format=case.qkv_format)
    handler = make_handler(case, group)
    dim = handler.seq_dim
    valid = valid_tokens(case)

    def local(x: Tensor) -> Tensor:
        poisoned = x.masked_fill(~spread(valid, x, case.qkv_format), float("nan"))
        return handler.dispatch(poisoned, dim, pad_value=float("nan"))

    inputs = [local(x).requires_grad_() for x in (q, k, v)]
    result = handler.core_attn(None, *inputs, return_lse=case.lse)
    out, lse = (result.out, result.lse) if case.lse else (result, None)
    roots, grads = ([out, lse], [local(grad_out), local(grad_lse)]) if case.lse else ([out], [local(grad_out)])
    torch.autograd.backward(roots, grads)
    actual = [out, *(x.grad for x in inputs)]
    wanted = [expected[0], *expected[2]]
    for name, a, e in zip(("out", "dq", "dk", "dv"), actual, wanted, strict=True):
        assert a is not None
        assert_close(a, handler.dispatch(e, dim), dtype=case.dtype, what=f"{name} of {case}")
        pads = ~spread(handler.valid_mask, a, case.qkv_format)
        assert (a[pads] == 0).all(), f"{name} of {case}: padding rows are not zero"
        assert a.dtype == case.dtype
    if lse is not None:
        assert_close(
            lse, handler.dispatch(expected[1], dim, pad_value=float("-inf")), dtype=case.dtype, what=f"lse of {case}"
        )


def check_all(cases: list[Case]) -> None:
    """Hold many cases to the attention law in one trip to the ranks."""
    for case in cases:
        try:
            check_attention(case)
        except Exception as error:
            raise AssertionError(f"case {case}") from error


def check_round_trip(case: Case) -> None:
    """``combine(dispatch(x))`` has the bits of x, for any dtype, dim and strides; shares are level."""
    group, seed = group_of(case)
    if seed < 0:
        return
    handler = make_handler(case, group)
    rows = documents_of(case).num_tokens
    generator = torch.Generator().manual_seed(seed)
    special = torch.randn(rows, 3, generator=generator)
    special.view(-1)[::5] = float("nan")
    special.view(-1)[1::5] = -0.0
    special.view(-1)[2::5] = float("inf")
    tensors = [
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
    for x in tensors:
        for dim in range(x.dim()):
            moved = x.movedim(0, dim)
            for seq_dim in (dim, dim - x.dim()):
                local = handler.dispatch(moved, seq_dim)
                assert local.shape[dim] == handler.num_local_tokens == -(-rows // case.cp_size)
                back = handler.combine(local, seq_dim)
                assert back.dtype == x.dtype
                assert back.shape == moved.shape
                assert same_bits(back, moved), f"round trip of {x.dtype} in dim {seq_dim}: {case}"
    held = handler.combine(handler.dispatch(torch.ones(rows), 0), 0)
    assert held.sum() == rows


def same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = a.contiguous(), b.contiguous()
    return a.numel() == 0 or torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def check_gradients_of_movement(case: Case) -> None:
    """Backward of dispatch is the full gradient on every rank; combine's three conventions."""
    group, seed = group_of(case)
    if seed < 0:
        return
    handler = make_handler(case, group)
    rows = documents_of(case).num_tokens
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, rows, 3, generator=generator, dtype=torch.float64)
    grad = torch.randn(2, rows, 3, generator=generator, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    handler.dispatch(leaf, 1).backward(handler.dispatch(grad, 1, pad_value=float("nan")))
    assert torch.equal(leaf.grad, grad)
    scales = {"replicated": 1.0, "scaled": float(case.cp_size)}
    for convention, factor in scales.items():
        local = handler.dispatch(x, 1).clone().requires_grad_()
        handler.combine(local, -2, grad=convention).backward(grad)  # type: ignore[arg-type]
        assert torch.equal(local.grad, handler.dispatch(grad * factor, 1) if case.cp_size > 1 else grad)
    local = handler.dispatch(x, 1).clone().requires_grad_()
    own = grad * (1 + handler.cp_rank)
    handler.combine(local, 1, grad="sum").backward(own)
    total = grad * (case.cp_size * (case.cp_size + 1) // 2)
    assert_close(local.grad, handler.dispatch(total, 1), what="grad of combine, sum")


def check_roll(case: Case) -> None:
    """Rolls of every shape, dtype and shift equal the loop over documents; the sum is local; gradients flow."""
    group, seed = group_of(case)
    if seed < 0:
        return
    handler = make_handler(case, group)
    documents, valid = documents_of(case), valid_tokens(case)
    rows, batch = documents.num_tokens, len(case.batch.real) if case.batch.real else 2
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(1, 100, (batch, rows), generator=generator)
    tensors: list[tuple[Tensor, int]] = [
        (integers, 1),
        (integers.T.contiguous(), 0),
        (torch.rand(batch, rows, generator=generator) > 0.5, 1),
        (torch.randn(batch, rows, 3, generator=generator, dtype=torch.float64), 1),
        (torch.randn(rows, batch, 3, generator=generator, dtype=torch.float32), 0),
        (torch.randn(batch, rows, 1, generator=generator).expand(batch, rows, 4), -2),
    ]
    if case.batch.real is None:
        tensors += [
            (integers[0], -1),
            (integers[0].to(torch.float16), 0),
            (torch.randn(rows, 3, generator=generator), 0),
        ]
    for x, dim in tensors:
        for shift in (-1, -2, 1, -rows, 5):
            for fill in (0, -100) if x.dtype == torch.int64 else (0,):
                expected = rolled_reference(case, x, shift, dim % x.dim(), fill, documents, valid)
                actual, total = handler.roll_tensor(handler.dispatch(x, dim), shift, dim, fill_value=fill)
                local = handler.dispatch(expected, dim, pad_value=fill)
                assert same_bits(actual, local), f"roll by {shift} of {x.dtype} {list(x.shape)}: {case}"
                assert torch.equal(total, local.contiguous().sum())
    for dtype in (torch.float8_e4m3fn, torch.uint16):  # torch stores these and can do little else with them
        rare = integers.to(dtype)
        moved, _ = handler.roll_tensor(handler.dispatch(rare, 1), -1, 1, return_sum=False)
        expected = rolled_reference(case, integers, -1, 1, 0, documents, valid)
        assert same_bits(moved, handler.dispatch(expected.to(dtype), 1)), f"roll of {dtype}: {case}"
    x = torch.randn(batch, rows, 2, generator=generator, dtype=torch.float64)
    grad = torch.randn(batch, rows, 2, generator=generator, dtype=torch.float64)
    leaf = handler.dispatch(x, 1).clone().requires_grad_()
    rolled, total = handler.roll_tensor(leaf, -2, 1, return_sum=False)
    assert total is None
    rolled.backward(handler.dispatch(grad, 1))
    wanted = rolled_reference(case, grad, 2, 1, 0, documents, valid)
    assert torch.equal(leaf.grad, handler.dispatch(wanted, 1)), f"gradient of a roll: {case}"


def rolled_reference(
    case: Case, x: Tensor, shift: int, dim: int, fill: float, documents: Documents, valid: Tensor
) -> Tensor:
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
    handler = make_handler(case, group)
    documents = documents_of(case)
    x = draw(replace(case, head_dim=12), seed)[0]
    dim = handler.seq_dim
    positions = torch.cat([torch.arange(n) for n in documents.lengths.tolist()] + [torch.arange(0)])
    for rotary in (12, 8):
        inverse_frequencies = 0.7 ** torch.arange(rotary // 2, dtype=torch.float64)
        angles = positions[:, None] * inverse_frequencies
        for interleaved in (False, True):
            expected = dense_rope(x, angles, seq_dim=dim, interleaved=interleaved)
            for mode in ("per_document", "packed"):
                length = handler.get_rotary_seq_len(freqs_mode=mode)  # type: ignore[arg-type]
                assert length == (documents.num_tokens if mode == "packed" else documents.max_length)
                table = torch.arange(length)[:, None] * inverse_frequencies if mode == "per_document" else angles
                double = table.repeat_interleave(2, -1) if interleaved else torch.cat([table, table], -1)
                whole = double.to(torch.float64)
                for freqs in (whole, whole[:, None, None], (whole.cos(), whole.sin())):
                    local = handler.get_emb_on_this_cp_rank(freqs, freqs_mode=mode)  # type: ignore[arg-type]
                    turned = handler.rope(handler.dispatch(x, dim), local, interleaved=interleaved)
                    assert_close(turned, handler.dispatch(expected, dim), dtype=torch.float64, what=f"rope of {case}")
                    options = {"interleaved": interleaved, "mscale": 1.3}
                    again = handler.rope(handler.rope(turned, local, **options), local, inverse=True, **options)
                    assert_close(again, turned, dtype=torch.float64, what="rope and its inverse")


def check_facts(case: Case) -> None:
    """Positions, validity, fragments and sizes describe the rows that dispatch gives."""
    group, seed = group_of(case)
    if seed < 0:
        return
    handler = make_handler(case, group)
    documents = documents_of(case)
    positions = torch.cat([torch.arange(n) for n in documents.lengths.tolist()] + [torch.arange(0)])
    tokens = handler.dispatch(torch.arange(documents.num_tokens), 0, pad_value=-1)
    assert torch.equal(handler.position_ids, handler.dispatch(positions, 0))
    valid = valid_tokens(case)
    assert torch.equal(handler.valid_mask, handler.dispatch(valid, valid.dim() - 1, pad_value=False))
    assert (handler.cp_size, handler.cp_rank) == (case.cp_size, dist.get_rank(group))
    assert handler.effective_cp_size == case.cp_size
    assert handler.sequence_sharded == (case.cp_size > 1)
    assert handler.comm_type == {"ulysses": "a2a", "local": "none"}.get(case.backend, case.backend)
    rebuilt = torch.full((handler.num_local_tokens,), -1)
    for document, start, length, stride, local in zip(*(c.tolist() for c in handler.fragments), strict=True):
        first = int(documents.offsets[document]) + start
        rebuilt[local : local + length] = first + stride * torch.arange(length)
        assert first + stride * (length - 1) < documents.offsets[document + 1]
    assert torch.equal(rebuilt, tokens)
    assert torch.equal(handler.kv_position_ids, handler.position_ids)  # type: ignore[attr-defined]
