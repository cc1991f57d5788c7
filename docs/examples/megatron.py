"""Model, batch and loss for Megatron-Core with a handler for each micro-batch; all else stays Megatron's."""

from functools import partial

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from cphandler.integrations import megatron as cp


def model_provider(config, **arguments):
    """The model, of Megatron's own layers."""
    return cp.with_handlers(GPTModel(config, cp.handler_spec(get_gpt_layer_local_spec()), **arguments))


def get_batch(iterator, config):
    """A packed batch of whole documents, the same on every context-parallel rank, cut to this rank's rows."""
    batch = dict(next(iterator))
    handler = cp.cp_handler_cls(config)(
        cp_group=parallel_state.get_context_parallel_group(),
        qkv_format="thd",
        cu_seqlens_q=batch.pop("cu_seqlens"),
        config=cp.cp_config(config),
    )
    return cp.get_batch_on_this_cp_rank(batch, cp_handler=handler), cp.packed_params(handler)


def forward_step(iterator, model):
    """Losses of this rank's tokens, and the function that makes the schedule's loss of them."""
    batch, params = get_batch(iterator, model.config)
    tokens, positions, labels, mask = (batch[key] for key in ("tokens", "position_ids", "labels", "loss_mask"))
    losses = model(tokens, positions, None, labels=labels, loss_mask=mask, packed_seq_params=params)
    return losses, partial(cp.loss_func, mask, params, model.config)
