"""The kernel interface.

Shapes: B batch rows, L query rows, M key rows, N query heads, G key/value heads (N divisible by G), D head dim of
queries and keys, D_v of values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from cphandler.kernels.dropout import Dropout
from cphandler.kernels.packages import Package
from cphandler.kernels.strips import additive_mask, tiles
from cphandler.kernels.sums import AttentionSum, RowSum
from cphandler.kernels.tables import DeviceTables
from cphandler.kernels.task import Tasks
from cphandler.precision import accumulator_dtype

ROWS, COLUMNS = 256, 2048
"""Query rows and keys of a tile of dense scores; ``[B, N, ROWS, COLUMNS]`` is the largest temporary.
On a Xeon core 512 columns take 0.7 of the time (``benchmarks/blocks.py``, 4 heads of 64, float32) in four times as many
launches, which count on a GPU; there nothing was timed."""


class Softmax(NamedTuple):
    """How scores become weights: the softmax of ``scale * q.k``, or of ``softcap * tanh(scale * q.k / softcap)``.

    Attributes:
        scale: factor on the scores.
        softcap: what capped scores stay below, above 0; None leaves them as they are.
        dropout: which weights are dropped; None keeps all. The log-sum-exp knows nothing of it.
        masks: where tables of hidden scores are kept from call to call; None keeps them for one call.
        deterministic: whether two runs must give the same bits; for kernels that can choose.
    """

    scale: float
    softcap: float | None = None
    dropout: Dropout | None = None
    masks: DeviceTables | None = None
    deterministic: bool = False

    def of(self, rows: slice, keys: slice) -> Softmax:
        """The same for some of the query rows and key rows."""
        return self if self.dropout is None else self._replace(dropout=self.dropout.of(rows, keys))

    def prepared(self) -> Softmax:
        """The same with a place for masks, so that all blocks of a call share them."""
        return self if self.masks is not None else self._replace(masks=DeviceTables())


class Kernel(ABC):
    """Adds the result of tasks to sums.

    All tensors are ``[B, rows, heads, D]`` with any strides; sums are float32 (float64 for float64).
    """

    name: str
    deterministic: bool = True
    """Whether two runs give the same bits, forward and backward, when :class:`Softmax` asks for it."""

    takes_prefix: bool = False
    """Whether rows that see a long prefix and a diagonal after it are best computed in one call."""

    package: ClassVar[Package | None] = None
    """The package that brings it, beside torch."""

    refuses: ClassVar[Mapping[str, str]] = {"softcap": "softcap", "dropout": "dropout"}
    """Options of :class:`Softmax` that this kernel does not compute, each with what to say when it is asked for. A
    kernel that computes one must say so by leaving it out."""

    def nondeterminism(self) -> str | None:
        """Why two runs may differ although the same bits are asked for; None where they never do."""
        return None if self.deterministic else "deterministic=True, and this kernel is not"

    def unusable(self) -> str | None:
        """Why this kernel cannot run here at all (a package that is missing, say) and the way out; None if it can.

        Two clauses, ``"...; ..."``: the first says what is wrong, the other what can be done.
        """
        return None

    def fuses_windows(self, dtype: torch.dtype) -> bool:
        """Whether windows are computed as fast as full and causal attention is; else densely, tile by tile.

        Args:
            dtype: of queries, keys and values.
        """
        del dtype
        return True

    def serves_packings(self, dtype: torch.dtype) -> bool:
        """Whether launches that were recorded in a CUDA graph can serve other packings of as many tokens.

        Args:
            dtype: of queries, keys and values.
        """
        del dtype
        return False

    @abstractmethod
    def misfit(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Why this kernel cannot take these tensors, or None. Looks at dtype, device and head dims only."""

    def refusal(self, q: Tensor, k: Tensor, v: Tensor, *, softcap: bool = False, dropout: bool = False) -> str | None:
        """Why this kernel cannot take this call, or None.

        Args:
            q: queries; dtype, device and head dims count.
            k: keys.
            v: values.
            softcap: whether scores are capped.
            dropout: whether weights are dropped.
        """
        return self.refused_option(softcap=softcap, dropout=dropout) or self.misfit(q, k, v)

    def refused_option(self, *, softcap: bool, dropout: bool) -> str | None:
        """What this kernel says to the options asked for; None where it computes all of them."""
        if not (softcap or dropout):
            return None
        asked = {"softcap": softcap, "dropout": dropout}
        return "; ".join(self.refuses[name] for name in asked if asked[name] and name in self.refuses) or None

    def prepare(self, tasks: Tasks, dtype: torch.dtype, device: torch.device) -> Any:
        """What this kernel needs to know of tasks before it can start, made once and kept with the plan.

        Args:
            tasks: over one block of keys.
            dtype: of queries, keys and values.
            device: where they are.
        """
        return [*tasks]

    def prepared(self, tasks: Tasks, q: Tensor) -> Any:
        """What :meth:`prepare` made for these tasks and such queries."""
        key = type(self), q.dtype, q.device
        return tasks.prepared(key, lambda: self.prepare(tasks, q.dtype, q.device))

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, tasks: Tasks, softmax: Softmax, result: AttentionSum) -> None:
        """Merge each task's softmax-weighted values into a result, in order.

        Args:
            q: ``[B, L, N, D]``.
            k: ``[B, M, G, D]``.
            v: ``[B, M, G, D_v]``.
            tasks: what to compute.
            softmax: how scores become weights; its dropout speaks of these L rows and M keys.
            result: takes ``out`` and natural ``lse`` of the scaled (and capped) scores, piece by piece.
        """

    @abstractmethod
    def backward(self, saved: Saved, k: Tensor, v: Tensor, tasks: Tasks, softmax: Softmax, grads: Gradients) -> None:
        """Add each task's share of the gradients, given the merged forward result.

        Args:
            saved: what the forward pass left on the query side.
            k: ``[B, M, G, D]``.
            v: ``[B, M, G, D_v]``.
            tasks: what the forward pass computed over these keys.
            softmax: as in the forward pass.
            grads: take the gradients, piece by piece.
        """

    def max_logit(self, q: Tensor, k: Tensor, tasks: Tasks, softmax: Softmax, result: Tensor) -> None:
        """Raise ``result`` to the largest ``scale * q.k`` of each head over the pairs that see each other, in place.

        Args:
            q: ``[B, L, N, D]``; 16-bit inputs are computed in float32.
            k: ``[B, M, G, D]``.
            tasks: which pairs see each other.
            softmax: its scale counts; no softcap is applied.
            result: ``[N]`` in the accumulators' dtype; stays as it is (``-inf``, say) where nothing is seen.
        """
        if q.shape[0] == 0:
            return  # a maximum over nothing raises
        softmax = softmax.prepared()
        groups, dtype = k.shape[2], accumulator_dtype(q.dtype)
        for tile in (part for task in tasks for part in tiles(task, ROWS, COLUMNS)):
            scores = grouped(q[:, tile.rows], groups, dtype) @ grouped(k[:, tile.keys], groups, dtype).mT
            scores *= softmax.scale
            if not tile.is_full:
                scores += additive_mask(tile, dtype, q.device, softmax.masks)
            torch.maximum(result, scores.amax(dim=(0, 3, 4)).flatten(), out=result)


def grouped(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """``[B, rows, N, ...]`` as ``[B, G, N / G, rows, ...]``: query heads beside the key head they share."""
    arranged: Tensor = x.to(dtype).unflatten(2, (groups, -1)).movedim(1, 3)
    return arranged


class Saved(NamedTuple):
    """The query side of a backward pass: all ``[B, L, N, ...]``, ``out`` and ``lse`` merged over all keys."""

    q: Tensor
    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None

    def of(self, rows: slice) -> Saved:
        """The same for some of the rows."""
        q, out, lse, grad_out, grad_lse = self
        grad_lse = None if grad_lse is None else grad_lse[:, rows]
        return Saved(q[:, rows], out[:, rows], lse[:, rows], grad_out[:, rows], grad_lse)


class Gradients(NamedTuple):
    """Sums ``dq [B, L, N, D]``, ``dk [B, M, G, D]``, ``dv [B, M, G, D_v]``."""

    dq: RowSum
    dk: RowSum
    dv: RowSum
