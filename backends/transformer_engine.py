"""TransformerEngine behind the contract: one handler for each of its ways to communicate."""

from __future__ import annotations

from cphandler.engines import te_attention as te
from cphandler.engines.te_package import engine
from cphandler.handler.layout_handler import LayoutHandler


class TEHandler(LayoutHandler):
    """Attention by TransformerEngine, whose keys travel round a ring (``"p2p"``).

    Each document is padded at its end to a multiple of ``2 * cp_size``, as the engine wants it: a rank's rows hold pad
    rows where a length does not divide, and otherwise stand as in the library's ``zigzag``. Nothing is asked of the
    caller, and everything but attention is the library's own.

    ``attn_mod`` is None or a :class:`CoreAttention`, for a module that is made once for its heads and channels, or a
    ``transformer_engine.pytorch.DotProductAttention`` of the caller's, whose group is put back after each call.
    """

    comm_type = "p2p"
    package = "transformer_engine"
    capabilities = te.capability_table()
    attention_cls = te.TEAttention
    own_layout = staticmethod(te.engine_layout)

    @classmethod
    def check_package(cls) -> None:
        """See :meth:`ContextParallelHandler.check_package`."""
        engine()


class TEGatherHandler(TEHandler):
    """Keys and values of all ranks are gathered before attention."""

    comm_type = "all_gather"
    capabilities = te.capability_table(windows=True)
    attention_cls = te.TEGatherAttention


class TEUlyssesHandler(TEHandler):
    """Each rank computes some heads over all tokens; query and key heads divide by the ranks."""

    comm_type = "a2a"
    capabilities = te.capability_table("sinks", windows=True)
    attention_cls = te.TEUlyssesAttention


class TEUSPHandler(TEHandler):
    """Heads for tokens in groups of neighbours, keys round a ring between the groups; see :class:`USPHandler`."""

    comm_type = "a2a+p2p"
    two_level = True
    capabilities = te.capability_table("ulysses_degree")
    attention_cls = te.TEUSPAttention
