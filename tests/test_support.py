"""The support table: every yes runs and is exact, every no raises; the table in the docs is the one that is printed."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cphandler import (
    AcrossDocuments,
    Bands,
    BlockCausal,
    Causal,
    Chunked,
    CPConfig,
    Full,
    Mask,
    PerDocument,
    PrefixLM,
    PrefixTree,
    PrefixWindow,
    SharedQuestion,
    SlidingWindow,
    get_cp_handler_cls,
)
from cphandler.attention.capabilities import FEATURES, FORMATS
from cphandler.cli.app import app
from cphandler.cli.support import MASKS, as_markdown, built_in
from cphandler.handler.factory import find_cp_handler_cls
from cphandler.layouts.layout import LAYOUTS
from cphandler.testing import RankPool, partition_group
from cphandler.testing.cases import Batch, Case, handler_class
from cphandler.testing.laws import check_all, check_determinism
from tests.sweeps import half

TABLES = {name: table for name, table in built_in().items() if not find_cp_handler_cls(*name.split("/")).package}
"""Of the handlers that compute with nothing but this library; an engine's are held to theirs in a file of its own."""
LENGTHS = (13, 3, 6, 1, 9)
REAL = ("xxxxxxxxxxx", "xxxxxxx....", "....xxxxxxx", "xx..xxx..xx", "...........")


def masks_over(documents: int) -> dict[str, Mask]:
    """One or more of each mask for a batch of 32 tokens in 5 documents, or of 11 in one."""
    packed = documents == 5
    bands = [(0, 9, 0, 9, float("-inf"), 0), (9, 11, 0, 4, -9, 9), (9, 11, 5, 11, -2, 1)]
    mixed = (Causal(), Full(), SlidingWindow(2), Full(), PrefixLM(4)) if packed else (PrefixWindow(2, 3),)
    nodes = ((3, 4, 2, 2, 2), (1, 0, 1, 1, 0), (2, 1, 1, 1, 1), (0, 0, 0, 1, 0), (1, 1, 3, 3, 1))
    trees = tuple(PrefixTree((-1, 0, 1, 1, 0), lengths) for lengths in nodes)
    return {
        "Causal": Causal(),
        "Full": Full(),
        "SlidingWindow": SlidingWindow(3, 1),
        "PrefixLM": PrefixLM((4, 0, 6, 1, 3)) if packed else PrefixLM(5),
        "BlockCausal": BlockCausal(4),
        "Chunked": Chunked(5),
        "PrefixWindow": PrefixWindow(2, 3),
        "SharedQuestion": SharedQuestion(((5, 4, 4), (1, 1, 1), (2, 0, 3), (1,), (0, 4, 5)) if packed else (3, 4, 2)),
        "PrefixTree": PerDocument(trees) if packed else PrefixTree((-1, 0, 1, 0, 3, 3), (2, 3, 1, 2, 0, 3)),
        "PerDocument": PerDocument(mixed),
        "AcrossDocuments": AcrossDocuments(SlidingWindow(9)),
        "Bands": Bands(bands),
    }


BATCHES = {
    "thd": Batch(LENGTHS),
    "sbhd": Batch((11,)),
    "bshd": Batch(real=REAL),
}
"""A batch per format; the last one has a key-padding mask."""

OPTIONS: dict[str, dict[str, Any]] = {
    "softmax_scale": {"scale": 0.7},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "dropout": {"dropout_p": 0.3, "layer": 2},
    "return_lse": {"lse": True},
    "return_max_logit": {"max_logit": True},
    "value_head_dim": {"value_dim": 12},
    "key_padding_mask": {"qkv_format": "sbhd", "batch": Batch(real=REAL)},
    "gradient_wire_dtype": {"config": (("gradient_wire_dtype", "float32"),)},
    "ulysses_degree": {"config": (("ulysses_degree", 2),)},
    "all of them": {
        "scale": 0.7,
        "softcap": 4.0,
        "sinks": True,
        "dropout_p": 0.2,
        "lse": True,
        "max_logit": True,
        "value_dim": 5,
    },
}
"""What asks for a feature, as fields of a case; ``own_attention`` and ``cross_attention`` have tests of their own."""


def heads_for(cp_size: int) -> tuple[int, int]:
    return (6, 3) if cp_size == 3 else (4, 2)


def made(backend: str, layout: str, form: str, mask: str, option: str, cp_size: int) -> Case:
    """One cell of the table as a case."""
    described: dict[str, Any] = {"qkv_format": form, "batch": BATCHES[form], "lse": False, **OPTIONS[option]}
    dtype = torch.float32 if option == "gradient_wire_dtype" else torch.float64
    if option == "ulysses_degree" and cp_size % 2:
        described["config"] = (("ulysses_degree", cp_size),)
    chosen = masks_over(5 if described["qkv_format"] == "thd" else 1)[mask]
    return Case(backend, cp_size, layout=layout, mask=chosen, heads=heads_for(cp_size), dtype=dtype, **described)


def sizes_of(backend: str) -> list[int]:
    return [1] if backend == "local" else [2, 3, 4]


def options_of(backend: str) -> list[str]:
    return [name for name in OPTIONS if name in TABLES[backend].features or name == "all of them"]


def turning(values: list[Any], turn: int) -> Any:
    return values[turn % len(values)]


def layouts_of(backend: str) -> list[str]:
    return list(TABLES[backend].layouts)


@pytest.mark.parametrize("backend", TABLES)
def test_every_mask_on_every_layout(ranks: RankPool, backend: str) -> None:
    """Formats, options and cp sizes take turns, so that each of them meets many masks and layouts."""
    cells = itertools.product(layouts_of(backend), masks_over(5))
    options, sizes = options_of(backend), sizes_of(backend)
    cases = [
        made(backend, layout, FORMATS[i % 3], mask, turning(options, i), turning(sizes, i // 3))
        for i, (layout, mask) in enumerate(cells)
    ]
    ranks.run(check_all, cases)


@pytest.mark.parametrize("backend", TABLES)
def test_every_option_in_every_format(ranks: RankPool, backend: str) -> None:
    cells = itertools.product(options_of(backend), FORMATS)
    layouts, masks, sizes = layouts_of(backend), list(masks_over(5)), sizes_of(backend)
    cases = [
        made(backend, turning(layouts, i), form, turning(masks, i), option, turning(sizes, i))
        for i, (option, form) in enumerate(cells)
    ]
    ranks.run(check_all, cases)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("backend", "layout"), [(backend, layout) for backend in TABLES for layout in layouts_of(backend)]
)
def test_the_whole_product(ranks: RankPool, backend: str, layout: str, form: str) -> None:
    for i, mask in enumerate(masks_over(5)):
        cases = [
            made(backend, layout, form, mask, option, turning(sizes_of(backend), i + j))
            for j, option in enumerate(options_of(backend))
        ]
        ranks.run(check_all, cases)


CROSS = [
    (Full(), Batch((13, 3, 6, 0, 9), keys=(5, 7, 1, 4, 20))),
    (Causal("bottom_right"), Batch((13, 3, 6, 0, 9), keys=(5, 7, 1, 4, 20))),
    (Causal("top_left"), Batch((3, 8), padded=(4, 12), keys=(5, 2), keys_padded=(5, 6))),
    (SlidingWindow(2, 1, "bottom_right"), Batch((9, 1), keys=(4, 30))),
    (AcrossDocuments(Full()), Batch((9, 1), keys=(4, 3, 2))),
    (Bands([(0, 5, 3, 9, -1, 8), (5, 9, 0, 9, 0, 0)]), Batch((9,), keys=(9, 3))),
    (PerDocument((Full(), SlidingWindow(1, align="top_left"))), Batch((5, 6), keys=(6, 2))),
    (Full(), Batch((5,), keys=(1,))),
    (Full(), Batch((0,), keys=(7,))),
    (Full(), Batch((7,), keys=(0,))),
]
DENSE_CROSS = [
    (Full(), Batch((7,), keys=(12,))),
    (Causal("bottom_right"), Batch((7,), keys=(11,), real=REAL)),
    (Full(), Batch((3,), keys=(11,), real=REAL)),
]


@pytest.mark.parametrize("backend", half(TABLES))
def test_cross_attention(ranks: RankPool, backend: str) -> None:
    cases = []
    for i, (mask, batch) in enumerate(CROSS + DENSE_CROSS):
        form = "thd" if i < len(CROSS) else turning(["sbhd", "bshd"], i)
        for cp_size in sizes_of(backend):
            layout = turning(layouts_of(backend), i + cp_size)
            options = {} if i % 2 else {"sinks": True, "dropout_p": 0.2, "max_logit": True, "value_dim": 4}
            cases.append(Case(backend, cp_size, form, layout, mask, batch, heads_for(cp_size), **options))
    ranks.run(check_all, cases)


def group_for(backend: str) -> Any:
    return partition_group([range(4)] if backend != "local" else [[r] for r in range(4)])


def batches_without_rows(backend: str) -> None:
    """B = 0 with a key-padding mask, of both streams or of the keys: nothing comes out, and it has gradients."""
    for queries, form in itertools.product((8, 5), ("sbhd", "bshd")):
        handler = handler_class(backend)(
            cp_group=group_for(backend),
            qkv_format=form,  # type: ignore[arg-type]
            max_seqlen_q=queries,
            max_seqlen_kv=8,
            key_padding_mask=torch.zeros(0, 8, dtype=torch.bool),
            mask="full",
        )
        assert handler.is_cross_attention == (queries != 8)
        dim = handler.seq_dim
        rows = {"q": handler.num_local_tokens, "kv": handler.kv_num_local_tokens}
        shapes = {stream: (0, n) if form == "bshd" else (n, 0) for stream, n in rows.items()}
        q, k, v = (torch.zeros(*shapes[s], 4, 8, requires_grad=True) for s in ("q", "kv", "kv"))
        result = handler.core_attn(None, q, k, v, return_lse=True, return_max_logit=True)
        result.out.sum().backward()
        for x in (q, k, v):
            assert x.grad is not None
            assert x.grad.shape == x.shape
        assert result.out.shape == q.shape
        assert result.lse.shape == q.shape[:-1]
        assert (result.max_logit == float("-inf")).all()
        assert handler.combine(result.out, dim).shape[dim] == queries
        assert handler.valid_mask.shape == (0, rows["q"])


@pytest.mark.parametrize("backend", TABLES)
def test_padded_batches_without_rows(ranks: RankPool, backend: str) -> None:
    ranks.run(batches_without_rows, backend)


def same_twice(cases: list[Case]) -> None:
    for case in cases:
        check_determinism(case)


@pytest.mark.parametrize("backend", [*TABLES, ("a2a", "p2p", "a2a+ring", "all_gather")], ids=str)
def test_two_runs_have_the_same_bits(ranks: RankPool, backend: str | tuple[str, ...]) -> None:
    """On every layout, with dropout and without, in one backend's turn or as a list of one for each layer."""
    lists = not isinstance(backend, str)
    layouts = ["zigzag", "contiguous"] if lists else layouts_of(backend)  # type: ignore[arg-type]
    ranks.run(
        same_twice,
        [
            Case(backend, 1 if backend == "local" else 4, layout=layout, layer=layer, dtype=torch.float32, **options)
            for layout in layouts
            for layer in (range(1, 5) if lists else (None,))
            for options in ({"heads": (4, 2), "head_dim": 16}, {"dropout_p": 0.3, "sinks": True, "max_logit": True})
        ],
    )


def refusals(backend: str) -> None:
    """Every no of the construction, on every rank."""
    table, group = TABLES[backend], group_for(backend)

    def make(**arguments: Any) -> Any:
        return handler_class(backend)(cp_group=group, **{"qkv_format": "thd", "cu_seqlens_q": [0, 16], **arguments})

    settings: dict[str, Any] = {"gradient_wire_dtype": "bfloat16", "ulysses_degree": 2}
    for name, value in settings.items():
        if name not in table.features:
            with pytest.raises(NotImplementedError, match=f"does not serve CPConfig.{name}"):
                make(config=CPConfig(**{name: value}))
    for layout in LAYOUTS:
        if layout not in table.layouts:
            with pytest.raises(NotImplementedError, match=f"does not serve the '{layout}' layout"):
                make(layout=layout)
    if "own_attention" not in table.features:
        x = torch.zeros(4, 4, 8)
        with pytest.raises(NotImplementedError, match="a callable attn_mod; pass attn_mod=None"):
            make().core_attn(lambda *a, **k: a[0], x, x, x)


@pytest.mark.parametrize("backend", TABLES)
def test_every_no_raises(ranks: RankPool, backend: str) -> None:
    ranks.run(refusals, backend)


def test_nothing_else_is_refused() -> None:
    """A no that no test above looks for would be a hole."""
    looked_for = {"gradient_wire_dtype", "ulysses_degree", "own_attention"}
    for table in TABLES.values():
        assert set(FEATURES) - table.features <= looked_for
        assert table.formats == FORMATS


def test_masks_and_options_are_all_in_the_table() -> None:
    assert {mask.__name__ for mask in MASKS} == set(masks_over(5)) == set(masks_over(1))
    assert set(OPTIONS) | {"own_attention", "cross_attention"} == set(FEATURES) | {"all of them"}


def test_the_table_in_the_docs_is_the_one_that_is_printed() -> None:
    page = (Path(__file__).parent.parent / "docs" / "support.md").read_text()
    assert as_markdown() in page, "run: python -m cphandler support --markdown"
    printed = CliRunner().invoke(app, ["support", "--markdown"])
    assert printed.output.strip() == as_markdown()
    assert "cross_attention" in CliRunner().invoke(app, ["support"]).output


HEADS = [(8, 8), (8, 2), (12, 6), (28, 4), (7, 7), (30, 6), (6, 2), (5, 1), (2, 2), (1, 1)]
"""Also fewer heads than ranks, and groups of query heads that a split of the heads cuts."""


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_head_shapes(ranks: RankPool, heads: tuple[int, int]) -> None:
    """Exact on every backend: none asks the heads to divide by its ranks."""
    cases = [
        Case(backend, cp_size, heads=heads, batch=Batch((17, 6)), sinks=True, dropout_p=0.1 if cp_size == 4 else 0.0)
        for backend in TABLES
        for cp_size in (2, 3, 4)
        if backend != "local"
    ]
    ranks.run(check_all, cases)


SPLIT = [
    ("local/a2a", "contiguous", ()),
    ("local/a2a", "replicated", ()),
    ("local/a2a+p2p", "zigzag", ()),
    ("local/a2a+ring", "zigzag", (("ulysses_degree", 4),)),
]
"""What splits heads: over all ranks, over ranks that hold all tokens, and inside."""


@pytest.mark.parametrize(("backend", "layout", "config"), SPLIT, ids=lambda x: str(x) if isinstance(x, str) else None)
def test_uneven_shares_of_heads_with_everything_else(
    ranks: RankPool, backend: str, layout: str, config: tuple[tuple[str, Any], ...]
) -> None:
    """Options, padded rows and cross attention, with shares that differ and with ranks that have no head."""
    cases = [
        Case(backend, 4, form, layout, mask, batch, heads, config=config, max_logit=True, **options)
        for heads in ((30, 6), (6, 2), (2, 1))
        for form, mask, batch, options in (
            ("thd", Causal(), Batch((7, 0, 9), padded=(8, 4, 16)), {"softcap": 3.0, "sinks": True, "value_dim": 5}),
            ("bshd", SlidingWindow(4, 2), Batch(real=REAL), {"dropout_p": 0.2, "sinks": True}),
            ("sbhd", Full(), Batch((7,), keys=(12,)), {"sinks": True, "value_dim": 12}),
        )
    ]
    ranks.run(check_all, cases)


def test_one_class_per_layer(ranks: RankPool) -> None:
    comm_types = ("a2a", "p2p", "ring", "a2a+p2p", "all_gather", "a2a+ring", "p2p")
    cases = [
        Case(comm_types, 4, form, layer=layer, mask=mask, batch=BATCHES[form])
        for layer in range(1, 8)
        for form, mask in (("thd", SlidingWindow(4)), ("bshd", Causal()))
    ]
    ranks.run(check_all, cases)


def test_lists_are_checked() -> None:
    with pytest.raises(ValueError, match="needs one for each layer; got 2 for 3 layers"):
        get_cp_handler_cls("local", ["a2a", "p2p"], num_layers=3)
    with pytest.raises(ValueError, match="needs one for each layer"):
        get_cp_handler_cls("local", [])
    with pytest.raises(ValueError, match="unknown backend or comm type"):
        get_cp_handler_cls("local", ["a2a", "pigeon"])
    with pytest.raises(TypeError, match=r"leave the layout and core_attn to the library .*; got LocalHandler"):
        get_cp_handler_cls("local", ["a2a", None])  # type: ignore[list-item]
    handler_cls = get_cp_handler_cls("local", ["a2a", "p2p"], num_layers=2)
    assert handler_cls is get_cp_handler_cls("local", ["ulysses", "p2p"])
    handler = handler_cls(qkv_format="thd", cu_seqlens_q=[0, 4])
    assert handler.layout.name == "zigzag"
    x = torch.randn(4, 2, 8)
    for number in (None, 0, 3):
        with pytest.raises(ValueError, match=r"layer_number|layers"):
            handler.core_attn(None, x, x, x, layer_number=number)
    assert torch.equal(
        handler.core_attn(None, x, x, x, layer_number=1), handler.core_attn(None, x, x, x, layer_number=2)
    )
