"""Where transformers is missing or broken; these run without it too."""

from __future__ import annotations

import sys

import pytest
from torch import nn

from cphandler import MissingPackageError
from cphandler.integrations import huggingface


def test_a_missing_package_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "cphandler.integrations.huggingface.trainer", raising=False)
    with pytest.raises(MissingPackageError, match=r"pip install 'cphandler\[hf\]'"):
        huggingface.parallelize(nn.Linear(1, 1), None)
    with pytest.raises(MissingPackageError, match=r"pip install 'cphandler\[hf\]'"):
        huggingface.Trainer  # noqa: B018


def test_other_names_are_no_part_of_it() -> None:
    with pytest.raises(AttributeError, match="Pipeline"):
        huggingface.Pipeline  # noqa: B018
