"""Packages that bring kernels: whether one is here in a version that was read, and why not.

A package is looked for by its distribution's version, never by its module's name: the modules of two of them share a
name. Importing one may raise anything, and nothing is imported before a kernel of it is asked about.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch

from cphandler.registry import BROKEN


class Package(NamedTuple):
    """A package, the versions whose signatures were read, and how it is installed.

    Attributes:
        distributions: names under which it is released, the first of them usual.
        module: what is imported.
        oldest: the first version that is taken, as numbers.
        newest: the first version that is not.
        install: the line that installs it, or where it comes from.
    """

    distributions: tuple[str, ...]
    module: str
    oldest: tuple[int, ...]
    newest: tuple[int, ...]
    install: str


FINAL = 1 << 30
"""Stands where a version has no number of a pre-release: a final version comes after all of those."""


def numbers(text: str) -> tuple[int, ...]:
    """A version as numbers that compare: a release comes after its pre-releases, and is shorter than those of a range.

    ``"2.8.3.post2"`` is ``(2, 8, 3, FINAL)``, ``"4.0.0b36"`` is ``(4, 0, 0, 36)`` and ``"4.0.0"`` ``(4, 0, 0, FINAL)``.

    Args:
        text: a version.
    """
    made: list[int] = []
    for part in text.split("+", maxsplit=1)[0].split("."):
        digits = "".join(c if c.isdigit() else " " for c in part).split()
        if not part[:1].isdigit():
            break
        made += [int(run) for run in digits]
        if len(digits) > 1:
            return tuple(made)
    return (*made, FINAL)


def shown(version: tuple[int, ...]) -> str:
    """An end of a range as a version is written."""
    text = ".".join(map(str, version[:3]))
    return text if len(version) < 4 else f"{text}b{version[3]}"


@lru_cache
def installed(package: Package) -> tuple[str, str] | None:
    """Distribution and version of a package that is installed; None where none is."""
    found = ((name, version_of(name)) for name in package.distributions)
    return next(((name, text) for name, text in found if text is not None), None)


def version_of(distribution: str) -> str | None:
    """Version of a distribution as its metadata tell it, nothing imported; None where it is not installed.

    Args:
        distribution: the name under which it is released.
    """
    try:
        return version(distribution) or "of no version"  # metadata cut short have none
    except PackageNotFoundError:
        return None
    except BROKEN as error:
        return f"of metadata that cannot be read ({type(error).__name__})"


@lru_cache
def missing(package: Package) -> str | None:
    """Why a package cannot be used, and the way out; None where its module is imported."""
    found = installed(package)
    if found is None:
        return f"{package.distributions[0]} is not installed; {package.install}"
    name, text = found
    if not package.oldest <= numbers(text) < package.newest:
        oldest, newest = (shown(end) for end in (package.oldest, package.newest))
        return f"{name} {text}: only versions from {oldest} to below {newest} were read; {package.install}"
    try:
        import_module(package.module)
    except BROKEN as error:
        return f"{name} {text} cannot be imported ({type(error).__name__}: {error}); {package.install}"
    return None


def function(package: Package, name: str) -> Callable[..., Any]:
    """A function of a package that :func:`missing` has nothing against.

    Args:
        package: the package.
        name: of the function in its module.
    """
    found: Callable[..., Any] = getattr(import_module(package.module), name)
    return found


@lru_cache
def parameters(call: Callable[..., Any]) -> frozenset[str]:
    """Names of a function's parameters, of one wrapped as an operator too."""
    plain: Any = getattr(call, "_init_fn", call)
    return frozenset(inspect.signature(plain).parameters)


@lru_cache
def required(call: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the parameters without a default, in order."""
    plain: Any = getattr(call, "_init_fn", call)
    known = inspect.signature(plain).parameters.values()
    return tuple(one.name for one in known if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD)


def lacking(package: Package, needs: Mapping[str, Iterable[str]]) -> str | None:
    """What installed functions do not have that is needed of them; None where all is there.

    Args:
        package: the package.
        needs: parameters by function; of ``"a|b"`` one is enough.
    """
    for name, wanted in needs.items():
        try:
            call = getattr(import_module(package.module), name, None)
            known = frozenset() if call is None else parameters(call)
        except BROKEN as error:  # from a module that makes its names when they are asked for, or compiled code
            return f"{package.module}.{name} cannot be read ({type(error).__name__}: {error}); {package.install}"
        if call is None:
            return f"{package.module} has no {name}; {package.install}"
        absent = [one for one in wanted if not known.intersection(one.split("|"))]
        if absent:
            return f"{package.module}.{name} has no {', '.join(absent)}; {package.install}"
    return None


def chosen(call: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Options under the names that an installed function has: ``is_causal__causal=True`` by either of the two.

    Args:
        call: a function that :func:`lacking` has nothing against.
        **options: values; of names joined by two underscores the first one that the function has.
    """
    known = parameters(call)
    made = {}
    for name, value in options.items():
        found = next((one for one in name.split("__") if one in known), None)
        if found is not None:
            made[found] = value
    return made


def device_lacks(oldest: int, newest: int, what: str) -> str | None:
    """Why the current GPU does not run a kernel; None where it does.

    Args:
        oldest: first compute capability, as ``10 * major + minor``.
        newest: first one that is not served.
        what: the kernel, for the message.
    """
    found = capability()
    if found is None:
        return f"{what} needs a CUDA device, and torch {torch.__version__} sees none; {A_DEVICE}"
    if oldest <= found < newest:
        return None
    served = f"{what} runs on compute capability {oldest / 10} to below {newest / 10}"
    return f"{served}, and this device has {found / 10}; use another device, or another kernel"


A_DEVICE = "run where there is one, under a build of torch that was made for it"
"""The way out where a device is missing."""


def has_device(device_type: str) -> bool:
    """Whether torch sees a device of a type.

    Args:
        device_type: ``"cpu"``, ``"cuda"``, ...
    """
    if device_type == "cpu":
        return True
    found = getattr(torch, device_type, None)
    return found is not None and bool(found.is_available())


def capability() -> int | None:
    """Compute capability of the current GPU as ``10 * major + minor``; None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor
