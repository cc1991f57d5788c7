"""``python -m cphandler.demo``: train on one rank, then under context parallelism, and show that they are equal."""

from __future__ import annotations

from importlib import import_module

from cphandler.errors import MissingPackageError


def main() -> None:
    """Run the command line.

    Raises:
        MissingPackageError: typer, rich or matplotlib is not installed.
    """
    try:
        app = import_module("cphandler.demo.app").app
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "the demo needs a package that is not installed", got=error.name, fix="pip install 'cphandler[demo]'"
        ) from error
    app()


if __name__ == "__main__":
    main()
