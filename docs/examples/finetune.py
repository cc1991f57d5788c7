"""The Trainer of transformers on packed documents: a random tiny Llama and the sources of Python's standard library.

    torchrun --nproc-per-node 4 docs/examples/finetune.py --cp-size 2

Ranks of a context-parallel group share each batch, groups see different ones. With your own model and data, replace
``tiny_llama`` by ``AutoModelForCausalLM.from_pretrained(...)`` and ``packed_rows`` by rows that have the same keys.
"""

import argparse
import os
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from cphandler.demo.corpus import packed_batches
from cphandler.integrations.huggingface import Trainer, parallelize


def tiny_llama() -> LlamaForCausalLM:
    """A Llama over bytes, the same on every rank."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))


def packed_rows(rows: int, tokens: int) -> list[dict[str, Tensor]]:
    """Rows of several documents each; labels are not shifted, and -100 where a document begins and in padding."""
    found = []
    for batch in packed_batches(rows, tokens):
        predicted = torch.cat([torch.zeros(1), batch["loss_mask"][:-1]]).bool()
        labels = batch["tokens"].masked_fill(~predicted, -100)
        found.append({"input_ids": batch["tokens"], "position_ids": batch["position_ids"], "labels": labels})
    return found


def stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch without an attention_mask: position_ids that restart tell documents apart."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def finetune(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Train, and return what was logged."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (world // arguments.cp_size, arguments.cp_size)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("dp", "cp")) if world > 1 else None
    model = parallelize(tiny_llama(), mesh, backend=arguments.backend)
    settings = TrainingArguments(
        output_dir=arguments.output,
        max_steps=arguments.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=device == "cpu",
    )
    rows = packed_rows(2 * arguments.steps * shape[0] + 2, arguments.tokens)
    trainer = Trainer(model, settings, train_dataset=rows[2:], eval_dataset=rows[:2], data_collator=stacked)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    return list(trainer.state.log_history)


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cp-size", type=int, default=int(os.environ.get("WORLD_SIZE", "1")), help="ranks of a group")
    parser.add_argument("--backend", default="ring", help="how keys travel: ring, p2p, ulysses, usp, all_gather")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--output", default="finetuned", help="folder of the trained model")
    return parser.parse_args(words)


if __name__ == "__main__":
    finetune(parsed())
