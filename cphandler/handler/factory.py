"""Backends by name: which class serves ``(backend, cp_comm_type)``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import Literal, NamedTuple, overload

from cphandler.errors import CPError, InvalidTypeError, InvalidValueError
from cphandler.handler.contract import ContextParallelHandler
from cphandler.registry import BROKEN, Registry, normal
from cphandler.tokens.counts import checked_flag

ENTRY_POINTS = "cphandler.backends"
"""Entry-point group of third-party backends; a name is ``backend`` or ``backend:cp_comm_type``."""

_HANDLERS: Registry[tuple[str, str | None], ContextParallelHandler] = Registry(
    "backend",
    lambda: ContextParallelHandler,
    {
        ("local", None): "cphandler.backends.local:LocalHandler",
        ("local", "a2a"): "cphandler.backends.ulysses:UlyssesHandler",
        ("local", "ring"): "cphandler.backends.ring:RingHandler",
        ("local", "p2p"): "cphandler.backends.p2p:P2PHandler",
        ("local", "all_gather"): "cphandler.backends.all_gather:AllGatherHandler",
        ("local", "a2a+p2p"): "cphandler.backends.usp:USPHandler",
        ("local", "a2a+ring"): "cphandler.backends.usp:USPRingHandler",
        **{
            (backend, comm_type): f"cphandler.backends.transformer_engine:{name}"
            for backend in ("transformer_engine", "transformer_engine_dynamic")
            for comm_type, name in (
                ("p2p", "TEHandler"),
                ("all_gather", "TEGatherHandler"),
                ("a2a", "TEUlyssesHandler"),
                ("a2a+p2p", "TEUSPHandler"),
            )
        },
        ("magi", None): "cphandler.backends.magi:MagiHandler",
    },
)

_BACKEND_ALIASES = {"torch": "local", "te": "transformer_engine", "te_dynamic": "transformer_engine_dynamic"}
_COMM_ALIASES = {"ulysses": "a2a", "allgather": "all_gather", "usp": "a2a+p2p"}
_SHORT = {
    "ulysses": "a2a",
    "ring": "ring",
    "p2p": "p2p",
    "all_gather": "all_gather",
    "allgather": "all_gather",
    "usp": "a2a+p2p",
    "a2a": "a2a",
    "a2a+p2p": "a2a+p2p",
    "a2a+ring": "a2a+ring",
}
"""Comm types that may stand alone for the local backend with that comm type."""

_EXAMPLES = {"backend": "'local'", "cp_comm_type": "'ring', or a list with one for each layer"}
"""What arguments look like, for errors."""


def _key(backend: str, cp_comm_type: str | None) -> tuple[str, str | None]:
    """The table key for names as users write them."""
    for name, value in (("backend", backend), ("cp_comm_type", cp_comm_type)):
        if not isinstance(value, str) and not (name == "cp_comm_type" and value is None):
            raise InvalidTypeError(f"{name} must be a string", got=repr(value), fix=f"{_EXAMPLES[name]}, say")
    backend = _BACKEND_ALIASES.get(normal(backend), normal(backend))
    comm = None if cp_comm_type is None else normal(cp_comm_type)
    comm = _COMM_ALIASES.get(comm, comm) if comm is not None else None
    if comm is None and (backend, None) not in _HANDLERS and backend in _SHORT:
        return "local", _SHORT[backend]
    return backend, comm


def register_cp_handler(backend: str, cp_comm_type: str | None, target: str | type[ContextParallelHandler]) -> None:
    """Make a backend known to :func:`get_cp_handler_cls`.

    Args:
        backend: its name; case and the choice of ``-`` or ``_`` do not matter.
        cp_comm_type: its comm type, or None.
        target: the class, or ``"module:Class"``, imported when first asked for.

    Raises:
        InvalidTypeError: a target that is neither a path nor a :class:`ContextParallelHandler` class that has all its
            methods.
        InvalidValueError: an empty name, or a pair that is taken by another target, be it one that an installed package
            announces.
    """
    key = _key(backend, cp_comm_type)
    if "" in key:
        raise InvalidValueError("a backend's names must not be empty", got=_shown(key), fix="('mine', None), say")
    _adopt_announced(key)
    _HANDLERS.register(key, target, _shown(key))


def _shown(key: tuple[str, str | None]) -> str:
    backend, comm = key
    return f"({backend!r}, {comm!r})"


def _announced() -> dict[tuple[str, str | None], set[str]]:
    """Where the backends are that installed packages announce."""
    found: dict[tuple[str, str | None], set[str]] = {}
    for entry in entry_points(group=ENTRY_POINTS):
        backend, _, comm = entry.name.partition(":")
        found.setdefault(_key(backend, comm or None), set()).add(entry.value)
    return found


def _adopt_announced(key: tuple[str, str | None]) -> None:
    """Register what an installed package announces under a name that nothing else has.

    Raises:
        InvalidValueError: several packages announce it.
    """
    paths = set() if key in _HANDLERS else _announced().get(key, set())
    if len(paths) > 1:
        raise InvalidValueError(
            f"several installed packages announce the backend {_shown(key)}",
            got=", ".join(sorted(paths)),
            fix="uninstall all but one, or register a class under another name with register_cp_handler",
        )
    for path in paths:
        _HANDLERS.register(key, path, _shown(key))


class Availability(NamedTuple):
    """Whether a backend can be chosen here.

    Attributes:
        backend: its name.
        comm_type: its comm type, or None.
        reason: what is wrong where it cannot be chosen; None where it can.
        fix: what can be done about it; None where nothing is wrong.
    """

    backend: str
    comm_type: str | None
    reason: str | None = None
    fix: str | None = None

    @property
    def usable(self) -> bool:
        """Whether :func:`get_cp_handler_cls` gives its class."""
        return self.reason is None

    def __str__(self) -> str:
        """``('local', 'ring'): usable``."""
        found = "usable" if self.usable else f"not usable: {self.reason}; {self.fix}"
        return f"{_shown((self.backend, self.comm_type))}: {found}"


@overload
def available_cp_handlers(*, explain: Literal[False] = False) -> list[tuple[str, str | None]]: ...


@overload
def available_cp_handlers(*, explain: Literal[True]) -> list[Availability]: ...


def available_cp_handlers(*, explain: bool = False) -> list[tuple[str, str | None]] | list[Availability]:
    """Every ``(backend, cp_comm_type)`` that can be asked for; whether its package is installed is known when it is.

    Args:
        explain: ask for each, as :func:`get_cp_handler_cls` would, and tell which can be had, and what the others lack.
            Their packages are imported; whatever that raises is told, not raised.

    Raises:
        InvalidTypeError: ``explain`` is no bool.
    """
    names = sorted({*_announced(), *_HANDLERS}, key=lambda key: (key[0], key[1] or ""))
    return [_availability(*key) for key in names] if checked_flag("explain", explain) else names


def _availability(backend: str, comm_type: str | None) -> Availability:
    try:
        get_cp_handler_cls(backend, comm_type)
    except CPError as error:
        fix = error.fix or "mend or uninstall what raises it"
        return Availability(backend, comm_type, str(error).removesuffix(f"; {fix}"), fix)
    except BROKEN as error:
        return Availability(backend, comm_type, f"{type(error).__name__}: {error}", "mend or uninstall what raises it")
    return Availability(backend, comm_type)


def get_cp_handler_cls(
    backend: str = "local", cp_comm_type: str | Sequence[str] | None = None, *, num_layers: int | None = None
) -> type[ContextParallelHandler]:
    """The handler class for a backend and a comm type.

    Args:
        backend: ``"local"`` (alias ``"torch"``), ``"transformer_engine"`` (alias ``"te"``; the same as
            ``"transformer_engine_dynamic"``), a registered name, or a comm type alone, which is short for ``"local"``
            with it.
        cp_comm_type: ``"a2a"`` (alias ``"ulysses"``), ``"ring"``, ``"p2p"``, ``"all_gather"`` (alias ``"allgather"``),
            ``"a2a+p2p"`` (alias ``"usp"``), ``"a2a+ring"``, or None for one rank; or a list with one of them for each
            layer, all over one layout, chosen by ``layer_number``.
        num_layers: with a list, the model's number of layers, to be compared with the list's length.

    Raises:
        InvalidTypeError: not strings, or a list with a class that has a layout of its own.
        InvalidValueError: an unknown pair; lists the known ones. A list of another length than ``num_layers``.
        MissingPackageError: the backend's package cannot be imported, or is of a version that is not supported.
    """
    if isinstance(cp_comm_type, Sequence) and not isinstance(cp_comm_type, (str, bytes)):
        return _layered(backend, list(cp_comm_type), num_layers)
    if num_layers is not None:
        raise InvalidValueError(
            "num_layers goes with a list of comm types",
            got=f"num_layers {num_layers} with {cp_comm_type!r}",
            fix="leave it out, or pass one comm type for each layer",
        )
    handler_cls = find_cp_handler_cls(backend, cp_comm_type)
    handler_cls.check_package()
    return handler_cls


def find_cp_handler_cls(backend: str, cp_comm_type: str | None = None) -> type[ContextParallelHandler]:
    """The handler class for a backend and a comm type, be the package that it computes with installed or not.

    For what asks a class about itself, such as its table of capabilities; see :func:`get_cp_handler_cls`.

    Args:
        backend: see :func:`get_cp_handler_cls`.
        cp_comm_type: one name, or None.

    Raises:
        InvalidTypeError: not strings.
        InvalidValueError: an unknown pair; lists the known ones.
        MissingPackageError: the class's own module cannot be imported.
    """
    key = _key(backend, cp_comm_type)
    _adopt_announced(key)
    if key in _HANDLERS:
        return _HANDLERS.get(key, _shown(key))
    raise InvalidValueError(
        "unknown backend or comm type",
        got=_shown((backend, cp_comm_type)),
        fix=f"choose one of {', '.join(_legal())}",
    )


def _layered(backend: str, comm_types: list[str], num_layers: int | None) -> type[ContextParallelHandler]:
    """The class with one algorithm per layer."""
    if num_layers is not None and (isinstance(num_layers, bool) or not isinstance(num_layers, int)):
        raise InvalidTypeError("num_layers must be an int", got=repr(num_layers), fix="the model's number of layers")
    for comm_type in comm_types:
        _key(backend, comm_type)  # a list inside the list would be taken for layers inside a layer
    if not comm_types or (num_layers is not None and len(comm_types) != num_layers):
        raise InvalidValueError(
            "a list of comm types needs one for each layer",
            got=f"{len(comm_types)} for {num_layers or 'some'} layers",
            fix="repeat a comm type for every layer that uses it",
        )
    layers = import_module("cphandler.backends.layered")
    classes = tuple(get_cp_handler_cls(backend, comm_type) for comm_type in comm_types)
    made: type[ContextParallelHandler] = layers.layered(classes)
    return made


def _legal() -> Iterator[str]:
    for key in available_cp_handlers():
        yield _shown(key)
    yield "or one of " + ", ".join(repr(name) for name in sorted(_SHORT)) + " alone"
