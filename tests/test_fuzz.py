"""Random configurations: a short slice of what ``make fuzz`` runs, and planted faults that it must find."""

from __future__ import annotations

import time
from itertools import count, islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cphandler
from cphandler import Layout, Mask
from cphandler.backends.ring import RingHandler
from cphandler.testing import RankPool, assert_close
from cphandler.testing.fuzz.campaign import Campaign
from cphandler.testing.fuzz.cases import Call, Look, Move, Turn
from cphandler.testing.fuzz.drawing import BACKENDS, random_case
from cphandler.testing.fuzz.rounding import assert_near
from cphandler.tokens.bands import HI
from cphandler.tokens.documents import Documents
from cphandler.tokens.intervals import UNBOUNDED, Table


def test_a_slice_of_random_cases(ranks: RankPool) -> None:
    said: list[str] = []
    campaign = Campaign(ranks, 2026, tell=said.append)
    assert sum(campaign.run(iter(range(96)))) == 96
    assert not campaign.tally.wrong, "\n".join(said)
    assert campaign.tally.run > 80, campaign.tally.reasons


def test_a_case_follows_from_its_seed_and_number_and_takes_one_line() -> None:
    for number in range(200):
        case = random_case(3, number)
        assert str(case) == str(random_case(3, number))
        assert "\n" not in str(case)
        assert str(case).startswith(f"3:{number} ")
    assert len({str(random_case(seed, 5)).split(" ", 1)[1] for seed in range(50)}) == 50


def test_cases_are_the_whole_product() -> None:
    cases = [random_case(4, number) for number in range(1500)]
    calls = [step for case in cases for step in case.steps if isinstance(step, Call)]
    others = [step for case in cases for step in case.steps if not isinstance(step, Call)]
    bases = [case.base for case in cases]
    names = {base.backend if isinstance(base.backend, str) else "layered" for base in bases}
    assert names == set(BACKENDS)
    public = [getattr(cphandler, name) for name in cphandler.__all__]
    kinds = {kind.__name__ for kind in public if isinstance(kind, type) and issubclass(kind, Mask)} - {"Mask"}
    shown = " ".join(str(call.case.mask) for call in calls)
    assert not [name for name in kinds if f"{name}(" not in shown]
    assert {base.qkv_format for base in bases} == {"thd", "sbhd", "bshd"}
    assert {len(part) for case in cases for part in case.parts} == {1, 2, 3, 4}
    own = [base.layout for base in bases if isinstance(base.layout, Layout)]
    assert any(layout.strides - {1} for layout in own)
    assert any(layout.num_local_tokens > layout.num_tokens > 0 for layout in own)
    assert any(not len(spans) for layout in own for spans in layout.spans)
    assert {"zigzag", "contiguous", "striped", "balanced", "replicated"} <= {str(base.layout) for base in bases}
    asked: dict[str, set[Any]] = {
        name: {getattr(call.case, name) is not None and getattr(call.case, name) is not False for call in calls}
        for name in ("scale", "softcap", "value_dim", "lse", "max_logit", "sinks", "own", "layer")
    }
    assert all(values == {False, True} for values in asked.values()), asked
    assert {call.checkpoint for call in calls} == {"", "reentrant", "saved"}
    assert {call.case.dtype for call in calls} == {torch.float64, torch.float32, torch.bfloat16, torch.float16}
    assert any(call.is_own_mask for call in calls)
    assert any(base.is_cross and base.batch.real for base in bases)
    assert {type(step) for step in others} == {Move, Turn, Look}
    moves = [step for step in others if isinstance(step, Move)]
    assert {move.kind for move in moves} == {"dispatch", "combine", "roll"}
    assert {move.grad for move in moves} >= {"", "full", "partial", "replicated", "sum", "scaled"}
    assert {case.positions for case in cases} == {"", "S", "1S", "AS", "A1S", "BS", "ABS"}
    by_row = [base for base in bases if base.qkv_format != "thd" and (base.mask.num_documents or 1) > 1]
    assert {base.batch.real is None for base in by_row} == {True, False}
    assert {case.second for case in cases} == {"", "copy", "twin"}


class Looser(Mask):
    """A mask whose upper bound is off by one."""

    def __init__(self, mask: Mask) -> None:
        self.mask = mask

    def bands(self, queries: Documents, keys: Documents) -> Table:
        bands = np.array(self.mask.bands(queries, keys))
        bands[:, HI] += bands[:, HI] < UNBOUNDED
        return bands


class MaskOffByOne(RingHandler):
    def core_attn(self, attn_mod: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        options["mask"] = Looser(options.get("mask") or self.mask)
        return super().core_attn(attn_mod, query, key, value, **options)


class SecondMaskForgotten(RingHandler):
    """Every call is under the mask of the first one."""

    def core_attn(self, attn_mod: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        self.first = getattr(self, "first", options.get("mask") or self.mask)
        return super().core_attn(attn_mod, query, key, value, **{**options, "mask": self.first})


class PadsAttended(RingHandler):
    """Alignment padding counts as real tokens."""

    def prepare(self, layout: Any) -> None:
        offsets = self.queries.documents.offsets
        every = Documents(offsets, np.stack([offsets[:-1], offsets[1:]], 1)[np.diff(offsets) > 0])
        same = self.keys is self.queries
        self.queries = self.queries._replace(documents=every)
        self.keys = self.queries if same else self.keys
        super().prepare(layout)


class RollLeaks(RingHandler):
    """A roll over the pack as if it were one document."""

    def roll_tensor(self, tensor: Any, shifts: int = -1, dims: int = -1, **options: Any) -> Any:
        stream, fill = options.get("stream", "q"), options.get("fill_value", 0)
        whole = self.combine(tensor, dims, stream=stream).movedim(dims, 0)
        rolled = torch.full_like(whole, fill)
        for token in range(len(whole)):
            if 0 <= token - shifts < len(whole):
                rolled[token] = whole[token - shifts]
        local = self.dispatch(rolled.movedim(0, dims), dims, pad_value=fill, stream=stream)
        return local, local.sum() if options.get("return_sum", True) else None


class OneRanksGradientMissing(RingHandler):
    def core_attn(self, attn_mod: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        if value.requires_grad and torch.is_grad_enabled() and self.cp_rank == self.cp_size - 1:
            value = value * 1.0
            value.register_hook(torch.zeros_like)
        return super().core_attn(attn_mod, query, key, value, **options)


class GradientOfLseMissing(RingHandler):
    def core_attn(self, attn_mod: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        result = super().core_attn(attn_mod, query, key, value, **options)
        if isinstance(result, Tensor) or result.lse is None:
            return result
        return result._replace(lse=result.lse + 0.0 * result.out.sum(-1) - (result.lse - result.lse.detach()))


class InputsChanged(RingHandler):
    def core_attn(self, attn_mod: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        result = super().core_attn(attn_mod, query, key, value, **options)
        query.data.masked_fill_(query.isnan(), 0.0)
        return result


PLANTED = {
    MaskOffByOne: "out: relative L2 error",
    SecondMaskForgotten: "out: relative L2 error",
    PadsAttended: "out: ",
    RollLeaks: "roll: other bits",
    OneRanksGradientMissing: "dv: relative L2 error",
    GradientOfLseMissing: "dq: relative L2 error",
    InputsChanged: "q: the caller's tensor was changed",
}
"""Handlers with a fault, and a complaint that must be among those about it."""

WITHIN = 144
"""Cases in which a fault must show."""


@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.__name__)
def test_planted_faults_are_found(ranks: RankPool, fault: type[RingHandler]) -> None:
    said: list[str] = []
    campaign = Campaign(ranks, 7, backends=(f"tests.test_fuzz:{fault.__name__}",), tell=said.append, batch=8)
    for done in campaign.run(iter(range(WITHIN))):
        assert done
        if PLANTED[fault] in "\n".join(said):
            break
    found = [text for text in said if PLANTED[fault] in text]
    assert found, said
    assert f"--case {next(iter(campaign.tally.wrong))} --backend tests.test_fuzz:{fault.__name__}" in said[0]


class RaisesOrHangs(RingHandler):
    """One rank raises at one head, and sleeps at three."""

    def core_attn(self, attn_mod: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        if self.cp_size > 1 and self.cp_rank == 1 and query.shape[-2] == 1:
            raise RuntimeError("one head is not enough")
        if self.cp_size > 1 and self.cp_rank == 1 and query.shape[-2] == 3:
            time.sleep(600)
        return super().core_attn(attn_mod, query, key, value, **options)


@pytest.mark.slow
def test_ranks_that_raise_or_hang_are_named_and_the_run_goes_on() -> None:
    backends = ("tests.test_fuzz:RaisesOrHangs",)

    def heads(number: int) -> set[int]:
        case = random_case(7, number, backends)
        calls = [step for step in case.steps if isinstance(step, Call)]
        return {call.case.heads[0] for call in calls} if case.base.cp_size == 4 and len(calls) == 1 else set()

    chosen = {want: next(n for n in count() if heads(n) == {want}) for want in (1, 2, 3)}
    fine = list(islice((n for n in count() if heads(n) == {2}), 2))
    said: list[str] = []
    with RankPool(4) as pool:
        campaign = Campaign(pool, 7, backends=backends, tell=said.append)
        list(campaign.run(iter([fine[0], chosen[1], fine[1]])))
        assert list(campaign.tally.wrong) == [f"7:{chosen[1]}"]
        assert campaign.tally.run == 3, "the cases beside it were held to the laws all the same"
        campaign.timeout = 4.0
        list(campaign.run(iter([chosen[3]])))
        campaign.timeout = 90.0
        list(campaign.run(iter(fine)))
    assert list(campaign.tally.wrong) == [f"7:{chosen[1]}", f"7:{chosen[3]}"]
    assert "RuntimeError: one head is not enough" in said[0]
    assert "did not come back in time" in said[1]


def test_what_cancels_is_measured_by_its_terms_and_nothing_else_is() -> None:
    """A difference of terms of size 1 is right to one rounding of them; an error beyond it fails as ever."""
    wanted = torch.randn(50, dtype=torch.float64) * 1e-9
    off = wanted + 1e-16 * torch.randn(50, dtype=torch.float64)
    excuses: dict[str, Any] = {"magnitude": lambda: torch.ones(50), "alone": lambda: wanted * 2}
    with pytest.raises(AssertionError):
        assert_close(off, wanted)
    assert_near(off, wanted, torch.float64, "difference", **excuses)
    for wrong in (wanted * (1 + 1e-3), off.clone().fill_(float("nan")), off[:-1]):
        with pytest.raises(AssertionError):
            assert_near(wrong, wanted, torch.float64, "difference", **excuses)


def test_sixteen_bits_are_measured_by_one_rank() -> None:
    wanted = torch.randn(50, dtype=torch.float64)
    excuses: dict[str, Any] = {"magnitude": lambda: wanted, "alone": (wanted * 1.02).bfloat16}
    assert_near((wanted * 1.025).bfloat16(), wanted, torch.bfloat16, "product", **excuses)
    with pytest.raises(AssertionError):
        assert_near((wanted * 1.04).bfloat16(), wanted, torch.bfloat16, "product", **excuses)
    with pytest.raises(AssertionError):
        assert_near((wanted * 1.02).float(), wanted, torch.float32, "product", **excuses)
