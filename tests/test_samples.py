"""Samples that a producer cuts and ranks read: each row against its definition, and everything that may go wrong."""

from __future__ import annotations

import json
import pickle
import re
import sys
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cphandler import (
    BatchPlan,
    InvalidTypeError,
    InvalidValueError,
    MissingPackageError,
    RankMismatchError,
    SafetensorsStore,
    ShardedSample,
    get_cp_handler_cls,
    merge,
    plan_batch,
    read_manifest,
    read_sample,
    write_sample,
)
from cphandler.data.manifest import SampleManifest
from cphandler.testing import RankPool, assert_close, partition_group

LAYOUTS = ("zigzag", "contiguous", "striped", "balanced", "replicated")
VALID, PADDED = [0, 5, 6, 6, 17, 19, 19], [0, 8, 9, 9, 20, 22, 23]
"""Documents with padding between them, one of length 1, one empty, and a tail of padding alone."""


class Seat:
    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def planned(size: int = 3, layout: str = "zigzag", **options: Any) -> BatchPlan:
    return plan_batch(VALID, size, layout=layout, cu_seqlens_padded=PADDED, **options)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().reshape(*x.shape or (1,)).view(torch.uint8)


def sample() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(1, 23, 3, generator=generator, dtype=torch.float64)
    hidden[0, 2, 1], hidden[0, 3, 0] = float("nan"), -0.0
    return {
        "ids": torch.randint(1, 99, (23,), generator=generator),
        "hidden": hidden,
        "bf16": hidden[0].to(torch.bfloat16),
        "f8": hidden[0].to(torch.float8_e4m3fn),
        "flags": torch.rand(23, generator=generator) < 0.5,
        "u16": torch.arange(23).to(torch.uint16),
        "narrow": torch.empty(23, 0),
    }


DIMS = {"hidden": 1}


def stores(folder: Path) -> Iterator[Any]:
    yield {}
    yield SafetensorsStore(folder)


def token_after(token: int, distance: int) -> int:
    """The definition: the real token so many after a real one, in its document; -1 where there is none."""
    for i, start in enumerate(PADDED[:-1]):
        stop = start + VALID[i + 1] - VALID[i]
        if start <= token < stop:
            return token + distance if token + distance < stop else -1
    return -1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_row_is_what_it_should_be(layout: str, size: int, tmp_path: Path) -> None:
    whole, plan = sample(), planned(size, layout)
    for store in stores(tmp_path):
        write_sample(store, "one", whole, plan, halo=3, seq_dims=DIMS)
        for rank in range(size):
            cls = get_cp_handler_cls("ulysses" if layout == "replicated" else "ring")
            padded = {"cu_seqlens_q": VALID, "cu_seqlens_q_padded": PADDED}
            handler = cls(cp_group=Seat(rank, size), qkv_format="thd", layout=plan, **padded)
            own = read_sample(store, "one", plan, rank=rank)
            tokens = handler.dispatch(torch.arange(23), 0, pad_value=-1).tolist()
            assert set(own) == set(whole)
            for name, x in whole.items():
                dim = DIMS.get(name, 0)
                assert torch.equal(bits(own[name]), bits(handler.dispatch(x, dim)))
                for distance in range(4):
                    ahead = own.ahead(name, distance, fill_value=1)
                    assert ahead.dtype == x.dtype
                    for row, token in enumerate(tokens):
                        wanted = token_after(token, distance)
                        filled = torch.ones_like(x.select(dim, 0)) if x.numel() else x.select(dim, 0)
                        right = filled if wanted < 0 else x.select(dim, wanted)
                        assert torch.equal(bits(ahead.select(dim, row)), bits(right))
            assert torch.equal(own.position_ids, handler.position_ids)
            assert torch.equal(own.valid_mask, handler.valid_mask)
            for distance in range(4):
                assert own.exists(distance).tolist() == [token_after(token, distance) >= 0 for token in tokens]


def test_no_row_is_kept_twice() -> None:
    """A rank's halo is what it does not hold anyway."""
    for layout in LAYOUTS:
        for rank in range(3):
            store: dict[str, Tensor] = {}
            write_sample(store, "one", {"ids": torch.arange(1, 24)}, planned(3, layout), halo=4)
            kept = store[f"one/{rank}/ids"]
            real = kept[kept > 0]
            assert len(real.unique()) == len(real)
            if layout == "replicated":
                assert len(kept) == 23


def test_positions_do_not_come_from_what_a_batch_was_padded_to() -> None:
    """250 tokens in a bucket of 256, cut in two: the second rank begins at 128, and ends at 249."""
    store: dict[str, Tensor] = {}
    plan = plan_batch([0, 250], 2, layout="contiguous", cu_seqlens_padded=[0, 256])
    write_sample(store, "one", {"ids": torch.arange(256)}, plan, halo=1)
    second = read_sample(store, "one", plan, rank=1)
    assert second.position_ids.tolist() == list(range(128, 256))
    assert second.exists(1).sum() == 121
    assert read_sample(store, "one", plan, rank=0).ahead("ids", 1)[-1] == 128, "from the other rank's rows"


def test_the_reader_needs_nothing_but_the_manifest(tmp_path: Path) -> None:
    for store in stores(tmp_path):
        wrote = write_sample(store, "one", sample(), planned(), halo=1, seq_dims=DIMS)
        manifest = read_manifest(store, "one")
        assert manifest == wrote
        plan = plan_batch(manifest.cu_seqlens, manifest.cp_size, cu_seqlens_padded=manifest.cu_seqlens_padded)
        assert read_sample(store, "one", plan, rank=2, halo=1)["ids"].shape == (8,)
        assert manifest.fields["hidden"].shape == (1, 23, 3)
        assert manifest.fields["bf16"].dtype == "bfloat16"


def test_one_verdict_from_the_whole_mask() -> None:
    """A rank without loss tokens keeps the sample where another has some; all skip it where none has."""
    store: dict[str, Tensor] = {}
    plan = plan_batch([0, 8], 2, layout="contiguous")
    mask = torch.tensor([0, 0, 0, 0, 1, 1, 0, 1])
    ids = {"ids": torch.arange(8)}
    write_sample(store, "some", ids, plan, loss_mask=mask, halo=2)
    write_sample(store, "none", ids, plan, loss_mask=torch.zeros(8, dtype=torch.bool))
    write_sample(store, "all", ids, plan)
    assert [read_manifest(store, key).num_loss_tokens for key in ("some", "none", "all")] == [3, 0, 8]
    assert torch.equal(read_manifest(store, "some").loss_mask, mask.bool())
    first, second = (read_sample(store, "some", plan, rank=rank) for rank in range(2))
    assert not first.in_loss().any()
    assert second.in_loss().tolist() == [True, True, False, True]
    assert first.in_loss(2).tolist() == [False, False, True, True], "what multi-token prediction counts two ahead"
    padded: dict[str, Tensor] = {}
    assert write_sample(padded, "one", {}, planned()).num_loss_tokens == 19, "padding is not counted"


def refused(told: str, store: Any, plan: BatchPlan, **options: Any) -> None:
    for rank in range(plan.cp_size):
        with pytest.raises(InvalidValueError, match=re.escape(told)):
            read_sample(store, "one", plan, rank=rank, **options)


def test_another_plan_is_refused_by_name() -> None:
    store: dict[str, Tensor] = {}
    write_sample(store, "one", sample(), planned(2), halo=1, seq_dims=DIMS)
    by = "the sample was cut by another plan, by its "
    refused(by + "number of ranks; got number of ranks: 2 and 3, in the store and asked for", store, planned(3))
    refused(by + "layout; got layout: 'zigzag' and 'striped'", store, planned(2, "striped"))
    refused(by + "halo; got halo: 1 and 2 tokens", store, planned(2), halo=2)
    other = plan_batch([0, 5, 6, 6, 16, 19, 19], 2, cu_seqlens_padded=[0, 8, 9, 9, 19, 22, 23])
    refused(by + "documents; got documents: document 3 of 11 and of 10 tokens", store, other)
    refused(by + "documents; got documents: 6 and 1", store, plan_batch([0, 23], 2))
    other = plan_batch([0, 5, 6, 6, 16, 18, 18], 2, cu_seqlens_padded=PADDED)
    refused(by + "padding; got padding: 19 and 18 real tokens, or others", store, other)
    several = planned(3, "contiguous")
    refused(by + "number of ranks and layout; got number of ranks: 2 and 3; layout: 'zigzag' and", store, several)
    read_sample(store, "one", planned(2), rank=0, halo=0)


def test_a_balanced_layout_of_another_mask_is_another_plan() -> None:
    store: dict[str, Tensor] = {}
    lengths = [0, 40, 47, 60]
    write_sample(store, "one", {}, plan_batch(lengths, 2, layout="balanced", mask="causal"))
    read_sample(store, "one", plan_batch(lengths, 2, layout="balanced", mask="causal"), rank=1)
    told = "got layout: 'balanced', cut for another mask, tile or kernel cost"
    refused(told, store, plan_batch(lengths, 2, layout="balanced", mask="full"))


def test_what_is_not_there(tmp_path: Path) -> None:
    for store in stores(tmp_path):
        with pytest.raises(InvalidValueError, match="there is no such sample, or it is not whole yet; got 'one'"):
            read_sample(store, "one", planned(), rank=0)


class Dies(dict[str, Tensor]):
    """A store whose writer dies after so many writes."""

    def __init__(self, writes: int) -> None:
        super().__init__()
        self.left = writes

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        if not self.left:
            raise ConnectionError("gone")
        self.left -= 1
        super().__setitem__(name, tensor)


def test_a_writer_that_dies_leaves_no_sample() -> None:
    writes = 3 * len(sample()) + 1
    for left in range(writes):
        store = Dies(left)
        with pytest.raises(ConnectionError):
            write_sample(store, "one", sample(), planned(), seq_dims=DIMS)
        refused("it is not whole yet", store, planned())
    store = Dies(writes + 2)
    write_sample(store, "one", sample(), planned(), seq_dims=DIMS)
    with pytest.raises(ConnectionError):
        write_sample(store, "one", sample(), planned(), seq_dims=DIMS, overwrite=True)
    refused("it is not whole yet", store, planned())


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    store = SafetensorsStore(tmp_path)
    with mock.patch("os.replace", side_effect=OSError("no room")), pytest.raises(OSError, match="no room"):
        write_sample(store, "one", sample(), planned(), seq_dims=DIMS)
    with mock.patch("os.fsync", side_effect=OSError("no disk")), pytest.raises(OSError, match="no disk"):
        write_sample(store, "one", sample(), planned(), seq_dims=DIMS)
    assert not list(tmp_path.rglob("*.*")), "what was begun is taken away"


def test_a_missing_shard_is_told_to_all_ranks(tmp_path: Path) -> None:
    for store in stores(tmp_path):
        write_sample(store, "one", sample(), planned(), seq_dims=DIMS)
        if isinstance(store, dict):
            del store["one/1/bf16"]
        else:
            (tmp_path / "one" / "rank-1.safetensors").unlink()
        refused("shards of sample 'one' are missing; got none for rank 1; write the sample again", store, planned())


def test_a_sample_is_not_written_over_by_chance(tmp_path: Path) -> None:
    for store in stores(tmp_path):
        write_sample(store, "one", {"ids": torch.arange(23)}, planned())
        with pytest.raises(InvalidValueError, match="is there already; got 'one'"):
            write_sample(store, "one", {"ids": torch.zeros(23)}, planned())
        write_sample(store, "one", {"ids": torch.full((23,), 7)}, planned(2), overwrite=True)
        assert (read_sample(store, "one", planned(2), rank=1)["ids"] == 7)[:11].all()


HARM: dict[str, Callable[[dict[str, Tensor]], None]] = {
    "one bit": lambda store: bits(store["one/1/ids"]).__ixor__(4),
    "rows swapped": lambda store: store.update({"one/1/ids": store["one/1/ids"].flip(0)}),
    "another rank's": lambda store: store.update({"one/1/ids": store["one/2/ids"]}),
    "another dtype": lambda store: store.update({"one/1/ids": store["one/1/ids"].int()}),
    "another shape": lambda store: store.update({"one/1/ids": store["one/1/ids"][None]}),
    "half of it": lambda store: store.update({"one/1/ids": store["one/1/ids"][:4]}),
    "of another writing": lambda store: store.update(written({"ids": torch.arange(1, 24)})),
}


def written(whole: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    store: dict[str, Tensor] = {}
    write_sample(store, "one", whole, planned(), halo=1, **options)
    return {name: x for name, x in store.items() if not name.endswith("manifest")}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_shard_is_not_used(harm: str) -> None:
    store: dict[str, Tensor] = {}
    write_sample(store, "one", {"ids": torch.arange(23)}, planned(), halo=1)
    read_sample(store, "one", planned(), rank=1)
    HARM[harm](store)
    with pytest.raises(InvalidValueError, match="the shard of rank 1 of sample 'one' is damaged, or of another"):
        read_sample(store, "one", planned(), rank=1)


def test_damaged_files_are_not_used(tmp_path: Path) -> None:
    store = SafetensorsStore(tmp_path)
    write_sample(store, "one", sample(), planned(), seq_dims=DIMS)
    path = tmp_path / "one" / "rank-1.safetensors"
    whole = path.read_bytes()
    for cut in (0, 4, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(InvalidValueError, match="the shard of rank 1 of sample 'one' is damaged"):
            read_sample(store, "one", planned(), rank=1)
    for at in (len(whole) - 1, len(whole) - 40):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(InvalidValueError, match="is damaged"):
            read_sample(store, "one", planned(), rank=1)
    path.write_bytes((tmp_path / "one" / "rank-0.safetensors").read_bytes())
    with pytest.raises(InvalidValueError, match="is damaged"):
        read_sample(store, "one", planned(), rank=1)


def test_files_with_other_tensors_are_not_used(tmp_path: Path) -> None:
    store = SafetensorsStore(tmp_path)
    write_sample(store, "one", {"ids": torch.arange(23)}, planned())
    path, ids = tmp_path / "one" / "rank-1.safetensors", read_sample(store, "one", planned(), rank=1)["ids"]
    for tensors in ({"ids": ids, "more": ids.clone()}, {"more": ids}):
        save_file(tensors, path)
        with pytest.raises(InvalidValueError, match="the shard of rank 1 of sample 'one' is damaged"):
            read_sample(store, "one", planned(), rank=1)
    save_file({"ids": ids}, path)
    read_sample(store, "one", planned(), rank=1)


def test_a_damaged_manifest_is_not_used(tmp_path: Path) -> None:
    store = SafetensorsStore(tmp_path)
    write_sample(store, "one", {"ids": torch.arange(23)}, planned(), halo=1)
    path = tmp_path / "one" / "manifest.json"
    text = path.read_text()
    for cut in range(0, len(text), 7):
        path.write_text(text[:cut])
        refused("the manifest of sample 'one' is damaged", store, planned())
    for find, put in (('"halo": 1', '"halo": 0'), ('"cp_size": 3', '"cp_size": 2'), ('"int64"', '"int32"')):
        assert find in text
        path.write_text(text.replace(find, put))
        refused("the manifest of sample 'one' is damaged", store, planned())
    path.write_text(json.dumps({"digest": "0" * 32, "manifest": json.loads(text)["manifest"]}))
    refused("got text that its digest does not fit", store, planned())
    path.write_text(text.replace("cphandler.sample.1", "cphandler.sample.2"))
    refused("is damaged; got Input should be 'cphandler.sample.1'", store, planned())


class Harmful:
    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return setattr, (Harmful, "ran", True)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    store = SafetensorsStore(tmp_path)
    write_sample(store, "one", {"ids": torch.arange(23)}, planned())
    path = tmp_path / "one" / "rank-0.safetensors"
    path.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(InvalidValueError, match="is damaged"):
        read_sample(store, "one", planned(), rank=0)
    torch.save({"ids": Harmful()}, path)
    with pytest.raises(InvalidValueError, match="is damaged"):
        read_sample(store, "one", planned(), rank=0)
    assert not Harmful.ran
    kept: dict[str, Any] = {}
    write_sample(kept, "one", {"ids": torch.arange(23)}, planned())
    kept["one/0/ids"] = pickle.dumps(Harmful())
    with pytest.raises(InvalidTypeError, match="'one/0/ids' is none; got bytes"):
        read_sample(kept, "one", planned(), rank=0)


def test_what_is_handed_out_is_the_callers() -> None:
    store: dict[str, Tensor] = {}
    ids = torch.arange(23)
    write_sample(store, "one", {"ids": ids}, planned(), halo=1)
    ids.zero_()
    own = read_sample(store, "one", planned(), rank=0)
    before = own["ids"].clone(), own.ahead("ids", 1).clone()
    for x in (own["ids"], own.ahead("ids", 1), own.position_ids, own.valid_mask, own.in_loss(), own.exists(1)):
        x.zero_()
    assert torch.equal(own["ids"], before[0])
    assert torch.equal(own.ahead("ids", 1), before[1])
    assert own.valid_mask.any()
    assert torch.equal(read_sample(store, "one", planned(), rank=0)["ids"], before[0])


@pytest.mark.parametrize("key", ["", "../one", "a/b", ".hidden", "-x", "a\n", "x" * 201])
def test_a_key_is_a_plain_name(key: str, tmp_path: Path) -> None:
    for store in stores(tmp_path):
        with pytest.raises(InvalidValueError, match="a sample's key must be a plain name"):
            write_sample(store, key, {}, planned())
        with pytest.raises(InvalidValueError, match="a sample's key must be a plain name"):
            read_manifest(store, key)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"sample": {"ids": torch.arange(19)}}, InvalidValueError, "must have the plan's 23 tokens in dim 0"),
        ({"sample": {"ids": [1, 2]}}, InvalidTypeError, "sample['ids'] must be a tensor; got list"),
        ({"seq_dims": {"x": 1}}, InvalidValueError, "seq_dims names what the sample does not have; got x"),
        ({"plan": planned().layout}, InvalidTypeError, "plan must be a BatchPlan; got Layout"),
        ({"loss_mask": torch.ones(23)}, InvalidValueError, "loss_mask counts padding; got token 5"),
        ({"loss_mask": torch.full((23,), 0.5)}, InvalidValueError, "loss_mask must hold 0 and 1 alone; got 0.5"),
        ({"loss_mask": torch.ones(22)}, InvalidValueError, "loss_mask must be [23]; got shape [22]"),
        ({"halo": -1}, InvalidValueError, "halo must be at least 0"),
        ({"store": [1]}, InvalidTypeError, "store must be a SafetensorsStore or a mapping of tensors; got list"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], told: str) -> None:
    given = {"store": {}, "key": "one", "sample": {"ids": torch.arange(23)}, "plan": planned(), **options}
    with pytest.raises(error, match=re.escape(told)):
        write_sample(**given)
    assert not given["store"] or options.get("store"), "nothing was written"


def test_readers_are_refused() -> None:
    store: dict[str, Tensor] = {}
    write_sample(store, "one", {"ids": torch.arange(23)}, planned(), halo=1)
    with pytest.raises(InvalidTypeError, match="a BatchPlan is every rank's; got no rank"):
        read_sample(store, "one", planned())
    with pytest.raises(InvalidValueError, match="there is no such rank; got 3; ranks are 0 to 2"):
        read_sample(store, "one", planned(), rank=3)
    own = read_sample(store, "one", planned(), rank=0)
    with pytest.raises(InvalidValueError, match="halo does not reach so far; got 2 tokens ahead, and a halo of 1"):
        own.ahead("ids", 2)
    with pytest.raises(InvalidValueError, match="the sample has no such tensor; got 'x'; it has 'ids'"):
        own.ahead("x", 1)
    with pytest.raises(KeyError):
        own["x"]


def test_without_the_package(tmp_path: Path) -> None:
    with mock.patch.dict(sys.modules, {"safetensors": None}):
        told = re.escape('install it: pip install "cphandler[shards]"')
        with pytest.raises(MissingPackageError, match=told):
            SafetensorsStore(tmp_path)


def test_a_manifest_is_checked_as_it_is_made() -> None:
    manifest = write_sample({}, "one", {"ids": torch.arange(23)}, planned())
    for change, told in (
        ({"shards": manifest.shards[:2]}, "a shard for each rank"),
        ({"loss_runs": ((3, 2),)}, "ascending"),
        ({"loss_runs": ((3, 24),)}, "inside"),
        ({"cu_seqlens": (0, 3)}, "cu_seqlens"),
    ):
        with pytest.raises(ValueError, match=told):
            SampleManifest(**{**manifest.model_dump(), **change})


def read_by_a_handler(folder: str, parts: list[tuple[int, ...]]) -> tuple[str, list[int]]:
    group = partition_group(parts)
    assert group is not None
    store = SafetensorsStore(folder)
    manifest = read_manifest(store, "one")
    handler = get_cp_handler_cls("ring")(
        cp_group=group,
        qkv_format="thd",
        cu_seqlens_q=list(manifest.cu_seqlens),
        cu_seqlens_q_padded=list(manifest.cu_seqlens_padded or ()),
    )
    try:
        own = read_sample(store, "one", handler, halo=1)
        whole = handler.combine(own["ids"], 0)
        rolled, _ = handler.roll_tensor(own["ids"] * own.valid_mask, -1, 0)
        assert rolled is not None
        assert torch.equal(rolled * own.exists(1), own.ahead("ids", 1)), "what an exchange would have brought"
    except (InvalidValueError, RankMismatchError) as error:
        return f"{type(error).__name__}: {error}", []
    return "", whole.tolist()


def test_ranks_read_their_own_and_hear_of_the_others(ranks: RankPool, tmp_path: Path) -> None:
    store = SafetensorsStore(tmp_path)
    write_sample(store, "one", {"ids": torch.arange(100, 123)}, planned(2), halo=1)
    parts = [(0, 2), (1, 3)]
    assert ranks.run(read_by_a_handler, str(tmp_path), parts) == [("", list(range(100, 123)))] * 4
    path = tmp_path / "one" / "rank-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    answers = [told for told, _ in ranks.run(read_by_a_handler, str(tmp_path), parts)]
    for rank, told in enumerate(answers):
        if rank in (2, 3):
            assert told.startswith("InvalidValueError: the shard of rank 1 of sample 'one' is damaged")
        else:
            assert told.startswith("RankMismatchError")
            assert "the shard of rank 1" in told


# Test-time training as EAGLE-3 does it: at step j each token is fed the one j after it. It attends to keys of step 0
# up to itself, and to its own key of each later step, which is one key per query and needs no other rank.

STEPS, HEADS, DIM, WIDTH = 3, 2, 8, 6


def ttt_sample() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {
        "ids": torch.randint(0, 20, (23,), generator=generator),
        "hidden": torch.randn(23, WIDTH, generator=generator, dtype=torch.float64),
        "grad": torch.randn(23, STEPS, HEADS, DIM, generator=generator, dtype=torch.float64),
    }


def ttt_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(12)
    shapes = {"embedding": (20, WIDTH)} | dict.fromkeys("qkv", (WIDTH, HEADS * DIM))
    return {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in shapes.items()
    }


def projected(weights: dict[str, Tensor], ids: Tensor, hidden: Tensor, exists: Tensor) -> list[Tensor]:
    x = (weights["embedding"][ids] + hidden) * exists[:, None]
    return [(x @ weights[name]).view(-1, HEADS, DIM) for name in "qkv"]


def ttt_dense() -> tuple[float, list[Tensor]]:
    """One softmax over all keys of a query, token by token; loss and gradients of the weights."""
    whole, weights = ttt_sample(), ttt_weights()
    after = torch.tensor([[token_after(t, j) for t in range(23)] for j in range(STEPS)])
    steps = [
        projected(weights, whole["ids"][after[j].clamp(min=0)], whole["hidden"], after[j] >= 0) for j in range(STEPS)
    ]
    loss = torch.zeros((), dtype=torch.float64)
    for j in range(STEPS):
        for t in range(23):
            if after[j][t] < 0:
                continue
            start = max(start for start in PADDED if start <= t)
            keys = [steps[0][1][s] for s in range(start, t + 1)] + [steps[i][1][t] for i in range(1, j + 1)]
            values = [steps[0][2][s] for s in range(start, t + 1)] + [steps[i][2][t] for i in range(1, j + 1)]
            scores = torch.einsum("hd,khd->hk", steps[j][0][t], torch.stack(keys)) * DIM**-0.5
            out = torch.einsum("hk,khd->hd", scores.softmax(-1), torch.stack(values))
            loss = loss + (out * whole["grad"][t, j]).sum()
    return float(loss.detach()), list(torch.autograd.grad(loss, list(weights.values())))


def ttt_on_rank(
    folder: str, backend: str, layout: str, parts: list[tuple[int, ...]], reach: int = STEPS
) -> tuple[float, list[Tensor]]:
    group = partition_group(parts)
    assert group is not None
    handler = get_cp_handler_cls(backend)(
        cp_group=group, qkv_format="thd", cu_seqlens_q=VALID, cu_seqlens_q_padded=PADDED, layout=layout
    )
    own, weights = read_sample(SafetensorsStore(folder), layout, handler, halo=STEPS - 1), ttt_weights()
    steps = [projected(weights, own.ahead("ids", j), own["hidden"], own.exists(j)) for j in range(STEPS)]
    loss = torch.zeros((), dtype=torch.float64)
    for j in range(STEPS):
        query, (_, key, value) = steps[j][0], steps[0]
        result = handler.core_attn(None, query, key, value, return_lse=True)
        out, lse = result.out, result.lse
        for i in range(1, min(j + 1, reach)):
            score = (query * steps[i][1]).sum(-1) * DIM**-0.5
            out, lse = merge(out, lse, steps[i][2], score.masked_fill(~own.exists(i)[:, None], -torch.inf))
        loss = loss + (out * own["grad"][:, j] * own.exists(j)[:, None, None]).sum()
    return float(loss.detach()), list(torch.autograd.grad(loss, list(weights.values())))


@pytest.mark.parametrize(
    ("backend", "layout", "parts"),
    [
        ("ring", "zigzag", [(0, 1, 2, 3)]),
        ("p2p", "balanced", [(0, 2), (1, 3)]),
        ("ulysses", "contiguous", [(0, 1), (2, 3)]),
        ("usp", "contiguous", [(0, 1, 2, 3)]),
    ],
)
def test_test_time_training(
    ranks: RankPool, tmp_path: Path, backend: str, layout: str, parts: list[tuple[int, ...]]
) -> None:
    plan = planned(len(parts[0]), layout)
    write_sample(SafetensorsStore(tmp_path), layout, ttt_sample(), plan, halo=STEPS - 1)
    loss, gradients = ttt_dense()
    answers = ranks.run(ttt_on_rank, str(tmp_path), backend, layout, parts)
    for part in parts:
        assert sum(answers[rank][0] for rank in part) == pytest.approx(loss, rel=1e-10)
        for i, wanted in enumerate(gradients):
            summed = torch.stack([answers[rank][1][i] for rank in part]).sum(0)
            assert_close(summed, wanted, what=list(ttt_weights())[i])


def test_test_time_training_would_see_a_branch_left_out(ranks: RankPool, tmp_path: Path) -> None:
    write_sample(SafetensorsStore(tmp_path), "zigzag", ttt_sample(), planned(4), halo=STEPS - 1)
    loss, _ = ttt_dense()
    answers = ranks.run(ttt_on_rank, str(tmp_path), "ring", "zigzag", [(0, 1, 2, 3)], STEPS - 1)
    assert sum(answer[0] for answer in answers) != pytest.approx(loss, rel=1e-3)


class Rows(Dataset[ShardedSample]):
    """What one rank's loader reads."""

    def __init__(self, store: MutableMapping[str, Tensor]) -> None:
        self.store = store

    def __getitem__(self, index: int) -> ShardedSample:
        return read_sample(self.store, f"sample-{index}", planned(), rank=1, halo=2)

    def __len__(self) -> int:
        return 2


def test_workers_read_samples() -> None:
    store: dict[str, Tensor] = {}
    for index in range(2):
        write_sample(store, f"sample-{index}", {"ids": torch.arange(23) + 100 * index}, planned(), halo=2)
    loader = DataLoader(Rows(store), batch_size=None, num_workers=1, multiprocessing_context="fork")
    for index, own in enumerate(loader):
        here = Rows(store)[index]
        for one, other in ((own, here), (own.to("cpu"), here)):
            assert torch.equal(one["ids"], other["ids"])
            assert torch.equal(one.ahead("ids", 2), other.ahead("ids", 2))
            assert torch.equal(one.exists(1), other.exists(1))
            assert torch.equal(one.position_ids, other.position_ids)
            assert one.manifest == other.manifest
            assert one.rank == 1


def test_it_moves_as_a_whole() -> None:
    store: dict[str, Tensor] = {}
    write_sample(store, "one", {"ids": torch.arange(23)}, planned(), halo=2)
    moved = read_sample(store, "one", planned(), rank=1).to("meta")
    answers = (
        moved["ids"],
        moved.ahead("ids", 1),
        moved.exists(),
        moved.in_loss(1),
        moved.valid_mask,
        moved.position_ids,
    )
    assert {x.device.type for x in answers} == {"meta"}
    assert {len(x) for x in answers} == {8}
    assert isinstance(moved.to("meta"), ShardedSample)


@pytest.mark.parametrize("form", ["bshd", "sbhd"])
def test_a_dense_batch(form: str) -> None:
    whole = torch.randn(2, 13, 3)
    whole = whole if form == "bshd" else whole.transpose(0, 1)
    store: dict[str, Tensor] = {}
    dim = form.index("s")
    write_sample(store, "one", {"x": whole}, plan_batch([0, 13], 2), seq_dims={"x": dim - 3}, halo=1)
    for rank in range(2):
        handler = get_cp_handler_cls("ring")(cp_group=Seat(rank, 2), qkv_format=form, max_seqlen_q=13)
        own = read_sample(store, "one", handler)
        assert torch.equal(own["x"], handler.dispatch(whole, dim))
        assert torch.equal(own.position_ids, handler.position_ids)
        assert own.ahead("x", 1).shape == own["x"].shape


def test_a_sample_reads_like_a_mapping() -> None:
    store: MutableMapping[str, Tensor] = {}
    write_sample(store, "one", {"ids": torch.arange(23), "x": torch.rand(23)}, planned())
    own = read_sample(store, "one", planned(), rank=0)
    assert isinstance(own, ShardedSample)
    assert list(own) == ["ids", "x"]
    assert len(own) == 2
    assert {**own}["ids"].shape == dict(own)["x"].shape == (8,)
    assert "ids" in own
    assert "y" not in own
