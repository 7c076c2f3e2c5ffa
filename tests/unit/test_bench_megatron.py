"""The benchmark on Megatron-LM's script without the script: rounds, figures, and what it takes out of the way."""

import functools
from types import SimpleNamespace

import pytest
import torch

from ds_plugin.config import PluginConfig
from megatron_patches.completep.residual import scale_input
from megatron_patches.training_loop.lengths import Lengths
from tests import harness


@pytest.fixture(scope="module")
def bench():
    return harness.benchmark("bench_megatron")


def test_a_round_is_half_on_with_a_snapshot_and_a_logged_line_of_each_kind(bench):
    on = [i for i in range(1, bench.ROUND + 1) if bench.is_on(i)]
    assert len(on) == bench.ROUND / 2 and sum(on) == pytest.approx(sum(range(1, bench.ROUND + 1)) / 2)  # no drift
    assert bench.is_on(bench.ROUND) and not bench.is_on(bench.ROUND // 2)
    assert bench.METHODS["weight_averaging"]["interval"] == bench.ROUND
    args = SimpleNamespace(ranks=8, depth=4, width=256, micro_batches=4, rounds=3)
    given = dict(zip(*[iter(bench.flags(args))] * 2, strict=True))
    assert given["--log-interval"] == str(bench.ROUND // 2) and given["--global-batch-size"] == "16"
    assert given["--train-iters"] == str(4 * bench.ROUND + 1)


def test_the_first_round_reaches_the_full_length(bench):
    section = PluginConfig.from_dict(bench.METHODS).sequence_length_warmup
    lengths = Lengths(section, full=bench.LENGTH, layout_multiple=1, batch=16)
    assert lengths.length < bench.LENGTH
    for _ in range(bench.ROUND):
        lengths.booked(16, True)
    assert lengths.length == bench.LENGTH


def test_ratios_are_of_rounds_but_the_first(bench):
    def round_of(on, off):
        return [on if bench.is_on(i) else off for i in range(1, bench.ROUND + 1)]

    found = bench.ratios([*round_of(900, 1), *round_of(11, 10), *round_of(12, 10), *round_of(13, 10)])
    assert found["on against off"]["ratio"] == pytest.approx(1.2)
    assert found["on against off"]["low"] == pytest.approx(1.15)
    assert found["off against off"] == {"ratio": 1.0, "low": 1.0, "high": 1.0}
    drifting = [float(i) for i in range(100, 100 + 3 * bench.ROUND)]
    assert bench.ratios(drifting)["on against off"]["ratio"] == pytest.approx(1.0, abs=1e-3)


class Step:
    def step(self):
        return "theirs"

    def get_main_grads_for_grad_norm(self):
        return ["theirs"]


def test_switches_put_megatrons_own_in_place_and_ours_back(bench):
    layer = torch.nn.Linear(2, 2)
    layer.mlp_bda = layer.self_attn_bda = "ours"
    other = layer.register_forward_pre_hook(lambda module, args: None)
    layer.register_forward_pre_hook(functools.partial(scale_input, multiplier=0.5))
    hooks = layer._forward_pre_hooks
    decayed, not_decayed = torch.zeros(1), torch.zeros(2)
    groups = [
        {"params": [decayed], "wd_mult": 1.0, "default_config": False, "lr_mult": "hidden"},
        {"params": [not_decayed], "wd_mult": 0.0, "default_config": False, "lr_mult": "norm"},
        {"params": [decayed], "wd_mult": 1.0, "default_config": True, "lr_mult": "embedding"},
    ]
    optimizer, scheduler = Step(), Step()
    optimizer.step = scheduler.step = lambda: "ours"
    optimizer.get_main_grads_for_grad_norm = lambda: ["ours"]
    optimizer.optimizer = SimpleNamespace(param_groups=groups)
    switches = bench.Switches()
    switches.of_model([layer])
    switches.of_optimizer(optimizer, scheduler)
    ours = torch.ones(1, 2)

    switches.turn(False)
    assert (
        layer.mlp_bda is layer.self_attn_bda and callable(layer.mlp_bda) and layer.mlp_bda.__name__.startswith("get_")
    )
    assert list(layer._forward_pre_hooks) == [other.id]
    assert optimizer.step() == scheduler.step() == "theirs" and optimizer.get_main_grads_for_grad_norm() == ["theirs"]
    merged = optimizer.optimizer.param_groups
    assert [[len(p) for p in group["params"]] for group in merged] == [[1, 1], [2]]
    assert all(group["default_config"] for group in merged)
    switches.turn(True)
    assert layer.mlp_bda == "ours" and layer._forward_pre_hooks is hooks
    assert optimizer.step() == "ours" and optimizer.optimizer.param_groups is groups
    assert optimizer.get_main_grads_for_grad_norm() == ["ours"]
    assert torch.equal(layer(ours), torch.nn.functional.linear(ours / 2, layer.weight, layer.bias))
