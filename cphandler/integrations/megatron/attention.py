"""Attention layers of Megatron's layer specs that compute by the micro-batch's handler."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor

from cphandler.config import CPConfig
from cphandler.errors import InvalidValueError, UnsupportedError
from cphandler.handler.contract import ContextParallelHandler
from cphandler.handler.factory import get_cp_handler_cls
from cphandler.integrations.megatron.comm_types import DEFAULT, cp_config
from cphandler.integrations.megatron.parameters import HandlerParams, handler_from_params, handler_of
from cphandler.integrations.megatron.process_groups import context_parallel_group, tensor_parallel_group
from cphandler.integrations.megatron.rope import RotaryRows, rotated
from cphandler.tokens.masks import Causal, Full, Mask, SlidingWindow

CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)
FULL = (AttnMaskType.no_mask, AttnMaskType.padding)
ALSO = {"p2p": "ring", "a2a+p2p": "a2a+ring"}
"""Comm types of handlers that serve what a config calls otherwise: Megatron's p2p is a ring."""


class CPDotProductAttention(MegatronModule):  # type: ignore[misc]
    """Core attention of a layer spec, with Megatron's constructor and forward.

    It computes by the handler that ``packed_seq_params`` carry. Where they carry none, batch and rope are Megatron's
    own (zigzag, lengths that divide by ``2 * cp_size``), and it makes the handler that these imply, for the call.

    Args:
        config: read for head dims, windows, softmax type, dropout, and what :func:`cp_config` reads.
        layer_number: from 1.
        attn_mask_type: the layer's mask where a call names none.
        attention_type: ``"self"`` or ``"cross"``.
        attention_dropout: in place of the config's.
        softmax_scale: in place of ``D ** -0.5``.
        k_channels: head dim of keys where it is not ``kv_channels`` (multi-latent attention).
        v_channels: head dim of values.
        num_splits: of a decode kernel; refused.
        cp_comm_type: this layer's comm type, of batches without a handler; a handler's must agree with it.
        pg_collection: process groups; Megatron's parallel state where it has none.

    Attributes:
        softmax_offset: ``[N / tp]`` logits beside the keys': a parameter for the softmax type ``"learnable"``, zeros
            for ``"off-by-one"``, None for ``"vanilla"``. Its gradient is this rank's part, like all parameters'.
        current_max_attn_logits: ``[N / tp]`` largest logits over the group since somebody set it to None, where the
            config asks for them (``qk_clip``, ``log_max_attention_logit``); no gradient.

    Raises:
        UnsupportedError: ``num_splits``, or a softmax type that is unknown.
    """

    def __init__(  # noqa: PLR0917 (Megatron's signature)
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        num_splits: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        if num_splits is not None:
            raise UnsupportedError("num_splits belongs to a decode kernel", got=num_splits, fix="leave it None")
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self.attention_type = attention_type
        self.attention_dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.key_channels = config.kv_channels if k_channels is None else k_channels
        self.value_channels = config.kv_channels if v_channels is None else v_channels
        self.softmax_scale = softmax_scale
        self.cp_comm_type = cp_comm_type
        self.comm_type = None if cp_comm_type is None else get_cp_handler_cls("local", cp_comm_type).comm_type
        self.cp_group = context_parallel_group(pg_collection) if config.context_parallel_size > 1 else None
        self.tp_group = tensor_parallel_group(pg_collection)
        self.tp_rank = 0 if self.tp_group is None else int(self.tp_group.rank())
        tp_size = 1 if self.tp_group is None else self.tp_group.size()
        self.num_attention_heads_per_partition = config.num_attention_heads // tp_size
        self.window = self._window()
        self.returns_max_logit = bool(config.qk_clip or config.log_max_attention_logit)
        self.current_max_attn_logits: Tensor | None = None
        self._set_softmax_offset()

    def _window(self) -> Mask | None:
        config = self.config
        if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, self.layer_number):
            return None
        left, right = config.window_size
        unbounded = 1 << 40
        return SlidingWindow(unbounded if left < 0 else left, unbounded if right < 0 else right)

    def _set_softmax_offset(self) -> None:
        config, heads = self.config, self.num_attention_heads_per_partition
        kind = config.softmax_type
        if kind not in ("vanilla", "off-by-one", "learnable"):
            raise UnsupportedError("unknown softmax type", got=repr(kind), fix="vanilla, off-by-one or learnable")
        on_host = config.use_cpu_initialization or not torch.cuda.is_available()
        device = torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())
        offset = torch.zeros(heads, device=device, dtype=config.params_dtype)
        if kind == "learnable":
            self.softmax_offset: Any = torch.nn.Parameter(offset)
            if config.perform_initialization:
                config.init_method(self.softmax_offset)
        else:
            self.softmax_offset = None if kind == "vanilla" else offset

    def forward(  # noqa: PLR0917 (Megatron's signature)
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        num_splits: int | None = None,
    ) -> Tensor:
        """Attention of this rank's rows.

        Args:
            query: ``[L, b, N / tp, D]``, packed ``[L, N / tp, D]``.
            key: alike, with G heads.
            value: alike, with head dim D_v.
            attention_mask: None, or, under a causal mask and none, what says the same once more and is not read, as in
                TransformerEngine.
            attn_mask_type: the layer's own where None. A handler with a mask beyond causal and full overrules it.
            attention_bias: refused.
            packed_seq_params: of the micro-batch.
            num_splits: refused.

        Returns:
            ``[L, b, N / tp * D_v]``, packed ``[L, N / tp * D_v]``.

        Raises:
            UnsupportedError: a bias, an arbitrary mask, a mask of padding that is not in the handler, or a number of
                splits.
            InvalidValueError: a handler with another comm type than the config's, or dropout without a seed.
        """
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        self._check(mask_type, attention_mask, attention_bias, num_splits)
        handler = self._handler(query, packed_seq_params)
        self._check_comm_type(handler)
        if isinstance(packed_seq_params, HandlerParams) and packed_seq_params.rotary is not None:
            (q_rows, k_rows), scale = packed_seq_params.rotary, packed_seq_params.mscale
            query = rotated(query, q_rows, self.config, scale, handler, "q")
            key = rotated(key, k_rows, self.config, scale, handler, "kv")
        options: dict[str, Any] = {"layer_number": self.layer_number, "mask": self._mask(mask_type, handler)}
        if self.softmax_scale is not None:
            options["softmax_scale"] = self.softmax_scale
        if self.softmax_offset is not None:
            options["sinks"] = self.softmax_offset.to(query.device)
        options |= self._dropout(packed_seq_params)
        if not self.returns_max_logit:
            out: Tensor = handler.core_attn(None, query, key, value, **options)
            return out.flatten(-2)
        result = handler.core_attn(None, query, key, value, return_max_logit=True, **options)
        self._keep_max_logit(result.max_logit)
        return result.out.flatten(-2)  # type: ignore[no-any-return]

    def _check(self, mask_type: AttnMaskType, mask: object, bias: object, num_splits: object) -> None:
        fix = "the handler's mask= takes any other mask"
        if bias is not None:
            raise UnsupportedError("attention_bias is not served", got="a tensor", fix="leave it None")
        if num_splits is not None:
            raise UnsupportedError("num_splits belongs to a decode kernel", got=num_splits, fix="leave it None")
        if mask_type not in (*CAUSAL, *FULL, AttnMaskType.causal_bottom_right):
            raise UnsupportedError("this mask type is not served", got=mask_type.name, fix=fix)
        if mask is not None and mask_type not in (AttnMaskType.causal, AttnMaskType.no_mask):
            raise UnsupportedError(
                f"an attention_mask beside {mask_type.name} would be read by nobody",
                got="a tensor",
                fix="pass attention_mask=None, and padding as the handler's key_padding_mask or cu_seqlens_q_padded",
            )

    def _handler(self, query: Tensor, packed_seq_params: Any) -> ContextParallelHandler:
        carried = handler_of(packed_seq_params)
        if carried is not None:
            return carried
        size = 1 if self.cp_group is None else self.cp_group.size()
        comm_type = DEFAULT if self.cp_comm_type is None else self.cp_comm_type
        handler_cls = get_cp_handler_cls("local", comm_type) if size > 1 else get_cp_handler_cls("local")
        settings: CPConfig = cp_config(self.config, comm_type, check_consistency="first")
        if packed_seq_params is not None:
            return handler_from_params(
                packed_seq_params, cp_group=self.cp_group, handler_cls=handler_cls, config=settings
            )
        layout = "zigzag" if size > 1 else None
        length = query.shape[0] * size
        return handler_cls(cp_group=self.cp_group, max_seqlen_q=length, layout=layout, config=settings)

    def _check_comm_type(self, handler: ContextParallelHandler) -> None:
        has, asked = handler.comm_type, self.comm_type
        if asked is None or handler.cp_size == 1 or has in (asked, ALSO.get(asked), "layered"):
            return
        raise InvalidValueError(
            "the handler communicates otherwise than the config says",
            got=f"{type(handler).__name__} ({has}) for cp_comm_type={self.cp_comm_type!r}",
            fix="make the handler with cp_handler_cls(config), or leave the config's cp_comm_type None",
        )

    def _mask(self, mask_type: AttnMaskType, handler: ContextParallelHandler) -> Mask:
        """The layer's mask where the batch's is plain, causal or full; else the batch's.

        Raises:
            UnsupportedError: both are special.
        """
        if handler.mask not in (Causal(), Full()):
            if self.window is not None:
                raise UnsupportedError(
                    f"layer {self.layer_number} has a window, and the batch a mask of its own",
                    got=type(handler.mask).__name__,
                    fix="set window_size to None, or make the handler with the causal mask",
                )
            return handler.mask
        if self.window is not None:
            return self.window
        return Full() if mask_type in FULL else Causal()

    def _dropout(self, packed_seq_params: Any) -> dict[str, Any]:
        if not self.training or not self.attention_dropout:
            return {}
        seed = packed_seq_params.dropout_seed if isinstance(packed_seq_params, HandlerParams) else None
        if seed is None:
            raise InvalidValueError(
                "attention dropout needs a seed that all ranks share",
                got=f"attention_dropout={self.attention_dropout} in layer {self.layer_number}, and no seed",
                fix="packed_params(handler, dropout_seed=...), another for each micro-batch; or attention_dropout=0",
            )
        own = seed * 1_000_003 + self.tp_rank  # heads of other tensor-parallel ranks drop other weights
        return {"dropout_p": self.attention_dropout, "dropout_seed": own}

    def _keep_max_logit(self, largest: Tensor) -> None:
        kept, largest = self.current_max_attn_logits, largest.detach()
        self.current_max_attn_logits = largest if kept is None else torch.maximum(kept, largest)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        """The softmax offset, cut over tensor-parallel ranks, as Megatron's own core attention saves it."""
        learnable = self.config.softmax_type == "learnable"
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True) if learnable else {},
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


def _check_training(handler: ContextParallelHandler | None, inference_context: object) -> None:
    if handler is not None and inference_context is not None:
        raise UnsupportedError(
            "a handler belongs to a training batch, and this is a call of an inference engine",
            got=type(inference_context).__name__,
            fix="generate without a handler, on a model whose context_parallel_size is 1",
        )


class CPSelfAttention(SelfAttention):  # type: ignore[misc]
    """Megatron's self attention, whose rope is the handler's.

    The angles of this rank's rows come from the model's rotary embedding (:func:`with_handlers` prepares it) and go to
    core attention with the parameters of the micro-batch, where queries and keys are turned by them. Micro-batches
    without a handler go Megatron's way.
    """

    def forward(  # noqa: PLR0917 (Megatron's signature)
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: Any = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        rotary_pos_cos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        sequence_len_offset: int | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """As ``Attention.forward``; ``rotary_pos_emb`` are the angles of local rows where there is a handler."""
        if isinstance(packed_seq_params, HandlerParams) and packed_seq_params.handler is not None:
            _check_training(packed_seq_params.handler, inference_context)
            if rotary_pos_emb is not None and not self._has_no_rope():
                rows = rotary_pos_emb if isinstance(rotary_pos_emb, tuple) else (rotary_pos_emb, rotary_pos_emb)
                scale = _yarn_get_concentration_factor_from_config(self.config)
                packed_seq_params = packed_seq_params.rotated_by(rows, scale)
            rotary_pos_emb = None
        out: tuple[Tensor, Tensor] = super().forward(
            hidden_states,
            attention_mask,
            key_value_states=key_value_states,
            inference_context=inference_context,
            rotary_pos_emb=rotary_pos_emb,
            rotary_pos_cos=rotary_pos_cos,
            rotary_pos_sin=rotary_pos_sin,
            rotary_pos_cos_sin=rotary_pos_cos_sin,
            attention_bias=attention_bias,
            packed_seq_params=packed_seq_params,
            sequence_len_offset=sequence_len_offset,
            **options,
        )
        return out

    def _has_no_rope(self) -> bool:
        skipped = self.config.no_rope_freq
        return bool(skipped and skipped[self.layer_number - 1])


class CPMLASelfAttention(MLASelfAttention):  # type: ignore[misc]
    """Megatron's multi-latent attention, whose angles are those of this rank's rows.

    It turns queries and keys itself, before core attention. For that one call its rotary embedding is one that knows
    the micro-batch's handler; packed rows go through it as a batch of one, which is what their local rows are.
    """

    rotary_pos_emb: Any

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: Any = None,
        inference_context: Any = None,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        """As Megatron's; micro-batches without a handler go Megatron's way."""
        handler, make = handler_of(packed_seq_params), super().get_query_key_value_tensors
        _check_training(handler, inference_context)
        named: dict[str, Any] = {"inference_context": inference_context, **options}
        if handler is None:
            made: tuple[Tensor, ...] = make(hidden_states, key_value_states, position_ids, packed_seq_params, **named)
            return made
        if self.config.apply_rope_fusion:
            raise UnsupportedError(
                "the fused rope of multi-latent attention cuts its table itself",
                got="apply_rope_fusion=True",
                fix="set it to False",
            )
        own = self.rotary_pos_emb
        self.rotary_pos_emb = RotaryRows(own, handler)
        try:
            made = make(hidden_states, key_value_states, position_ids, None, **named)
        finally:
            self.rotary_pos_emb = own
        return tuple(x.squeeze(1) for x in made) if handler.qkv_format == "thd" else made
