"""Device meshes of data, context and tensor parallelism, in an order of ranks that suits all three."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as short_repr
from typing import TYPE_CHECKING

import torch
from torch.distributed.device_mesh import init_device_mesh

from cphandler.comm.collectives import agree
from cphandler.comm.consistency import shortened
from cphandler.comm.groups import CPGroup, world_group
from cphandler.comm.membership import transports
from cphandler.errors import InvalidTypeError, InvalidValueError, RankMismatchError
from cphandler.tokens.counts import checked_count

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class CPMesh:
    """All ranks as data x context x tensor parallel, and the parts of it that a training loop hands out.

    Rank ``(d * cp + c) * tp + t``: ranks of one model part are neighbours, then those that share a sequence, of these
    first the ones that share heads, and what is least talked between is furthest apart.

    Attributes:
        root: all ranks, dims ``("dp", "cp", "tp")``, or ``("dp", "ring", "ulysses", "tp")``.
        dp: the ranks with other sequences and this one's place in everything else.
        cp: the ranks that share this one's sequences: ``cp_group=`` of a handler.
        tp: the ranks that share this one's layers: ``tp_group=`` of a loss.
        dp_cp: ``dp`` and ``cp`` as one dim: the ranks that gradients are reduced over, ``fully_shard(mesh=)``.
        levels: the ranks of ``cp`` as (ring, ulysses): ``cp_group=`` of a handler of two levels; None without ulysses.
    """

    root: DeviceMesh
    dp: DeviceMesh
    cp: DeviceMesh
    tp: DeviceMesh
    dp_cp: DeviceMesh
    levels: DeviceMesh | None

    @property
    def hybrid(self) -> DeviceMesh:
        """The 2-D mesh (dp, cp) of hybrid sharding: parameters replicated over dp, sharded over cp.

        Raises:
            InvalidValueError: with two levels of cp; torch shards over one dim.
        """
        if self.levels is not None:
            raise InvalidValueError(
                "hybrid sharding takes one dim to shard over, and cp is two here",
                got=f"dims {', '.join(self.root.mesh_dim_names or ())}",
                fix="shard over dp_cp, or leave ulysses out and pass CPConfig(ulysses_degree=...)",
            )
        return self.root["dp", "cp"]


def cp_mesh(
    *, dp: int = -1, cp: int = 1, tp: int = 1, ulysses: int | None = None, device_type: str | None = None
) -> CPMesh:
    """All ranks of the process group as dp x cp x tp; every rank makes this call, once.

    Args:
        dp: groups of ranks that have other sequences; -1 in one of dp, cp and tp is what the others leave.
        cp: ranks that share a sequence.
        tp: ranks that share each layer.
        ulysses: of the ranks of cp, how many neighbours share heads; the others are a ring around them. None for one
            level.
        device_type: where tensors live; None is the accelerator where the process group has a transport of its own for
            it, such as NCCL, else the host.

    Raises:
        InvalidTypeError: sizes that are no ints, a device type that is no word.
        InvalidValueError: sizes below 1, several of -1, sizes that do not multiply to the ranks there are, ulysses that
            does not divide cp, or no process group.
        RankMismatchError: another rank asks for other sizes; on every rank alike.
    """
    asked = {"dp": dp, "cp": cp, "tp": tp}
    sizes = {name: size if _is_rest(size) else checked_count(name, size, least=1) for name, size in asked.items()}
    if not isinstance(device_type, str | None):
        raise InvalidTypeError("device_type must be a word", got=short_repr(device_type), fix='"cuda", say, or None')
    ranks = world_group()
    sizes = _filled(sizes, ranks.size)
    if ulysses is not None and sizes["cp"] % checked_count("ulysses", ulysses, least=1):
        divisors = [n for n in range(1, sizes["cp"] + 1) if sizes["cp"] % n == 0]
        raise InvalidValueError(
            "ulysses must divide cp", got=f"{ulysses} of {sizes['cp']}", fix=f"choose {', '.join(map(str, divisors))}"
        )
    device_type = _device_type(ranks) if device_type is None else device_type
    _check_alike({**sizes, "ulysses": ulysses or 0}, device_type, ranks.name)
    if ulysses is not None:
        sizes = {"dp": sizes["dp"], "ring": sizes["cp"] // ulysses, "ulysses": ulysses, "tp": sizes["tp"]}
    root = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    levels = None if ulysses is None else root["ring", "ulysses"]
    # torch has no public name for this yet, and wants the result kept: slicing a root by it is to go
    joined = root[tuple(sizes)[:-1]]._flatten("dp_cp")
    shared = root["cp"] if levels is None else levels._flatten("cp")
    return CPMesh(root, root["dp"], shared, root["tp"], joined, levels)


def _is_rest(size: object) -> bool:
    return isinstance(size, int) and size == -1


def _filled(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """The sizes with the one that is -1 as what the others leave.

    Raises:
        InvalidValueError: several are, or they do not multiply to the ranks.
    """
    rest = [name for name, size in sizes.items() if size == -1]
    shown = " x ".join(f"{name} {size}" for name, size in sizes.items())
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(rest) > 1:
        raise InvalidValueError(
            "only one of dp, cp and tp can be what the others leave", got=shown, fix="pass numbers for the others"
        )
    if ranks % known or (not rest and known != ranks):
        raise InvalidValueError(
            f"dp, cp and tp must multiply to the {ranks} ranks of the process group",
            got=shown,
            fix="leave dp out for what the others leave" if ranks % known == 0 else f"choose divisors of {ranks}",
        )
    return {name: ranks // known if size == -1 else size for name, size in sizes.items()}


def _device_type(ranks: CPGroup) -> str:
    accelerator = torch.accelerator.current_accelerator()
    served = transports(ranks.source)
    return "cpu" if accelerator is None or served.get(accelerator.type, "gloo") == "gloo" else accelerator.type


def _check_alike(sizes: Mapping[str, int], device_type: str, group_name: str) -> None:
    """Refuse sizes that ranks do not share, before groups are made that would not fit.

    Raises:
        RankMismatchError: on every rank alike.
    """
    mine = f"{' x '.join(f'{name} {size}' for name, size in sizes.items())} on {shortened(device_type, 40)}"
    answers = [answer.rstrip(b"\0").decode() for answer in agree(mine.encode().ljust(_PAYLOAD, b"\0"), group_name)]
    if len(set(answers)) > 1:
        told = {answer: [rank for rank, other in enumerate(answers) if other == answer] for answer in answers}
        raise RankMismatchError(
            "ranks ask for different meshes",
            got="; ".join(f"rank {', '.join(map(str, ranks))} for {answer}" for answer, ranks in told.items()),
            fix="pass the same sizes on every rank",
        )


_PAYLOAD = 256
"""Bytes in which each rank says what it asks for."""
