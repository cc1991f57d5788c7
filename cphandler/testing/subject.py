"""The subject of a conformance run: a handler class, the sizes to try it at, and what it says it serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cphandler.attention.capabilities import FORMATS, Capabilities
from cphandler.config import CPConfig
from cphandler.handler.contract import ContextParallelHandler
from cphandler.layouts.layout import LAYOUTS
from cphandler.testing.cases import Case, handler_class
from cphandler.testing.laws import Stage, hold_all
from cphandler.testing.pool import RankPool

SIZES = (1, 2, 3, 4)
"""Ranks of a group, unless a run names others; below four, several groups of a pool of four work at once."""


HEADS = (4, 2)
"""Query and key heads, unless a run names others: a group of two, which three ranks that split heads must cut."""


@dataclass(frozen=True)
class Subject:
    """A handler class to be held to the laws.

    Attributes:
        backend: how the ranks find the class: a name of the library's own, or ``"module:Class"``.
        handler_cls: the class.
        sizes: cp sizes to try.
        heads: query and key heads; None for :data:`HEADS`.
        config: settings of every handler, by name.
    """

    backend: str
    handler_cls: type[ContextParallelHandler]
    sizes: tuple[int, ...] = SIZES
    heads: tuple[int, int] | None = None
    config: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def named(
        cls, backend: str, *, sizes: Sequence[int], heads: tuple[int, int] | None, config: Mapping[str, str]
    ) -> Subject:
        """The subject that a command line asks for.

        Args:
            backend: ``"ring"``, ``"local/a2a+p2p"``, another registered name, or ``"module:Class"``.
            sizes: cp sizes; none for :data:`SIZES`.
            heads: query and key heads, or None.
            config: settings of :class:`CPConfig`, as text.

        Raises:
            ImportError: a module that cannot be imported.
            AttributeError: a module without this class.
            TypeError: no :class:`ContextParallelHandler`.
            ValueError: an unknown name, or settings that :class:`CPConfig` refuses.
        """
        handler_cls = handler_class(backend)
        if not (isinstance(handler_cls, type) and issubclass(handler_cls, ContextParallelHandler)):
            raise TypeError(f"{backend} is not a ContextParallelHandler")
        settings = CPConfig.model_validate_strings(dict(config), strict=False).model_dump(include=set(config))
        if not handler_cls.__module__.startswith("cphandler."):  # a name registered here is not known to the ranks
            backend = f"{handler_cls.__module__}:{handler_cls.__qualname__}"
        return cls(backend, handler_cls, tuple(sizes) or SIZES, heads, tuple(settings.items()))

    @property
    def table(self) -> Capabilities | None:
        """What the class says it serves; None for a class that has no table."""
        table = getattr(self.handler_cls, "capabilities", None)
        return table if isinstance(table, Capabilities) else None

    @property
    def layouts(self) -> tuple[str | None, ...]:
        """Layouts to try: all that are served, or only the class's own."""
        return (self.table.layouts or (None,)) if self.table is not None else (None,)

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats to try."""
        return self.table.formats if self.table is not None else FORMATS

    @property
    def unserved(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Formats and layouts of the library that the table says no to."""
        if self.table is None:
            return (), ()
        formats = tuple(name for name in FORMATS if name not in self.table.formats)
        return formats, tuple(name for name in LAYOUTS if name not in self.table.layouts)

    def serves(self, feature: str) -> bool:
        """Whether a feature is served, or may be, for a class without a table."""
        return self.table is None or feature in self.table.features

    def case(self, cp_size: int, **described: Any) -> Case:
        """A case of this class; with a log-sum-exp where it is served, so that its gradient is held to the law too.

        Args:
            cp_size: ranks of a group.
            described: further fields of :class:`Case`; its config adds to this subject's.
        """
        config = (*self.config, *described.pop("config", ()))
        fields = {"heads": self.heads or HEADS, "lse": self.serves("return_lse"), **described}
        return Case(self.backend, cp_size, config=config, **fields)

    def refusal(self, case: Case) -> Stage | None:
        """Where the table says that a case is refused; None for a case that is served."""
        if self.table is None:
            return None
        named = {case.layout_of(stream) for stream in case.streams} & set(LAYOUTS)
        layouts = named if case.cp_size > 1 else set()
        served = case.qkv_format in self.table.formats and layouts <= set(self.table.layouts)
        served = served and self.table.serves_mask(case.mask, crossing=case.is_cross)
        if not (served and self.table.features.issuperset(_built_with(case))):
            return "construction"
        return None if self.table.features.issuperset(_called_with(case)) else "call"

    def hold(self, pool: RankPool, law: Callable[[Case], None], cases: Sequence[Case]) -> list[str]:
        """Hold the class to a law: what it serves must be right, what its table says no to must be refused.

        Args:
            pool: at least four ranks, and as many as the largest cp size.
            law: one of :mod:`cphandler.testing.laws`.
            cases: what to try.

        Returns:
            What a class without a table refused, in words.

        Raises:
            RankError: the law does not hold.
        """
        plan = [(case, self.refusal(case)) for case in cases]
        reports: list[list[str]] = pool.run(hold_all, law, plan, self.table is None)
        return max(reports, key=len)


def _built_with(case: Case) -> set[str]:
    """Features that a handler knows of when it is made."""
    settings = dict(case.config)
    asked = {
        "cross_attention": case.is_cross,
        "key_padding_mask": case.batch.real is not None and case.qkv_format != "thd",
        "gradient_wire_dtype": settings.get("gradient_wire_dtype") is not None,
        "ulysses_degree": settings.get("ulysses_degree") is not None,
    }
    return {name for name, given in asked.items() if given}


def _called_with(case: Case) -> set[str]:
    """Features that a call asks for."""
    asked = {
        "softmax_scale": case.scale is not None,
        "softcap": case.softcap is not None,
        "sinks": case.sinks,
        "dropout": case.dropout_p > 0,
        "return_lse": case.lse,
        "return_max_logit": case.max_logit,
        "value_head_dim": case.value_dim not in (None, case.head_dim),
        "own_attention": case.own,
    }
    return {name for name, given in asked.items() if given}
