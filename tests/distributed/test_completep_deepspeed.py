"""CompleteP on DeepSpeed: built optimizers, resuming, universal checkpoints, and the clipping norm in folded mode."""

import contextlib
import io

import pytest
import torch
import torch.distributed as dist

import ds_plugin
from ds_plugin.cli.main import main
from ds_plugin.core.errors import PluginError
from megatron_patches.models import gpt
from tests.distributed.test_completep import BASE, DECAY, EPS, LR, VOCAB, build, section
from tests.harness import slow

LENGTH, STEPS, BATCH = 12, 5, 4
SMALL = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 2, "seq_length": LENGTH}
SECTION = {"base_width": 8, "base_depth": 1, "base_head_dim": 8}  # m_N = m_L = 4
#: lr 0.01, decay 0.1, eps 1e-4; m_N = m_L = 4, alpha 1: role -> lr, weight decay, eps
ROWS = {
    "embedding": (0.01, 0.1, 1e-4),
    "hidden": (0.0025, 0.4, 1e-4 / 16),
    "block_norm": (0.01, 0.0, 1e-4 / 16),
    "block_bias": (0.01, 0.0, 1e-4 / 16),
    "final_norm": (0.01, 0.0, 1e-4),
    "unembedding": (0.01, 0.1, 1e-4),
}


def small(**changes):
    return section(**SECTION, **changes)


def model_of(completep):
    return build(completep, **SMALL)


def deepspeed_config(completep, zero=0, **changes):
    ranks = dist.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": BATCH // ranks,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": zero},
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": DECAY, "eps": EPS, "torch_adam": True}},
        "completep": completep.model_dump() if completep is not None else {**BASE, "enabled": False},
    }
    return {**config, **changes}


def engine_of(completep, config, model=None, **given):
    model = model_of(completep) if model is None else model
    return ds_plugin.initialize(model=model, config=config, mpu=gpt.DeepSpeedMPU(), **given)[0]


def train(engine, steps, first=0):
    """The mean loss of every step over all ranks; each takes its part of one batch, whatever their number."""
    losses, rank, share = [], dist.get_rank(), BATCH // dist.get_world_size()
    for step in range(first, first + steps):
        tokens = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))
        tokens = tokens[rank * share : (rank + 1) * share]
        positions = torch.arange(LENGTH).expand(share, -1)
        loss = engine(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append((total / dist.get_world_size()).item())
    return losses


def weights(engine):
    from deepspeed.utils import safe_get_full_fp32_param

    return {
        name: (p.data if engine.zero_optimization_stage() == 0 else safe_get_full_fp32_param(p)).clone()
        for name, p in engine.module.named_parameters()
    }


def groups(engine):
    keys = ("role", "lr", "weight_decay", "eps", "betas")
    return [{key: group[key] for key in keys} for group in engine.basic_optimizer.param_groups]


def refusal(function):
    """What a call is refused with; an error the user cannot read fails the test."""
    try:
        function()
    except PluginError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


# -- the optimizer and the parameters that are given -----------------------------------------------------------------


class FusedAdam(torch.optim.AdamW):
    """Named, and keeping its mode on itself, as apex, TransformerEngine and DeepSpeed do."""

    def __init__(self, params, adam_w_mode=True, **settings):
        super().__init__(params, **settings)
        self.adam_w_mode = adam_w_mode
        for group in self.param_groups:
            group["bias_correction"] = True


ADAMW = {"lr": LR, "weight_decay": DECAY, "eps": EPS}
BUILT = {
    "one group": lambda model: torch.optim.AdamW(model.parameters(), betas=(0.8, 0.9), foreach=False, **ADAMW),
    "named parameters": lambda model: torch.optim.AdamW(model.named_parameters(), betas=(0.8, 0.9), **ADAMW),
    "no decay on some": lambda model: torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1]},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(0.8, 0.9),
        **ADAMW,
    ),
    "fused": lambda model: FusedAdam(model.parameters(), betas=(0.8, 0.9), **ADAMW),
}


def _built(kinds, zero):
    plain = deepspeed_config(small(), zero)
    plain["optimizer"]["params"]["betas"] = [0.8, 0.9]
    expected, found = train(engine_of(small(), plain), 2), {}
    for kind in kinds:
        model = model_of(small())
        optimizer = BUILT[kind](model)
        config = {key: value for key, value in deepspeed_config(small(), zero).items() if key != "optimizer"}
        engine = engine_of(small(), config, model, optimizer=optimizer, model_parameters=model.parameters())
        assert engine.basic_optimizer is optimizer
        kept = {key: optimizer.param_groups[1].get(key) for key in ("foreach", "bias_correction", "param_names")}
        found[kind] = groups(engine), kept, train(engine, 2)
    return found, expected


@pytest.mark.parametrize(("kinds", "zero"), [(list(BUILT), 0), (["one group"], 3)])
def test_a_built_optimizer_gets_the_groups_of_the_roles(workers, kinds, zero):
    for results, expected in workers(2).run(_built, kinds, zero):
        for kind, (found, kept, losses) in results.items():
            assert [group["role"] for group in found] == list(ROWS)
            for group in found:
                values = group["lr"], group["weight_decay"], group["eps"]
                assert values == pytest.approx(ROWS[group["role"]], rel=1e-12)
                assert tuple(group["betas"]) == (0.8, 0.9)
            assert kept["foreach"] is (False if kind == "one group" else None) and kept["param_names"] is None
            assert kept["bias_correction"] is (True if kind == "fused" else None)
            assert losses == pytest.approx(expected, abs=1e-6)


def _stepped(model):
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return optimizer


def _scheduled(model):
    optimizer = torch.optim.AdamW(model.parameters())
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return optimizer


def _in_two(model, **second):
    params = list(model.parameters())
    return torch.optim.AdamW([{"params": params[:3]}, {"params": params[3:], **second}])


# name: (what is given to initialize(), as a function of the model; what the message holds)
REFUSED = {
    "no Adam": (lambda m: {"optimizer": torch.optim.SGD(m.parameters(), 0.1)}, ["SGD", "lambda groups"]),
    "stepped": (lambda m: {"optimizer": _stepped(m)}, ["AdamW", "state for", "not stepped"]),
    "scheduled": (lambda m: {"optimizer": _scheduled(m)}, ["scheduler", "lr_scheduler=lambda"]),
    "missing": (
        lambda m: {"optimizer": torch.optim.AdamW([p for p in m.parameters() if p is not m.output_layer.weight])},
        ["lacks", "output_layer.weight"],
    ),
    "foreign": (
        lambda m: {"optimizer": torch.optim.AdamW([*m.parameters(), torch.nn.Parameter(torch.zeros(3, 5))])},
        ["[3, 5]", "not the model's"],
    ),
    "two rates": (lambda m: {"optimizer": _in_two(m, lr=0.5)}, ["lr 0.001 and 0.5"]),
    "two eps": (lambda m: {"optimizer": _in_two(m, eps=0.5)}, ["eps 1e-08 and 0.5"]),
    "two betas": (lambda m: {"optimizer": _in_two(m, betas=(0.1, 0.2))}, ["betas (0.9, 0.999) and (0.1, 0.2)"]),
    "two modes": (lambda m: {"optimizer": _in_two(m, amsgrad=True)}, ["amsgrad False and True"]),
    "two decays": (lambda m: {"optimizer": _in_two(m, weight_decay=0.5)}, ["weight_decay 0.01 and 0.5", "Table 1"]),
    "a tensor": (
        lambda m: {"optimizer": torch.optim.AdamW(m.parameters(), lr=torch.tensor(0.1), capturable=True)},
        ["lr of the optimizer AdamW", "tensor(0.1"],
    ),
    "Adam": (
        lambda m: {"optimizer": torch.optim.Adam(m.parameters(), weight_decay=0.1)},
        ["Adam adds weight_decay 0.1 to the gradient", "AdamW"],
    ),
    "FusedAdam": (
        lambda m: {"optimizer": FusedAdam(m.parameters(), adam_w_mode=False)},
        ["FusedAdam adds weight_decay 0.01 to the gradient"],
    ),
    "groups": (
        lambda m: {"model_parameters": [{"params": list(m.parameters())}]},
        ["model_parameters", "param groups"],
    ),
    "some": (lambda m: {"model_parameters": list(m.parameters())[1:]}, ["model_parameters", "all of the model's"]),
    "scheduler": (
        lambda m: {"lr_scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.AdamW(m.parameters()), 1)},
        ["lr_scheduler", "lambda optimizer"],
    ),
    "flattening": (
        lambda m: {"lr_scheduler": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=9)},
        ["OneCycleLR", "LambdaLR"],
    ),
    "own groups": (
        lambda m: {"optimizer": lambda groups: torch.optim.AdamW(m.parameters())},
        ["AdamW", "1 param groups", "lambda groups"],
    ),
    "SGD of the groups": (lambda m: {"optimizer": lambda groups: torch.optim.SGD(groups)}, ["returned SGD", "AdamW"]),
    "Adam of the groups": (lambda m: {"optimizer": lambda groups: torch.optim.Adam(groups)}, ["returned Adam"]),
}


def _refusals():
    messages, model = {}, model_of(small())
    for name, (given, _) in REFUSED.items():
        messages[name] = refusal(
            lambda given=given: engine_of(small(), deepspeed_config(small()), model, **given(model))  # type: ignore[misc]
        )
    adam = deepspeed_config(small())["optimizer"]["params"]
    for name, described in (
        ("1-bit", {"type": "OneBitAdam", "params": adam}),
        ("JSON Adam", {"type": "Adam", "params": {**adam, "adam_w_mode": 0}}),
        ("no rate", {"type": "AdamW"}),
    ):
        config = deepspeed_config(small(), optimizer=described)
        messages[name] = refusal(lambda config=config: engine_of(small(), config, model))  # type: ignore
    # bf16 without ZeRO is a wrapper whose norm cannot be corrected; without clipping it does no harm
    for name, clipping in (("folded bf16 clipped", 1.0), ("folded bf16", 0.0)):
        c = small(residual="folded")
        config = deepspeed_config(c, bf16={"enabled": True}, gradient_clipping=clipping)
        messages[name] = refusal(lambda c=c, config=config: engine_of(c, config))  # type: ignore[misc]
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    del DeepSpeedZeroOptimizer.get_grad_norm_direct
    messages["another DeepSpeed"] = refusal(lambda: engine_of(c, deepspeed_config(c, 1)))
    return messages


def test_what_cannot_work_is_refused_on_every_rank(workers):
    first, second = workers(2).run(_refusals)
    assert first == second
    assert "DeepSpeedZeroOptimizer has no attribute 'get_grad_norm_direct'" in first.pop("another DeepSpeed")
    assert first.pop("folded bf16") == "nothing was refused"
    clipped = first.pop("folded bf16 clipped")
    assert "gradient_clipping 1.0" in clipped and "FP16_UnfusedOptimizer" in clipped and "stage 1" in clipped
    assert "optimizer.type: 'OneBitAdam' is not known" in first["1-bit"] and "adam_w_mode is 0" in first["JSON Adam"]
    assert "optimizer.params.lr is missing" in first["no rate"]
    for name, (_, parts) in REFUSED.items():
        assert first[name].startswith("ConfigError") and all(part in first[name] for part in parts), first[name]


def _scheduler_function():
    def warmup(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 4))

    model = model_of(small())
    given = filter(lambda p: p.requires_grad, model.parameters())
    engine = engine_of(small(), deepspeed_config(small()), model, lr_scheduler=warmup, model_parameters=given)
    train(engine, 2)
    return {group["role"]: group["lr"] for group in groups(engine)}


def test_a_function_of_the_scheduler_sees_the_groups(workers):
    for rates in workers(1).run(_scheduler_function):
        assert rates == pytest.approx({role: row[0] / 2 for role, row in ROWS.items()})


def _flattened(zero, folder):
    """Whatever gives the groups one rate, or one decay, is refused at its first step, which changes nothing."""

    def floor(optimizer):
        schedulers = torch.optim.lr_scheduler
        return schedulers.ChainedScheduler([schedulers.CosineAnnealingLR(optimizer, 4, eta_min=LR / 2)])

    engine, said = engine_of(small(), deepspeed_config(small(), zero), lr_scheduler=floor), {}

    def attempt(name):
        before = weights(engine)
        said[name] = refusal(lambda: train(engine, 1))
        if said[name] != "nothing was refused":
            after = weights(engine)
            assert all(torch.equal(weight, after[n]) for n, weight in before.items()), name
        engine.zero_grad()

    def write(lr, decay):
        for group in engine.basic_optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"] ** (decay != "lr")
            group["weight_decay"] = DECAY if decay == "flat" else ROWS[group["role"]][1]

    attempt("first")
    attempt("scheduler")
    engine.lr_scheduler = engine.client_lr_scheduler = None
    write(LR / 3, "own")
    attempt("scaled by the loop")
    write(LR / 3, "lr")
    attempt("loop")
    write(LR / 3, "flat")
    attempt("decay")
    write(LR, "own")
    engine.save_checkpoint(folder, tag="t")
    engine.load_checkpoint(folder, tag="t")
    write(LR, "lr")
    attempt("loaded")
    ds_plugin.detach(engine)
    attempt("detached")
    return said


@pytest.mark.parametrize("zero", [slow(0), slow(2), 3])
def test_groups_out_of_their_ratios_are_refused_at_the_step(workers, tmp_path, zero):
    first, second = workers(2).run(_flattened, zero, str(tmp_path))
    assert first == second
    for name in ("first", "scaled by the loop", "detached"):
        assert first.pop(name) == "nothing was refused", name
    for name, parts in {
        "scheduler": ["role hidden has lr", "the scheduler ChainedScheduler"],
        "loop": ["role hidden has lr 0.00333333, expected 0.000833333", "the training loop", "lr_scale"],
        "decay": ["role hidden has weight_decay 0.1, expected 0.4", "final_norm 0.1"],
        "loaded": ["role hidden has lr 0.01, expected 0.0025"],
    }.items():
        assert first[name].startswith("ConfigError: completep") and all(p in first[name] for p in parts), first[name]


# -- resuming --------------------------------------------------------------------------------------------------------

SCHEDULER = {"type": "WarmupCosineLR", "params": {"total_num_steps": 20, "warmup_num_steps": 6}}
HALF = 2


def resume_config(completep, zero, **changes):
    return deepspeed_config(completep, zero, scheduler=SCHEDULER, gradient_clipping=0.5, **changes)


def _uninterrupted(zero, folder, completep):
    engine = engine_of(completep, resume_config(completep, zero))
    train(engine, HALF)
    at_save = groups(engine)
    engine.save_checkpoint(folder, tag="half")
    return at_save, train(engine, HALF, first=HALF), weights(engine), groups(engine)


def _resumed(zero, folder, completep, universal, tag):
    changes = {"checkpoint": {"load_universal": True}} if universal else {}
    engine = engine_of(completep, resume_config(completep, zero, **changes))
    engine.load_checkpoint(folder, tag=tag)
    at_load = groups(engine)
    return at_load, train(engine, HALF, first=HALF), weights(engine), groups(engine)


def assert_same(found, expected, tolerance=0.0):
    for before, after in ((0, 0), (3, 3)):
        assert found[before] == expected[after]
    assert found[1] == pytest.approx(expected[1], abs=tolerance)
    for name, weight in expected[2].items():
        assert torch.allclose(found[2][name], weight, rtol=0, atol=tolerance), name


def _convert(folder):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        done = main(["to-universal", f"{folder}/half", f"{folder}/universal"])
        again = main(["to-universal", f"{folder}/half", f"{folder}/universal"])
    return done, again, printed.getvalue()


@pytest.mark.parametrize(("zero", "ranks"), [(1, 2), slow(1, 1), slow(3, 2), (3, 1)])
def test_interrupted_and_resumed_is_uninterrupted(workers, tmp_path, zero, ranks):
    """Bit for bit from the checkpoint and from its universal form; on another number of ranks sums are rounded."""
    expected = workers(ranks).run(_uninterrupted, zero, str(tmp_path), small())[0]
    [(done, again, printed)] = workers(1).run(_convert, str(tmp_path))
    assert (done, again) == (0, 2) and "load_universal" in printed and "universal exists already" in printed
    for found in workers(ranks).run(_resumed, zero, str(tmp_path), small(), False, "half"):
        assert_same(found, expected)
    for other, tolerance in ((ranks, 0.0), (3 - ranks, 1e-6)):
        for found in workers(other).run(_resumed, zero, str(tmp_path), small(), True, None):
            assert_same(found, expected, tolerance)


def _warmed_up(folder, universal):
    """Sequence length warmup beside CompleteP: its ledger counts the tokens of all ranks."""
    completep = small()
    changes = {"checkpoint": {"load_universal": True}} if universal else {}
    warmup = {"enabled": True, "start_length": 4, "end_length": LENGTH, "multiple_of": 4, "duration": {"steps": 20}}
    engine = engine_of(completep, resume_config(completep, 1, sequence_length_warmup=warmup, **changes))
    if universal:
        engine.load_checkpoint(folder)
        return ds_plugin.get_plugin(engine).ledger
    train(engine, HALF)
    engine.save_checkpoint(folder, tag="half")
    return ds_plugin.get_plugin(engine).ledger


def _universal_refusals(folder, ranks_files):
    """On one engine of ZeRO 1: ``ranks_files`` is a universal checkpoint of it."""
    universal = {"checkpoint": {"load_universal": True}}
    messages = {"stage 0": refusal(lambda: engine_of(small(), deepspeed_config(small(), 0, **universal)))}
    zero3 = engine_of(small(), deepspeed_config(small(), 3, **universal))
    messages["other stage"] = refusal(lambda: zero3.load_checkpoint(folder))
    other = engine_of(small(alpha=0.5), deepspeed_config(small(alpha=0.5), 1, **universal))
    messages["other recipe"] = refusal(lambda: other.load_checkpoint(folder))
    (ranks_files / "ds_plugin.json").unlink()
    zero1 = engine_of(small(), deepspeed_config(small(), 1, **universal))
    messages["no manifest"] = refusal(lambda: zero1.load_checkpoint(folder))
    return messages


def _annealed(folder):
    """The groups' rates over the base's after a checkpoint of the rate `LR` goes on under a scheduler of a quarter."""

    def started(lr):
        warm = {"warmup_min_lr": 0.0, "warmup_max_lr": lr, "warmup_num_steps": 1, "warmup_type": "linear"}
        config = deepspeed_config(small(), zero=1, scheduler={"type": "WarmupLR", "params": warm})
        config["optimizer"]["params"]["lr"] = lr
        return engine_of(small(), config)

    engine = started(LR)
    train(engine, 2)
    engine.save_checkpoint(folder)
    engine = started(LR / 4)
    engine.load_checkpoint(folder)
    train(engine, 2, first=2)
    return {group["role"]: group["lr"] / (LR / 4) for group in groups(engine)}, engine.global_steps


def test_a_run_goes_on_at_another_base_learning_rate(workers, tmp_path):
    rates, steps = workers(1).run(_annealed, str(tmp_path))[0]
    assert steps == 4 and rates == pytest.approx({role: row[0] / 0.01 for role, row in ROWS.items()})


def test_universal_checkpoints_of_the_other_methods(workers, tmp_path):
    saved = workers(2).run(_warmed_up, str(tmp_path), False)
    workers(1).run(_convert, str(tmp_path))
    loaded = workers(1).run(_warmed_up, str(tmp_path), True)
    assert saved[0].read == HALF * BATCH * LENGTH and loaded == saved[:1]
    messages = workers(1).run(_universal_refusals, str(tmp_path), tmp_path / "universal")[0]
    for name, parts in {
        "stage 0": ["ConfigError", "load_universal", "stage 0", "stage 1"],
        "other stage": ["CheckpointError", "stage 1", "stage 3"],
        "other recipe": ["CheckpointError", '"alpha": 0.5'],
        "no manifest": ["CheckpointError", "ds_plugin.json is missing", "to-universal"],
    }.items():
        assert all(part in messages[name] for part in parts), messages[name]


# -- folded mode -----------------------------------------------------------------------------------------------------

CLIP = 0.05


def _both_modes(zero, changes, steps):
    """Losses, gradient norms and weights of the forward mode, then of the folded mode with its factors undone."""
    found = []
    for residual in ("forward", "folded"):
        completep = small(residual=residual)
        config = deepspeed_config(completep, zero, gradient_clipping=CLIP, **changes)
        engine = engine_of(completep, config)
        losses, norms = [], []
        for step in range(steps):
            losses += train(engine, 1, first=step)
            norm = engine.get_global_grad_norm()
            norms.append(None if norm is None else float(norm))
        unfolded = weights(engine)
        if residual == "folded":  # m_N = m_L = 4: branch ends and the unembedding hold a quarter
            for name, weight in unfolded.items():
                if "linear_proj" in name or "linear_fc2" in name or "output_layer" in name:
                    weight.mul_(4)
        ds_plugin.detach(engine)
        assert "clip_fp32_gradients" not in vars(engine)
        train(engine, 1, first=steps)
        found.append((losses, norms, unfolded, engine.get_global_grad_norm()))
    return found


BF16 = {"bf16": {"enabled": True}}
OFFLOAD = {"device": "cpu"}
MODES = {
    # name: (ZeRO stage, changes of the config, how far losses, norms and weights may be apart)
    "stage 0": (0, {}, 1e-6),
    "stage 1": (1, {}, 1e-6),
    "stage 2": (2, {}, 1e-6),
    "stage 3": (3, {}, 1e-6),
    "stage 1 offload": (1, {"zero_optimization": {"stage": 1, "offload_optimizer": OFFLOAD}}, 1e-6),
    "stage 3 offload": (
        3,
        {"zero_optimization": {"stage": 3, "offload_optimizer": OFFLOAD, "sub_group_size": 2000}},
        1e-6,
    ),
    "stage 1 bf16": (1, BF16, 1e-2),
    "BF16_Optimizer": (1, {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}, 1e-2),
}


@pytest.mark.parametrize("mode", [slow(m) if m in ("stage 1", "stage 3 offload", "stage 1 bf16") else m for m in MODES])
def test_folded_mode_clips_as_the_forward_mode_does(workers, mode):
    zero, changes, tolerance = MODES[mode]
    if "offload" in mode:  # without DeepSpeed's own CPU Adam, which would have to be compiled
        changes = {**changes, "zero_force_ds_cpu_optimizer": False}
    for forward, folded in workers(2).run(_both_modes, zero, changes, STEPS):
        assert folded[0] == pytest.approx(forward[0], abs=tolerance)
        if mode == "stage 0":  # DeepSpeed keeps no norm there
            assert forward[1] == folded[1] == [None] * STEPS
        else:
            assert folded[1] == pytest.approx(forward[1], rel=max(1e-5, tolerance))
            assert min(forward[1]) > 2 * CLIP  # it bites
            assert folded[3] > 2 * forward[3]  # after detach() it is DeepSpeed's own
        for name, weight in forward[2].items():
            assert torch.allclose(folded[2][name], weight, rtol=0, atol=tolerance), name
