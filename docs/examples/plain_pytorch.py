"""Training of any model that calls ``scaled_dot_product_attention``, on packed documents.

python docs/examples/plain_pytorch.py                              # one rank
torchrun --nproc-per-node 2 docs/examples/plain_pytorch.py         # two: the same losses
"""

import torch
import torch.distributed as dist
from torch import nn

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
    if group is not None:  # FSDP2 and DDP do this, and average: loss * loss_scale("mean", handler)
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad, group=group)
    return loss.detach()


class TinyDecoder(nn.Module):
    """One layer; it knows nothing of ranks."""

    def __init__(self, vocabulary=64, heads=4, head_dim=16, longest=64):
        super().__init__()
        self.heads = heads
        self.tokens, self.positions = (nn.Embedding(n, heads * head_dim) for n in (vocabulary, longest))
        self.qkv = nn.Linear(heads * head_dim, 3 * heads * head_dim)
        self.head = nn.Linear(heads * head_dim, vocabulary)

    def forward(self, tokens, position_ids):
        """Logits of local rows."""
        x = self.tokens(tokens) + self.positions(position_ids)
        q, k, v = self.qkv(x).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).chunk(3, dim=1)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + out.transpose(1, 2).flatten(2))


def main():
    """Losses of five steps."""
    group = None
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        group = dist.group.WORLD
    torch.manual_seed(0)
    model, documents = TinyDecoder(), [torch.randint(0, 64, (n,)) for n in (17, 3, 1, 30)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        loss = train_step(model, documents, group)
        optimizer.step()
        if group is None or dist.get_rank() == 0:
            print(f"{loss:.6f}")
    if group is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
