"""MagiAttention: masks as slices, the laws over a double of the package, what is called of it, and broken installs."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from cphandler import (
    Bands,
    CPConfig,
    Full,
    MissingPackageError,
    RankMismatchError,
    SlidingWindow,
    UnsupportedError,
    available_cp_handlers,
    get_cp_handler_cls,
)
from cphandler.backends.magi import MagiHandler
from cphandler.engines import magi, magi_package
from cphandler.engines.slices import FULL, KINDS, overlapping, slices_of, thin
from cphandler.testing import RankPool, partition_group
from cphandler.testing.cases import PARTITIONS, Batch, Case, documents_of, visible
from cphandler.testing.laws import (
    Stage,
    check_attention,
    check_determinism,
    check_facts,
    check_gradients_of_movement,
    check_roll,
    check_rope,
    check_round_trip,
    hold_all,
)
from cphandler.testing.subject import Subject
from cphandler.testing.test_conformance import masks_over, physical
from cphandler.tokens.intervals import UNBOUNDED, Table, table
from cphandler.tokens.masks import visible_bands
from tests import magi_signatures
from tests.doubles.magi import DATA, VERSIONS, DispatchConfig, DistAttnConfig, Ranges, standing_in

ROOT = Path(__file__).parent.parent
SUBJECT = Subject("magi", MagiHandler, (1, 2, 3))
PACKED = Batch((13, 3, 6, 1, 9))
PADDED = Batch((7, 0, 9), padded=(8, 4, 16))


def pairs(slices: Table, tokens: int) -> torch.Tensor:
    """``[S, S]``: how often each pair is in a slice, row by row from the definition."""
    count = torch.zeros(tokens, tokens, dtype=torch.int64)
    for q0, q1, k0, k1, kind in slices.tolist():
        for i, row in enumerate(range(q0, q1)):
            left = k0 + (i if kind & 2 else 0)
            right = k1 - (q1 - q0 - 1 - i if kind & 1 else 0)
            assert k0 <= left < right <= k1, "a row of a slice sees nothing, or leaves its rectangle"
            count[row, left:right] += 1
    return count


@pytest.mark.parametrize("batch", [PACKED, PADDED, Batch((40,)), Batch((1, 0, 1))], ids=str)
def test_every_mask_becomes_slices(batch: Batch) -> None:
    """Each pair that sees each other once, in rectangles that are apart, of which there are few."""
    for name, mask in masks_over(physical(batch)).items():
        case = Case(batch=batch, mask=mask)
        documents = documents_of(case)
        bands = visible_bands(mask, (documents, documents), None)
        slices = slices_of(bands)
        assert torch.equal(pairs(slices, documents.num_tokens), visible(case).long()), name
        assert not overlapping(slices).any(), name
        assert len(slices) <= 4 * len(bands), name
        assert (np.diff(slices[:, 0]) >= 0).all()


def test_slices_of_random_bands() -> None:
    """Against rows of the definition, bounds out of reach and one row included."""
    draw = np.random.default_rng(3)
    for _ in range(300):
        q0, k0 = draw.integers(0, 12, 2)
        rows, keys = draw.integers(1, 9, 2)
        lo, hi = sorted(draw.integers(-14, 14, 2))
        bounds = [lo if draw.random() < 0.7 else -UNBOUNDED, hi if draw.random() < 0.7 else UNBOUNDED]
        q, k = torch.arange(24)[:, None], torch.arange(24)[None]
        wanted = (q >= q0) & (q < q0 + rows) & (k >= k0) & (k < k0 + keys) & (k - q >= bounds[0]) & (k - q <= bounds[1])
        slices = slices_of(table([q0, q0 + rows, k0, k0 + keys, *bounds], 6))
        assert torch.equal(pairs(slices, 24), wanted.long())
        assert not (thin(slices) & (bounds[0] != bounds[1])).any()


def test_slices_that_are_not_taken() -> None:
    """Rectangles that meet although no pair is in two, and diagonals; one row is neither."""
    apart = table([[0, 16, 0, 16, -6, -4], [0, 16, 0, 16, 0, 2]], 6)
    assert overlapping(slices_of(apart)).any()
    assert (pairs(slices_of(apart), 16) <= 1).all()
    with pytest.raises(UnsupportedError, match=r"whose rectangles do not meet, and Bands gives others.*p2p"):
        magi.checked_slices(Bands([(0, 1, 0, 1, 0, 0)]), apart)
    assert thin(slices_of(table([0, 8, 0, 8, 0, 0], 6))).tolist() == [True]
    assert slices_of(table([3, 4, 0, 8, 0, 0], 6)).tolist() == [[3, 4, 3, 4, FULL]]
    beside = table([[0, 8, 0, 8, -UNBOUNDED, -3], [0, 8, 0, 8, -2, 0]], 6)
    assert slices_of(beside).tolist() == [[0, 2, 0, 2, 1], [2, 3, 0, 3, 0], [3, 8, 0, 8, 1]], "side by side"
    assert slices_of(table([5, 15, 5, 15, -2, 3], 6)).tolist() == [
        [5, 7, 5, 10, 1],
        [7, 12, 5, 15, 3],
        [12, 15, 10, 15, 2],
    ], "what the package makes of this window"
    assert KINDS == ("full", "causal", "inv_causal", "bi_causal")


def held(
    law: Callable[[Case], None], plan: Sequence[tuple[Case, Stage | None]], version: str, flags: dict[str, Any]
) -> None:
    """Cases held to a law, or to being refused, on the double."""
    with standing_in(version, **flags):
        hold_all(law, plan, False)


def hold(
    ranks: RankPool, law: Callable[[Case], None], cases: list[Case], version: str = VERSIONS[0], **flags: Any
) -> None:
    ranks.run(held, law, [(case, SUBJECT.refusal(case)) for case in cases], version, flags)


MOVED = [
    {"batch": PACKED},
    {"batch": PADDED},
    {"batch": Batch((2, 1))},
    {"qkv_format": "sbhd", "batch": Batch((11,))},
    {"qkv_format": "bshd", "batch": Batch((26,))},
]


@pytest.mark.parametrize(
    "law",
    [check_round_trip, check_gradients_of_movement, check_roll, check_rope, check_facts],
    ids=lambda law: law.__name__,
)
def test_laws_of_movement(ranks: RankPool, law: Callable[[Case], None]) -> None:
    """At 1, 2 and 3 ranks; rolls end at documents and pads, positions restart, fragments are known."""
    short = {check_facts: MOVED, check_roll: MOVED[1:4], check_rope: MOVED[:4:3]}.get(law, MOVED[:4:2])
    hold(ranks, law, [SUBJECT.case(cp_size, **described) for described in short for cp_size in SUBJECT.sizes])


@pytest.mark.parametrize("batch", [PACKED, PADDED], ids=str)
def test_attention_under_every_mask(ranks: RankPool, batch: Batch) -> None:
    """Out, log-sum-exp and all gradients against float64; pad rows hold NaN."""
    masks = masks_over(physical(batch)).values()
    hold(ranks, check_attention, [SUBJECT.case(2 + i % 2, mask=mask, batch=batch) for i, mask in enumerate(masks)])


OPTIONS: list[dict[str, Any]] = [
    {"lse": False},
    {"scale": 0.7},
    {"sinks": True},
    {"sinks": True, "lse": False, "max_logit": True},
    {"max_logit": True, "scale": 0.3},
    {"heads": (6, 1), "sinks": True},
]


@pytest.mark.parametrize("cp_size", SUBJECT.sizes)
def test_options_in_every_format(ranks: RankPool, cp_size: int) -> None:
    """Dense batches become heads; a document of a padded batch is empty."""
    batches = [("thd", PADDED), ("sbhd", Batch((11,))), ("bshd", Batch((9,), rows=3))]
    cases = [
        SUBJECT.case(cp_size, qkv_format=form, batch=batch, mask=SlidingWindow(4, 2), **asked)
        for (form, batch), asked in product(batches, OPTIONS)
    ]
    hold(ranks, check_attention, cases)


def test_batches_with_next_to_nothing(ranks: RankPool) -> None:
    """Fewer tokens than ranks, empty documents, no documents, no rows, and nobody who sees anything."""
    packed = [Batch((1,)), Batch((0, 5, 0)), Batch((0, 1), padded=(3, 2)), Batch((0, 0)), Batch((0, 0), padded=(2, 3))]
    cases = [SUBJECT.case(n, batch=batch, max_logit=True) for batch in packed for n in SUBJECT.sizes]
    dense = [Batch((1,)), Batch((0,)), Batch((5,), rows=0)]
    cases += [SUBJECT.case(n, qkv_format="sbhd", batch=batch, max_logit=True) for batch in dense for n in SUBJECT.sizes]
    blind = Bands([(0, 2, 0, 2, -math.inf, math.inf), (5, 9, 3, 4, -math.inf, math.inf)])
    cases += [SUBJECT.case(n, batch=Batch((9, 9)), mask=blind, sinks=True) for n in SUBJECT.sizes]
    hold(ranks, check_attention, cases)


def test_dtypes_and_two_runs(ranks: RankPool) -> None:
    cases = [SUBJECT.case(3, batch=Batch((40, 21)), dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    hold(ranks, check_attention, cases)
    hold(ranks, check_attention, cases[1:], kernel_backend=SimpleNamespace(value="ffa"))
    described: dict[str, Any] = {"dtype": torch.float32, "config": (("deterministic", True),), "batch": Batch((40, 21))}
    hold(ranks, check_determinism, [SUBJECT.case(2, **described)])


def test_what_the_table_says_no_to_is_refused(ranks: RankPool) -> None:
    """Before anything is computed, on every rank."""
    asked: list[dict[str, Any]] = [
        {"softcap": 3.0},
        {"dropout_p": 0.3},
        {"value_dim": 12},
        {"own": True, "lse": False},
        {"batch": Batch((9, 1), keys=(4, 3)), "mask": Full()},
        {"qkv_format": "sbhd", "batch": Batch(real=("xxxx.", "xx..x"))},
        {"config": (("gradient_wire_dtype", "float32"),)},
        {"config": (("ulysses_degree", 1),)},
        {"layout": "zigzag"},
    ]
    cases = [SUBJECT.case(2, **described) for described in asked]
    assert None not in [SUBJECT.refusal(case) for case in cases]
    hold(ranks, check_attention, cases)


@pytest.mark.parametrize("version", VERSIONS[1:])
def test_later_versions(ranks: RankPool, version: str) -> None:
    hold(ranks, check_attention, [SUBJECT.case(2, sinks=True), SUBJECT.case(3, batch=PADDED)], version)


def without_the_gradient(case: Case) -> None:
    """What autograd does with the package's log-sum-exp alone: found on every rank that has rows."""
    lost = mock.patch.object(magi._LogSumExp, "apply", lambda q, k, sinks, lse, *rest: lse + 0 * q.sum())
    with lost, pytest.raises(AssertionError, match=r"dq of magi.* relative L2 error"):
        check_attention(case)


def test_the_double_drops_what_the_package_drops(ranks: RankPool) -> None:
    """A negative control: the law finds a log-sum-exp without its gradient."""
    hold(ranks, without_the_gradient, [SUBJECT.case(2)])


def group_of(cp_size: int) -> Any:
    """This rank's group of a size, as the laws have it: strict sub-groups; None for a rank that sits out."""
    group = partition_group(PARTITIONS[cp_size])
    return group if any(dist.get_rank() in part for part in PARTITIONS[cp_size]) else None


def make(group: Any, lengths: Sequence[int] = (13, 3, 16), cls: type = MagiHandler, **arguments: Any) -> Any:
    """A packed handler, on tensors as a loop has them."""
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    return cls(cp_group=group, **{"qkv_format": "thd", "cu_seqlens_q": offsets, **arguments})


def local(handler: Any, heads: int, seed: int = 0, dim: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * seed + handler.cp_rank)
    return torch.randn(handler.num_local_tokens, heads, dim, generator=generator, requires_grad=True)


class Told(MagiHandler):
    """With the model's heads, and chunks of four tokens."""

    heads = (4, 2, 8)
    settings = DistAttnConfig(DispatchConfig(chunk_size=4))


def what_is_called(version: str) -> None:
    """One key for rows, one for each mask and heads; the order of rows read once; nothing deprecated."""
    with standing_in(version) as calls:
        handler = make(group_of(2))
        assert [name for name, _ in calls] == ["magi_attn_flex_key", "dispatch"]
        key = calls[0][1]
        assert (key["num_heads_q"], key["num_heads_kv"], key["head_dim"]) == MagiHandler.heads
        assert key["total_seqlen_q"] == key["total_seqlen_k"] == 32
        assert key["attn_mask_type"] == ["causal"] * 3
        calls.clear()
        handler.plan()
        handler.plan(SlidingWindow(3))
        assert not calls, "planning sends nothing"
        q, k, v = local(handler, 4, 1), local(handler, 2, 2), local(handler, 2, 3)
        for mask in (None, SlidingWindow(3), None, SlidingWindow(3), "causal", Full()):
            handler.core_attn(None, q, k, v, mask=mask).sum().backward()
        further = [given for name, given in calls if name == "make_flex_key_for_new_mask_after_dispatch"]
        assert [set(given["attn_mask_type"]) for given in further] == [
            {"causal"},
            {"causal", "bi_causal"},
            {"full"},
        ]
        assert all(given["key_for_dispatch"] is handler.keys_of_engine.first for given in further)
        assert [name for name, _ in calls].count("calc_attn") == 6
        assert len(calls) == 9
        calls.clear()
        told = make(group_of(2), cls=Told)
        told.core_attn(None, q.detach(), k.detach(), v.detach())
        assert [name for name, _ in calls] == ["magi_attn_flex_key", "dispatch", "calc_attn"], "one key"
        assert calls[0][1]["dist_attn_config"] is Told.settings
        assert calls[0][1]["dist_attn_config"].dispatch_config.chunk_size == 4


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_called(ranks: RankPool, version: str) -> None:
    ranks.run(what_is_called, version)


def rows_are_the_engines() -> None:
    """Dispatch gives the rows that the package's own gives; a copy has them too; pads come last."""
    group = group_of(3)
    if group is None:
        return
    with standing_in():
        handler = make(group, (13, 3, 17), cls=Told)
        x = torch.randn(33, 2)
        theirs = sys.modules["magi_attention.api"].dispatch(x=x, key=handler.keys_of_engine.first, pad_value=-100.0)
        assert torch.equal(handler.dispatch(x, 0, pad_value=-100.0), theirs)
        assert handler.layout.name == "magi"
        assert "MagiAttention" in str(handler.explain())
        assert handler.num_local_tokens == 12, "chunks of 2 tokens, 33 of them padded to 36"
        assert not torch.equal(theirs, x[12 * handler.cp_rank :][:12]), "an order of its own"
        again = copy.deepcopy(handler)
        assert again.keys_of_engine is handler.keys_of_engine
        q = torch.randn(handler.num_local_tokens, 4, 8)
        k = torch.randn(handler.num_local_tokens, 2, 8)
        assert torch.equal(again.core_attn(None, q, k, k), handler.core_attn(None, q, k, k))


def test_rows_are_the_engines(ranks: RankPool) -> None:
    ranks.run(rows_are_the_engines)


def what_is_handed_out_is_not_kept() -> None:
    """The package keeps ranges and adds to them, and a caller edits its offsets: neither reaches the other."""
    group = group_of(2)
    with standing_in() as calls:
        offsets = torch.tensor([0, 10, 32], dtype=torch.int32)
        first = MagiHandler(cp_group=group, qkv_format="thd", cu_seqlens_q=offsets)
        q, k = local(first, 4).detach(), local(first, 2).detach()
        before = first.core_attn(None, q, k, k)
        offsets[1] = 20
        second = MagiHandler(cp_group=group, qkv_format="thd", cu_seqlens_q=offsets)
        assert torch.equal(first.core_attn(None, q, k, k), before)
        assert first.documents.offsets.tolist() == [0, 10, 32]
        made = [sorted(given["q_ranges"]) for name, given in calls if name == "magi_attn_flex_key"]
        assert [ranges[0] for ranges in made] == [[0, 10], [0, 20]]
        assert all(isinstance(given["q_ranges"], Ranges) for name, given in calls if "key" in name and "attn" in name)
        assert second.combine(second.position_ids, 0).max() == 19


def test_what_is_handed_out_is_not_kept(ranks: RankPool) -> None:
    ranks.run(what_is_handed_out_is_not_kept)


def gradients_of_gradients() -> None:
    """Refused where they are asked for; the first gradient is the one of a graph that is not kept."""
    group = group_of(2)
    with standing_in():
        handler = make(group)
        q, k = local(handler, 4), local(handler, 2)
        out, lse, _ = handler.core_attn(None, q, k, k, return_lse=True)
        for result in (out, lse):
            (kept,) = torch.autograd.grad(result.square().sum(), q, create_graph=True, retain_graph=True)
            (plain,) = torch.autograd.grad(result.square().sum(), q, retain_graph=True)
            assert torch.equal(kept, plain)
            with pytest.raises((UnsupportedError, RuntimeError), match=r"differentiated again|once_differentiable"):
                kept.sum().backward(retain_graph=True)


def test_gradients_of_gradients(ranks: RankPool) -> None:
    ranks.run(gradients_of_gradients)


def ranks_that_disagree() -> None:
    """Told on every rank, before the package's own collectives, which would mix the batches up."""
    with standing_in() as calls:
        with pytest.raises(RankMismatchError, match="do not hold the same batch"):
            make(group_of(4), (13, 3, 16 + dist.get_rank() % 2))
        assert not calls


def test_ranks_that_disagree(ranks: RankPool) -> None:
    ranks.run(ranks_that_disagree)


FFA = SimpleNamespace(value="ffa")
MADE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"layout": "contiguous"}, "brings its own layout; got 'contiguous'"),
    ({}, {"config": CPConfig(kernel="torch")}, "brings its own kernel.*MAGI_ATTENTION_KERNEL_BACKEND"),
    ({}, {"cp_group": None}, "needs a process group.*cp_group=None.*local backend"),
    ({}, {"mask": Bands([(0, 32, 0, 32, -6, -4), (0, 32, 0, 32, 0, 1)])}, "rectangles do not meet"),
    ({"precision": "bf16"}, {}, "another dtype than the tensors'.*MAGI_ATTENTION_PRECISION"),
    ({"uneven_shard": True}, {}, "all ranks must hold as many rows"),
    ({"kernel_backend": FFA}, {"config": CPConfig(deterministic=True)}, "MAGI_ATTENTION_DETERMINISTIC_MODE=1"),
    ({"kernel_backend": FFA}, {"mask": SlidingWindow(0)}, "one key for each of several rows wrongly"),
]
FLOATS = (torch.float32, torch.bfloat16)
CALLED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"kernel_backend": FFA}, {"dtype": torch.float32}, "'ffa' computes in float16 and bfloat16; got torch.float32"),
    ({"kernel_backend": SimpleNamespace(value="fa4")}, {"dtype": torch.float64}, "'fa4' computes in float16"),
    ({"kernel_backend": FFA}, {"dim": 12}, "head dims up to 128 that are multiples of 8; got 12"),
    ({"kernel_backend": FFA}, {"dim": 136}, "head dims up to 128 .*; got 136"),
    ({"kernel_backend": SimpleNamespace(value="fa4")}, {"sinks": torch.zeros(4)}, "has no sinks; got the kernel 'fa4'"),
    ({"kernel_backend": FFA}, {"mask": SlidingWindow(0)}, "one key for each of several rows wrongly"),
    ({"is_flatten_head_groups_enable": True}, {"return_max_logit": True}, "has no max_logit.*FLATTEN_HEAD_GROUPS"),
    ({}, {"heads": 130, "return_max_logit": True}, "largest score of 128 heads at most"),
    ({"env": "sum"}, {"sinks": torch.zeros(4)}, "MAGI_ATTENTION_DSINK_ALL_REDUCE_OP=sum"),
]
"""Flags of the package, what a handler or a call asks, and what the error says."""


def refused() -> None:
    group = group_of(4)
    for flags, arguments, message in MADE:
        with standing_in(**flags), pytest.raises(NotImplementedError, match=message) as caught:
            make(arguments.pop("cp_group", group), **arguments)
        assert caught.value.fix, message
    for flags, asked, message in CALLED:
        options = {name: value for name, value in asked.items() if name not in ("dtype", "dim", "heads")}
        env = {"MAGI_ATTENTION_DSINK_ALL_REDUCE_OP": flags.pop("env", "none")}
        with standing_in(**flags) as calls, mock.patch.dict(os.environ, env):
            handler = make(group)
            dtype = asked.get("dtype", torch.bfloat16)
            q = local(handler, asked.get("heads", 4), dim=asked.get("dim", 8)).to(dtype)
            with pytest.raises(NotImplementedError, match=message) as caught:
                handler.core_attn(None, q, q, q, **options)
            assert caught.value.fix, message
            assert [name for name, _ in calls] == ["magi_attn_flex_key", "dispatch"]
    on_a_cpu = pytest.raises(NotImplementedError, match="computes on cuda; got a batch and a group on cpu")
    with standing_in(), mock.patch.object(magi, "DEVICES", ("cuda",)), on_a_cpu:
        make(group)


def test_what_the_engine_does_not_serve_is_refused(ranks: RankPool) -> None:
    ranks.run(refused)


def install(folder: Path, code: str, **files: str) -> None:
    """A package of MagiAttention's name."""
    package = folder / "magi_attention"
    package.mkdir()
    (package / "__init__.py").write_text(code)
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)


WHOLE = {"api": "", "common": "class AttnRanges:\n    from_ranges = list", "config": "DistAttnConfig = dict"}
OLD_API = "def magi_attn_flex_key(x, q_ranges): ...\ndef make_flex_key_for_new_mask_after_dispatch(): ...\n"
OLD_API += "def dispatch(x, key, pad_value=0.0): ...\ndef calc_attn(q, k, v, key): ...\n"
BROKEN = {
    "missing": (None, {}, "cannot be imported; got ModuleNotFoundError: No module named 'magi_attention'"),
    "raising": ("raise RuntimeError('no driver found')", {}, "cannot be imported; got RuntimeError: no driver found"),
    "CPU build": ("raise AssertionError('Torch not compiled with CUDA enabled')", {}, "AssertionError: Torch not comp"),
    "no extension": ("from . import magi_attn_ext", {}, "ImportError: cannot import name 'magi_attn_ext'"),
    "placeholder": ("__version__ = '0.0.1'", {}, r"from 1\.1\.1 and below 1\.2; got version 0\.0\.1"),
    "empty": ("", {}, "got a copy that tells no version"),
    "older": ("__version__ = '1.0.5'", WHOLE, r"got version 1\.0\.5"),
    "newer": ("__version__ = '1.2.0.dev3+g12'", WHOLE, r"got version 1\.2\.0"),
    "uninstalled": ("__version__ = None", WHOLE, "got a copy that tells no version"),
    "gutted": ("__version__ = '1.1.1'", WHOLE, "AttributeError: .*magi_attn_flex_key"),
    "another": ("__version__ = '1.1.1'", {**WHOLE, "api": OLD_API}, "another magi_attn_flex_key .* differs in"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_installs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """ImportError at selection, naming the package and its source; mended, it is found, with no restart."""
    code, files, message = BROKEN[broken]
    if code is not None:
        install(tmp_path, code, **files)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match=message) as caught:
        get_cp_handler_cls("magi")
    assert isinstance(caught.value, MissingPackageError)
    assert "magi_attention" in str(caught.value)
    assert "https://github.com/SandAI-org/MagiAttention" in str(caught.value.fix)
    assert "placeholder" in str(caught.value.fix)
    (told,) = [one for one in available_cp_handlers(explain=True) if one.backend == "magi"]
    assert not told.usable
    assert told.fix == caught.value.fix
    for name in [name for name in sys.modules if name.partition(".")[0] == "magi_attention"]:
        del sys.modules[name]
    with standing_in():
        assert get_cp_handler_cls("Magi") is MagiHandler


def test_a_placeholder_that_holds_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the index has: a distribution with a version, and nothing to import."""
    monkeypatch.setattr(magi_package, "_installed", lambda: "0.0.1")
    with pytest.raises(ImportError, match=r"got version 0\.0\.1; build it"):
        get_cp_handler_cls("magi")


def test_the_class_needs_no_package() -> None:
    """Nor do its table and the documentation: it is imported above, and no double stands in."""
    assert len(MagiHandler.capabilities.features) == 4
    assert "magi_attention" not in sys.modules


@pytest.mark.parametrize("version", VERSIONS)
def test_signatures_have_what_is_passed(version: str) -> None:
    """Every argument by its name, and none that must be given is left out: what selection checks as well."""
    described = DATA["versions"][version]
    for name, passed in magi_package.CALLED.items():
        listed = {parameter[0]: parameter[1:] for parameter in described["functions"][name]}
        assert set(passed) <= set(listed), name
        assert {parameter for parameter, default in listed.items() if not default} <= set(passed), name
    assert {"kernel_backend", "precision", "uneven_shard", "is_deterministic_mode_enable"} <= set(described["key"])
    assert described["commit"]
    with standing_in(version):
        assert magi_package.magi_package().calc_attn is sys.modules["magi_attention.api"].calc_attn


SOURCE = """
import torch

def public(x: torch.Tensor, key, pad_value: float = 0.0, config=Config(), *, named=3) -> torch.Tensor: ...
def _private(x): ...
@deprecated("no more")
def old(x): ...

@dataclass(frozen=True)
class Key:
    first: int
    second: str | None = None

    def method(self): ...
"""


def test_signatures_are_read_from_source() -> None:
    """By a script, for versions to come; what it writes is the file that is there."""
    assert magi_signatures.functions_of(SOURCE) == {
        "public": [["x"], ["key"], ["pad_value", "0.0"], ["config", "Config()"]]
    }
    assert magi_signatures.fields_of(SOURCE, "Key") == ["first", "second"]
    assert magi_signatures.written(DATA) == magi_signatures.DATA.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("cp_size", SUBJECT.sizes)
def test_the_conformance_kit(tmp_path: Path, cp_size: int) -> None:
    """All of it, by its own command, over the double in place of the package."""
    code = "import sys\nfrom cphandler.engines import magi\nfrom tests.doubles.magi import Double, VERSIONS\n"
    install(tmp_path, code + "magi.DEVICES = ('cuda', 'cpu')\nsys.modules.update(Double(VERSIONS[0]).modules())\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "-q", "--pyargs"]
    command += ["cphandler.testing", "--cp-backend", "magi", f"--cp-size={cp_size}"]
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert "skipped" not in done.stdout.splitlines()[-1]
