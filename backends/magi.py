"""MagiAttention (SandAI): its own order of rows, its own exchange and kernels, behind the contract."""

from __future__ import annotations

from typing import Any, ClassVar

from cphandler.attention.capabilities import Capabilities
from cphandler.engines.magi import MagiAttention, Request, make_keys
from cphandler.engines.magi_package import magi_package
from cphandler.errors import UnsupportedError
from cphandler.handler.contract import AskedLayout
from cphandler.handler.layout_handler import LayoutHandler


class MagiHandler(LayoutHandler):
    """Self attention by MagiAttention, over the chunks that it deals out.

    The key, its plan, is made with the handler, by all ranks together; masks of single calls, and other heads, have
    keys over the same rows. Which rows these are is read off the package once: all but attention is the library's.
    A model with one kind of heads derives a class with its ``heads``, and has one key a batch.
    """

    comm_type = "magi"
    package = "magi_attention"
    heads: ClassVar[tuple[int, int, int]] = (1, 1, 128)
    """Query heads (times the batch, in dense formats), key heads and head dim that the first key is made for."""

    settings: ClassVar[Any] = None
    """A ``magi_attention.config.DistAttnConfig``: size and choice of chunks, stages of overlap; None for its own."""

    capabilities = Capabilities(
        layouts=(),
        features=frozenset({"softmax_scale", "sinks", "return_lse", "return_max_logit"}),
        instead={
            "key_padding_mask": "pack real tokens with qkv_format='thd'; so too where rows have masks of their own",
            "own_attention": "pass attn_mod=None or a CoreAttention, or use the ulysses backend",
            "gradient_wire_dtype": "leave it None; MAGI_ATTENTION_BACKWARD_HIGH_PRECISION_REDUCE=1 sends float32",
        }
        | dict.fromkeys(("softcap", "dropout", "value_head_dim", "cross_attention"), "use the p2p backend"),
    )
    attention_cls = MagiAttention

    @classmethod
    def check_package(cls) -> None:
        """See :meth:`ContextParallelHandler.check_package`."""
        magi_package()

    def prepare(self, layout: AskedLayout) -> None:
        """Have MagiAttention deal out the rows; see :meth:`ContextParallelHandler.prepare`."""
        if layout is not None:
            raise UnsupportedError("MagiHandler brings its own layout", got=repr(layout), fix="pass layout=None")
        request = Request(self.ranks, self.queries, self.keys, self.mask, self.config, self.device)
        self.keys_of_engine = make_keys(type(self).__name__, self.capabilities, request, self.heads, self.settings)
        super().prepare(self.keys_of_engine.layout(self.device))
