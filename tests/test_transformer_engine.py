"""The TransformerEngine handlers on a double of the engine: its calls, its refusals, and the laws of the contract."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from cphandler import (
    Causal,
    ContextParallelHandler,
    CoreAttention,
    CPConfig,
    Full,
    MissingPackageError,
    SlidingWindow,
    UnsupportedError,
    get_batch_on_this_cp_rank,
    get_cp_handler_cls,
)
from cphandler.attention.call import AttentionCall
from cphandler.attention.capabilities import Capabilities
from cphandler.attention.options import AttentionOptions
from cphandler.backends.layered import layered
from cphandler.backends.ring import RingHandler
from cphandler.comm import groups
from cphandler.engines import te_attention, te_package
from cphandler.layouts.layout import Layout, padded_offsets, padded_zigzag, zigzag
from cphandler.testing import RankPool, partition_group
from cphandler.testing import test_conformance as kit
from cphandler.testing.cases import Batch, Case
from cphandler.testing.laws import (
    check_all,
    check_attention,
    check_determinism,
    check_facts,
    check_gradients_of_movement,
    check_roll,
    check_rope,
    check_round_trip,
)
from cphandler.testing.subject import Subject
from cphandler.testing.tolerance import assert_close
from tests.data.refresh_transformer_engine import signatures
from tests.doubles import transformer_engine as double
from tests.test_conformance import run_kit

ROOT = Path(__file__).parent.parent
COMM_TYPES = ("p2p", "all_gather", "a2a", "a2a+p2p")
VERSIONS = tuple(double.SIGNATURES)


@contextmanager
def using(folder: Path | str) -> Iterator[None]:
    """An installation, in this process; an empty path for none."""
    double.use(str(folder))
    try:
        yield
    finally:
        double.drop()


@pytest.fixture
def installed(tmp_path: Path) -> Iterator[None]:
    """The double, in this process."""
    with using(double.write_package(tmp_path / "site")):
        yield


@pytest.fixture(scope="module")
def te_ranks(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """The double, in this process and on the ranks."""
    folder = str(double.write_package(tmp_path_factory.mktemp("engine") / "site"))
    with using(folder):
        ranks.run(settle, folder)
        yield ranks
        ranks.run(double.drop)


def mesh() -> Any:
    """A 2-D (outer, inner) mesh of four ranks."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))


def settle(folder: str) -> None:
    """The double; and groups of two levels for all ranks, which here are in other numbers of groups."""
    double.use(folder)
    made = mesh()
    groups._groups_of_levels[partition_group([(0, 1, 2, 3)])] = {2: (made.get_group(1), made.get_group(0))}  # type: ignore[index]


def te(comm_type: str = "p2p") -> type[ContextParallelHandler]:
    return get_cp_handler_cls("te", comm_type)


def packed(comm_type: str = "p2p", **arguments: Any) -> ContextParallelHandler:
    return te(comm_type)(**{"qkv_format": "thd", "cu_seqlens_q": [0, 5, 12], **arguments})


def qkv(rows: int = 12, heads: int = 4, key_heads: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(rows, n, 8, generator=generator, dtype=dtype) for n in (heads, key_heads, key_heads)]


# --- the laws -------------------------------------------------------------------------------------------------------


def subject(comm_type: str, sizes: tuple[int, ...] = (2,)) -> Subject:
    return Subject.named(f"transformer_engine/{comm_type}", sizes=sizes, heads=None, config={})


@pytest.mark.parametrize("law", [check_round_trip, check_gradients_of_movement, check_roll, check_rope, check_facts])
def test_movement(te_ranks: RankPool, law: Any) -> None:
    """Rows move as the library moves them, over the engine's layout."""
    cases = [case for form in ("thd", "sbhd") for case in kit.moved(subject("p2p"), 2, form, None)]
    subject("p2p").hold(te_ranks, law, [*cases, *kit.moved(subject("p2p"), 4, "thd", None)[:2]])


MASKS = (Causal(), Full(), SlidingWindow(3), SlidingWindow(4, 2))


def attended(comm_type: str, cp_size: int = 2) -> list[Case]:
    """Masks and options over packed and dense batches, padded by the caller, short and empty."""
    of, served, cases = subject(comm_type), te(comm_type).capabilities, []  # type: ignore[attr-defined]
    options = [fields for name in sorted(served.features) for fields in kit.OPTIONS.get(name, [{}])[:1]]
    for i, mask in enumerate(mask for mask in MASKS if served.serves_mask(mask)):
        for j, batch in enumerate((Batch((13, 3, 6, 1, 9)), kit.PADDED, Batch((8, 12)))):
            cases.append(of.case(cp_size, mask=mask, batch=batch, **options[(i + j) % len(options)]))
        for form, length in (("sbhd", 16), ("bshd", 11), ("bshd", 8)):
            fields = options[(i + length) % len(options)]
            cases.append(of.case(cp_size, qkv_format=form, mask=mask, batch=Batch((length,)), **fields))
    few = (Batch((0, 5, 0)), Batch((0, 1), padded=(3, 2)), Batch((1,)), Batch((0, 0)), Batch((0, 0), padded=(2, 3)))
    cases += [of.case(cp_size, batch=batch, max_logit=True) for batch in few]
    cases.append(of.case(cp_size, qkv_format="bshd", batch=Batch((5,), rows=0)))
    cases += [case for case in kit.crossed(of, cp_size, "thd") if isinstance(case.mask, Full)]
    cases += kit.crossed(of, cp_size, "sbhd", **kit.everything(of))[:1]
    return [case for case in cases if of.refusal(case) is None]


@pytest.mark.parametrize("comm_type", COMM_TYPES)
def test_attention(te_ranks: RankPool, comm_type: str) -> None:
    cases = attended(comm_type, 4 if comm_type == "a2a+p2p" else 2)
    te_ranks.run(check_all, cases)
    assert len(cases) > 20
    assert min(te_ranks.run(forwards)) > 15, "the engine was not asked"


def forwards() -> int:
    """How often the engine was called in a group since the last question."""
    count = sum(call.method == "forward" and call.group[0] is not None for call in double.CALLS)
    double.CALLS.clear()
    return count


def test_what_the_table_says_no_to(te_ranks: RankPool) -> None:
    """Masks, options, layouts and cross attention, where it can be known first."""
    for comm_type in COMM_TYPES:
        of = subject(comm_type)
        cases = [of.case(2, mask=mask, batch=Batch((12,))) for mask in kit.masks_over((12,)).values()]
        cases += [of.case(2, **fields) for asked in kit.OPTIONS.values() for fields in asked]
        cases += [of.case(2, layout=name, batch=Batch((12,))) for name in of.unserved[1]]
        cases += [case for form in ("thd", "sbhd") for case in kit.crossed(of, 2, form)]
        of.hold(te_ranks, check_attention, [case for case in cases if of.refusal(case) is not None])


def same_bits(cases: list[Case]) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        for case in cases:
            check_determinism(case)
    finally:
        torch.use_deterministic_algorithms(False)


def test_two_runs_have_the_same_bits(te_ranks: RankPool) -> None:
    config = (("deterministic", True),)
    te_ranks.run(same_bits, [subject(comm).case(2, dtype=torch.float32, config=config) for comm in COMM_TYPES])


SIZES = [("p2p", 1), ("p2p", 2), ("p2p", 3), ("a2a", 3), *((comm_type, 4) for comm_type in COMM_TYPES)]


@pytest.mark.slow
@pytest.mark.parametrize(("comm_type", "size"), SIZES)
def test_the_kit(tmp_path: Path, comm_type: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, by the command line; twelve heads divide by every size."""
    double.write_package(tmp_path / "site")
    backend, options = f"transformer_engine/{comm_type}", (f"--cp-size={size}", "--cp-heads=12,12")
    monkeypatch.delenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", raising=False)
    done = run_kit(tmp_path / "site", backend, *options, "-k", "not same_bits")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    done = run_kit(tmp_path / "site", backend, *options, "-k", "same_bits")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


def step(handler: ContextParallelHandler) -> list[Tensor]:
    """Loss and gradients of one step of a small model, this rank's part."""
    torch.manual_seed(0)
    tokens = torch.randint(11, (32,))
    embed, project, head = (m.double() for m in (nn.Embedding(11, 16), nn.Linear(16, 48), nn.Linear(16, 11)))
    local = get_batch_on_this_cp_rank({"tokens": tokens, "labels": tokens.roll(-1)}, cp_handler=handler)
    angles = torch.arange(handler.get_rotary_seq_len())[:, None] / torch.arange(1, 5)
    freqs = handler.get_emb_on_this_cp_rank(torch.cat([angles, angles], 1).double())
    q, k, v = project(embed(local["tokens"])).view(-1, 3, 2, 8).unbind(1)
    out = handler.core_attn(None, handler.rope(q, freqs), handler.rope(k, freqs), v)
    after, _ = handler.roll_tensor(local["labels"], -1, 0, fill_value=-100)
    assert after is not None
    logits = head(out.flatten(1))
    loss = sum(F.cross_entropy(logits, labels, reduction="sum") for labels in (local["labels"], after))
    parameters = [*embed.parameters(), *project.parameters(), *head.parameters()]
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]  # type: ignore[arg-type, union-attr]


def a_step_of_training(comm_type: str) -> None:
    described: dict[str, Any] = {"qkv_format": "thd", "cu_seqlens_q": [0, 13, 16, 22, 23, 32]}
    parts = step(te(comm_type)(cp_group=partition_group([(0, 1), (2, 3)]), **described))
    for part, whole in zip(parts, step(get_cp_handler_cls("local")(**described)), strict=True):
        dist.all_reduce(part, group=partition_group([(0, 1), (2, 3)]))
        assert_close(part, whole, what=f"a step with {comm_type}")


@pytest.mark.parametrize("comm_type", COMM_TYPES)
def test_a_step_of_training(te_ranks: RankPool, comm_type: str) -> None:
    """Labels, positions and rolls beside pad rows, documents that divide by nothing; beside one rank of the library."""
    te_ranks.run(a_step_of_training, comm_type)


BROKEN = {
    "_hidden": lambda self, which, device: None,
    "_longest": lambda self, stream: 4,
    "_has_padding": lambda self, stream: False,
    "multiple": property(lambda self: 1),
}


def with_fault(name: str, case: Case) -> str:
    """What is said of a fault, where all ranks say so: the pool then lives on."""
    sound = te_attention.TEAttention.__dict__[name]
    setattr(te_attention.TEAttention, name, BROKEN[name])
    try:
        check_attention(case)
    except AssertionError as error:
        return repr(error)
    finally:
        setattr(te_attention.TEAttention, name, sound)
    return ""


@pytest.mark.parametrize("name", BROKEN)
def test_the_double_finds_faults(te_ranks: RankPool, name: str) -> None:
    """Rows that mean nothing left as they are, a local length, padding not told, another multiple."""
    assert all(te_ranks.run(with_fault, name, subject("p2p").case(2)))
    assert not any(te_ranks.run(with_fault, name, subject("p2p").case(2, batch=Batch((0,)))))


# --- how the engine is called ---------------------------------------------------------------------------------------


def test_the_layout_is_the_engines() -> None:
    """Row for row; where lengths divide it is zigzag itself."""
    lengths = np.array([13, 3, 6, 0, 1, 9, 24])
    offsets = np.append(0, np.cumsum(lengths))
    for size in (2, 3, 4, 8):
        layout = padded_zigzag(offsets, size)
        checked = Layout(layout.name, layout.num_tokens, layout.spans, num_local_tokens=layout.num_local_tokens)
        assert checked.fingerprint == layout.fingerprint
        padded = torch.from_numpy(np.diff(padded_offsets(offsets, 2 * size)))
        of = double.Packed(torch.from_numpy(lengths), padded)
        for rank in range(size):
            document, position = of.rows(range(rank, rank + 1), size)
            tokens = torch.from_numpy(offsets)[document] + position
            wanted = torch.where(of.real(document, position), tokens, -1)
            assert layout.positions(rank).tolist() == wanted.tolist()
        even = offsets * 2 * size
        same = (padded_zigzag(even, size).positions(r).tolist() for r in range(size))
        assert list(same) == [zigzag(even, size).positions(r).tolist() for r in range(size)]


def calls_in_groups(comm_type: str, form: str, length: int) -> list[Any]:
    """What the engine was told on this rank, in a group that is none of consecutive ranks."""
    double.CALLS.clear()
    group: Any = partition_group([(0, 1, 2, 3)] if comm_type == "a2a+p2p" else [(0, 2), (1, 3)])
    lengths = {"cu_seqlens_q": [0, 5, length]} if form == "thd" else {"max_seqlen_q": length}
    handler = te(comm_type)(cp_group=group, qkv_format=form, **lengths)  # type: ignore[arg-type]
    rows = handler.num_local_tokens
    shape = (rows,) if form == "thd" else (2, rows)
    q, k, v = (torch.randn(*shape, n, 8, dtype=torch.float64) for n in (4, 2, 2))
    handler.core_attn(None, q, k, v)
    told = next(call for call in double.CALLS if call.method == "forward")
    given = {
        name: value.tolist() if isinstance(value, Tensor) else value
        for name, value in told.given.items()
        if not name.endswith("_layer")
    }
    groups, ranks, stream, comm, _ = told.group
    members = [dist.get_process_group_ranks(g) for g in (groups if isinstance(groups, list) else [groups])]
    assert isinstance(stream, double.Stream)
    assert stream is te_package.hardware.side_stream(q.device)
    return [given, members, ranks, comm]


@pytest.mark.parametrize("comm_type", COMM_TYPES)
def test_what_the_engine_is_told(te_ranks: RankPool, comm_type: str) -> None:
    size = 4 if comm_type == "a2a+p2p" else 2
    given, members, ranks, comm = te_ranks.run(calls_in_groups, comm_type, "thd", 12)[2]
    padded = [0, 8, 16]
    assert given == {
        "qkv_format": "thd",
        "attn_mask_type": "padding_causal",
        "window_size": (-1, 0),
        "cu_seqlens_q": [0, 5, 12],
        "cu_seqlens_q_padded": padded,
        "max_seqlen_q": 8,
        "cu_seqlens_kv": [0, 5, 12],
        "cu_seqlens_kv_padded": padded,
        "max_seqlen_kv": 8,
        "pad_between_seqs": True,
    }
    assert comm == comm_type
    assert members == ([[2, 3], [0, 2]] if size == 4 else [[0, 2]])  # [a2a, p2p]
    assert ranks == ([0, 1, 2, 3] if size == 4 else [0, 2])
    given = te_ranks.run(calls_in_groups, comm_type, "bshd", 16)[0][0]
    assert given == {
        "qkv_format": "bshd",
        "attn_mask_type": "causal",
        "window_size": (-1, 0),
        "pad_between_seqs": False,
    }
    given = te_ranks.run(calls_in_groups, comm_type, "bshd", 13)[0][0]  # does not divide: two documents
    assert given["max_seqlen_q"] == 16
    assert (given["qkv_format"], given["cu_seqlens_q"], given["cu_seqlens_q_padded"]) == (
        "thd",
        [0, 13, 26],
        [0, 16, 32],
    )


def exact_documents_are_not_called_padded() -> list[bool]:
    told = []
    for comm_type in ("p2p", "all_gather"):
        handler = packed(comm_type, cp_group=partition_group([(0, 1), (2, 3)]), cu_seqlens_q=[0, 4, 12])
        handler.core_attn(None, *qkv(handler.num_local_tokens))
        told.append(double.CALLS[-2].given["pad_between_seqs"])
    return told


def test_flash_attn_2_is_ruled_out_where_it_goes_wrong(te_ranks: RankPool) -> None:
    """Over gathered packed documents, by calling them padded."""
    assert te_ranks.run(exact_documents_are_not_called_padded)[0] == [False, True]


def two_level_meshes() -> None:
    """A mesh's own groups, [a2a, p2p]; none, where one of the levels has one rank."""
    made = mesh()
    x = qkv(packed("a2a+p2p", cp_group=made).num_local_tokens, key_heads=4)
    packed("a2a+p2p", cp_group=made).core_attn(None, *x)
    assert double.CALLS[-2].group[0] == [made.get_group(1), made.get_group(0)]
    flat = partition_group([(0, 1, 2, 3)])
    for degree, alone in ((1, "p2p"), (4, "a2a")):
        packed("a2a+p2p", cp_group=flat, config=CPConfig(ulysses_degree=degree)).core_attn(None, *x)
        group, _, _, comm_type, _ = double.CALLS[-2].group
        assert (group, comm_type) == (flat, alone)


def test_two_levels(te_ranks: RankPool) -> None:
    te_ranks.run(two_level_meshes)


def groups_made_for_a_flat_one(folder: str) -> None:
    double.use(folder)
    seen: list[Any] = []
    for _ in range(2):
        handler = packed("a2a+p2p", cp_group=partition_group([(0, 1, 2, 3)]), config=CPConfig(ulysses_degree=2))
        handler.core_attn(None, *qkv(handler.num_local_tokens))
        seen += double.CALLS[-2].group[0]
    assert seen[:2] == seen[2:], "made once"
    first = dist.get_rank() // 2 * 2
    assert [dist.get_process_group_ranks(group) for group in seen[:2]] == [
        [first, first + 1],
        [dist.get_rank() % 2, dist.get_rank() % 2 + 2],
    ]
    partition_group([(1, 2, 3)])
    groups._groups_of_levels.clear()
    with pytest.raises(ValueError, match=r"other numbers of process groups .* the 2-D \(outer, inner\) device mesh"):
        handler.core_attn(None, *qkv(handler.num_local_tokens))


@pytest.mark.slow
def test_a_flat_group_is_split(tmp_path: Path) -> None:
    """On ranks that are in as many groups, by groups that are made once; on others that is refused."""
    with RankPool(4, timeout=120) as own:
        own.run(groups_made_for_a_flat_one, str(double.write_package(tmp_path / "site")))


def another_group_per_batch() -> None:
    """One module of the caller's, whose own group is there again after each batch, and after an error."""
    kind = te_package.engine().attention
    alone = partition_group([(0,), (1,), (2,), (3,)])
    former = (alone, [dist.get_rank()], double.Stream(), "p2p")
    module = kind(4, 8, num_gqa_groups=2)
    module.set_context_parallel_group(*former)
    before = module.placed
    for parts in ([(0, 1, 2, 3)], [(0, 2), (1, 3)], [(0,), (1,), (2,), (3,)]):
        group: Any = partition_group(parts)
        sizes = {"local_cp_size": len(parts[0]), "cp_group": group if len(parts[0]) > 1 else None}
        handler = get_cp_handler_cls("transformer_engine_dynamic", "p2p")(
            qkv_format="thd", cu_seqlens_q=[0, 5, 12], **sizes
        )
        handler.core_attn(module, *qkv(handler.num_local_tokens))
        assert double.CALLS[-2].group[0] is sizes["cp_group"]
        assert module.placed == before
    with pytest.raises(ValueError, match="local_cp_size must be the size of cp_group"):
        get_cp_handler_cls("te_dynamic", "p2p")(qkv_format="thd", cu_seqlens_q=[0, 4], local_cp_size=2)
    module.forward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        handler.core_attn(module, *qkv(handler.num_local_tokens))
    assert module.placed == before


def test_the_group_is_put_back(te_ranks: RankPool) -> None:
    te_ranks.run(another_group_per_batch)


def checkpointed() -> None:
    """Attention made again in the backward pass runs in its group too."""
    handler, grads = packed(cp_group=partition_group([(0, 1), (2, 3)])), []
    for again in (False, True):
        x = [t.requires_grad_() for t in qkv(handler.num_local_tokens)]

        def attend(*tensors: Tensor) -> Any:
            return handler.core_attn(None, *tensors)

        out = checkpoint(attend, *x, use_reentrant=False) if again else attend(*x)
        out.square().sum().backward()
        grads.append([t.grad for t in x])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_checkpointing(te_ranks: RankPool) -> None:
    te_ranks.run(checkpointed)


def sinks_of_modules() -> None:
    """Whichever way sinks are given, a rank's gradient is its part; the engine gives each rank all of it."""
    kind, group, grads = te_package.engine().attention, partition_group([(0, 1), (2, 3)]), []
    handler = packed("a2a", cp_group=group)
    module, core = kind(4, 8, num_gqa_groups=2, softmax_type="learnable"), CoreAttention(num_sinks=4).double()
    for given, parameter in ((module, module.softmax_offset), (core, core.sinks)):
        handler.core_attn(given, *qkv(handler.num_local_tokens)).square().sum().backward()
        part = parameter.grad.clone()
        rank = handler.cp_rank
        assert part[2 * (1 - rank) : 2 * (1 - rank) + 2].eq(0).all()
        assert part[2 * rank : 2 * rank + 2].ne(0).all()
        dist.all_reduce(part, group=group)
        grads.append(part.double())
    assert torch.allclose(*grads, rtol=1e-6)
    assert module.softmax_offset is dict(module.named_parameters())["softmax_offset"]


def test_sinks_of_modules(te_ranks: RankPool) -> None:
    te_ranks.run(sinks_of_modules)


@pytest.mark.usefixtures("installed")
def test_modules_are_made_once() -> None:
    """For equal heads, channels, scale and layer; the caller's settings are read."""
    handler, x = packed("a2a"), qkv()
    core = CoreAttention(softmax_scale=0.5, num_sinks=4, record_max_logit=True)
    for _ in range(2):
        handler.core_attn(None, *x, layer_number=3)
        handler.core_attn(None, *x, layer_number=4)
        handler.core_attn(core, *x)
    made = [call.given for call in double.CALLS if call.method == "__init__"]
    assert [given.get("layer_number") for given in made] == [3, 4, None]
    assert made[2]["softmax_scale"] == 0.5
    assert (made[2]["softmax_type"], made[2]["return_max_logit"]) == ("learnable", True)
    assert core.current_max_attn_logits is not None
    assert core.current_max_attn_logits.shape == (4,)
    assert not core.current_max_attn_logits.requires_grad
    result = handler.core_attn(None, *x, return_max_logit=True)
    assert result.lse is None
    assert result.out.shape == (12, 4, 8)


@pytest.mark.usefixtures("installed")
def test_the_engine_is_named() -> None:
    told = packed().explain()
    assert told.kernel is None
    assert "TransformerEngine computes attention, and chooses among kernels of its own" in str(told)


@pytest.mark.usefixtures("installed")
def test_copies_of_a_handler_compute() -> None:
    handler, x = packed(), qkv()
    assert torch.equal(copy.deepcopy(handler).core_attn(None, *x), handler.core_attn(None, *x))


ASKED: tuple[tuple[str, Any, str], ...] = (
    ("thd", "causal", ""),
    ("bshd", SlidingWindow(2), ""),
    ("bshd", "causal", " values"),
    ("thd", "full", " sinks"),
    ("thd", "full", " logit"),
)
"""Formats, masks, and what else: values of another head dim, sinks, or the largest logit."""


def every_version(folders: dict[str, str], size: int) -> dict[str, list[str]]:
    """By version, what was refused of all that may be asked, and in which words."""
    parts = [(0, 1, 2, 3)] if size == 4 else [(0, 1), (2, 3)]
    group, refused = partition_group(parts) if size > 1 else None, {}
    for version, folder in folders.items():
        double.use(folder)
        refused[version] = []
        for comm_type in COMM_TYPES:
            windows, sinks = "p2p" not in comm_type, comm_type == "a2a"
            for form, mask, more in ASKED:
                if (isinstance(mask, str) or windows) and (sinks or more != " sinks"):
                    word = tried(comm_type, group, form, mask, more)
                    refused[version] += [f"{comm_type} {form}{more}: {word}"] if word else []
        double.drop()
    return refused


def tried(comm_type: str, group: Any, form: str, mask: Any, more: str) -> str:
    """The refusal of one call, or nothing."""
    lengths: dict[str, Any] = {"cu_seqlens_q": [0, 5, 12]} if form == "thd" else {"max_seqlen_q": 16}
    options: dict[str, Any] = {"sinks": torch.ones(4)} if more == " sinks" else {}
    try:
        handler = te(comm_type)(cp_group=group, qkv_format=form, mask=mask, **lengths)  # type: ignore[arg-type]
        shape = (handler.num_local_tokens,) if form == "thd" else (2, handler.num_local_tokens)
        x = [torch.randn(*shape, 4, d, dtype=torch.float32) for d in (8, 8, 16 if more == " values" else 8)]
        handler.core_attn(None, *x, return_max_logit=more in (" values", " logit"), **options)
    except UnsupportedError as error:
        return str(error)
    return ""


CHANGES = [new for old, new in pairwise(("", *VERSIONS)) if double.SIGNATURES.get(old) != double.SIGNATURES[new]]
"""The versions that take other arguments than the one before, and below those that can do more."""
SOME = [*CHANGES, "2.11.0", "2.14.1", "2.15.0", "2.18.0"]
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("size", "versions"),
    [(1, VERSIONS), (4, SOME), pytest.param(4, VERSIONS, marks=SLOW), pytest.param(2, SOME, marks=SLOW)],
)
def test_every_version(te_ranks: RankPool, tmp_path: Path, size: int, versions: list[str]) -> None:
    """Each call fits the signatures, and what a version lacks is refused: it is named, and the version that has it."""
    folders = {version: str(double.write_package(tmp_path / version, version)) for version in versions}
    for version, refused in te_ranks.run(every_version, folders, size)[3].items():
        number = tuple(map(int, version.split(".")[:2]))
        since = {**te_attention.PACKED_SINCE, **({} if size == 4 else {"a2a+p2p": (2, 10)})}  # which then is a2a alone
        without = {comm for comm in COMM_TYPES if size > 1 and number < since[comm]}
        wanted = {f"{comm} thd{more}" for comm in COMM_TYPES for more in ("", " logit") if comm in without}
        wanted |= {f"{comm} thd logit" for comm in COMM_TYPES if number < (2, 11)}
        wanted |= {"a2a thd sinks"} if number < (2, 12) else set()
        wanted |= {"all_gather bshd values"} if number < (2, 15) and size > 1 else set()
        assert {line.partition(":")[0] for line in refused} == wanted, version
        for line in refused:
            assert re.search(rf"TransformerEngine {version.rpartition('.')[0]} has no", line)
            assert re.search(r"install 2\.1\d or a later one, or use", line)


def test_the_versions_are_those_that_are_supported() -> None:
    found = {tuple(map(int, version.split(".")[:2])) for version in VERSIONS}
    assert found == {(2, minor) for minor in range(te_package.OLDEST[1], te_package.NEWEST[1] + 1)}
    assert VERSIONS[-1] == double.VERSION


def test_signatures_are_read_from_sources() -> None:
    source = (
        "class DotProductAttention(Base):\n"
        " def __init__(self, heads: int, scale: float = 0.5): ...\n"
        " def forward(self, q: Tensor, *, k=Kind.OF): ...\n"
        " def set_context_parallel_group(self, group): ...\n"
        " def other(self): ...\n"
    )
    read = {"__init__": "heads, scale=0.5", "forward": "q, *, k=Kind.OF", "set_context_parallel_group": "group"}
    assert signatures(source) == read
    data = ROOT / "tests" / "data" / "transformer_engine.json"
    assert data.read_text() == json.dumps(double.SIGNATURES, indent=1) + "\n", "as the script writes it"


# --- refusals -------------------------------------------------------------------------------------------------------


class Ranks:
    """A group that can only say who it is."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "kernel": ({"config": CPConfig(kernel="torch")}, r"chooses its kernels itself; .*NVTE_FLASH_ATTN"),
    "layout": ({"layout": "zigzag"}, "brings its own layout; .*pass layout=None"),
    "window": ({"mask": SlidingWindow(3)}, r"does not serve the mask SlidingWindow; use Causal or Full, or a local"),
    "mask": ({"mask": kit.BlockCausal(4)}, "does not serve the mask BlockCausal"),
    "cross": ({"cu_seqlens_kv": [0, 4, 9], "mask": Causal("top_left")}, "in cross attention; use Full"),
    "padding": (
        {"qkv_format": "bshd", "cu_seqlens_q": None, "max_seqlen_q": 4, "key_padding_mask": torch.ones(2, 4).bool()},
        "key_padding_mask; TransformerEngine's dense formats have no padding",
    ),
    "wire": ({"config": CPConfig(gradient_wire_dtype="float32")}, "gradient_wire_dtype; leave it None"),
    "degree": ({"config": CPConfig(ulysses_degree=1)}, "ulysses_degree; leave it None, or use 'a2a"),
}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", REFUSED)
def test_batches_that_are_refused(name: str) -> None:
    arguments, message = REFUSED[name]
    with pytest.raises(UnsupportedError, match=message):
        packed(**arguments)


@pytest.mark.usefixtures("installed")
def test_determinism_is_told_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, config = te_package.engine().attention, CPConfig(deterministic=True)
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    with pytest.raises(UnsupportedError, match="set NVTE_ALLOW_NONDETERMINISTIC_ALGO=0"):
        packed(config=config)
    module = kind(4, 8, num_gqa_groups=2)
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    handler = packed("a2a", config=config)
    handler.core_attn(None, *qkv())
    with pytest.raises(UnsupportedError, match="is not deterministic"):
        handler.core_attn(module, *qkv())
    with pytest.raises(UnsupportedError, match="no deterministic attention with sinks"):
        packed("a2a").core_attn(None, *qkv(), sinks=torch.zeros(4))
    with pytest.raises(UnsupportedError, match="is deterministic and has sinks"):
        packed("a2a").core_attn(kind(4, 8, num_gqa_groups=2, softmax_type="learnable"), *qkv())


@pytest.mark.usefixtures("installed")
def test_calls_that_are_refused() -> None:
    handler, x = packed(), qkv()
    for options, message in (
        ({"softcap": 3.0}, "softcap|capped scores; TransformerEngine caps scores from 2.20 on"),
        ({"sinks": torch.zeros(4)}, "attention sinks; TransformerEngine has sinks over several ranks with 'a2a' alone"),
        ({"dropout_p": 0.1, "dropout_seed": 1, "layer_number": 1}, "dropout; .* takes no seed"),
        ({"return_lse": True}, "return_lse; TransformerEngine does not give its log-sum-exp"),
        ({"mask": SlidingWindow(2)}, "does not serve the mask SlidingWindow"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            handler.core_attn(None, *x, **options)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="does not serve the mask SlidingWindow"):
        handler.plan(SlidingWindow(2))
    with pytest.raises(TypeError, match="core_attn has no option 'attention_bias'"):
        handler.core_attn(None, *x, attention_bias=torch.zeros(1))  # type: ignore[call-arg]
    with pytest.raises(UnsupportedError, match=r"and no other module; got function; pass None, a CoreAttention"):
        handler.core_attn(lambda q, k, v: q, *x)
    shares = packed(cp_group=Ranks(2))
    with pytest.raises(TypeError, match="sends its messages in a process group; got Ranks"):
        shares.core_attn(None, *qkv(shares.num_local_tokens))
    assert not [call for call in double.CALLS if call.method == "forward"], "refused before the engine is asked"


def called(handler: Any, *x: Tensor, **options: Any) -> AttentionCall:
    """A call that was looked at no further."""
    rules, asked = handler.attention._rules, AttentionOptions.checked(options)  # type: ignore[arg-type]
    return AttentionCall.of(None, x, options=asked, rules=rules, mask=handler.mask, config=handler.config)  # type: ignore[arg-type]


def uneven_heads() -> None:
    for comm_type, heads, size in (("a2a", (6, 3), 2), ("a2a", (4, 2), 4), ("a2a+p2p", (3, 3), 4)):
        handler = packed(comm_type, cp_group=partition_group([tuple(range(4))] if size == 4 else [(0, 1), (2, 3)]))
        with pytest.raises(NotImplementedError, match=r"spreads query and key heads evenly .* or the ulysses backend"):
            handler.core_attn(None, *qkv(handler.num_local_tokens, *heads))
    handler = packed("a2a", cp_group=Ranks(3))
    for options in ({"sinks": torch.zeros(3)}, {"return_max_logit": True}):
        with pytest.raises(NotImplementedError, match="cuDNN kernels alone, which want even numbers of heads"):
            handler.attention._check_heads(called(handler, *qkv(handler.num_local_tokens, 3, 3), **options))
    logit = te_package.engine().attention(3, 8, return_max_logit=True)
    with pytest.raises(NotImplementedError, match="cuDNN kernels alone, which want even numbers of heads"):
        handler.attention._check_heads(  # type: ignore[attr-defined]
            called(handler, *qkv(handler.num_local_tokens, 3, 3))._replace(module=logit)
        )
    sunk = te_package.engine().attention(4, 8, num_gqa_groups=2, softmax_type="off-by-one")
    handler = packed("all_gather", cp_group=partition_group([(0, 1), (2, 3)]))
    with pytest.raises(NotImplementedError, match="has sinks, which TransformerEngine has with 'a2a' alone"):
        handler.core_attn(sunk, *qkv(handler.num_local_tokens))


def test_heads_that_are_refused(te_ranks: RankPool) -> None:
    te_ranks.run(uneven_heads)


@pytest.mark.usefixtures("installed")
def test_modules_that_do_not_fit() -> None:
    kind, handler, x = te_package.engine().attention, packed("a2a"), qkv()
    for arguments, message in (
        ({"num_gqa_groups": 4}, "made for other key heads; got 2 for num_gqa_groups_per_partition 4"),
        ({"kv_channels": (16, 8)}, "made for other query channels"),
        ({"kv_channels": (8, 16)}, "made for other value channels"),
    ):
        with pytest.raises(ValueError, match=message):
            handler.core_attn(
                kind(**{"num_attention_heads": 4, "kv_channels": 8, "num_gqa_groups": 2, **arguments}), *x
            )
    module = kind(4, 8, num_gqa_groups=2, attn_mask_type="no_mask", window_size=(2, 2), softmax_scale=0.5)
    assert torch.equal(handler.core_attn(module, *x), handler.core_attn(CoreAttention(softmax_scale=0.5), *x))
    assert torch.equal(handler.core_attn(module, *x), handler.core_attn(module, *x, softmax_scale=0.5))
    for options, message in (
        ({"softmax_scale": 0.7}, "has a softmax_scale of its own"),
        ({"sinks": torch.zeros(4)}, "has a softmax of its own"),
        ({"return_max_logit": True}, "was made without return_max_logit"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            handler.core_attn(module, *x, **options)  # type: ignore[arg-type]

    class Other(kind):  # type: ignore[misc, valid-type]
        def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> Tensor:
            return query

    with pytest.raises(UnsupportedError, match=r"whose forward takes other arguments; got .*Other without qkv_format"):
        handler.core_attn(Other(4, 8, num_gqa_groups=2), *x)


@pytest.mark.usefixtures("installed")
def test_what_no_kernel_takes_is_refused() -> None:
    """Of the engine as it is; the double lifts all of it."""
    handler, x = packed(), qkv()
    te_package.hardware = te_package.Hardware()
    with pytest.raises(UnsupportedError, match="computes on CUDA tensors only; got cpu"):
        handler.core_attn(None, *x)
    te_package.hardware.devices = ("cpu",)
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(
            UnsupportedError, match=f"this dtype; got {dtype}; cast queries, keys and values to bfloat16"
        ):
            handler.core_attn(None, *(t.to(dtype) for t in x))
    assert handler.core_attn(None, *(t.bfloat16() for t in x)).dtype == torch.bfloat16
    with pytest.raises(UnsupportedError, match="head dims that are multiples of 8; got 12"):
        handler.core_attn(None, *(torch.zeros(12, 2, d).bfloat16() for d in (8, 8, 12)))


def test_one_side_stream_per_device(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or object())
    hardware, devices = te_package.Hardware(), [torch.device("cuda", i) for i in (0, 1, 0)]
    streams = [hardware.side_stream(device) for device in devices]
    assert streams[0] is streams[2] is not streams[1]
    assert made == devices[:2]


# --- installations --------------------------------------------------------------------------------------------------

INSTALL = r'pip install --no-build-isolation "cphandler\[te\]"'


def test_nothing_is_installed() -> None:
    message = f"no transformer-engine, no transformer-engine-torch; install it: {INSTALL}"
    with using(""):
        for backend in ("te", "transformer_engine", "Transformer-Engine", "transformer_engine_dynamic"):
            for comm_type in (*COMM_TYPES, "ulysses", "allgather", "usp"):
                with pytest.raises(MissingPackageError, match=message) as told:
                    get_cp_handler_cls(backend, comm_type)
                assert isinstance(told.value, ImportError)


@pytest.mark.parametrize(
    ("version", "body", "message"),
    [
        ("2.8.0", None, "of a version .* got transformer-engine 2.8.0.* install one of 2.9 to 2.20"),
        ("2.21.0", None, "of a version .* got transformer-engine 2.21.0.* install one of 2.9 to 2.20"),
        ("1.13.0.post1", None, "of a version .* got transformer-engine 1.13.0.post1"),
        ("nightly", None, "of a version .* got transformer-engine nightly"),
        (
            "2.20.2",
            "raise RuntimeError('Found empty `transformer-engine` meta package')",
            "cannot be imported; .*RuntimeError: Found empty",
        ),
        ("2.20.2", "raise FileNotFoundError('libtransformer_engine.so')", "FileNotFoundError: libtransformer_engine"),
        ("2.20.2", "raise OSError('libcuda.so.1: cannot open')", "a CUDA build of torch, cuDNN and its compiled part"),
        ("2.20.2", "import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("2.20.2", "", "has no attribute 'DotProductAttention'"),
    ],
)
def test_broken_installations(tmp_path: Path, version: str, body: str | None, message: str) -> None:
    """At selection; and once it is mended, the same process goes on."""
    broken = double.write_package(tmp_path / "site", version, body=body)
    with using(broken), pytest.raises(MissingPackageError, match=f"{message}.*{INSTALL}"):
        te()
    with using(double.write_package(tmp_path / "mended", "2.9.0", torch_part=False)):
        assert packed().core_attn(None, *qkv()).shape == (12, 4, 8)
        assert str(te_package.engine()) == "TransformerEngine 2.9"


def test_the_package_is_imported_when_it_is_chosen(tmp_path: Path) -> None:
    program = (
        "import sys, cphandler; from cphandler import *; from cphandler.cli.support import built_in; built_in();"
        "loaded = lambda: sorted(name for name in sys.modules if name.startswith('transformer_engine'));"
        "assert not loaded(); get_cp_handler_cls('te', 'p2p'); print(loaded())"
    )
    site = double.write_package(tmp_path / "site", body="class DotProductAttention: ...\n")
    path = os.pathsep.join([str(ROOT), str(site)])
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "['transformer_engine', 'transformer_engine.pytorch']", done.stderr


def layers_by_turns() -> None:
    """One layout for all layers, which is the engine's; each layer's comm type and what it refuses are its own."""
    handler_cls = get_cp_handler_cls("te", ["p2p", "a2a", "all_gather"], num_layers=3)
    handler = handler_cls(cp_group=partition_group([(0, 1), (2, 3)]), qkv_format="thd", cu_seqlens_q=[0, 5, 12])
    assert handler.layout.name == "padded zigzag"
    x, outs = qkv(handler.num_local_tokens), []
    for number, comm_type in enumerate(("p2p", "a2a", "all_gather"), start=1):
        outs.append(handler.core_attn(None, *x, layer_number=number))
        assert double.CALLS[-2].group[3] == comm_type
    assert all(torch.allclose(out, outs[0]) for out in outs)
    handler.core_attn(None, *x, layer_number=2, mask=SlidingWindow(2))
    with pytest.raises(NotImplementedError, match="TEHandler does not serve the mask SlidingWindow"):
        handler.core_attn(None, *x, layer_number=1, mask=SlidingWindow(2))


def test_a_comm_type_for_each_layer(te_ranks: RankPool) -> None:
    te_ranks.run(layers_by_turns)
    other = type("Other", (RingHandler,), {"own_layout": staticmethod(te_attention.engine_layout)})
    with pytest.raises(TypeError, match=r"layers share one layout; got RingHandler, Other, which bring several"):
        layered((RingHandler, other))


def test_the_install_line_names_an_extra() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert '\nte = ["transformer-engine[pytorch]>=2.9,<3"]\n' in project
    dev = re.search(r"\ndev = \[(.*?)\n\]", project, flags=re.DOTALL)
    assert dev is not None
    assert not re.search(r"transformer|te\]|gpu", dev[1])
    assert te_package.INSTALL in (ROOT / "docs" / "transformer-engine.md").read_text()


def test_tables_of_masks() -> None:
    """Names of masks that there are; across two streams no others."""
    for names in ({"masks": ("Cause",)}, {"masks": ("Causal",), "cross_masks": ("Full",)}, {"cross_masks": ("Full",)}):
        with pytest.raises(ValueError, match=r"no such (cross_)?masks"):
            Capabilities(**names)
    table = Capabilities(masks=("Causal", "Full"), cross_masks=("Full",))
    assert table.serves_mask(Causal())
    assert not table.serves_mask(Causal(), crossing=True)
    named_alike = type("Causal", (Causal,), {})
    assert not table.serves_mask(named_alike())
    assert Capabilities().serves_mask(named_alike())


def test_any_class_may_need_a_package() -> None:
    lacking = type("Lacking", (RingHandler,), {"package": "nowhere_to_be_found"})
    with pytest.raises(MissingPackageError, match=r"Lacking computes with 'nowhere_to_be_found'.*install"):
        lacking.check_package()
    RingHandler.check_package()
