"""Other projects' context parallelism, as released, for the benchmark of attention: a file for each project.

Peers are named by import path, and imported where they run. ``benchmarks/README.md`` says how to install them.
"""

from __future__ import annotations

from importlib import import_module

from benchmarks.peers.peer import Peer, Shape

__all__ = ["PEERS", "Peer", "Shape", "peer_cls"]

PEERS = (
    "benchmarks.peers.torch_ring:TorchRing",
    "benchmarks.peers.torch_ring:TorchGather",
    "benchmarks.peers.ring_flash_attention:RingFlashAttention",
    "benchmarks.peers.yunchang_attention:YunchangUlysses",
    "benchmarks.peers.yunchang_attention:YunchangUSP",
    "benchmarks.peers.deepspeed_ulysses:DeepSpeedUlysses",
    "benchmarks.peers.deepspeed_ulysses:DeepSpeedALST",
    "benchmarks.peers.ringmaster_ulysses:RingmasterUlysses",
)
"""Every peer, ``module:class``."""


def peer_cls(path: str) -> type[Peer]:
    """The class at ``module:class``.

    Raises:
        ValueError: there is none, or it is no peer.
    """
    module, _, name = path.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"a peer is named by module:class, got {path!r}: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Peer)):
        raise ValueError(f"{path!r} is no class of benchmarks.peers.Peer")
    return found
