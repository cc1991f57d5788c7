"""Real documents from the machine itself: the sources of Python's standard library, as bytes, packed."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cphandler import pack_documents, pack_lengths


def source_files() -> list[Path]:
    """The standard library's Python files, in a fixed order; third-party packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path for path in root.rglob("*.py") if "site-packages" not in path.parts and "dist-packages" not in path.parts
    ]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def read_documents(token_count: int, longest: int, seed: int) -> list[Tensor]:
    """Files in random order, one byte a token, until there are enough tokens; files are read again if they run out.

    Args:
        token_count: tokens wanted at least.
        longest: a longer file becomes several documents.
        seed: of the order.
    """
    files = source_files()
    random.Random(seed).shuffle(files)
    documents: list[Tensor] = []
    total = 0
    while total < token_count:
        before = total
        for path in files:
            content = path.read_bytes()
            for start in range(0, len(content), longest):
                piece = content[start : start + longest]
                documents.append(torch.frombuffer(bytearray(piece), dtype=torch.uint8).to(torch.int64))
            total += len(content)
            if total >= token_count:
                break
        if total == before:
            raise FileNotFoundError("no Python sources found in the standard library's folder")
    return documents


def packed_batches(steps: int, seq_len: int, longest: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """One packed batch of ``seq_len`` tokens for each training step, documents kept apart.

    Args:
        steps: batches wanted.
        seq_len: token budget of a batch.
        longest: tokens of the longest document; None lets one fill a batch.
        seed: of the choice and order of documents.
    """
    documents = read_documents(steps * seq_len + seq_len, min(longest or seq_len, seq_len), seed)
    packs = pack_lengths([len(document) for document in documents], seq_len)
    random.Random(seed).shuffle(packs)
    return [pack_documents([documents[i] for i in pack], token_budget=seq_len) for pack in packs[:steps]]
