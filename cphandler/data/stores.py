"""Where shards of samples are kept: files that are there whole or not at all, or a mapping of tensors."""

from __future__ import annotations

import os
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cphandler.errors import InvalidTypeError, InvalidValueError, MissingPackageError, UnsupportedError

INSTALL = 'pip install "cphandler[shards]"'

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


class SampleStore(ABC):
    """Shards by sample and rank, and a text for each sample, which is written last.

    A shard that can be read is whole: nothing else is promised, and nothing is believed without its checksum.
    """

    @abstractmethod
    def write_shard(self, key: str, rank: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep a rank's tensors; those that were there before are replaced."""

    @abstractmethod
    def read_shard(self, key: str, rank: int, names: Sequence[str]) -> dict[str, Tensor] | None:
        """A rank's tensors, on the host and the caller's own; None where one is missing."""

    @abstractmethod
    def has_shard(self, key: str, rank: int, names: Sequence[str]) -> bool:
        """Whether all of a rank's tensors are there, whatever they hold."""

    @abstractmethod
    def write_text(self, key: str, text: str) -> None:
        """Keep a sample's text."""

    @abstractmethod
    def read_text(self, key: str) -> str | None:
        """A sample's text; None where there is none."""

    @abstractmethod
    def remove_text(self, key: str) -> None:
        """Take a sample's text away, so that nobody reads the sample while it is written anew."""


class MappingStore(SampleStore):
    """A mapping of tensors, under the names ``key/rank/name`` and ``key/manifest``, the text as its bytes.

    Args:
        mapping: a dict, or the front of an object store.
    """

    def __init__(self, mapping: MutableMapping[str, Tensor]) -> None:
        self.mapping = mapping

    def write_shard(self, key: str, rank: int, tensors: Mapping[str, Tensor]) -> None:
        """See :meth:`SampleStore.write_shard`."""
        for name, tensor in tensors.items():
            self.mapping[f"{key}/{rank}/{name}"] = tensor

    def read_shard(self, key: str, rank: int, names: Sequence[str]) -> dict[str, Tensor] | None:
        """See :meth:`SampleStore.read_shard`.

        Raises:
            InvalidTypeError: what is there is no tensor.
        """
        found = {name: self._tensor(f"{key}/{rank}/{name}") for name in names}
        kept = {name: tensor for name, tensor in found.items() if tensor is not None}
        return kept if len(kept) == len(found) else None

    def has_shard(self, key: str, rank: int, names: Sequence[str]) -> bool:
        """See :meth:`SampleStore.has_shard`."""
        return all(f"{key}/{rank}/{name}" in self.mapping for name in names)

    def write_text(self, key: str, text: str) -> None:
        """See :meth:`SampleStore.write_text`."""
        self.mapping[f"{key}/manifest"] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def read_text(self, key: str) -> str | None:
        """See :meth:`SampleStore.read_text`."""
        data = self._tensor(f"{key}/manifest")
        if data is None:
            return None
        return bytes(data.to(torch.uint8).reshape(-1).numpy()).decode(errors="replace")

    def remove_text(self, key: str) -> None:
        """See :meth:`SampleStore.remove_text`."""
        self.mapping.pop(f"{key}/manifest", None)

    def _tensor(self, name: str) -> Tensor | None:
        try:
            tensor: object = self.mapping[name]
        except KeyError:
            return None
        if not isinstance(tensor, Tensor):
            raise InvalidTypeError(
                f"the store must hold tensors, and {name!r} is none",
                got=type(tensor).__name__,
                fix="decode what the store holds into tensors, never by pickle",
            )
        return tensor.detach().cpu().clone()


class SafetensorsStore(SampleStore):
    """A folder of safetensors files, ``<key>/rank-3-of-8.safetensors``, and a JSON file for each sample.

    Each file is written under another name and renamed when it is whole, the text last. Pickles are neither written
    nor read. Needs the package safetensors.

    Args:
        folder: made where it is not there; on one file system for all who read and write.

    Raises:
        MissingPackageError: safetensors cannot be imported.
        InvalidTypeError: no path.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
            raise InvalidTypeError(
                "folder must be a path", got=repr(folder), fix="pass a folder's name, such as 'data'"
            )
        self._package, self._torch = _safetensors()
        self.folder = Path(folder)

    def write_shard(self, key: str, rank: int, tensors: Mapping[str, Tensor]) -> None:
        """See :meth:`SampleStore.write_shard`."""
        path = self._path(key, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _whole(path) as beside:
            try:
                self._torch.save_file(dict(tensors), beside)
            except (self._package.SafetensorError, KeyError, ValueError) as error:
                dtypes = ", ".join(sorted({str(x.dtype) for x in tensors.values()}))
                raise UnsupportedError(
                    "safetensors cannot hold this sample", got=f"{dtypes}: {error}", fix="cast or leave out a tensor"
                ) from error

    def read_shard(self, key: str, rank: int, names: Sequence[str]) -> dict[str, Tensor] | None:
        """See :meth:`SampleStore.read_shard`.

        Raises:
            InvalidValueError: a file that is no safetensors file, or part of one.
        """
        path = self._path(key, rank)
        if not path.is_file():
            return None
        try:
            with self._package.safe_open(path, framework="pt") as file:
                held = set(file.keys())
                return {name: file.get_tensor(name).clone() for name in names} if held == set(names) else None
        except (self._package.SafetensorError, ValueError, OSError) as error:
            raise InvalidValueError(
                f"the shard of rank {rank} of sample {key!r} is damaged", got=str(error), fix="write the sample again"
            ) from error

    def has_shard(self, key: str, rank: int, names: Sequence[str]) -> bool:
        """See :meth:`SampleStore.has_shard`."""
        del names
        return self._path(key, rank).is_file()

    def write_text(self, key: str, text: str) -> None:
        """See :meth:`SampleStore.write_text`."""
        path = self.folder / key / "manifest.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with _whole(path) as beside:
            beside.write_text(text)

    def read_text(self, key: str) -> str | None:
        """See :meth:`SampleStore.read_text`."""
        path = self.folder / key / "manifest.json"
        return path.read_text(errors="replace") if path.is_file() else None

    def remove_text(self, key: str) -> None:
        """See :meth:`SampleStore.remove_text`."""
        (self.folder / key / "manifest.json").unlink(missing_ok=True)

    def _path(self, key: str, rank: int) -> Path:
        return self.folder / key / f"rank-{rank}.safetensors"


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Another name to write a file under; it appears under its own when all of it is on the disk, or not at all."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield beside
        for written in (beside, path.parent):  # the folder too: it lists what was renamed before
            handle = os.open(written, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _safetensors() -> tuple[Any, ModuleType]:
    try:
        return import_module("safetensors"), import_module("safetensors.torch")
    except ImportError as error:
        raise MissingPackageError(
            "SafetensorsStore needs the package safetensors", got=str(error), fix=f"install it: {INSTALL}"
        ) from error


def checked_store(store: object) -> SampleStore:
    """A store, or a mapping made one.

    Raises:
        InvalidTypeError: neither.
    """
    if isinstance(store, SampleStore):
        return store
    if isinstance(store, MutableMapping):
        return MappingStore(store)
    raise InvalidTypeError(
        "store must be a SafetensorsStore or a mapping of tensors",
        got=type(store).__name__,
        fix="pass SafetensorsStore(folder), or a dict",
    )


def checked_key(key: object) -> str:
    """A sample's name that may be a folder's.

    Raises:
        InvalidTypeError: no string.
        InvalidValueError: letters that a folder's name should not have, or none.
    """
    fix = "use up to 200 letters, digits, '.', '_' and '-', and begin with one of the first two or '_'"
    if not isinstance(key, str):
        raise InvalidTypeError("a sample's key must be a string", got=type(key).__name__, fix=fix)
    if not _KEY.fullmatch(key):
        raise InvalidValueError("a sample's key must be a plain name", got=repr(key), fix=fix)
    return key
