"""A handler from a layout: a backend adds ``core_attn``, and even that is a few lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cphandler.attention.call import AttentionCall, TensorRules, batch_first, from_batch_first
from cphandler.attention.loop import AttentionResult, Indices, Terms, attention, max_logit
from cphandler.attention.options import AttentionOptions, OptionalArguments
from cphandler.attention.plans import Site
from cphandler.comm import collectives
from cphandler.errors import InvalidValueError, UnsupportedError
from cphandler.handler.contract import LayoutSource
from cphandler.handler.rows_handler import RowsHandler
from cphandler.kernels import get_kernel
from cphandler.sharding.shard import device_copy
from cphandler.tokens.metadata import StreamMetadata
from cphandler.tracing import eager


class LayoutHandler(RowsHandler):
    """Derives all of the contract but ``core_attn`` from a layout, and has the parts that ``core_attn`` is made of.

    Arguments are those of :class:`ContextParallelHandler`. A subclass sets ``comm_type``, ``default_layout`` and
    ``capabilities``. Its ``core_attn`` checks the call (:meth:`attention_call`), computes (:meth:`attend` or
    :meth:`attend_whole`), and gives the result back (:meth:`result`).
    """

    def prepare(self, layout: LayoutSource) -> None:
        """See :meth:`RowsHandler.prepare`."""
        self._sites: dict[tuple[str, bool], Site] = {}
        super().prepare(layout)

    def shared_as(self, handler_cls: type[LayoutHandler]) -> LayoutHandler:
        """Another class's handler over this one's batch: the same streams, group and check, sites of its own.

        Raises:
            UnsupportedError: what that class does not serve.
        """
        other = object.__new__(handler_cls)
        other.__dict__.update(self.__dict__)
        other._sites = {}
        if "ulysses_degree" not in handler_cls.capabilities.features:  # meant for other layers
            other.config = self.config.model_copy(update={"ulysses_degree": None})
        other.admit()
        other.join()
        return other

    @eager
    def attention_call(
        self,
        attn_mod: Any,
        tensors: tuple[Tensor, Tensor, Tensor],
        options: OptionalArguments,
        *,
        exchange: str,
        check: Callable[[AttentionCall], None] | None = None,
    ) -> AttentionCall:
        """Check a ``core_attn`` call and, on the first exchange, that every rank makes the same one.

        Args:
            attn_mod: see :meth:`ContextParallelHandler.core_attn`.
            tensors: local query, key and value.
            options: keyword options.
            exchange: how keys will reach the queries: the name of an exchange, or ``"whole"`` where the algorithm
                brings whole documents to this rank.
            check: what else the backend demands.
        """
        batch = None if self.kv_padded_rows is None else self.kv_padded_rows.num_documents
        rows = self.num_local_tokens, self.kv_num_local_tokens
        rules = TensorRules(self.qkv_format, rows, batch, self.explain_length)

        def checked() -> AttentionCall:
            call = AttentionCall.of(
                attn_mod,
                tensors,
                options=AttentionOptions.checked(options),
                rules=rules,
                mask=self.mask,
                config=self.config,
                exchange=exchange if self.cp_size > 1 or exchange == "whole" else "none",
            )
            self._check_capabilities(call)
            if check is not None:
                check(call)
            if call.module is None:
                self.site(call).plan(call.mask)
            return call

        return self._agreed("core_attn", checked, lambda call: f"{call.describe()}, {self._shown_mask(call.mask)}")

    def _check_capabilities(self, call: AttentionCall) -> None:
        features = list(call.options.features)
        if call.q.shape[-1] != call.v.shape[-1]:
            features.append("value_head_dim")
        if call.module is not None:
            features.append("own_attention")
        if call.wants_max_logit:
            features.append("return_max_logit")
        self.capabilities.require(type(self).__name__, *features)
        if call.module is None:
            return
        told = [*call.options.features, *(["key_padding_mask"] if self.kv_padded_rows is not None else [])]
        if told:
            raise UnsupportedError(
                f"a callable attn_mod is not told of {', '.join(told)}",
                fix="let the callable know by itself, or pass attn_mod=None or a CoreAttention",
            )

    def site(self, call: AttentionCall) -> Site:
        """Where a call's attention takes place; made once per batch."""
        ordered = get_kernel(call.kernel, call.q.device.type).takes_prefix
        key = call.exchange, ordered
        if key not in self._sites:
            self._sites[key] = self.make_site(*key)
        return self._sites[key]

    def make_site(self, exchange: str, ordered: bool) -> Site:
        """The site of an exchange: all tokens for ``"whole"``, else this handler's own layouts.

        Args:
            exchange: as in :meth:`attention_call`.
            ordered: whether the kernel is better off with gathered keys in global order.
        """
        if exchange == "whole":
            return Site.whole(self._pair)
        group_name = "" if exchange == "none" else self._group.name
        layouts = self.layout, self.kv_layout
        return Site(self._pair, layouts, self.cp_rank, exchange, group_name, ordered=ordered)

    def attend(self, call: AttentionCall) -> AttentionResult:
        """Built-in attention of the call's queries over all keys they may see.

        Returns:
            ``out [B, L, N, D_v]``, ``lse [B, L, N]`` and, where it is wanted, ``max_logit [N]`` of these queries.
        """
        q, k, v = call.q, call.k, call.v
        batch, rows, heads = q.shape[:3]
        if self.kv_padded_rows is not None:  # rows of a batch with padding are laid end to end
            q, k, v = (x.reshape(1, batch * x.shape[1], *x.shape[2:]) for x in (q, k, v))
        plan, terms, indices = self._prepared(call, q.device)
        out, lse = attention(q, k, v, plan, terms, sinks=call.sinks, indices=indices)
        largest = max_logit(q, k, plan, terms, indices) if call.wants_max_logit else None
        return AttentionResult(out.view(batch, rows, heads, out.shape[-1]), lse.view(batch, rows, heads), largest)

    @eager
    def _prepared(self, call: AttentionCall, device: torch.device) -> tuple[Tensor, Terms, Indices]:
        """The packed plan of a call and what else the operator takes."""
        site = self.site(call)
        terms = self._terms(call, site)
        positions = site.positions(device) if terms.dropout_p else ()
        return site.plan(call.mask), terms, Indices(site.places(device), *positions)

    def _terms(self, call: AttentionCall, site: Site) -> Terms:
        options = call.options
        return Terms(
            scale=call.scale,
            kernel=call.kernel,
            exchange=site.exchange,
            group_name=site.group_name,
            wire=self.config.gradient_wire_dtype or "",
            softcap=float(options.softcap or 0.0),
            dropout_p=float(options.dropout_p or 0.0),
            dropout_seed=options.dropout_seed or 0,
            layer=options.layer_number or 0,
            first_head=call.first_head,
            tokens=site.tokens,
            repeats=call.repeats,
        )

    def attend_whole(self, call: AttentionCall) -> AttentionResult:
        """Attention over whole documents held on this rank, by the built-in kernels or the caller's module.

        Args:
            call: a call whose tensors hold all tokens in global order, ``[B, S, heads, D]``; see
                :meth:`AttentionCall.replaced`.

        Returns:
            ``out [B, S, heads, D_v]`` and, but from a module, ``lse [B, S, heads]``.
        """
        if call.module is None:
            return self.attend(call)
        return AttentionResult(self._call_module(call), None, None)

    def result(self, call: AttentionCall, result: AttentionResult) -> Tensor | AttentionResult:
        """What ``core_attn`` returns, from local rows of all heads; settles the largest score over the group.

        Args:
            call: the call.
            result: ``out [B, L, N, D_v]``, ``lse [B, L, N]``, ``max_logit [N]`` of what this rank has seen.
        """
        if call.wants_max_logit and result.max_logit is not None:
            largest = result.max_logit
            if self.cp_size > 1:
                largest = collectives.maximum(largest, self._group.name)
            if call.settings is not None:
                call.settings.record(largest)
            result = result._replace(max_logit=largest)
        return call.arranged(result)

    def _call_module(self, call: AttentionCall) -> Tensor:
        """Give whole documents to the caller's module, padding removed."""
        queries = StreamMetadata(self.documents, self.padded_rows, self.max_seqlen_q)
        keys = StreamMetadata(self.kv_documents, self.kv_padded_rows, self.max_seqlen_kv)
        streams = (queries, keys, keys)
        tensors = [
            _without_padding(from_batch_first(x, self.qkv_format), stream)
            for x, stream in zip((call.q, call.k, call.v), streams, strict=True)
        ]
        packed = self.qkv_format == "thd"
        out = call.module(
            *tensors,
            cu_seqlens_q=_valid_offsets(queries, call.q.device) if packed else None,
            cu_seqlens_kv=_valid_offsets(keys, call.q.device) if packed else None,
            max_seqlen_q=_longest(queries) if packed else self.max_seqlen_q,
            max_seqlen_kv=_longest(keys) if packed else self.max_seqlen_kv,
            mask=call.mask,
        )
        expected = (*tensors[0].shape[:-1], call.v.shape[-1])
        if not isinstance(out, Tensor) or out.shape != expected:
            got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise InvalidValueError(
                "attn_mod must return [..., heads, D_v] in qkv_format", got=got, fix=f"expected {list(expected)}"
            )
        if self.documents.has_padding:
            kept = device_copy(self.documents.valid_tokens, out.device)
            out = out.new_zeros(self.documents.num_tokens, *out.shape[1:]).index_copy(0, kept, out)
        return batch_first(out, self.qkv_format)


def _without_padding(x: Tensor, stream: StreamMetadata) -> Tensor:
    """The rows of real tokens."""
    if not stream.documents.has_padding:
        return x
    return x.index_select(0, device_copy(stream.documents.valid_tokens, x.device))


def _valid_offsets(stream: StreamMetadata, device: torch.device) -> Tensor:
    """``cu_seqlens`` of the real tokens."""
    return torch.from_numpy(stream.documents.valid_offsets).to(device, torch.int32)


def _longest(stream: StreamMetadata) -> int:
    """Real tokens of the longest document."""
    offsets = stream.documents.valid_offsets
    return int((offsets[1:] - offsets[:-1]).max(initial=0))
