"""``python -m cphandler``: see :mod:`cphandler.cli.app`."""

from __future__ import annotations

import sys
from importlib import import_module

from cphandler.errors import MissingPackageError


def main() -> None:
    """Run the command line.

    Raises:
        MissingPackageError: typer or rich is not installed.
        SystemExit: torch cannot be imported.
    """
    try:
        import_module("torch")
    except Exception as error:  # a broken build raises what it likes
        sys.exit(f"torch cannot be imported ({type(error).__name__}: {error}); install it again: pip install torch")
    try:
        app = import_module("cphandler.cli.app").app
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "the command line needs a package that is not installed", got=error.name, fix="pip install 'cphandler[cli]'"
        ) from error
    app()


if __name__ == "__main__":
    main()
