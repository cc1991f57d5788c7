"""transformers and accelerate as installed: imported when they are used, and refused by name where they will not do."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from cphandler.errors import MissingPackageError

INSTALL = "pip install 'cphandler[hf]'"


def stack_module(name: str) -> Any:
    """A module of transformers or of accelerate.

    Args:
        name: dotted, from the package on.

    Raises:
        MissingPackageError: it cannot be imported.
    """
    try:
        return import_module(name)
    except Exception as error:  # a package that is half installed may raise anything
        raise MissingPackageError(
            "cphandler.integrations.huggingface needs transformers 4.57 or later",
            got=f"{type(error).__name__}: {error}",
            fix=INSTALL,
        ) from error


def transformers_module(name: str = "") -> Any:
    """A module of transformers; the package itself without a name."""
    return stack_module(f"transformers.{name}" if name else "transformers")
