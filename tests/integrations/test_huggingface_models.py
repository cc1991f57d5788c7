"""What a parallelized model keeps of a model, what others do around it, and every kind of batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from cphandler import CPConfig, InvalidValueError, RankMismatchError, UnsupportedError
from cphandler.integrations.huggingface import parallelize, unparallelize
from cphandler.testing import RankPool
from cphandler.testing.pool import partition_group
from tests.integrations.families import SMALL, batch_of, build
from tests.integrations.references import (
    check_gradients,
    check_logits,
    check_loss,
    expected,
    gradients_of,
    over_ranks,
)

transformers = pytest.importorskip("transformers")


def all_ranks() -> Any:
    return partition_group([range(4)])


def evaluated(model: Any, **batch: Any) -> Any:
    with torch.no_grad():
        return model.eval()(**batch)


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)


def put_back() -> None:
    """Keys of the state, files saved, whole generation, and undoing it."""
    plain, batch = build("qwen3").eval(), batch_of("plain")
    model = build("qwen3").eval()
    implementation, config = model.config._attn_implementation, model.config.to_json_string()
    keys = list(model.state_dict())
    parallelize(model, all_ranks())
    assert list(model.state_dict()) == keys
    assert model.config.to_json_string() == config
    close(evaluated(model, **batch).logits, evaluated(plain, **batch).logits)
    told = {"max_new_tokens": 5, "do_sample": False, "use_cache": True}
    assert torch.equal(model.generate(batch["input_ids"], **told), plain.generate(batch["input_ids"], **told))
    close(evaluated(model, **batch).logits, evaluated(plain, **batch).logits)
    unparallelize(model)
    assert model.config._attn_implementation == implementation
    assert not [name for module in model.modules() for name in vars(module) if name in ("forward", "_cp_layer")]
    assert torch.equal(evaluated(model, **batch).logits, evaluated(plain, **batch).logits)


def test_a_model_is_itself_but_for_its_forward_pass_and_can_be_put_back(ranks: RankPool) -> None:
    ranks.run(put_back)


def when_logits_are_whole(gather: str) -> None:
    model = parallelize(build("llama"), all_ranks(), gather_logits=gather)  # type: ignore[arg-type]
    batch, wanted = batch_of("plain"), expected("llama", "plain", 0)
    whole = {"always": (True, True), "eval": (False, True), "never": (False, False)}[gather]
    for training, is_whole in zip((True, False), whole, strict=True):
        output = model.train(training)(**batch)
        assert output.logits.shape[1] == (27 if is_whole else 7)
        check_loss(output.loss, wanted.loss)
        if is_whole:
            close(output.logits, wanted.logits)


@pytest.mark.parametrize("gather", ["always", "eval", "never"])
def test_logits_are_whole_when_asked(ranks: RankPool, gather: str) -> None:
    ranks.run(when_logits_are_whole, gather)


def loss_of_whole_logits(gradient: str, layout: str) -> None:
    """A loss that each rank computes from whole logits by itself."""
    backend = "ulysses" if layout == "replicated" else "p2p"
    settings: dict[str, Any] = {"gather_logits": "always", "gradient": gradient, "layout": layout, "backend": backend}
    plain, model = build("llama"), parallelize(build("llama"), all_ranks(), **settings)
    batch = batch_of("packed")
    del batch["labels"]
    for each in (plain, model):
        each(**batch).logits.logsumexp(-1).square().mean().backward()
    check_gradients(over_ranks(gradients_of(model), all_ranks(), gradient), gradients_of(plain))


@pytest.mark.parametrize("layout", ["zigzag", "replicated"])
@pytest.mark.parametrize("gradient", ["mean", "sum"])
def test_gradients_of_whole_logits(ranks: RankPool, gradient: str, layout: str) -> None:
    ranks.run(loss_of_whole_logits, gradient, layout)


def replicated_layout(gradient: str) -> None:
    settings: dict[str, Any] = {"backend": "ulysses", "layout": "replicated", "gradient": gradient}
    model = parallelize(build("mixtral"), all_ranks(), **settings)
    wanted, batch = expected("mixtral", "left", 0), batch_of("left")
    loss = model(**batch).loss
    loss.backward()
    check_loss(loss, wanted.loss)
    check_gradients(over_ranks(gradients_of(model), all_ranks(), gradient), wanted.gradients)


@pytest.mark.parametrize("gradient", ["mean", "sum"])
def test_the_replicated_layout(ranks: RankPool, gradient: str) -> None:
    ranks.run(replicated_layout, gradient)


def two_in_flight() -> None:
    """Two models with two groups, two batches each, forward passes first and backward passes in another order."""
    pair = partition_group([(0, 1), (2, 3)])
    models = {
        "gemma2": (parallelize(build("gemma2"), all_ranks()), all_ranks(), 0),
        "llama": (parallelize(build("llama"), pair, backend="p2p"), pair, dist.get_rank() // 2),
    }
    for model, _, _ in models.values():
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    kinds = ("packed", "right")
    losses = [
        (models[name][0](**batch_of(kind, models[name][2])).loss, name, kind) for kind in kinds for name in models
    ]
    for loss, name, kind in losses:
        check_loss(loss, expected(name, kind, models[name][2]).loss)
    for place in (2, 1, 3, 0):
        losses[place][0].backward()
    for name, (model, group, seed) in models.items():
        both = [expected(name, kind, seed).gradients for kind in kinds]
        check_gradients(over_ranks(gradients_of(model), group), {n: both[0][n] + both[1][n] for n in both[0]})


def test_two_models_and_two_batches_in_flight(ranks: RankPool) -> None:
    ranks.run(two_in_flight)


def other_tokens(settings: dict[str, Any]) -> None:
    """Batches that differ in nothing but their tokens, as ranks get them from a loader that gives each its own."""
    model = parallelize(build("llama"), all_ranks(), **settings)
    ids = batch_of("plain", dist.get_rank())["input_ids"]
    if settings:
        model(ids)
        return
    with pytest.raises(RankMismatchError, match="input_ids"):
        model(ids)


@pytest.mark.parametrize("settings", [{}, {"config": CPConfig(check_consistency="never")}], ids=["always", "never"])
def test_ranks_that_hold_other_tokens_are_told(ranks: RankPool, settings: dict[str, Any]) -> None:
    ranks.run(other_tokens, settings)


def wrapped_again() -> None:
    """What accelerate does for mixed precision: it stands in front of the forward pass, and steps aside."""
    model = parallelize(build("llama"), all_ranks())
    ours = model.forward
    model.forward = torch.autocast("cpu", enabled=False)(ours)
    batch = batch_of("plain")
    check_loss(model(**batch).loss, expected("llama", "plain", 0).loss)
    assert model.generate(batch["input_ids"], max_new_tokens=2, do_sample=False).shape == (2, 29)
    with pytest.raises(InvalidValueError, match="wrapped"):
        unparallelize(model)
    model.forward = ours
    unparallelize(model)
    assert "forward" not in vars(model)


def test_a_forward_pass_that_is_wrapped_again(ranks: RankPool) -> None:
    ranks.run(wrapped_again)


def copied() -> None:
    """A copy has its own forward pass: what changes in one does not change in the other."""
    model = parallelize(build("llama"), all_ranks())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2.0)
    batch, wanted = batch_of("plain"), expected("llama", "plain", 0)
    close(evaluated(model, **batch).logits, wanted.logits)
    close(evaluated(twin, **batch).logits, 2 * wanted.logits)
    unparallelize(model)
    close(evaluated(twin, **batch).logits, 2 * wanted.logits)


def test_a_copy_is_parallelized_too(ranks: RankPool) -> None:
    ranks.run(copied)


def packed_in_other_words(how: str) -> None:
    batch, wanted = batch_of("packed"), expected("llama", "packed", 0)
    starts = (batch["position_ids"].reshape(-1) == 0).nonzero().flatten()
    offsets = torch.cat([starts, torch.tensor([starts.shape[0] and batch["input_ids"].numel()])]).to(torch.int32)
    numbers = (batch["position_ids"] == 0).cumsum(-1).to(torch.int32)
    positions = batch.pop("position_ids")
    more = {
        "offsets": {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 26, "max_length_k": 26},
        "offsets and positions": {"cu_seq_lens_q": offsets, "position_ids": positions},
        "numbers": {"seq_idx": numbers},
        "embeddings": {"position_ids": positions},
        "shifted labels": {"position_ids": positions},
    }[how]
    if how == "shifted labels":
        more["shift_labels"] = torch.nn.functional.pad(batch.pop("labels"), (0, 1), value=-100)[:, 1:]
    model = parallelize(build("llama"), all_ranks(), backend="p2p")
    if how == "embeddings":
        more["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    loss = model(**batch, **more).loss
    loss.backward()
    check_loss(loss, wanted.loss)
    check_gradients(over_ranks(gradients_of(model), all_ranks()), wanted.gradients)


@pytest.mark.parametrize("how", ["offsets", "offsets and positions", "numbers", "embeddings", "shifted labels"])
def test_packed_rows_in_other_words(ranks: RankPool, how: str) -> None:
    ranks.run(packed_in_other_words, how)


def several_axes(packed: bool) -> None:
    """M-RoPE of a text model, with positions of its own on each axis; a fourth axis in front tells documents apart."""
    settings = {**SMALL, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}}
    config = transformers.Qwen2VLTextConfig(**settings, attn_implementation="eager")
    torch.manual_seed(3)
    plain = transformers.Qwen2VLTextModel(config).train()
    model = parallelize(copy.deepcopy(plain), all_ranks(), gather_logits="always")
    batch = batch_of("packed" if packed else "plain")
    text = batch["position_ids"] if packed else torch.arange(27).expand(2, 27)
    axes = torch.stack([text, text // 2, text % 3])
    positions = torch.cat([text.unsqueeze(0), axes]) if packed else axes
    for each in (plain, model):
        hidden = each(input_ids=batch["input_ids"], position_ids=positions, use_cache=False).last_hidden_state
        assert hidden.shape == (2, 27, 32)
        hidden.square().mean().backward()
    with pytest.raises(UnsupportedError, match="no logits"):
        model(**batch)
    check_gradients(over_ranks(gradients_of(model), all_ranks()), gradients_of(plain))


@pytest.mark.parametrize("packed", [True, False])
def test_positions_of_several_axes(ranks: RankPool, packed: bool) -> None:
    ranks.run(several_axes, packed)


ROPES = {
    "dynamic": ("llama", {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}),
    "longrope": (
        "phi3",
        {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
            "rope_theta": 1e4,
            "original_max_position_embeddings": 16,
        },
    ),
}


def rope_by_length(kind: str) -> None:
    """A rank whose own positions are all small takes the frequencies of the whole batch."""
    family, rope = ROPES[kind]
    settings = {"rope_parameters": rope, "max_position_embeddings": 16, "original_max_position_embeddings": 16}
    plain, model = build(family, **settings), build(family, **settings)
    parallelize(model, all_ranks(), layout="contiguous")
    for batch in (batch_of("plain"), batch_of("plain", length=9), batch_of("packed")):
        check_logits(evaluated(model, **batch).logits, evaluated(plain, **batch).logits, batch)


@pytest.mark.parametrize("kind", ROPES)
def test_rope_that_depends_on_the_length_of_the_batch(ranks: RankPool, kind: str) -> None:
    ranks.run(rope_by_length, kind)


def positions_made_from_tokens() -> None:
    config = transformers.OPTConfig(
        vocab_size=61, hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4, dropout=0.0,
        attention_dropout=0.0, word_embed_proj_dim=32, use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    plain = transformers.OPTForCausalLM(config).eval()
    model = parallelize(copy.deepcopy(plain), all_ranks())
    batch = batch_of("left")
    with pytest.raises(InvalidValueError, match=r"embed_positions makes positions"):
        model(**batch)
    mask = batch["attention_mask"]
    batch["position_ids"] = mask.cumsum(1) * mask - 1
    check_logits(evaluated(model, **batch).logits, evaluated(plain, **batch).logits, batch)


def test_positions_that_a_layer_makes_from_tokens_must_be_given(ranks: RankPool) -> None:
    ranks.run(positions_made_from_tokens)


def everything_whole() -> None:
    """Hidden states, router logits, the router's loss and a tuple in place of a named output."""
    batch = batch_of("right")
    plain, model = build("mixtral"), parallelize(build("mixtral"), all_ranks())
    wanted, got = (evaluated(each, **batch, output_hidden_states=True) for each in (plain, model))
    assert list(got) == list(wanted)
    real = batch["attention_mask"].bool()
    for mine, theirs in zip(got.hidden_states, wanted.hidden_states, strict=True):
        close(mine[real], theirs[real])
    for mine, theirs in zip(got.router_logits, wanted.router_logits, strict=True):
        close(mine[real.flatten()], theirs[real.flatten()])
    close(got.aux_loss, wanted.aux_loss)
    in_order = evaluated(model, **batch, return_dict=False)
    assert isinstance(in_order, tuple)
    close(in_order[0], wanted.loss)
    last = evaluated(model, **batch, logits_to_keep=3).logits
    assert torch.equal(last, got.logits[:, -3:])


def test_outputs_are_whole_in_evaluation(ranks: RankPool) -> None:
    ranks.run(everything_whole)


def without_a_label() -> None:
    model = parallelize(build("llama"), all_ranks())
    batch = batch_of("plain")
    output = model(**{**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert output.loss == 0
    output.loss.backward()
    assert all(not gradient.any() for gradient in gradients_of(model).values())
    counted = model(**batch, num_items_in_batch=torch.tensor(104.0)).loss
    check_loss(counted, expected("llama", "plain", 0).loss / 2)


def test_a_batch_without_labels_that_count_and_a_count_of_ones_own(ranks: RankPool) -> None:
    ranks.run(without_a_label)


def one_algorithm_for_each_layer() -> None:
    model = parallelize(build("gemma3"), all_ranks(), backend="local", cp_comm_type=["a2a", "ring"], config=CPConfig())
    wanted, batch = expected("gemma3", "packed", 0), batch_of("packed")
    loss = model(**batch).loss
    loss.backward()
    check_loss(loss, wanted.loss)
    check_gradients(over_ranks(gradients_of(model), all_ranks()), wanted.gradients)


def test_one_algorithm_for_each_layer(ranks: RankPool) -> None:
    ranks.run(one_algorithm_for_each_layer)


def with_adapters(first: str) -> None:
    """LoRA around a parallelized model, or parallelized around LoRA: adapters call ``forward``, not the model."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")

    def made(parallel: str) -> Any:
        torch.manual_seed(5)
        model = build("llama")
        if parallel == "first":
            parallelize(model, all_ranks())
        model = peft.get_peft_model(model, config)
        return parallelize(model, all_ranks()) if parallel == "last" else model

    plain, model, batch = made("never"), made(first), batch_of("packed")
    for each in (plain, model):
        each.train()(**batch).loss.backward()
    check_gradients(over_ranks(gradients_of(model), all_ranks()), gradients_of(plain))
    assert list(model.state_dict()) == list(plain.state_dict())
    told = {"max_new_tokens": 3, "do_sample": False}
    ids = {"input_ids": batch["input_ids"]}
    assert torch.equal(model.eval().generate(**ids, **told), plain.eval().generate(**ids, **told))


def with_prompts() -> None:
    """Rows that a peft model puts in front of each batch, as embeddings with parameters of their own."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    torch.manual_seed(5)
    plain = peft.get_peft_model(build("llama"), config)
    model = parallelize(copy.deepcopy(plain), all_ranks())
    batch = batch_of("right")
    for each in (plain, model):
        each.train()(**batch).loss.backward()
    assert len(gradients_of(model)) == 1
    check_gradients(over_ranks(gradients_of(model), all_ranks()), gradients_of(plain))


def test_prompts(ranks: RankPool) -> None:
    ranks.run(with_prompts)


@pytest.mark.parametrize("first", ["first", "last"])
def test_adapters(ranks: RankPool, first: str) -> None:
    ranks.run(with_adapters, first)


def sharded_parameters(cp_size: int) -> None:
    """A plain loop with fully_shard over data-parallel times context-parallel ranks, beside one rank."""
    mesh = init_device_mesh("cpu", (4 // cp_size, cp_size), mesh_dim_names=("dp", "cp"))
    plain, model = build("qwen3"), parallelize(build("qwen3"), mesh, backend="p2p")
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh._flatten())
    fully_shard(model, mesh=mesh._flatten())
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (plain, model)]
    for step in range(3):
        batches = [batch_of("packed", 2 * step + part) for part in range(4 // cp_size)]
        wanted = torch.stack([plain(**batch).loss for batch in batches]).mean()
        wanted.backward()
        loss = model(**batches[mesh.get_local_rank("dp")]).loss
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        check_loss(total / 4, wanted)
        full = {name: p.grad.full_tensor() for name, p in model.named_parameters() if isinstance(p.grad, DTensor)}
        check_gradients(full, gradients_of(plain))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("cp_size", [2, 4])
def test_sharded_parameters(ranks: RankPool, cp_size: int) -> None:
    ranks.run(sharded_parameters, cp_size)


def group_of_accelerate() -> None:
    """The "cp" dim of the mesh that accelerate's configuration makes."""
    accelerate = pytest.importorskip("accelerate")
    config = accelerate.ParallelismConfig(dp_shard_size=2, cp_size=2)
    model = parallelize(build("llama"), config)
    seed = dist.get_rank() // 2
    check_loss(model(**batch_of("right", seed)).loss, expected("llama", "right", seed).loss)
    with pytest.raises(InvalidValueError, match="cp"):
        parallelize(build("llama"), accelerate.ParallelismConfig(dp_replicate_size=4))


def test_a_parallelism_config_is_taken_as_group(ranks: RankPool) -> None:
    ranks.run(group_of_accelerate)


def compiled(ranks: int) -> None:
    group = None if ranks == 1 else partition_group([(0, 1), (2, 3)])
    plain, model = (build("llama", num_hidden_layers=1) for _ in range(2))
    parallelize(model, group, backend="local" if ranks == 1 else "p2p")
    fast = torch.compile(model, backend="eager")
    for kind in ("packed", "right"):
        batch, wanted = batch_of(kind), plain(**batch_of(kind))
        loss = fast(**batch).loss
        check_loss(loss, wanted.loss)
        for each in (wanted.loss, loss):
            each.backward()
    got = gradients_of(model)
    check_gradients(got if group is None else over_ranks(got, group), gradients_of(plain))


def test_a_compiled_model() -> None:
    compiled(1)


@pytest.mark.slow
def test_a_compiled_model_on_two_ranks(ranks: RankPool) -> None:
    ranks.run(compiled, 2, timeout=300)


def test_packed_documents_see_each_other_in_gpt_oss_alone() -> None:
    """Why its reference is one document at a time; the others of the families keep them apart."""
    for family, leaks in (("gpt_oss", True), ("llama", False)):
        model, batch = build(family).eval(), batch_of("packed")
        together = evaluated(model, **batch).logits
        alone = evaluated(model, input_ids=batch["input_ids"][:, 13:27][:1]).logits
        assert ((together[:1, 13:27] - alone).norm() > 0.1 * alone.norm()) == leaks
