"""Things by name, added to by whoever brings more: backends, exchanges and kernels are registered and found alike."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from importlib import import_module
from typing import Generic, TypeVar

from cphandler.errors import InvalidTypeError, InvalidValueError, MissingPackageError

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class Registry(Generic[K, T]):
    """Classes by key, each given as itself or as ``"module:Class"``, which is imported when it is first asked for.

    Args:
        kind: what is registered, for errors: ``"backend"``, ``"kernel"``, ``"exchange"``.
        base: the class that all of them derive from; a function, so that it need not be imported before.
        built_in: what is known from the start.
    """

    def __init__(self, kind: str, base: Callable[[], type[T]], built_in: dict[K, str]) -> None:
        self._kind, self._base = kind, base
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
            InvalidValueError: the key is taken by another target.
        """
        path = self._path(target, shown)
        if self._targets.get(key, path) != path:
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
            MissingPackageError: a package that it needs is not there.
            InvalidTypeError: what the path names is no class of this kind.
            InvalidValueError: its module has nothing of that name.
        """
        if key not in self._loaded:
            self._loaded[key] = self.imported(self._targets[key], shown)
        return self._loaded[key]

    def imported(self, path: str, shown: str) -> type[T]:
        """The class that ``"module:Class"`` names; see :meth:`get`."""
        module, _, name = path.partition(":")
        try:
            found = getattr(import_module(module), name)
        except ImportError as error:
            if not _is_missing(error, module):
                raise  # a fault in code that is there: its own message says more
            raise MissingPackageError(
                f"the {self._kind} {shown} cannot be imported",
                got=f"{path}: {error}",
                fix=f"install the package that holds {error.name or module!r}",
            ) from error
        except AttributeError as error:
            raise InvalidValueError(
                f"the {self._kind} {shown} cannot be found", got=path, fix=f"{module!r} must define {name!r}"
            ) from error
        return self._checked(found, path, shown)

    def _path(self, target: str | type[T], shown: str) -> str:
        if isinstance(target, type):
            self._checked(target, target.__qualname__, shown)
            return f"{target.__module__}:{target.__qualname__}"
        module, colon, name = target.partition(":") if isinstance(target, str) else ("", "", "")
        if not (module and colon and name):
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
        return found


def _is_missing(error: ImportError, module: str) -> bool:
    """Whether a package is missing or too old, rather than the module that is being imported at fault."""
    missing = error.name or ""
    if isinstance(error, ModuleNotFoundError) and (missing == module or module.startswith(f"{missing}.")):
        return True  # the module itself is not there
    return missing.partition(".")[0] != module.partition(".")[0]
