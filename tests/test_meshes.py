"""Groups of two levels, on device meshes and over flat groups."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from cphandler import CPConfig
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
