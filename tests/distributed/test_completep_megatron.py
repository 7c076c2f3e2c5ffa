"""CompleteP on megatron-core's own optimizer: each role's group, and DP, TP and PP against plain torch."""

import pytest
import torch

from megatron_patches.completep import build_param_groups, finish, ratios_of
from megatron_patches.completep import optimizer as ours
from tests.distributed.megatron_training import (
    CLIP,
    COMPLETED_GROUPS,
    DECAY,
    DECAY_STEPS,
    EPS,
    FOLDED_GROUPS,
    GROUPS,
    LR,
    MICRO_BATCHES,
    MIN_LR,
    STEPS,
    WARMUP,
    build,
    forward,
    micro_batch,
    optimizer_config,
    scheduler_of,
    section,
    train,
    wrap,
)
from tests.harness import slow


def lr_factor(step):
    """The scheduler's learning rate over its maximum before step `step`, and its slope towards the minimum."""
    if step <= WARMUP:
        return step / WARMUP
    done = (step - WARMUP) / (DECAY_STEPS - WARMUP)
    return (MIN_LR + (1 - done) * (LR - MIN_LR)) / LR


def train_plainly(model, completep):
    """The same training in a few lines: torch's AdamW on the groups made for DeepSpeed."""
    roles = finish(model, completep)
    groups = build_param_groups(
        model, roles, ratios_of(model.config, completep), completep, lr=LR, weight_decay=DECAY, eps=EPS
    )
    optimizer = torch.optim.AdamW(groups)
    base = [group["lr"] for group in groups]
    losses = []
    for step in range(STEPS):
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * lr_factor(step)
        optimizer.zero_grad()
        total = 0.0
        for index in range(MICRO_BATCHES):
            output, loss_of = forward(iter([micro_batch(step, index)]), model)
            loss = loss_of(output)[0] / MICRO_BATCHES
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(total)
    return losses


def whole_weights_and_reference(tied):
    model = build(section(), tied=tied)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return weights, train_plainly(model, section())


def layout_curves(weights, layout, cases):
    return {
        (tied, sharded): train(section(), sharded=sharded, tied=tied, weights=weights[tied], **layout)
        for tied, sharded in cases
    }


LAYOUTS = {
    "one rank": (1, {}),
    "data parallel": (2, {}),
    "tensor parallel": (2, {"tensor_parallel": 2}),
    "pipeline parallel": (2, {"pipeline_parallel": 2}),
}


@pytest.fixture(scope="module")
def references(workers):
    return {tied: workers(1).run(whole_weights_and_reference, tied)[0] for tied in (False, True)}


# tied, sharded
PAIRS = {"some": [(False, True), (True, False)], "the rest": [(False, False), (True, True)]}
CASES = [(name, which) for which in PAIRS for name in LAYOUTS]


@pytest.mark.parametrize(
    ("name", "which"), [slow(*case) if {"one rank", "the rest"} & {*case} else case for case in CASES]
)
def test_layouts_train_as_torch_does(workers, references, name, which):
    ranks, layout = LAYOUTS[name]
    weights = {tied: reference[0] for tied, reference in references.items()}
    for curves in workers(ranks).run(layout_curves, weights, layout, PAIRS[which]):
        for (tied, _), (losses, norms) in curves.items():
            assert losses == pytest.approx(references[tied][1], abs=1e-5)
            assert losses[0] - losses[-1] > 0.05  # it has trained, so there was something to differ in
            assert min(norms) > CLIP  # and the clip was in force


def groups_of(layout, changes, dtype=torch.float32):
    """Before the scheduler exists, and at its peak; all betas; the groups whose learning rate Megatron logs."""
    from megatron.core.transformer.module import Float16Module

    half = dtype is torch.bfloat16
    chunks = [{**layout, "vp_stage": stage} for stage in (0, 1)] if "pipeline_parallel" in layout else [layout]
    models = [build(section(**changes), **chunk) for chunk in chunks]
    if half:
        for model in models:
            model.config.bf16 = True
        models = [Float16Module(model.config, model) for model in models]
    found = []
    for sharded in (False, True):
        wrapped = [wrap(model, sharded) for model in models]
        optimizer = ours.build_optimizer(optimizer_config(sharded, bf16=half), wrapped, section(**changes))
        start = {g["lr_mult"]: (g["lr"], g["min_lr"], g["weight_decay"], g["eps"]) for g in optimizer.param_groups}
        scheduler_of(optimizer).step(WARMUP)
        peak = {g["lr_mult"]: (g["lr"], g["min_lr"], g["weight_decay"], g["eps"]) for g in optimizer.param_groups}
        betas = {g["betas"] for g in optimizer.param_groups}
        logged = [g["lr_mult"] for g in optimizer.param_groups if g["default_config"]]
        found.append((start, peak, betas, logged))
    return found


def same_groups(found, expected, betas=(0.9, 0.999)):
    for start, peak, found_betas, logged in found:
        for groups in (start, peak):
            assert groups.keys() == expected.keys()
            for role, values in expected.items():
                assert groups[role] == pytest.approx(values, rel=1e-12), role
        assert [pytest.approx(betas)] == list(found_betas)
        assert logged == ["embedding"]


@pytest.mark.parametrize("layout", [{"tensor_parallel": 2}, {"pipeline_parallel": 2}], ids=["tensor", "pipeline"])
def test_every_role_has_its_group_on_every_rank(workers, layout):
    for found in workers(2).run(groups_of, layout, {}):
        same_groups(found, GROUPS)


def test_groups_of_half_precision_and_other_recipes(workers):
    same_groups(workers(1).run(groups_of, {}, {}, torch.bfloat16)[0], GROUPS)
    same_groups(workers(1).run(groups_of, {}, {"residual": "folded"})[0], FOLDED_GROUPS)
    completed = {"recipe": "completed_p", "batch_ratio": 2.0, "token_ratio": 8.0}
    same_groups(workers(1).run(groups_of, {}, completed)[0], COMPLETED_GROUPS, (0.975, 0.99975))


def modes(tied, sharded):
    config = {"log_num_zeros_in_grad": True}
    return [train(section(residual=mode), sharded=sharded, tied=tied, config=config) for mode in ("forward", "folded")]


@pytest.mark.parametrize(("tied", "sharded"), [(False, True), (True, False), slow(False, False), slow(True, True)])
def test_the_folded_mode_is_clipped_as_the_forward_mode(workers, tied, sharded):
    for (forward_losses, forward_norms), (folded_losses, folded_norms) in workers(2).run(modes, tied, sharded):
        assert min(forward_norms) > CLIP
        assert folded_losses == pytest.approx(forward_losses, abs=1e-6)
        assert folded_norms == pytest.approx(forward_norms, rel=1e-5)
        assert forward_losses[0] - forward_losses[-1] > 0.05
