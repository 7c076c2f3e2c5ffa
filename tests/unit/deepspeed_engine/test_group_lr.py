"""Scalars of DeepSpeed's schedulers, expanded per param group."""

import re

import pytest
import torch

from ds_plugin.core.errors import ConfigError
from ds_plugin.deepspeed_engine.group_lr import build_scheduler, check_peak, expand_scheduler

RATIOS = [1.0, 0.25]


def test_scalars_become_one_value_per_group():
    found = expand_scheduler(
        {"type": "WarmupLR", "params": {"warmup_min_lr": 0.001, "warmup_max_lr": 0.008, "warmup_num_steps": 10}}, RATIOS
    )
    assert found["params"] == {
        "warmup_min_lr": [0.001, 0.00025],
        "warmup_max_lr": [0.008, 0.002],
        "warmup_num_steps": 10,
    }


def test_the_frameworks_default_is_spelt_out():
    found = expand_scheduler({"type": "WarmupDecayLR", "params": {"total_num_steps": 5}}, RATIOS)
    assert found["params"]["warmup_max_lr"] == [0.001, 0.00025]


def test_groups_own_rates_are_left_to_the_framework():
    assert "warmup_max_lr" not in expand_scheduler({"type": "WarmupLR", "params": {}}, RATIOS)["params"]


@pytest.mark.parametrize(
    "scheduler", [{"type": "WarmupCosineLR", "params": {"total_num_steps": 9}}, {"type": "StepLR"}]
)
def test_proportional_schedulers_pass(scheduler):
    assert expand_scheduler(scheduler, RATIOS) == scheduler


@pytest.mark.parametrize("kind", ["OneCycle", "LRRangeTest", "OneCycleLR", "None"])
def test_flattening_schedulers_are_refused(kind):
    with pytest.raises(ConfigError, match=f"scheduler.type: {kind!r}.*WarmupLR"):
        expand_scheduler({"type": kind, "params": {}}, RATIOS)


def test_cosine_with_a_floor_is_refused():
    assert expand_scheduler({"type": "CosineAnnealingLR", "params": {"T_max": 9}}, RATIOS)
    with pytest.raises(ConfigError, match="CosineAnnealingLR"):
        expand_scheduler({"type": "CosineAnnealingLR", "params": {"T_max": 9, "eta_min": 1e-4}}, RATIOS)


def test_a_list_of_another_length_is_refused():
    with pytest.raises(ConfigError, match="3 values for the 2 param groups"):
        expand_scheduler({"type": "WarmupLR", "params": {"warmup_max_lr": [1, 2, 3]}}, RATIOS)


@pytest.mark.parametrize("kind", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"])
def test_ratios_hold_at_every_step_in_deepspeeds_schedulers(kind):
    from deepspeed.runtime import lr_schedules

    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in RATIOS]
    optimizer = torch.optim.SGD(
        [{"params": [w], "lr": 0.008 * r} for w, r in zip(weights, RATIOS, strict=True)], lr=0.008
    )
    params = {"warmup_num_steps": 4}
    if kind != "WarmupLR":
        params["total_num_steps"] = 12
    if kind != "WarmupCosineLR":
        params["warmup_max_lr"] = 0.008
    section = expand_scheduler({"type": kind, "params": params}, RATIOS)
    scheduler = getattr(lr_schedules, kind)(optimizer, **section["params"])
    rates = []
    for _ in range(10):
        scheduler.step()
        first, second = (group["lr"] for group in optimizer.param_groups)
        rates.append(first)
        assert second == pytest.approx(first * RATIOS[1], rel=1e-12, abs=0)
    assert max(rates) > 0


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        ({"type": "WarmupLR", "params": {"warmup_max_lr": 0.002}}, "warmup_max_lr: 0.002, and optimizer.params.lr is"),
        ({"type": "WarmupDecayLR", "params": {}}, "0.001, DeepSpeed's default, and optimizer.params.lr is 0.01"),
    ],
)
def test_two_peaks_are_refused(scheduler, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_peak(scheduler, 0.01)


def test_one_peak_passes():
    check_peak({}, 0.01)
    check_peak({"type": "WarmupLR", "params": {}}, 0.01)
    check_peak({"type": "WarmupLR", "params": {"warmup_max_lr": [0.01, 0.0025]}}, 0.01)
    check_peak({"type": "WarmupDecayLR", "params": {"warmup_max_lr": 0.01}}, 0.01)
    check_peak({"type": "WarmupCosineLR", "params": {"total_num_steps": 9}}, 0.01)


def built(function):
    optimizer = torch.optim.SGD(
        [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.008 * ratio} for ratio in RATIOS], lr=0.008
    )
    return build_scheduler(function, optimizer)


@pytest.mark.parametrize(
    "function",
    [
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0),  # a warmup from zero
        lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 3),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9),
    ],
)
def test_functions_whose_schedulers_scale_pass(function):
    assert isinstance(built(function), torch.optim.lr_scheduler.LRScheduler)


def test_a_functions_scheduler_that_flattens_is_refused():
    with pytest.raises(ConfigError, match=r"OneCycleLR has lr \[0.004\d*, 0.004\d*\]"):
        built(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=9))
    from deepspeed.runtime import lr_schedules

    for kind in ("WarmupLR", "WarmupDecayLR"):  # they set every rate to zero when they are built
        settings = {"warmup_max_lr": 0.1, **({"total_num_steps": 9} if kind == "WarmupDecayLR" else {})}
        with pytest.raises(ConfigError, match=rf"{kind} has max_lrs \[0.1, 0.1\]"):
            built(lambda o, k=kind, s=settings: getattr(lr_schedules, k)(o, **s))
    with pytest.raises(ConfigError, match="CosineAnnealingLR has eta_min 0.0001"):
        built(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 9, eta_min=1e-4))
