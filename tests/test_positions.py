"""Positions of tokens: a caller's own, of several axes and per row of a batch, and those that a mask implies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cphandler import (
    InvalidTypeError,
    InvalidValueError,
    Mask,
    PerDocument,
    PrefixTree,
    RankMismatchError,
    SharedQuestion,
    get_batch_on_this_cp_rank,
    get_cp_handler_cls,
)
from cphandler.testing import RankPool, assert_close, dense_attention, visible_pairs
from cphandler.testing.cases import Batch, Case, documents_of, draw, group_of, make_handler, visible
from cphandler.testing.reference import dense_rope
from cphandler.tokens.masks import Causal
from tests.test_errors import Seat

ROWS, TOKENS, AXES = 3, 11, 2
FREQUENCIES = 0.7 ** torch.arange(4, dtype=torch.float64)
TABLE = torch.arange(40)[:, None] * FREQUENCIES
WHOLE = torch.cat([TABLE, TABLE], -1)
"""``[40, 8]`` angles, both halves."""


def positions(seed: int, *shape: int) -> Tensor:
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(seed))


PACKED = {"[T]": (TOKENS,), "[A, T]": (AXES, TOKENS)}
DENSE = {
    "[S]": (TOKENS,),
    "[1, S]": (1, TOKENS),
    "[B, S]": (ROWS, TOKENS),
    "[A, 1, S]": (AXES, 1, TOKENS),
    "[A, B, S]": (AXES, ROWS, TOKENS),
}


def case_of(qkv_format: str, cp_size: int, **settings: Any) -> Case:
    """11 tokens: in two documents, or in three rows."""
    batch = Batch((7, 4)) if qkv_format == "thd" else Batch((TOKENS,), rows=ROWS)
    return Case("ring" if cp_size > 1 else "local", cp_size, qkv_format, batch=batch, **settings)


def turned(x: Tensor, where: Tensor, qkv_format: str) -> Tensor:
    """Rope by the definition: each axis turns its section of the channels' pairs, row by row of the batch."""
    axes = where if where.dim() == (2 if qkv_format == "thd" else 3) else where.unsqueeze(0)
    sections = torch.arange(4) * len(axes) // 4
    if qkv_format == "thd":
        return dense_rope(x, _angles(axes, sections), seq_dim=0, interleaved=False)
    rows = x.movedim(1 if qkv_format == "sbhd" else 0, 0)
    each = axes.expand(-1, len(rows), -1) if axes.dim() == 3 else axes.unsqueeze(1).expand(-1, len(rows), -1)
    out = [dense_rope(row, _angles(each[:, i], sections), seq_dim=0, interleaved=False) for i, row in enumerate(rows)]
    return torch.stack(out).movedim(0, 1 if qkv_format == "sbhd" else 0)


def _angles(axes: Tensor, sections: Tensor) -> Tensor:
    """``[S, 4]``: pair i turns by the position on its section's axis."""
    return torch.stack([axes[axis] * FREQUENCIES[i] for i, axis in enumerate(sections.tolist())], -1)


def joined(freqs: Tensor, axes: int) -> Tensor:
    """What a model does with ``[A, ..., R]`` angles: channels of each section from its axis, in both halves."""
    sections = (torch.arange(4) * axes // 4).repeat(2)
    return torch.stack([freqs[axis, ..., i] for i, axis in enumerate(sections.tolist())], -1)


def own_positions(qkv_format: str, cp_size: int, form: str) -> None:
    """Facts, tables, rope and the attention that follows, against the definition."""
    case = case_of(qkv_format, cp_size)
    group, seed = group_of(case)
    if seed < 0:
        return
    where = positions(seed, *(PACKED if qkv_format == "thd" else DENSE)[form])
    handler = make_handler(case, group, position_ids=where)
    dim, has_axes = handler.seq_dim, "A" in form
    assert torch.equal(handler.position_ids, handler.dispatch(where, -1))
    assert torch.equal(handler.kv_position_ids, handler.position_ids)
    assert handler.get_rotary_seq_len() == int(where.max()) + 1
    assert handler.get_rotary_seq_len(freqs_mode="packed") == TOKENS
    data = draw(case, seed)
    expected = [turned(x, where, qkv_format) for x in (data.query, data.key)]
    for table in (WHOLE, WHOLE[:, None, None], (WHOLE.cos(), WHOLE.sin())):
        local = handler.get_emb_on_this_cp_rank(table)
        wanted = handler.position_ids.clamp(min=0)
        for part, whole in zip(*((t if isinstance(t, tuple) else (t,)) for t in (local, table)), strict=True):
            assert torch.equal(part, whole[wanted]), "rows of the table"
        if has_axes:
            parts = [joined(part, AXES) for part in (local if isinstance(local, tuple) else (local,))]
            local = tuple(parts) if isinstance(local, tuple) else parts[0]
        for x, full in zip((data.query, data.key), expected, strict=True):
            assert_close(
                handler.rope(handler.dispatch(x, dim), local), handler.dispatch(full, dim), what=f"rope {form}"
            )
    q, k = (handler.rope(handler.dispatch(x, dim), local) for x in (data.query, data.key))
    out = handler.core_attn(None, q, k, handler.dispatch(data.value, dim))
    dense, _ = dense_attention(*expected, data.value, visible(case), qkv_format=qkv_format)
    assert_close(out, handler.dispatch(dense, dim), what=f"attention after rope {form}")


@pytest.mark.parametrize("cp_size", [1, 3])
@pytest.mark.parametrize(
    ("qkv_format", "form"), [("thd", form) for form in PACKED] + [(f, form) for f in ("sbhd", "bshd") for form in DENSE]
)
def test_positions_of_a_callers_own(ranks: RankPool, qkv_format: str, form: str, cp_size: int) -> None:
    ranks.run(own_positions, qkv_format, cp_size, form)


def differing() -> None:
    """Ranks that name other positions are told, on every rank."""
    group, _ = group_of(Case(cp_size=4))
    where = torch.arange(13)
    for other in (where.roll(1), None, where[None].expand(2, -1)):
        rank_two = torch.distributed.get_rank() == 2
        given = {} if rank_two and other is None else {"position_ids": other if rank_two else where}
        handler = make_handler(Case("ring", 4, batch=Batch((13,))), group, **given)
        with pytest.raises(RankMismatchError, match=r"positions: rank 0 and 1 and 3 has \[13\] .*, rank 2 has"):
            handler.combine(torch.zeros(4), 0)


def test_ranks_that_name_other_positions(ranks: RankPool) -> None:
    ranks.run(differing)


def handler_of(qkv_format: str = "thd", size: int = 2, **arguments: Any) -> Any:
    shape = {"cu_seqlens_q": [0, 7, 11]} if qkv_format == "thd" else {"max_seqlen_q": 11}
    return get_cp_handler_cls("ring")(cp_group=Seat(size, size - 1), qkv_format=qkv_format, **{**shape, **arguments})


def test_forms_by_format() -> None:
    """Two dims are axes of a packed batch and rows of a dense one; what all rows share stays one row."""
    forms = {
        "thd": {(11,): (6,), (1, 11): (6,), (3, 11): (3, 6), (3, 1, 11): (3, 6), (1, 1, 11): (1, 6)},
        "bshd": {(11,): (6,), (1, 11): (1, 6), (2, 11): (2, 6), (3, 2, 11): (3, 2, 6), (3, 1, 11): (3, 1, 6)},
    }
    for qkv_format, shapes in forms.items():
        for given, expected in shapes.items():
            for ids in (positions(1, *given), positions(1, *given).int().numpy(), positions(1, *given).tolist()):
                handler = handler_of(qkv_format, position_ids=ids)
                assert handler.position_ids.shape == expected
                assert handler.position_ids.dtype == torch.int64
                assert (handler.position_ids[..., -1] == 0).all(), "the pad row"
                assert handler.get_emb_on_this_cp_rank(WHOLE).shape == (*expected, 8)
                assert handler.get_emb_on_this_cp_rank(WHOLE[:, None, None]).shape == (*expected, 1, 1, 8)
                assert handler.get_emb_on_this_cp_rank(WHOLE, freqs_mode="packed").shape == (6, 8)


def engines() -> None:
    """A handler that brings its own layout has them from its dispatch."""
    case = case_of("thd", 2)
    group, seed = group_of(case)
    if seed < 0:
        return
    for shape in ((TOKENS,), (AXES, TOKENS)):
        where = positions(seed, *shape)
        handler = make_handler(replace(case, backend="tests.test_conformance:Plain"), group, position_ids=where)
        assert torch.equal(handler.position_ids, handler.dispatch(where, -1))
        assert torch.equal(handler.get_emb_on_this_cp_rank(WHOLE), WHOLE[handler.dispatch(where, -1)])
        assert handler.get_rotary_seq_len() == int(where.max()) + 1


def test_positions_of_an_engines_layout(ranks: RankPool) -> None:
    ranks.run(engines)


REFUSED: dict[str, tuple[str, Any, type[Exception], str]] = {
    "floats": ("thd", torch.zeros(11), InvalidTypeError, "must hold integers; got float32; pass"),
    "truth": ("thd", torch.zeros(11).bool(), InvalidTypeError, "must hold integers; got bool"),
    "words": ("thd", ["a"] * 11, InvalidTypeError, "must hold integers"),
    "ragged": ("bshd", [[0] * 11, [0] * 10], InvalidTypeError, "must hold integers; got list"),
    "below 0": ("thd", torch.arange(-1, 10), InvalidValueError, "must count from 0; got -1 to 9; pass 0"),
    "without end": ("thd", [2**62] * 11, InvalidValueError, "must count from 0"),
    "a rank's own": ("thd", torch.zeros(6).long(), InvalidValueError, "as they were before the split over ranks"),
    "a rank's own rows": ("bshd", torch.zeros(2, 6).long(), InvalidValueError, r"\[S\], \[B, S\].*of 11 tokens; got"),
    "no token": ("bshd", torch.tensor(3), InvalidValueError, r"got shape \[\]"),
    "rows of a packed batch": ("thd", torch.zeros(1, 2, 11).long(), InvalidValueError, r"\[A, T\].*shape \[1, 2, 11\]"),
    "four dims": ("bshd", torch.zeros(1, 1, 1, 11).long(), InvalidValueError, "position_ids must be"),
    "no axis": ("thd", torch.zeros(0, 11).long(), InvalidValueError, r"shape \[0, 11\]"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_positions_are_not(case: tuple[str, Any, type[Exception], str]) -> None:
    qkv_format, ids, kind, message = case
    with pytest.raises(kind, match=message):
        handler_of(qkv_format, position_ids=ids)


def test_rows_of_a_batch_are_laid_end_to_end_by_the_caller() -> None:
    with pytest.raises(InvalidValueError, match=r"lay the rows of the batch end to end, .*flatten\(-2\)"):
        handler_of(cu_seqlens_q=[0, 5, 10], position_ids=torch.zeros(2, 5).long())
    padded = {"key_padding_mask": torch.ones(3, 11, dtype=torch.bool)}
    with pytest.raises(InvalidValueError, match=r"the batch's 3 rows, or one for all of them; got 2 rows"):
        handler_of("bshd", **padded, position_ids=torch.zeros(2, 11).long())
    assert handler_of("bshd", **padded, position_ids=torch.zeros(1, 11).long()).position_ids.shape == (1, 6)


def test_positions_are_copied_and_given_out_as_copies() -> None:
    for ids in (positions(1, 2, 11), positions(1, 2, 11).numpy()):
        handler = handler_of("bshd", position_ids=ids)
        before, table = handler.position_ids, handler.get_emb_on_this_cp_rank(WHOLE)
        ids.__iadd__(1)
        handler.position_ids.zero_()
        handler.kv_position_ids.zero_()
        assert torch.equal(handler.position_ids, before)
        assert torch.equal(handler.get_emb_on_this_cp_rank(WHOLE), table)
        with pytest.raises(ValueError, match="read-only"):
            handler.global_positions[0] = 1


def test_positions_outlive_inference_mode() -> None:
    handler = handler_of(position_ids=positions(1, 11))
    table = WHOLE.clone().requires_grad_()
    with torch.inference_mode():
        handler.get_emb_on_this_cp_rank(WHOLE)
    handler.get_emb_on_this_cp_rank(table).sum().backward()
    assert table.grad.sum() == 6 * 8


def test_tables_are_as_long_as_positions_need() -> None:
    handler = handler_of(position_ids=torch.arange(11) + 30)
    assert handler.get_rotary_seq_len() == 41
    with pytest.raises(InvalidValueError, match="too short; got 40 rows, 41 needed"):
        handler.get_emb_on_this_cp_rank(WHOLE)
    assert handler_of(cu_seqlens_q=[0], position_ids=[]).get_rotary_seq_len() == 0


def test_keys_of_cross_attention_have_the_positions_of_their_documents() -> None:
    handler = handler_of(cu_seqlens_kv=[0, 2, 5], mask="full", position_ids=positions(1, 2, 11))
    assert handler.position_ids.shape == (2, 6)
    assert handler.kv_position_ids.tolist() == handler_of(cu_seqlens_q=[0, 2, 5]).position_ids.tolist()
    assert (handler.get_rotary_seq_len(stream="kv"), handler.get_rotary_seq_len()) == (
        3,
        int(positions(1, 2, 11).max()) + 1,
    )
    assert handler.get_emb_on_this_cp_rank(WHOLE, stream="kv").shape == (3, 8)


WRONG_TABLES: dict[str, tuple[str, tuple[int, ...], str]] = {
    "axes that nobody joined": ("thd", (2, 6, 8), "2 tables for shape .* join the sections"),
    "as many axes as heads": ("thd", (4, 6, 8), "4 tables for shape"),
    "another batch": ("bshd", (3, 6, 8), r"3 tables for shape \[2, 6, 4, 8\]"),
    "rows of the whole": ("bshd", (2, 11, 8), "each of the 6 local rows; got 11 rows"),
    "Megatron's form per row": ("bshd", (6, 2, 1, 8), r"x\[:, :, 0\].transpose\(0, 1\)"),
    "one dim": ("bshd", (8,), r"freqs must be \[L, R\]"),
}


@pytest.mark.parametrize("case", WRONG_TABLES.values(), ids=WRONG_TABLES.keys())
def test_tables_that_fit_no_tensor(case: tuple[str, tuple[int, ...], str]) -> None:
    qkv_format, shape, message = case
    x = torch.zeros(6, 4, 8) if qkv_format == "thd" else torch.zeros(2, 6, 4, 8)
    with pytest.raises(InvalidValueError, match=message):
        handler_of(qkv_format).rope(x, torch.zeros(shape))


def test_one_table_for_any_batch() -> None:
    """``[1, L, R]`` is ``[L, R]``, in every format; the gradient of a table per row comes back to it."""
    for qkv_format, shape in (("thd", (6, 4, 8)), ("bshd", (2, 6, 4, 8)), ("sbhd", (6, 2, 4, 8))):
        handler, x, table = handler_of(qkv_format), torch.randn(shape), torch.randn(6, 8)
        assert torch.equal(handler.rope(x, table[None]), handler.rope(x, table))
        assert torch.equal(handler.rope(x, table[None, :, None, None]), handler.rope(x, table))
    tables = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, 2, 1, 8, dtype=torch.float64, requires_grad=True)
    handler = handler_of("sbhd")
    assert torch.autograd.gradcheck(lambda x, t: handler.rope(x, t, mscale=1.3), (x, tables))


TREES: dict[str, tuple[Mask, Batch]] = {
    "a shared question": (SharedQuestion((3, 2, 2)), Batch((7, 8))),
    "questions of their own": (SharedQuestion(((2, 1, 3), (1, 1))), Batch((9, 5))),
    "a tree": (PrefixTree((-1, 0, 1, 1, 0), (1, 2, 2, 1, 1)), Batch((7, 7))),
    "among others": (PerDocument((Causal(), PrefixTree((-1, 0, 0), (2, 3, 1)), Causal())), Batch((4, 6, 3))),
}


def implied(name: str, backend: str) -> None:
    """A token's position is how many tokens it sees before itself; the rest goes by documents as ever."""
    mask, batch = TREES[name]
    case = Case(backend, 2, mask=mask, batch=batch)
    group, seed = group_of(case)
    if seed < 0:
        return
    handler, plain = make_handler(case, group), make_handler(replace(case, mask=Causal()), group)
    expected = visible_pairs(mask, documents_of(case)).sum(1) - 1
    assert torch.equal(handler.position_ids, handler.dispatch(expected, 0))
    assert not torch.equal(expected, visible_pairs(Causal(), documents_of(case)).sum(1) - 1), "the mask says something"
    assert handler.get_rotary_seq_len() == int(expected.max()) + 1
    assert torch.equal(handler.get_emb_on_this_cp_rank(WHOLE), WHOLE[handler.position_ids])
    x = torch.randn(documents_of(case).num_tokens, generator=torch.Generator().manual_seed(seed))
    rolled = [h.roll_tensor(h.dispatch(x, 0), -1, 0)[0] for h in (handler, plain)]
    assert torch.equal(*rolled), "neighbours are those of the document"
    assert handler.layout == plain.layout
    own = positions(seed, documents_of(case).num_tokens)
    assert torch.equal(make_handler(case, group, position_ids=own).position_ids, handler.dispatch(own, 0))


@pytest.mark.parametrize("name", TREES)
def test_positions_that_a_mask_implies(ranks: RankPool, name: str) -> None:
    ranks.run(implied, name, "ring" if "tree" in name else "p2p")


def test_positions_that_a_mask_implies_for_rows_of_a_batch() -> None:
    """Rows that differ have positions of their own."""
    real = torch.ones(2, 11, dtype=torch.bool)
    real[1, 8:] = False
    mask = SharedQuestion((3, 4, 1))
    handler = handler_of("bshd", mask=mask, key_padding_mask=real)
    expected = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 3, 3, 4, 5]] * 2)
    assert torch.equal(handler.position_ids, handler.dispatch(expected, 1))
    assert handler.get_rotary_seq_len() == 7
    assert handler_of("sbhd", mask=mask).position_ids.tolist() == handler.position_ids[0].tolist()


def test_positions_of_another_mask_for_each_row() -> None:
    handler = handler_of("bshd", mask=PerDocument((SharedQuestion((3, 4, 4)), Causal())))
    expected = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 6], list(range(11))])
    assert torch.equal(handler.position_ids, handler.dispatch(expected, 1))
    assert handler.get_emb_on_this_cp_rank(WHOLE).shape == (2, 6, 8)


class Wrong(Causal):
    """A mask of a caller's own whose positions are none."""

    def positions(self, documents: Any) -> Any:
        return np.arange(documents.num_tokens) - 1


def test_a_mask_of_ones_own_with_positions_that_are_none() -> None:
    with pytest.raises(InvalidValueError, match="the positions that Wrong implies must count from 0; got -1 to 9"):
        handler_of(mask=Wrong()).get_rotary_seq_len()


BATCHES: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], int, tuple[int, ...]]] = {
    # format, positions, tokens, sequence dim of the tokens, positions in the batch
    "packed": ("thd", (11,), (11,), 0, (6,)),
    "packed with a leading dim": ("thd", (11,), (1, 11), 1, (1, 6)),
    "packed axes": ("thd", (3, 11), (11,), 0, (3, 6)),
    "packed axes with a leading dim": ("thd", (3, 11), (1, 11), 1, (3, 1, 6)),
    "one row for all": ("bshd", (11,), (2, 11), 1, (2, 6)),
    "rows": ("bshd", (2, 11), (2, 11), 1, (2, 6)),
    "rows, sequence first": ("sbhd", (2, 11), (11, 2), 0, (6, 2)),
    "axes": ("bshd", (3, 2, 11), (2, 11), 1, (3, 2, 6)),
    "axes, one row for all": ("bshd", (3, 1, 11), (2, 11), 1, (3, 2, 6)),
}


@pytest.mark.parametrize("case", BATCHES.values(), ids=BATCHES.keys())
def test_positions_in_a_batch(case: tuple[str, tuple[int, ...], tuple[int, ...], int, tuple[int, ...]]) -> None:
    qkv_format, shape, tokens, dim, expected = case
    handler = handler_of(qkv_format, position_ids=positions(1, *shape))
    batch = {"tokens": torch.zeros(tokens, dtype=torch.long)}
    local = get_batch_on_this_cp_rank(batch, cp_handler=handler, seq_dims={"tokens": dim})["position_ids"]
    assert local.shape == expected
    own = handler.position_ids
    own = own if qkv_format != "thd" or own.dim() == 1 or len(tokens) == 1 else own.unsqueeze(1)
    wanted = own.mT if dim == 0 and own.dim() == 2 and qkv_format == "sbhd" else own
    assert torch.equal(local, wanted.expand(expected))


def test_rope_where_there_are_no_tokens(ranks: RankPool) -> None:
    ranks.run(no_tokens)


def no_tokens() -> None:
    """A table of no rows serves rows that hold no token."""
    from tests.test_movement import EMPTY  # noqa: PLC0415 (a circle of test files otherwise)

    group, _ = group_of(Case(cp_size=2))
    for layout in EMPTY:
        handler = make_handler(Case("ring", 2, layout=layout, batch=Batch(())), group)
        assert handler.get_rotary_seq_len() == 0
        local = handler.get_emb_on_this_cp_rank(torch.zeros(0, 8))
        assert local.shape == (layout.num_local_tokens, 8)
        assert handler.rope(torch.ones(layout.num_local_tokens, 2, 8), local).shape == (layout.num_local_tokens, 2, 8)
