"""A double of ``transformer_engine.pytorch``: takes what the real one takes, checks what it checks, computes densely.

Each call is bound against the signature of its version, recorded, and computed from all ranks' keys by the definition,
in float64, with tokens placed by TransformerEngine's own rule (DualChunkSwap over ``cu_seqlens_padded``) and not by the
library's layouts. Rows that are padding come out as NaN, and get NaN for a gradient: the real kernels promise nothing.

It computes on a CPU in any dtype, which the real one refuses: :class:`AnyHardware` lifts that for a test.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cphandler.engines import te_package

VERSION = "2.20.2"
SIGNATURES: dict[str, dict[str, str]] = json.loads(
    (Path(__file__).parent.parent / "data" / "transformer_engine.json").read_text()
)


class Stream:
    """What stands for a CUDA stream."""


class AnyHardware(te_package.Hardware):
    """Lifts "CUDA tensors of 16 bits only, channels in eights"."""

    head_dim_multiple = 1
    devices = ("cpu", "cuda")
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

    def side_stream(self, device: torch.device) -> Any:
        return self._streams.setdefault(device, Stream())


def write_package(folder: Path, version: str = VERSION, *, body: str | None = None, torch_part: bool = True) -> Path:
    """An installation, to be put on the path: metadata, and modules that hold the double or what a test wants."""
    code = (
        "from tests.doubles import transformer_engine as double\n"
        f"DotProductAttention = double.attention_of({version!r})\n"
        "double.lift()\n"
    )
    (folder / "transformer_engine").mkdir(parents=True)
    (folder / "transformer_engine" / "__init__.py").touch()
    (folder / "transformer_engine" / "pytorch.py").write_text(code if body is None else body)
    for name in ("transformer_engine", *(["transformer_engine_torch"] if torch_part else [])):
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    return folder


PATHS: list[str] = []
"""Installations in use, the last one on the path; an empty one stands for none."""


def use(folder: str) -> None:
    """Put an installation on the path of this process, in place of another."""
    _clear()
    PATHS.append(folder)
    _set()


def drop() -> None:
    """Take it away again, with all that was made of it, and bring back the one before."""
    _clear()
    PATHS.pop()
    _set()


def _clear() -> None:
    sys.path[:] = [entry for entry in sys.path if entry not in PATHS or not entry]
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        del sys.modules[name]
    te_package.attention_module.cache_clear()
    te_package.hardware = te_package.Hardware()
    CALLS.clear()


def _set() -> None:
    if PATHS and PATHS[-1]:
        sys.path.insert(0, PATHS[-1])
    importlib.invalidate_caches()


def lift() -> None:
    te_package.hardware = AnyHardware()


class Call(NamedTuple):
    """One recorded call: of which method, its arguments by name, and the group it was made in."""

    method: str
    given: dict[str, Any]
    group: tuple[Any, ...]


CALLS: list[Call] = []


@lru_cache
def bound_to(version: str, method: str) -> inspect.Signature:
    """A method's signature in a version; defaults are their source text."""
    arguments = ast.parse(f"def f({SIGNATURES[version][method]}): ...").body[0].args  # type: ignore[attr-defined]
    lacking = len(arguments.args) - len(arguments.defaults)
    defaults = [inspect.Parameter.empty] * lacking + [ast.unparse(value) for value in arguments.defaults]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [inspect.Parameter(a.arg, kind, default=d) for a, d in zip(arguments.args, defaults, strict=True)]
    )


def given(version: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What was passed, by name; a TypeError where the method would raise one."""
    return bound_to(version, method).bind(*args, **kwargs).arguments


class Packed(NamedTuple):
    """Documents by the engine's own numbers: real and physical lengths."""

    valid: Tensor
    padded: Tensor

    def rows(self, ranks: range, size: int) -> tuple[Tensor, Tensor]:
        """Document and position of the rows of some ranks, one rank after the other."""
        found = []
        for rank in ranks:
            for document, length in enumerate(self.padded.tolist()):
                chunk = length // (2 * size)
                for c in (rank, 2 * size - 1 - rank):
                    found += [(document, position) for position in range(c * chunk, (c + 1) * chunk)]
        table = torch.tensor(found, dtype=torch.int64).view(-1, 2)
        return table[:, 0], table[:, 1]

    def real(self, document: Tensor, position: Tensor) -> Tensor:
        return position < self.valid[document]


class Seats(NamedTuple):
    """The ranks as the engine counts them."""

    groups: list[Any]
    size: int
    rank: int

    @classmethod
    def of(cls, module: Any) -> Seats:
        group, ranks, comm = module.cp_group, module.cp_global_ranks, module.cp_comm_type
        if group is None:
            return cls([], 1, 0)
        assert isinstance(module.cp_stream, Stream | torch.cuda.Stream), "the engine needs a side stream"
        if comm == "a2a+p2p":
            assert isinstance(group, list), "requires cp_group = [a2a_cp_group, p2p_cp_group]!"
            assert len(group) == 2, "requires cp_group = [a2a_cp_group, p2p_cp_group]!"
        else:
            assert isinstance(group, dist.ProcessGroup), "cp_group must be a process group"
        groups = group if isinstance(group, list) else [group]
        sizes, places = [dist.get_world_size(g) for g in groups], [dist.get_rank(g) for g in groups]
        size, rank = sizes[0], places[0]
        if len(groups) == 2:
            size, rank = sizes[0] * sizes[1], places[1] * sizes[0] + places[0]
            inner, outer = (dist.get_process_group_ranks(g) for g in groups)
            assert inner == ranks[places[1] * sizes[0] : (places[1] + 1) * sizes[0]], "a2a is between neighbours"
            assert outer == ranks[places[0] :: sizes[0]], "p2p is between the ranks with one place inside"
        else:
            assert ranks == dist.get_process_group_ranks(group), "cp_global_ranks must be in the group's order"
        assert ranks[rank] == dist.get_rank()
        return cls(groups, size, rank)

    def gather(self, x: Tensor) -> Tensor:
        """``[P * n, ...]`` of all ranks, in their order; the backward pass adds what the ranks pass back."""
        for group in self.groups:
            x = _Gather.apply(x, group)  # type: ignore[no-untyped-call]
        return x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.rows = group, len(x)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        rank = dist.get_rank(ctx.group)
        return grad[rank * ctx.rows : (rank + 1) * ctx.rows], None


class _Whole(torch.autograd.Function):
    """The gradient of the sinks: all ranks' parts on every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Garbage(torch.autograd.Function):
    """NaN in the gradient of padding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(real)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (real,) = ctx.saved_tensors
        return torch.where(real[:, None, None], grad, float("nan")), None


def window_of(name: str, window: tuple[int, int] | None) -> tuple[float, float]:
    """Tokens to see before and after; as ``check_set_window_size``, but that what is rewritten there is refused."""
    if "causal" in name:
        assert window is None or window == (-1, 0) or (window[0] >= 0 and window[1] == 0), window
        return (float("inf") if window is None or window[0] < 0 else window[0]), 0
    assert window in (None, (-1, -1)) or min(window) >= 0, window  # type: ignore[type-var, operator]
    return (float("inf"),) * 2 if window is None or window[0] < 0 else window


class Double(torch.nn.Module):
    """The common part of all versions."""

    version = VERSION

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        made = given(self.version, "__init__", args, kwargs)
        CALLS.append(Call("__init__", dict(made), ()))
        heads, channels = made["num_attention_heads"], made["kv_channels"]
        self.num_attention_heads, self.tp_size = heads, made.get("tp_size", 1)
        self.num_gqa_groups = made.get("num_gqa_groups") or heads
        assert heads % self.num_gqa_groups == 0
        self.num_gqa_groups_per_partition = self.num_gqa_groups // self.tp_size
        dims = channels if isinstance(channels, tuple) else (channels, channels)
        self.hidden_size_per_attention_head_k, self.hidden_size_per_attention_head_v = dims
        self.softmax_scale = made.get("softmax_scale") or dims[0] ** -0.5
        self.qkv_format, self.attn_mask_type = made.get("qkv_format", "sbhd"), made.get("attn_mask_type", "causal")
        self.window_size, self.attention_dropout = made.get("window_size"), made.get("attention_dropout", 0.0)
        self.attention_type, self.softmax_type = made.get("attention_type", "self"), made.get("softmax_type", "vanilla")
        self.return_max_logit = made.get("return_max_logit", False)
        allowed = os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
        self.deterministic = allowed == "0" or torch.are_deterministic_algorithms_enabled()
        self.softmax_offset: Any = None
        if self.softmax_type == "off-by-one":
            self.softmax_offset = torch.zeros(heads // self.tp_size)
        if self.softmax_type == "learnable":
            self.softmax_offset = torch.nn.Parameter(torch.zeros(heads // self.tp_size))
        for name in ("cp_group", "cp_global_ranks", "cp_stream"):
            setattr(self, name, made.get(name))
        self.cp_comm_type = made.get("cp_comm_type", "p2p")
        if "load_balancing_strategy" in SIGNATURES[self.version]["set_context_parallel_group"]:
            self.load_balancing_strategy = "DUAL_CHUNK_SWAP"

    @property
    def placed(self) -> tuple[Any, ...]:
        """The group, and all that goes with it."""
        names = ("cp_group", "cp_global_ranks", "cp_stream", "cp_comm_type", "load_balancing_strategy")
        return tuple(getattr(self, name, None) for name in names)

    def set_context_parallel_group(self, *args: Any, **kwargs: Any) -> None:
        new = given(self.version, "set_context_parallel_group", args, kwargs)
        assert new.get("load_balancing_strategy", "DUAL_CHUNK_SWAP") == "DUAL_CHUNK_SWAP"
        CALLS.append(Call("set_context_parallel_group", dict(new), self.placed))
        for name in ("cp_group", "cp_global_ranks", "cp_stream"):
            setattr(self, name, new[name])
        self.cp_comm_type = new.get("cp_comm_type", "p2p")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        told = given(self.version, "forward", args, kwargs)
        CALLS.append(Call("forward", dict(told), self.placed))
        q, k, v = (told[f"{name}_layer"] for name in ("query", "key", "value"))
        seats, form = Seats.of(self), told.get("qkv_format") or self.qkv_format
        self._check(told, q, k, v)
        self._check_matrix(told, form, seats)
        queries, keys = (self._documents(told, form, name, x, seats) for name, x in (("q", q), ("kv", k)))
        flat = [_flat(x, form) for x in (q, k, v)]
        out, largest = self._attend(told, flat, (queries, keys), seats)
        out = out.to(q.dtype).flatten(1)
        if form == "bshd":
            out = out.view(*q.shape[:2], -1)
        elif form == "sbhd":
            out = out.view(q.shape[1], q.shape[0], -1).transpose(0, 1).contiguous()
        return (out, largest.to(q.dtype)) if self.return_max_logit else out

    def _check(self, told: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> None:
        assert q.dtype == k.dtype == v.dtype
        assert k.shape[:-1] == v.shape[:-1]
        assert (q.shape[-1], v.shape[-1]) == (
            self.hidden_size_per_attention_head_k,
            self.hidden_size_per_attention_head_v,
        )
        assert k.shape[-2] == self.num_gqa_groups_per_partition
        assert isinstance(told.get("pad_between_seqs"), bool), "left to the identity of two tensors"
        assert told.get("core_attention_bias") is None
        assert self.attention_type == ("cross" if q is not k and told.get("cross") else self.attention_type)

    def _check_matrix(self, told: dict[str, Any], form: str, seats: Seats) -> None:
        """The engine's support matrix: what it would answer with "no backend is available", or fail at."""
        name, comm, version = told["attn_mask_type"], self.cp_comm_type, tuple(map(int, self.version.split(".")[:2]))
        assert form != "thd" or not self.return_max_logit or version >= (2, 11)
        assert form != "thd" or self.softmax_type == "vanilla" or version >= (2, 12)
        if seats.size == 1:
            return
        window = told.get("window_size")
        assert ("padding" in name) == (form == "thd"), "padding goes with thd, and with nothing else"
        assert "bottom_right" not in name
        assert self.softmax_type == "vanilla" or not self.deterministic
        alike = self.hidden_size_per_attention_head_k == self.hidden_size_per_attention_head_v
        assert alike or comm != "all_gather" or version >= (2, 15), "out is as wide as the queries"
        assert window in (None, (-1, 0), (-1, -1)) or comm in ("a2a", "all_gather"), "no windows"
        assert self.softmax_type == "vanilla" or comm == "a2a", "no sinks"
        if form == "thd":
            since = {"p2p": (2, 9), "a2a": (2, 10), "all_gather": (2, 18), "a2a+p2p": (2, 19)}
            assert version >= since[comm], f"thd format is not supported with {comm}"
            assert comm != "all_gather" or told["pad_between_seqs"], "flash-attn 2 may be chosen, and goes wrong"
        parts = {"a2a": seats.size, "a2a+p2p": dist.get_world_size(seats.groups[0])}.get(comm, 1)
        assert self.num_attention_heads % parts == 0, "requires num_heads % cp_size == 0"
        assert self.num_gqa_groups % parts == 0, "requires num_heads % cp_size == 0"

    def _documents(self, told: dict[str, Any], form: str, stream: str, x: Tensor, seats: Seats) -> Packed:
        if form != "thd":
            assert told.get(f"max_seqlen_{stream}") is None, "it would be multiplied by the number of ranks"
            assert told.get(f"cu_seqlens_{stream}") is None
            rows, batch = (x.shape[0], x.shape[1]) if form == "sbhd" else (x.shape[1], x.shape[0])
            assert seats.size == 1 or rows % 2 == 0, "Sequence length per GPU needs to be divisible by 2!"
            lengths = torch.full((batch,), rows * seats.size)
            return Packed(lengths, lengths)
        valid, padded = (told[f"cu_seqlens_{stream}{suffix}"] for suffix in ("", "_padded"))
        for offsets in (valid, padded):
            assert offsets.dtype == torch.int32
            assert offsets.device == x.device
            assert offsets.shape == told["cu_seqlens_q"].shape
        assert told["pad_between_seqs"] or torch.equal(valid, padded)
        valid, padded = valid.long().diff(), padded.long().diff()
        assert (valid <= padded).all()
        assert seats.size == 1 or (padded % (2 * seats.size) == 0).all()
        assert padded.sum() == len(x) * seats.size, "rows that no document owns"
        assert told[f"max_seqlen_{stream}"] >= padded.max(), "max_seqlen must be global"
        assert seats.size == 1 or told[f"max_seqlen_{stream}"] % (2 * seats.size) == 0
        return Packed(valid, padded)

    def _attend(
        self, told: dict[str, Any], flat: list[Tensor], documents: tuple[Packed, Packed], seats: Seats
    ) -> tuple[Tensor, Tensor]:
        (q_document, q_position), (k_document, k_position) = (
            of.rows(ranks, seats.size) if seats.size > 1 else _in_order(of)
            for of, ranks in zip(documents, (range(seats.rank, seats.rank + 1), range(seats.size)), strict=True)
        )
        mine = len(flat[1]) * seats.rank
        q_real, k_real = documents[0].real(q_document, q_position), documents[1].real(k_document, k_position)
        own = k_real[mine : mine + len(flat[1])]
        q, k, v = (_Garbage.apply(x, real).double() for x, real in zip(flat, (q_real, own, own), strict=True))
        k, v = (seats.gather(x) for x in (k, v))
        k, v = (x.masked_fill(~k_real[:, None, None], 0) for x in (k, v))
        left, right = window_of(told["attn_mask_type"], told.get("window_size"))
        distance = k_position[None] - q_position[:, None]
        seen = (q_document[:, None] == k_document[None]) & q_real[:, None] & k_real[None]
        seen &= (distance >= -left) & (distance <= right)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) * self.softmax_scale
        scores = scores.masked_fill(~seen, float("-inf"))
        largest = scores.detach().amax((1, 2))
        for group in seats.groups:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        blind = ~seen.any(1)
        columns = scores.masked_fill(blind[None, :, None], 0)
        if self.softmax_offset is not None:
            sinks = self.softmax_offset
            if seats.groups:
                sinks = _Whole.apply(sinks, seats.groups[0])  # type: ignore[no-untyped-call]
            columns = torch.cat([columns, sinks.double()[:, None, None].expand(-1, len(q), 1)], dim=2)
        weights = columns.softmax(2)[:, :, : len(k)].masked_fill(blind[None, :, None], 0)
        out = torch.einsum("hts,shd->thd", weights, v)
        return out.masked_fill(blind[:, None, None], float("nan")), largest


def _in_order(documents: Packed) -> tuple[Tensor, Tensor]:
    """Documents and positions on one rank."""
    lengths = documents.padded
    return (
        torch.arange(len(lengths)).repeat_interleave(lengths),
        torch.cat([torch.arange(int(length)) for length in lengths] or [torch.empty(0, dtype=torch.int64)]),
    )


def _flat(x: Tensor, form: str) -> Tensor:
    """``[t, heads, d]`` with the rows of the batch one after the other."""
    if form == "thd":
        return x
    return (x.transpose(0, 1) if form == "sbhd" else x).flatten(0, 1)


@lru_cache
def attention_of(version: str) -> type[Double]:
    """``DotProductAttention`` of a version."""
    return type("DotProductAttention", (Double,), {"version": version})
