"""The pytest plugin: the options of the conformance kit. Loaded in every run of pytest, so that it imports no torch."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cphandler.testing.subject import Subject

KIT = "cphandler.testing.test_conformance"
"""The module whose tests need the options."""

HOW = "pytest --pyargs cphandler.testing --cp-backend mypackage.module:MyHandler"
"""How the kit is run."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options, in a group of their own."""
    group = parser.getgroup("cphandler", f"laws of context-parallel handlers, for {HOW}")
    group.addoption(
        "--cp-backend",
        metavar="NAME",
        help='the handler class: "module:Class", or a registered name such as "ring" or "local/a2a+p2p"',
    )
    group.addoption(
        "--cp-size",
        action="append",
        type=_size,
        metavar="P",
        help="ranks of a context-parallel group; may be given several times (default: 1, 2, 3 and 4)",
    )
    group.addoption(
        "--cp-heads",
        type=_heads,
        metavar="N,G",
        help="query heads and key heads (default: 4,2)",
    )
    group.addoption(
        "--cp-config",
        action="append",
        type=_setting,
        metavar="NAME=VALUE",
        help='a setting of CPConfig, such as "kernel=reference"; may be given several times',
    )


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of ranks")
    return int(text)


def _heads(text: str) -> tuple[int, int]:
    numbers = [int(part) for part in text.split(",") if part.isdecimal()]
    if len(numbers) != 2 or 0 in numbers or numbers[0] % numbers[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not N,G with query heads N a multiple of key heads G")
    return numbers[0], numbers[1]


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def subject_of(config: pytest.Config) -> Subject:
    """What the options ask to be tested.

    Args:
        config: pytest's.

    Raises:
        pytest.UsageError: no backend, or one that there is not.
    """
    backend = config.getoption("cp_backend")
    if backend is None:
        raise pytest.UsageError(f"these tests need a handler class, by name or as module:Class: {HOW}")
    here = str(config.invocation_params.dir)
    if here not in sys.path:  # unlike "python -m pytest", the command "pytest" leaves it out; ranks inherit the path
        sys.path.append(here)
    try:
        kit = import_module("cphandler.testing.subject")  # imports torch, which only a run of the kit needs
        subject: Subject = kit.Subject.named(
            backend,
            sizes=config.getoption("cp_size") or (),
            heads=config.getoption("cp_heads"),
            config=dict(config.getoption("cp_config") or ()),
        )
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise pytest.UsageError(f"--cp-backend {backend}: {error}") from error
    return subject


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say what is tested."""
    backend = config.getoption("cp_backend")
    return None if backend is None else f"cphandler: --cp-backend {backend}"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse options that say nothing to test, where the kit's tests are among those that will run."""
    if any(getattr(getattr(item, "module", None), "__name__", None) == KIT for item in items):
        subject_of(config)
