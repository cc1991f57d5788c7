"""Samples cut where they are made: a producer writes every rank's rows, and each rank reads its own.

For data that one process makes and several read, the hidden states of a target model say, so that no rank loads what it
does not hold. Producer and reader compute which rows those are by the same function, :class:`SampleRows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, KeysView, Mapping, MutableMapping
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from cphandler.data.manifest import SampleField, SampleManifest, SampleShard, checksum_of
from cphandler.data.rows import SampleRows
from cphandler.data.stores import SampleStore, checked_key, checked_store
from cphandler.errors import InvalidTypeError, InvalidValueError, UnsupportedError
from cphandler.handler.contract import ContextParallelHandler
from cphandler.layouts.layout import Layout
from cphandler.plan.batch_plan import BatchPlan
from cphandler.sharding.dispatch import as_movable, filler, restored
from cphandler.sharding.shard import HOST
from cphandler.tensors import check_plain, device_copy
from cphandler.tokens.counts import checked_count, checked_flag
from cphandler.tokens.documents import Documents
from cphandler.tokens.intervals import Table

Store: TypeAlias = "SampleStore | MutableMapping[str, Tensor]"
"""Where samples are kept."""

MOST_HALO = 1 << 20
"""A halo of more tokens is a mistake."""


class ShardedSample:
    """One rank's rows of a sample, and what it needs to know of them; what it hands out is the caller's own.

    It reads like a mapping and is none, since data loaders make plain dicts of those.

    ``sample["hidden"]`` has the local rows ``[..., L, ...]`` in the layout's order, as ``dispatch`` would give them.
    The halo shows in :meth:`ahead` alone.

    Attributes:
        manifest: of the whole sample.
        rank: whose rows.
        device: where they are.
    """

    def __init__(
        self, manifest: SampleManifest, rows: SampleRows, tensors: Mapping[str, Tensor], device: torch.device = HOST
    ) -> None:
        self.manifest = manifest
        self.rank = rows.shard.rank
        self.device = device
        self._rows = rows
        self._tensors = dict(tensors)

    def __reduce__(self) -> tuple[Callable[..., ShardedSample], tuple[object, ...]]:
        return _unpickled, (self.manifest, self._rows.shard.layout, self.rank, self._tensors, self.device)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ShardedSample:
        """The same sample on a device; it then answers with tensors there.

        Args:
            device: as ``Tensor.to`` takes it.
            non_blocking: as ``Tensor.to`` takes it.
        """
        moved = {name: x.to(device, non_blocking=non_blocking) for name, x in self._tensors.items()}
        return ShardedSample(self.manifest, self._rows, moved, torch.device(device))

    def pin_memory(self) -> ShardedSample:
        """The same sample in pinned memory; what a ``DataLoader`` with ``pin_memory=True`` calls."""
        pinned = {name: x.pin_memory() for name, x in self._tensors.items()}
        return ShardedSample(self.manifest, self._rows, pinned, self.device)

    def __getitem__(self, name: str) -> Tensor:
        dim = self.manifest.fields[name].seq_dim
        return self._tensors[name].narrow(dim, 0, self._rows.num_local_tokens).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def keys(self) -> KeysView[str]:
        """The tensors' names."""
        return self._tensors.keys()

    def ahead(self, name: str, distance: int, *, fill_value: float = 0) -> Tensor:
        """``[..., L, ...]``: the rows of the tokens ``distance`` after the local ones, without communication.

        What ``roll_tensor(sample[name], -distance)`` would exchange.

        Args:
            name: of a tensor.
            distance: 0 to the halo.
            fill_value: where the document has no such token, and on pads.

        Raises:
            InvalidTypeError: a distance that is no int, a ``fill_value`` that is no number.
            InvalidValueError: further than the halo, another name, or a number that the dtype does not hold.
        """
        rows = self._rows.ahead(self._checked_distance(distance))
        if not isinstance(name, str) or name not in self._tensors:
            names = ", ".join(map(repr, self._tensors))
            raise InvalidValueError("the sample has no such tensor", got=repr(name), fix=f"it has {names or 'none'}")
        x, dim = self._tensors[name], self.manifest.fields[name].seq_dim
        bits, fill = as_movable(x), filler(fill_value, x)
        missing = device_copy(rows < 0, x.device)
        if not x.shape[dim]:
            return x.clone()
        ahead = bits.index_select(dim, device_copy(np.maximum(rows, 0), x.device))
        shape = [-1 if at == dim else 1 for at in range(x.dim())]
        return restored(ahead.masked_fill(missing.view(shape), fill), x.dtype)

    def exists(self, distance: int = 0) -> Tensor:
        """``[L]`` bool: whether each local token is real and its document has a real one ``distance`` after it.

        Raises:
            InvalidTypeError: no int.
            InvalidValueError: further than the halo.
        """
        marked = self._rows.marked(self.manifest.documents.runs, self._checked_distance(distance))
        return device_copy(marked, self.device)

    def in_loss(self, distance: int = 0) -> Tensor:
        """``[L]`` bool: whether the loss counts the token ``distance`` after each local one.

        Raises:
            InvalidTypeError: no int.
            InvalidValueError: further than the halo.
        """
        return device_copy(self._rows.marked(self.manifest.runs, self._checked_distance(distance)), self.device)

    @property
    def position_ids(self) -> Tensor:
        """``[L]`` int64 position of each local row in its document, whatever it was padded to; 0 for a pad row."""
        return self._rows.shard.position_ids.to(self.device)

    @property
    def valid_mask(self) -> Tensor:
        """``[L]`` bool: True where a local row holds a real token."""
        return self.exists(0)

    def _checked_distance(self, distance: object) -> int:
        number = checked_count("distance", distance)
        if number > self.manifest.halo:
            raise InvalidValueError(
                "the sample's halo does not reach so far",
                got=f"{number} tokens ahead, and a halo of {self.manifest.halo}",
                fix="write the sample with halo= as far as training looks",
            )
        return number


def _unpickled(
    manifest: SampleManifest, layout: Layout, rank: int, tensors: dict[str, Tensor], device: torch.device
) -> ShardedSample:
    return ShardedSample(manifest, SampleRows(manifest.documents, layout, rank, manifest.halo), tensors, device)


def write_sample(
    store: Store,
    key: str,
    sample: Mapping[str, Tensor],
    plan: BatchPlan,
    *,
    halo: int = 0,
    loss_mask: Tensor | None = None,
    seq_dims: Mapping[str, int] | None = None,
    overwrite: bool = False,
) -> SampleManifest:
    """Cut a sample for every rank of a plan and keep it; in one process, with no process group.

    Shards are written first and the manifest last, so that a sample which is being written, or whose writer died, is
    not there yet.

    Args:
        store: a :class:`SafetensorsStore`, or any mapping that takes tensors.
        key: the sample's name: letters, digits, ``.``, ``_`` and ``-``.
        sample: tensors of all tokens, ``[S, ...]`` of any dtype; S physical tokens, as the plan's documents have.
        plan: from :func:`plan_batch`.
        halo: how many tokens ahead a rank will look, for multi-token prediction or test-time training.
        loss_mask: ``[S]``, True or 1 for tokens that the loss counts; None for all real ones.
        seq_dims: the dim of the tokens where it is another than the first.
        overwrite: whether the sample may be there.

    Returns:
        What was written beside the shards.

    Raises:
        InvalidTypeError: arguments of another type.
        InvalidValueError: a tensor of another length, a mask that counts padding or has other numbers than 0 and 1, a
            key that is no plain name or is taken.
        UnsupportedError: documents with holes, or a dtype that the store does not hold.
    """
    kept, key, halo = checked_store(store), checked_key(key), _checked_halo(halo)
    documents, layout = _checked_plan(plan)
    dims = _checked_dims(sample, {} if seq_dims is None else seq_dims, documents.num_tokens)
    runs = documents.runs if loss_mask is None else _loss_runs(loss_mask, documents)
    if not checked_flag("overwrite", overwrite) and kept.read_text(key) is not None:
        raise InvalidValueError(
            "the sample is there already", got=repr(key), fix="choose another key, or overwrite=True"
        )
    kept.remove_text(key)
    shards = []
    for rank in range(layout.cp_size):
        rows = SampleRows(documents, layout, rank, halo)
        tensors = {name: _cut(x, dims[name], rows.tokens) for name, x in sample.items()}
        kept.write_shard(key, rank, tensors)
        shards.append(SampleShard(rows=len(rows.tokens), checksum=checksum_of(tensors)))
    padded = None if np.array_equal(documents.valid_offsets, documents.offsets) else tuple(documents.offsets.tolist())
    manifest = SampleManifest(
        layout=layout.name,
        layout_fingerprint=layout.fingerprint.hex(),
        cp_size=layout.cp_size,
        halo=halo,
        cu_seqlens=tuple(documents.valid_offsets.tolist()),
        cu_seqlens_padded=padded,
        loss_runs=tuple((start, stop) for start, stop in runs.tolist()),
        fields={name: _field(x, dims[name]) for name, x in sample.items()},
        shards=tuple(shards),
    )
    kept.write_text(key, manifest.to_text())
    return manifest


def read_manifest(store: Store, key: str) -> SampleManifest:
    """What a sample is: its documents to plan by, and whether the loss counts any of it. Looks for all ranks' shards.

    All ranks read the same, so that what they decide by it alone (``num_loss_tokens == 0``: skip it) they decide alike.

    Args:
        store: as for :func:`write_sample`.
        key: the sample's name.

    Raises:
        InvalidTypeError: arguments of another type.
        InvalidValueError: no such sample, one that is not whole, or a damaged manifest.
    """
    kept, key = checked_store(store), checked_key(key)
    text = kept.read_text(key)
    if text is None:
        raise InvalidValueError(
            "there is no such sample, or it is not whole yet",
            got=repr(key),
            fix="its manifest is written last: wait for the writer, or write the sample again",
        )
    manifest = SampleManifest.from_text(text, key)
    names = list(manifest.fields)
    missing = [rank for rank in range(manifest.cp_size) if not kept.has_shard(key, rank, names)]
    if missing:
        raise InvalidValueError(
            f"shards of sample {key!r} are missing",
            got=f"none for rank {', '.join(map(str, missing[:8]))}{' and others' if missing[8:] else ''}",
            fix="write the sample again",
        )
    return manifest


def read_sample(
    store: Store,
    key: str,
    plan: BatchPlan | ContextParallelHandler,
    *,
    rank: int | None = None,
    halo: int | None = None,
) -> ShardedSample:
    """One rank's rows of a sample, checked: the plan, that all shards are there, and every byte of its own.

    Args:
        store: as for :func:`write_sample`.
        key: the sample's name.
        plan: the one that it was written by, made anew from ``read_manifest(...).cu_seqlens`` say; or the handler of
            this batch, which tells the other ranks if this one refuses.
        rank: whose rows; a handler knows.
        halo: how many tokens ahead must be there; None for those that are.

    Raises:
        InvalidTypeError: arguments of another type, a BatchPlan without a rank.
        InvalidValueError: a sample of another plan, by the name of what differs; one that is not there, not whole, or
            damaged; a rank that there is not, or not the handler's.
    """
    if not isinstance(plan, ContextParallelHandler):
        return _read(store, key, _checked_plan(plan), rank, halo)
    try:
        if rank is not None and checked_count("rank", rank) != plan.cp_rank:
            raise InvalidValueError("a handler's rank is its own", got=f"{rank} and {plan.cp_rank}", fix="leave it out")
        return _read(store, key, (plan.documents, plan.layout), plan.cp_rank, halo)
    except Exception as error:
        plan.agree("read_sample", error)
        raise


def _read(store: Store, key: str, cut: tuple[Documents, Layout], rank: int | None, halo: int | None) -> ShardedSample:
    documents, layout = cut
    if rank is None:
        raise InvalidTypeError("a BatchPlan is every rank's", got="no rank", fix="pass rank=, or the handler as plan")
    rank = checked_count("rank", rank)
    if rank >= layout.cp_size:
        raise InvalidValueError("there is no such rank", got=rank, fix=f"ranks are 0 to {layout.cp_size - 1}")
    needed = None if halo is None else _checked_halo(halo)
    manifest, kept = read_manifest(store, key), checked_store(store)
    manifest.check_plan(documents, layout, needed)
    rows = SampleRows(documents, layout, rank, manifest.halo)
    tensors = kept.read_shard(key, rank, list(manifest.fields))
    if tensors is None or not _is_whole(tensors, manifest, rows):
        raise InvalidValueError(
            f"the shard of rank {rank} of sample {key!r} is damaged, or of another writing",
            got="no tensors" if tensors is None else "tensors that the manifest's checksum does not fit",
            fix="write the sample again; two writers need two keys",
        )
    return ShardedSample(manifest, rows, tensors)


def _is_whole(tensors: Mapping[str, Tensor], manifest: SampleManifest, rows: SampleRows) -> bool:
    """Whether a shard is the one that the manifest speaks of, and has the rows that the plan gives it."""
    shard, count = manifest.shards[rows.shard.rank], len(rows.tokens)
    shapes = all(
        tensors[name].dtype == field.torch_dtype and list(tensors[name].shape) == field.shard_shape(count)
        for name, field in manifest.fields.items()
    )
    return shapes and shard.rows == count and checksum_of(tensors) == shard.checksum


def _checked_halo(halo: object) -> int:
    number = checked_count("halo", halo)
    if number > MOST_HALO:
        raise InvalidValueError("halo is more than anyone looks ahead", got=number, fix="pass a few tokens")
    return number


def _checked_plan(plan: object) -> tuple[Documents, Layout]:
    if not isinstance(plan, BatchPlan):
        raise InvalidTypeError("plan must be a BatchPlan", got=type(plan).__name__, fix="pass what plan_batch makes")
    documents = plan.documents
    prefixes = Documents.from_cu_seqlens(documents.valid_offsets, documents.offsets)
    if not np.array_equal(prefixes.runs, documents.runs):
        raise UnsupportedError("a sample's documents are padded at their ends alone", fix="pack them without holes")
    return documents, plan.layout


def _checked_dims(sample: object, seq_dims: object, length: int) -> dict[str, int]:
    """The dim of the tokens of each tensor."""
    for name, value in {"sample": sample, "seq_dims": seq_dims}.items():
        if not isinstance(value, Mapping) or not all(isinstance(key, str) and key for key in value):
            raise InvalidTypeError(
                f"{name} must be a mapping with names", got=type(value).__name__, fix="pass {'tokens': ids}, say"
            )
    assert isinstance(sample, Mapping)
    assert isinstance(seq_dims, Mapping)
    unknown = [name for name in seq_dims if name not in sample]
    if unknown:
        raise InvalidValueError("seq_dims names what the sample does not have", got=unknown[0], fix="leave it out")
    return {name: _seq_dim(name, x, seq_dims.get(name, 0), length) for name, x in sample.items()}


def _seq_dim(name: str, x: object, dim: object, length: int) -> int:
    if not isinstance(x, Tensor) or x.device.type == "meta":
        got = "a tensor on meta" if isinstance(x, Tensor) else type(x).__name__
        raise InvalidTypeError(f"sample[{name!r}] must be a tensor", got=got, fix="pass [S, ...] with its numbers")
    check_plain(x, f"sample[{name!r}]")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise InvalidTypeError(f"seq_dims[{name!r}] must be an int", got=repr(dim), fix="0 is the first dim")
    if not -x.dim() <= dim < x.dim() or x.shape[dim] != length:
        raise InvalidValueError(
            f"sample[{name!r}] must have the plan's {length} tokens in dim {dim}",
            got=f"shape {list(x.shape)}",
            fix="pass the whole tensor, padding between documents included, and its dim with seq_dims=",
        )
    return dim % x.dim()


def _loss_runs(loss_mask: object, documents: Documents) -> Table:
    """``[start, stop)`` of what the loss counts."""
    fix = "pass [S] of True and False, or 1 and 0, for all tokens of the plan; weights are a tensor of the sample"
    if not isinstance(loss_mask, Tensor) or loss_mask.is_complex() or loss_mask.device.type == "meta":
        raise InvalidTypeError("loss_mask must be a tensor of truth values", got=type(loss_mask).__name__, fix=fix)
    check_plain(loss_mask, "loss_mask")
    mask = loss_mask.detach().cpu()
    if list(mask.shape) != [documents.num_tokens]:
        raise InvalidValueError(f"loss_mask must be [{documents.num_tokens}]", got=f"shape {list(mask.shape)}", fix=fix)
    counted = mask.to(torch.float64).numpy()
    if not np.isin(counted, (0, 1)).all():
        raise InvalidValueError("loss_mask must hold 0 and 1 alone", got=float(counted.max()), fix=fix)
    real = documents.is_valid(np.arange(documents.num_tokens, dtype=np.int64))
    if (counted.astype(bool) & ~real).any():
        token = int(np.flatnonzero(counted.astype(bool) & ~real)[0])
        raise InvalidValueError("loss_mask counts padding", got=f"token {token}", fix="clear it where padding is")
    edges = np.flatnonzero(np.diff(counted.astype(np.int8), prepend=0, append=0))
    return edges.astype(np.int64).reshape(-1, 2)


def _cut(x: Tensor, dim: int, tokens: Table) -> Tensor:
    """The rows of some tokens, on the host; zeros where there is none."""
    bits = as_movable(x.detach())
    if not x.shape[dim]:
        rows = bits.new_zeros([len(tokens) if at == dim else n for at, n in enumerate(x.shape)])
    else:
        pads = device_copy(tokens < 0, x.device).view([-1 if at == dim else 1 for at in range(x.dim())])
        rows = bits.index_select(dim, device_copy(np.maximum(tokens, 0), x.device)).masked_fill(pads, 0)
    return restored(rows.cpu(), x.dtype).contiguous()


def _field(x: Tensor, dim: int) -> SampleField:
    return SampleField(dtype=str(x.dtype).removeprefix("torch."), shape=tuple(x.shape), seq_dim=dim)
