"""Labels of language modelling: the next token of the same document, whichever rank holds it."""

from __future__ import annotations

from reprlib import repr as short_repr

import torch
from torch import Tensor

from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.handler.contract import ContextParallelHandler
from cphandler.tokens.counts import checked_count
from cphandler.tokens.documents import Offsets, checked_offsets
from cphandler.training.arguments import check_integers, checked_handler, checked_label
from cphandler.training.rows import check_one_per_token, real_rows

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
        InvalidValueError: depths below 1, ids that are not local, an ``ignore_index`` that could be a token.
    """
    check_integers("ids", ids)
    handler, ignore_index = checked_handler(handler), checked_label(ignore_index)
    if depths is not None:
        depths = checked_count("depths", depths, least=1, fix="3 for the tokens 1, 2 and 3 ahead, None for the next")
    dim = check_one_per_token("ids", ids, handler)
    real = real_rows(handler, ids, dim)
    source = ids.to(torch.int64).masked_fill(~real, ignore_index)
    shifts = -1 if depths is None else [-depth for depth in range(1, depths + 1)]
    ahead, _ = handler.roll_tensor(source, shifts, dim, fill_value=ignore_index, return_sum=False)
    assert ahead is not None
    return ahead.masked_fill(~real, ignore_index)


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
        InvalidTypeError: labels that are not integers, a dim that is no int.
        InvalidValueError: offsets that do not end at the number of tokens, a dim that there is not.
    """
    check_integers("labels", labels)
    ignore_index = checked_label(ignore_index)
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise InvalidTypeError("dim must be an int", got=short_repr(dim), fix="-1 for the last")
    if not -labels.dim() <= dim < labels.dim():
        raise InvalidValueError("labels have no such dim", got=f"{dim} of {labels.dim()}", fix="-1 is the last")
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
