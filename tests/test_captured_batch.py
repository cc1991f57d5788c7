"""A graph captured over one packing and replayed for others: exact for each, refused where it could not be."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from cphandler import (
    CapturedBatch,
    Causal,
    Chunked,
    CoreAttention,
    CPConfig,
    Full,
    InvalidTypeError,
    InvalidValueError,
    LayoutHandler,
    Mask,
    RankMismatchError,
    SlidingWindow,
    UnsupportedError,
    get_cp_handler_cls,
)
from cphandler.comm.groups import Place
from cphandler.kernels.buffer import Buffer
from cphandler.testing import RankPool, assert_close, partition_group
from cphandler.testing.reference import dense_gradients, visible_pairs
from tests.doubles.graphs import captured, room
from tests.doubles.packages import kernels_on_cpu, prefixed

TOKENS = 23
BFLOAT = torch.bfloat16


class Pack(NamedTuple):
    """Documents of one packing: real lengths, and physical ones where they are padded."""

    lengths: tuple[int, ...]
    padded: tuple[int, ...] | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        offsets = {"cu_seqlens_q": self.lengths, "cu_seqlens_q_padded": self.padded}
        return {
            name: [sum(some[:i]) for i in range(len(some) + 1)] for name, some in offsets.items() if some is not None
        }


PACKS = (Pack((9, 14)), Pack((TOKENS,)), Pack((1,) * TOKENS), Pack((3, 0, 1, 6, 1, 1, 11)), Pack((9, 14)))
PADDED = (Pack((7, 4, 5), (7, 8, 8)), Pack((TOKENS - 4,), (TOKENS,)), Pack((1, 0, 20), (2, 1, 20)), PACKS[0])
"""Padding between documents, a tail, documents of padding alone; and none at all."""


class Setting(NamedTuple):
    """What a graph is captured of."""

    backend: str
    size: int = 1
    layout: str | None = None
    mask: Mask = Causal()
    packs: tuple[Pack, ...] = PACKS
    heads: tuple[int, int] = (4, 2)
    kernel: str = "torch_flash"
    softcap: float | None = None
    sinks: bool = False

    def handler(self, pack: Pack, group: Any = None, **arguments: Any) -> LayoutHandler:
        config = CPConfig(kernel=prefixed(self.kernel))
        given = {"cp_group": group, "qkv_format": "thd", "layout": self.layout, "mask": self.mask, "config": config}
        made: LayoutHandler = get_cp_handler_cls(self.backend)(**{**given, **pack.arguments, **arguments})
        return made


class Data:
    """Global tensors of a packing, on every rank alike; padding holds NaN, since nothing may come of it."""

    def __init__(self, setting: Setting, handler: LayoutHandler, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        heads = setting.heads
        self.drawn = [torch.randn(TOKENS, n, 16, generator=generator).to(BFLOAT) for n in (*heads, heads[1], heads[0])]
        self.grad_lse = torch.randn(TOKENS, heads[0], generator=generator)
        documents = handler.documents
        self.seen = visible_pairs(setting.mask, documents)
        q, k, v, grad = self.drawn
        options: dict[str, Any] = {"qkv_format": "thd", "softcap": setting.softcap, "sinks": sinks_of(setting)}
        self.expected = dense_gradients((q, k, v), self.seen, grad, self.grad_lse, **options)
        real = torch.from_numpy(documents.is_valid(torch.arange(TOKENS).numpy()))
        for x in (*self.drawn, self.grad_lse):
            x[~real] = float("nan")


def sinks_of(setting: Setting) -> Tensor | None:
    return torch.linspace(-1, 1, setting.heads[0]) if setting.sinks else None


class Step:
    """A step of a model, over tensors that stay in place."""

    def __init__(self, setting: Setting, batch: CapturedBatch) -> None:
        rows, (heads, groups) = batch.handler.num_local_tokens, setting.heads
        self.inputs = [torch.zeros(rows, n, 16, dtype=BFLOAT).requires_grad_() for n in (heads, groups, groups)]
        self.grads = torch.zeros(rows, heads, 16, dtype=BFLOAT), torch.zeros(rows, heads)
        self.batch, self.softcap, self.sinks = batch, setting.softcap, sinks_of(setting)
        self.table = torch.arange(float(batch.handler.get_rotary_seq_len())).unsqueeze(1)
        self.results: list[Tensor] = []

    def set(self, data: Data) -> None:
        """Copy this rank's rows of a packing into place."""
        tensors = zip((*self.inputs, *self.grads), (*data.drawn, data.grad_lse), strict=True)
        with torch.no_grad():
            for place, x in tensors:
                place.copy_(self.batch.handler.dispatch(x, 0, pad_value=float("nan")))

    def run(self) -> None:
        handler = self.batch.handler
        angles = handler.get_emb_on_this_cp_rank(self.table)
        leaves = [*self.inputs, *([] if self.sinks is None else [self.sinks.requires_grad_()])]
        out, lse, _ = handler.core_attn(None, *self.inputs, return_lse=True, softcap=self.softcap, sinks=self.sinks)
        grads = torch.autograd.grad((out, lse), leaves, self.grads)
        facts = handler.position_ids, handler.valid_mask, angles
        self.results = [x.detach() for x in (*facts, out, lse, *grads)]

    def compare(self, data: Data, handler: LayoutHandler) -> None:
        """All that this rank has against the definition."""
        out, lse, grads = data.expected
        names = ("out", "lse", "dq", "dk", "dv")
        if self.sinks is not None:
            assert_close(self.results[8], grads[3], dtype=BFLOAT, what="dsinks")
        for name, actual, whole in zip(names, self.results[3:8], (out, lse, *grads[:3]), strict=True):
            wanted = handler.dispatch(whole, 0, pad_value=float("-inf") if name == "lse" else 0)
            assert_close(actual, wanted, dtype=BFLOAT, what=name)
            nothing = actual[~handler.valid_mask]
            assert (nothing == (float("-inf") if name == "lse" else 0)).all(), f"{name} of rows that hold no token"
        ids, valid, angles = self.results[:3]
        assert torch.equal(ids, handler.position_ids)
        assert torch.equal(valid, handler.valid_mask)
        assert torch.equal(angles[:, 0], handler.position_ids.float())


def replayed(setting: Setting) -> list[str]:
    """Capture over the first packing, replay for each; the operators that were captured."""
    group = partition_group([range(setting.size)]) if setting.size > 1 else None
    if setting.size > 1 and group is None:
        return []
    with kernels_on_cpu(), room():
        first = setting.handler(setting.packs[0], group)
        padding = any(pack.padded for pack in setting.packs)
        batch = CapturedBatch(first, max_documents=TOKENS, padding=padding, device="cpu")
        step = Step(setting, batch)
        step.set(Data(setting, first, 7))
        step.run()
        with captured() as graph:
            step.run()
        for number, pack in enumerate(setting.packs):
            handler = setting.handler(pack, group)
            data = Data(setting, handler, number)
            batch.load(handler)
            step.set(data)
            graph.replay()
            step.compare(data, handler)
            assert batch.handler.documents is handler.documents
        return graph.names


WINDOW = SlidingWindow(3, 2)
ALONE = [
    Setting("local"),
    Setting("local", mask=Full(), heads=(3, 1)),
    Setting("local", mask=WINDOW),
    Setting("local", packs=PADDED[:2], sinks=True),
    Setting("local", packs=PADDED),
    Setting("local", packs=PADDED, mask=WINDOW),
    Setting("ulysses", packs=PADDED),
    Setting("all_gather"),
    *(Setting("local", kernel=f"flash_attn_{i}", packs=PADDED, softcap=3.0) for i in (2, 3, 4)),
]
SPREAD = [
    Setting("ulysses", 2),
    Setting("ulysses", 4, "zigzag", WINDOW, PADDED),
    Setting("ulysses", 4, "balanced", heads=(3, 1)),
    Setting("ulysses", 2, "replicated"),
    Setting("all_gather", 2),
    Setting("all_gather", 4),
    Setting("all_gather", 4, packs=PADDED, heads=(2, 2)),
    Setting("all_gather", 2, "contiguous", packs=PADDED),
    Setting("all_gather", 4, "contiguous"),
    Setting("all_gather", 2, mask=Full()),
    Setting("all_gather", 4, "contiguous", Full(), PADDED),
]


def words(setting: Setting) -> str:
    padded = "padded" if setting.packs is PADDED else ""
    parts = (setting.backend, setting.size, setting.layout or "", setting.mask, padded, setting.kernel)
    return " ".join(str(part) for part in parts if part)


@pytest.mark.parametrize("setting", ALONE, ids=words)
def test_one_rank(setting: Setting) -> None:
    names = replayed(setting)
    assert len([name for name in names if name.endswith("_flash_attention_forward")]) <= 1


@pytest.mark.parametrize("setting", SPREAD, ids=words)
def test_ranks(ranks: RankPool, setting: Setting) -> None:
    slots = 2 if setting.backend == "all_gather" and isinstance(setting.mask, Causal) else 1
    for names in ranks.run(replayed, setting):
        assert names.count("aten::_flash_attention_forward") in (0, slots) if names else True


@pytest.fixture
def doubles() -> Iterator[None]:
    with kernels_on_cpu(), room():
        yield


LOCAL = Setting("local")


def made(setting: Setting = LOCAL, number: int = 0, **limits: Any) -> CapturedBatch:
    handler = setting.handler(setting.packs[number])
    return CapturedBatch(handler, **{"max_documents": TOKENS, "device": "cpu", **limits})


def test_without_a_load_it_is_the_first_packing(doubles: None) -> None:
    """What a replay gives is wrong for the second packing, and right for the first, on the second one's numbers."""
    batch, handler = made(), LOCAL.handler(PACKS[3])
    step, data = Step(LOCAL, batch), Data(LOCAL, handler, 5)
    with captured() as graph:
        step.run()
    step.set(data)
    graph.replay()
    step.compare(Data(LOCAL, LOCAL.handler(PACKS[0]), 5), batch.handler)
    with pytest.raises(AssertionError, match="out: relative L2 error"):
        step.compare(data, batch.handler)


def test_masks_of_single_calls_have_tables_of_their_own(doubles: None) -> None:
    batch = made(masks=("full", WINDOW, SlidingWindow(3, 2)))
    assert batch.masks == (Causal(), Full(), WINDOW)
    q, k, v = (torch.randn(TOKENS, n, 16).to(BFLOAT) for n in (4, 2, 2))
    with captured() as graph:
        results = {mask: batch.handler.core_attn(None, q, k, v, mask=mask) for mask in batch.masks}
    handler = LOCAL.handler(PACKS[3])
    batch.load(handler)
    graph.replay()
    for mask, out in results.items():
        seen = visible_pairs(mask, handler.documents)
        assert_close(out, dense_gradients((q, k, v), seen, out, qkv_format="thd")[0], dtype=BFLOAT, what=str(mask))


def test_a_packing_is_one_copy_into_the_same_memory(doubles: None) -> None:
    with mock.patch.object(Buffer, "write", autospec=True, side_effect=Buffer.write) as written:
        batch = made(Setting("local", packs=PADDED), masks=(WINDOW,))
        assert written.call_count == 1
        before = [(view.data_ptr(), view.shape) for view in batch._buffer.views]
        batch.load(LOCAL.handler(PADDED[1]))
        assert written.call_count == 2
    assert [(view.data_ptr(), view.shape) for view in batch._buffer.views] == before
    assert batch.nbytes == batch._buffer.nbytes > 0


def test_a_copy_of_the_handler_shares_the_tables(doubles: None) -> None:
    batch = made()
    other = copy.deepcopy(batch.handler)
    handler = LOCAL.handler(PACKS[2])
    batch.load(handler)
    assert torch.equal(other.position_ids, handler.position_ids)
    assert other.attention.host is other
    assert type(other).__name__ == "CapturedLocalHandler"


def test_positions_that_were_named(doubles: None) -> None:
    def named(first: int) -> LayoutHandler:
        return LOCAL.handler(PACKS[0], position_ids=torch.arange(TOKENS).add(first).repeat(3, 1))

    batch = CapturedBatch(named(2), max_documents=9, device="cpu")
    assert batch.handler.get_rotary_seq_len() == TOKENS + 2
    with captured() as graph:
        ids = batch.handler.position_ids
    batch.load(named(1))
    graph.replay()
    assert torch.equal(ids, torch.arange(1, TOKENS + 1).repeat(3, 1))
    refused(batch, named(3), "room for: positions; got 26, at most 25")
    refused(batch, LOCAL.handler(PACKS[0]), "positions of another shape")


def refused(batch: CapturedBatch, handler: Any, told: str, error: type[Exception] = InvalidValueError) -> None:
    """A load raises, and leaves what was there."""
    before, documents = batch._buffer._bytes.clone(), batch.handler.documents
    with pytest.raises(error, match=told):
        batch.load(handler)
    assert torch.equal(batch._buffer._bytes, before)
    assert batch.handler.documents is documents


def test_what_a_load_refuses(doubles: None) -> None:
    batch, pack = made(max_documents=4, max_seqlen=20), PACKS[0]
    others: dict[str, LayoutHandler] = {
        "by its backend; got UlyssesHandler after LocalHandler": Setting("ulysses").handler(pack),
        "by its format; got bshd after thd": get_cp_handler_cls("local")(qkv_format="bshd", max_seqlen_q=TOKENS),
        "by its streams; got cross attention": LOCAL.handler(
            pack, cross_attention=True, cu_seqlens_kv=[0, 9, TOKENS], mask="full"
        ),
        "by its config": LOCAL.handler(pack, config=CPConfig(kernel="reference")),
        r"by its mask; got Full\(\) after Causal": LOCAL.handler(pack, mask="full"),
        "by its mask; got SlidingWindow": LOCAL.handler(pack, mask=WINDOW),
        "by its tokens; got 24 after 23": LOCAL.handler(Pack((10, 14))),
        "max_documents; got 6, at most 4": LOCAL.handler(PACKS[3]),
        "max_seqlen; got 23, at most 20": LOCAL.handler(PACKS[1]),
        "padding; got 7, at most 0": LOCAL.handler(PADDED[0]),
    }
    for told, handler in others.items():
        refused(batch, handler, told)
    refused(batch, batch.handler, "by its backend; got CapturedLocalHandler")
    refused(batch, "a handler", "handlers of the library's layouts", InvalidTypeError)
    elsewhere = LOCAL.handler(pack)
    elsewhere.device = torch.device("cuda", 1)
    refused(batch, elsewhere, "by its device; got cuda:1 after cpu")
    batch.load(LOCAL.handler(Pack((20, 3))))


@pytest.mark.parametrize("backend", ["ring", "p2p", "usp", "a2a+ring"])
def test_backends_whose_messages_follow_from_the_packing(doubles: None, backend: str) -> None:
    names = ("local", backend) if "+" in backend else (backend,)
    handler = get_cp_handler_cls(*names)(qkv_format="thd", cu_seqlens_q=[0, 9, TOKENS])
    with pytest.raises(UnsupportedError, match=r"no CUDA graph of it serves another packing.*use the ulysses or all"):
        CapturedBatch(handler, max_documents=4, device="cpu")


def test_what_no_batch_is_made_of(doubles: None) -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("launches under this mask follow from the documents; got Chunked", {"mask": Chunked(4)}),
        (
            "is of one packed stream; got thd, cross attention",
            {"cross_attention": True, "cu_seqlens_kv": [0, 9, TOKENS], "mask": "full"},
        ),
        ("a check before each call", {"config": CPConfig(check_consistency="each_call")}),
        ("without tokens", {"cu_seqlens_q": [0, 0]}),
    ]
    for told, arguments in cases:
        with pytest.raises((UnsupportedError, InvalidValueError), match=told):
            CapturedBatch(LOCAL.handler(PACKS[0], **arguments), max_documents=4, device="cpu")
    dense = get_cp_handler_cls("local")(qkv_format="bshd", max_seqlen_q=9)
    with pytest.raises(UnsupportedError, match="dense batch without padding as it is"):
        CapturedBatch(dense, max_documents=4, device="cpu")
    for limits, told in (({"max_documents": 1}, "got 2, at most 1"), ({"max_seqlen": 13}, "got 14, at most 13")):
        with pytest.raises(InvalidValueError, match=told):
            made(**limits)
    with pytest.raises(InvalidValueError, match="padding; got 7, at most 0"):
        made(Setting("local", packs=PADDED), padding=False)


def test_what_calls_are_refused(doubles: None) -> None:
    batch = made()
    q, k, v = (torch.randn(TOKENS, n, 16).to(BFLOAT) for n in (4, 2, 2))
    cases: list[tuple[str, Any, dict[str, Any]]] = [
        ("the mask Chunked", None, {"mask": Chunked(4)}),
        ("the mask Full", None, {"mask": "full"}),
        ("the largest score", None, {"return_max_logit": True}),
        ("the largest score", CoreAttention(record_max_logit=True), {}),
        ("a callable attn_mod", lambda q, k, v, **told: q, {}),
    ]
    for told, module, options in cases:
        with pytest.raises(UnsupportedError, match=f"does not serve this call; got {told}"):
            batch.handler.core_attn(module, q, k, v, **options)
    with pytest.raises(InvalidValueError, match="positions on another device"):
        batch.handler.get_emb_on_this_cp_rank(torch.empty(TOKENS, 8, device="meta"))
    dense = CapturedBatch(LOCAL.handler(PACKS[0], config=CPConfig()), max_documents=4, device="cpu")
    with pytest.raises(UnsupportedError, match="kernel 'torch' has no launches that serve other packings"):
        dense.handler.core_attn(None, q, k, v)


def test_a_gradient_that_would_go_task_by_task(doubles: None) -> None:
    """A gradient of the log-sum-exp has no room beside a head dim of 256, and is computed without launches then."""
    q = torch.randn(TOKENS, 1, 256).to(BFLOAT).requires_grad_()
    _, lse, _ = made().handler.core_attn(None, q, q, q, return_lse=True)
    with pytest.raises(UnsupportedError, match="tasks of a captured batch have no places but those in its tables"):
        lse.sum().backward()


def outside_alone() -> None:
    """Methods that move rows are refused inside of a capture, by whichever handler, and serve outside of it."""
    group = partition_group([range(2), range(2, 4)])
    setting = Setting("ulysses", 2, "zigzag")
    with kernels_on_cpu(), room():
        plain = setting.handler(PACKS[0], group)
        plain.agree()
        batch = CapturedBatch(plain, max_documents=9, device="cpu")
        x, table = torch.randn(batch.handler.num_local_tokens, 3), torch.randn(TOKENS, 3)
        for handler in (plain, batch.handler):
            moves = {
                "dispatch": lambda handler=handler: handler.dispatch(table, 0),
                "combine": lambda handler=handler: handler.combine(x, 0),
                "roll_tensor": lambda handler=handler: handler.roll_tensor(x, dims=0),
            }
            for name, move in moves.items():
                move()
                with captured(), pytest.raises(UnsupportedError, match=f"{name} in a CUDA graph would replay this b"):
                    move()
        for facts in (lambda: plain.position_ids, lambda: plain.get_emb_on_this_cp_rank(table, freqs_mode="packed")):
            with captured(), pytest.raises(UnsupportedError, match="ask the handler of a CapturedBatch"):
                facts()
        with captured():
            packed = batch.handler.get_emb_on_this_cp_rank(table, freqs_mode="packed")
        assert torch.equal(packed, plain.get_emb_on_this_cp_rank(table, freqs_mode="packed"))


def test_what_is_for_outside_of_a_capture(ranks: RankPool) -> None:
    ranks.run(outside_alone)


def drawn(chosen: random.Random, tokens: int, most: int) -> Pack:
    """Documents of any length, empty ones among them."""
    cuts = sorted(chosen.choices(range(tokens + 1), k=chosen.randrange(most)))
    walls = [0, *cuts, tokens]
    return Pack(tuple(b - a for a, b in pairwise(walls)))


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("mask", [Causal(), Full()], ids=str)
def test_gathered_tables_have_room_for_every_packing(layout: str, mask: Mask) -> None:
    """As many documents as there may be and no more, of any length, on every rank."""
    chosen = random.Random(f"{layout} {mask}")
    for size in (2, 3, 4, 8):
        tokens, most = chosen.randint(1, 90), chosen.randint(1, 12)
        for rank in {0, size // 2, size - 1}:
            given: dict[str, Any] = {"group": Place(size, rank), "config": CPConfig()}
            setting = Setting("all_gather", size, layout, mask)
            one = setting.handler(Pack((tokens,)), **given)
            batch = CapturedBatch(one, max_documents=most, device="cpu")
            for _ in range(6):
                batch.load(setting.handler(drawn(chosen, tokens, most), **given))


def disagreeing() -> None:
    """Ranks that load different packings, and ranks of which one refuses, are told on all; nothing is written."""
    group, setting = partition_group([range(4)]), Setting("all_gather", 4)
    first = torch.distributed.get_rank() == 0
    with kernels_on_cpu(), room():
        batch = CapturedBatch(setting.handler(PACKS[0], group), max_documents=3, device="cpu")
        other = setting.handler(PACKS[1] if first else PACKS[0], group)
        refused(batch, other, "do not hold the same batch", RankMismatchError)
        other = setting.handler(PACKS[3] if first else PACKS[0], group)
        told = "room for: max_documents" if first else "rank 0: InvalidValueError.*max_documents"
        refused(batch, other, told, InvalidValueError if first else RankMismatchError)
        batch.load(setting.handler(Pack((1, 22)), group))


def test_ranks_agree_on_what_they_load(ranks: RankPool) -> None:
    ranks.run(disagreeing)


def layouts_without_tables() -> None:
    group = partition_group([range(4)])
    for layout, mask in (("balanced", Causal()), ("zigzag", WINDOW)):
        handler = Setting("all_gather", 4, layout, mask).handler(PACKS[0], group, config=CPConfig())
        with pytest.raises(UnsupportedError, match=r"cut into tasks that follow from the packing.*use the ulysses"):
            CapturedBatch(handler, max_documents=3, device="cpu")


def test_gathered_layouts_without_tables(ranks: RankPool) -> None:
    ranks.run(layouts_without_tables)
