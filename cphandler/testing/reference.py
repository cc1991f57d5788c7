"""The dense reference: what every backend must equal, written from the definitions and from nothing else.

No bands, layouts, plans or kernels are used here: visibility comes from comparing token indices, attention is a softmax
over a dense score matrix, rope is a product of complex numbers, a roll is a loop over documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from cphandler.tokens.documents import Documents
from cphandler.tokens.masks import (
    AcrossDocuments,
    Bands,
    BlockCausal,
    Causal,
    Chunked,
    Full,
    Mask,
    PerDocument,
    PrefixLM,
    PrefixTree,
    PrefixWindow,
    SharedQuestion,
    SlidingWindow,
)


def visible_pairs(
    mask: Mask,
    documents: Documents,
    valid: Tensor | None = None,
    *,
    key_documents: Documents | None = None,
    key_valid: Tensor | None = None,
) -> Tensor:
    """``[Sq, Sk]`` bool: whether query row i sees key row j.

    Args:
        mask: one of the library's masks.
        documents: the packed documents of the queries; their physical offsets separate what may not mix.
        valid: ``[Sq]`` bool, real queries; None takes those of ``documents``.
        key_documents: the packed documents of the keys, as many as the queries'; None is self attention.
        key_valid: ``[Sk]`` bool, real keys; None takes those of ``key_documents``, and the queries' in self attention.

    Raises:
        TypeError: a mask this reference has no definition of.
        ValueError: documents of unequal length under a mask that does not say where its diagonal lies.
    """
    valid = _real(documents) if valid is None else valid
    if key_valid is None:
        key_valid = valid if key_documents is None else _real(key_documents)
    queries = _each(valid, documents)
    keys = _each(key_valid, documents if key_documents is None else key_documents)
    return _allowed(mask, queries, keys) & valid[:, None] & key_valid[None]


def _real(documents: Documents) -> Tensor:
    real = torch.zeros(documents.num_tokens, dtype=torch.bool)
    for start, stop in documents.runs.tolist():
        real[start:stop] = True
    return real


def _each(valid: Tensor, documents: Documents) -> list[Tensor]:
    """Which tokens are real, document by document."""
    return list(valid.split(documents.lengths.tolist())) if documents.num_documents else []


def _allowed(mask: Mask, queries: list[Tensor], keys: list[Tensor]) -> Tensor:
    """Whether queries see keys, given which are real in each document; pairs of tokens that are not are still in."""
    if isinstance(mask, AcrossDocuments):
        return _allowed(mask.mask, [torch.cat([_NONE, *queries])], [torch.cat([_NONE, *keys])])
    if isinstance(mask, Bands):
        return _in_rows(mask, sum(map(len, queries)), sum(map(len, keys)))
    seen = torch.zeros(sum(map(len, queries)), sum(map(len, keys)), dtype=torch.bool)
    i = j = 0
    for number, (query, key) in enumerate(zip(queries, keys, strict=True)):
        block = seen[i : i + len(query), j : j + len(key)]
        if isinstance(mask, PerDocument):
            block |= _allowed(mask.masks[number], [query], [key])
        else:
            block |= _in_document(_of_document(mask, number), query, key)
        i, j = i + len(query), j + len(key)
    return seen


def _in_document(mask: Mask, real_queries: Tensor, real_keys: Tensor) -> Tensor:
    """Whether queries see keys of one document, from their positions in it."""
    query, key = torch.arange(len(real_queries))[:, None], torch.arange(len(real_keys))[None]
    if isinstance(mask, (Causal, SlidingWindow)):
        query = query + _diagonal(mask, real_queries, real_keys)
    if isinstance(mask, Chunked) and mask.origin == "first_valid" and real_queries.any():
        first = int(real_queries.nonzero().min())
        query, key = query - first, key - first
    return _DEFINITIONS.get(type(mask), _unknown)(mask, query, key).expand(len(real_queries), len(real_keys))


def _diagonal(mask: Causal | SlidingWindow, real_queries: Tensor, real_keys: Tensor) -> int:
    """The key beside query 0, by its position in the document; it may lie outside."""
    if mask.align is None and len(real_queries) != len(real_keys):
        raise ValueError(f"{len(real_queries)} queries, {len(real_keys)} keys and no align")
    if mask.align != "bottom_right" or not (real_queries.any() and real_keys.any()):
        return 0
    return int(real_keys.nonzero().max() - real_queries.nonzero().max())


def _of_document(mask: Mask, number: int) -> Mask:
    """The mask with the numbers of one document."""
    if isinstance(mask, PrefixLM) and isinstance(mask.prefix, tuple):
        return PrefixLM(mask.prefix[number])
    if isinstance(mask, SharedQuestion) and isinstance((mask.segments or (0,))[0], tuple):
        return SharedQuestion(mask.segments[number])  # type: ignore[arg-type]
    return mask


def _unknown(mask: Mask, query: Tensor, key: Tensor) -> NoReturn:
    raise TypeError(f"no dense definition of {type(mask).__name__}")


def _in_shared_question(mask: SharedQuestion, query: Tensor, key: Tensor) -> Tensor:
    ends = torch.tensor(mask.segments, dtype=torch.int64).cumsum(0)
    query_segment, key_segment = ((token[..., None] >= ends).sum(-1) for token in (query, key))
    return (key <= query) & ((key_segment == 0) | (key_segment == query_segment))


def _in_prefix_tree(mask: PrefixTree, query: Tensor, key: Tensor) -> Tensor:
    nodes = len(mask.parents)
    reaches = torch.eye(nodes + 1, dtype=torch.bool)  # the last is where padding after the tree is, seen by none other
    for node, parent in enumerate(mask.parents):
        if parent >= 0:
            reaches[node] |= reaches[parent]
    ends = torch.tensor(mask.lengths, dtype=torch.int64).cumsum(0)
    query_node, key_node = ((token[..., None] >= ends).sum(-1) for token in (query, key))
    return (key <= query) & reaches[query_node, key_node]


def _in_rows(mask: Bands, num_queries: int, num_keys: int) -> Tensor:
    query, key = torch.arange(num_queries)[:, None], torch.arange(num_keys)[None]
    seen = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    for q0, q1, k0, k1, lo, hi in mask.rows:
        inside = (query >= q0) & (query < q1) & (key >= k0) & (key < k1)
        seen |= inside & (key - query >= lo) & (key - query <= hi)
    return seen


_NONE = torch.zeros(0, dtype=torch.bool)

_DEFINITIONS: dict[type[Mask], Callable[[Any, Tensor, Tensor], Tensor]] = {
    Causal: lambda mask, query, key: key <= query,
    Full: lambda mask, query, key: torch.ones_like(query + key, dtype=torch.bool),
    SlidingWindow: lambda mask, query, key: (key >= query - mask.left) & (key <= query + mask.right),
    PrefixLM: lambda mask, query, key: (key <= query) | ((query < mask.prefix) & (key < mask.prefix)),
    BlockCausal: lambda mask, query, key: key // mask.block <= query // mask.block,
    Chunked: lambda mask, query, key: (key <= query) & (key // mask.chunk == query // mask.chunk),
    PrefixWindow: lambda mask, query, key: (key <= query) & ((key < mask.prefix) | (query - key <= mask.left)),
    SharedQuestion: _in_shared_question,
    PrefixTree: _in_prefix_tree,
}
"""Each mask inside one document, from token positions ``query [n, 1]`` and ``key [1, m]``."""


def _heads_first(tensor: Tensor, qkv_format: str) -> Tensor:
    """``[B, N, S, D]`` of a global tensor."""
    if qkv_format == "thd":
        return tensor.movedim(0, 1).unsqueeze(0)
    return tensor.permute({"sbhd": (1, 2, 0, 3), "bshd": (0, 2, 1, 3)}[qkv_format])


def _heads_back(tensor: Tensor, qkv_format: str) -> Tensor:
    """The format's order of a ``[B, N, S]`` or ``[B, N, S, D]`` tensor."""
    if qkv_format == "thd":
        return tensor.squeeze(0).movedim(0, 1)
    back = {"sbhd": (2, 0, 1), "bshd": (0, 2, 1)}[qkv_format]
    return tensor.permute(*back, *range(3, tensor.dim()))


def _for_query_heads(tensor: Tensor, num_heads: int) -> Tensor:
    """``[B, N, S, D]`` of ``[B, G, S, D]``: query heads in equal runs share a head."""
    return torch.stack([tensor] * (num_heads // tensor.shape[1]), dim=2).flatten(1, 2)


def _scaled_scores(query: Tensor, key: Tensor, softmax_scale: float | None) -> Tensor:
    """``[B, N, Sq, Sk]`` from ``[B, N, Sq, D]`` and ``[B, G, Sk, D]``."""
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return torch.einsum("bnsd,bntd->bnst", query, _for_query_heads(key, query.shape[1])) * scale


def _per_head(visible: Tensor) -> Tensor:
    return (visible if visible.dim() == 3 else visible.unsqueeze(0)).unsqueeze(1)


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    *,
    qkv_format: str,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over a dense score matrix, in the dtype of the inputs; pass float64.

    Args:
        query: global ``[Sq, B, N, D]``, ``[B, Sq, N, D]`` or ``[T, N, D]``.
        key: the same with Sk rows and G heads.
        value: as the key, with head dim D_v.
        visible: ``[Sq, Sk]`` or ``[B, Sq, Sk]`` bool.
        qkv_format: order of dims.
        softmax_scale: factor on the scores; None is ``D ** -0.5``.
        softcap: scores beyond it are bent back by ``softcap * tanh(score / softcap)``; None for none.
        sinks: ``[N]``, one logit more per head in the denominator of every row that sees something; it has no value.
        keep: ``[B or 1, N, Sq, Sk]`` bool, the weights that dropout keeps; None keeps all.
        dropout_p: kept weights are divided by ``1 - dropout_p``; the log-sum-exp is not touched.

    Returns:
        ``out`` in the query's format, zero where a row sees nothing, and ``lse`` of its shape without the last dim,
        ``-inf`` there, the sink included elsewhere. Differentiable by autograd.
    """
    q, k, v = (_heads_first(x, qkv_format) for x in (query, key, value))
    visible = _per_head(visible)
    some = visible.any(-1, keepdim=True)
    scores = _scaled_scores(q, k, softmax_scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    logits = scores.masked_fill(~some, 0.0)
    if sinks is not None:
        logits = torch.cat([logits, sinks[None, :, None, None].expand(*logits.shape[:3], 1)], dim=-1)
    lse = torch.logsumexp(logits, dim=-1).masked_fill(~some.squeeze(-1), 0.0)
    weights = torch.exp(scores - lse.unsqueeze(-1)).masked_fill(~visible, 0.0)
    if keep is not None:
        weights = weights * keep / (1.0 - dropout_p)
    out = torch.einsum("bnst,bntd->bnsd", weights, _for_query_heads(v, q.shape[1]))
    lse = lse.masked_fill(~some.squeeze(-1), float("-inf"))
    return _heads_back(out, qkv_format), _heads_back(lse, qkv_format)


def dense_max_logit(
    query: Tensor, key: Tensor, visible: Tensor, *, qkv_format: str, softmax_scale: float | None = None
) -> Tensor:
    """``[N]`` largest scaled score of each head over the pairs that see each other, before any softcap.

    Args:
        query: see :func:`dense_attention`, as for the others.
        key: the same with Sk rows and G heads.
        visible: ``[Sq, Sk]`` or ``[B, Sq, Sk]`` bool.
        qkv_format: order of dims.
        softmax_scale: factor on the scores; None is ``D ** -0.5``.

    Returns:
        ``-inf`` for a head where nobody sees anything.
    """
    scores = _scaled_scores(_heads_first(query, qkv_format), _heads_first(key, qkv_format), softmax_scale)
    heads = scores.masked_fill(~_per_head(visible), float("-inf")).transpose(0, 1).flatten(1)
    return torch.cat([heads, heads.new_full((len(heads), 1), float("-inf"))], dim=1).amax(1)


def dense_gradients(
    tensors: Sequence[Tensor],
    visible: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
    *,
    qkv_format: str,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, log-sum-exp and the gradients of query, key and value, and of the sinks where given, in float64.

    Args:
        tensors: global query, key, value.
        visible: see :func:`dense_attention`, as for the options.
        grad_out: gradient of the output, in its shape. Rows that see nothing pass none on.
        grad_lse: gradient of the log-sum-exp; None for none.
        qkv_format: order of dims.
        softmax_scale: factor on the scores.
        softcap: bound on the scores; None for none.
        sinks: ``[N]`` logits without a value; None for none.
        keep: the weights that dropout keeps; None keeps all.
        dropout_p: what kept weights are scaled for.
    """
    leaves = [x.detach().double().requires_grad_() for x in (*tensors, *(() if sinks is None else (sinks,)))]
    q, k, v = leaves[:3]
    out, lse = dense_attention(
        q,
        k,
        v,
        visible,
        qkv_format=qkv_format,
        softmax_scale=softmax_scale,
        softcap=softcap,
        sinks=None if sinks is None else leaves[3],
        keep=keep,
        dropout_p=dropout_p,
    )
    total = (out * grad_out.double()).sum()
    if grad_lse is not None:
        finite = torch.isfinite(lse)
        total = total + (lse[finite] * grad_lse.double()[finite]).sum()
    grads = torch.autograd.grad(total, leaves)
    return out.detach(), lse.detach(), list(grads)


def dense_magnitudes(
    tensors: Sequence[Tensor],
    visible: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
    *,
    qkv_format: str,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> dict[str, Tensor]:
    """What rounding errors of :func:`dense_gradients` are relative to: its sums, over absolute values.

    Terms of both signs may cancel, to nothing where a row sees one key: the gradients are then far smaller than the
    rounding errors of their terms, in any arithmetic.

    Args:
        tensors: see :func:`dense_gradients`, as for the others.
        visible: who sees whom.
        grad_out: gradient of the output.
        grad_lse: gradient of the log-sum-exp; None for none.
        qkv_format: order of dims.
        softmax_scale: factor on the scores.
        softcap: bound on the scores; None for none.
        sinks: ``[N]`` logits without a value; None for none.
        keep: the weights that dropout keeps; None keeps all.
        dropout_p: what kept weights are scaled for.

    Returns:
        ``out`` and ``lse`` in the shapes of the results, ``q``, ``k``, ``v`` and ``sinks`` in those of the gradients.
    """
    q, k, v, grad = (_heads_first(x.detach().double(), qkv_format) for x in (*tensors, grad_out))
    query, key, value = (x.detach().double() for x in tensors)
    options: dict[str, Any] = {"qkv_format": qkv_format, "softmax_scale": softmax_scale, "softcap": softcap}
    extra = None if sinks is None else sinks.detach().double()
    out, lse = dense_attention(query, key, value, visible, sinks=extra, keep=keep, dropout_p=dropout_p, **options)
    lse_rows = lse.unsqueeze(-1) if grad_lse is None else torch.stack([lse, grad_lse.double()], -1)
    lse_rows = _heads_first(lse_rows, qkv_format).masked_fill(~_per_head(visible).any(-1, keepdim=True), 0.0)
    scores, lengths = _scaled_scores(q, k, softmax_scale), _scaled_scores(q.abs(), k.abs(), softmax_scale)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = torch.exp(scores - lse_rows[..., :1]).masked_fill(~_per_head(visible), 0.0) * (1.0 + lengths)
    kept = weights if keep is None else weights * keep / (1.0 - dropout_p)
    pulled = torch.einsum("bnsd,bntd->bnst", grad, _for_query_heads(v, q.shape[1])).abs()
    row = (_heads_first(out, qkv_format) * grad).sum(-1, keepdim=True).abs() + lse_rows[..., 1:].sum(
        -1, keepdim=True
    ).abs()
    spread = (weights * row + kept * pulled) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)

    def of_keys(x: Tensor) -> Tensor:
        return _heads_back(x.unflatten(1, (k.shape[1], -1)).sum(2), qkv_format)

    return {
        "out": _heads_back(kept @ _for_query_heads(v, q.shape[1]).abs(), qkv_format),
        "lse": _heads_back(1.0 + (weights * lengths).sum(-1), qkv_format),
        "q": _heads_back(spread @ _for_query_heads(k, q.shape[1]).abs(), qkv_format),
        "k": of_keys(spread.transpose(-1, -2) @ q.abs()),
        "v": of_keys(kept.transpose(-1, -2) @ grad.abs()),
        "sinks": row.sum((0, 2, 3)),
    }


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
