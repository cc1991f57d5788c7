"""The context-parallel group behind what a caller may pass for it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from cphandler.comm.collectives import maximum
from cphandler.comm.membership import device_of, limited_name, name_of, sub_group_name
from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.tokens.counts import checked_count

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@runtime_checkable
class GroupLike(Protocol):
    """Anything with a size and a rank: enough for layouts, positions and plans, not for communication."""

    def size(self) -> int:
        """Ranks in the group."""

    def rank(self) -> int:
        """This process's rank in it."""


@dataclass(frozen=True)
class Place:
    """A size and a rank and nothing else: enough to lay out or cut a batch, and not to send anything.

    Attributes:
        ranks: ranks in the group.
        number: this process's rank in it.
    """

    ranks: int
    number: int

    def size(self) -> int:
        """Ranks in the group."""
        return self.ranks

    def rank(self) -> int:
        """This process's rank in it."""
        return self.number


class MeshConfig(Protocol):
    """accelerate's ``ParallelismConfig``, whose device mesh has a dim ``cp`` once it is built."""

    cp_size: Any

    def build_device_mesh(self, device_type: str) -> Any:
        """A mesh of all ranks."""


GroupSource: TypeAlias = "dist.ProcessGroup | DeviceMesh | GroupLike | MeshConfig | None"
"""What ``cp_group=`` takes; a 2-D mesh is (outer, inner) and serves only ``a2a+p2p``."""


_A_GROUP = 'pass torch.distributed.new_group(ranks), mesh["cp"], or None for one rank'


@dataclass(frozen=True)
class CPGroup:
    """One context-parallel group.

    Attributes:
        size: ranks in the group (P).
        rank: this process's rank in it.
        name: the name under which :mod:`cphandler.comm.membership` finds it, its time limit included; empty where
            there is none.
        source: what the caller passed.
        degree: size of the inner dim of a 2-D mesh; None for anything else.
        levels: the (inner, outer) process groups of a 2-D mesh that this rank is in; None for anything else.
    """

    size: int
    rank: int
    name: str
    source: Any
    degree: int | None = None
    levels: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> CPGroup:
        """Itself: whoever copies what holds a group stays in the group."""
        return self


@dataclass(frozen=True)
class TwoLevels:
    """A group of P * A ranks as A neighbours inside and P apart outside: rank ``p * A + a``.

    Attributes:
        outer: the P ranks with this one's ``a``; this rank is ``p`` in it.
        inner: the A ranks with this one's ``p``; this rank is ``a`` in it.
    """

    outer: CPGroup
    inner: CPGroup


def resolve_group(cp_group: GroupSource, *, two_level: bool = False, timeout: float | None = None) -> CPGroup:
    """Size, rank and name of a group, a device mesh, or None for one rank.

    Args:
        cp_group: a process group, a 1-D mesh, accelerate's ``ParallelismConfig`` with its mesh, something with a size
            and a rank, or None.
        two_level: also take a 2-D (outer, inner) mesh, as the group of all its ranks.
        timeout: seconds that an operation under this name waits for a rank; None leaves it to the group.

    Raises:
        InvalidTypeError: something else.
        InvalidValueError: this process is not in the group or the mesh, the group was destroyed, a mesh of several
            dims, or a size and a rank that no group has.
    """
    group = _resolved(cp_group, two_level)
    return replace(group, name=limited_name(group.name, timeout))


def world_group() -> CPGroup:
    """All ranks there are.

    Raises:
        InvalidValueError: there is no process group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise InvalidValueError(
            "there are no ranks yet",
            got="no process group",
            fix="call torch.distributed.init_process_group first, in processes that torchrun started",
        )
    return resolve_group(dist.group.WORLD)


def _resolved(cp_group: GroupSource, two_level: bool) -> CPGroup:
    if cp_group is None:
        _warn_if_launched()
        return CPGroup(1, 0, "", None)
    source: Any = cp_group
    if hasattr(source, "build_device_mesh") and hasattr(source, "cp_size"):
        source = _mesh_of_config(source)
        if source is None:
            return CPGroup(1, 0, "", None)
    if hasattr(source, "get_group") and hasattr(source, "mesh_dim_names"):
        return _resolve_mesh(source, two_level=two_level)
    if isinstance(source, dist.ProcessGroup):
        return _resolve_process_group(source)
    if source is dist.GroupMember.NON_GROUP_MEMBER:
        raise InvalidValueError(
            "this process is not in cp_group",
            got="what new_group returns to those who are not",
            fix="pass the group that contains this rank, and make no handler on a rank that has none",
        )
    if isinstance(source, GroupLike) and not isinstance(source, type):
        return _resolve_group_like(source)
    raise InvalidTypeError(
        "cp_group must be a ProcessGroup, a DeviceMesh or None",
        got=f"the class {source.__name__}" if isinstance(source, type) else type(source).__name__,
        fix=_A_GROUP,
    )


def _warn_if_launched() -> None:
    """``dist.group.WORLD`` is None until the process group is made, and the same batch would be every process's own."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size.isdecimal() and int(size) > 1 and not (dist.is_available() and dist.is_initialized()):
        warnings.warn(
            f"a group of one rank in one of {size} processes that a launcher started: cp_group is None, as "
            "torch.distributed.group.WORLD is before init_process_group. Call that first; or initialize it and pass "
            "None where one rank is meant",
            RuntimeWarning,
            stacklevel=2,
        )


def _mesh_of_config(config: Any) -> Any:
    """The ``cp`` dim of the mesh that accelerate built from a ``ParallelismConfig``; None where ``cp_size`` is 1.

    A config names no ranks. They come with its mesh, which is built for a device, by ``Accelerator`` or by
    ``config.get_device_mesh(device_type)``, and is kept in the config.
    """
    if config.cp_size == 1:
        return None
    mesh = getattr(config, "device_mesh", None)
    if mesh is None:
        raise InvalidValueError(
            "a ParallelismConfig has no ranks before its device mesh is built",
            got=f"cp_size={config.cp_size} and no mesh",
            fix='call config.get_device_mesh("cuda") first, or pass config.build_device_mesh("cuda")["cp"]',
        )
    return mesh["cp"]


def _resolve_mesh(mesh: DeviceMesh, *, two_level: bool) -> CPGroup:
    if mesh.ndim != 1 and not (two_level and mesh.ndim == 2):
        dims = mesh.mesh_dim_names or ("cp",)
        others = "a 2-D (outer, inner) mesh is taken too" if two_level else "only a2a+p2p and a2a+ring take a 2-D mesh"
        raise InvalidValueError(
            "this backend takes a 1-D device mesh",
            got=f"{mesh.ndim} dims{''.join(f' {dim}' for dim in mesh.mesh_dim_names or ())}",
            fix=f"pass mesh[{dims[-1]!r}], say; {others}",
        )
    if mesh.get_coordinate() is None:
        raise _not_a_member(mesh.mesh.flatten().tolist())
    if mesh.ndim == 2:
        levels = _group_of_dim(mesh, 1), _group_of_dim(mesh, 0)
        return replace(_resolve_process_group(_flat_group(mesh)), degree=mesh.size(1), levels=levels)
    return _resolve_process_group(_group_of_dim(mesh, 0))


def _group_of_dim(mesh: DeviceMesh, dim: int) -> dist.ProcessGroup:
    try:
        return mesh.get_group(dim)
    except (ValueError, KeyError, RuntimeError) as error:
        raise _destroyed() from error


def _resolve_group_like(group: GroupLike) -> CPGroup:
    """What a group that can only say who it is says, checked."""
    if not (callable(group.size) and callable(group.rank)):
        raise InvalidTypeError(
            "size and rank of a cp_group must be methods", got=f"{group.size!r} and {group.rank!r}", fix=_A_GROUP
        )
    size = checked_count("size() of cp_group", group.size(), least=1)
    rank = checked_count("rank() of cp_group", group.rank())
    if rank >= size:
        raise InvalidValueError("rank() of cp_group must be below size()", got=f"{rank} of {size}", fix="count from 0")
    return CPGroup(size, rank, "", group)


def _resolve_process_group(group: dist.ProcessGroup) -> CPGroup:
    try:
        rank = dist.get_rank(group)
        size = dist.get_world_size(group)
        name = name_of(group)
        members = dist.get_process_group_ranks(group)
    except (ValueError, KeyError, RuntimeError) as error:
        raise _destroyed() from error
    if rank < 0:
        raise _not_a_member(members)
    return CPGroup(size, rank, name, group)


_flat_groups: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], dist.ProcessGroup]] = WeakKeyDictionary()
"""Per outer group of 2-D meshes, the group of all ranks of each mesh."""


def _flat_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The group of all ranks of a 2-D mesh, made once, by those ranks alone."""
    made, ranks = _flat_groups.setdefault(_group_of_dim(mesh, 0), {}), mesh.mesh.flatten().tolist()
    if tuple(ranks) not in made:
        if ranks != sorted(ranks):
            raise InvalidValueError(
                "a 2-D (outer, inner) mesh must count its ranks upwards, row by row",
                got=ranks,
                fix="let the last mesh dim be the inner one; groups number their ranks in ascending order",
            )
        fix = "pass the group of all the mesh's ranks and CPConfig(ulysses_degree=...)"
        made[tuple(ranks)] = _group_of(ranks, [_group_of_dim(mesh, dim) for dim in (0, 1)], fix)
    return made[tuple(ranks)]


_Levels: TypeAlias = "tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]"
_groups_of_levels: WeakKeyDictionary[dist.ProcessGroup, dict[int, _Levels]] = WeakKeyDictionary()
"""Per flat group, by ranks of an inner group, the groups of two levels that this rank is in; None is the flat group
itself, which would otherwise keep itself alive."""


def level_groups(group: CPGroup, degree: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The process groups of two levels, for an engine that wants such: a mesh's own, or made once by all ranks.

    Args:
        group: a resolved group; all its ranks make this call.
        degree: ranks A of an inner group, which divides the size.

    Returns:
        The group of this rank's A neighbours, and that of the ranks with its place among theirs.

    Raises:
        InvalidValueError: ranks that belong to other numbers of process groups cannot make one together.
    """
    if group.levels is not None:
        return group.levels
    made = _groups_of_levels.setdefault(group.source, {})
    if degree not in made:
        ranks, (p, a) = dist.get_process_group_ranks(group.source), divmod(group.rank, degree)
        fix = "pass the 2-D (outer, inner) device mesh of the two groups"
        inner, outer = (
            None if len(part) == group.size else _group_of(part, [group.source], fix)
            for part in (ranks[p * degree : (p + 1) * degree], ranks[a::degree])
        )
        made[degree] = inner, outer
    inner, outer = made[degree]
    return inner or group.source, outer or group.source


def _group_of(ranks: list[int], dims: list[dist.ProcessGroup], fix: str) -> dist.ProcessGroup:
    """A group of some ranks of others: everybody's own where that is all, else one that only its members make.

    torch names such a group after the number of groups that the process already has, so that members who have other
    numbers of them would wait for each other forever.
    """
    if ranks == list(range(dist.get_world_size())):
        return dist.group.WORLD  # type: ignore[return-value]
    made = len(dist.distributed_c10d._world.pg_names)
    extremes = torch.tensor([made, -made], device=device_of(dims[0]))
    for dim in dims:  # one after the other: over all ranks of the mesh
        extremes = maximum(extremes, str(dim.group_name))
    most, least = int(extremes[0]), -int(extremes[1])
    if most != least:
        raise InvalidValueError(
            "ranks that belong to other numbers of process groups cannot make one together",
            got=f"{least} to {most} groups a rank",
            fix=fix,
        )
    group: dist.ProcessGroup = dist.new_group(
        ranks, backend=dist.get_backend_config(dims[0]), use_local_synchronization=True
    )
    return group


def two_levels(group: CPGroup, degree: int | None) -> TwoLevels:
    """Inner groups of consecutive ranks, outer groups across them; nothing is made, messages go through the group.

    Args:
        group: a resolved group.
        degree: ranks A of an inner group; None takes the mesh's, or the smallest divisor of the size that is at least
            its square root: 2 of 4, 4 of 8, 4 of 16.

    Raises:
        InvalidValueError: a degree that does not divide the group, or is not the mesh's.
    """
    if group.degree is not None and degree not in (None, group.degree):
        raise InvalidValueError(
            "ulysses_degree is not the size of the mesh's inner dim",
            got=f"{degree} and {group.degree}",
            fix="leave CPConfig.ulysses_degree None with a 2-D mesh",
        )
    divisors = [number for number in range(1, group.size + 1) if group.size % number == 0]
    if degree is None:
        degree = group.degree or next(number for number in divisors if number * number >= group.size)
    if degree not in divisors:
        raise InvalidValueError(
            "ulysses_degree must divide the context-parallel group",
            got=f"{degree} for {group.size} ranks",
            fix=f"CPConfig.ulysses_degree may be {', '.join(map(str, divisors))}",
        )
    p, a = divmod(group.rank, degree)
    inner, outer = range(p * degree, (p + 1) * degree), range(a, group.size, degree)
    return TwoLevels(
        CPGroup(len(outer), p, sub_group_name(group.name, outer), None),
        CPGroup(degree, a, sub_group_name(group.name, inner), None),
    )


def _destroyed() -> InvalidValueError:
    return InvalidValueError(
        "cp_group was destroyed, or belongs to another init_process_group",
        fix="make the group again and pass the new one",
    )


def _not_a_member(ranks: list[int]) -> InvalidValueError:
    return InvalidValueError(
        "this process is not in cp_group",
        got=f"rank {dist.get_rank()}, and a group of {', '.join(map(str, ranks))}",
        fix="pass the group or mesh that contains this rank; init_device_mesh over all ranks cuts them into such",
    )


class PartGroups:
    """Process groups of parts of pools of ranks: all ranks of the process group make all of them, each once.

    torch lets ranks make a group without the others only where they have made equally many before, so here nobody is
    left out.

    Args:
        pools: global ranks, as many in each pool, no rank twice; None is one pool of all ranks.

    Raises:
        InvalidValueError: no process group, pools that are none, or this rank in none.
    """

    def __init__(self, pools: Sequence[Sequence[int]] | None = None) -> None:
        world = world_group()
        self._pools = [range(world.size)] if pools is None else [_checked_pool(pool, world.size) for pool in pools]
        every = [rank for pool in self._pools for rank in pool]
        if not every or len(set(every)) < len(every) or len({len(pool) for pool in self._pools}) > 1:
            raise InvalidValueError(
                "pools must be of one size and share no rank",
                got=f"sizes {[len(pool) for pool in self._pools]}, {len(set(every))} ranks",
                fix="pass the rows of a mesh over all ranks, or None for one pool of all",
            )
        if world.rank not in every:
            raise InvalidValueError(
                "this rank is in no pool", got=f"rank {world.rank}", fix="pass pools that divide all ranks"
            )
        self._own = next(pool for pool in self._pools if world.rank in pool)
        self.size, self.rank = len(self._own), self._own.index(world.rank)
        self._made: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def make(self, part: tuple[int, ...]) -> None:
        """Make the group of a part in each pool, where that was not done before; all ranks call it in one order.

        Args:
            part: numbers of ranks in a pool, ascending, two at least.
        """
        if part in self._made:
            return
        for pool in self._pools:
            ranks = [pool[number] for number in part]
            if ranks == list(range(dist.get_world_size())):
                group: Any = dist.group.WORLD
            else:
                group = dist.new_group(ranks)
            if pool is self._own:
                self._made[part] = group

    def of(self, part: tuple[int, ...]) -> dist.ProcessGroup | None:
        """The group of a part of this rank's pool; None for one rank alone.

        Raises:
            InvalidValueError: a part without this rank, or one that was not made.
        """
        if self.rank not in part:
            raise InvalidValueError(
                "this rank is not in the sub-group", got=f"{self.rank} and {part}", fix="ask for schedule.of_rank(rank)"
            )
        if len(part) > 1 and part not in self._made:
            raise InvalidValueError(
                "the sub-group was not made", got=f"ranks {part}", fix="let every rank prepare the schedule first"
            )
        return self._made[part] if len(part) > 1 else None


def _checked_pool(pool: Sequence[int], ranks: int) -> list[int]:
    numbers = [checked_count("a rank of a pool", rank) for rank in pool]
    if any(rank >= ranks for rank in numbers) or numbers != sorted(set(numbers)):
        raise InvalidValueError(
            "a pool holds ranks that there are, each once, ascending", got=numbers, fix=f"ranks are 0 to {ranks - 1}"
        )
    return numbers
