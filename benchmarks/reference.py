"""What is right: the dense float64 reference of ``cphandler.testing``, a strip of one head's queries at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.works import Work
from cphandler.testing import dense_gradients

ROWS = 128
"""Queries of a strip, which bounds the memory of scores."""


def expected(work: Work, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Output and the gradients of q, k and v, ``[S, N, D]`` in float64.

    Args:
        work: packed causal documents.
        tensors: query, key, value and the gradient of the output, global.
    """
    q, k, v, grad_out = (x.detach().double() for x in tensors)
    found = [torch.zeros_like(x) for x in (grad_out, q, k, v)]
    group = work.heads // work.kv_heads
    start = 0
    for length in work.lengths:
        for first in range(start, start + length, ROWS):
            stop = min(first + ROWS, start + length)
            visible = torch.arange(start, stop) <= torch.arange(first, stop).unsqueeze(1)
            for head in range(work.heads):
                own, seen = (slice(first, stop), [head]), (slice(start, stop), [head // group])
                out, _, grads = dense_gradients((q[own], k[seen], v[seen]), visible, grad_out[own], qkv_format="thd")
                for total, place, part in zip(found, (own, own, seen, seen), (out, *grads), strict=True):
                    total[place] += part
        start += length
    return found
