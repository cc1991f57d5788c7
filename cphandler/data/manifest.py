"""What is written beside the shards of a sample: whose they are, of what, and how to tell that they are whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from cphandler.errors import InvalidValueError
from cphandler.layouts.layout import Layout
from cphandler.tokens.documents import Documents
from cphandler.tokens.intervals import Table, table

Count = Annotated[int, Field(ge=0, le=1 << 60)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SampleField(_Frozen):
    """One tensor of a sample.

    Attributes:
        dtype: torch's name for it.
        shape: of the whole tensor, before it was cut.
        seq_dim: the dim of the tokens.
    """

    dtype: str
    shape: tuple[Count, ...]
    seq_dim: Count

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype.

        Raises:
            InvalidValueError: a name that this torch does not have.
        """
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise InvalidValueError(
                "this torch has no such dtype", got=repr(self.dtype), fix="read the sample with the torch that wrote it"
            )
        return dtype

    def shard_shape(self, rows: int) -> list[int]:
        """The shape of a shard of so many rows."""
        return [rows if dim == self.seq_dim else size for dim, size in enumerate(self.shape)]


class SampleShard(_Frozen):
    """One rank's part of a sample.

    Attributes:
        rows: local rows and halo, ``L + H``.
        checksum: of the names, dtypes, shapes and bytes of its tensors.
    """

    rows: Count
    checksum: Digest


class SampleManifest(_Frozen):
    """What a sample is, and how it was cut. The same for all ranks, so that what follows from it is, too.

    Attributes:
        format: of this description.
        layout: name of the layout.
        layout_fingerprint: of its integers.
        cp_size: ranks P.
        halo: how many tokens ahead each rank's rows reach.
        cu_seqlens: offsets of the documents' real tokens.
        cu_seqlens_padded: physical offsets; None where nothing is padded.
        loss_runs: ``[start, stop)`` of the tokens that the loss counts, in physical tokens.
        fields: the tensors by name, with their global shapes.
        shards: one for each rank.
    """

    format: Literal["cphandler.sample.1"] = "cphandler.sample.1"
    layout: str
    layout_fingerprint: Digest
    cp_size: Annotated[int, Field(ge=1, le=1 << 20)]
    halo: Count
    cu_seqlens: tuple[Count, ...]
    cu_seqlens_padded: tuple[Count, ...] | None
    loss_runs: tuple[tuple[Count, Count], ...]
    fields: dict[str, SampleField]
    shards: tuple[SampleShard, ...]

    @model_validator(mode="after")
    def _check(self) -> SampleManifest:
        tokens = self.documents.num_tokens
        if any(len(f.shape) <= f.seq_dim or f.shape[f.seq_dim] != tokens for f in self.fields.values()):
            raise ValueError("a field does not have the tokens of the documents")
        if len(self.shards) != self.cp_size:
            raise ValueError("there must be a shard for each rank")
        edges = [edge for run in self.loss_runs for edge in run]
        if edges != sorted(edges) or any(start == stop for start, stop in self.loss_runs) or edges[-1:] > [tokens]:
            raise ValueError("loss_runs must be ascending, disjoint and inside the documents")
        return self

    @cached_property
    def documents(self) -> Documents:
        """The documents of the sample."""
        padded = None if self.cu_seqlens_padded is None else list(self.cu_seqlens_padded)
        return Documents.from_cu_seqlens(list(self.cu_seqlens), padded)

    @cached_property
    def runs(self) -> Table:
        """``[R, 2]``: :attr:`loss_runs` as a table."""
        return table(self.loss_runs, 2)

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that the loss counts, on all ranks together; 0 says to all of them alike that they may skip it."""
        return sum(stop - start for start, stop in self.loss_runs)

    @property
    def loss_mask(self) -> Tensor:
        """``[S]`` bool, of the whole sample."""
        mask = torch.zeros(self.documents.num_tokens, dtype=torch.bool)
        for start, stop in self.loss_runs:
            mask[start:stop] = True
        return mask

    def check_plan(self, documents: Documents, layout: Layout, halo: int | None) -> None:
        """Refuse a plan that is not the one by which the sample was cut.

        Args:
            documents: of the reader's plan.
            layout: of the reader's plan.
            halo: tokens ahead that the reader needs; fewer than there are will do. None for what there is.

        Raises:
            InvalidValueError: what differs, by name.
        """
        own, differs = self.documents, {}
        if self.cp_size != layout.cp_size:
            differs["number of ranks"] = f"{self.cp_size} and {layout.cp_size}"
        if own.num_documents != documents.num_documents:
            differs["documents"] = f"{own.num_documents} and {documents.num_documents}"
        elif not np.array_equal(own.offsets, documents.offsets):
            i = int(np.flatnonzero(own.offsets != documents.offsets)[0]) - 1
            differs["documents"] = f"document {i} of {int(own.lengths[i])} and of {int(documents.lengths[i])} tokens"
        elif not np.array_equal(own.runs, documents.runs):
            differs["padding"] = f"{own.num_valid_tokens} and {documents.num_valid_tokens} real tokens, or others"
        if self.layout != layout.name:
            differs["layout"] = f"{self.layout!r} and {layout.name!r}"
        elif not differs and self.layout_fingerprint != layout.fingerprint.hex():
            differs["layout"] = f"{self.layout!r}, cut for another mask, tile or kernel cost"
        if halo is not None and halo > self.halo:
            differs["halo"] = f"{self.halo} and {halo} tokens"
        if differs:
            raise InvalidValueError(
                f"the sample was cut by another plan, by its {' and '.join(differs)}",
                got="; ".join(f"{name}: {told}" for name, told in differs.items()) + ", in the store and asked for",
                fix="read by the plan that it was written for, or write it again by this one",
            )

    def to_text(self) -> str:
        """JSON that :meth:`from_text` reads, with a digest of itself."""
        body = self.model_dump_json()
        return json.dumps({"digest": digest_of(body.encode()), "manifest": json.loads(body)})

    @classmethod
    def from_text(cls, text: str, key: str) -> SampleManifest:
        """What :meth:`to_text` wrote.

        Args:
            text: JSON.
            key: of the sample, for errors.

        Raises:
            InvalidValueError: text that was cut off, changed or written by something else.
        """
        fix = "write the sample again"
        try:
            found = json.loads(text)
            manifest = cls.model_validate_json(json.dumps(found["manifest"]), strict=True)
            digest = found["digest"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            told = error.errors()[0]["msg"] if isinstance(error, ValidationError) else f"{type(error).__name__}"
            raise InvalidValueError(f"the manifest of sample {key!r} is damaged", got=told, fix=fix) from error
        if digest != digest_of(manifest.model_dump_json().encode()):
            raise InvalidValueError(
                f"the manifest of sample {key!r} is damaged", got="text that its digest does not fit", fix=fix
            )
        return manifest


def digest_of(data: bytes) -> str:
    """32 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def checksum_of(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names, dtypes, shapes and bytes, in the order of names."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous()
        digest.update(json.dumps([name, str(x.dtype), list(x.shape)]).encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
