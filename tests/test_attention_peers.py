"""The benchmark of attention with others in it: absent, failing and wrong peers, intervals, order, and floors."""

from __future__ import annotations

import itertools
import json
import operator
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from benchmarks import bare, floors, seats
from benchmarks.intervals import median_of, paired_ratio
from benchmarks.kernel_clock import kernel_clock
from benchmarks.peers import PEERS, Peer, Shape, flash_attn_stand_in, peer_cls
from benchmarks.reference import expected
from benchmarks.runs import Errors, errors_of, run_contest, turns, whole
from benchmarks.seats import Part
from benchmarks.tables import ABOVE
from benchmarks.works import Absent, Contest, Work, peers_of
from cphandler.testing import RankPool, assert_close, dense_gradients

ROOT = Path(__file__).parent.parent
PLAIN = Work("plain", 1, (64,), 4, 2, 8, "float32", None)


class Gathered(Peer):
    """Gathers everything and computes its part of the whole, so that it is right."""

    name = "gathered"
    distribution = "torch"

    def connect(self, shape: Shape) -> None:
        self.shape = shape

    def tokens(self, shape: Shape, rank: int) -> Tensor:
        return torch.arange(rank, shape.tokens, shape.ranks)  # no order that anybody else has

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _Whole.apply(self, query, key, value)

    def gradient(self, grad: Tensor) -> Tensor:
        return grad


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, peer: Gathered, *local: Tensor) -> Tensor:
        ctx.peer, (out, _) = peer, _everything(peer, local, None)
        ctx.save_for_backward(*local)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grads = _everything(ctx.peer, ctx.saved_tensors, grad_out)[1]
        return (None, *(ctx.peer.gradient(grad) for grad in grads))


def _everything(peer: Gathered, local: Sequence[Tensor], grad: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    tensors = []
    for x in (*local, local[0] if grad is None else grad):
        parts = [torch.empty_like(x) for _ in range(peer.shape.ranks)]
        dist.all_gather(parts, x.detach().contiguous())
        tensors.append(torch.stack(parts, dim=2).flatten(1, 2).squeeze(0))
    visible = torch.ones(peer.shape.tokens, peer.shape.tokens, dtype=torch.bool).tril()
    with torch.enable_grad():
        out, _, grads = dense_gradients(tensors[:3], visible, tensors[3], qkv_format="thd")
    mine = peer.tokens(peer.shape, dist.get_rank())
    return out[mine].detach().to(local[0].dtype)[None], [x[mine].to(local[0].dtype)[None] for x in grads]


class Wrong(Gathered):
    name = "wrong"

    def gradient(self, grad: Tensor) -> Tensor:
        return grad * 1.001


class NotANumber(Gathered):
    name = "no-number"

    def gradient(self, grad: Tensor) -> Tensor:
        return grad * float("nan")


class Failing(Gathered):
    name = "failing"

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise RuntimeError("no kernel for this")


class Doubled(Gathered):
    name = "doubled"

    def tokens(self, shape: Shape, rank: int) -> Tensor:
        return torch.arange(shape.tokens // shape.ranks)


class Missing(Gathered):
    name = "missing"
    distribution = "no-such-distribution"


class Refusing(Gathered):
    name = "refusing"

    @classmethod
    def refusal(cls, ranks: int, heads: int, kv_heads: int) -> str | None:
        return f"not on {ranks} ranks"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    """One run with every kind of peer, two backends, and torch's ring."""
    folder = tmp_path_factory.mktemp("peers")
    kinds = (Gathered, Wrong, NotANumber, Failing, Doubled, Missing, Refusing)
    paths = [f"tests.test_attention_peers:{kind.__name__}" for kind in kinds]
    named = [part for path in (*paths, PEERS[0]) for part in ("--peer", path)]
    sizes = ["--lengths", "64", "--heads", "4", "--kv-heads", "2", "--head-dim", "8", "--ranks", "2", "--repeats", "3"]
    chosen = ["--backend", "p2p", "--backend", "ulysses"]
    written = ["--json", str(folder / "out" / "run.json"), "--plot", str(folder / "out" / "run.png")]
    command = [sys.executable, "-m", "benchmarks.attention", *named, *sizes, *chosen, *written]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return done.stdout, json.loads((folder / "out" / "run.json").read_text()), folder / "out" / "run.png"


def competitors(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in record["contests"][0]["competitors"]}


@pytest.mark.slow
def test_a_peer_that_is_wrong_is_marked_and_timed(recorded: tuple[str, dict[str, Any], Path]) -> None:
    output, record, _ = recorded
    found = competitors(record)
    assert found["wrong"]["wrong"] == found["no-number"]["wrong"] == ["gradients"]
    assert found["wrong"]["errors"]["out"] < 1e-6
    assert found["wrong"]["errors"]["grad"] == pytest.approx(1e-3, rel=0.1)
    assert len(found["wrong"]["cpu_seconds"]) == 3
    right = {"plain", "local", "p2p", "ulysses", "gathered", "torch ring, all-to-all"}
    assert right == {name for name, entry in found.items() if not entry["wrong"]}
    assert all(entry["errors"]["grad"] < 2e-6 for name, entry in found.items() if name in right)
    assert "wrong, wrong gradients" in output
    assert "gathered, wrong" not in output


@pytest.mark.slow
def test_who_is_absent_is_named_with_the_reason(recorded: tuple[str, dict[str, Any], Path]) -> None:
    output, record, _ = recorded
    absent = {entry["name"]: entry["reason"] for entry in record["contests"][0]["absent"]}
    assert absent == {
        "missing": "no-such-distribution not installed",
        "refusing": "not on 2 ranks",
        "failing": "fails: RuntimeError: no kernel for this",
        "doubled": "fails: the ranks of doubled do not hold each of 64 tokens once",
    }
    assert all(f"{name} is absent: {reason}" in output for name, reason in absent.items())


@pytest.mark.slow
def test_what_a_run_says(recorded: tuple[str, dict[str, Any], Path]) -> None:
    _, record, picture = recorded
    found, contest = competitors(record), record["contests"][0]
    for name in ("p2p", "ulysses"):
        entry = found[name]
        assert entry["counted_bytes"] <= entry["sent_bytes"] < 1.2 * entry["counted_bytes"] + 4096
        assert len(entry["floor_cpu_seconds"]) == len(entry["bare_cpu_seconds"]) == 3
        assert set(entry["above"]) == set(ABOVE)
        parts = zip(*(entry[f"{part}_cpu_seconds"] for part in ("kernel", "rest", "gloo")), strict=True)
        assert [sum(repeat) for repeat in parts] == pytest.approx(entry["cpu_seconds"])
        assert entry["peak_bytes"] is None or entry["peak_bytes"] > -(2**20)
    met = {(entry["competitor"], entry["peer"]) for entry in contest["against_peers"]}
    peers = {name for name, entry in found.items() if entry["kind"] == "peer"}
    assert met == {(name, peer) for name in ("p2p", "ulysses") for peer in peers}
    for entry in contest["against_peers"]:
        for interval in (entry, entry["outside_the_kernel"]):
            assert interval["low"] <= interval["median"] <= interval["high"]
    assert record["versions"]["torch"] == torch.__version__
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_no_peer_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Peer, "versions", classmethod(lambda cls: {}))
    found = list(peers_of(PLAIN, [2], PEERS))
    assert len(found) == len(PEERS)
    for absent in found:
        assert isinstance(absent, Absent)
        assert absent.reason.endswith("not installed")


def test_who_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Peer, "versions", classmethod(lambda cls: dict.fromkeys((cls.distribution, *cls.needs), "1")))
    serving = {
        (ranks, kv_heads): {
            peer_cls(path).name for path in PEERS if not peer_cls(path).availability(ranks, 8, kv_heads)
        }
        for ranks, kv_heads in ((2, 8), (4, 8), (4, 2), (4, 3))
    }
    everybody = {peer_cls(path).name for path in PEERS}
    even = {"yunchang Ulysses", "DeepSpeed Ulysses", "ringmaster Ulysses"}
    assert serving[4, 8] == everybody
    assert serving[2, 8] == everybody - {"yunchang USP"}
    assert serving[4, 2] == everybody - even
    assert serving[4, 3] == everybody - even - {"yunchang USP", "DeepSpeed ALST"}


def test_an_odd_number_of_tokens_is_not_for_them() -> None:
    (absent,) = peers_of(Work("plain", 1, (66,), 4, 2, 8, "float32", None), [4], PEERS[:1])
    assert absent == Absent("torch ring, all-to-all", 4, "needs tokens that 8 divides, got 66")


@pytest.mark.parametrize("path", ["nothing", "no.such:Peer", "benchmarks.peers:NoPeer", "benchmarks.works:Work"])
def test_a_name_that_is_no_peer(path: str) -> None:
    with pytest.raises(ValueError, match=r"module:class|no class of"):
        peer_cls(path)


def test_the_order_moves() -> None:
    names = [f"c{i}" for i in range(13)]
    orders = [turns(names, repeat) for repeat in range(7)]
    assert all(sorted(order) == sorted(names) for order in orders)
    assert len({order[0] for order in orders}) >= 5
    assert max(abs(a.index("c5") - b.index("c5")) for a in orders for b in orders) > 6
    before = {order[order.index("c5") - 1] for order in orders}
    assert before == {"c4", "c6"}
    assert turns(names, 0) == names
    assert turns([], 3) == []


def test_an_interval_of_a_paired_ratio() -> None:
    noise, own = np.random.default_rng(0), np.random.default_rng(1)
    machine = noise.uniform(1.0, 3.0, 21)  # what slows a whole repeat falls out
    ours, theirs = machine * 0.9 * own.normal(1, 0.01, 21), machine * own.normal(1, 0.01, 21)
    median, low, high = paired_ratio(ours, theirs)
    assert low < 0.9 < high < 1
    assert low <= median <= high
    wide = paired_ratio(machine * own.normal(1, 0.2, 21), machine)
    assert wide.high - wide.low > 3 * (high - low)
    assert paired_ratio([2.0] * 7, [1.0] * 7) == (2.0, 2.0, 2.0)
    assert paired_ratio(ours, theirs) == (median, low, high)
    assert median_of(np.asarray(ours) / np.asarray(theirs)) == (median, low, high)


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0], [1.0, 2.0])])
def test_an_interval_of_nothing(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError, match="one measure for each repeat"):
        paired_ratio(ours, theirs)


def test_parts_are_put_in_global_order_without_pads() -> None:
    rows = torch.randn(5, 1, 2)
    parts = [
        Part(torch.tensor([3, 0, -1]), [torch.cat([rows[[3, 0]], torch.full((1, 1, 2), 9.0)])] * 4),
        Part(torch.tensor([1, 4, 2]), [rows[[1, 4, 2]]] * 4),
    ]
    work = Work("x", 2, (5,), 1, 1, 2, "float32", None)
    assert all(torch.equal(found, rows) for found in whole(parts, work))
    with pytest.raises(ValueError, match="do not hold each of 5 tokens once"):
        whole([parts[0], parts[0]], work)


def test_the_worst_gradient_counts() -> None:
    right = [torch.ones(3)] * 4
    assert errors_of(right, right) == Errors(0.0, 0.0)
    assert errors_of([right[0], right[1], 1.5 * right[2], right[3]], right).grad == pytest.approx(0.5)
    lost = errors_of([right[0], right[1], right[2] * float("nan"), 2 * right[3]], right)
    assert lost.wrong("float32") == ["gradients"]
    assert Errors(1e-3, 1e-3).wrong("bfloat16") == []
    assert Errors(1e-3, float("nan")).wrong("float32") == ["output", "gradients"]


class Pretending:
    """A pool whose ranks come back with something else than attention."""

    def run(self, function: Any, work: Work) -> list[Part]:
        assert function is seats.part, "nothing is timed before it is checked"
        tensors = expected(work, seats.global_tensors(work))
        off = 1.0 if work.backend == "plain" else 1.0 + 1e-5
        return [Part(torch.arange(work.tokens), [tensors[0], tensors[1], off * tensors[2], tensors[3]])]


@pytest.mark.parametrize("thorough", [False, True])
def test_a_backend_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch, *, thorough: bool) -> None:
    monkeypatch.setattr(seats, "peak", seats.part)
    works = PLAIN, replace(PLAIN, backend="local")
    pools: Any = {1: Pretending()}
    with pytest.raises(AssertionError, match="dk of local on 1 ranks"):
        run_contest(Contest("x", works), (), pools, repeats=1, thorough=thorough, console=Console(quiet=True))


def test_the_reference_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.reference.ROWS", 5)
    work = Work("plain", 1, (7, 1, 12), 4, 2, 8, "float64", None)
    tensors = seats.global_tensors(work)
    place = torch.tensor([0] * 7 + [1] + [2] * 12)
    visible = (place[:, None] == place) & torch.ones(20, 20, dtype=torch.bool).tril()
    out, _, grads = dense_gradients(tensors[:3], visible, tensors[3], qkv_format="thd")
    for actual, right in zip(expected(work, tensors), (out, *grads), strict=True):
        assert_close(actual, right)


def calls_of(work: Work) -> floors.Calls:
    return bare.kernel_calls(work)


@pytest.mark.slow
def test_the_floor_makes_the_calls_of_a_pass(ranks: RankPool) -> None:
    """Ulysses calls the kernel for its heads of the whole sequence; the ring's calls cover half the pairs, or more."""
    whole_sequence = Work("ulysses", 4, (1024,), 8, 4, 16, "float32", None)
    calls = ranks.run(calls_of, whole_sequence)
    assert len(set(calls)) == 1
    query, key = (1, 2, 1024, 16), (1, 1, 1024, 16)
    assert calls[0] == tuple(floors.Call(query, key, key, (), True, backward) for backward in (False, True))
    ring = ranks.run(calls_of, Work("ring", 4, (1024,), 8, 4, 16, "float32", None))
    for mine in ring:
        forward, backward = ([call for call in mine if call.backward is which] for which in (False, True))
        assert sorted(call._replace(backward=False) for call in backward) == sorted(forward)
    area = sum(call.query[2] * call.key[2] for mine in ring for call in mine if not call.backward)
    assert 1024 * 1025 / 2 <= area < 0.75 * 1024**2
    seconds = ranks.run(floors.replay, tuple(ring), "float32")
    assert all(0 < second < 10 for second in seconds)
    for price in ranks.run(floors.gloo_price, whole_sequence):
        assert price.direct_bytes == floors.ROUNDS * 256 * 2 * 4 * 16 * 4
        assert price.traded_bytes == price.direct_bytes * 3 // 4
    ranks.run(seats.forget)
    ranks.run(floors.forget)


def bare_and_own(work: Work) -> tuple[list[bare.Event], seats.Sample, seats.Sample, int]:
    """What a pass was seen to do, a pass, two bare passes (the second one counts), and the kernel calls of that."""
    events, own = list(bare.watched(work)), seats.measure(work)
    bare.measure(work)
    before = kernel_clock().calls
    sample = bare.measure(work)
    return events, own, sample, kernel_clock().calls - before


BARE = [
    Work("ring", 2, (512,), 4, 4, 16, "float32", None),
    Work("ring", 4, (512,), 4, 2, 16, "float32", None),
    Work("p2p", 4, (200, 7, 121, 184), 4, 2, 16, "float32", "balanced"),
    Work("all_gather", 4, (200, 7, 121, 184), 4, 4, 16, "float32", None),
    Work("ulysses", 4, (512,), 4, 4, 16, "float32", None),
    Work("usp", 4, (200, 7, 121, 184), 4, 2, 16, "float32", None),
]


def test_a_bare_pass_does_what_a_pass_does() -> None:
    """The same kernel calls and bytes, each message met by one on the other side, each post waited for once."""
    for size in (2, 4):
        with RankPool(size, timeout=120) as pool:  # processes of their own, whose operators may be replaced
            for work in (work for work in BARE if work.ranks == size):
                found = pool.run(bare_and_own, work)
                for events, own, sample, calls in found:
                    assert calls == sum(isinstance(event, floors.Call) for event in events) > 0
                    assert sample.both_bytes == own.both_bytes
                    assert 0 < sample.kernel < sample.own <= 1.01 * sample.both
                    posted = [event.number for event in events if isinstance(event, bare.Post)]
                    assert sorted(event.number for event in events if isinstance(event, bare.Wait)) == posted
                for rank, other in itertools.permutations(range(size), 2):
                    (leaving, _), (_, arriving) = (messages(found[i][0], j) for i, j in ((rank, other), (other, rank)))
                    assert leaving == arriving, f"{work} from {rank} to {other}"
                pool.run(bare.forget)


def messages(events: Sequence[bare.Event], peer: int) -> tuple[list[int], list[int]]:
    """Bytes of all that goes to a rank, and of all that comes from it, in order."""
    posts = [event for event in events if isinstance(event, bare.Post)]
    return tuple([m.nbytes for post in posts for m in side(post) if m.peer == peer] for side in SIDES)


SIDES = operator.attrgetter("sends"), operator.attrgetter("receives")


def clocked(backend: str) -> tuple[int, list[seats.Sample]]:
    """Calls of the kernel in two passes, and what each took."""
    work = Work(backend, 1, (300, 4), 4, 2, 16, "float32", None)
    seats.measure(work)
    before = kernel_clock().calls
    samples = [seats.measure(work) for _ in range(2)]
    return kernel_clock().calls - before, samples


def test_what_the_kernel_takes() -> None:
    """Calls from C++, which ``scaled_dot_product_attention`` makes, and from Python; autograd's calls too."""
    with RankPool(1, timeout=60) as alone:  # in a process of its own, whose operators may be replaced
        (ours,) = alone.run(calls_of, Work("local", 1, (300, 4), 4, 2, 16, "float32", None))
        for backend, calls in (("plain", 4), ("local", len(ours))):
            ((counted, samples),) = alone.run(clocked, backend)
            assert counted == 2 * calls
            assert all(0 < sample.kernel < sample.own <= 1.01 * sample.both for sample in samples)


def test_the_stand_in_is_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flash_attn", "flash_attn.flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)
    flash_attn_stand_in.install()
    from flash_attn import flash_attn_func, flash_attn_interface  # noqa: PLC0415

    generator = torch.Generator().manual_seed(0)
    q, grad = (torch.randn(1, 9, 4, 8, generator=generator).double() for _ in range(2))
    k, v = (torch.randn(1, 9, 2, 8, generator=generator).double() for _ in range(2))
    visible = torch.ones(9, 9, dtype=torch.bool).tril()
    right, lse, grads = dense_gradients((q, k, v), visible, grad, qkv_format="bshd")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    flash_attn_func(*leaves, causal=True).backward(grad)
    out, found, *_ = flash_attn_interface._flash_attn_forward(q, k, v, 0.0, None, True)
    buffers = [torch.full_like(x, 7.0) for x in (q, k, v)]
    flash_attn_interface._flash_attn_backward(grad, q, k, v, out, found, *buffers, 0.0, None, True)
    assert_close(out, right)
    assert_close(found.transpose(1, 2), lse)
    for leaf, buffer, expect in zip(leaves, buffers, grads, strict=True):
        assert leaf.grad is not None
        assert_close(leaf.grad, expect)
        assert_close(buffer, expect)
    with pytest.raises(NotImplementedError):
        flash_attn_func(q, k, v, causal=True, window_size=(3, 0))
    with pytest.raises(NotImplementedError):
        flash_attn_func(q, k[:, :5], v[:, :5], causal=True)
    with pytest.raises(NotImplementedError):
        flash_attn_interface.flash_attn_varlen_func(q, k, v)
