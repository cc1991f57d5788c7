"""Differentiable collectives on sub-groups: values, gradients, dtypes, traffic, and compiled graphs."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cphandler import Causal, record_traffic
from cphandler.attention.loop import Indices, Scalars, attention
from cphandler.comm.collectives import all_gather, all_to_all, exchange_rows, reduce_scatter, ring_shift
from cphandler.comm.transfers import post
from cphandler.layouts.layout import make_layout
from cphandler.plan.plan import make_plan
from cphandler.sharding.heads import HeadSplit, gather_heads_scatter_seq, gather_seq_scatter_heads
from cphandler.sharding.shard import Shard
from cphandler.testing import RankPool, partition_group
from cphandler.tokens.documents import Documents

DTYPES = [
    torch.bool,
    torch.int16,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
]


def my_group(size: int) -> tuple[str, int] | None:
    """Name and rank of this rank's group; three ranks leave out global rank 0."""
    group = partition_group({2: ((0, 2), (1, 3)), 3: ((1, 2, 3),), 4: ((0, 1, 2, 3),)}[size])
    return None if group is None else (str(group.group_name), dist.get_rank(group))


def row(source: int, target: int, i: int) -> float:
    return 100.0 * source + 10.0 * target + i


def exchange_case(size: int, sparse: bool) -> None:
    """Rank s sends ``(s + t) % 3`` rows to rank t; every row says where it comes from and goes to."""
    mine = my_group(size)
    if mine is None:
        return
    name, rank = mine
    operation = exchange_rows if sparse else all_to_all
    send = [(rank + t) % 3 for t in range(size)]
    receive = [(s + rank) % 3 for s in range(size)]
    rows = [row(rank, t, i) for t in range(size) for i in range(send[t])]
    expected = [row(s, rank, i) for s in range(size) for i in range(receive[s])]
    for dtype in DTYPES:
        x = torch.tensor(rows).reshape(-1, 1).expand(-1, 3).to(dtype)  # stride 0
        got = operation(x, send, receive, name)
        assert torch.equal(
            got.view(torch.uint8),
            torch.tensor(expected).reshape(-1, 1).expand(-1, 3).to(dtype).contiguous().view(torch.uint8),
        )
    leaf = torch.tensor(rows, dtype=torch.float64).reshape(-1, 1).requires_grad_()
    weights = torch.tensor([[1000.0 * rank + e] for e in expected], dtype=torch.float64).reshape(-1, 1)
    (operation(leaf, send, receive, name) * weights).sum().backward()
    wanted = [1000.0 * t + row(rank, t, i) for t in range(size) for i in range(send[t])]
    assert leaf.grad is not None
    assert leaf.grad.flatten().tolist() == wanted


@pytest.mark.parametrize("sparse", [False, True], ids=["all_to_all", "exchange_rows"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_uneven_exchanges(ranks: RankPool, size: int, sparse: bool) -> None:
    ranks.run(exchange_case, size, sparse)


def gather_case(size: int) -> None:
    mine = my_group(size)
    if mine is None:
        return
    name, rank = mine
    for dtype in DTYPES:
        x = (torch.arange(6).reshape(2, 3) + 10 * rank).to(dtype).T  # not contiguous
        expected = torch.cat([(torch.arange(6).reshape(2, 3) + 10 * r).to(dtype).T for r in range(size)])
        assert torch.equal(all_gather(x, name).view(torch.uint8), expected.contiguous().view(torch.uint8))
    leaf = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    weights = [torch.arange(size * 6, dtype=torch.float64).view(-1, 3) * (r + 1) for r in range(size)]
    (all_gather(leaf, name) * weights[rank]).sum().backward()
    assert torch.equal(leaf.grad, sum(weights)[2 * rank : 2 * rank + 2])
    parts = [
        torch.randn(size * 2, 3, generator=torch.Generator().manual_seed(r), dtype=torch.float64) for r in range(size)
    ]
    leaf = parts[rank].clone().requires_grad_()
    reduced = reduce_scatter(leaf, name)
    assert torch.allclose(reduced, sum(parts)[2 * rank : 2 * rank + 2], rtol=1e-14)
    (reduced * (rank + 1)).sum().backward()
    assert torch.equal(
        leaf.grad, torch.arange(1.0, size + 1, dtype=torch.float64).repeat_interleave(2)[:, None].expand(-1, 3)
    )
    shifted = ring_shift(torch.tensor([float(rank)], requires_grad=True), 1, name)
    assert shifted.item() == (rank - 1) % size
    x = torch.tensor([1.0], requires_grad=True)
    (ring_shift(x, 2, name) * (rank + 1)).sum().backward()
    assert x.grad.item() == (rank + 2) % size + 1
    assert len(all_gather(torch.empty(0, 3), name)) == 0


@pytest.mark.parametrize("size", [2, 3, 4])
def test_gathers_reductions_and_shifts(ranks: RankPool, size: int) -> None:
    ranks.run(gather_case, size)


def half_precision_sum() -> float:
    """1 + 2 ** -9 three times is lost in bfloat16 one by one and kept in float32."""
    group = partition_group([range(4)])
    assert group is not None
    x = torch.full((4,), 2.0**-9 if dist.get_rank() else 1.0, dtype=torch.bfloat16)
    return float(reduce_scatter(x, str(group.group_name)))


def test_sums_of_half_precision_are_kept_in_float32(ranks: RankPool) -> None:
    assert ranks.run(half_precision_sum) == [1 + 2**-7] * 4


def traffic_case() -> tuple[int, int, dict[str, int]]:
    name = str(dist.group.WORLD.group_name)
    rank = dist.get_rank()
    with record_traffic() as traffic:
        all_to_all(torch.zeros(8, 4), [2] * 4, [2] * 4, name)
        all_gather(torch.zeros(3, dtype=torch.int64), name)
        other = (rank + 2) % 4
        received = torch.empty(5)
        post([(torch.zeros(5), other), (torch.empty(0), (rank + 1) % 4)], [(received, other)], name).wait()
    all_gather(torch.zeros(3), name)
    return traffic.sent_bytes, traffic.messages, traffic.by_operation


def test_traffic_is_counted(ranks: RankPool) -> None:
    expected = 3 * 2 * 4 * 4 + 3 * 3 * 8 + 5 * 4
    assert ranks.run(traffic_case) == [(expected, 3 + 3 + 1, {"all_to_all": 96, "send": 92})] * 4


def overlapping_blocks() -> list[tuple[int, int]]:
    """Blocks in each other, blocks that end in the order in which they began, a recursion, and another thread."""
    name = str(dist.group.WORLD.group_name)

    def send() -> None:
        all_gather(torch.zeros(1), name)

    blocks = [record_traffic() for _ in range(4)]
    with record_traffic() as outer:
        first, second = blocks[0].__enter__(), blocks[1].__enter__()
        send()
        blocks[0].__exit__(None, None, None)
        send()
        blocks[1].__exit__(None, None, None)
        with record_traffic() as inner:
            pass
        send()

        def nested(depth: int) -> int:
            with record_traffic() as traffic:
                send()
                return traffic.sent_bytes if depth == 0 else traffic.sent_bytes + nested(depth - 1)

        assert nested(2) == 3 * 12
        thread = threading.Thread(target=send)
        thread.start()
        thread.join()
    send()
    return [(traffic.sent_bytes, traffic.messages) for traffic in (outer, first, second, inner)]


def test_blocks_that_count_may_overlap(ranks: RankPool) -> None:
    """Two counts that hold equal numbers are still two."""
    assert ranks.run(overlapping_blocks) == [[(7 * 12, 7 * 3), (12, 3), (24, 6), (0, 0)]] * 4


def compiled_case() -> None:
    """Attention and reshards in one graph without breaks; another batch's plan does not compile again."""
    group = partition_group([(0, 1), (2, 3)])
    assert group is not None
    name, rank = str(group.group_name), dist.get_rank(group)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def model(q: Tensor, k: Tensor, v: Tensor, plan: Tensor) -> Tensor:
        return attention(q * 2, k, v, plan, Scalars(0.5, "torch", "ring", name))[0] * 3

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for lengths in ([12, 4], [7, 9]):
        documents = Documents.from_cu_seqlens([0, lengths[0], 16])
        layout = make_layout("zigzag", documents.offsets, 2)
        plan = make_plan(Causal().bands(documents, documents), layout, layout, rank, needs="hops").to_tensor()
        torch._dynamo.mark_dynamic(plan, 0)
        q, k, v = (torch.randn(1, 8, n, 8, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2))
        grad = torch.randn(1, 8, 4, 8, dtype=torch.float64)
        eager = torch.autograd.grad(model(q, k, v, plan), (q, k, v), grad)
        traced = torch.autograd.grad(compiled(q, k, v, plan), (q, k, v), grad)
        assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))
    assert len(graphs) == 1

    order = Shard(documents, layout, rank).order(torch.device("cpu"))
    split = HeadSplit.of(4, 1, 2)

    def reshard(q: Tensor, k: Tensor) -> Tensor:
        q, k = gather_seq_scatter_heads([q, k], [split.queries, split.keys], order, name)
        return gather_heads_scatter_seq([q * k], split.queries, order, name)[0]

    k = torch.randn(1, 8, 1, 8, dtype=torch.float64, requires_grad=True)
    traced = torch.compile(reshard, backend="aot_eager", fullgraph=True)(q, k)
    assert torch.equal(traced, q * k)
    got = torch.autograd.grad(traced, (q, k), grad)
    torch.testing.assert_close(got[0], grad * k, rtol=0, atol=0)
    torch.testing.assert_close(got[1], (grad * q).sum(2, keepdim=True), rtol=1e-13, atol=1e-13)


def test_operators_compile_without_graph_breaks(ranks: RankPool) -> None:
    ranks.run(compiled_case)


def test_operators_satisfy_torchs_own_checks() -> None:
    """Schema, fake tensors and autograd registration, on one rank."""
    documents = Documents.from_cu_seqlens([0, 5, 9])
    one = make_layout("contiguous", documents.offsets, 1)
    plan = make_plan(Causal().bands(documents, documents), one, one, 0).to_tensor()
    q, k, v = (torch.randn(1, 9, n, 8, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2))
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(9)
    terms = Scalars(0.4, "reference", softcap=5.0, dropout_p=0.3, dropout_seed=4, tokens=(9, 9))
    inputs = (q, k, v, sinks, plan, *terms.packed(Indices(ids, ids, ids[None])))
    torch.library.opcheck(torch.ops.cphandler.attention_forward.default, inputs)
    plain = (q, k, v, None, plan, *Scalars(0.4, "torch").packed())
    torch.library.opcheck(torch.ops.cphandler.attention_forward.default, plain)
    largest = (q.detach(), k.detach(), plan, *terms.packed())
    torch.library.opcheck(torch.ops.cphandler.largest_scores.default, largest)


def test_a_plan_that_was_written_to_is_unpacked_again() -> None:
    """Operators keep what they unpacked as long as the tensor stays as it was."""
    documents = [Documents.from_cu_seqlens([0, *stops]) for stops in ([4, 9], [7, 9])]
    one = make_layout("contiguous", documents[0].offsets, 1)
    first, second = (make_plan(Causal().bands(d, d), one, one, 0).to_tensor() for d in documents)
    q = torch.randn(1, 9, 2, 8)
    before, wanted = (attention(q, q, q, plan, Scalars(0.5, "torch"))[0] for plan in (first, second))
    first.copy_(second)
    assert torch.equal(attention(q, q, q, first, Scalars(0.5, "torch"))[0], wanted)
    assert not torch.equal(before, wanted)
