"""What a model was parallelized with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch

from cphandler.comm.groups import CPGroup, resolve_group
from cphandler.config import CPConfig
from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.handler.contract import AskedLayout, ContextParallelHandler
from cphandler.handler.factory import get_cp_handler_cls

GatherLogits: TypeAlias = Literal["eval", "always", "never"]
"""When logits come back whole, on every rank."""

Gradient: TypeAlias = Literal["mean", "sum"]
"""What is done with parameter gradients over the ranks of the group before the optimizer sees them."""


@dataclass(frozen=True)
class Settings:
    """How batches are shared among ranks.

    Attributes:
        ranks: the group.
        handler_cls: what makes a handler of each batch.
        layout: of each batch; None for the class's default.
        config: of each handler.
        gather_logits: when logits come back whole.
        gradient: what is done with gradients over the ranks.
    """

    ranks: CPGroup
    handler_cls: type[ContextParallelHandler]
    layout: AskedLayout
    config: CPConfig | None
    gather_logits: GatherLogits
    gradient: Gradient

    def __deepcopy__(self, memo: dict[int, Any]) -> Settings:
        """Itself: a copied model stays in the group."""
        return self

    @property
    def compares(self) -> bool:
        """Whether ranks compare what they hold."""
        never = self.config is not None and self.config.check_consistency == "never"
        return self.ranks.size > 1 and not never

    def handler(self, **facts: Any) -> ContextParallelHandler:
        """The handler of one batch."""
        return self.handler_cls(cp_group=self.ranks.source, layout=self.layout, config=self.config, **facts)

    def factor(self, handler: ContextParallelHandler) -> float:
        """What a rank's part of a gradient is multiplied by, so that mean or sum over ranks is the batch's."""
        parts = handler.effective_cp_size
        return float(parts) if self.gradient == "mean" else parts / self.ranks.size


def checked_settings(
    cp_group: Any,
    names: tuple[str, str | list[str] | None],
    layout: AskedLayout,
    config: CPConfig | None,
    gather_logits: str,
    gradient: str,
) -> Settings:
    """Settings that mean something.

    Raises:
        InvalidTypeError: a group that is none.
        InvalidValueError: names that mean nothing.
    """
    for name, value, known in (
        ("gather_logits", gather_logits, get_args(GatherLogits)),
        ("gradient", gradient, get_args(Gradient)),
    ):
        if value not in known:
            raise InvalidValueError(f"unknown {name}", got=repr(value), fix=f"choose {', '.join(known)}")
    handler_cls = get_cp_handler_cls(*names)
    ranks = resolve_group(group_of(cp_group), two_level=handler_cls.two_level)
    return Settings(ranks, handler_cls, layout, config, gather_logits, gradient)  # type: ignore[arg-type]


def group_of(source: Any) -> Any:
    """The context-parallel group in what users of accelerate have: the "cp" dim of a mesh, or of its configuration.

    Args:
        source: a group, a mesh, or an accelerate ``ParallelismConfig``, whose mesh is built where it was not.

    Raises:
        InvalidValueError: a configuration or a mesh of several dims without such a dim.
    """
    if hasattr(source, "build_device_mesh"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        mesh = getattr(source, "device_mesh", None)
        source = source.build_device_mesh(device) if mesh is None else mesh
        if source is None or "cp" not in (source.mesh_dim_names or ()):
            raise InvalidValueError(
                'the ParallelismConfig has no "cp" dim', got=repr(source), fix="ParallelismConfig(cp_size=2), say"
            )
    names = getattr(source, "mesh_dim_names", None)
    if names and len(names) > 1 and "cp" in names:
        return source["cp"]
    if isinstance(source, str):
        raise InvalidTypeError("cp_group must be a group", got=repr(source), fix="pass torch.distributed.group.WORLD")
    return source
