"""A model of transformers whose batches all ranks share; torchrun --nproc-per-node 2 docs/examples/huggingface.py."""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

from cphandler.integrations.huggingface import parallelize

device = "cuda" if torch.cuda.is_available() else "cpu"
mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("cp",))
torch.manual_seed(0)  # the same model and the same batch on every rank
config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = parallelize(LlamaForCausalLM(config).to(device), mesh, backend="ring", gradient="sum")
ids = torch.randint(0, 256, (1, 500), device=device)
positions = torch.cat([torch.arange(350), torch.arange(150)]).unsqueeze(0).to(device)  # two documents in a row
loss = model(input_ids=ids, position_ids=positions, labels=ids.masked_fill(positions == 0, -100)).loss
loss.backward()  # the value is the whole batch's, the gradient this rank's part
for parameter in model.parameters():
    dist.all_reduce(parameter.grad)
print(f"rank {dist.get_rank()}: loss {loss.item():.6f}")
