"""The ratios of the roles' learning rates and weight decays, looked at before a step."""

import logging
import math

import pytest
import torch

from ds_plugin.completep.param_groups import check_rates, off_ratio
from ds_plugin.completep.rules import Multipliers
from ds_plugin.core.errors import ConfigError

ROWS = {"embedding": Multipliers(1, 1, 1, 1), "hidden": Multipliers(1, 0.25, 4, 1), "norm": Multipliers(1, 1, 0, 1)}


def check(rates, decays=(0.1, 0.4, 0.0)):
    groups = [{"lr": lr, "weight_decay": decay} for lr, decay in zip(rates, decays, strict=True)]
    check_rates(groups, list(ROWS), ROWS, written_by="the scheduler StepLR")


@pytest.mark.parametrize(
    "found",
    [
        [1.0, 0.25, 0.0],
        [0.0, 0.0, 0.0],  # a warmup's first step
        [3e-9, 0.75e-9, 0.0],
        [1.0, 0.25 * (1 + 1e-7), 0.0],  # rounding
        [1e-17, 0.0, 0.0],  # what is left where a schedule subtracts two equal rates
    ],
)
def test_values_in_their_ratios(found):
    assert off_ratio(found, [1.0, 0.25, 0.0]) is None


@pytest.mark.parametrize(
    ("found", "at", "expected"),
    [
        ([1.0, 1.0, 0.0], 1, [1.0, 0.25, 0.0]),
        ([0.0, 1.0, 0.0], 0, [4.0, 1.0, 0.0]),
        ([1.0, 0.25, 1e-3], 2, [1.0, 0.25, 0.0]),
        ([1.0, 0.25 * (1 + 1e-5), 0.0], 1, [1.0, 0.25, 0.0]),
        ([3e-9, 3e-9, 0.0], 1, [3e-9, 0.75e-9, 0.0]),
        ([1.0, math.nan, 0.0], 1, [1.0, 0.25, 0.0]),
    ],
)
def test_values_that_are_not(found, at, expected):
    assert off_ratio(found, [1.0, 0.25, 0.0]) == (at, expected)


def test_the_error_names_role_values_and_who_wrote_them():
    check([0.1, 0.025, 0.1])
    with pytest.raises(ConfigError) as caught:
        check([0.1, 0.1, 0.1])
    for part in ("role hidden has lr 0.1, expected 0.025", "scheduler StepLR", 'lr * group["lr_scale"]', "norm 0.1"):
        assert part in str(caught.value), str(caught.value)
    with pytest.raises(ConfigError, match="role norm has weight_decay 0.1, expected 0:"):
        check([0.1, 0.025, 0.1], decays=[0.1, 0.4, 0.1])


def test_tensors_are_read_where_that_does_not_wait_for_a_device(caplog):
    check([torch.tensor(0.1), torch.tensor(0.025), 0.1])
    with pytest.raises(ConfigError, match="role hidden"):
        check([torch.tensor(0.1), torch.tensor(0.1), 0.1])
    with caplog.at_level(logging.WARNING, "ds_plugin"):
        for _ in range(2):
            check([torch.empty((), device="meta")] * 3)  # as a GPU's: reading it here would fail
    assert [r.getMessage().count("lr in tensors on a device") for r in caplog.records] == [1]
