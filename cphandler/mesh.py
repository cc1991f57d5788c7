"""The context-parallel group behind what a caller may pass for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import torch.distributed as dist

from cphandler.errors import InvalidTypeError, InvalidValueError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@runtime_checkable
class GroupLike(Protocol):
    """Anything with a size and a rank: enough for layouts, positions and plans, not for communication."""

    def size(self) -> int:
        """Ranks in the group."""

    def rank(self) -> int:
        """This process's rank in it."""


GroupSource: TypeAlias = "dist.ProcessGroup | DeviceMesh | GroupLike | None"
"""What ``cp_group=`` takes; a 2-D mesh is (outer, inner) and serves only ``a2a+p2p``."""


@dataclass(frozen=True)
class CPGroup:
    """One context-parallel group.

    Attributes:
        size: ranks in the group (P).
        rank: this process's rank in it.
        name: the name under which torch finds the process group; empty where there is none.
        source: what the caller passed.
    """

    size: int
    rank: int
    name: str
    source: Any


def resolve_group(cp_group: GroupSource) -> CPGroup:
    """Size, rank and name of a group, a 1-D device mesh, or None for one rank.

    Raises:
        InvalidTypeError: something else.
        InvalidValueError: this process is not in the group, the group was destroyed, or a mesh of several dims.
    """
    if cp_group is None:
        return CPGroup(1, 0, "", None)
    source: Any = cp_group
    if hasattr(source, "get_group") and hasattr(source, "mesh_dim_names"):
        if source.ndim != 1:
            raise InvalidValueError(
                "this backend takes a 1-D device mesh",
                got=f"{source.ndim} dims",
                fix='pass mesh["cp"]; only a2a+p2p takes a 2-D (outer, inner) mesh',
            )
        source = source.get_group()
    if isinstance(source, dist.ProcessGroup):
        return _resolve_process_group(source)
    if source is dist.GroupMember.NON_GROUP_MEMBER:
        raise _not_a_member()
    if isinstance(source, GroupLike):
        return CPGroup(source.size(), source.rank(), "", source)
    raise InvalidTypeError("cp_group must be a ProcessGroup, a DeviceMesh or None", got=type(cp_group).__name__)


def _resolve_process_group(group: dist.ProcessGroup) -> CPGroup:
    try:
        rank = dist.get_rank(group)
        size = dist.get_world_size(group)
        name = str(group.group_name)
        dist.get_process_group_ranks(group)
    except (ValueError, KeyError, RuntimeError) as error:
        raise InvalidValueError(
            "cp_group was destroyed, or belongs to another init_process_group",
            fix="make the group again and pass the new one",
        ) from error
    if rank < 0:
        raise _not_a_member()
    return CPGroup(size, rank, name, group)


def _not_a_member() -> InvalidValueError:
    return InvalidValueError(
        "this process is not in cp_group",
        fix="pass the group that contains this rank; new_group returns a usable one only to its members",
    )
