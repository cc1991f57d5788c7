"""Log-probabilities of labels from local logits: in float32, in chunks of tokens, over a split vocabulary too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cphandler.comm.collectives import all_gather
from cphandler.comm.groups import CPGroup, GroupSource, resolve_group
from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.precision import accumulator_dtype
from cphandler.tokens.counts import checked_count, checked_flag
from cphandler.training.arguments import check_floats, check_integers, checked_divisor

CHUNK_BYTES = 64 * 2**20
"""Bytes of one chunk of logits in float32, where no chunk size is given."""


class TokenLogProbs(NamedTuple):
    """What :func:`token_log_probs` returns when more than the log-probabilities is asked for.

    Attributes:
        log_probs: ``[...]`` of the labels, float32 (float64 for float64); 0 where a label is negative.
        entropy: ``[...]`` of each token's distribution in nats, differentiable; 0 there. None unless asked for.
        top1: ``[...]`` int64, the likeliest token, the first of equals; no gradient. None unless asked for.
    """

    log_probs: Tensor
    entropy: Tensor | None
    top1: Tensor | None


class _Vocabulary(NamedTuple):
    """Which columns of the vocabulary are here.

    Attributes:
        first: number of the first column.
        size: columns that are tokens; those from there on are padding.
        group_name: ranks that hold the others; empty for none.
        ranks: how many they are.
        exact: whether every rank computes on all columns.
    """

    first: int
    size: int
    group_name: str
    ranks: int
    exact: bool


class _Row(NamedTuple):
    """Of each token of a chunk ``[n]``: the log-sum-exp, the label's logit, the mean logit, and the likeliest token."""

    lse: Tensor
    label: Tensor
    mean: Tensor
    top1: Tensor


def token_log_probs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    tp_group: GroupSource = None,
    vocab_size: int | None = None,
    exact: bool = False,
    return_entropy: bool = False,
    return_top1: bool = False,
) -> Tensor | TokenLogProbs:
    """Log-probability of each label under ``softmax(logits / temperature)``; differentiable in the logits, once.

    Every row is a token of its own, so that local logits and labels of any layout are right as they are. No copy of all
    logits in float32 is made, forward or backward: chunks of tokens are computed one after another, and the gradient is
    written in the logits' dtype.

    Args:
        logits: ``[..., V]``, or ``[..., V / tp]`` columns of this rank of ``tp_group``, in rank order.
        labels: ``[...]`` integers below the vocabulary's size; negative ones are ignored: their rows give 0 and take a
            gradient of exactly 0, whatever the logits hold there.
        temperature: above 0.
        chunk_size: tokens of a chunk; None lets a chunk have 64 MiB.
        tp_group: the ranks that hold the other columns; all call this alike. None for one that holds all.
        vocab_size: tokens of the vocabulary where columns were appended to it; those take part in nothing.
        exact: with a ``tp_group``, compute on all columns, which travel: the bits are those of one rank for any number
            of ranks. Otherwise five numbers of each token travel.
        return_entropy: also give each distribution's entropy.
        return_top1: also give the likeliest tokens.

    Returns:
        ``[...]`` float32 (float64 for float64), or a :class:`TokenLogProbs` where more was asked for.

    Raises:
        InvalidTypeError: logits that are not floating point, labels that are not integers.
        InvalidValueError: shapes that do not fit, a temperature or chunk size that is not above 0, a vocabulary larger
            than its columns, a label outside it (on a GPU, where looking would wait for it, its result is ``-inf``).
    """
    check_floats("logits", logits)
    check_integers("labels", labels)
    if isinstance(temperature, Tensor):
        raise InvalidTypeError(
            "temperature must be a number", got="a tensor", fix="divide the logits by one of each token"
        )
    temperature = float(checked_divisor("temperature", temperature))
    if chunk_size is not None:
        chunk_size = checked_count("chunk_size", chunk_size, least=1, fix="None lets a chunk have 64 MiB")
    if vocab_size is not None:
        vocab_size = checked_count("vocab_size", vocab_size, least=1, fix="None takes all columns")
    flags = {"exact": exact, "return_entropy": return_entropy, "return_top1": return_top1}
    exact, return_entropy, return_top1 = (checked_flag(name, flag) for name, flag in flags.items())
    ranks = None if tp_group is None else resolve_group(tp_group)
    vocabulary = _vocabulary(logits, vocab_size, ranks, exact=exact)
    _check(logits, labels, vocabulary)
    columns = logits.shape[-1]
    if chunk_size is None:
        width = columns * (vocabulary.ranks if exact else 1) * accumulator_dtype(logits.dtype).itemsize
        chunk_size = max(1, CHUNK_BYTES // max(1, width))
    rows = logits.reshape(-1, columns)
    log_probs, entropy, top1 = _LogProbs.apply(  # type: ignore[no-untyped-call]
        rows, labels.reshape(-1), vocabulary, temperature, chunk_size, return_entropy
    )
    if not (return_entropy or return_top1):
        alone: Tensor = log_probs.view(labels.shape)
        return alone
    return TokenLogProbs(
        log_probs.view(labels.shape),
        entropy.view(labels.shape) if return_entropy else None,
        top1.view(labels.shape) if return_top1 else None,
    )


def _vocabulary(logits: Tensor, vocab_size: int | None, ranks: CPGroup | None, *, exact: bool) -> _Vocabulary:
    columns = logits.shape[-1] if logits.dim() else 0
    size, rank = (1, 0) if ranks is None else (ranks.size, ranks.rank)
    name = "" if ranks is None or size == 1 else ranks.name
    whole = columns * size
    return _Vocabulary(rank * columns, whole if vocab_size is None else vocab_size, name, size, exact and size > 1)


def _check(logits: Tensor, labels: Tensor, vocabulary: _Vocabulary) -> None:
    if logits.dim() == 0 or labels.shape != logits.shape[:-1]:
        raise InvalidValueError(
            "labels must have the shape of the logits without the last dim",
            got=f"labels {list(labels.shape)}, logits {list(logits.shape)}",
            fix="dispatch both, or neither; next_token_labels makes labels from local ids",
        )
    columns = logits.shape[-1] * vocabulary.ranks
    if not 0 < vocabulary.size <= columns:
        raise InvalidValueError(
            "vocab_size must be above 0 and at most the number of columns",
            got=f"{vocabulary.size} of {columns} columns",
            fix="None takes all columns of all ranks of tp_group",
        )
    if labels.device.type == "cpu" and labels.numel() and int(labels.max()) >= vocabulary.size:
        raise InvalidValueError(
            "labels must be below the vocabulary's size",
            got=f"{int(labels.max())} of {vocabulary.size}",
            fix="a negative label is ignored; columns from vocab_size on are padding",
        )


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        vocabulary: _Vocabulary,
        temperature: float,
        chunk_size: int,
        entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = accumulator_dtype(logits.dtype)
        lse, mean, log_probs = (logits.new_empty(len(logits), dtype=dtype) for _ in range(3))
        top1 = torch.empty_like(labels, dtype=torch.int64)
        for part in _chunks(len(logits), chunk_size):
            row = _row(logits[part], labels[part], vocabulary, temperature)
            lse[part], mean[part], top1[part] = row.lse, row.mean, row.top1
            log_probs[part] = row.label - row.lse
        ignored = labels < 0
        ctx.save_for_backward(logits, labels, lse, mean)
        ctx.vocabulary, ctx.temperature, ctx.chunk_size = vocabulary, temperature, chunk_size
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(top1)
        of_entropy = (lse - mean).masked_fill_(ignored, 0.0) if entropy else lse.new_empty(0)
        return log_probs.masked_fill_(ignored, 0.0), of_entropy, top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        """With p the softmax and H the entropy: d log p(label) = (1[label] - p) / T and d H = -p (log p + H) / T."""
        logits, labels, lse, mean = ctx.saved_tensors
        vocabulary: _Vocabulary = ctx.vocabulary
        result = torch.zeros_like(logits)
        ignored = (labels < 0).unsqueeze(-1)
        for part in _chunks(len(logits), ctx.chunk_size):
            scaled = _scaled(logits[part], vocabulary, ctx.temperature)
            log_p = scaled - lse[part].unsqueeze(-1)
            p = log_p.exp()
            total = torch.zeros_like(p)
            if grad is not None:
                total -= p * grad[part].unsqueeze(-1)
                held, column = _columns(labels[part], vocabulary, logits.shape[-1])
                total.scatter_add_(1, column.unsqueeze(-1), (grad[part] * held).unsqueeze(-1))
            if grad_entropy is not None and grad_entropy.numel():
                spread = (lse[part] - mean[part]).unsqueeze(-1)
                total -= grad_entropy[part].unsqueeze(-1) * p * (log_p.masked_fill(p == 0, 0.0) + spread)
            result[part] = (total / ctx.temperature).masked_fill_(ignored[part], 0.0).to(logits.dtype)
        return result, None, None, None, None, None


def _chunks(rows: int, size: int) -> Iterator[slice]:
    return (slice(start, min(rows, start + size)) for start in range(0, rows, size))


def _scaled(logits: Tensor, vocabulary: _Vocabulary, temperature: float, first: int | None = None) -> Tensor:
    """A chunk of logits in float32 over the temperature; padding columns are ``-inf``."""
    scaled = logits.to(accumulator_dtype(logits.dtype), copy=True).div_(temperature)
    start = vocabulary.first if first is None else first
    real = min(max(0, vocabulary.size - start), logits.shape[-1])
    scaled[:, real:] = float("-inf")
    return scaled


def _columns(labels: Tensor, vocabulary: _Vocabulary, columns: int, first: int | None = None) -> tuple[Tensor, Tensor]:
    """Whether each label's column is here, and which it is; 0 where it is not."""
    column = labels.to(torch.int64) - (vocabulary.first if first is None else first)
    held = (column >= 0) & (column < columns) & (labels >= 0)
    return held, column.where(held, 0)


def _row(logits: Tensor, labels: Tensor, vocabulary: _Vocabulary, temperature: float) -> _Row:
    """What is kept of each token of a chunk, over all ranks of the vocabulary, put together in rank order."""
    if vocabulary.exact:
        parts = all_gather(logits.contiguous(), vocabulary.group_name).unflatten(0, (vocabulary.ranks, len(logits)))
        whole = parts.movedim(0, 1).flatten(1)
        return _combined([_part(whole, labels, vocabulary, temperature, first=0)])
    part = _part(logits, labels, vocabulary, temperature)
    if not vocabulary.group_name:
        return _combined([part])
    everyone = all_gather(part.unsqueeze(0), vocabulary.group_name)
    return _combined(list(everyone))


def _part(
    logits: Tensor, labels: Tensor, vocabulary: _Vocabulary, temperature: float, first: int | None = None
) -> Tensor:
    """``[n, 5]`` of some columns: largest logit, sum of ``exp(x - largest)``, the same times x, label's logit, argmax.

    The argmax goes as a number of the accumulators' dtype: exact up to 2^24 columns, where float32 holds every integer.
    """
    scaled = _scaled(logits, vocabulary, temperature, first)
    start = vocabulary.first if first is None else first
    largest, place = scaled.max(-1)
    shift = largest.masked_fill(largest == float("-inf"), 0.0)
    weights = (scaled - shift.unsqueeze(-1)).exp_()
    held, column = _columns(labels, vocabulary, logits.shape[-1], first)
    label = scaled.gather(1, column.unsqueeze(-1)).squeeze(-1).masked_fill(~held, float("-inf"))
    pull = (weights * scaled.masked_fill_(weights == 0, 0.0)).sum(-1)
    return torch.stack([largest, weights.sum(-1), pull, label, (place + start).to(largest.dtype)], dim=-1)


def _combined(parts: list[Tensor]) -> _Row:
    """All columns from the parts, which are in rank order."""
    stacked = torch.stack(parts)
    largest = stacked[..., 0].amax(0)
    total, pull = torch.zeros_like(largest), torch.zeros_like(largest)
    for part in parts:
        share = (part[:, 0] - largest).exp()
        total += part[:, 1] * share
        pull += part[:, 2] * share
    winner = (stacked[..., 0] == largest).to(torch.int8).argmax(0)
    top1 = stacked[..., 4].gather(0, winner.unsqueeze(0)).squeeze(0).to(torch.int64)
    return _Row(largest + total.log(), stacked[..., 3].amax(0), pull / total, top1)
