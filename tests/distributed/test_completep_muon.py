"""Muon: megatron-core's and DeepSpeed's, trained by the rules beside the plain twin, resumed, and what is refused."""

import copy
import importlib
import sys

import pytest
import torch
import torch.distributed as dist

import ds_plugin
import megatron_patches
from ds_plugin.core.errors import ConfigError
from megatron_patches import megatron_on_cpu
from megatron_patches.completep import optimizer as on_megatron
from megatron_patches.completep import ratios_of
from megatron_patches.models import gpt
from tests import muon_stand_in
from tests.distributed.test_completep_experts import HEADS, LENGTH, VOCAB, build
from tests.distributed.test_completep_experts import section as section_of
from tests.harness import slow
from tests.reference import averaging as reference
from tests.reference.experts import ReferenceMoE
from tests.reference.muon import DEEPSPEEDS, MEGATRONS, MuonAndAdamW

#: 64 wide, four times the base's, two layers, twice; experts, active ones, hidden size of one, of the shared one
SIZES, BASE, DEPTH = (4, 2, 64, 64, None), (4, 2, 16, 16, None), 2
LR, DECAY, EPS, CLIP, MOMENTUM, STEPS, ROWS = 0.005, 0.1, 1e-4, 0.2, 0.9, 5, 4
#: by hand, m_N 4: what the base's rate of a block's matrices, and of the router, is multiplied by
RATES = {"unit_rms_norm": (1, 1), "spectral": (1 / 2, 1 / 4), "shape_scaling": (1, 1 / 2)}


def section(**changes):
    return section_of(BASE, base_depth=1, **changes)


def batch(step, rows=slice(None)):
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))[rows]
    return tokens[:, :-1], tokens[:, 1:]


def mine():
    share = ROWS // dist.get_world_size()
    return slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)


def mean_of_ranks(loss):
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def loss_of(model, tokens, labels):
    return model(tokens, torch.arange(LENGTH).expand(len(tokens), -1), None, labels=labels).double().mean()


def twin_of(start):
    experts, active, hidden, shared, _ = SIZES
    twin = ReferenceMoE(
        vocab=VOCAB, length=LENGTH, width=64, depth=DEPTH, heads=HEADS, experts=experts, active=active, hidden=hidden,
        shared=shared, sums_to=1.0, base=(*BASE[:4], 1.0), rule=None, alpha=1.0, tied=False, base_width=16,
        base_depth=1, base_head_dim=8,
    )  # fmt: skip
    twin.copy_from(start)
    return twin


def twins_losses(start, scale, coefficients, *, split, nesterov, clip=None, lr=LR, betas=(0.9, 0.999)):
    """``lr``: Muon's; Adam's is always the same."""
    twin, square = twin_of(start), RATES[scale][0]
    groups = list(twin.groups(LR, DECAY, EPS))
    for (name, p), group in zip(twin.named_parameters(), groups, strict=True):
        if name.startswith("blocks") and p.dim() == 2:
            rate = RATES[scale][1] if "router" in name else square
            group |= {"scale": scale, "lr": lr * rate, "weight_decay": DECAY / rate}
            if split and "qkv" in name:
                group["blocks"] = (64 // HEADS,) * 3
    optimizer, losses = MuonAndAdamW(groups, MOMENTUM, nesterov, coefficients, betas), []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = twin(*batch(step))
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def unfolded(model, roles, completep):
    ratios = ratios_of(model.config, completep)
    return {name: p.detach() / completep.fold_factor(roles[name], ratios) for name, p in model.named_parameters()}


# -- megatron-core's -------------------------------------------------------------------------------------------------


def wrapped(kind, scale, completep, *, more=None, **changes):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    muon_stand_in.install()
    model, roles = build(completep, SIZES, DEPTH, **(more or {}))
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    values = {
        "optimizer": kind, "lr": LR, "min_lr": 0.0, "weight_decay": DECAY, "adam_eps": EPS, "clip_grad": CLIP,
        "muon_scale_mode": scale, "muon_momentum": MOMENTUM, "muon_fp32_matmul_prec": "highest",
    }  # fmt: skip
    optimizer = on_megatron.build_optimizer(OptimizerConfig(**{**values, **changes}), [ddp], completep)
    return ddp, roles, optimizer


def train(ddp, optimizer, steps):
    losses = []
    for step in steps:
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        loss = loss_of(ddp, *batch(step, mine()))
        loss.backward()
        ddp.finish_grad_sync()
        assert optimizer.step()[0]
        losses.append(mean_of_ranks(loss))
    return losses


def kept(ddp, optimizer, path):
    """What gives another run these weights and this state, by the optimizer's own ways."""
    weights, layer_wise = copy.deepcopy(ddp.module.state_dict()), hasattr(optimizer, "save_state_dict_to_file")
    state = optimizer.save_state_dict_to_file(path) if layer_wise else copy.deepcopy(optimizer.state_dict())

    def give(ddp, optimizer):
        ddp.module.load_state_dict(weights)
        if layer_wise:
            optimizer.load_state_dict_from_file(path)
        else:
            optimizer.load_state_dict(state)

    return give


CASES = [
    ("muon", "unit_rms_norm", "forward"),
    ("dist_muon", "spectral", "folded"),
    ("muon", "shape_scaling", "folded"),
]
if muon_stand_in.later():
    del CASES[1]


def on_megatron_core(folder, cases):
    found = {}
    for kind, scale, residual in cases:
        completep = section(residual=residual)
        ddp, roles, optimizer = wrapped(kind, scale, completep)
        start = unfolded(ddp.module, roles, completep)
        losses = train(ddp, optimizer, range(3))
        give = kept(ddp, optimizer, f"{folder}/{scale}-{dist.get_rank()}")
        losses += train(ddp, optimizer, range(3, STEPS))
        settings = {"split": True, "nesterov": False, "clip": CLIP}
        expected = twins_losses(start, scale, MEGATRONS, **settings) if dist.get_rank() == 0 else None
        ddp, _, optimizer = wrapped(kind, scale, completep)
        give(ddp, optimizer)
        found[kind, scale, residual] = losses, expected, train(ddp, optimizer, range(3, STEPS))
    return found


without = pytest.mark.skipif(not muon_stand_in.available(), reason="Muon needs the package emerging_optimizers")


@without
@pytest.mark.parametrize("cases", [CASES[:-1], slow(CASES[-1:])], ids=["some", "others"])
def test_megatron_cores_muon_trains_as_the_rules_say_and_resumes(workers, tmp_path, cases):
    found = workers(2).run(on_megatron_core, tmp_path, cases)[0]
    assert list(found) == cases
    for case, (losses, expected, after) in found.items():
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) <= 1e-6, (case, losses, expected)
        assert after == losses[3:], case


def refusal(attempt, *args, **given):
    """What a call is refused with; an error that is not for users fails the test."""
    try:
        attempt(*args, **given)
    except ConfigError as error:
        return str(error)
    return "nothing was refused"


def script():
    """A script's own calls under apply(), of the function that it imported before: its groups' roles and rates."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_standard_config_overrides

    muon_stand_in.install()
    main, package = sys.modules["__main__"], importlib.import_module("megatron.core.optimizer.muon")
    main.get_megatron_muon_optimizer = before = package.get_megatron_muon_optimizer
    megatron_on_cpu.enable()
    megatron_patches.apply(section())
    model, _ = build(None, SIZES, DEPTH)
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    layer_wise = not muon_stand_in.later()  # later without bf16 there is none
    kind = "dist_muon" if layer_wise else "muon"
    config = OptimizerConfig(optimizer=kind, lr=LR, min_lr=0.0, weight_decay=DECAY)
    given = (config, [ddp], get_standard_config_overrides(config))
    optimizer = main.get_megatron_muon_optimizer(*given, layer_wise_distributed_optimizer=layer_wise)
    found = {group["lr_mult"]: (group["lr"], group["wd_mult"]) for group in optimizer.param_groups}
    megatron_patches.revert()
    return found, main.get_megatron_muon_optimizer is before is package.get_megatron_muon_optimizer


@without
def test_a_script_that_builds_its_own_muon_is_reached(workers):
    found, reverted = workers(1).run(script)[0]
    square, router = ((LR * rate, 1 / rate) for rate in RATES["spectral"])  # megatron-core's default
    of_muon = {"hidden": square, "branch_out": (square[0] / 2, square[1] * 2), "router": router}  # folded: m_L 2
    ends = {"expert_down": of_muon["branch_out"], "shared_down": of_muon["branch_out"]}
    others = {"embedding": (LR, 1), "unembedding": (LR / 4, 4), "block_norm": (LR, 0), "final_norm": (LR, 0)}
    expected = {**of_muon, **ends, "expert_up": square, "shared_up": square, **others}
    assert {role: pytest.approx(values) for role, values in expected.items()} == found and reverted


def refused_on_megatron_core(folder):
    def loaded():
        """A state whose eps is another base's, by the way of one's own files."""
        kind = "muon" if muon_stand_in.later() else "dist_muon"
        ddp, _, optimizer = wrapped(kind, "spectral", section(), adam_eps=EPS * 2)
        give = kept(ddp, optimizer, f"{folder}/state")
        ddp, _, optimizer = wrapped(kind, "spectral", section())
        give(ddp, optimizer)

    return {
        "scale": refusal(wrapped, "muon", "0.2", section()),
        "optimizer": refusal(wrapped, "lion", "spectral", section()),
        "recipe": refusal(wrapped, "muon", "spectral", section(recipe="completed_p")),
        "loaded": refusal(loaded),
    }


ERRORS = {
    "scale": "muon_scale_mode is '0.2': no rule; use unit_rms_norm, spectral, shape_scaling",
    "optimizer": "OptimizerConfig.optimizer is 'lion': the rules hold for AdamW and Muon; write 'adam'",
    "recipe": '"completed_p" has no rule for Muon; write "completep" or AdamW',
    "loaded": "(role embedding) has eps 0.0002, expected 0.0001",
}


@without
def test_what_no_rule_covers_is_refused_on_megatron_core(workers, tmp_path):
    found = workers(1).run(refused_on_megatron_core, tmp_path)[0]
    for case, error in ERRORS.items():
        assert error in found[case], found[case]


# -- DeepSpeed's -----------------------------------------------------------------------------------------------------
AVERAGING = {"enabled": True, "interval": 1, "window": 3}
MUON_LR = 0.02  # Adam's is LR
STAGES = [[(1, "folded"), (3, "forward")], slow([(0, "forward"), (2, "forward"), (3, "folded")])]


def engine_of(zero, residual, **changes):
    from deepspeed.runtime.zero.muon import original_muon

    torch._dynamo.config.disable = True  # what DeepSpeed compiles needs half a minute
    original_muon.ns_compute_dtype = lambda method: torch.float32
    completep = section(residual=residual)
    model, roles = build(completep, SIZES, DEPTH)
    params = {"adam_lr": LR, "muon_lr": MUON_LR, "weight_decay": DECAY, "eps": EPS, "betas": [0.8, 0.9]}
    config = {
        "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": zero, "reduce_scatter": False},
        "gradient_clipping": 0.0,
        "optimizer": {"type": "Muon", "params": {**params, "momentum": MOMENTUM, "torch_adam": True}},
        "completep": completep.model_dump(),
        "weight_averaging": AVERAGING,
        **changes,
    }
    start = unfolded(model, roles, completep)
    start = {name: value.clone() for name, value in start.items()}
    return ds_plugin.initialize(model=model, config=config, mpu=gpt.DeepSpeedMPU())[0], start


def masters(engine):
    from deepspeed.utils import safe_get_full_fp32_param

    whole = (lambda p: p.data) if engine.zero_optimization_stage() == 0 else safe_get_full_fp32_param
    return {name: whole(p).clone() for name, p in engine.module.named_parameters()}


def train_engine(engine, steps, snapshots):
    losses = []
    for step in steps:
        loss = loss_of(engine, *batch(step, mine()))
        engine.backward(loss)
        engine.step()
        losses.append(mean_of_ranks(loss))
        snapshots.append(masters(engine))
    return losses


def on_deepspeed(folder, stages):
    found = {}
    for zero, residual in stages:
        engine, start = engine_of(zero, residual)
        groups = [(group["role"], group["use_muon"], group["lr"]) for group in engine.basic_optimizer.param_groups]
        snapshots: list = []
        losses = train_engine(engine, range(3), snapshots)
        engine.save_checkpoint(f"{folder}/{zero}")
        losses += train_engine(engine, range(3, STEPS), snapshots)
        mean = reference.mean(snapshots[-3:])
        with ds_plugin.get_plugin(engine).averager.averaged_weights():
            averaged = masters(engine)
        other = [name for name in mean if not torch.equal(averaged[name], mean[name])]
        engine, _ = engine_of(zero, residual)
        engine.load_checkpoint(f"{folder}/{zero}")
        found[zero, residual] = losses, train_engine(engine, range(3, STEPS), []), other, groups
    split = {"split": False, "nesterov": True, "lr": MUON_LR, "betas": (0.8, 0.9)}
    return found, twins_losses(start, "shape_scaling", DEEPSPEEDS, **split) if dist.get_rank() == 0 else None


@pytest.mark.parametrize("stages", STAGES, ids=["some", "others"])
def test_deepspeeds_muon_trains_as_the_rules_say_resumes_and_is_averaged(workers, tmp_path, stages):
    found, expected = workers(2).run(on_deepspeed, tmp_path, stages)[0]
    assert list(found) == stages
    for case, (losses, after, other, groups) in found.items():
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) <= 1e-6, (case, losses, expected)
        assert after == losses[3:] and other == [], case
        assert {role for role, muon, _ in groups if not muon} == {
            "embedding", "unembedding", "block_norm", "final_norm"
        }, case  # fmt: skip


def refused_on_deepspeed():
    muon = {"type": "Muon", "params": {"lr": LR, "weight_decay": DECAY, "torch_adam": True}}
    cases = {
        "clip": (1, {"gradient_clipping": 1.0}),
        "per head": (0, {"optimizer": {**muon, "params": {**muon["params"], "per_head_muon": True}}}),
        "rate": (0, {"optimizer": {**muon, "params": {**muon["params"], "muon_lr": "auto"}}}),
        "another": (0, {"optimizer": {"type": "Lion", "params": {"lr": LR, "weight_decay": DECAY}}}),
    }
    return {case: refusal(engine_of, zero, "forward", **changes) for case, (zero, changes) in cases.items()}


DEEPSPEED_ERRORS = {
    "clip": "gradient_clipping is 1.0: ZeRO 1 clips what Muon makes of gradients by it, not these; write 0.0",
    "per head": "optimizer.params.per_head_muon is true: no rule covers it; remove it",
    "rate": "optimizer.params.lr is 'auto', which is not a usable number",
    "another": "optimizer.type is 'Lion'; the rules hold for AdamW and Muon",
}


def test_what_no_rule_covers_is_refused_on_deepspeed(workers):
    found = workers(1).run(refused_on_deepspeed)[0]
    for case, error in DEEPSPEED_ERRORS.items():
        assert error in found[case], found[case]
