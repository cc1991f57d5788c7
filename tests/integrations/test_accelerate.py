"""accelerate's ParallelismConfig as the context-parallel group."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from cphandler import InvalidValueError, get_cp_handler_cls
from cphandler.testing import RankPool

pytest.importorskip("accelerate")

from accelerate import ParallelismConfig


def config_case() -> None:
    config = ParallelismConfig(cp_size=2, dp_shard_size=2)
    with pytest.raises(InvalidValueError, match=r"no ranks before its device mesh is built.*get_device_mesh"):
        get_cp_handler_cls("ring")(cp_group=config, max_seqlen_q=9)
    config.get_device_mesh("cpu")
    handler = get_cp_handler_cls("ring")(cp_group=config, max_seqlen_q=9)
    assert (handler.cp_size, handler.cp_rank) == (2, dist.get_rank() % 2)
    x = torch.arange(9) + 100 * (dist.get_rank() // 2)
    assert torch.equal(handler.combine(handler.dispatch(x, 0), 0), x)
    assert get_cp_handler_cls("local")(cp_group=ParallelismConfig(), max_seqlen_q=9).cp_size == 1


def test_a_config_with_its_mesh_is_a_group(ranks: RankPool) -> None:
    ranks.run(config_case)
