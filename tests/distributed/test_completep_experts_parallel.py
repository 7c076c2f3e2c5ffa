"""Experts, and experts with latent attention and multi-token prediction, on megatron-core's own optimizer, in every
layout: expert, tensor, pipeline, data parallel."""

import dataclasses

import pytest
import torch

from ds_plugin.completep.config import CompletePConfig
from megatron_patches import megatron_on_cpu
from megatron_patches.completep import finish, prepare
from megatron_patches.completep import optimizer as on_megatron
from megatron_patches.models import gpt
from tests.distributed.megatron_training import (
    CLIP,
    LENGTH,
    SIZE,
    STEPS,
    VOCAB,
    group_values,
    optimizer_config,
    scheduler_of,
    train_step,
    wrap,
)
from tests.harness import slow

EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32,
           "moe_shared_expert_intermediate_size": 32, "moe_token_dispatcher_type": "alltoall"}  # fmt: skip
BASE = {"base_width": 16, "base_depth": 2, "base_num_moe_experts": 2, "base_moe_router_topk": 1,
        "base_moe_ffn_hidden_size": 32, "moe": "mue", "residual": "folded"}  # fmt: skip


LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 8,
          "rope_type": "rope", "multi_latent_attention": True, "mtp_num_layers": 1}  # fmt: skip
BASE_LATENT = {"base_q_lora_rank": 16, "base_kv_lora_rank": 8}


def section(latent=False):
    return CompletePConfig.model_validate({"enabled": True, **BASE, **(BASE_LATENT if latent else {})})


def build(*, tensor=1, pipeline=1, expert=1, latent=False, weights=None):
    """This rank's part of the model; ``weights``: of the whole one, by name."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.transformer import MLATransformerConfig

    megatron_on_cpu.enable()
    cfg = gpt.GPTConfig.model_validate(
        {**SIZE, "tensor_parallel": tensor, "bias": False, "position_embedding": "rope" if latent else "learned"}
    )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor, pipeline, expert_model_parallel_size=expert, expert_tensor_parallel_size=tensor
        )
    gpt.initialize_parallel(cfg, 1234)
    sizes = {"pipeline_model_parallel_size": pipeline, "pipeline_dtype": torch.float32}
    sizes |= {"expert_model_parallel_size": expert, "expert_tensor_parallel_size": tensor}
    sizes["sequence_parallel"] = tensor > 1  # which megatron-core wants with experts
    config, given = gpt.transformer_config(cfg, torch.float32), {**EXPERTS, **sizes}
    if latent:
        kept = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}
        config = MLATransformerConfig(**{**kept, **given, **LATENT})
    else:
        config = dataclasses.replace(config, **given)
    spec = gpt_layer_specs.get_gpt_layer_local_spec(EXPERTS["num_moe_experts"], multi_latent_attention=latent)
    config, spec = prepare(config, spec, section(latent))
    stage = {"ignore_virtual": False}
    block = gpt_layer_specs.get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False) if latent else None
    model = GPTModel(
        config, spec, VOCAB, LENGTH, share_embeddings_and_output_weights=True, mtp_block_spec=block,
        position_embedding_type="rope" if latent else "learned_absolute",
        pre_process=parallel_state.is_pipeline_first_stage(**stage),
        post_process=parallel_state.is_pipeline_last_stage(**stage),
    )  # fmt: skip
    finish(model, section(latent))
    if weights is not None:
        load(model, weights)
    return model


@torch.no_grad()
def load(model, weights):
    from megatron.core import parallel_state

    layers, local = model.decoder.layers[0].layer_number - 1, EXPERTS["num_moe_experts"]
    local //= parallel_state.get_expert_model_parallel_world_size()
    experts = local * parallel_state.get_expert_model_parallel_rank()
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        for at, offset in (("layers", layers if parts[0] == "decoder" else 0), ("local_experts", experts)):
            if at in parts:
                parts[parts.index(at) + 1] = str(int(parts[parts.index(at) + 1]) + offset)
        whole = weights["embedding.word_embeddings.weight" if parts[0] == "output_layer" else ".".join(parts)]
        if whole.shape != parameter.shape:
            size, dim = parameter.shape[parameter.partition_dim], parameter.partition_dim
            whole = whole.narrow(dim, parallel_state.get_tensor_model_parallel_rank() * size, size)
        parameter.copy_(whole)


def whole_weights(latent):
    return {name: p.detach().clone() for name, p in build(latent=latent).named_parameters()}


def start(sharded, layout, weights=None):
    ddp = wrap(build(weights=weights, **layout), sharded)
    optimizer = on_megatron.build_optimizer(optimizer_config(sharded), [ddp], section(layout.get("latent", False)))
    return ddp, optimizer, scheduler_of(optimizer)


def curve(layout, weights, sharded):
    run = start(sharded, layout, weights)
    found = [train_step(*run, step) for step in range(STEPS)]
    groups = {group["lr_mult"]: group["max_lr"] for group in run[1].param_groups if group["params"]}
    return [loss for loss, _ in found], [norm for _, norm in found], groups


LAYOUTS = {"one rank": (1, {}), "expert": (2, {"expert": 2}), "tensor": (2, {"tensor": 2}),
           "pipeline": (2, {"pipeline": 2}), "data": (2, {})}  # fmt: skip


@pytest.fixture(scope="module", params=[False, slow(True)], ids=["experts", "latent"])
def reference(workers, request):
    weights = workers(1).run(whole_weights, request.param)[0]
    return request.param, weights, workers(1).run(curve, {"latent": request.param}, weights, False)[0]


@pytest.mark.parametrize("name", ["expert", slow("tensor"), slow("pipeline"), slow("data")])
def test_layouts_agree(workers, reference, name):
    ranks, layout = LAYOUTS[name]
    latent, weights, (losses, norms, groups) = reference
    assert losses[0] - losses[-1] > 0.05 and min(norms) > CLIP
    assert any("kv_up" in name for name in weights) == any("mtp" in name for name in weights) == latent
    assert groups["expert_down"] != groups["branch_out"] != groups["expert_up"]
    for found, found_norms, mine in workers(ranks).run(curve, {**layout, "latent": latent}, weights, True):
        assert found == pytest.approx(losses, abs=1e-5) and found_norms == pytest.approx(norms, rel=1e-4)
        assert mine.items() <= groups.items() or name == "pipeline"


def interrupted(folder, layout):
    """Weights in which six steps differ from three, a checkpoint and three; whether groups are equal."""
    from megatron.core import dist_checkpointing

    completep = section(layout.get("latent", False))
    metadata = {"distrib_optim_sharding_type": "dp_reshardable"}

    def states(ddp, optimizer, scheduler, is_loading):
        model = ddp.module.sharded_state_dict(metadata=metadata)
        held = optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
        common = {"scheduler": scheduler.state_dict(), **on_megatron.checkpoint_state(completep)}
        return {"model": model, "optimizer": held, **common}

    def go_on(run):
        for step in range(3, 6):
            train_step(*run, step)
        return {name: p.detach().clone() for name, p in run[0].module.named_parameters()}, group_values(run[1])

    run = start(True, layout)
    for step in range(3):
        train_step(*run, step)
    dist_checkpointing.save(states(*run, False), folder)
    expected, groups = go_on(run)
    ddp, optimizer, scheduler = start(True, layout)
    state = dist_checkpointing.load(states(ddp, optimizer, scheduler, True), folder)
    on_megatron.check_checkpoint_state(state, completep)
    ddp.module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    found, resumed = go_on((ddp, optimizer, scheduler))
    return [name for name in expected if not torch.equal(found[name], expected[name])], resumed == groups


@pytest.mark.slow
@pytest.mark.parametrize("latent", [False, True], ids=["experts", "latent"])
def test_a_resumed_run_is_the_uninterrupted_one(workers, tmp_path, latent):
    assert workers(2).run(interrupted, str(tmp_path), {"expert": 2, "latent": latent}) == [([], True)] * 2
