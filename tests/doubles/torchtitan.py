"""torchtitan's classes around context parallelism, by their signatures; see ``tests/data/torchtitan.json``."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cphandler.integrations import torchtitan


class VarlenAttentionMetadata(NamedTuple):
    cu_seq_q: Tensor
    cu_seq_k: Tensor
    max_q: int
    max_k: int


class Configurable:
    @dataclass(kw_only=True, slots=True)
    class Config:
        pass


class InnerAttention(nn.Module):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        pass


class VarlenInnerAttention(InnerAttention):
    @dataclass(kw_only=True, slots=True)
    class Config(InnerAttention.Config):
        window_size: tuple[int, int] = (-1, 0)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.window_size = config.window_size

    def forward(
        self,
        q_THK: Tensor,
        k_THK: Tensor,
        v_THV: Tensor,
        *,
        attention_metadata: VarlenAttentionMetadata,
        scale: float | None = None,
        out_transform: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        raise NotImplementedError


class CPAttention(ABC):
    @dataclass(kw_only=True, slots=True)
    class Config:
        pass

    @staticmethod
    @abstractmethod
    def prepare_cp_metadata(attention_metadata: Any, *, permutation: Tensor | None) -> Any:
        raise NotImplementedError


class ContextParallelLoadBalancer(Configurable, ABC):
    @abstractmethod
    def generate_permutation(self) -> Tensor:
        raise NotImplementedError


class HeadTailCPLoadBalancer(ContextParallelLoadBalancer):
    def __init__(self, config: Any, *, seq_len: int, attention_metadata: Any) -> None:
        raise NotImplementedError

    def generate_permutation(self) -> Tensor:
        raise NotImplementedError


def shard(tensor: Tensor, permutation: Tensor | None, group: Any) -> Tensor:
    """A rank's rows, as torchtitan cuts them: permuted, then one of equal parts."""
    whole = tensor if permutation is None else torch.index_select(tensor, 0, permutation[0])
    return whole.chunk(group.size())[group.rank()]


@contextmanager
def installed(group: Any) -> Iterator[None]:
    """Modules of these names with these classes, and an active mesh over a group."""
    contents: dict[str, dict[str, Any]] = {
        torchtitan.BALANCER: {
            "ContextParallelLoadBalancer": ContextParallelLoadBalancer,
            "HeadTailCPLoadBalancer": HeadTailCPLoadBalancer,
        },
        torchtitan.ATTENTION: {"VarlenInnerAttention": VarlenInnerAttention},
        torchtitan.CP_ATTENTION: {"CPAttention": CPAttention},
        torchtitan.MESHES: {"spmd_mesh_group": {"cp": group}.get},
        torchtitan.AXES: {"MeshAxisName": SimpleNamespace(CP="cp")},
    }
    modules = {}
    for name, names in contents.items():
        for parent in [".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 1)]:
            modules.setdefault(parent, ModuleType(parent))
        modules[name] = ModuleType(name)
        vars(modules[name]).update(names)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        torchtitan._attention_cls.cache_clear()
        torchtitan._balancer_cls.cache_clear()
