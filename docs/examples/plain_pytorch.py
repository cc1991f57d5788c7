"""Loss and gradients of any model that calls ``scaled_dot_product_attention``, on packed documents."""

import torch.distributed as dist

from cphandler import get_batch_on_this_cp_rank, get_cp_handler_cls, language_model_loss, pack_documents
from cphandler.integrations.sdpa import context_parallel


def train_step(model, documents, group):
    """Gradients and loss of the whole batch, on every rank alike; ``documents`` are the same on every rank."""
    batch = pack_documents(documents)
    handler = get_cp_handler_cls("ring")(cp_group=group, qkv_format="thd", cu_seqlens_q=batch["cu_seqlens"])
    rows = {key: batch[key][None] for key in ("tokens", "labels", "position_ids")}
    local = get_batch_on_this_cp_rank(rows, cp_handler=handler)
    with context_parallel(model, handler):
        logits = model(local["tokens"], local["position_ids"])
        loss = language_model_loss(logits, local["labels"], handler)
        loss.backward()
    for parameter in model.parameters():  # FSDP2 and DDP do this, and average: loss * loss_scale("mean", handler)
        dist.all_reduce(parameter.grad, group=group)
    return loss.detach()
