"""Ulysses x ring: heads split inside, keys exchanged outside (USP, arXiv 2405.07719)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from cphandler.attention.call import AttentionCall
from cphandler.attention.head_parallel import InnerUnions, check_heads
from cphandler.attention.options import OptionalArguments
from cphandler.attention.plans import Site
from cphandler.comm.groups import two_levels
from cphandler.handler.capabilities import COMMON, Capabilities
from cphandler.handler.layout_handler import LayoutHandler

if TYPE_CHECKING:
    from typing_extensions import Unpack

WAY_OUT = "use an inner group (CPConfig.ulysses_degree, or the mesh's inner dim) of {sizes} ranks"


class USPHandler(LayoutHandler):
    """Rank ``p * A + a`` trades tokens for heads with the A ranks of its ``p``, then keys with the ranks of its ``a``.

    A 2-D (outer, inner) mesh, or a flat group and ``CPConfig.ulysses_degree``, says what A is. Rows are sent straight
    to the ranks that need them (``outer = "p2p"``) or go round the ring (``outer = "ring"``).
    """

    comm_type = "a2a+p2p"
    two_level = True
    outer: ClassVar[str] = "p2p"
    capabilities = Capabilities(
        layouts=("zigzag", "contiguous", "balanced"), features=COMMON | {"gradient_wire_dtype", "ulysses_degree"}
    )

    def join(self) -> None:
        """Split the group."""
        self.capabilities.require_stride_one(type(self).__name__, self.layout, self.kv_layout)
        self._levels = two_levels(self._group, self.config.ulysses_degree)
        self._unions = InnerUnions(self._pair, self._levels)

    def make_site(self, exchange: str, ordered: bool) -> Site:
        """The outer exchange runs between the unions of inner shards."""
        alone = self._levels.inner.size == 1
        return super().make_site(exchange, ordered) if alone else self._unions.site(exchange)

    def core_attn(
        self, attn_mod: Any, query: Tensor, key: Tensor, value: Tensor, **options: Unpack[OptionalArguments]
    ) -> Any:
        """See :meth:`ContextParallelHandler.core_attn`."""
        tensors = query, key, value
        call = self.attention_call(attn_mod, tensors, options, exchange=self.outer, check=self._check_heads)
        if self._levels.inner.size == 1:
            return self.result(call, self.attend(call))
        heads = self._unions.heads(self.pad_rows(call.q.device))
        return self.result(call, heads.gather(call, self.attend(heads.scatter(call))))

    def _check_heads(self, call: AttentionCall) -> None:
        check_heads(call, self._levels.inner.size, "the inner group", WAY_OUT)


class USPRingHandler(USPHandler):
    """Ulysses inside, the ring outside."""

    comm_type = "a2a+ring"
    outer = "ring"
    capabilities = Capabilities(layouts=("zigzag", "contiguous", "balanced"), features=COMMON | {"ulysses_degree"})
