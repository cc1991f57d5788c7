"""One algorithm per layer over one layout: what Megatron's list of comm types asks for."""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

from cphandler.attention.attention import Attention
from cphandler.attention.capabilities import Capabilities
from cphandler.attention.layered import LayeredAttention
from cphandler.errors import InvalidTypeError
from cphandler.handler.contract import ContextParallelHandler
from cphandler.handler.layout_handler import LayoutHandler


class LayeredHandler(LayoutHandler):
    """One batch whose attention is another algorithm in each layer.

    Made by :func:`layered`. ``layer_number`` counts from 1, as in Megatron, and every call must name it.
    """

    comm_type = "layered"
    classes: ClassVar[tuple[type[LayoutHandler], ...]] = ()
    """One per layer."""

    @property
    def algorithm(self) -> str:
        """The comm type of every layer."""
        return f"{type(self).__name__} {' '.join(handler_cls.__name__ for handler_cls in self.classes)}"

    def make_attention(self) -> Attention:
        """Let every class set itself up over the shards once, and refuse what it does not serve."""
        shared = {
            handler_cls: handler_cls.attention_over(self, served_elsewhere=frozenset({"ulysses_degree"}))
            for handler_cls in dict.fromkeys(self.classes)
        }
        layers = [shared[handler_cls] for handler_cls in self.classes]
        return LayeredAttention(self, type(self).__name__, self.capabilities, layers)


@lru_cache
def layered(classes: tuple[type[ContextParallelHandler], ...]) -> type[ContextParallelHandler]:
    """The class with these algorithms, one per layer; the same class for the same list.

    Raises:
        InvalidTypeError: a class with a ``prepare`` or a ``core_attn`` of its own; classes that bring several layouts.
    """
    own = tuple(_sharing(handler_cls) for handler_cls in classes)
    bring = own[0].own_layout
    if any(handler_cls.own_layout is not bring for handler_cls in own):
        names = ", ".join(handler_cls.__name__ for handler_cls in own)
        raise InvalidTypeError("layers share one layout", got=f"{names}, which bring several", fix="choose others")
    tables = [handler_cls.capabilities for handler_cls in own]
    layouts = tuple(name for name in tables[0].layouts if all(name in table.layouts for table in tables))
    features = frozenset.intersection(*(table.features for table in tables))
    features |= {"ulysses_degree"} if any("ulysses_degree" in table.features for table in tables) else set()
    table = Capabilities(layouts=layouts, features=features)
    two_level = any(handler_cls.two_level for handler_cls in own)
    made = {"classes": own, "capabilities": table, "two_level": two_level, "own_layout": bring and staticmethod(bring)}
    return type("LayeredHandler", (LayeredHandler,), made)


def _sharing(handler_cls: type[ContextParallelHandler]) -> type[LayoutHandler]:
    """A class that can share a batch with others."""
    if not issubclass(handler_cls, LayoutHandler) or any(
        getattr(handler_cls, name) is not getattr(LayoutHandler, name) for name in ("prepare", "core_attn")
    ):
        raise InvalidTypeError(
            "only handlers that leave the layout and core_attn to the library can share a batch from layer to layer",
            got=f"{handler_cls.__name__}, which has its own",
            fix="give the class an Attention of its own (attention_cls) instead of prepare() and core_attn()",
        )
    return handler_cls
