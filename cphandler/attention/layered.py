"""One algorithm per layer, over the same shards."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cphandler.attention.attention import Attention, Host
from cphandler.attention.capabilities import Capabilities
from cphandler.attention.options import OptionalArguments
from cphandler.errors import InvalidValueError
from cphandler.tokens.masks import Mask


class LayeredAttention(Attention):
    """Hands each layer's call to the algorithm of its comm type; all of them share shards, group and check.

    Args:
        host: the handler.
        name: the handler class's name.
        capabilities: what all of the classes serve.
        layers: the algorithms, one per layer.
    """

    def __init__(self, host: Host, name: str, capabilities: Capabilities, layers: list[Attention]) -> None:
        super().__init__(host, name, capabilities)
        self._layers = layers

    @property
    def parts(self) -> tuple[Attention, ...]:
        """The algorithms of the layers, each once."""
        return tuple(dict.fromkeys(self._layers))

    def plan(self, mask: Mask) -> None:
        """:meth:`Attention.plan` of each algorithm."""
        for layer in self.parts:
            layer.plan(mask)

    def __call__(self, attn_mod: Any, tensors: tuple[Tensor, Tensor, Tensor], options: OptionalArguments) -> Any:
        """The layer's own :meth:`Attention.__call__`."""
        number = options.get("layer_number")
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= len(self._layers):
            error = InvalidValueError(
                "a handler with one algorithm per layer needs layer_number",
                got=repr(number),
                fix=f"pass layer_number=1 to {len(self._layers)}; layers count from 1",
            )
            self.host.agree("core_attn", error)
            raise error
        return self._layers[number - 1](attn_mod, tensors, options)
