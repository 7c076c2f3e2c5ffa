"""CompleteP on megatron-core's optimizer: runs resumed, of another base refused, at another rate gone on with."""

from pathlib import Path

import pytest
import torch

from ds_plugin.core.errors import ConfigError
from megatron_patches.completep import optimizer as ours
from tests.distributed.megatron_training import (
    LR,
    build,
    group_values,
    optimizer_config,
    scheduler_of,
    section,
    train_step,
    wrap,
)
from tests.harness import slow


def states(model, optimizer, scheduler, sharding, is_loading):
    metadata = {"distrib_optim_sharding_type": sharding}
    sharded = model.sharded_state_dict(metadata=metadata)
    return {
        "model": sharded,
        "optimizer": optimizer.sharded_state_dict(sharded, is_loading=is_loading, metadata=metadata),
        "scheduler": scheduler.state_dict(),
        **ours.checkpoint_state(section()),
    }


def interrupt_and_resume(folder, shardings):
    """Per format: weights in which six steps differ from three, a checkpoint and three; whether groups are equal."""
    from megatron.core import dist_checkpointing

    sharded = shardings != [None]

    def start():
        model = build(section())
        ddp = wrap(model, sharded)
        optimizer = ours.build_optimizer(optimizer_config(sharded), [ddp], section())
        return model, ddp, optimizer, scheduler_of(optimizer)

    def go_on(ddp, optimizer, scheduler):
        for step in range(3, 6):
            train_step(ddp, optimizer, scheduler, step)

    model, ddp, optimizer, scheduler = start()
    for step in range(3):
        train_step(ddp, optimizer, scheduler, step)
    for sharding in shardings:
        target = Path(folder, str(sharding))
        target.mkdir(exist_ok=True)
        dist_checkpointing.save(states(model, optimizer, scheduler, sharding, False), str(target))
    saved = group_values(optimizer)
    go_on(ddp, optimizer, scheduler)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}

    results = []
    for sharding in shardings:
        model, ddp, optimizer, scheduler = start()
        source = str(Path(folder, str(sharding)))
        state = dist_checkpointing.load(states(model, optimizer, scheduler, sharding, True), source)
        ours.check_checkpoint_state(state, section())
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        ours.check_groups(optimizer, [ddp], section())
        loaded = group_values(optimizer)
        go_on(ddp, optimizer, scheduler)
        different = [name for name, p in model.named_parameters() if not torch.equal(p, expected[name])]
        results.append((sharding, different, loaded == saved))
    return results


# The distributed optimizer's formats that this Megatron can write at all (it refuses fully_sharded_model_space).
FORMATS = ["dp_zero_gather_scatter", "dp_reshardable", "fully_reshardable"]


@pytest.mark.parametrize("shardings", [pytest.param(FORMATS, id="distributed"), slow([None], id="plain")])
def test_a_resumed_run_is_the_uninterrupted_one(workers, tmp_path, shardings):
    for results in workers(2).run(interrupt_and_resume, str(tmp_path), shardings):
        assert results == [(sharding, [], True) for sharding in shardings]


def load_another_bases_state():
    """At alpha 1 learning rates do not depend on the depth ratio: Megatron finds every group, with another eps."""

    def started(completep):
        optimizer = ours.build_optimizer(optimizer_config(False), [wrap(build(completep), False)], completep)
        return optimizer, optimizer.state_dict()

    _, state = started(section())
    optimizer, _ = started(section(base_depth=1))
    try:
        optimizer.load_state_dict(state)
    except ConfigError as error:
        return str(error)
    return "accepted"


def test_a_state_of_another_base_is_refused(workers):
    message = workers(1).run(load_another_bases_state)[0]
    assert "eps 2.5e-05, expected 1.25e-05" in message, message


def anneal(sharded):
    """What the groups hold after a state of another base learning rate is loaded, and what they hold anew."""

    def started(**changes):
        return ours.build_optimizer(optimizer_config(sharded, **changes), [wrap(build(section()), sharded)], section())

    state = started().state_dict()
    optimizer, fresh = (started(lr=LR / 4, min_lr=0.0) for _ in range(2))
    optimizer.load_state_dict(state)
    names = ("lr_mult", "max_lr", "min_lr", "wd_mult", "eps")
    found, expected = ([[group[n] for n in names] for group in each.param_groups] for each in (optimizer, fresh))
    return sorted(found), sorted(expected)


@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "distributed"])
def test_a_run_goes_on_at_another_base_learning_rate(workers, sharded):
    found, expected = workers(1).run(anneal, sharded)[0]
    assert found == expected and max(row[1] for row in found) == LR / 4
