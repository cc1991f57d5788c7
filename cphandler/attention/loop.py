"""The one attention loop: exchange x kernel, forward and backward, each an opaque custom op.

Ring, point-to-point and all-gather differ only in the exchange; Ulysses runs this loop without one. The plan enters the
op as one int64 tensor, so that a compiled model sees data, not a new constant, in every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from cphandler.attention.capture import CAPTURED, check_capture, is_capturing
from cphandler.attention.exchange import Block, Route, Rows, Sums, get_exchange, rows_of
from cphandler.comm.endings import end
from cphandler.errors import UnsupportedError
from cphandler.kernels import AttentionSum, Kernel, RowSum, Softmax, Task, Tasks, get_kernel, select_kernel
from cphandler.kernels.dropout import Dropout, query_states
from cphandler.kernels.kernel import Gradients, Saved
from cphandler.kernels.sums import ALL
from cphandler.kernels.tables import DeviceTables
from cphandler.operators import differentiable, fake, operator
from cphandler.plan.plan import Plan
from cphandler.plan.tasks import OWNER
from cphandler.precision import accumulator_dtype
from cphandler.sharding.heads import repeat_heads
from cphandler.tokens.intervals import Table

P = ParamSpec("P")
T = TypeVar("T")


class AttentionResult(NamedTuple):
    """What ``core_attn`` returns when more than the output is asked for.

    Attributes:
        out: attention output in the query's format.
        lse: natural log-sum-exp of the scaled scores, shape of ``out`` without its last dim, float32 (float64 for
            float64); ``-inf`` where a row sees nothing. None unless asked for.
        max_logit: ``[N]`` largest scaled score of each head over the group; None unless asked for.
    """

    out: Tensor
    lse: Tensor | None
    max_logit: Tensor | None


class Indices(NamedTuple):
    """Which tokens rows hold, for what the plan does not say; int64, on the rows' device.

    Attributes:
        places: ``[S]``: see :class:`Route`; None leaves gathered rows in rank order.
        queries: ``[L]`` global token of each query row; None without dropout.
        keys: ``[owners, M]`` global token of each owner's key rows; None without dropout.
    """

    places: Tensor | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None

    def packed(self) -> tuple[Tensor | None, list[int]]:
        """One tensor, None where there is nothing, and the lengths in it, -1 for what is missing."""
        given = [x.flatten() for x in self if x is not None]
        flat = torch.cat(given) if len(given) > 1 else given[0] if given else None
        return flat, [-1 if x is None else len(x) for x in self]

    @classmethod
    def unpacked(cls, flat: Tensor | None, places: int, queries: int, owners: int) -> Indices:
        """The indices that :meth:`packed` gave."""
        if flat is None:
            return cls()
        in_front = max(0, places)
        of_keys = flat[in_front + queries :]
        return cls(
            flat[:in_front] if places >= 0 else None,
            flat[in_front : in_front + queries],
            of_keys.view(owners, len(of_keys) // owners),
        )


NO_INDICES = Indices()


class OperatorArguments(NamedTuple):
    """Scalars and indices as an operator's last arguments: few, since each costs microseconds in each call."""

    indices: Tensor | None
    floats: list[float]
    integers: list[int]
    names: str


class Scalars(NamedTuple):
    """Everything about one attention call that is no tensor: numbers and names.

    Attributes:
        scale: factor on the scores.
        kernel: name of the kernel (not ``"auto"``); behind :data:`OPEN`, what the call asks for, to be chosen by its
            tensors.
        exchange: how keys reach the queries: ``"ring"``, ``"p2p"``, ``"all_gather"`` or a registered one; empty where
            they are here.
        group_name: the group whose ranks wait for this one: to exchange in, or where keys are here, for what the rank
            makes of its result.
        wire: dtype in which gradients of keys and values travel; empty is the accumulator's.
        softcap: capped scores stay below this, above 0; 0 for none.
        dropout_p: probability that a weight is dropped.
        dropout_seed: the generator's seed.
        layer: the layer's number, so that layers drop different weights.
        first_head: number of the first query head in the whole model.
        tokens: query and key tokens of one row of the batch, for positions that count through all rows.
        repeats: how many consecutive query heads use each key head, where a split of the heads left them uneven; empty
            where all have the same number.
        deterministic: whether two runs must give the same bits.
    """

    scale: float
    kernel: str
    exchange: str = ""
    group_name: str = ""
    wire: str = ""
    softcap: float = 0.0
    dropout_p: float = 0.0
    dropout_seed: int = 0
    layer: int = 0
    first_head: int = 0
    tokens: tuple[int, int] = (0, 0)
    repeats: tuple[int, ...] = ()
    deterministic: bool = False

    def packed(self, indices: Indices = NO_INDICES) -> OperatorArguments:
        """Scalars and indices as an operator's last arguments; what dropout alone asks for goes with it alone."""
        flat, integers = indices.places, [*self.repeats]
        if self.dropout_p:
            flat, lengths = indices.packed()
            integers = [*lengths, self.dropout_seed, self.layer, self.first_head, *self.tokens, *integers]
        bits = "same" if self.deterministic else ""
        names = "\n".join((self.kernel, self.exchange, self.group_name, self.wire, bits))
        return OperatorArguments(flat, [self.scale, self.softcap, self.dropout_p], integers, names)

    @staticmethod
    def group_in(names: Any) -> str:
        """The group's name in the last of :meth:`packed`."""
        return str(names).split("\n")[2]

    @classmethod
    def unpacked(
        cls, floats: list[float], integers: list[int], names: str
    ) -> tuple[Scalars, tuple[int, int, int] | None]:
        """What :meth:`packed` was given, and the lengths of the indices; None without dropout."""
        scale, softcap, dropout_p = floats
        kernel, exchange, group_name, wire, bits = names.split("\n")
        same = bool(bits)
        if not dropout_p:
            repeats = tuple(integers)
            scalars = cls(scale, kernel, exchange, group_name, wire, softcap, repeats=repeats, deterministic=same)
            return scalars, None
        places, queries, owners, seed, layer, head, query_tokens, key_tokens, *uneven = integers
        options, tokens = (softcap, dropout_p, seed, layer, head), (query_tokens, key_tokens)
        scalars = cls(scale, kernel, exchange, group_name, wire, *options, tokens, tuple(uneven), same)
        return scalars, (places, queries, owners)


OPEN = "?"
"""In front of a kernel's name: the operators choose, since a compiler that traces a call knows no kernels."""

OF_DOCUMENTS = "*"
"""Behind it, where launches follow from a packing or from padding: such a call is not for a CUDA graph."""

MOST_MASKS = 32
"""Tables of hidden scores kept with a plan, a few MB each at most; only windows of many widths need more."""


MOST_SETTINGS = 64
"""Of calls that are kept with a plan; only a scale that is learned has more."""


class _Settings(NamedTuple):
    """What follows from the numbers and names of a call.

    Attributes:
        scalars: the numbers and names.
        lengths: of the indices; None without dropout.
        softmax: how scores become weights, but for dropout.
        is_uneven: whether key heads are used by different numbers of query heads.
    """

    scalars: Scalars
    lengths: tuple[int, int, int] | None
    softmax: Softmax
    is_uneven: bool

    def indices(self, flat: Tensor | None) -> Indices:
        """What :meth:`Indices.packed` was given."""
        return Indices(flat) if self.lengths is None else Indices.unpacked(flat, *self.lengths)


class _PlanInUse:
    """A plan that was unpacked, and what is kept with it on devices.

    Attributes:
        version: count of writes to the packed plan.
        plan: the plan.
        rows: row numbers of its messages.
        masks: tables of hidden scores of its tasks.
    """

    def __init__(self, packed: Tensor, version: int) -> None:
        self.version, self.plan = version, Plan.from_tensor(packed)
        self.rows, self.masks = DeviceTables(), DeviceTables(MOST_MASKS)
        self._tasks: dict[Hashable, Tasks] = {}
        self._of_owner: dict[int, tuple[Table, Tasks]] = {}
        self._settings: dict[Hashable, _Settings] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        tables = sum(table.nbytes for kept in (self.rows, self.masks) for table in list(kept))
        return tables + sum(tasks.nbytes for tasks in list(self._tasks.values()))

    def settings(self, floats: list[float], integers: list[int], names: str) -> _Settings:
        """What an operator's last arguments say; kept, but for dropout's, which differ from step to step."""
        key = (names, *floats, *integers)
        known = self._settings.get(key)
        if known is None:
            scalars, lengths = Scalars.unpacked(floats, integers, names)
            same, softcap = scalars.deterministic, scalars.softcap or None
            softmax = Softmax(scalars.scale, softcap, masks=self.masks, deterministic=same)
            known = _Settings(scalars, lengths, softmax, len(set(scalars.repeats)) > 1)
            if not scalars.dropout_p:
                if len(self._settings) >= MOST_SETTINGS:
                    self._settings.clear()
                self._settings[key] = known
        return known

    def tasks(self, block: Block) -> Tasks:
        """The tasks of a block, with what kernels made of them where they are rows of this plan."""
        known = self._of_owner.get(block.owner)
        if known is not None and known[0] is block.tasks:
            return known[1]
        table = block.tasks[:, OWNER + 1 :]
        if not np.may_share_memory(block.tasks, self.plan.tasks):
            return Tasks(table)
        key = block.tasks.__array_interface__["data"][0], len(block.tasks), block.tasks.strides
        tasks = self._tasks.setdefault(key, Tasks(table))
        self._of_owner[block.owner] = block.tasks, tasks
        return tasks

    def fix(self, tasks: Tasks) -> None:
        """Let a block of all of the plan's tasks have others, which are known by what kernels made of them."""
        own = self.plan.tasks
        self._tasks[own.__array_interface__["data"][0], len(own), own.strides] = tasks


_in_use: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Per packed plan, what was made of it; gone with the tensor."""


def _unpacked(packed: Tensor) -> _PlanInUse:
    """The plan in a tensor: unpacked once for all layers and passes, and again where the tensor was written to."""
    if packed.is_inference():  # keeps no count of writes
        return _PlanInUse(packed, 0)
    known: _PlanInUse | None = _in_use.get(packed)
    if known is None or known.version != packed._version:
        known = _in_use[packed] = _PlanInUse(packed, packed._version)
    return known


def fixed_plan(cp_size: int, rank: int, tasks: Tasks) -> Tensor:
    """A packed plan of one block that holds no tasks of its own, for tables that other packings are written into.

    Args:
        cp_size: ranks.
        rank: this one.
        tasks: what kernels find their tables by.
    """
    packed = Plan(cp_size, rank, np.zeros((1, len(Task._fields) + 1), dtype=np.int64)).to_tensor()
    _unpacked(packed).fix(tasks)
    return packed


def bytes_kept_with(packed: Tensor) -> int:
    """Bytes of what is kept with a packed plan: tables on devices, and what kernels made of its tasks."""
    known: _PlanInUse | None = _in_use.get(packed)
    return 0 if known is None else known.nbytes


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan | Tensor,
    scalars: Scalars,
    *,
    sinks: Tensor | None = None,
    indices: Indices = NO_INDICES,
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's query rows over all keys that the plan says they see.

    Args:
        q: ``[B, L, N, D]``, any strides.
        k: ``[B, M, G, D]``; query head n uses key head ``n // (N // G)``, or as ``scalars.repeats`` says.
        v: ``[B, M, G, D_v]``.
        plan: this rank's plan, or the tensor it packs to.
        scalars: the rest.
        sinks: ``[N]``: one more logit per head in every row's softmax, without a value.
        indices: which tokens rows hold.

    Returns:
        ``out [B, L, N, D_v]`` in q's dtype, contiguous, zero where a row sees nothing; ``lse [B, L, N]`` in the
        accumulator's dtype, ``-inf`` there. Both are differentiable; the gradient of the sinks is over these rows.
    """
    packed = plan.to_tensor() if isinstance(plan, Plan) else plan
    out, lse = _forward(q, k, v, sinks, packed, *scalars.packed(indices))
    return out, lse


def max_logit(q: Tensor, k: Tensor, plan: Tensor, scalars: Scalars, indices: Indices = NO_INDICES) -> Tensor:
    """``[N]`` largest scaled score of each head over this rank's queries: the keys travel once more.

    Args:
        q: ``[B, L, N, D]``.
        k: ``[B, M, G, D]``.
        plan: this rank's plan, packed.
        scalars: scale, kernel, exchange and group count.
        indices: the places count.
    """
    last = scalars._replace(dropout_p=0.0).packed(indices)  # a score is the same whether its weight is dropped or not
    result: Tensor = largest_scores(q.detach(), k.detach(), plan, *last)
    return result


def _kernel(scalars: Scalars, q: Tensor, k: Tensor, v: Tensor) -> Kernel:
    """The kernel of a call: the one that is named, or the one that the tensors come to."""
    name = scalars.kernel
    if name[0] == OPEN:
        softcap, dropout = bool(scalars.softcap), bool(scalars.dropout_p)
        asked = {"deterministic": scalars.deterministic, "softcap": softcap, "dropout": dropout}
        name = name.removeprefix(OPEN)
        if name.startswith(OF_DOCUMENTS):
            name = name.removeprefix(OF_DOCUMENTS)
            if q.device.type == CAPTURED and is_capturing():
                check_capture("a compiled block", scalars.exchange, packed=True, padded=False)
        name = select_kernel(name, q, k, v, **asked)
    return get_kernel(name, q.device.type)


def _blocks(
    in_use: _PlanInUse, scalars: Scalars, places: Tensor | None, rows: Rows, home: Sums = ()
) -> Iterable[Block]:
    """The blocks of an exchange, forward, or backward where there are sums; one block without an exchange."""
    if not scalars.exchange:
        return [Block(in_use.plan.tasks, rows, home, 0)]
    wire = getattr(torch, scalars.wire) if scalars.wire else None
    route = Route(in_use.plan, scalars.group_name, in_use.rows, places, wire)
    exchange = get_exchange(scalars.exchange)()
    return exchange.backward(route, rows, home) if home else exchange.forward(route, rows)


@contextmanager
def _per_head(grads: Sums, repeats: tuple[int, ...]) -> Iterator[Sums]:
    """Sums for key heads repeated as often as they are used, added up at the end."""
    repeated = tuple(RowSum((*x.shape[:2], sum(repeats), x.shape[-1]), x.dtype, x.device) for x in grads)
    yield repeated
    for total, part in zip(grads, repeated, strict=True):
        total.add(ALL, torch.stack([copies.sum(2) for copies in part.total().split(repeats, dim=2)], dim=2))


class _Weighting:
    """How scores become weights, some of which are dropped, block by block."""

    def __init__(self, settings: _Settings, q: Tensor, queries: Tensor, keys: Tensor, in_use: _PlanInUse) -> None:
        scalars, self._softmax, self._rows = settings.scalars, settings.softmax, in_use.rows
        per_row, keys_per_row = (max(1, count) for count in scalars.tokens)
        rows = torch.arange(q.shape[0], device=q.device).unsqueeze(1) + queries // per_row
        heads = torch.arange(scalars.first_head, scalars.first_head + q.shape[2], device=q.device)
        self._states = query_states(scalars.dropout_seed, scalars.layer, rows, queries % per_row, heads)
        self._p, self._keys = scalars.dropout_p, keys % keys_per_row

    def of(self, block: Block) -> Softmax:
        """For a block's keys."""
        keys = self._keys[block.owner]
        if block.runs is not None:
            keys = keys[rows_of(block.runs, keys.device, self._rows)]
        return self._softmax._replace(dropout=Dropout(self._p, self._states, keys))


def _weighting(settings: _Settings, q: Tensor, indices: Indices, in_use: _PlanInUse) -> _Weighting | None:
    """What says how each block's scores become weights; None where all blocks have the settings' softmax."""
    _, queries, keys = indices
    if not settings.scalars.dropout_p or queries is None or keys is None:
        return None
    return _Weighting(settings, q, queries, keys, in_use)


def _guarded(operation: Callable[P, T]) -> Callable[P, T]:
    """Autocast reaches into operators; dtypes are settled here, and scores must stay in the accumulator's.

    Where an operator raises on one rank, the others wait for what it has not sent: they are told.
    """

    @wraps(operation)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        first: Any = args[0]
        kind = first.device.type
        try:
            if not torch.is_autocast_enabled(kind):
                return operation(*args, **kwargs)
            with torch.autocast(kind, enabled=False):
                return operation(*args, **kwargs)
        except BaseException:
            end(Scalars.group_in(args[-1]))
            raise

    return run


@operator("attention_forward")
@_guarded
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    plan: Tensor,
    indices: Tensor | None,
    floats: list[float],
    integers: list[int],
    names: str,
) -> tuple[Tensor, Tensor]:
    """See :func:`attention`."""
    in_use, result = _unpacked(plan), AttentionSum(q, v.shape[-1])
    settings = in_use.settings(floats, integers, names)
    scalars, where = settings.scalars, settings.indices(indices)
    compute, weighting, heads = _kernel(scalars, q, k, v), _weighting(settings, q, where, in_use), q.shape[2]
    for block in _blocks(in_use, scalars, where.places, (k, v)):
        block_keys, block_values = block.rows
        if settings.is_uneven:
            block_keys, block_values = (repeat_heads(x, scalars.repeats) for x in block.rows)
        if heads:  # a rank without heads only takes part in the exchange
            softmax = settings.softmax if weighting is None else weighting.of(block)
            compute.forward(q, block_keys, block_values, in_use.tasks(block), softmax, result)
        del block, block_keys, block_values  # before the exchange makes room for the next one
    return result.total(sinks)


def _sink_gradient(sinks: Tensor, saved: Saved) -> Tensor:
    """``[N]``: the sink's weight has no value, so that what it takes from a row's other weights is all it changes."""
    dtype = saved.lse.dtype
    change = -(saved.out.to(dtype) * saved.grad_out.to(dtype)).sum(-1)
    if saved.grad_lse is not None:
        change = change + saved.grad_lse
    seen = saved.lse > float("-inf")
    weights = torch.exp(torch.where(seen, sinks.to(dtype) - saved.lse, float("-inf")))
    return (weights * torch.where(seen, change, 0.0)).sum((0, 1)).to(sinks.dtype)


@operator("attention_backward")
@_guarded
def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    plan: Tensor,
    indices: Tensor | None,
    floats: list[float],
    integers: list[int],
    names: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and sinks from the merged ``out`` and ``lse``; keys travel again, their gradients home."""
    in_use = _unpacked(plan)
    settings = in_use.settings(floats, integers, names)
    scalars, where = settings.scalars, settings.indices(indices)
    dq, dk, dv = RowSum.like(q), RowSum.like(k), RowSum.like(v)
    compute, weighting, heads = _kernel(scalars, q, k, v), _weighting(settings, q, where, in_use), q.shape[2]
    saved = Saved(q, out, lse, grad_out, grad_lse)
    for block in _blocks(in_use, scalars, where.places, (k, v), (dk, dv)):
        block_keys, block_values = block.rows
        tasks, softmax = in_use.tasks(block), settings.softmax if weighting is None else weighting.of(block)
        if heads and settings.is_uneven:
            block_keys, block_values = (repeat_heads(x, scalars.repeats) for x in block.rows)
            with _per_head(block.grads, scalars.repeats) as sums:
                compute.backward(saved, block_keys, block_values, tasks, softmax, Gradients(dq, *sums))
            del sums
        elif heads:
            compute.backward(saved, block_keys, block_values, tasks, softmax, Gradients(dq, *block.grads))
        del block, block_keys, block_values  # before the exchange makes room for the next one
    dsinks = q.new_empty(0) if sinks is None else _sink_gradient(sinks, saved)
    return dq.total(q.dtype), dk.total(k.dtype), dv.total(v.dtype), dsinks


@operator("largest_scores")
@_guarded
def largest_scores(
    q: Tensor,
    k: Tensor,
    plan: Tensor,
    indices: Tensor | None,
    floats: list[float],
    integers: list[int],
    names: str,
) -> Tensor:
    """See :func:`max_logit`."""
    in_use = _unpacked(plan)
    settings = in_use.settings(floats, integers, names)
    scalars, where = settings.scalars, settings.indices(indices)
    result = q.new_full((q.shape[2],), float("-inf"), dtype=accumulator_dtype(q.dtype))
    compute, softmax = _kernel(scalars, q, k, k), Softmax(scalars.scale, masks=in_use.masks)
    for block in _blocks(in_use, scalars, where.places, (k,)):
        if q.shape[2]:
            compute.max_logit(q, repeat_heads(block.rows[0], scalars.repeats), in_use.tasks(block), softmax, result)
        del block
    return result


@fake(attention_forward)
def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty(q.shape[:-1], dtype=accumulator_dtype(q.dtype))


@fake(attention_backward)
def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


@fake(largest_scores)
def _fake_largest(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty((q.shape[2],), dtype=accumulator_dtype(q.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, plan, indices, *ctx.scalars = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, sinks, *output, plan, indices)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, sinks, out, *rest = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    dq, dk, dv, dsinks = _gradients(grad_out, grad_lse, q, k, v, sinks, out, *rest, *ctx.scalars)
    return (dq, dk, dv, None if sinks is None else dsinks, *[None] * 5)


_forward = differentiable(attention_forward, _backward, _save)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _twice(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    raise UnsupportedError(
        "gradients of core_attn cannot be differentiated again",
        fix="pass a callable attn_mod of differentiable operations where whole documents come to a rank (local, "
        "ulysses), or keep attention out of what is differentiated twice",
    )


_gradients = differentiable(attention_backward, _twice, _save_nothing)
