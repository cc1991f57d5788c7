"""Who an operation is between: the ranks of a process group that a name stands for, and how they reach each other."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import count
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist

from cphandler.errors import InvalidValueError


class Members(NamedTuple):
    """The ranks that an operation is between: all of a group, or some of it.

    Attributes:
        group: the process group.
        size: how many.
        rank: this process's place among them.
        peers: their ranks in the group, in order.
        limit: seconds that one wait may take; None leaves it to the group.
    """

    group: dist.ProcessGroup
    size: int
    rank: int
    peers: range
    limit: float | None = None


_numbers: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()
_groups: dict[int, ref[dist.ProcessGroup]] = {}
_count = count(1)


def name_of(group: dist.ProcessGroup) -> str:
    """A name for this very group: torch gives the names of groups that were destroyed to others."""
    number = _numbers.get(group)
    if number is None:
        number = _numbers.setdefault(group, next(_count))
        _groups[number] = ref(group, lambda _: _groups.pop(number, None))
    return f"{group.group_name}#g{number}"


def sub_group_name(group_name: str, peers: range) -> str:
    """A name under which every operation of this module is between some ranks of a group.

    Messages go through the group itself, so that nothing has to be made, by anybody. On NCCL all ranks of the group
    take part in collectives, each with its own part of it; parts do not overlap.
    """
    return f"{group_name}#{peers.start}:{peers.stop}:{peers.step}" if group_name else ""


def limited_name(group_name: str, limit: float | None) -> str:
    """A name under which every operation of this module waits so many seconds for a rank, and no longer.

    The limit goes with the name, not with the group: handlers of one group may have different ones, and a backward pass
    has that of its forward pass.
    """
    return group_name if limit is None or not group_name else f"{group_name}#{limit!r}s"


def members(group_name: str) -> Members:
    """Who a name stands for.

    Raises:
        InvalidValueError: the group was destroyed or never made in this process.
    """
    name, some, limit, number = _read(group_name)
    group = process_group(name)
    if number is not None and (number not in _groups or _groups[number]() is not group):
        raise _gone(name)
    peers = range(group.size()) if some is None else some
    return Members(group, len(peers), peers.index(group.rank()), peers, limit)


@lru_cache(maxsize=1024)
def _read(group_name: str) -> tuple[str, range | None, float | None, int | None]:
    """The group's own name, the ranks of it that are meant where not all are, the limit of a wait, and its number."""
    name, *additions = group_name.split("#")
    limit, peers, number = None, None, None
    for addition in additions:
        if addition.startswith("g"):
            number = int(addition[1:])
        elif addition.endswith("s"):
            limit = float(addition[:-1])
        else:
            peers = range(*map(int, addition.split(":")))
    return name, peers, limit, number


def _gone(name: str) -> InvalidValueError:
    return InvalidValueError(
        "the context-parallel process group does not exist any more",
        got=f"group {name!r}",
        fix="make the handler and run its backward before destroy_process_group",
    )


def process_group(group_name: str) -> dist.ProcessGroup:
    """The live group of this name.

    Raises:
        InvalidValueError: the group was destroyed or never made in this process.
    """
    if not group_name:
        raise InvalidValueError(
            "this handler's group cannot communicate",
            got="an object with a size and a rank only",
            fix="pass a torch.distributed.ProcessGroup or a DeviceMesh; this object is enough for positions and plans",
        )
    try:
        return torch._C._distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type]
    except (RuntimeError, KeyError) as error:
        raise _gone(group_name) from error


_transports: WeakKeyDictionary[dist.ProcessGroup, dict[str, str]] = WeakKeyDictionary()


def transports(group: dist.ProcessGroup) -> Mapping[str, str]:
    """Which transport serves each device type in this group, such as ``{"cpu": "gloo", "cuda": "nccl"}``."""
    found = _transports.get(group)
    if found is None:
        config = dist.get_backend_config(group)
        found = _transports[group] = dict(part.split(":", 1) for part in config.split(","))
    return found


def on_gloo(device: torch.device, group: dist.ProcessGroup) -> bool:
    """Whether the host itself moves and waits for what is on a device."""
    return transports(group).get(device.type) == "gloo"


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Where a small tensor of integers should live to travel in this group: the host where the group serves it."""
    if "cpu" in transports(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
