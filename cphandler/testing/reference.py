"""The dense reference: what every backend must equal, written from the definitions and from nothing else.

No bands, layouts, plans or kernels are used here: visibility comes from comparing token indices, attention is a softmax
over a dense score matrix, rope is a product of complex numbers, a roll is a loop over documents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cphandler.mask import Bands, Causal, Full, Mask, SlidingWindow
from cphandler.sequence import Documents


def _allowed(mask: Mask, query: Tensor, key: Tensor) -> Tensor:
    """Whether a mask lets queries see keys, by global index, documents aside."""
    if isinstance(mask, Causal):
        return key <= query
    if isinstance(mask, Full):
        return torch.ones_like(query + key, dtype=torch.bool)
    if isinstance(mask, SlidingWindow):
        return (key >= query - mask.left) & (key <= query + mask.right)
    seen = torch.zeros_like(query + key, dtype=torch.bool)
    for q0, q1, k0, k1, lo, hi in mask.rows if isinstance(mask, Bands) else ():
        inside = (query >= q0) & (query < q1) & (key >= k0) & (key < k1)
        seen |= inside & (key - query >= lo) & (key - query <= hi)
    return seen


def visible_pairs(mask: Mask, documents: Documents, valid: Tensor | None = None) -> Tensor:
    """``[S, S]`` bool: whether query row i sees key row j.

    Args:
        mask: one of the library's masks.
        documents: the packed documents; their physical offsets separate what may not mix.
        valid: ``[S]`` bool, real tokens; None takes those of ``documents``.

    Raises:
        TypeError: a mask this reference has no definition of.
    """
    if not isinstance(mask, (Causal, Full, SlidingWindow, Bands)):
        raise TypeError(f"no dense definition of {type(mask).__name__}")
    index = torch.arange(documents.num_tokens)
    seen = _allowed(mask, index[:, None], index[None])
    if not isinstance(mask, Bands):
        document = torch.zeros(documents.num_tokens, dtype=torch.int64)
        for i in range(documents.num_documents):
            document[documents.offsets[i] : documents.offsets[i + 1]] = i
        seen &= document[:, None] == document[None]
    if valid is None:
        valid = torch.zeros(documents.num_tokens, dtype=torch.bool)
        for start, stop in documents.runs.tolist():
            valid[start:stop] = True
    return seen & valid[:, None] & valid[None]


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, *, qkv_format: str, softmax_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention over a dense score matrix, in the dtype of the inputs; pass float64.

    Args:
        query: global ``[S, B, N, D]``, ``[B, S, N, D]`` or ``[T, N, D]``.
        key: the same with G heads.
        value: the same with G heads and head dim D_v.
        visible: ``[S, S]`` or ``[B, S, S]`` bool.
        qkv_format: order of dims.
        softmax_scale: factor on the scores; None is ``D ** -0.5``.

    Returns:
        ``out`` in the query's format, zero where a row sees nothing, and ``lse`` of its shape without the last dim,
        ``-inf`` there. Differentiable by autograd.
    """
    to_bnsd = {"sbhd": (1, 2, 0, 3), "bshd": (0, 2, 1, 3)}.get(qkv_format)
    q, k, v = (x.movedim(0, 1).unsqueeze(0) if to_bnsd is None else x.permute(to_bnsd) for x in (query, key, value))
    times = q.shape[1] // k.shape[1]
    k, v = (torch.stack([x] * times, dim=2).flatten(1, 2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    visible = (visible if visible.dim() == 3 else visible.unsqueeze(0)).unsqueeze(1)
    scores = (torch.einsum("bnsd,bntd->bnst", q, k) * scale).masked_fill(~visible, float("-inf"))
    some = visible.any(-1, keepdim=True)
    lse = torch.logsumexp(scores.masked_fill(~some, 0.0), dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).masked_fill(~visible, 0.0)
    out = torch.einsum("bnst,bntd->bnsd", weights, v)
    lse = lse.masked_fill(~some.squeeze(-1).expand_as(lse), float("-inf"))
    if to_bnsd is None:
        return out.squeeze(0).movedim(0, 1), lse.squeeze(0).movedim(0, 1)
    back = {"sbhd": (2, 0, 1), "bshd": (0, 2, 1)}[qkv_format]
    return out.permute(*back, 3), lse.permute(back)


def dense_gradients(
    tensors: Sequence[Tensor],
    visible: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
    *,
    qkv_format: str,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, log-sum-exp and the gradients of query, key and value, in float64.

    Args:
        tensors: global query, key, value.
        visible: see :func:`dense_attention`.
        grad_out: gradient of the output, in its shape. Rows that see nothing pass none on.
        grad_lse: gradient of the log-sum-exp; None for none.
        qkv_format: order of dims.
        softmax_scale: factor on the scores.
    """
    leaves = [x.detach().double().requires_grad_() for x in tensors]
    q, k, v = leaves
    out, lse = dense_attention(q, k, v, visible, qkv_format=qkv_format, softmax_scale=softmax_scale)
    total = (out * grad_out.double()).sum()
    if grad_lse is not None:
        finite = torch.isfinite(lse)
        total = total + (lse[finite] * grad_lse.double()[finite]).sum()
    grads = torch.autograd.grad(total, leaves)
    return out.detach(), lse.detach(), list(grads)


def dense_rope(tensor: Tensor, angles: Tensor, *, seq_dim: int, interleaved: bool = False) -> Tensor:
    """Rope as multiplication by ``exp(i * angle)``.

    Args:
        tensor: ``[..., D]`` with the sequence at ``seq_dim``.
        angles: ``[S, R / 2]``, one per pair of channels.
        seq_dim: dim of the sequence.
        interleaved: pairs are (0, 1), (2, 3), ... instead of (i, i + R / 2).
    """
    half = angles.shape[-1]
    rotary, rest = tensor[..., : 2 * half], tensor[..., 2 * half :]
    first, second = (rotary[..., 0::2], rotary[..., 1::2]) if interleaved else (rotary[..., :half], rotary[..., half:])
    shape = [1] * tensor.dim()
    shape[seq_dim], shape[-1] = angles.shape
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles).view(shape)
    if interleaved:
        rotated = torch.stack([turned.real, turned.imag], dim=-1).flatten(-2)
    else:
        rotated = torch.cat([turned.real, turned.imag], dim=-1)
    return torch.cat([rotated, rest], dim=-1)


def dense_roll(tensor: Tensor, documents: Documents, shifts: int, dim: int, fill_value: float = 0) -> Tensor:
    """A global tensor shifted inside each document; ``fill_value`` where the source is none or not real."""
    rows = tensor.movedim(dim, 0)
    rolled = torch.full_like(rows, fill_value)
    real: set[int] = set()
    for start, stop in documents.runs.tolist():
        real.update(range(start, stop))
    for start, stop in zip(documents.offsets[:-1].tolist(), documents.offsets[1:].tolist(), strict=True):
        for t in range(start, stop):
            source = t - shifts
            if start <= source < stop and t in real and source in real:
                rolled[t] = rows[source]
    return rolled.movedim(0, dim)
