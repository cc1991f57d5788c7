"""A recording double of MagiAttention: its signatures as they were read, its quirks, and dense attention.

It stands in ``sys.modules`` where a test puts it, for as long as the test lasts. Every call is bound to the signature
in ``tests/data/magi_signatures.json`` and kept in :data:`CALLS`. What it has of the package beside that: chunks dealt
out by a heap of their areas and kept in ascending order, pads at the end, ranges that are kept and added to, keys that
must be known, a mask that must have an area, dense masks that are assigned slice by slice, a log-sum-exp whose gradient
is dropped, sinks in rows that see nothing, and rows in no slice that hold whatever was there.
"""

from __future__ import annotations

import heapq
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import make_dataclass
from inspect import Parameter, Signature
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cphandler.engines import magi

DATA = json.loads((Path(__file__).parent.parent / "data" / "magi_signatures.json").read_text())
VERSIONS = tuple(DATA["versions"])
NAMES = ("magi_attention", "magi_attention.api", "magi_attention.common", "magi_attention.config")
KINDS = ("full", "causal", "inv_causal", "bi_causal")
GARBAGE = 7.0

CALLS: list[tuple[str, dict[str, Any]]] = []
"""Calls of this process while a double stood in, by name, each with all its arguments."""


class Ranges(list[list[int]]):
    """``AttnRanges``: a list that its owner may change."""

    @classmethod
    def from_ranges(cls, ranges: list[list[int]]) -> Ranges:
        assert all(0 <= start <= end for start, end in ranges)
        return cls(ranges)

    @property
    def end(self) -> int:
        return max(end for _, end in self)


class DispatchConfig(SimpleNamespace):
    def __init__(self, chunk_size: int | None = None, uneven_shard: bool = False) -> None:
        super().__init__(chunk_size=chunk_size, uneven_shard=uneven_shard)


class DistAttnConfig(SimpleNamespace):
    def __init__(self, dispatch_config: DispatchConfig | None = None) -> None:
        super().__init__(dispatch_config=dispatch_config or DispatchConfig())


def signature_of(version: str, name: str) -> Signature:
    """A function's signature in a version."""
    defaults = {"DistAttnConfig": DistAttnConfig}
    listed = DATA["versions"][version]["functions"][name]
    return Signature(
        [
            Parameter(
                parameter[0],
                Parameter.POSITIONAL_OR_KEYWORD,
                default=eval(parameter[1], defaults) if len(parameter) > 1 else Parameter.empty,
            )
            for parameter in listed
        ]
    )


class Double:
    """The package in one version, with a kernel and the flags of its environment.

    Args:
        version: one of :data:`VERSIONS`.
        flags: fields of a key that follow from the environment, such as ``kernel_backend``.
    """

    def __init__(self, version: str, **flags: Any) -> None:
        self.version = version
        described = DATA["versions"][version]
        self.flags = {name: False for name in described["key"] if name.startswith("is_")}
        self.flags |= {"kernel_backend": SimpleNamespace(value="sdpa"), "precision": None, "cp_mesh": None}
        self.flags |= {"head_dim_v": None} if "head_dim_v" in described["key"] else {}
        self.flags |= flags
        self.key_cls = make_dataclass("DistAttnRuntimeKey", described["key"], frozen=True, eq=False)
        self.plans: dict[Any, Plan] = {}

    def modules(self) -> dict[str, ModuleType]:
        """The package's modules, by name."""
        made = {name: ModuleType(name) for name in NAMES}
        made["magi_attention"].__version__ = self.version  # type: ignore[attr-defined]
        made["magi_attention.common"].AttnRanges = Ranges  # type: ignore[attr-defined]
        made["magi_attention.config"].DistAttnConfig = DistAttnConfig  # type: ignore[attr-defined]
        made["magi_attention.config"].DispatchConfig = DispatchConfig  # type: ignore[attr-defined]
        for name in DATA["versions"][self.version]["functions"]:
            setattr(made["magi_attention.api"], name, self.recorded(name))
        return made

    def recorded(self, name: str) -> Callable[..., Any]:
        """A function that binds its arguments, records the call and makes it."""
        bound_to = signature_of(self.version, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = bound_to.bind(*args, **kwargs)
            bound.apply_defaults()
            CALLS.append((name, dict(bound.arguments)))
            return getattr(self, name)(**bound.arguments)

        call.__signature__ = bound_to  # type: ignore[attr-defined]
        return call

    def magi_attn_flex_key(self, **given: Any) -> Any:
        config, length = given["dist_attn_config"].dispatch_config, given["total_seqlen_q"]
        assert given["total_seqlen_k"] == length, "self attention only"
        assert given["q_ranges"].end <= length
        assert given["k_ranges"].end <= length
        assert (given["pad_size"], given["chunk_size"], given.get("head_dim_v")) == (0, None, None), (
            "deprecated, or new"
        )
        assert all(given[name] is True for name in ("is_same_source", "is_q_permutable", "is_k_permutable"))
        group = given["cp_group_or_mesh"]
        assert isinstance(group, dist.ProcessGroup)
        ranks = dist.get_world_size(group)
        automatic = -(-length // (8 * ranks))
        chunk = automatic if config.chunk_size is None else min(automatic, config.chunk_size)
        assert -(-length // chunk) >= ranks, "the number of chunks must be at least cp_size"
        pad = 0 if config.uneven_shard else -length % (chunk * ranks)
        plan = Plan(given, length + pad, chunk, ranks)
        plan.deal(ranks)
        sizes = {"total_seqlen_q": length + pad, "total_seqlen_k": length + pad, "pad_size": pad, "chunk_size": chunk}
        return self._key(plan, given, sizes, group, given["dist_attn_config"])

    def make_flex_key_for_new_mask_after_dispatch(self, **given: Any) -> Any:
        old = given["key_for_dispatch"]
        plan = Plan(given, old.total_seqlen_q, old.chunk_size, dist.get_world_size(old.cp_group))
        plan.owned = self.plans[old].owned
        heads = {name: given[name] or getattr(old, name) for name in ("num_heads_q", "num_heads_kv", "head_dim")}
        sizes = {name: getattr(old, name) for name in ("total_seqlen_q", "total_seqlen_k", "pad_size", "chunk_size")}
        return self._key(plan, {**given, **heads}, sizes, old.cp_group, old.dist_attn_config)

    def _key(self, plan: Plan, given: dict[str, Any], sizes: dict[str, int], group: Any, config: Any) -> Any:
        seen: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(seen, plan.slices, group=group)
        assert all(each == plan.slices for each in seen), "ranks made different keys"
        named = {name: given[name] for name in ("q_ranges", "k_ranges", "num_heads_q", "num_heads_kv", "head_dim")}
        named |= {"attn_mask_type": tuple(given["attn_mask_type"]), "cp_group": group, "dist_attn_config": config}
        named |= {"uneven_shard": config.dispatch_config.uneven_shard, **sizes, **self.flags}
        key = self.key_cls(**named)
        self.plans[key] = plan
        for ranges, extra in ((given["q_ranges"], [sizes["total_seqlen_q"]] * 2), (given["k_ranges"], [0, 0])):
            ranges.append(extra)  # the package's own, from now on
            ranges.reverse()
        return key

    def _plan(self, key: Any) -> Plan:
        if key not in self.plans:
            raise ValueError("The dist attn runtime key does not exist!")
        return self.plans[key]

    def dispatch(self, x: Tensor, key: Any, pad_value: float) -> Tensor:
        plan = self._plan(key)
        assert len(x) == key.total_seqlen_q - key.pad_size, "dim 0 of the global tensor"
        padded = torch.cat([x, x.new_full((key.pad_size, *x.shape[1:]), pad_value)])
        return padded[plan.rows(dist.get_rank(key.cp_group))]

    def calc_attn(self, **given: Any) -> tuple[Tensor, Any]:
        key, q, k, v, sink = (given[name] for name in ("key", "q", "k", "v", "sink"))
        plan = self._plan(key)
        rows = len(plan.rows(dist.get_rank(key.cp_group)))
        assert q.shape == (rows, key.num_heads_q, key.head_dim), (q.shape, rows, key)
        assert k.shape == v.shape == (rows, key.num_heads_kv, key.head_dim)
        assert all(x.is_contiguous() for x in (q, k, v))
        assert given["softcap"] == 0.0, "non-zero softcap is not supported"
        kernel = self.flags["kernel_backend"].value
        assert kernel.startswith("sdpa") or q.dtype in (torch.float16, torch.bfloat16)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        if sink is not None:
            assert sink.dtype == wide
            assert sink.shape == (1, key.num_heads_q)
        scale = q.shape[-1] ** -0.5 if given["softmax_scale"] is None else given["softmax_scale"]
        assert not given["return_max_logits"] or key.num_heads_q <= 128
        out, lse, largest = _Attention.apply(q, k, v, sink, (key.cp_group, scale), plan)  # type: ignore[no-untyped-call]
        return out, SimpleNamespace(lse=lse, max_logits=largest if given["return_max_logits"] else None)


class Plan:
    """Slices, and which rank has which chunks.

    Args:
        given: arguments with ranges and kinds.
        length: tokens, pads included.
        chunk: tokens of a chunk.
        ranks: ranks of the group.
    """

    def __init__(self, given: dict[str, Any], length: int, chunk: int, ranks: int) -> None:
        kinds = [KINDS.index(kind) for kind in given["attn_mask_type"]]
        self.slices = [(*q, *k, kind) for q, k, kind in zip(given["q_ranges"], given["k_ranges"], kinds, strict=True)]
        max(q1 for q0, q1, k0, k1, _ in self.slices if q0 < q1 and k0 < k1)  # fails on a mask without area, as there
        self.length, self.chunk = length, chunk
        self.owned: list[list[int]] = []

    @property
    def mask(self) -> Tensor:
        """``[S, S]``: assigned slice by slice, later ones over earlier ones."""
        mask = torch.zeros(self.length, self.length, dtype=torch.bool)
        for q0, q1, k0, k1, kind in self.slices:
            rows, keys = torch.arange(q1 - q0)[:, None], torch.arange(k1 - k0)[None]
            left = rows if kind & 2 else 0
            right = k1 - k0 - (q1 - q0 - 1 - rows if kind & 1 else 0)
            mask[q0:q1, k0:k1] = (keys >= left) & (keys < right)
        return mask

    @property
    def covered(self) -> Tensor:
        """``[S]``: rows of some slice."""
        covered = torch.zeros(self.length, dtype=torch.bool)
        for q0, q1, *_ in self.slices:
            covered[q0:q1] = True
        return covered

    def deal(self, ranks: int) -> None:
        """Chunks by falling area to the rank that has least, as many to each."""
        areas = [int(rows.sum()) for rows in self.mask.split(self.chunk)]
        heap, most = [(0, rank) for rank in range(ranks)], -(-len(areas) // ranks)
        self.owned = [[] for _ in range(ranks)]
        for number in sorted(range(len(areas)), key=lambda n: -areas[n]):
            load, rank = heapq.heappop(heap)
            self.owned[rank].append(number)
            if len(self.owned[rank]) < most:
                heapq.heappush(heap, (load + areas[number], rank))
        for chunks in self.owned:
            chunks.sort()

    def rows(self, rank: int) -> Tensor:
        """Global tokens of a rank's rows, pads included."""
        return torch.cat([torch.arange(self.length)[n * self.chunk : (n + 1) * self.chunk] for n in self.owned[rank]])


class _Attention(torch.autograd.Function):
    """Dense attention of local queries over all keys, gathered; the gradient of the log-sum-exp is dropped."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Any, how: Any, plan: Plan) -> Any:
        group, scale = how
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        order = torch.cat([plan.rows(r) for r in range(ranks)])
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        keys, values = (_in_order(x.to(wide), order, group) for x in (k, v))
        own, repeats = plan.rows(rank), q.shape[1] // k.shape[1]
        seen = plan.mask[own][:, None]
        scores = torch.einsum("qnd,knd->qnk", q.to(wide), keys.repeat_interleave(repeats, 1)) * scale
        scores = scores.masked_fill(~seen, float("-inf"))
        lse = torch.logsumexp(scores, -1)
        lse = lse if sink is None else torch.logaddexp(lse, sink.expand_as(lse))
        weights = torch.exp(scores - lse[..., None]).masked_fill(~seen, 0.0)
        out = torch.einsum("qnk,knd->qnd", weights, values.repeat_interleave(repeats, 1))
        out[~plan.covered[own]] = GARBAGE
        largest = scores.amax((0, 2)).contiguous()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        ctx.save_for_backward(q, keys, values, sink, weights, out, lse, own)
        ctx.group, ctx.scale, ctx.dtype = group, scale, k.dtype
        return out.to(q.dtype), lse, largest

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *dropped: Any) -> Any:
        q, keys, values, sink, weights, out, lse, own = ctx.saved_tensors
        wide, repeats = weights.dtype, q.shape[1] // keys.shape[1]
        grad, queries = grad.to(wide), q.to(wide)
        delta = (grad * out).sum(-1)
        pulled = torch.einsum("qnd,knd->qnk", grad, values.repeat_interleave(repeats, 1))
        dscores = weights * (pulled - delta[..., None]) * ctx.scale
        dq = torch.einsum("qnk,knd->qnd", dscores, keys.repeat_interleave(repeats, 1))
        dk = torch.einsum("qnk,qnd->knd", dscores, queries)
        dv = torch.einsum("qnk,qnd->knd", weights, grad)
        for part in (dk, dv):
            dist.all_reduce(part, group=ctx.group)
        dk, dv = (x.unflatten(1, (keys.shape[1], repeats)).sum(2)[own].to(ctx.dtype) for x in (dk, dv))
        dsink = None if sink is None else -(torch.exp(sink - lse) * delta).sum(0, keepdim=True)
        return dq.to(q.dtype), dk, dv, dsink, None, None


def _in_order(x: Tensor, order: Tensor, group: Any) -> Tensor:
    """All ranks' rows in global order."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    whole = torch.empty(len(order), *x.shape[1:], dtype=x.dtype)
    whole[order] = torch.cat(parts)
    return whole


@contextmanager
def standing_in(version: str = VERSIONS[0], **flags: Any) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """The double in ``sys.modules``, on CPUs too; gives the calls that are made."""
    before = {name: sys.modules.get(name) for name in NAMES}
    devices = magi.DEVICES
    CALLS.clear()
    sys.modules.update(Double(version, **flags).modules())
    magi.DEVICES = ("cuda", "cpu")  # type: ignore[assignment]
    try:
        yield CALLS
    finally:
        magi.DEVICES = devices
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
