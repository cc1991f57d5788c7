"""Ulysses: two reshards around attention over whole documents (arXiv 2309.14509)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from cphandler.attention_call import AttentionCall
from cphandler.core_attention import OptionalArguments
from cphandler.errors import InvalidValueError
from cphandler.layout_handler import LayoutHandler
from cphandler.reshard import HeadSplit, gather_heads_scatter_seq, gather_seq_scatter_heads, repeat_heads

if TYPE_CHECKING:
    from typing_extensions import Unpack


class UlyssesHandler(LayoutHandler):
    """Each rank computes some heads over all tokens.

    Serves every number of query heads that the ranks divide, whatever the key heads: each key head that a rank's
    queries use travels to it once. The forward result has the same bits as on one rank.
    """

    comm_type = "a2a"
    default_layout = "contiguous"
    layouts = ("zigzag", "contiguous", "striped", "replicated")

    def core_attn(
        self, attn_mod: Any, query: Tensor, key: Tensor, value: Tensor, **options: Unpack[OptionalArguments]
    ) -> Any:
        """See :meth:`ContextParallelHandler.core_attn`; takes callables."""
        tensors = query, key, value
        call = self.attention_call(attn_mod, tensors, options, exchange="whole", check=self._check_heads)
        if self.cp_size == 1:
            return call.result(*self.attend_whole(call, call.q, call.k, call.v))
        split = HeadSplit.of(call.q.shape[2], call.k.shape[2], self.cp_size)
        order, group_name = self.sequence_order(call.q.device), self._group.name
        ranges = [split.queries, split.keys, split.keys]
        q, k, v = gather_seq_scatter_heads([call.q, call.k, call.v], ranges, order, group_name)
        repeats = split.repeats(self.cp_rank)
        out, lse = self.attend_whole(call, q, repeat_heads(k, repeats), repeat_heads(v, repeats))
        out = gather_heads_scatter_seq(out, split.queries, order, group_name)
        if call.return_lse and lse is not None:
            lse = gather_heads_scatter_seq(lse.unsqueeze(-1), split.queries, order, group_name).squeeze(-1)
            lse = lse.masked_fill(self.pad_rows(lse.device).view(1, -1, 1), float("-inf"))
        return call.result(out, lse)

    def _check_heads(self, call: AttentionCall) -> None:
        heads = call.q.shape[2]
        if heads % self.cp_size:
            sizes = [size for size in range(1, heads + 1) if heads % size == 0]
            raise InvalidValueError(
                "Ulysses splits the query heads evenly over the ranks",
                got=f"{heads} heads over {self.cp_size} ranks",
                fix=f"use cp_size {', '.join(map(str, sizes))}, or the ring backend, which takes any number of heads",
            )
