"""Decoders of transformers with CompleteP on DeepSpeed: built whole or inside zero.Init, against plain torch."""

import pytest
import torch
import torch.distributed as dist

import ds_plugin
from ds_plugin.completep import clip_grad_norm_, optimizer_groups, prepare_decoder

VOCAB, LENGTH, BATCH, STEPS, CLIP = 40, 12, 4, 4, 0.2
SECTION = {"enabled": True, "base_width": 8, "base_depth": 1, "base_head_dim": 8}
ADAM = {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-6}


def build(family):
    import transformers

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCAB}
    if family == "Llama":
        config = transformers.LlamaConfig(intermediate_size=48, num_key_value_heads=1, **shape)
        return transformers.LlamaForCausalLM(config)
    no_dropout = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=LENGTH, **no_dropout, **shape))


def loss_of(model, step, mine=slice(None)):
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))[mine]
    return model(input_ids=tokens, labels=tokens).loss


def plain(family):
    model = build(family)
    prepare_decoder(model, SECTION, seed=3)
    optimizer, losses, norms = torch.optim.AdamW(optimizer_groups(model, **ADAM)), [], []
    for step in range(STEPS):
        loss = loss_of(model, step)
        optimizer.zero_grad()
        loss.backward()
        norms.append(clip_grad_norm_(model, CLIP).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def on_deepspeed(family, zero, init):
    import deepspeed

    rank, share = dist.get_rank(), BATCH // dist.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": share,
        "steps_per_print": 10**9,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": zero, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {**ADAM, "torch_adam": True}},
    }
    torch.manual_seed(rank)  # the init does not hang on it
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=init):
        model = build(family)
    prepare_decoder(model, SECTION, seed=3)
    assert init == any(p.numel() == 0 for p in model.parameters())
    engine = ds_plugin.initialize(model=model, config={**config, "completep": SECTION})[0]
    losses, norms = [], []
    for step in range(STEPS):
        loss = loss_of(engine, step, slice(rank * share, (rank + 1) * share))
        engine.backward(loss)
        engine.step()
        norms.append(float(engine.get_global_grad_norm()))
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses, norms


def _cases():
    found = {}
    for family in ("Llama", "GPT2"):
        stages = {"1": on_deepspeed(family, 1, False), "3 by Init": on_deepspeed(family, 3, True)}
        found[family] = {"plain": plain(family), **stages}
    return found


def test_a_decoder_trains_on_deepspeed_as_in_plain_torch(workers):
    for found in workers(2).run(_cases):
        for family, results in found.items():
            losses, norms = results.pop("plain")
            assert max(norms) > CLIP
            for case, (theirs, their_norms) in results.items():
                assert theirs == pytest.approx(losses, rel=0, abs=2e-6), (family, case)
                assert their_norms == pytest.approx(norms, rel=1e-3), (family, case)
