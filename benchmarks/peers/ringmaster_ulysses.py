"""axolotl's ringmaster: its Ulysses around transformers' ``sdpa``.

The package is ``axolotl-ringmaster``. ``ringmaster`` in the index is another project's: a control panel for Circus. On
gloo ringmaster makes an all-to-all of all-gathers, as many times the bytes as there are ranks.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor

from benchmarks.peers.deepspeed_ulysses import Layer
from benchmarks.peers.peer import Peer, Shape, contiguous_tokens, heads_first, indivisible, rows_first


class RingmasterUlysses(Peer):
    """``ringmaster.setup`` with the backend ``ulysses``, reached as an attention function of transformers."""

    name = "ringmaster Ulysses"
    distribution = "axolotl-ringmaster"
    needs = ("transformers",)
    _function: Any
    _layer: Layer

    @classmethod
    def refusal(cls, ranks: int, heads: int, kv_heads: int) -> str | None:
        """It gives each rank as many heads as every other one, and repeats none."""
        return indivisible("key heads", kv_heads, ranks) or indivisible("heads", heads, ranks)

    def connect(self, shape: Shape) -> None:
        """Over the whole group; its runtime is the process's own."""
        ringmaster = import_module("ringmaster")
        config = ringmaster.RingmasterConfig(size=shape.ranks, backend=ringmaster.Backend.ULYSSES)
        runtime = ringmaster.setup(config, num_kv_heads=shape.kv_heads, device_type="cpu", inner_attn="sdpa")
        functions = import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
        self._function, self._layer = functions[runtime.attn_implementation], Layer(shape)

    def tokens(self, shape: Shape, rank: int) -> Tensor:
        """Contiguous."""
        return contiguous_tokens(shape, rank)

    def arranged(self, rows: Tensor) -> Tensor:
        """``[1, N, L, D]``, a view as in a model."""
        return heads_first(rows)

    def rows(self, arranged: Tensor) -> Tensor:
        """The inverse."""
        return rows_first(arranged)

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One forward pass."""
        out: Tensor = self._function(self._layer, query, key, value, None, is_causal=True)[0]
        return out
