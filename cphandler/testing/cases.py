"""Cases: one batch, one mask and one set of options under one backend, and the global data that goes with it.

Ranks of one context-parallel group draw the same global data from a seed and cut it, so that each holds other rows;
groups that run at the same time draw different data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cphandler.config import CPConfig
from cphandler.handler.contract import ContextParallelHandler
from cphandler.handler.factory import get_cp_handler_cls
from cphandler.kernels import Dropout, keep_mask, query_states
from cphandler.layouts.layout import Layout
from cphandler.testing.pool import partition_group
from cphandler.testing.reference import visible_pairs
from cphandler.tokens.documents import Documents
from cphandler.tokens.masks import Causal, Mask

PARTITIONS = {
    1: ((0,), (1,), (2,), (3,)),
    2: ((0, 2), (1, 3)),  # two groups at once, neither consecutive
    3: ((1, 2, 3),),  # without global rank 0
    4: ((0, 1, 2, 3),),
    8: (tuple(range(8)),),
}
"""How the ranks of a pool are divided for a cp size; for any other size, its first ranks are the one group."""


@dataclass(frozen=True)
class Batch:
    """A global batch: documents of a packed stream, or rows of a dense batch with or without padding.

    Attributes:
        lengths: real tokens of each document; a dense batch is as long as all of them.
        padded: physical tokens of each document of a packed batch; None for no padding.
        real: dense: one string per row, ``"x"`` a real token, ``"."`` padding; over the keys in cross attention.
        rows: dense without padding: rows of the batch.
        keys: in cross attention, real tokens of each key document.
        keys_padded: physical tokens of each key document.
    """

    lengths: tuple[int, ...] = (13, 3, 6, 1, 9)
    padded: tuple[int, ...] | None = None
    real: tuple[str, ...] | None = None
    rows: int = 2
    keys: tuple[int, ...] | None = None
    keys_padded: tuple[int, ...] | None = None

    def __str__(self) -> str:
        if self.real is not None:
            return "|".join(self.real) + (f" seen from {sum(self.lengths)}" if self.keys else "")
        padded = f" in {list(self.padded)}" if self.padded else ""
        return f"{list(self.lengths)}{padded}" + (f" over {list(self.keys)}" if self.keys else "")


@dataclass(frozen=True)
class Case:
    """One combination to hold to the laws.

    Attributes:
        backend: a backend's name, ``"module:Class"``, or a tuple of comm types, one per layer.
        cp_size: ranks of a group.
        qkv_format: order of dims.
        layout: a name, a Layout, or None for the backend's own; a pair of them for the two streams of cross attention.
        mask: who sees whom.
        batch: the documents.
        heads: query and key heads.
        head_dim: of queries and keys.
        value_dim: of values; None for the same.
        dtype: of the tensors.
        kernel: the built-in kernel.
        lse: whether the log-sum-exp is asked for and has a gradient.
        scale: ``softmax_scale``.
        softcap: ``softcap``.
        sinks: whether there are sinks.
        dropout_p: ``dropout_p``.
        max_logit: whether the largest score is asked for.
        layer: ``layer_number``.
        config: further settings, ``((name, value), ...)``.
        own: whether a callable ``attn_mod`` computes attention.
    """

    backend: str | tuple[str, ...] = "ring"
    cp_size: int = 2
    qkv_format: str = "thd"
    layout: str | Layout | tuple[str | Layout, str | Layout] | None = None
    mask: Mask = field(default_factory=Causal)
    batch: Batch = field(default_factory=Batch)
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 8
    dtype: torch.dtype = torch.float64
    kernel: str = "auto"
    lse: bool = True
    value_dim: int | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    dropout_p: float = 0.0
    max_logit: bool = False
    layer: int | None = None
    config: tuple[tuple[str, Any], ...] = ()
    own: bool = False

    def __str__(self) -> str:
        layout = self.layout or "default"
        kind = f"{self.backend} cp{self.cp_size} {self.qkv_format} {layout} {self.mask} heads {self.heads} {self.dtype}"
        asked = {
            "value_dim": self.value_dim,
            "scale": self.scale,
            "softcap": self.softcap,
            "sinks": self.sinks,
            "dropout": self.dropout_p,
            "max_logit": self.max_logit,
            "layer": self.layer,
            "config": dict(self.config),
            "own": self.own,
        }
        options = " ".join(f"{name}={value}" for name, value in asked.items() if value)
        return f"{kind} {self.batch} {options}".strip()

    @property
    def layer_number(self) -> int | None:
        """The layer, 1 where dropout needs one."""
        return self.layer or (1 if self.dropout_p else None)

    @property
    def is_cross(self) -> bool:
        """Whether keys are a stream of their own."""
        return self.batch.keys is not None

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams of tokens there are."""
        return ("q", "kv") if self.is_cross else ("q",)

    def layout_of(self, stream: str) -> str | Layout | None:
        """The layout that was asked for, of one stream."""
        return self.layout[stream == "kv"] if isinstance(self.layout, tuple) else self.layout


class Data(NamedTuple):
    """Global tensors of a case: query, key, value, the gradients of output and log-sum-exp, and sinks."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    grad_lse: Tensor
    sinks: Tensor


def offsets(lengths: tuple[int, ...]) -> Tensor:
    """``cu_seqlens`` of lengths."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()] if lengths else [0], dtype=torch.int32)


def metadata(case: Case) -> dict[str, Any]:
    """The handler's arguments that describe the batch."""
    batch = case.batch
    if case.qkv_format == "thd":
        given = {"cu_seqlens_q": batch.lengths, "cu_seqlens_q_padded": batch.padded}
        given |= {"cu_seqlens_kv": batch.keys, "cu_seqlens_kv_padded": batch.keys_padded}
        return {name: None if lengths is None else offsets(lengths) for name, lengths in given.items()}
    described: dict[str, Any] = {"max_seqlen_q": sum(batch.lengths)}
    if batch.real is not None:
        described = {"max_seqlen_q": len(batch.real[0]), "key_padding_mask": real_tokens(batch)}
    if batch.keys is not None:
        described |= {"max_seqlen_q": sum(batch.lengths), "max_seqlen_kv": sum(batch.keys)}
    return described


def real_tokens(batch: Batch) -> Tensor:
    """``[B, S]`` bool of the rows' real tokens."""
    return torch.tensor([[c == "x" for c in row] for row in batch.real or ()])


def documents_of(case: Case, stream: str = "q") -> Documents:
    """The packed stream the reference compares by: for dense batches one document of length S."""
    arguments = metadata(case)
    name = stream if case.is_cross else "q"
    if case.qkv_format == "thd":
        return Documents.from_cu_seqlens(arguments[f"cu_seqlens_{name}"], arguments[f"cu_seqlens_{name}_padded"])
    return Documents.dense(arguments[f"max_seqlen_{name}"])


def visible(case: Case) -> Tensor:
    """Who sees whom: ``[S, S]``, or ``[B, S, S]`` with a key-padding mask or a mask of one per row."""
    queries = documents_of(case)
    keys = documents_of(case, "kv") if case.is_cross else None
    if case.qkv_format != "thd" and case.mask.num_documents not in (None, 1):
        return _visible_by_row(case)
    if case.qkv_format == "thd" or case.batch.real is None:
        return visible_pairs(case.mask, queries, key_documents=keys)
    rows = real_tokens(case.batch)
    if keys is None:
        return torch.stack([visible_pairs(case.mask, queries, row) for row in rows])
    return torch.stack([visible_pairs(case.mask, queries, key_documents=keys, key_valid=row) for row in rows])


def _visible_by_row(case: Case) -> Tensor:
    """``[B, S, S]``: rows of the batch as the documents of one stream, of which each sees itself alone."""
    rows = case.mask.num_documents or 0
    every = [valid_tokens(case, stream) for stream in ("q", "kv")]
    queries, keys = (Documents.from_attention_mask(real.expand(rows, -1)) for real in every)
    seen = visible_pairs(case.mask, queries, key_documents=keys if case.is_cross else None)
    blocks = seen.view(rows, every[0].shape[-1], rows, every[1].shape[-1])
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)


def valid_tokens(case: Case, stream: str = "q") -> Tensor:
    """``[S]`` or ``[B, S]`` bool: real tokens."""
    documents = documents_of(case, stream)
    if case.batch.real is not None and case.qkv_format != "thd":
        padded = stream == "kv" or not case.is_cross
        real = real_tokens(case.batch)
        return real if padded else torch.ones(len(real), documents.num_tokens, dtype=torch.bool)
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
    parts = PARTITIONS.get(case.cp_size, (tuple(range(case.cp_size)),))
    group = partition_group(parts)
    mine = next((i for i, part in enumerate(parts) if dist.get_rank() in part), -1)
    return group, 1000 * mine + case.cp_size


def handler_class(backend: str | tuple[str, ...]) -> type[ContextParallelHandler]:
    """The class that a case names."""
    if isinstance(backend, tuple):
        return get_cp_handler_cls("local", list(backend))
    if ":" in backend:
        module, _, name = backend.partition(":")
        handler_cls: type[ContextParallelHandler] = attrgetter(name)(import_module(module))
        return handler_cls
    return get_cp_handler_cls(*backend.split("/"))


def make_handler(case: Case, group: Any, **arguments: Any) -> ContextParallelHandler:
    """The case's handler on this rank."""
    config = CPConfig(**{"kernel": case.kernel, **dict(case.config)})
    settings: dict[str, Any] = {"mask": case.mask, "layout": case.layout, "config": config}
    described = {**metadata(case), **settings, **arguments}
    return handler_class(case.backend)(cp_group=group, qkv_format=case.qkv_format, **described)  # type: ignore[arg-type]


def draw(case: Case, seed: int) -> Data:
    """The case's global tensors."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(case.batch.real) if case.batch.real is not None else case.batch.rows

    def lead(stream: str) -> tuple[int, ...]:
        rows = documents_of(case, stream).num_tokens
        return {"thd": (rows,), "sbhd": (rows, batch), "bshd": (batch, rows)}[case.qkv_format]

    n, g = case.heads
    d, d_v = case.head_dim, case.value_dim or case.head_dim
    shapes = [(*lead("q"), n, d), (*lead("kv"), g, d), (*lead("kv"), g, d_v), (*lead("q"), n, d_v)]
    shapes += [(*lead("q"), n), (n,)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype) for shape in shapes]
    return Data(*tensors)


def kept_weights(case: Case, seed: int) -> Tensor | None:
    """``[B, N, S, S]``: which weights dropout keeps, from the definition over all tokens at once."""
    if not case.dropout_p:
        return None
    rows = 1 if case.qkv_format == "thd" else len(case.batch.real or ()) or case.batch.rows
    queries, keys = (torch.arange(documents_of(case, stream).num_tokens) for stream in ("q", "kv"))
    batch_rows = torch.arange(rows)[:, None].expand(rows, len(queries))
    states = query_states(seed, case.layer_number or 0, batch_rows, queries, torch.arange(case.heads[0]))
    return keep_mask(Dropout(case.dropout_p, states, keys))
