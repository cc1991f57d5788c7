"""Documents made a batch in a data loader's workers: packed, padded and planned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Literal

from torch import Tensor

from cphandler.layouts.placement import LayoutSpec
from cphandler.plan.batch_plan import plan_batch
from cphandler.tokens.counts import checked_count
from cphandler.tokens.masks import Mask, make_mask
from cphandler.tokens.packing import pack_documents


class PackingCollator:
    """A ``DataLoader``'s ``collate_fn=``: documents in, one packed batch with its plan out.

    What it does depends on the documents and its settings alone, so that ranks which draw the same documents
    (:class:`ContextParallelSampler`) have the same batch without a message. It needs no process group, can be pickled,
    and runs in workers of any start method. Settings are checked here, before a worker starts::

        loader = DataLoader(data, batch_sampler=sampler, collate_fn=PackingCollator(cp_size=8), num_workers=2)
        for batch in loader:
            plan = batch.pop("plan")
            offsets = {"cu_seqlens_q": batch["cu_seqlens"], "cu_seqlens_q_padded": batch["cu_seqlens_padded"]}
            handler = handler_cls(cp_group=group, qkv_format="thd", layout=plan, **offsets)

    Args:
        cp_size: context-parallel ranks P.
        token_budget: this and what pads are as :func:`pack_documents` has them.
        multiple_of: for each document.
        pad_to_multiple_of: for the batch.
        pad_token: of padding.
        layout: this and all that follows are as :func:`plan_batch` has them.
        mask: of most layers; or, where it is another for each batch, a function that makes it from the packed batch. It
            has an entry for the padding at the batch's end, too, if it has one for each document, and is the handler's
            as ``mask=plan.mask``.
        cp_comm_type: how keys will reach queries.
        tile: for the balanced layout.
        kernel_cost: for the balanced layout.
        ranks: whose plans to make: ``(cp_rank,)`` in a loader of one rank's own.

    Raises:
        InvalidTypeError: settings of another type.
        InvalidValueError: settings that contradict each other, or that there are not.
    """

    def __init__(
        self,
        cp_size: int,
        *,
        token_budget: int | None = None,
        multiple_of: int = 1,
        pad_to_multiple_of: int = 1,
        pad_token: int = 0,
        layout: LayoutSpec = "zigzag",
        mask: str | Mask | Callable[[Mapping[str, Any]], Mask] = "causal",
        cp_comm_type: str = "p2p",
        tile: int | None = None,
        kernel_cost: int = 0,
        ranks: Sequence[int] | AbstractSet[int] | Literal["all"] = (),
    ) -> None:
        self.cp_size = checked_count("cp_size", cp_size, least=1)
        self._packing: dict[str, Any] = {
            "token_budget": token_budget,
            "multiple_of": multiple_of,
            "pad_to_multiple_of": pad_to_multiple_of,
            "pad_token": pad_token,
        }
        self._mask = _checked_mask(mask)
        self._planning: dict[str, Any] = {
            "layout": layout,
            "cp_comm_type": cp_comm_type,
            "tile": tile,
            "kernel_cost": kernel_cost,
            "ranks": ranks,
        }
        pack_documents([], **self._packing)
        plan_batch([0, 1], self.cp_size, **self._planning)

    def __call__(self, documents: Sequence[Tensor | Mapping[str, Tensor]]) -> dict[str, Any]:
        """What :func:`pack_documents` makes of the documents, and ``plan``, a :class:`BatchPlan` of it.

        No documents are a batch of padding, of one multiple at least, so that a model has rows to run on.

        Raises:
            InvalidTypeError: as :func:`pack_documents`.
            InvalidValueError: as :func:`pack_documents` and :func:`plan_batch`.
        """
        packing = self._packing
        batch = pack_documents(documents, **packing)
        if not len(batch["tokens"]):
            batch = pack_documents(documents, **packing | {"token_budget": packing["pad_to_multiple_of"]})
        offsets = batch["cu_seqlens"], batch["cu_seqlens_padded"]
        mask = self._mask if isinstance(self._mask, Mask) else self._mask(batch)
        plan = plan_batch(offsets[0], self.cp_size, cu_seqlens_padded=offsets[1], mask=mask, **self._planning)
        return {**batch, "plan": plan}


def _checked_mask(mask: Any) -> Mask | Callable[[Mapping[str, Any]], Mask]:
    """A mask, or a function that makes one; a class is neither."""
    return mask if callable(mask) and not isinstance(mask, (Mask, type)) else make_mask(mask)
