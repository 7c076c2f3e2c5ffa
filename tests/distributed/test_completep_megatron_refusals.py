"""What CompleteP refuses on megatron-core's optimizer, before a step is taken."""

import gc
import types

import pytest
import torch

from ds_plugin.core.errors import ConfigError, PluginError, StateError
from megatron_patches.completep import optimizer as ours
from tests.distributed.megatron_training import (
    DECAY,
    LR,
    build,
    forward,
    micro_batch,
    optimizer_config,
    scheduler_of,
    section,
    train_step,
    wrap,
)


def refusals():
    messages = {}

    def attempt(name, function):
        try:
            function()
        except PluginError as error:
            messages[name] = f"{type(error).__name__}: {error}"

    ddp = wrap(build(section()), False)
    for name, value in CONFIG_REFUSALS.items():
        config = optimizer_config(False)
        setattr(config, name, value)
        attempt(name, lambda config=config: ours.build_optimizer(config, [ddp], section()))
    optimizer = ours.build_optimizer(optimizer_config(False), [ddp], section())
    attempt("init_lr", lambda: scheduler_of(optimizer, init_lr=1e-5))
    attempt("other section", lambda: ours.build_optimizer(optimizer_config(False), [ddp], section(alpha=0.5)))
    from megatron.core.optimizer import get_megatron_optimizer

    plain = get_megatron_optimizer(optimizer_config(False), [ddp])
    attempt("plain groups", lambda: ours.check_groups(plain, [ddp], section()))
    optimizer.param_groups[1]["eps"] *= 2
    attempt("eps", lambda: ours.check_groups(optimizer, [ddp], section()))
    stored = ours.checkpoint_state(section())
    ours.check_checkpoint_state(stored, section())
    attempt("checkpoint", lambda: ours.check_checkpoint_state(stored, section(base_width=32)))
    attempt("no state", lambda: ours.check_checkpoint_state({}, section()))
    attempt("other Megatron", lambda: ours.clip_as_unfolded(types.SimpleNamespace(), [ddp], section(residual="folded")))
    routed = section(lr_multipliers={"router": 2.0, "hidden": 0.5})
    other = wrap(build(routed), False)
    attempt("no such role", lambda: ours.build_optimizer(optimizer_config(False), [other], routed))
    ddp.ddp_config.use_megatron_fsdp = True
    attempt("fsdp", lambda: ours.build_optimizer(optimizer_config(False), [ddp], section()))
    ddp.ddp_config.use_megatron_fsdp = False
    wrapper = type(ddp)
    ddp.__class__ = type("TorchFullyShardedDataParallel", (wrapper,), {})
    attempt("torch fsdp", lambda: ours.build_optimizer(optimizer_config(False), [ddp], section()))
    ddp.__class__ = wrapper
    ddp.module.extra = torch.nn.Linear(2, 2)
    attempt("no role", lambda: ours.build_optimizer(optimizer_config(False), [ddp], section()))
    return messages


def flattened(sharded):
    """A loop that writes one rate, and one decay, into all groups; by role as it would have to."""
    ddp = wrap(build(section()), sharded)
    optimizer = ours.build_optimizer(optimizer_config(sharded), [ddp], section())
    scheduler, said = scheduler_of(optimizer), []
    train_step(ddp, optimizer, scheduler, 0)
    for name, value in (("lr", 0.5 * LR), ("weight_decay", DECAY)):
        for group in optimizer.param_groups:
            group[name] = value
        before = [p.clone() for p in ddp.parameters()]
        with pytest.raises(ConfigError) as caught:
            train_step(ddp, optimizer, scheduler, 1)
        assert all(torch.equal(a, b) for a, b in zip(before, ddp.parameters(), strict=True))
        said.append(str(caught.value))
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 0.5 * LR * group["lr_scale"], DECAY * group["wd_mult"]
    train_step(ddp, optimizer, scheduler, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = LR
    with pytest.raises(ConfigError) as caught:
        train_step(ddp, optimizer, scheduler, 2)
    return [*said, str(caught.value)]


@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "distributed"])
def test_groups_out_of_their_ratios_are_refused_at_the_step(workers, sharded):
    for lr, decay, loaded in workers(1).run(flattened, sharded):
        assert "role hidden has lr 0.005, expected 0.0025" in lr and "OptimizerParamScheduler" in lr
        assert "role hidden has weight_decay 0.1, expected 0.2" in decay and "final_norm 0" in decay
        assert "role hidden has lr 0.01, expected 0.005" in loaded


CONFIG_REFUSALS = {
    "optimizer": "sgd", "lr": None, "min_lr": None, "decoupled_weight_decay": False, "decoupled_lr": 0.1,
    "apply_wd_to_qk_layernorm": True,
}  # fmt: skip
EXPECTED = {
    **{name: ["ConfigError", f"OptimizerConfig.{name} is {value!r}"] for name, value in CONFIG_REFUSALS.items()},
    "init_lr": ["ConfigError", "init_lr is 1e-05", "0.0"],
    "other section": ["ConfigError", "alpha 0.5", "alpha 1.0"],
    "plain groups": ["ConfigError", "'embedding.word_embeddings.weight'", "lr_mult 1.0", "'embedding'"],
    "eps": ["ConfigError", "decoder.layers.0.", "eps"],
    "checkpoint": ["CheckpointError", "base_width 16 there, 32 here"],
    "no state": ["CheckpointError", "written without it"],
    "other Megatron": ["PluginError", "SimpleNamespace.get_main_grads_for_grad_norm", "megatron-core 0."],
    "no such role": ["ConfigError", "has the role 'router'"],
    "fsdp": ["ConfigError", "use_megatron_fsdp=False"],
    "torch fsdp": ["ConfigError", "TorchFullyShardedDataParallel replaces the parameters; use DistributedDataParallel"],
    "no role": ["ConfigError", "extra.weight"],
}


def test_refusals(workers):
    messages = workers(1).run(refusals)[0]
    for name, parts in EXPECTED.items():
        assert name in messages, f"{name} was not refused"
        assert all(part in messages[name] for part in parts), messages[name]


def trained_by_a_stock_optimizer():
    """What its first step says, whether weights stayed; which hooks are left once it trains by the recipe's groups."""
    from megatron.core.optimizer import get_megatron_optimizer

    model = build(section())
    ddp = wrap(model, False)
    optimizer = get_megatron_optimizer(optimizer_config(False), [ddp])
    before = [p.detach().clone() for p in model.parameters()]
    forward(iter([micro_batch(0, 0)]), model)[0].mean().backward()  # gradients alone train nothing
    probe = torch.nn.Linear(1, 1)
    probe(torch.ones(1)).backward()
    torch.optim.AdamW(probe.parameters()).step()  # nor does another model's own optimizer
    try:
        train_step(ddp, optimizer, scheduler_of(optimizer), 0)
        message = "trained"
    except StateError as error:
        message = str(error)
    untouched = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    overrides = ours.config_overrides([ddp], section(), optimizer_config(False))
    optimizer = get_megatron_optimizer(optimizer_config(False), [ddp], overrides)
    train_step(ddp, optimizer, scheduler_of(optimizer), 0)
    hooks = [name for name, p in model.named_parameters() if p._backward_hooks]
    probed = build(section())
    forward(iter([micro_batch(0, 0)]), probed)[0].mean().backward()
    del probed  # with it goes what it asked for
    gc.collect()
    train_step(ddp, optimizer, scheduler_of(optimizer), 1)
    return message, untouched, hooks


def test_a_finished_model_is_not_trained_by_a_stock_optimizer(workers):
    message, untouched, hooks = workers(1).run(trained_by_a_stock_optimizer)[0]
    for part in ("AdamW steps", "finish()", "build_optimizer", "optimizer_groups"):
        assert part in message, message
    assert untouched and hooks == []
