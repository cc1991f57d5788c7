"""The law of attention on one random call: forward, log-sum-exp and all gradients equal the dense reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cphandler.attention.loop import AttentionResult
from cphandler.attention.options import CoreAttention
from cphandler.handler.contract import ContextParallelHandler
from cphandler.testing.cases import Case, Data, draw, kept_weights, make_handler, spread, valid_tokens, visible
from cphandler.testing.fuzz.cases import Call
from cphandler.testing.fuzz.rounding import assert_near
from cphandler.testing.fuzz.tensors import Rows, laid, rubbish
from cphandler.testing.laws import OwnAttention, same_bits
from cphandler.testing.reference import dense_gradients, dense_magnitudes, dense_max_logit
from cphandler.testing.tolerance import assert_close

INFINITE = float("-inf")


class Attending:
    """One call on one rank: what goes in, what comes out, and what should.

    Everything that communicates happens in :meth:`forward` and :meth:`backward`; :meth:`complaints` compares.

    Args:
        call: what is asked.
        handler: of this rank.
        rows: this rank's rows of the query and the key stream.
        seed: of this group's data, and of dropout.
    """

    def __init__(self, call: Call, handler: ContextParallelHandler, rows: dict[str, Rows], seed: int) -> None:
        self.call, self.handler, self.rows, self.seed = call, handler, rows, seed
        self.case: Case = call.case
        self.data: Data = draw(self.case, seed)
        self.generator = torch.Generator().manual_seed(seed)
        named = {"q": self.data.query, "k": self.data.key, "v": self.data.value}
        self.inputs = {
            name: self.local(x, "q" if name == "q" else "kv").requires_grad_(name in call.needs)
            for name, x in named.items()
        }
        self.before = {name: x.detach().clone() for name, x in self.inputs.items()}
        self.sinks = self.data.sinks.clone().requires_grad_(bool(call.needs))
        self.grads = {"out": self.local(self.data.grad_out, "q"), "lse": self.local(self.data.grad_lse, "q")}
        self.core = self._core()
        self.outputs: dict[str, Tensor] = {}
        self.repeated: Tensor | None = None
        self.sinks_grad: Tensor | None = None

    def local(self, x: Tensor, stream: str) -> Tensor:
        """This rank's rows; padding and pad rows hold garbage."""
        rows, valid = self.rows[stream], valid_tokens(self.case, stream)
        garbage, dim = rubbish(x, self.call.garbage, self.generator), self.handler.seq_dim
        poisoned = torch.where(spread(valid, x, self.case.qkv_format), x, garbage)
        fill = float("nan" if self.call.garbage == "mixed" else self.call.garbage)
        return laid(rows.take(poisoned, dim, fill), self.call.strides).detach()

    def _core(self) -> CoreAttention | None:
        """The options as a module's."""
        if not self.call.as_module:
            return None
        case = self.case
        core = CoreAttention(softmax_scale=case.scale, softcap=case.softcap, dropout_p=case.dropout_p)
        core.record_max_logit = case.max_logit
        if case.sinks:
            core.sinks = torch.nn.Parameter(self.sinks.detach().clone(), requires_grad=self.sinks.requires_grad)
            self.sinks = core.sinks
        return core

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the call."""
        case = self.case
        asked: dict[str, Any] = {"mask": case.mask} if self.call.is_own_mask else {}
        asked |= {"return_lse": case.lse, "return_max_logit": case.max_logit, "layer_number": case.layer_number}
        asked |= {"dropout_seed": self.seed} if case.dropout_p else {}
        if self.core is None:
            asked |= {"softmax_scale": case.scale, "softcap": case.softcap, "dropout_p": case.dropout_p or None}
            asked |= {"sinks": self.sinks} if case.sinks else {}
        return {name: value for name, value in asked.items() if value is not None and value is not False}

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """The call; what it gives in the order out, lse, max_logit."""
        module = OwnAttention(self.case.qkv_format) if self.case.own else self.core
        returned = self.handler.core_attn(module, q, k, v, **self.options())
        if self.case.lse or self.case.max_logit:
            assert isinstance(returned, AttentionResult), f"{type(returned).__name__} in place of AttentionResult"
            return tuple(x for x in returned if x is not None)
        assert isinstance(returned, Tensor), f"{type(returned).__name__} in place of Tensor"
        return (returned,)

    def forward(self) -> None:
        """Call ``core_attn``, under activation checkpointing if asked, and once more if asked."""
        inputs = tuple(self.inputs.values())
        if self.call.is_inference:
            with torch.inference_mode():
                results = self.compute(*inputs)
        elif self.call.checkpoint:
            results = checkpoint(self.compute, *inputs, use_reentrant=self.call.checkpoint == "reentrant")
        else:
            results = self.compute(*inputs)
        wanted = {"out": True, "lse": self.case.lse, "max_logit": self.case.max_logit}
        names = [name for name, asked in wanted.items() if asked]
        assert len(names) == len(results), f"{len(results)} results in place of {', '.join(names)}"
        self.outputs = dict(zip(names, results, strict=True))
        if self.call.again:
            with torch.no_grad():
                self.repeated = self.compute(*inputs)[0]

    def roots(self) -> list[tuple[Tensor, Tensor]]:
        """What backward starts from, each with its gradient."""
        if not self.call.needs:
            return []
        names = ["out", "lse"] if self.call.roots == "both" else [self.call.roots]
        return [(self.outputs[name], self.grads[name]) for name in names]

    def after_backward(self) -> None:
        """Sum each rank's part of the sinks' gradient; on the replicated layout every rank has all of it."""
        if not (self.case.sinks and self.call.needs):
            return
        grad = torch.zeros_like(self.sinks) if self.sinks.grad is None else self.sinks.grad
        self.sinks_grad = grad.double()
        if self.handler.sequence_sharded:
            dist.all_reduce(self.sinks_grad, group=self.handler.group)

    @cached_property
    def seen(self) -> Tensor:
        """Who sees whom."""
        return visible(self.case)

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """What the reference takes beside tensors."""
        case = self.case
        return {
            "qkv_format": case.qkv_format,
            "softmax_scale": case.scale,
            "softcap": case.softcap,
            "sinks": self.data.sinks if case.sinks else None,
            "keep": kept_weights(case, self.seed),
            "dropout_p": case.dropout_p,
        }

    @cached_property
    def incoming(self) -> tuple[Tensor, Tensor | None]:
        """Global gradients of output and log-sum-exp."""
        out = self.data.grad_out if self.call.roots != "lse" else torch.zeros_like(self.data.grad_out)
        return out, self.data.grad_lse if self.call.roots != "out" else None

    @cached_property
    def magnitudes(self) -> dict[str, Tensor]:
        """The reference's sums over absolute values; only made where something is off."""
        tensors = self.data.query, self.data.key, self.data.value
        return dense_magnitudes(tensors, self.seen, *self.incoming, **self.arguments)

    @cached_property
    def on_one_rank(self) -> dict[str, Tensor]:
        """Results and gradients of one rank with the same kernel; only made where 16 bits are off."""
        case = replace(self.case, backend="local", cp_size=1, layout=None, config=())
        handler = make_handler(case, None, **({"cross_attention": True} if case.is_cross else {}))
        rows = {"q": Rows(handler.layout, 0), "kv": Rows(handler.kv_layout, 0)}
        call = replace(self.call, case=case, is_own_mask=False, checkpoint="", again=False)
        beside = Attending(call, handler, rows, self.seed)
        beside.forward()
        if roots := beside.roots():
            torch.autograd.backward([root for root, _ in roots], [grad for _, grad in roots])
        leaves = {**beside.inputs, "sinks": beside.sinks}
        grads = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}
        return {name: x.detach() for name, x in {**beside.outputs, **grads}.items()}

    def complaints(self) -> Iterator[str]:
        """What is wrong, in words."""
        for check in (self._check_results, self._check_gradients, self._check_rest):
            try:
                check()
            except AssertionError as error:
                yield str(error)

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        """Global results and gradients by the definition."""
        tensors = self.data.query, self.data.key, self.data.value
        out, lse, grads = dense_gradients(tensors, self.seen, *self.incoming, **self.arguments)
        names = ("q", "k", "v", "sinks")
        return {"out": out, "lse": lse, **dict(zip(names, grads, strict=False))}

    def _check_results(self) -> None:
        dim, out = self.handler.seq_dim, self.outputs["out"]
        assert out.dtype == self.case.dtype, f"out: dtype {out.dtype}"
        self._compare("out", out, self.rows["q"].take(self.expected["out"], dim))
        self._check_zero("out", out, "q")
        if self.case.lse:
            lse, wanted = self.outputs["lse"], self.rows["q"].take(self.expected["lse"], dim, INFINITE)
            exact = torch.float64 if self.case.dtype == torch.float64 else torch.float32
            assert lse.dtype == exact, f"lse: dtype {lse.dtype}"
            self._compare("lse", lse, wanted)
        if self.case.max_logit:
            largest = dense_max_logit(
                self.data.query.double(),
                self.data.key.double(),
                self.seen,
                qkv_format=self.case.qkv_format,
                softmax_scale=self.case.scale,
            )
            assert_close(self.outputs["max_logit"], largest, dtype=self.case.dtype, what="max_logit")
            if self.core is not None:
                recorded = self.core.current_max_attn_logits
                assert recorded is not None, "max_logit: not recorded"
                assert_close(recorded, largest, dtype=self.case.dtype, what="recorded max_logit")

    def _check_gradients(self) -> None:
        for name, x in self.inputs.items():
            if name not in self.call.needs:
                assert x.grad is None, f"d{name}: a gradient that nobody asked for"
                continue
            stream = "q" if name == "q" else "kv"
            wanted = self.rows[stream].take(self.expected[name], self.handler.seq_dim)
            grad = torch.zeros_like(x) if x.grad is None else x.grad
            assert grad.dtype == self.case.dtype, f"d{name}: dtype {grad.dtype}"
            self._compare(f"d{name}", grad, wanted)
            self._check_zero(f"d{name}", grad, stream)
        if self.sinks_grad is not None:
            assert_near(
                self.sinks_grad,
                self.expected["sinks"],
                self.case.dtype,
                "gradient of the sinks",
                magnitude=lambda: self.magnitudes["sinks"],
                alone=lambda: self.on_one_rank["sinks"],
            )

    def _check_rest(self) -> None:
        for name, x in self.inputs.items():
            assert same_bits(x.detach(), self.before[name]), f"{name}: the caller's tensor was changed"
        if self.repeated is not None:
            assert same_bits(self.outputs["out"].detach(), self.repeated), "out: a second call has other bits"

    def _compare(self, name: str, actual: Tensor, wanted: Tensor) -> None:
        rows, dim = self.rows["q" if name in ("out", "lse", "dq") else "kv"], self.handler.seq_dim
        key = name.removeprefix("d")
        assert_near(
            actual,
            wanted,
            self.case.dtype,
            name,
            magnitude=lambda: rows.take(self.magnitudes[key], dim),
            alone=lambda: rows.take(self.on_one_rank[key], dim, INFINITE if key == "lse" else 0),
        )

    def _check_zero(self, name: str, x: Tensor, stream: str) -> None:
        valid = self.handler.valid_mask if stream == "q" else self.handler.kv_valid_mask
        padding = x.detach()[~spread(valid, x, self.case.qkv_format)]
        assert bool((padding == 0).all()), f"{name}: padding rows are not zero"
