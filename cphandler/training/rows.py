"""What a rank's rows of a batch are: real or padding, of which sequence, and where in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from cphandler.comm.groups import CPGroup, GroupSource, resolve_group
from cphandler.errors import InvalidValueError
from cphandler.handler.contract import ContextParallelHandler

T = TypeVar("T")


def agreed(handler: ContextParallelHandler, method: str, check: Callable[[], T], describe: Callable[[T], str]) -> T:
    """What a check gives, before an exchange over the batch's ranks: where it raises on one, the others are told.

    Args:
        handler: the batch's.
        method: how errors of other ranks call the function.
        check: checks this rank's arguments.
        describe: what it gave, in words that must be the same on all ranks.
    """
    if not handler.sequence_sharded or torch.compiler.is_compiling():
        return check()
    return handler.agreed(method, check, describe)


def holders(handler: ContextParallelHandler) -> tuple[str, ...]:
    """The name of the group whose other ranks hold other tokens of the batch; none where every rank holds all."""
    return _names([handler.ranks] if handler.sequence_sharded else [])


def further_holders(group: GroupSource) -> tuple[str, ...]:
    """The name of the group whose other ranks hold other batches; none without one."""
    return _names([] if group is None else [resolve_group(group)])


def _names(groups: Sequence[CPGroup]) -> tuple[str, ...]:
    """Of groups with more than one rank. One that cannot communicate has no name, which collectives refuse."""
    return tuple(group.name for group in groups if group.size > 1)


def rows_dim(name: str, values: Tensor, handler: ContextParallelHandler) -> int:
    """The dim of this rank's rows.

    Args:
        name: how errors call the tensor.
        values: ``[L, ...]`` or ``[1, L, ...]`` packed; ``[B, L, ...]``, or ``[L, B, ...]`` for ``sbhd``.
        handler: the batch's.

    Raises:
        InvalidValueError: no such dim, or another number of rows in it.
    """
    rows = handler.num_local_tokens
    if handler.qkv_format == "thd":
        dim = 1 if values.dim() > 1 and values.shape[0] == 1 and values.shape[1] == rows else 0
        form = "[L, ...] or [1, L, ...]"
    else:
        dim, form = (1, "[B, L, ...]") if handler.qkv_format == "bshd" else (0, "[L, B, ...]")
    least = 1 if handler.qkv_format == "thd" else 2
    if values.dim() < least or values.shape[dim] != rows:
        raise InvalidValueError(
            f"{name} must be this rank's rows, {form} with L = {rows}",
            got=f"shape {list(values.shape)}",
            fix="pass what dispatch gave, or what was computed from it",
        )
    padded = handler.queries.padded_rows
    if padded is not None and handler.qkv_format != "thd" and values.shape[1 - dim] != padded.num_documents:
        raise InvalidValueError(
            f"{name} must have the {padded.num_documents} rows of the batch, {form}",
            got=f"shape {list(values.shape)}",
            fix="pass what dispatch gave, or what was computed from it",
        )
    return dim


def check_one_per_token(name: str, values: Tensor, handler: ContextParallelHandler) -> int:
    """The dim of this rank's rows, of values that are one number for each token.

    Args:
        name: how errors call the tensor.
        values: ``[L]`` or ``[1, L]`` packed; ``[B, L]``, or ``[L, B]`` for ``sbhd``.
        handler: the batch's.

    Raises:
        InvalidValueError: another number of rows, or more dims.
    """
    dim = rows_dim(name, values, handler)
    if values.dim() > (1 + dim if handler.qkv_format == "thd" else 2):
        raise InvalidValueError(
            f"{name} must be one number for each of this rank's {handler.num_local_tokens} rows",
            got=f"shape {list(values.shape)}",
            fix="reduce what each token has to one number first",
        )
    return dim


def real_rows(handler: ContextParallelHandler, like: Tensor, dim: int) -> Tensor:
    """Which local rows hold a real token, bool, in the shape of ``like``.

    Args:
        handler: the batch's.
        like: one number for each token.
        dim: of the rows in it.
    """
    valid = handler.valid_mask.to(like.device)
    if valid.dim() == 2:
        return valid.t() if dim == 0 else valid
    return valid if like.dim() == 1 else valid.unsqueeze(1 - dim).expand(like.shape)


def sequence_numbers(values: Tensor, handler: ContextParallelHandler) -> tuple[Tensor, int]:
    """``[n]`` number of each local value's sequence, in the order of ``values.flatten()``, and how many there are."""
    if handler.qkv_format == "thd":
        documents = handler.documents
        numbers = torch.from_numpy(documents.document_of(np.arange(documents.num_tokens)))
        local = handler.dispatch(numbers, 0, pad_value=0)
        return local.to(values.device).expand(values.shape).reshape(-1), documents.num_documents
    batch_dim = 1 if handler.qkv_format == "sbhd" else 0
    rows = torch.arange(values.shape[batch_dim], device=values.device)
    shape = (1, -1) if batch_dim else (-1, 1)
    return rows.view(shape).expand(values.shape).reshape(-1), values.shape[batch_dim]


def sequence_places(values: Tensor, handler: ContextParallelHandler) -> Tensor:
    """The global number of each local value's token along the sequence dim, in the shape of ``values``."""
    tokens = torch.arange(handler.documents.num_tokens)
    local = handler.dispatch(tokens, 0, pad_value=-1).to(values.device)
    along = (-1, 1) if handler.qkv_format == "sbhd" else (1, -1)
    return local.expand(values.shape) if values.dim() == 1 else local.view(along).expand(values.shape)
