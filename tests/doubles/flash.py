"""What every flash kernel computes, densely, a sequence at a time, rounded where the originals round."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """One call of a flash kernel.

    Attributes:
        causal: rows see keys up to the diagonal, which ends at the last row and the last key (bottom right).
        left: keys before the diagonal that are seen; -1 for all.
        right: keys after it.
        scale: factor on the scores.
        softcap: capped scores stay below this; 0 for none.
        top_left: the diagonal starts at the first row and the first key instead.
    """

    causal: bool
    left: int
    right: int
    scale: float
    softcap: float = 0.0
    top_left: bool = False

    def seen(self, rows: int, keys: int) -> Tensor:
        """``[rows, keys]`` bool."""
        shift = 0 if self.top_left else keys - rows
        apart = torch.arange(keys) - torch.arange(rows).unsqueeze(1) - shift
        left, right = self.left, 0 if self.causal else self.right
        seen = torch.ones(rows, keys, dtype=torch.bool)
        if left >= 0:
            seen &= apart >= -left
        if right >= 0:
            seen &= apart <= right
        return seen


def checked(q: Tensor, k: Tensor, v: Tensor, *, dtypes: tuple[torch.dtype, ...], heads_equal: bool = False) -> None:
    """What the originals refuse, in words of their own."""
    assert q.dtype in dtypes, f"only {dtypes} are supported, got {q.dtype}"
    assert k.dtype == v.dtype == q.dtype, "query, key and value must have one dtype"
    assert all(x.stride(-1) == 1 for x in (q, k, v)), "tensors must have contiguous last dimension"
    assert q.shape[-1] == k.shape[-1] == v.shape[-1], "one head dim"
    assert q.shape[-1] % 8 == 0, "head_size must be a multiple of 8"
    assert q.shape[-1] <= 256, "FlashAttention only supports head dimension at most 256"
    assert q.shape[-2] % k.shape[-2] == 0, "heads of keys must divide heads of queries"
    assert not heads_equal or q.shape[-2] == k.shape[-2], "as many key heads as query heads"


ROOM = False
"""Whether offsets may have room: empty sequences, rows after the last one, a longest length that none has.

The originals take such; what the library passes has none, but for captured batches."""


def offsets_checked(starts: Tensor, total: int, longest: int) -> None:
    """Offsets as the originals want them: int32, contiguous, over all rows, with the longest length told."""
    assert starts.dtype == torch.int32, "cu_seqlens must be int32"
    assert starts.is_contiguous()
    lengths = starts.diff()
    assert int(starts[0]) == 0
    if ROOM:
        assert int(starts[-1]) <= total
        assert 0 <= int(lengths.min()) <= int(lengths.max()) <= longest
        return
    assert int(starts[-1]) == total, f"offsets end at {int(starts[-1])}, there are {total} rows"
    assert int(lengths.min()) > 0, "an empty sequence"
    assert int(lengths.max()) == longest, f"longest {longest}, is {int(lengths.max())}"


def sequences(starts_q: Tensor, starts_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and keys of each packed sequence."""
    ends = zip(starts_q.tolist(), starts_q.tolist()[1:], starts_k.tolist(), starts_k.tolist()[1:], strict=False)
    for q0, q1, k0, k1 in ends:
        assert (q0 < q1) == (k0 < k1), "rows that see no key, or keys that no row sees"
        if q0 < q1:
            yield slice(q0, q1), slice(k0, k1)


def _scores(q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor | float]:
    """``[G, N / G, rows, keys]`` and the derivative of each score by ``q.k``."""
    queries = q.float().unflatten(1, (k.shape[1], -1)).movedim(0, 2)
    scores = queries @ k.float().movedim(0, 1).unsqueeze(1).mT * call.scale
    slope: Tensor | float = call.scale
    if call.softcap:
        bent = torch.tanh(scores / call.softcap)
        scores, slope = bent * call.softcap, (1 - bent * bent) * call.scale
    return scores.masked_fill(~call.seen(*scores.shape[-2:]), float("-inf")), slope


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """``out [rows, N, D]`` in the inputs' dtype and ``lse [N, rows]`` in float32, of one sequence.

    Weights are rounded to the inputs' dtype before they meet the values, as tensor cores take them.
    """
    scores, _ = _scores(q, k, call)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    out = weights.to(q.dtype).float() @ v.float().movedim(0, 1).unsqueeze(1) / weights.sum(-1, keepdim=True)
    return out.movedim(2, 0).flatten(1, 2).to(q.dtype), lse.flatten(0, 1)


def backward(
    grad_out: Tensor, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, call: Call, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one sequence from an outside output ``[rows, N, D]`` and ``lse [N, rows]``; the inputs' dtype."""
    q, k, v = qkv
    groups = k.shape[1]
    scores, slope = _scores(q, k, call)
    grads = grad_out.float().unflatten(1, (groups, -1)).movedim(0, 2)
    delta = (grad_out.float() * out.float()).sum(-1).t()
    if grad_lse is not None:
        delta = delta - grad_lse
    weights = torch.exp(scores - lse.unflatten(0, (groups, -1)).unsqueeze(-1))
    grad_weights = grads @ v.float().movedim(0, 1).unsqueeze(1).mT
    inner = (weights * (grad_weights - delta.unflatten(0, (groups, -1)).unsqueeze(-1)) * slope).to(q.dtype).float()
    queries = q.float().unflatten(1, (groups, -1)).movedim(0, 2)
    dq = (inner @ k.float().movedim(0, 1).unsqueeze(1)).movedim(2, 0).flatten(1, 2)
    # Per query head in the inputs' dtype, then summed, as the originals do for grouped heads.
    dk = (inner.mT @ queries).to(q.dtype).sum(1, dtype=torch.float32).movedim(0, 1)
    dv = (weights.to(q.dtype).float().mT @ grads).to(q.dtype).sum(1, dtype=torch.float32).movedim(0, 1)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _unwritten(x: Tensor) -> Tensor:
    """What memory may hold where no sequence is."""
    return torch.full_like(x, float("nan"), memory_format=torch.contiguous_format)


def packed_forward(q: Tensor, k: Tensor, v: Tensor, starts: tuple[Tensor, Tensor], call: Call) -> tuple[Tensor, Tensor]:
    """``out [rows, N, D]`` and ``lse [N, rows]`` of all sequences."""
    out, lse = _unwritten(q), q.new_full((q.shape[1], len(q)), float("nan"), dtype=torch.float32)
    for rows, keys in sequences(*starts):
        out[rows], lse[:, rows] = forward(q[rows], k[keys], v[keys], call)
    return out, lse


def packed_backward(
    grad_out: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    starts: tuple[Tensor, Tensor],
    call: Call,
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of all sequences."""
    grads = tuple(_unwritten(x) for x in qkv)
    q, k, v = qkv
    for rows, keys in sequences(*starts):
        of_lse = None if grad_lse is None else grad_lse[:, rows]
        parts = backward(grad_out[rows], (q[rows], k[keys], v[keys]), out[rows], lse[:, rows], call, of_lse)
        for grad, where, part in zip(grads, (rows, keys, keys), parts, strict=True):
            grad[where] = part
    dq, dk, dv = grads
    return dq, dk, dv


def dense_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """``out [B, rows, N, D]`` and ``lse [B, N, rows]``."""
    parts = [forward(*row, call) for row in zip(q, k, v, strict=True)]
    return torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])


def dense_backward(
    grad_out: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    call: Call,
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of all rows of a batch."""
    of_lse = [None] * len(out) if grad_lse is None else list(grad_lse)
    rows = zip(grad_out, *qkv, out, lse, of_lse, strict=True)
    parts = [backward(g, (q, k, v), o, s, call, of) for g, q, k, v, o, s, of in rows]
    dq, dk, dv = (torch.stack(side) for side in zip(*parts, strict=True))
    return dq, dk, dv
