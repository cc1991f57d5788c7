"""What is served: the capability tables of the built-in handlers side by side, for people and for the documentation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from cphandler.attention.capabilities import FEATURES, FORMATS, Capabilities
from cphandler.handler.factory import available_cp_handlers, find_cp_handler_cls
from cphandler.layouts.layout import LAYOUTS
from cphandler.tokens.masks import MASKS


class Row(NamedTuple):
    """One thing that a handler may or may not serve.

    Attributes:
        kind: ``"layout"``, ``"format"``, ``"mask"`` or ``"option"``.
        name: its name.
        served: by the handlers of :func:`built_in`, in their order.
    """

    kind: str
    name: str
    served: tuple[bool, ...]


def built_in() -> dict[str, Capabilities]:
    """Capability tables of the registered handlers that have one, by ``backend`` or ``backend/comm type``.

    Whether the packages that some of them compute with are installed makes no difference.
    """
    tables = {}
    for backend, comm_type in available_cp_handlers():
        table = getattr(find_cp_handler_cls(backend, comm_type), "capabilities", None)
        if isinstance(table, Capabilities):
            tables[f"{backend}/{comm_type}" if comm_type else backend] = table
    return tables


def support() -> Iterator[Row]:
    """The table, row by row."""
    tables = list(built_in().values())
    for layout in LAYOUTS:
        yield Row("layout", layout, tuple(layout in table.layouts for table in tables))
    for form in FORMATS:
        yield Row("format", form, tuple(form in table.formats for table in tables))
    for mask in MASKS:  # all are bands, and every handler over a layout takes all bands
        yield Row("mask", mask.__name__, (True,) * len(tables))
    for feature in FEATURES:
        yield Row("option", feature, tuple(feature in table.features for table in tables))


def as_markdown() -> str:
    """The table as Markdown."""
    names = list(built_in())
    lines = ["| | " + " | ".join(f"`{name}`" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    kind = ""
    for row in support():
        if row.kind != kind:
            kind = row.kind
            lines.append(f"| **{kind}** |" + " |" * len(names))
        lines.append(f"| `{row.name}` | " + " | ".join("yes" if served else "no" for served in row.served) + " |")
    return "\n".join(lines)
