"""Labels of language modelling: the next token of the same document, whichever rank holds it."""

from __future__ import annotations

import torch
from torch import Tensor

from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.handler.contract import ContextParallelHandler
from cphandler.tokens.documents import Offsets, checked_offsets

IGNORED = -100
"""What ``torch.nn.functional.cross_entropy`` ignores unless told otherwise."""


def next_token_labels(
    ids: Tensor, handler: ContextParallelHandler, *, depths: int | None = None, ignore_index: int = IGNORED
) -> Tensor:
    """The token after each local token, in the same document.

    Shifting before the batch is cut and shifting after it by a rank's own rows are both usual, and the second is wrong
    at every cut. This one asks the handler, so that the result is the same for every layout.

    Args:
        ids: local token numbers, ``[L]`` packed; ``[B, L]`` or, for ``sbhd``, ``[L, B]`` dense: what ``dispatch`` gave.
        handler: the batch's.
        depths: None for the next token; a number K for the tokens 1 to K ahead, as multi-token prediction asks for.
        ignore_index: the label at the end of a document, of padding, and where padding comes next.

    Returns:
        The shape of ``ids``, or ``[K, ...]``; int64.

    Raises:
        InvalidTypeError: ids that are not integers, depths that are not an int.
        InvalidValueError: depths below 1, ids that are not local.
    """
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise InvalidTypeError("ids must be integers", got=got, fix="pass the local token numbers")
    if depths is not None and (isinstance(depths, bool) or not isinstance(depths, int)):
        raise InvalidTypeError("depths must be an int", got=repr(depths), fix="3 for the tokens 1, 2 and 3 ahead")
    if depths is not None and depths < 1:
        raise InvalidValueError("depths must be 1 or more", got=depths, fix="None for the next token alone")
    dim = 0 if handler.qkv_format == "sbhd" else ids.dim() - 1
    real = _spread(handler.valid_mask, ids, dim)
    source, labels = ids.to(torch.int64).masked_fill(~real, ignore_index), []
    for depth in range(1, (depths or 1) + 1):
        ahead, _ = handler.roll_tensor(source, -depth, dim, fill_value=ignore_index, return_sum=False)
        assert ahead is not None
        labels.append(ahead.masked_fill(~real, ignore_index))
    return labels[0] if depths is None else torch.stack(labels)


def _spread(valid: Tensor, ids: Tensor, dim: int) -> Tensor:
    """A mask ``[L]`` or ``[B, L]`` in the shape of ids."""
    valid = valid.to(ids.device)
    if valid.dim() == 2:
        return valid.t() if dim == 0 else valid
    return valid.expand_as(ids) if dim == ids.dim() - 1 else valid.unsqueeze(1).expand_as(ids)


def shift_labels(
    labels: Tensor, cu_seqlens: Offsets | None = None, *, dim: int = -1, ignore_index: int = IGNORED
) -> Tensor:
    """Global labels that stand at their own token, moved to the token that predicts them; before the batch is cut.

    Args:
        labels: ``[..., S, ...]`` of all tokens.
        cu_seqlens: ``[D + 1]`` offsets of documents in ``dim``; None for one document.
        dim: the sequence.
        ignore_index: the label of each document's last token.

    Raises:
        InvalidValueError: offsets that do not end at the number of tokens.
    """
    length = labels.shape[dim]
    shifted = labels.roll(-1, dim).movedim(dim, 0).clone()
    offsets = [0, length] if cu_seqlens is None else checked_offsets(cu_seqlens, "cu_seqlens").tolist()
    ends = torch.tensor(offsets[1:], dtype=torch.int64)
    if length and (len(ends) == 0 or int(ends[-1]) != length):
        raise InvalidValueError(
            "offsets must end at the number of tokens",
            got=f"{int(ends[-1]) if len(ends) else 0}, and {length} tokens in dim {dim}",
            fix="pass the offsets of all documents, of padding behind them too",
        )
    shifted[(ends[ends > 0] - 1).to(labels.device)] = ignore_index
    return shifted.movedim(0, dim)
