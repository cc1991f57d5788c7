"""Attention by MagiAttention: a checked call folded into its one format, and what it leaves out put right.

What the package gets wrong by the contract, and is not used or mended here: its rolls and positions ignore documents,
its log-sum-exp has a gradient that is dropped without a word, and pad rows are computed with.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from cphandler.attention.attention import Attention, Host, batch_features
from cphandler.attention.call import AttentionCall
from cphandler.attention.capabilities import Capabilities
from cphandler.attention.loop import AttentionResult
from cphandler.comm.consistency import Consistency, shown
from cphandler.engines.magi_keys import Heads, MagiKeys
from cphandler.engines.magi_package import MagiPackage, magi_package
from cphandler.engines.slices import overlapping, slices_of, thin
from cphandler.errors import UnsupportedError
from cphandler.layouts.placement import stream_bands
from cphandler.precision import accumulator_dtype
from cphandler.tensors import device_copy
from cphandler.tokens.bands import Q0, Q1
from cphandler.tokens.intervals import Table, frozen
from cphandler.tokens.masks import Mask, is_value

if TYPE_CHECKING:
    from cphandler.comm.groups import CPGroup
    from cphandler.config import CPConfig
    from cphandler.tokens.metadata import StreamMetadata

DEVICES = ("cuda",)
"""Where MagiAttention computes."""

HALF = (torch.float16, torch.bfloat16)

MOST_HEADS = 128
"""Query heads of a call that asks for the largest score."""


class MagiHost(Host, Protocol):
    """A handler that holds keys."""

    keys_of_engine: MagiKeys


class Request(NamedTuple):
    """What a handler knows of its batch before rows are dealt out.

    Attributes:
        ranks: the group.
        queries: the query stream.
        keys: the key stream.
        mask: who sees whom.
        config: settings.
        device: where facts are.
    """

    ranks: CPGroup
    queries: StreamMetadata
    keys: StreamMetadata
    mask: Mask
    config: CPConfig
    device: torch.device


def make_keys(who: str, table: Capabilities, request: Request, heads: Heads, settings: Any) -> MagiKeys:
    """The keys of a batch, once all that can be refused has been, and all ranks are known to hold the same batch.

    Args:
        who: the handler class's name.
        table: what it serves.
        request: the batch.
        heads: query heads, key heads and head dim that rows are dealt out for.
        settings: a ``DistAttnConfig``, or None.

    Raises:
        InvalidValueError: a mask that does not fit the documents, or a group that cannot communicate.
        MissingPackageError: see :func:`magi_package`.
        RankMismatchError: the ranks' batches differ.
        UnsupportedError: what is not served.
    """
    queries, config = request.queries, request.config
    table.require(who, *batch_features(queries, request.keys, config))
    _check_surroundings(who, request)
    slices = checked_slices(request.mask, stream_bands(request.mask, queries, request.keys))
    package = magi_package()
    facts = {"call": "make a key", "handler": who, "cu_seqlens_q": shown(queries.documents.offsets)}
    facts |= {"slices": shown(slices), "heads": str(heads), "settings": repr(settings)}
    consistency = Consistency(request.ranks, config)
    if consistency.pending:
        consistency.settle(facts)
    keys = MagiKeys(package, request.ranks, queries.documents.num_tokens, slices, heads, settings)
    check_kernel(keys, slices, request.device)
    if config.deterministic and not keys.deterministic:
        raise UnsupportedError(
            f"{who} computes deterministically where MagiAttention does",
            got="CPConfig.deterministic",
            fix="set MAGI_ATTENTION_DETERMINISTIC_MODE=1 on all ranks before the first handler is made",
        )
    return keys


def _check_surroundings(who: str, request: Request) -> None:
    if request.config.kernel != "auto":
        raise UnsupportedError(
            f"{who} brings its own kernel",
            got=f"CPConfig.kernel {request.config.kernel!r}",
            fix="leave it at 'auto'; MAGI_ATTENTION_KERNEL_BACKEND chooses among MagiAttention's",
        )
    if not request.ranks.name:
        raise UnsupportedError(
            f"{who} needs a process group, with one rank too",
            got="cp_group=None" if request.ranks.source is None else type(request.ranks.source).__name__,
            fix="pass torch.distributed.new_group([rank]) for one rank, or use the local backend",
        )
    if request.device.type not in DEVICES:
        raise UnsupportedError(
            f"{who} computes on {' or '.join(DEVICES)}",
            got=f"a batch and a group on {request.device.type}",
            fix="pass cu_seqlens on the GPU, or a group over NCCL; the local backends compute on a CPU",
        )


def checked_slices(mask: Mask, bands: Table) -> Table:
    """A mask's slices.

    Args:
        mask: for errors.
        bands: its bands over the batch.

    Raises:
        UnsupportedError: bands that do not become slices with rectangles apart from each other.
    """
    slices = slices_of(bands)
    crossed = overlapping(slices)
    if crossed.any():
        raise UnsupportedError(
            f"MagiAttention takes slices whose rectangles do not meet, and {type(mask).__name__} gives others",
            got=f"{int(crossed.sum())} of {len(slices)} slices that meet others",
            fix="use the p2p backend, which takes any bands",
        )
    return frozen(slices)


def check_kernel(keys: MagiKeys, slices: Table, device: torch.device) -> None:
    """Refuse what the engine's kernel computes wrongly, or not on this device.

    Raises:
        UnsupportedError: a diagonal under FFA, or FFA on another device than a Hopper GPU.
    """
    if keys.kernel != "ffa":
        return
    if thin(slices).any():
        raise UnsupportedError(
            "MagiAttention's kernel 'ffa' computes slices of one key for each of several rows wrongly",
            got=f"{int(thin(slices).sum())} of them, as SlidingWindow(0) makes",
            fix="use the p2p backend, or a window of two tokens at least",
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
        raise UnsupportedError(
            "MagiAttention's kernel 'ffa' runs on Hopper GPUs (sm90)",
            got=f"sm{''.join(map(str, torch.cuda.get_device_capability(device)))}",
            fix="set MAGI_ATTENTION_KERNEL_BACKEND=fa4 where its FlashAttention-4 is built, or use the p2p backend",
        )


class MagiAttention(Attention):
    """Calls the package over the rows that it has dealt out; a batch of one mask becomes heads."""

    host: MagiHost
    engine = "MagiAttention"

    def set_up(self) -> None:
        """Hold the package and the keys; see :meth:`Attention.set_up`."""
        self._package: MagiPackage = magi_package()
        self._keys = self.host.keys_of_engine

    def __deepcopy__(self, memo: dict[int, Any]) -> MagiAttention:
        """Over the copied handler, whose keys are the same."""
        made = object.__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(self.__dict__)
        made.host = memo.get(id(self.host), self.host)
        return made

    def plan(self, mask: Mask) -> None:
        """Slices only: a key is made by all ranks together, in a call; see :meth:`Attention.plan`."""
        self.slices(mask)

    def slices(self, mask: Mask) -> Table:
        """A mask's slices over the batch, kept.

        Raises:
            InvalidValueError: a mask that does not fit the documents.
            UnsupportedError: a mask that MagiAttention, or its kernel, does not take.
        """
        pair = self.host.shards

        def made() -> Table:
            slices = checked_slices(mask, pair.visible_bands(mask))
            check_kernel(self._keys, slices, self.host.device)
            return slices

        return pair.memo_of(mask).get(("slices", self._keys.kernel, mask), made)

    def plans(self, call: AttentionCall) -> Any:
        """Itself: :meth:`plan` is all that the check of a call asks for; see :meth:`Attention.plans`."""
        del call
        return self

    def check_call(self, call: AttentionCall) -> None:
        """See :meth:`Attention.check_call`."""
        kernel, batch, dim = self._keys.kernel, call.q.shape[0], call.q.shape[-1]
        if kernel in ("ffa", "fa4"):
            if call.q.dtype not in HALF:
                raise UnsupportedError(
                    f"MagiAttention's kernel {kernel!r} computes in float16 and bfloat16", got=call.q.dtype, fix="cast"
                )
            if dim > 128 or dim % 8:
                raise UnsupportedError(
                    f"MagiAttention's kernel {kernel!r} takes head dims up to 128 that are multiples of 8",
                    got=dim,
                    fix="use the p2p backend, which takes any",
                )
        extras = [
            word for word, asked in (("sinks", call.sinks is not None), ("max_logit", call.wants_max_logit)) if asked
        ]
        if extras and (kernel == "fa4" or self._keys.flattens_heads):
            raise UnsupportedError(
                f"MagiAttention as it is set has no {' and no '.join(extras)}",
                got="MAGI_ATTENTION_FLATTEN_HEAD_GROUPS=1" if self._keys.flattens_heads else "the kernel 'fa4'",
                fix="unset it, or leave them out",
            )
        if call.wants_max_logit and batch * call.q.shape[2] > MOST_HEADS:
            raise UnsupportedError(
                f"MagiAttention tells the largest score of {MOST_HEADS} heads at most",
                got=f"{call.q.shape[2]} heads in a batch of {batch}",
                fix="use qkv_format='thd', or leave return_max_logit out",
            )
        reduced = os.environ.get("MAGI_ATTENTION_DSINK_ALL_REDUCE_OP", "none")
        if call.sinks is not None and reduced != "none":
            raise UnsupportedError(
                "the gradient of sinks must be each rank's part, and the environment has it summed",
                got=f"MAGI_ATTENTION_DSINK_ALL_REDUCE_OP={reduced}",
                fix="unset it: sum the gradient over the group, as those of other replicated parameters",
            )

    def compute(self, call: AttentionCall) -> AttentionResult:
        """See :meth:`Attention.compute`."""
        batch, rows, heads, dim = call.q.shape
        seen = self._seen(call.mask, call.q.device)
        q = _folded(call.q, seen, self._keys.rows)
        valid = self.host.shards.queries.tensor("valid", call.q.device)
        k, v = (_folded(x, valid, self._keys.rows) for x in (call.k, call.v))
        sinks = None if call.sinks is None else call.sinks.to(accumulator_dtype(q.dtype)).expand(batch, heads)
        sinks = None if sinks is None else sinks.reshape(1, batch * heads)
        if batch:
            out, lse, largest = self._attention(call, (q, k, v), sinks)
        else:
            out, lse, largest = q + (k.sum() + v.sum()), q.sum(-1), q.new_empty(0)
        out = out[:rows].masked_fill(~seen[:, None, None], 0.0)
        lse = lse[:rows].to(accumulator_dtype(out.dtype)).masked_fill(~seen[:, None], float("-inf"))
        if largest is not None:
            largest = self._largest(call, largest.view(batch, heads))
        return AttentionResult(
            out.view(rows, batch, heads, dim).transpose(0, 1), lse.view(rows, batch, heads).transpose(0, 1), largest
        )

    def _attention(
        self, call: AttentionCall, tensors: tuple[Tensor, Tensor, Tensor], sinks: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The package's attention over its own rows; the log-sum-exp with its gradient."""
        q, k, v = (_Once.apply(x) for x in tensors)  # type: ignore[no-untyped-call]
        key, scale = self._key(call.mask, (q.shape[1], k.shape[1], q.shape[2])), call.scale

        def attend(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, *, largest: bool = False) -> Any:
            return self._package.calc_attn(
                q=q, k=k, v=v, key=key, sink=sink, softmax_scale=scale, return_max_logits=largest
            )

        out, meta = attend(q, k, v, sinks, largest=call.wants_max_logit)
        self.host.watched(out)
        lse = meta.lse.detach()
        if call.return_lse:
            lse = _LogSumExp.apply(q, k, sinks, lse, scale, lambda *x: attend(*x)[0])  # type: ignore[no-untyped-call]
        return out, lse, meta.max_logits if call.wants_max_logit else None

    def _key(self, mask: Mask, heads: Heads) -> Any:
        slices = self.slices(mask)
        if mask == self.host.mask:
            return self._keys.key(None, slices, heads)
        return self._keys.key(mask if is_value(mask) else slices.tobytes(), slices, heads)

    def _seen(self, mask: Mask, device: torch.device) -> Tensor:
        """``[L]`` bool: whether a local row sees anything."""
        shard = self.host.shards.queries

        def seen() -> Tensor:
            slices, tokens = self.slices(mask), shard.tokens
            change = np.zeros(shard.layout.num_tokens + 1, dtype=np.int64)
            np.add.at(change, slices[:, Q0], 1)
            np.add.at(change, slices[:, Q1], -1)
            sees = np.append(change.cumsum()[:-1] > 0, False)  # the last one is what a pad row sees
            return device_copy(sees[np.where(tokens >= 0, tokens, -1)], device)

        return self.host.shards.memo_of(mask).on(("sees", mask), device, seen)

    def _largest(self, call: AttentionCall, largest: Tensor) -> Tensor:
        """``[N]`` largest score of each head over the batch; ``-inf`` where nobody sees anything."""
        if not len(largest) or not len(self.slices(call.mask)):
            return largest.new_full((call.q.shape[2],), float("-inf"))
        return largest.amax(0).to(accumulator_dtype(call.q.dtype))


def _folded(x: Tensor, kept: Tensor, rows: int) -> Tensor:
    """``[rows, B * heads, D]`` of ``[B, L, heads, D]``: zeros where rows are not kept, and after the last of them."""
    folded = x.transpose(0, 1).flatten(1, 2).masked_fill(~kept[:, None, None], 0.0)
    return pad(folded, (0, 0, 0, 0, 0, rows - len(folded))).contiguous()


class _LogSumExp(torch.autograd.Function):
    """The log-sum-exp with the gradient that the package leaves out.

    With P the weights and g its gradient, ``dq = scale * g * (P k)`` and ``dk = scale * P^T (g * q)``: attention that
    has the keys for values, and the gradient of those values. It is computed, and keys travel, in a backward pass that
    the log-sum-exp takes part in, and in no other.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        sinks: Tensor | None,
        lse: Tensor,
        scale: float,
        attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(q, k, sinks, lse)
        ctx.scale, ctx.attend = scale, attend
        return lse.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, sinks, lse = ctx.saved_tensors
        grad = torch.where(torch.isfinite(lse), grad, 0.0)
        pulled = (ctx.scale * grad).unsqueeze(-1)
        with torch.enable_grad():
            values = k.detach().requires_grad_()
            sink = None if sinks is None else sinks.detach()
            mean = ctx.attend(q.detach(), k.detach(), values, sink)
            (dk,) = torch.autograd.grad(mean, values, (pulled * q).to(mean.dtype))
        dsinks = None if sinks is None else (torch.exp(sinks - lse) * grad).sum(0, keepdim=True).to(sinks.dtype)
        return (pulled * mean.detach()).to(q.dtype), dk, dsinks, None, None, None


class _Once(torch.autograd.Function):
    """An input itself; its gradient may be looked at, and is not differentiated again: the package would give zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return grad
        return _Twice.apply(grad, *ctx.saved_tensors)  # type: ignore[no-untyped-call]


class _Twice(torch.autograd.Function):
    """A gradient whose own gradient is refused."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor) -> Tensor:
        del ctx, x
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise UnsupportedError(
            "gradients of MagiAttention cannot be differentiated again",
            fix="pass a callable attn_mod where a backend takes one (local, ulysses), or keep attention out of what is "
            "differentiated twice",
        )
