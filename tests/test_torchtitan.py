"""torchtitan's attention and load balancer by a handler, on doubles bound to the recorded signatures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cphandler import (
    Causal,
    Full,
    InvalidValueError,
    MissingPackageError,
    SlidingWindow,
    UnsupportedError,
    get_cp_handler_cls,
)
from cphandler.comm.groups import Place
from cphandler.integrations import torchtitan
from cphandler.testing import RankPool, assert_close, dense_attention
from cphandler.testing.cases import Case, group_of
from cphandler.testing.reference import visible_pairs
from cphandler.tokens.documents import Documents
from tests.data.refresh_torchtitan import METHODS, signatures
from tests.doubles import torchtitan as double
from tests.doubles.torchtitan import VarlenAttentionMetadata, installed, shard

CUTS = torch.tensor([0, 17, 20, 21, 32])
DATA = Path(__file__).parent / "data" / "torchtitan.json"


def test_doubles_and_checks_have_the_recorded_signatures() -> None:
    recorded = {path: described["methods"] for path, described in json.loads(DATA.read_text()).items()}
    source = Path(double.__file__).read_text()
    for path, wanted in METHODS.items():
        assert signatures(source, wanted) == recorded[path]
    for (module, cls, method), expected in torchtitan.SIGNATURES.items():
        path = module.replace(".", "/") + ".py"
        names = [name.split("=")[0].lstrip("*") for name in recorded[path][f"{cls}.{method}"].split(", ")]
        assert tuple(name for name in names if name) == expected


def batch_of(metadata: Any, seed: int) -> tuple[list[Tensor], Tensor, VarlenAttentionMetadata]:
    generator = torch.Generator().manual_seed(seed)
    whole = [torch.randn(32, heads, 6, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]
    grad = torch.randn(32, 4, 6, generator=generator, dtype=torch.float64)
    return whole, grad, VarlenAttentionMetadata(metadata, metadata, 17, 17)


def attention_case() -> None:
    group, seed = group_of(Case(cp_size=2))
    with installed(group):
        attention_cls, balancer_cls = torchtitan.HandlerInnerAttention, torchtitan.BalancedCPLoadBalancer
        assert attention_cls is torchtitan.HandlerInnerAttention
        whole, grad, metadata = batch_of(CUTS, seed)
        balancer = balancer_cls(balancer_cls.Config(), seq_len=32, attention_metadata=metadata)
        permutation = balancer.generate_permutation()
        documents = Documents.from_cu_seqlens(CUTS)
        windows = {(-1, 0): Causal(), (-1, -1): Full(), (4, 0): SlidingWindow(4)}
        for order in (permutation, None, torch.arange(32).flip(0)[None]):
            local = attention_cls.prepare_cp_metadata(metadata, permutation=order)
            for number, (window, mask) in enumerate(windows.items()):
                config = attention_cls.Config(window_size=window, backend=("ring", "p2p", "ulysses")[number])
                module, rows = attention_cls(config), [shard(x, order, group).requires_grad_() for x in whole]
                twins = [x.clone().requires_grad_() for x in whole]
                visible = visible_pairs(mask, documents)
                expected, lse = dense_attention(*twins, visible, qkv_format="thd", softmax_scale=0.4)
                options = {"attention_metadata": local, "scale": 0.4, "enable_gqa": True}
                out = module.forward(*rows, **options)
                assert_close(out, shard(expected.detach(), order, group), what=f"out {window}")
                out.backward(shard(grad, order, group))
                expected.backward(grad)
                for x, twin in zip(rows, twins, strict=True):
                    assert_close(x.grad, shard(twin.grad, order, group), what=f"gradient {window}")
                both = module.forward(*rows, **options, out_transform=lambda out, lse: out * lse[..., None])
                assert_close(
                    both, shard((expected * _rows(lse)[..., None]).detach(), order, group), what="out_transform"
                )
        refusals(attention_cls, balancer_cls, metadata, rows)


def _rows(lse: Tensor) -> Tensor:
    return lse if lse.shape[0] == 32 else lse.transpose(0, 1)


def refusals(attention_cls: Any, balancer_cls: Any, metadata: Any, rows: list[Tensor]) -> None:
    module, local = attention_cls(attention_cls.Config()), attention_cls.prepare_cp_metadata(metadata, permutation=None)
    with pytest.raises(UnsupportedError, match="no further options; got score_mod"):
        module.forward(*rows, attention_metadata=local, enable_gqa=True, score_mod=1)
    with pytest.raises(UnsupportedError, match="got VarlenAttentionMetadata"):
        module.forward(*rows, attention_metadata=metadata, enable_gqa=True)
    with pytest.raises(InvalidValueError, match="more heads than keys"):
        module.forward(*rows, attention_metadata=local)
    with pytest.raises(UnsupportedError, match="takes VarlenAttentionMetadata of self attention"):
        attention_cls.prepare_cp_metadata(metadata._replace(cu_seq_k=CUTS.clone()), permutation=None)
    with pytest.raises(InvalidValueError, match="must be all tokens; got 32 of 40"):
        balancer_cls(balancer_cls.Config(), seq_len=40, attention_metadata=metadata)


def test_attention_is_the_dense_reference_under_any_permutation(ranks: RankPool) -> None:
    ranks.run(attention_case)


def test_the_permutation_is_the_balanced_layout() -> None:
    permutation = torchtitan.balanced_permutation(CUTS, 4)
    assert permutation.shape == (1, 32)
    for rank, part in enumerate(permutation[0].chunk(4)):
        seat = Place(4, rank)
        handler = get_cp_handler_cls("p2p")(cp_group=seat, qkv_format="thd", cu_seqlens_q=CUTS, layout="balanced")
        assert torch.equal(part, handler.dispatch(torch.arange(32), 0))
        again = torchtitan.layout_of(permutation, 32, 4)
        rows = get_cp_handler_cls("p2p")(cp_group=seat, qkv_format="thd", cu_seqlens_q=CUTS, layout=again)
        assert torch.equal(part, rows.dispatch(torch.arange(32), 0))
    assert torchtitan.balanced_permutation(CUTS, 1).tolist() == [list(range(32))]
    with pytest.raises(InvalidValueError, match="equal shares; got 32 tokens for 3 ranks"):
        torchtitan.balanced_permutation(CUTS, 3)
    with pytest.raises(InvalidValueError, match="names each token once"):
        torchtitan.layout_of(torch.zeros(1, 32, dtype=torch.int64), 32, 4)
    with pytest.raises(UnsupportedError, match="share one permutation"):
        torchtitan.layout_of(torch.arange(32).expand(2, 32), 32, 4)


def test_other_sources_are_refused_by_what_differs() -> None:
    with pytest.raises(MissingPackageError, match=r"needs torchtitan\.distributed\.context_parallel"):
        _ = torchtitan.HandlerInnerAttention
    with pytest.raises(AttributeError):
        _ = torchtitan.RingInnerAttention

    def renamed(self: Any, config: Any, *, length: int) -> None:
        raise NotImplementedError

    cases: list[tuple[Any, str, Any, str, str]] = [
        (double.HeadTailCPLoadBalancer, "__init__", renamed, "BalancedCPLoadBalancer", r"got \(self, config, length\)"),
        (double.CPAttention, "prepare_cp_metadata", None, "HandlerInnerAttention", "got nothing of that name"),
    ]
    for cls, method, replacement, name, message in cases:
        with (
            installed(None),
            patch.object(cls, method, replacement),
            pytest.raises(UnsupportedError, match=rf"{cls.__name__}\.{method} .*{message}"),
        ):
            getattr(torchtitan, name)
    metadata = VarlenAttentionMetadata(CUTS, CUTS, 17, 17)
    with installed(None), pytest.raises(InvalidValueError, match="no context-parallel mesh axis is active"):
        torchtitan.HandlerInnerAttention.prepare_cp_metadata(metadata, permutation=None)
    assert not dist.is_initialized()
