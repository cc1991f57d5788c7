"""One algorithm per layer over one layout: what Megatron's list of comm types asks for."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from cphandler.attention.options import OptionalArguments
from cphandler.errors import InvalidValueError
from cphandler.handler.capabilities import Capabilities
from cphandler.handler.contract import LayoutSource
from cphandler.handler.layout_handler import LayoutHandler

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LayeredHandler(LayoutHandler):
    """Hands each layer's attention to the handler class of its comm type; all of them share streams, plans and groups.

    Made by :func:`layered`. ``layer_number`` counts from 1, as in Megatron, and every call must name it.
    """

    comm_type = "layered"
    classes: ClassVar[tuple[type[LayoutHandler], ...]] = ()
    """One per layer."""

    def prepare(self, layout: LayoutSource) -> None:
        """Cut the documents once, and let every class refuse what it does not serve."""
        super().prepare(layout)
        shared = {handler_cls: self.shared_as(handler_cls) for handler_cls in dict.fromkeys(self.classes)}
        self._layers = [shared[handler_cls] for handler_cls in self.classes]

    def core_attn(
        self, attn_mod: Any, query: Tensor, key: Tensor, value: Tensor, **options: Unpack[OptionalArguments]
    ) -> Any:
        """See :meth:`ContextParallelHandler.core_attn`."""
        number = options.get("layer_number")
        if not isinstance(number, int) or not 1 <= number <= len(self._layers):
            error = InvalidValueError(
                "a handler with one algorithm per layer needs layer_number",
                got=repr(number),
                fix=f"pass layer_number=1 to {len(self._layers)}; layers count from 1",
            )
            self.agree("core_attn", error)
            raise error
        return self._layers[number - 1].core_attn(attn_mod, query, key, value, **options)


@lru_cache
def layered(classes: tuple[type[LayoutHandler], ...]) -> type[LayeredHandler]:
    """The class with these algorithms, one per layer; one and the same class for one and the same list."""
    tables = [handler_cls.capabilities for handler_cls in classes]
    layouts = tuple(name for name in tables[0].layouts if all(name in table.layouts for table in tables))
    features = frozenset.intersection(*(table.features for table in tables))
    features |= {"ulysses_degree"} if any("ulysses_degree" in table.features for table in tables) else set()
    table = Capabilities(layouts=layouts, features=features)
    two_level = any(handler_cls.two_level for handler_cls in classes)
    facts = {"classes": classes, "capabilities": table, "two_level": two_level}
    return type("LayeredHandler", (LayeredHandler,), facts)
