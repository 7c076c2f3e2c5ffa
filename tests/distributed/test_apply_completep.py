"""apply() of a completep section in a script that calls Megatron itself, and revert()."""

import sys
import types

import pytest
import torch

import megatron_patches
from ds_plugin.core.errors import ConfigError, StateError
from megatron_patches import megatron_on_cpu
from megatron_patches.models import gpt
from tests import muon_stand_in
from tests.distributed.megatron_training import (
    FOLDED_GROUPS,
    GROUPS,
    LENGTH,
    SIZE,
    VOCAB,
    optimizer_config,
    scheduler_of,
    section,
    train,
    train_step,
    wrap,
)
from tests.harness import slow


def script(said):
    """A script's own calls of Megatron, under apply(); then reverted, as its importers see it.

    ``said``: what the section says of ``residual``.
    """
    import megatron.core.optimizer as optimizers
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    completep = section(**said)
    main, training = sys.modules["__main__"], types.ModuleType("megatron.training")
    mine = types.ModuleType("somebodys_training")
    for module in (main, training, mine):
        module.get_megatron_optimizer = optimizers.get_megatron_optimizer
        sys.modules[module.__name__] = module
    before = optimizers.get_megatron_optimizer, GPTModel.__init__, OptimizerParamScheduler.__init__
    megatron_patches.apply(None)
    untouched = megatron_patches.active() == []
    megatron_on_cpu.enable()
    megatron_patches.apply(completep)
    megatron_patches.apply(section(**said))
    names = [change.name for change in megatron_patches.active() if "completep" in change.reason]

    cfg = gpt.GPTConfig.model_validate(SIZE)
    gpt.initialize_parallel(cfg, 1234)
    config = gpt.transformer_config(cfg, torch.float32)
    fields = dict(vars(config))
    with pytest.raises(TypeError):
        GPTModel(config, gpt.layer_spec(cfg), VOCAB)  # as it was, when a construction fails; the next may be plain
    untouched = untouched and fields == vars(config)
    GPTModel(config, gpt.layer_spec(cfg), VOCAB, LENGTH)
    gpt.initialize_parallel(cfg, 1234)
    model = GPTModel(config, gpt.layer_spec(cfg), VOCAB, LENGTH)  # a second one, as a pipeline's virtual stages are
    ddp = wrap(model, True)
    groups = []
    for module in (main, training, mine):
        for overrides in (None, optimizers.get_standard_config_overrides(optimizer_config(True))):
            optimizer = module.get_megatron_optimizer(optimizer_config(True), [ddp], overrides)
            groups.append({group["lr_mult"] for group in optimizer.param_groups})
    messages = []
    for attempt in (
        lambda: BertModel(config, 2, bert_layer_local_spec, VOCAB, LENGTH),
        lambda: megatron_patches.apply(section(alpha=0.5)),
        lambda: main.get_megatron_optimizer(
            optimizer_config(True), [ddp], {optimizers.ParamKey(name="*"): {"wd_mult": 2.0}}
        ),
        lambda: scheduler_of(optimizer, init_lr=1e-5),
    ):
        try:
            attempt()
        except (ConfigError, StateError) as error:
            messages.append(str(error))
    scheduler = scheduler_of(optimizer)
    losses = [train_step(ddp, optimizer, scheduler, step, config)[0] for step in range(3)]
    weights = [p.detach().clone() for p in model.parameters()]

    kept = main.get_megatron_optimizer
    megatron_patches.revert()
    megatron_on_cpu.enable()
    after = optimizers.get_megatron_optimizer, GPTModel.__init__, OptimizerParamScheduler.__init__
    restored = before == after and {m.get_megatron_optimizer for m in (main, training, mine)} == {before[0]}
    config.finalize_model_grads_func = None
    restored = restored and fields == vars(config)
    plain = [group["lr_mult"] for group in kept(optimizer_config(True), [ddp]).param_groups]
    return untouched, names, groups, messages, losses, weights, restored, plain


@pytest.mark.parametrize(
    ("said", "table"),
    [
        pytest.param({"residual": "forward"}, GROUPS, id="forward"),
        slow({"residual": "folded"}, FOLDED_GROUPS, id="folded"),
        pytest.param({"base_head_dim": 4}, FOLDED_GROUPS, id="not said"),
    ],
)
def test_apply_reaches_a_script_and_revert_leaves_nothing(workers, said, table):
    untouched, names, groups, messages, losses, weights, restored, plain = workers(1).run(script, said)[0]
    assert untouched and restored and len(names) == (5 if muon_stand_in.later() else 6)  # 0.16's Muon apart
    assert groups == [set(table)] * 6
    assert set(plain) == {1.0}  # what a late importer kept is Megatron's own again
    said_of = (["megatron-core's BertModel"], ["alpha=1.0", "alpha=0.5"], ["config_overrides"], ["init_lr"])
    for message, parts in zip(messages, said_of, strict=True):
        assert all(part in message for part in parts), message
    expected = workers(1).run(train, section(**{**said, "residual": "forward"}), sharded=True, steps=3)[0][0]
    assert losses == pytest.approx(expected, abs=1e-6)
    if "residual" not in said:  # two ranks reduce their gradients by what the script sets on its own config
        for *_, two_ranks, their_weights, _, _ in workers(2).run(script, said):
            assert two_ranks == pytest.approx(expected, abs=1e-6)
            for one, two in zip(weights, their_weights, strict=True):
                torch.testing.assert_close(two, one, rtol=0, atol=1e-5)
