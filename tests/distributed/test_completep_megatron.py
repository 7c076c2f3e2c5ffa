"""CompleteP on megatron-core's own optimizer: real schedules, DP, TP and PP, on gloo ranks.

The model has m_N = m_L = 2, so every multiplier is a power of two and the forward and the folded mode can be compared
to the last bits.
"""

import gc
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import megatron_patches
from ds_plugin.completep.config import CompletePConfig
from ds_plugin.core.errors import ConfigError, PluginError, StateError
from megatron_patches import megatron_on_cpu
from megatron_patches.completep import build_param_groups, finish, prepare, ratios_of
from megatron_patches.completep import optimizer as ours
from megatron_patches.models import gpt
from tests import muon_stand_in
from tests.harness import slow

VOCAB, LENGTH, STEPS, MICRO_BATCHES, MICRO_SIZE = 64, 8, 6, 4, 2
SIZE = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": LENGTH}
LR, MIN_LR, DECAY, EPS, CLIP = 0.01, 0.001, 0.1, 1e-4, 0.2  # an eps and a clip that matter, so that they are seen
WARMUP, DECAY_STEPS = 2, 20


def section(**changes):
    return CompletePConfig.model_validate({"enabled": True, "base_width": 16, "base_depth": 2, **changes})


def build(completep, *, tied=False, tensor_parallel=1, pipeline_parallel=1, vp_stage=None, weights=None):
    """This rank's stage of the model, or one of its two chunks; `weights` are those of the whole model, by name."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    megatron_on_cpu.enable()
    cfg = gpt.GPTConfig.model_validate({**SIZE, "tie_embeddings": tied, "tensor_parallel": tensor_parallel})
    virtual = None if vp_stage is None else 2
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_parallel, pipeline_parallel, virtual)
    gpt.initialize_parallel(cfg, 1234)
    config = gpt.transformer_config(cfg, torch.float32)
    config.pipeline_model_parallel_size, config.pipeline_dtype = pipeline_parallel, torch.float32
    config.virtual_pipeline_model_parallel_size = virtual
    config, spec = prepare(config, gpt.layer_spec(cfg), completep)
    stage = {"ignore_virtual": False, "vp_stage": vp_stage}
    model = GPTModel(
        config, spec, VOCAB, LENGTH, share_embeddings_and_output_weights=tied, vp_stage=vp_stage,
        pre_process=parallel_state.is_pipeline_first_stage(**stage),
        post_process=parallel_state.is_pipeline_last_stage(**stage),
    )  # fmt: skip
    finish(model, completep)
    if weights is not None:
        load(model, weights, tied)
    return model


def load(model, weights, tied):
    from megatron.core import parallel_state

    offset = model.decoder.layers[0].layer_number - 1
    rank = parallel_state.get_tensor_model_parallel_rank()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(int(parts[2]) + offset)
            whole = weights[
                "embedding.word_embeddings.weight" if tied and parts[0] == "output_layer" else ".".join(parts)
            ]
            if getattr(parameter, "tensor_model_parallel", False):
                size = parameter.shape[parameter.partition_dim]
                whole = whole.narrow(parameter.partition_dim, rank * size, size)
            parameter.copy_(whole)


def wrap(model, sharded):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    return DistributedDataParallel(
        model.config, DistributedDataParallelConfig(use_distributed_optimizer=sharded), model
    )


def optimizer_config(sharded, **changes):
    from megatron.core.optimizer import OptimizerConfig

    values = dict(lr=LR, min_lr=MIN_LR, weight_decay=DECAY, adam_eps=EPS, clip_grad=CLIP)
    return OptimizerConfig(**{**values, "use_distributed_optimizer": sharded, **changes})


def scheduler_of(optimizer, init_lr=0.0):
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    scheduler = OptimizerParamScheduler(
        optimizer, init_lr=init_lr, max_lr=LR, min_lr=MIN_LR, lr_warmup_steps=WARMUP, lr_decay_steps=DECAY_STEPS,
        lr_decay_style="linear", start_wd=DECAY, end_wd=DECAY, wd_incr_steps=1, wd_incr_style="constant",
    )  # fmt: skip
    ours.check_scheduler(scheduler)
    return scheduler


def micro_batch(step, index):
    """Tokens of an eighth of the vocabulary, so that there is something to learn."""
    generator = torch.Generator().manual_seed(100 * step + index)
    tokens = torch.randint(0, VOCAB // 8, (MICRO_SIZE, LENGTH + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def forward(data, model):
    tokens, labels = next(data)
    positions = torch.arange(LENGTH).expand(MICRO_SIZE, -1)
    output = model(tokens, positions, None, labels=labels)

    def loss_of(output):
        loss = output.mean()
        return loss, {"loss": loss.detach().clone()}  # the schedule divides the other in place

    return output, loss_of


def train_step(ddp, optimizer, scheduler, step, config=None):
    """One step of the global batch through Megatron's schedule; the loss, on every rank, and the gradient norm.

    ``config``: where the loop sets how gradients are reduced, if not on the model's own."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    (ddp.config if config is None else config).finalize_model_grads_func = finalize_model_grads
    replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    mine = [micro_batch(step, i) for i in range(replica, MICRO_BATCHES, replicas)]
    ddp.zero_grad_buffer()
    optimizer.zero_grad()
    losses = get_forward_backward_func()(
        forward_step_func=forward, data_iterator=iter(mine), model=[ddp], num_microbatches=len(mine),
        seq_length=LENGTH, micro_batch_size=MICRO_SIZE, forward_only=False,
    )  # fmt: skip
    ok, norm, zeros = optimizer.step()
    assert ok and (zeros is None or zeros >= 0)
    scheduler.step(1)
    total = sum((entry["loss"] for entry in losses), torch.zeros(()))  # losses are on a pipeline's last stage
    total = total.clone()
    dist.all_reduce(total)
    return total.item() / MICRO_BATCHES / parallel_state.get_tensor_model_parallel_world_size(), float(norm)


def train(completep, *, sharded, steps=STEPS, config=None, **layout):
    ddp = wrap(build(completep, **layout), sharded)
    optimizer = ours.build_optimizer(optimizer_config(sharded, **(config or {})), [ddp], completep)
    scheduler = scheduler_of(optimizer)
    curve = [train_step(ddp, optimizer, scheduler, step) for step in range(steps)]
    return [loss for loss, _ in curve], [norm for _, norm in curve]


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


def states(model, optimizer, scheduler, sharding, is_loading):
    metadata = {"distrib_optim_sharding_type": sharding}
    sharded = model.sharded_state_dict(metadata=metadata)
    return {
        "model": sharded,
        "optimizer": optimizer.sharded_state_dict(sharded, is_loading=is_loading, metadata=metadata),
        "scheduler": scheduler.state_dict(),
        **ours.checkpoint_state(section()),
    }


def group_values(optimizer):
    keys = ("lr_mult", "lr", "max_lr", "min_lr", "weight_decay", "wd_mult", "eps", "betas", "default_config")
    return [{key: group[key] for key in keys} for group in optimizer.param_groups]


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


# lr, min lr, wd, eps of the base: 0.01, 0.001, 0.1, 1e-4; m_N = m_L = 2, alpha 1.
GROUPS = {
    "embedding": (0.01, 0.001, 0.1, 1e-4),
    "hidden": (0.005, 0.0005, 0.2, 2.5e-5),
    "block_norm": (0.01, 0.001, 0.0, 2.5e-5),
    "block_bias": (0.01, 0.001, 0.0, 2.5e-5),
    "final_norm": (0.01, 0.001, 0.0, 1e-4),
    "unembedding": (0.01, 0.001, 0.1, 1e-4),
}
# The branches' last layers hold half the weights, the output layer too: lr and min lr / 2, wd and eps x 2.
FOLDED_GROUPS = {
    **GROUPS,
    "branch_out": (0.0025, 0.00025, 0.4, 5e-5),
    "branch_out_bias": (0.005, 0.0005, 0.0, 5e-5),
    "unembedding": (0.005, 0.0005, 0.2, 2e-4),
}
# batch_ratio 2, token_ratio 8: lr and wd / 2, eps x 2, 1 - beta / 4; embeddings' eps / m_N; logits absorbed.
COMPLETED_GROUPS = {
    "embedding": (0.005, 0.0005, 0.05, 1e-4),
    "hidden": (0.0025, 0.00025, 0.1, 5e-5),
    "block_norm": (0.005, 0.0005, 0.0, 5e-5),
    "block_bias": (0.005, 0.0005, 0.0, 5e-5),
    "final_norm": (0.005, 0.0005, 0.0, 2e-4),
    "unembedding": (0.0025, 0.00025, 0.1, 2e-4),
}


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
    "no role": ["ConfigError", "extra.weight"],
}


def test_refusals(workers):
    messages = workers(1).run(refusals)[0]
    for name, parts in EXPECTED.items():
        assert name in messages, f"{name} was not refused"
        assert all(part in messages[name] for part in parts), messages[name]


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
