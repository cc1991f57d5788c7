"""The conformance kit: a handler class held to every law of the contract, on ranks of its own.

``pytest --pyargs cphandler.testing --cp-backend mypackage.module:MyHandler``. What the class's capability table says
yes to must equal the dense float64 reference; what it says no to must raise NotImplementedError. A class without a
table is tried on its own layout, and what it refuses is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import Any

import pytest
import torch

from cphandler.testing.cases import Batch, Case
from cphandler.testing.laws import (
    check_attention,
    check_determinism,
    check_facts,
    check_gradients_of_movement,
    check_roll,
    check_rope,
    check_round_trip,
)
from cphandler.testing.plugin import subject_of
from cphandler.testing.pool import RankError, RankPool
from cphandler.testing.subject import Subject
from cphandler.tokens.masks import (
    AcrossDocuments,
    Bands,
    BlockCausal,
    Causal,
    Chunked,
    Full,
    Mask,
    PerDocument,
    PrefixLM,
    PrefixTree,
    PrefixWindow,
    SharedQuestion,
    SlidingWindow,
)

REAL = ("xxxxxxxxx", "xxxxx....", "....xxxxx", "xx..xx.xx", ".........")
"""Rows of a dense batch: no padding, right, left, holes, and nothing real at all."""

PADDED = Batch((7, 0, 9), padded=(8, 4, 16))
DENSE = (Batch((11,)), Batch(real=REAL))
Batches = dict[str, tuple[Batch, ...]]
MOVED: Batches = {"thd": (Batch((13, 3, 6, 1, 9)), PADDED, Batch((2, 1))), "sbhd": DENSE[:1], "bshd": DENSE[1:]}
ATTENDED: Batches = {"thd": (Batch((13, 3, 6, 1, 9)), PADDED), "sbhd": DENSE, "bshd": DENSE}
SHORT: Batches = {"thd": (Batch((0, 5, 0)), Batch((1, 0, 1, 1)), Batch((0, 1), padded=(3, 2)))}
FEW: Batches = {"thd": (Batch((1,)), Batch((2,)), Batch((1, 1, 1)))}
EMPTY: Batches = {"thd": (Batch((0, 0)), Batch((0, 0), padded=(2, 3)))}
SHORT |= dict.fromkeys(("sbhd", "bshd"), (Batch((1,)),))
FEW |= dict.fromkeys(("sbhd", "bshd"), (Batch((1,)), Batch((3,))))
EMPTY |= dict.fromkeys(("sbhd", "bshd"), (Batch((0,)), Batch((5,), rows=0)))

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "softmax_scale": [{"scale": 0.7}],
    "softcap": [{"softcap": 3.0}],
    "sinks": [{"sinks": True}],
    "dropout": [{"dropout_p": 0.3, "layer": 2}],
    "return_lse": [{"lse": True}, {"lse": False}],
    "return_max_logit": [{"max_logit": True}, {"max_logit": True, "scale": 0.7}],
    "value_head_dim": [{"value_dim": 12}, {"value_dim": 4}],
    "own_attention": [{"own": True, "lse": False}],
    "gradient_wire_dtype": [{"config": (("gradient_wire_dtype", "float32"),), "dtype": torch.float32}],
    "ulysses_degree": [{"config": (("ulysses_degree", 1),)}],
}
"""What asks for a feature, as fields of a case, by the feature's name in a capability table."""

CROSS: dict[str, list[tuple[Mask, Batch]]] = {
    "thd": [
        (Full(), Batch((13, 3, 6, 0, 9), keys=(5, 7, 1, 4, 20))),
        (Causal("bottom_right"), Batch((13, 3, 6, 0, 9), keys=(5, 7, 0, 4, 20))),
        (Causal("top_left"), Batch((3, 8), padded=(4, 12), keys=(5, 2), keys_padded=(5, 6))),
        (SlidingWindow(2, 1, "bottom_right"), Batch((9, 1), keys=(4, 30))),
        (AcrossDocuments(Full()), Batch((9, 1), keys=(4, 3, 2))),
        (Bands([(0, 5, 3, 9, -1, 8), (5, 9, 0, 9, 0, 0)]), Batch((9,), keys=(9, 3))),
        (Full(), Batch((7,), keys=(0,))),
    ],
    "sbhd": [
        (Full(), Batch((7,), keys=(12,))),
        (SlidingWindow(4, 2, "top_left"), Batch((12,), keys=(7,))),
        (Causal("bottom_right"), Batch((7,), keys=(9,), real=REAL)),
    ],
}
CROSS["bshd"] = CROSS["sbhd"]


def masks_over(lengths: tuple[int, ...]) -> dict[str, Mask]:
    """One or more of each of the library's masks, for documents of these physical lengths."""
    total, third = sum(lengths), sum(lengths) // 3
    apart = ((0, third, 0, total, -math.inf, 0), (total - third, total, third, total - third, -9, math.inf))
    return {
        "Causal": Causal(),
        "Full": Full(),
        "SlidingWindow": SlidingWindow(3),
        "SlidingWindow, both ways": SlidingWindow(4, 2),
        "PrefixLM": PrefixLM(tuple(length // 2 for length in lengths)),
        "BlockCausal": BlockCausal(4),
        "Chunked": Chunked(5),
        "PrefixWindow": PrefixWindow(2, 3),
        "SharedQuestion": SharedQuestion(tuple((length // 3, length // 4) for length in lengths)),
        "PrefixTree": PerDocument(tuple(_tree(length) for length in lengths)),
        "PerDocument": PerDocument(tuple(islice(cycle((Causal(), Full(), SlidingWindow(2))), len(lengths)))),
        "AcrossDocuments": AcrossDocuments(SlidingWindow(9)),
        "Bands": Bands(apart),
    }


def _tree(length: int) -> PrefixTree:
    """A root with two branches, the first of which has two of its own."""
    quarter = length // 4
    return PrefixTree((-1, 0, 1, 1, 0), (quarter, quarter, length // 8, quarter, length - 3 * quarter - length // 8))


def physical(batch: Batch) -> tuple[int, ...]:
    """Physical lengths of a batch's documents; a dense batch is one."""
    return (len(batch.real[0]),) if batch.real is not None else batch.padded or batch.lengths


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test at every size, and in every format and on every layout that the class serves."""
    try:
        subject = subject_of(metafunc.config)
    except pytest.UsageError:  # raised by the plugin once all tests are collected
        return
    values: dict[str, Any] = {
        "cp_size": subject.sizes,
        "qkv_format": subject.formats,
        "layout": subject.layouts,
        "mask": list(masks_over(())),
        "option": [*OPTIONS, "all of them"],
        "dtype": [torch.float32, torch.bfloat16],
    }
    for name in (name for name in values if name in metafunc.fixturenames):
        metafunc.parametrize(name, values[name], ids=_shown)


def _shown(value: object) -> str:
    """A parameter in a test's name."""
    if isinstance(value, int):
        return f"cp{value}"
    return "its own layout" if value is None else str(value).removeprefix("torch.")


Hold = Callable[[Callable[[Case], None], list[Case]], None]
"""Holds the class to a law over cases."""


@pytest.fixture(scope="session")
def cp_subject(pytestconfig: pytest.Config) -> Subject:
    """What is tested."""
    return subject_of(pytestconfig)


@pytest.fixture(scope="session")
def cp_ranks(cp_subject: Subject) -> Iterator[RankPool]:
    """Ranks that live as long as the run; four at least, so that small groups are several and not the world."""
    with RankPool(max(4, *cp_subject.sizes), timeout=120) as pool:
        yield pool


@pytest.fixture
def hold(cp_subject: Subject, cp_ranks: RankPool) -> Hold:
    """Hold the class to a law; skip where a class without a capability table has refused."""

    def held(law: Callable[[Case], None], cases: list[Case]) -> None:
        refusals, failure = [], ""
        try:
            refusals = cp_subject.hold(cp_ranks, law, cases)
        except RankError as error:
            failure = str(error)
        if failure:  # the rank's own traceback says all there is to say
            lines = failure.splitlines()
            reason = next((line for line in reversed(lines) if line.startswith("AssertionError: ")), lines[0])
            pytest.fail(f"{reason.removeprefix('AssertionError: ')}\n{failure}", pytrace=False)
        if refusals:
            pytest.skip(f"{len(refusals)} of {len(cases)} refused: {refusals[0]}")

    return held


def test_round_trip(hold: Hold, cp_subject: Subject, cp_size: int, qkv_format: str, layout: str | None) -> None:
    hold(check_round_trip, moved(cp_subject, cp_size, qkv_format, layout))


def test_gradients_of_movement(
    hold: Hold, cp_subject: Subject, cp_size: int, qkv_format: str, layout: str | None
) -> None:
    hold(check_gradients_of_movement, moved(cp_subject, cp_size, qkv_format, layout))


def test_roll(hold: Hold, cp_subject: Subject, cp_size: int, qkv_format: str, layout: str | None) -> None:
    hold(check_roll, moved(cp_subject, cp_size, qkv_format, layout))


def test_rope(hold: Hold, cp_subject: Subject, cp_size: int, qkv_format: str, layout: str | None) -> None:
    hold(check_rope, moved(cp_subject, cp_size, qkv_format, layout))


def test_facts(hold: Hold, cp_subject: Subject, cp_size: int, qkv_format: str, layout: str | None) -> None:
    hold(check_facts, moved(cp_subject, cp_size, qkv_format, layout))


def moved(subject: Subject, cp_size: int, qkv_format: str, layout: str | None) -> list[Case]:
    """Cases of the laws that know nothing of attention."""
    described: dict[str, Any] = {"qkv_format": qkv_format, "layout": layout}
    return [subject.case(cp_size, batch=batch, **described) for batch in MOVED[qkv_format]]


def test_attention(
    hold: Hold, cp_subject: Subject, cp_size: int, qkv_format: str, layout: str | None, mask: str
) -> None:
    described: dict[str, Any] = {"qkv_format": qkv_format, "layout": layout}
    hold(
        check_attention,
        [
            cp_subject.case(cp_size, batch=batch, mask=masks_over(physical(batch))[mask], **described)
            for batch in MOVED[qkv_format][:2]
        ],
    )


def test_documents_of_length_0_and_1(
    hold: Hold, cp_subject: Subject, cp_size: int, qkv_format: str, layout: str | None
) -> None:
    hold(check_attention, attended(cp_subject, cp_size, SHORT[qkv_format], qkv_format, layout))


def test_more_ranks_than_tokens(
    hold: Hold, cp_subject: Subject, cp_size: int, qkv_format: str, layout: str | None
) -> None:
    hold(check_attention, attended(cp_subject, cp_size, FEW[qkv_format], qkv_format, layout))


def test_batches_without_a_token(
    hold: Hold, cp_subject: Subject, cp_size: int, qkv_format: str, layout: str | None
) -> None:
    hold(check_attention, attended(cp_subject, cp_size, EMPTY[qkv_format], qkv_format, layout))


def attended(
    subject: Subject, cp_size: int, batches: tuple[Batch, ...], qkv_format: str, layout: str | None
) -> list[Case]:
    """Batches under two masks that fit all of them."""
    described: dict[str, Any] = {"qkv_format": qkv_format, "layout": layout}
    masks = (Causal(), SlidingWindow(1, 2))
    return [subject.case(cp_size, mask=mask, batch=batch, **described) for mask in masks for batch in batches]


def test_rows_that_see_nothing(
    hold: Hold, cp_subject: Subject, cp_size: int, qkv_format: str, layout: str | None
) -> None:
    """Their output is 0, their log-sum-exp -inf, and they pass on no gradient."""
    described: dict[str, Any] = {"qkv_format": qkv_format, "layout": layout, "batch": ATTENDED[qkv_format][0]}
    masks = (Bands([]), Bands([(9, 10, 0, 3, -math.inf, math.inf)]), Bands([(0, 8, 4, 8, 1, math.inf)]))
    hold(check_attention, [cp_subject.case(cp_size, mask=mask, **described) for mask in masks])


def test_option(hold: Hold, cp_subject: Subject, cp_size: int, qkv_format: str, option: str) -> None:
    asked = OPTIONS[option] if option in OPTIONS else [everything(cp_subject)]
    batches = ATTENDED[qkv_format] if option != "own_attention" else ATTENDED[qkv_format][:1]
    masks = (Causal(), SlidingWindow(4, 2))
    hold(
        check_attention,
        [
            cp_subject.case(cp_size, qkv_format=qkv_format, batch=batch, mask=mask, **fields)
            for fields in asked
            for batch, mask in zip(batches, masks, strict=False)
        ],
    )


def everything(subject: Subject) -> dict[str, Any]:
    """All options of a call at once, as far as they are served."""
    fields: dict[str, Any] = {}
    for name in ("softmax_scale", "softcap", "sinks", "dropout", "return_max_logit", "value_head_dim"):
        fields |= OPTIONS[name][0] if subject.serves(name) else {}
    return fields


def test_cross_attention(hold: Hold, cp_subject: Subject, cp_size: int, qkv_format: str) -> None:
    hold(check_attention, crossed(cp_subject, cp_size, qkv_format))


def test_cross_attention_with_options(hold: Hold, cp_subject: Subject, cp_size: int, qkv_format: str) -> None:
    hold(check_attention, crossed(cp_subject, cp_size, qkv_format, **everything(cp_subject)))


@pytest.mark.parametrize(
    "law",
    [check_round_trip, check_gradients_of_movement, check_roll, check_rope, check_facts],
    ids=lambda x: x.__name__,
)
def test_movement_of_both_streams(
    hold: Hold, cp_subject: Subject, cp_size: int, qkv_format: str, law: Callable[[Case], None]
) -> None:
    chosen = {"thd": (1, 2), "sbhd": (0,), "bshd": (2,)}[qkv_format]
    cases = crossed(cp_subject, cp_size, qkv_format)
    hold(law, [cases[i] for i in chosen])


def crossed(subject: Subject, cp_size: int, qkv_format: str, **fields: Any) -> list[Case]:
    """Cross attention; layouts take turns, one for both streams or one for each."""
    layouts: list[object] = list(subject.layouts)
    if {"zigzag", "contiguous"} <= set(layouts):
        layouts.insert(0, ("zigzag", "contiguous"))
    described: dict[str, Any] = {"qkv_format": qkv_format, **fields}
    return [
        subject.case(cp_size, mask=mask, batch=batch, layout=layout, **described)
        for (mask, batch), layout in zip(CROSS[qkv_format], cycle(layouts), strict=False)
    ]


def test_dtype(hold: Hold, cp_subject: Subject, cp_size: int, dtype: torch.dtype) -> None:
    described: dict[str, Any] = {"dtype": dtype, "qkv_format": cp_subject.formats[-1]}
    batch = Batch((130, 61, 9)) if described["qkv_format"] == "thd" else Batch((200,))
    masks = (Causal(), SlidingWindow(4, 2))
    hold(check_attention, [cp_subject.case(cp_size, mask=mask, batch=batch, **described) for mask in masks])


def test_two_runs_have_the_same_bits(hold: Hold, cp_subject: Subject, cp_size: int, layout: str | None) -> None:
    described: dict[str, Any] = {"layout": layout, "qkv_format": cp_subject.formats[-1]}
    described |= {"dtype": torch.float32, "config": (("deterministic", True),), "head_dim": 16}
    batch = Batch((70, 33, 2, 19)) if described["qkv_format"] == "thd" else Batch((124,))
    masks = (Causal(), Full())
    hold(check_determinism, [cp_subject.case(cp_size, mask=mask, batch=batch, **described) for mask in masks])


def test_what_is_not_served_is_refused(hold: Hold, cp_subject: Subject, cp_size: int) -> None:
    """Formats and layouts; the tests above look at each option that is refused."""
    formats, layouts = cp_subject.unserved
    cases = [cp_subject.case(cp_size, qkv_format=name, batch=Batch((12,))) for name in formats]
    own = cp_subject.formats[0]
    if cp_size > 1:
        cases += [cp_subject.case(cp_size, qkv_format=own, layout=name, batch=Batch((12,))) for name in layouts]
    hold(check_attention, cases)
