"""Groups of two levels, on device meshes and over flat groups."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from cphandler import CPConfig, CPError, CPMesh, InvalidValueError, RankMismatchError, cp_mesh, get_cp_handler_cls
from cphandler.testing import RankPool, assert_close, dense_attention, partition_group
from cphandler.testing.cases import Case, draw, make_handler, visible
from tests.test_options import LENGTHS, bits, local_tensors


def mesh_case() -> None:
    """A 2-D (outer, inner) mesh, and the same degrees over a flat group."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    flat = partition_group([range(4)])
    case = Case("usp", 4, batch=LENGTHS)
    results = []
    for group, config in ((mesh, None), (flat, CPConfig(ulysses_degree=2)), (flat, None)):
        handler = make_handler(case, group, config=config)
        assert (handler.cp_size, handler.cp_rank) == (4, dist.get_rank())
        q, k, v, grad = local_tensors(case, 5, handler)
        out = handler.core_attn(None, q, k, v)
        results.append(bits([out, *torch.autograd.grad(out, (q, k, v), grad)]))
    assert results[0] == results[1] == results[2]
    for degree in (1, 4):
        handler = make_handler(case, flat, config=CPConfig(ulysses_degree=degree))
        q, k, v, _ = local_tensors(case, 5, handler)
        expected, _ = dense_attention(*draw(case, 5)[:3], visible(case), qkv_format="thd")
        assert_close(handler.core_attn(None, q, k, v), handler.dispatch(expected, 0), what=f"degree {degree}")
    with pytest.raises(ValueError, match="not the size of the mesh's inner dim; got 4 and 2"):
        make_handler(case, mesh, config=CPConfig(ulysses_degree=4))
    with pytest.raises(ValueError, match=r"must divide .*; got 3 for 4 ranks; CPConfig.ulysses_degree may be 1, 2, 4"):
        make_handler(case, flat, config=CPConfig(ulysses_degree=3))
    with pytest.raises(ValueError, match="takes a 1-D device mesh"):
        make_handler(replace(case, backend="ring"), mesh)
    make_handler(case, dist.group.WORLD, config=CPConfig(ulysses_degree=4))  # a mesh leaves no trace on its group
    tall = dist.init_device_mesh("cpu", (4, 1), mesh_dim_names=("outer", "inner"))
    layers = replace(case, backend=("a2a+p2p", "ring"), layer=1)
    for shape in (tall, mesh):
        handler = make_handler(layers, shape)
        q, k, v, _ = local_tensors(case, 5, handler)
        expected, _ = dense_attention(*draw(case, 5)[:3], visible(case), qkv_format="thd")
        out = handler.core_attn(None, q, k, v, layer_number=1)
        assert_close(out, handler.dispatch(expected, 0), what=f"{shape} by layers")
    deep = dist.init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("o", "i", "t"))
    assert make_handler(case, deep["o", "i"]).cp_size == 4
    assert make_handler(case, deep["o", "t"]).cp_size == 2


def uneven_meshes() -> None:
    """Members that belong to other numbers of groups are told so; torch would let them wait for each other forever."""
    if dist.get_rank() == 0:
        dist.new_group([0], use_local_synchronization=True)
    mesh = dist.init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("x", "y", "z"))["x", "z"]
    case = Case("usp", 2, batch=LENGTHS)
    if dist.get_rank() % 2 == 0:  # the mesh of ranks 0 and 2
        with pytest.raises(ValueError, match=r"belong to other numbers of process groups .* pass the group of all"):
            make_handler(case, mesh)
    else:
        assert make_handler(case, mesh).cp_size == 2


def test_usp_on_a_mesh() -> None:
    with RankPool(4) as pool:  # ranks of its own: how many groups a rank belongs to counts here
        pool.run(mesh_case)
        pool.run(uneven_meshes)


def shape_of(mesh: CPMesh) -> dict[str, list[int]]:
    parts = {"dp": mesh.dp, "cp": mesh.cp, "tp": mesh.tp, "dp_cp": mesh.dp_cp}
    return {name: dist.get_process_group_ranks(part.get_group()) for name, part in parts.items()}


def all_meshes() -> dict[str, dict[str, list[int]]]:
    made = {
        "cp 2": cp_mesh(cp=2),
        "cp 2, tp the rest": cp_mesh(dp=1, cp=2, tp=-1),
        "cp the rest, in two levels": cp_mesh(dp=1, cp=-1, ulysses=2, device_type="cpu"),
        "cp 2 in two levels": cp_mesh(cp=2, ulysses=1),
        "all 1": cp_mesh(dp=4),
    }
    levels = made["cp the rest, in two levels"].levels
    assert levels is not None
    assert levels.mesh.tolist() == [[0, 1], [2, 3]], "Ulysses ranks are neighbours"
    assert made["cp 2"].hybrid.mesh.shape == (2, 2)
    with pytest.raises(InvalidValueError, match="hybrid sharding takes one dim"):
        _ = made["cp 2 in two levels"].hybrid
    handler_cls = get_cp_handler_cls("usp")
    handler = handler_cls(cp_group=levels, qkv_format="thd", cu_seqlens_q=[0, 9])
    assert handler.ranks.degree == 2
    return {name: shape_of(mesh) for name, mesh in made.items()}


def test_which_ranks_are_in_which_group(ranks: RankPool) -> None:
    for rank, answers in enumerate(ranks.run(all_meshes)):
        pair, column = [rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2]
        every, one = [0, 1, 2, 3], [rank]
        assert answers["cp 2"] == {"dp": column, "cp": pair, "tp": one, "dp_cp": every}
        assert answers["cp 2 in two levels"] == {"dp": column, "cp": pair, "tp": one, "dp_cp": every}
        assert answers["cp 2, tp the rest"] == {"dp": one, "cp": column, "tp": pair, "dp_cp": column}
        assert answers["cp the rest, in two levels"] == {"dp": one, "cp": every, "tp": one, "dp_cp": every}
        assert answers["all 1"] == {"dp": every, "cp": one, "tp": one, "dp_cp": every}


REFUSED = [
    ({"cp": 3}, "must multiply to the 4 ranks of the process group; got dp -1 x cp 3 x tp 1; choose divisors of 4"),
    ({"dp": 1, "cp": 2}, "must multiply to the 4 ranks of the process group; got dp 1 x cp 2 x tp 1; leave dp out"),
    ({"cp": -1}, "only one of dp, cp and tp can be what the others leave; got dp -1 x cp -1 x tp 1"),
    ({"cp": 0}, "cp must be at least 1; got 0"),
    ({"tp": -2}, "tp must be at least 1; got -2"),
    ({"cp": 2.0}, "cp must be an int; got 2.0"),
    ({"cp": True}, "cp must be an int; got True"),
    ({"cp": 4, "ulysses": 3}, "ulysses must divide cp; got 3 of 4; choose 1, 2, 4"),
    ({"cp": 4, "ulysses": 0}, "ulysses must be at least 1; got 0"),
    ({"cp": 4, "device_type": 3}, "device_type must be a word; got 3"),
]


def refusals() -> list[str]:
    told = []
    for sizes, _ in REFUSED:
        with pytest.raises(CPError) as error:
            cp_mesh(**sizes)  # type: ignore[arg-type]
        told.append(str(error.value))
    with pytest.raises(RankMismatchError) as error:
        cp_mesh(cp=2 if dist.get_rank() == 1 else 4)
    return [*told, str(error.value)]


def test_what_no_mesh_can_be_is_refused(ranks: RankPool) -> None:
    for told in ranks.run(refusals):
        for (_, message), got in zip(REFUSED, told[:-1], strict=True):
            assert message in got
        assert (
            "ranks ask for different meshes; got rank 0, 2, 3 for dp 1 x cp 4 x tp 1 x ulysses 0 on cpu; " in told[-1]
        )
        assert "rank 1 for dp 2 x cp 2" in told[-1]


def test_without_ranks() -> None:
    with pytest.raises(
        InvalidValueError, match=r"there are no ranks yet; .* call torch.distributed.init_process_group"
    ):
        cp_mesh(cp=2)
