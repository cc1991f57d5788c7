"""What may be passed as cp_group: groups, meshes and seats, members and others, and everything that is none of them."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from cphandler import CPConfig, CPError, InvalidTypeError, InvalidValueError, get_cp_handler_cls
from cphandler.comm.groups import level_groups, resolve_group
from cphandler.comm.membership import members
from cphandler.testing import RankPool


class Seat:
    """A group object that can only say who it is."""

    def __init__(self, size: Any, rank: Any) -> None:
        self._size, self._rank = size, rank

    def size(self) -> Any:
        return self._size

    def rank(self) -> Any:
        return self._rank


class Place:
    """Size and rank as plain attributes."""

    size, rank = 2, 0


def make(group: Any, backend: str = "ring") -> Any:
    return get_cp_handler_cls(backend)(
        cp_group=group, qkv_format="thd", cu_seqlens_q=[0, 16], config=CPConfig(check_consistency="never")
    )


@pytest.mark.parametrize("number", [int, np.int32, torch.tensor], ids=["int", "numpy", "torch"])
def test_a_seat(number: Callable[[int], Any]) -> None:
    handler = make(Seat(number(4), number(3)))
    assert (handler.cp_size, handler.cp_rank) == (4, 3)
    assert type(handler.cp_size) is type(handler.cp_rank) is int
    assert handler.position_ids.tolist() == [6, 7, 8, 9], "zigzag: chunks 3 and 4 of 8"
    assert make(Seat(1, 0), "local").cp_size == 1


SEATS: dict[str, tuple[Any, type[Exception], str]] = {
    "nobody": (Seat(0, 0), InvalidValueError, r"size\(\) of cp_group must be at least 1; got 0; "),
    "fewer than nobody": (Seat(-1, 0), InvalidValueError, r"size\(\) of cp_group must be at least 1; got -1"),
    "rank 5 of 2": (Seat(2, 5), InvalidValueError, r"rank\(\) of cp_group must be below size\(\); got 5 of 2; count"),
    "rank 2 of 2": (Seat(2, 2), InvalidValueError, r"got 2 of 2; count from 0"),
    "no member": (Seat(2, -1), InvalidValueError, r"rank\(\) of cp_group must be at least 0; got -1"),
    "a bool size": (Seat(True, 0), InvalidTypeError, r"size\(\) of cp_group must be an int; got True"),
    "a float size": (Seat(2.0, 0), InvalidTypeError, r"size\(\) of cp_group must be an int; got 2.0"),
    "a size by name": (Seat("2", 0), InvalidTypeError, r"size\(\) of cp_group must be an int; got '2'"),
    "no rank": (Seat(2, None), InvalidTypeError, r"rank\(\) of cp_group must be an int; got None"),
    "half a rank": (Seat(2, 0.5), InvalidTypeError, r"rank\(\) of cp_group must be an int; got 0.5"),
    "attributes": (Place(), InvalidTypeError, "size and rank of a cp_group must be methods; got 2 and 0; pass torch.d"),
    "a class": (Seat, InvalidTypeError, r"must be a ProcessGroup, a DeviceMesh or None; got the class Seat; pass "),
    "a number": (4, InvalidTypeError, r"got int; pass torch.distributed.new_group\(ranks\), mesh\[\"cp\"\], or None"),
    "nothing": (0, InvalidTypeError, "got int; pass"),
    "a bool": (False, InvalidTypeError, "got bool; pass"),
    "a name": ("cp", InvalidTypeError, "got str; pass"),
    "ranks": ([0, 1], InvalidTypeError, "got list; pass"),
    "a tensor": (torch.arange(2), InvalidTypeError, "got Tensor; pass"),
}


@pytest.mark.parametrize("case", SEATS.values(), ids=SEATS.keys())
def test_what_is_no_group(case: tuple[Any, type[Exception], str]) -> None:
    group, kind, message = case
    for two_level in (False, True):
        with pytest.raises(kind, match=message) as caught:
            resolve_group(group, two_level=two_level)
        assert isinstance(caught.value, CPError)
        assert caught.value.fix


def told(call: Callable[[], Any]) -> str:
    """What a refusal says."""
    with pytest.raises(CPError) as caught:
        call()
    assert caught.value.fix
    return str(caught.value)


def members_and_others() -> None:
    """Every rank makes each group; those outside are told who is in it, those inside use it."""
    rank = dist.get_rank()
    line = DeviceMesh("cpu", [1, 3])
    square = DeviceMesh("cpu", [[0, 1]], mesh_dim_names=("outer", "inner"))
    group = dist.new_group([0, 3])
    for given, inside, backend in ((line, (1, 3), "ring"), (square, (0, 1), "usp"), (group, (0, 3), "p2p")):
        if rank in inside:
            if given is square:
                continue  # its two ranks belong to other numbers of groups than the rest of this pool
            handler = make(given, backend)
            assert (handler.cp_size, handler.cp_rank) == (2, inside.index(rank))
            x = torch.arange(16.0) + inside[0]
            assert torch.equal(handler.combine(handler.dispatch(x, 0), 0), x)
            continue
        message = told(lambda given=given, backend=backend: make(given, backend))
        assert message.startswith("this process is not in cp_group; got "), message
        if given is group:
            assert "what new_group returns" in message
        else:
            assert f"rank {rank}, and a group of {', '.join(map(str, inside))};" in message, message
            assert "init_device_mesh over all ranks" in message, message


def meshes_of_too_many_dims() -> None:
    deep = dist.init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("dp", "outer", "inner"))
    nameless = DeviceMesh("cpu", torch.arange(4).view(2, 2))
    said = told(lambda: make(deep))
    assert "takes a 1-D device mesh; got 3 dims dp outer inner; pass mesh['inner'], say; only a2a+p2p" in said, said
    said = told(lambda: make(deep, "usp"))
    assert "got 3 dims dp outer inner; pass mesh['inner'], say; a 2-D (outer, inner) mesh is taken too" in said, said
    assert "got 2 dims; pass mesh['cp'], say" in told(lambda: make(nameless))
    assert make(deep["inner"]).cp_size == make(deep["outer"]).cp_size == 2
    assert make(deep["outer", "inner"], "usp").cp_size == 4


def destroyed_meshes() -> None:
    square = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    inner = square["inner"]
    assert make(inner).cp_size == 2
    dist.destroy_process_group(square.get_group("outer"))
    assert "cp_group was destroyed" in told(lambda: make(square, "usp"))
    assert make(inner).cp_size == 2
    dist.destroy_process_group(square.get_group("inner"))
    assert "cp_group was destroyed" in told(lambda: make(inner))


def test_members_and_others(ranks: RankPool) -> None:
    ranks.run(members_and_others)
    ranks.run(meshes_of_too_many_dims)


def test_destroyed_meshes(ranks: RankPool) -> None:
    ranks.run(destroyed_meshes)


class Config:
    """What accelerate's ParallelismConfig has of a mesh."""

    def __init__(self, cp_size: int) -> None:
        self.cp_size = cp_size
        self.device_mesh: Any = None

    def build_device_mesh(self, device_type: str) -> Any:
        return dist.init_device_mesh(device_type, (2, self.cp_size), mesh_dim_names=("dp_shard", "cp"))


def config_case() -> None:
    config = Config(2)
    with pytest.raises(InvalidValueError, match=r"no ranks before its device mesh is built; got cp_size=2.*\"cp\""):
        resolve_group(config)
    config.device_mesh = config.build_device_mesh("cpu")
    group = resolve_group(config)
    assert (group.size, group.rank) == (2, dist.get_rank() % 2)
    assert resolve_group(Config(1)).size == 1


def test_a_config_with_its_mesh(ranks: RankPool) -> None:
    ranks.run(config_case)


def test_one_rank_by_accident_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """``dist.group.WORLD`` is None before ``init_process_group``, whatever a launcher started."""
    for size, said in (("2", True), ("1", False), ("two", False), ("", False)):
        monkeypatch.setenv("WORLD_SIZE", size)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            assert get_cp_handler_cls("ring")(cp_group=dist.group.WORLD, max_seqlen_q=4).cp_size == 1
        assert [warning.category for warning in found] == [RuntimeWarning] * said, size
        assert not said or "init_process_group" in str(found[0].message)


def _a_group_of_levels(asked: bool) -> bool:
    """Whether a group is alive after it was destroyed and let go of."""
    group = dist.new_group(range(dist.get_world_size()))
    if asked:
        inner, outer = level_groups(resolve_group(group), dist.get_world_size())
        assert inner is group
        dist.destroy_process_group(outer)
        del inner, outer
    watched = weakref.ref(group)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    return watched() is not None


def test_groups_of_levels_are_let_go() -> None:
    with RankPool(2, timeout=60) as pool:  # of ranks that are in as many groups as each other
        for asked in (False, True):
            assert not any(pool.run(_a_group_of_levels, asked))


def test_a_group_of_the_same_name_is_another() -> None:
    """torch counts names from 0 again after `destroy_process_group()`."""
    names = []
    for _ in range(2):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            world = dist.group.WORLD
            assert world is not None
            group = resolve_group(world, timeout=3.0)
            assert members(group.name).group is world
            for name in names:
                with pytest.raises(InvalidValueError, match="does not exist any more"):
                    members(name)
            names.append(group.name)
        finally:
            dist.destroy_process_group()
    assert names[0].split("#")[0] == names[1].split("#")[0], "else this shows nothing"
    for name in names:
        with pytest.raises(InvalidValueError, match="does not exist any more"):
            members(name)
