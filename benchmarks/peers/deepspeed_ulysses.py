"""DeepSpeed's two Ulysses: ``DistributedAttention``, and ``UlyssesSPAttentionHF`` of Arctic Long Sequence Training."""

from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.peers.peer import Peer, Shape, contiguous_tokens, heads_first, indivisible, rows_first


def _connect() -> None:
    """Give DeepSpeed the group there is.

    Its first connection compiles an operator for sums in shared memory, which takes a minute and a half, and which an
    all-to-all never calls. It is listed here as one that this machine cannot have.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it looks for others, and warns
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed = import_module("deepspeed")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.init_distributed(dist_backend="gloo", dist_init_required=False)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``[B, S, N, D]``: torch's own attention on this rank's heads."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    grouped = q.shape[1] != k.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2)


class DeepSpeedUlysses(Peer):
    """``deepspeed.sequence.layer.DistributedAttention``."""

    name = "DeepSpeed Ulysses"
    distribution = "deepspeed"
    needs = ("einops",)
    _module: Any

    @classmethod
    def refusal(cls, ranks: int, heads: int, kv_heads: int) -> str | None:
        """Uneven heads are for nccl: on gloo its all-to-all fails."""
        return indivisible("key heads", kv_heads, ranks) or indivisible("heads", heads, ranks)

    def connect(self, shape: Shape) -> None:
        """Over the whole group."""
        _connect()
        layer = import_module("deepspeed.sequence.layer")
        self._module = layer.DistributedAttention(_attention, dist.group.WORLD, scatter_idx=2, gather_idx=1)

    def tokens(self, shape: Shape, rank: int) -> Tensor:
        """Contiguous."""
        return contiguous_tokens(shape, rank)

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One forward pass; the batch is dim 0."""
        out: Tensor = self._module(query, key, value, 0)
        return out


class Layer(torch.nn.Module):
    """What attention functions of transformers ask of the layer that calls them.

    Args:
        shape: counts of heads.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_key_value_groups = shape.heads // shape.kv_heads
        self.is_causal = True


class DeepSpeedALST(Peer):
    """``UlyssesSPAttentionHF`` around transformers' ``sdpa``, as ``register_with_transformers`` makes it."""

    name = "DeepSpeed ALST"
    distribution = "deepspeed"
    needs = ("einops", "transformers")
    _module: Any
    _layer: Layer
    _positions: Tensor

    @classmethod
    def refusal(cls, ranks: int, heads: int, kv_heads: int) -> str | None:
        """Key heads may be fewer than ranks: it repeats them."""
        repeated = ranks % kv_heads == 0
        return indivisible("heads", heads, ranks) or (None if repeated else indivisible("key heads", kv_heads, ranks))

    def connect(self, shape: Shape) -> None:
        """Over the whole group."""
        _connect()
        functions = import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
        self._layer = Layer(shape)
        self._positions = self.tokens(shape, dist.get_rank()).unsqueeze(0)
        self._module = import_module("deepspeed.runtime.sequence_parallel.ulysses_sp").UlyssesSPAttentionHF(
            functions["sdpa"],
            batch_size=1,
            attn_head_count=shape.heads,
            attn_head_size=shape.head_dim,
            kv_head_count=shape.kv_heads,
            num_hidden_layers=1,
            process_group=dist.group.WORLD,
            seq_length_is_variable=True,
        )

    def tokens(self, shape: Shape, rank: int) -> Tensor:
        """Contiguous."""
        return contiguous_tokens(shape, rank)

    def arranged(self, rows: Tensor) -> Tensor:
        """``[1, N, L, D]``, a view as in a model."""
        return heads_first(rows)

    def rows(self, arranged: Tensor) -> Tensor:
        """The inverse."""
        return rows_first(arranged)

    def arranged_output(self, rows: Tensor) -> Tensor:
        """``[1, L, N * D]``."""
        return rows.flatten(1).unsqueeze(0)

    def output_rows(self, out: Tensor) -> Tensor:
        """The inverse."""
        rows: Tensor = out.squeeze(0).unflatten(1, (-1, self._module.attn_head_size))
        return rows

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One forward pass."""
        out: Tensor = self._module(self._layer, query, key, value, None, position_ids=self._positions)[0]
        return out
