"""Things by name, added to by whoever brings more: backends, exchanges and kernels are registered and found alike."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator
from importlib import import_module
from importlib.util import find_spec
from inspect import Parameter, isabstract, signature
from typing import Generic, TypeVar

from cphandler.errors import InvalidTypeError, InvalidValueError, MissingPackageError

BROKEN = (Exception, SystemExit)
"""What importing a package that is there may raise: a broken build raises what it likes, and some end the program."""

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class Registry(Generic[K, T]):
    """Classes by key, each given as itself or as ``"module:Class"``, which is imported when it is first asked for.

    Args:
        kind: what is registered, for errors: ``"backend"``, ``"kernel"``, ``"exchange"``.
        base: the class that all of them derive from; a function, so that it need not be imported before.
        built_in: what is known from the start.
        made_without: whether the classes are made without arguments.
    """

    def __init__(
        self, kind: str, base: Callable[[], type[T]], built_in: dict[K, str], *, made_without: bool = False
    ) -> None:
        self._kind, self._base, self._made_without = kind, base, made_without
        self._targets: dict[K, str] = dict(built_in)
        self._loaded: dict[K, type[T]] = {}

    def __contains__(self, key: K) -> bool:
        return key in self._targets

    def __iter__(self) -> Iterator[K]:
        return iter(self._targets)

    def register(self, key: K, target: str | type[T], shown: str) -> None:
        """Add one.

        Args:
            key: its key.
            target: the class, or ``"module:Class"``.
            shown: the key as errors print it.

        Raises:
            InvalidTypeError: neither a path nor a class of this kind.
            InvalidValueError: the key is taken by another target. A class that is defined anew is another one.
        """
        path = self._path(target, shown)
        if key in self._targets and not self._is_same(key, target, path):
            raise InvalidValueError(
                f"the {self._kind} {shown} is already registered", got=self._targets[key], fix="choose another name"
            )
        self._targets[key] = path
        if isinstance(target, type):
            self._loaded[key] = target

    def get(self, key: K, shown: str) -> type[T]:
        """The class of a key that is known.

        Args:
            key: its key.
            shown: the key as errors print it.

        Raises:
            MissingPackageError: a package that it needs is not there, or too old for it.
            InvalidTypeError: what the path names is no class of this kind.
            InvalidValueError: its package has no such module, or its module nothing of that name.
        """
        if key not in self._loaded:
            self._loaded[key] = self._imported(self._targets[key], shown)
        return self._loaded[key]

    def _imported(self, path: str, shown: str) -> type[T]:
        module, _, name = path.partition(":")
        try:
            found: object = import_module(module)
            for part in name.split("."):
                found = getattr(found, part, None)
        except ImportError as error:
            told = self._explained(error, module, shown)
            if told is None:
                raise  # a fault in code that is there: its own message says more
            raise told from error
        if found is None:
            raise InvalidValueError(
                f"the {self._kind} {shown} cannot be found", got=path, fix=f"{module!r} must define {name!r}"
            )
        return self._checked(found, path, shown)

    def _is_same(self, key: K, target: str | type[T], path: str) -> bool:
        if self._targets[key] != path:
            return False
        return not isinstance(target, type) or self._loaded.get(key, target) is target

    def _explained(self, error: ImportError, module: str, shown: str) -> Exception | None:
        """What is missing for a module to be imported; None where the module's own package is at fault."""
        missing, what = error.name or "", f"the {self._kind} {shown} cannot be imported"
        package = missing.partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{missing}."):
            if missing != package:
                return InvalidValueError(
                    what, got=f"{module!r}: {error}", fix=f"{package!r} is there and has no {missing!r}: mend the path"
                )
        elif package in ("", module.partition(".")[0]):
            return None
        way_out = f"install a version of {package!r} that has it, or mend the import"
        if package not in sys.modules and find_spec(package) is None:
            way_out = f"install the package that holds {package!r}"
        return MissingPackageError(what, got=f"{module!r}: {error}", fix=way_out)

    def _path(self, target: str | type[T], shown: str) -> str:
        if isinstance(target, type):
            self._checked(target, target.__qualname__, shown)
            return f"{target.__module__}:{target.__qualname__}"
        module, _, name = target.partition(":") if isinstance(target, str) else ("", "", "")
        if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
            raise InvalidTypeError(
                f"the {self._kind} {shown} must be a class or 'module:Class'",
                got=repr(target),
                fix=f"pass the {self._base().__name__} subclass, or where it can be imported from",
            )
        return f"{module}:{name}"

    def _checked(self, found: object, path: str, shown: str) -> type[T]:
        base = self._base()
        if not (isinstance(found, type) and issubclass(found, base)):
            raise InvalidTypeError(
                f"the {self._kind} {shown} is not a {base.__name__}", got=path, fix=f"derive it from {base.__name__}"
            )
        if isabstract(found):
            left = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
            raise InvalidTypeError(f"the {self._kind} {shown} is abstract", got=path, fix=f"implement {left}")
        if self._made_without and _asks_for_arguments(found):
            raise InvalidTypeError(
                f"the {self._kind} {shown} is made without arguments",
                got=f"{path}{signature(found)}",
                fix="give its arguments defaults",
            )
        return found


def _asks_for_arguments(found: type) -> bool:
    kinds = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return any(p.default is Parameter.empty and p.kind not in kinds for p in signature(found).parameters.values())


def normal(name: str) -> str:
    """A name as registries spell it: any case will do, spaces around it, and ``-`` for ``_``."""
    return name.strip().lower().replace("-", "_")
