"""The example script on DeepSpeed's pipeline x tensor x data parallelism: the run that it is without them."""

import argparse
import contextlib
import io
import itertools
import shutil

import pytest
import torch
from safetensors.torch import load_file

import ds_plugin
from ds_plugin.cli.main import main
from ds_plugin.completep.supported import gpt_of
from ds_plugin.core.errors import ConfigError, StateError
from ds_plugin.deepspeed_engine.completep import CompleteP
from tests.distributed.test_pretrain import (  # noqa: F401 - folder is a fixture
    ROOT,
    config,
    folder,
    load_script,
    metrics,
    run_script,
    summary,
)
from tests.harness import Launched, launch, slow

SHORT = {"training__steps": 6, "training__eval_interval": 3, "training__save_interval": 3}
SAME = ("length", "lr", "tokens_trained", "tokens_read", "flops")
CLOSE = ("train_loss", "eval_loss", "eval_loss_averaged")


def averaged(folder, name):  # noqa: F811
    return load_file(folder / "runs" / name / "averaged.safetensors")


@pytest.mark.parametrize("ranks", [4, slow(8)])
def test_three_axes_train_the_run_of_one(workers, folder, ranks):  # noqa: F811
    """Also the names in the averaged file, and what the summary counts over all stages."""
    axes = {"model__pipeline_parallel": 2, "model__tensor_parallel": 2}
    workers(2).run(run_script, str(folder), "data", config(**SHORT))
    compared = workers(ranks).run(
        run_script, str(folder), "all", {**config(**SHORT, **axes), "gradient_accumulation_steps": 2}
    )
    assert min(compared) > 0
    one, both = metrics(folder, "data"), metrics(folder, "all")
    assert one["train_loss"][0] - one["train_loss"][-1] > 0.2
    for column in SAME:
        assert both[column] == one[column], column
    for column in CLOSE:
        assert both[column] == pytest.approx(one[column], abs=1e-5), column
    told, of_all = summary(folder, "data"), summary(folder, "all")
    assert (of_all["tensor_parallel"], of_all["pipeline_parallel"], of_all["world_size"]) == (2, 2, ranks)
    for key in ("parameters", "flops", "averaged_steps", "tokens_trained"):
        assert of_all[key] == told[key], key
    mean, expected = averaged(folder, "all"), averaged(folder, "data")
    assert mean.keys() == expected.keys() and sum(t.numel() for t in mean.values()) == of_all["parameters"]
    for name, value in mean.items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=0, msg=name)


CARRY = {"mode": "carry", "interleave": 3, "learning_rate": {"by": "tokens"}, "duration": {"tokens": 500}}


def test_a_resumed_pipeline_is_bitwise_the_uninterrupted_one(workers, folder):  # noqa: F811
    pool = workers(2)
    settings = config(**SHORT, model__pipeline_parallel=2, model__tie_embeddings=True, model__dropout=0.1)
    settings |= {"gradient_accumulation_steps": 2, "bf16": {"enabled": True}}
    settings["sequence_length_warmup"] |= CARRY
    pool.run(run_script, str(folder), "whole", settings)
    cut = folder / "runs" / "cut"
    shutil.copytree(folder / "runs" / "whole", cut)
    (cut / "summary.json").unlink()
    (cut / "checkpoints" / "latest").write_text("step00000003")
    lines = (cut / "metrics.csv").read_text().splitlines(keepends=True)
    (cut / "metrics.csv").write_text("".join(lines[: 1 + 5]))
    pool.run(run_script, str(folder), "cut", settings, "--resume")
    assert metrics(folder, "cut") == metrics(folder, "whole")
    first, second = averaged(folder, "whole"), averaged(folder, "cut")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# -- every option of the model, against the GPTModel -----------------------------------------------------------------

LEARNED = {"tie_embeddings": True, "init_std": 0.1}
ROPE = {
    "position_embedding": "rope", "normalization": "RMSNorm", "activation": "swiglu", "num_query_groups": 2,
    "bias": False, "init_std": 0.1,
}  # fmt: skip
NORMED = {"qk_norm": True, "num_layers": 4, "init_std": 0.1}
OPTIONS = {
    # name: (options of the model, of completep, stages, tensor-parallel ranks)
    "tied, folded": (LEARNED, {"residual": "folded"}, 2, 2),
    "llama, forward": (ROPE, {"residual": "forward"}, 2, 2),
    "qk norm, folded, two layers a stage": (NORMED, {"residual": "folded"}, 2, 1),
    "tied, no completep": (LEARNED, None, 2, 1),
}
BATCH, MICRO = 8, 2


def load_settings(json_config):
    from launch_scripts.gpt import settings

    flags = vars(settings.parser().parse_args(["--config", "-"]))
    return settings.load_settings(argparse.Namespace(**flags | {"config": json_config}))


def prepared(options, completep, pipe, tensor, **changes):
    """The script's engine on these ranks, for a vocabulary of 250 tokens."""
    from megatron_patches import megatron_on_cpu
    from megatron_patches.models import gpt

    megatron_on_cpu.enable()
    # an eps of the gradients' order: without it Adam would forget a wrong clip
    optimizer = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3}}
    json_config = config(completep__enabled=completep is not None)
    json_config["completep"] |= completep or {}
    json_config |= {"gradient_clipping": 0.1, "optimizer": optimizer, "train_micro_batch_size_per_gpu": MICRO}
    del json_config["scheduler"], json_config["train_batch_size"]
    ranks = torch.distributed.get_world_size() // (pipe * tensor)
    json_config["gradient_accumulation_steps"] = BATCH // MICRO // ranks
    json_config["model"] |= {**options, "tensor_parallel": tensor, "pipeline_parallel": pipe}
    json_config |= changes
    run = load_settings(json_config)
    script = load_script()
    gpt.initialize_parallel(run.model, 7)
    return script.build_engine(run, script.build_model(run, 250))


def whole_batch(step):
    tokens = torch.randint(0, 250, (BATCH, 33), generator=torch.Generator().manual_seed(step))
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "position_ids": torch.arange(32).expand(BATCH, -1)}


def micro_batches(rank, ranks):
    """Random micro-batches of a data-parallel rank; together the ranks' are the same in every layout."""
    positions = torch.arange(32).expand(MICRO, -1)
    for step in itertools.count():
        tokens = torch.randint(0, 250, (BATCH, 33), generator=torch.Generator().manual_seed(step))
        for some in tokens.chunk(ranks)[rank].split(MICRO):
            yield {"tokens": some[:, :-1].contiguous(), "labels": some[:, 1:].contiguous(), "position_ids": positions}


class Losses(list):
    """Takes the script's losses in place of its recorder."""

    def loss(self, loss):
        self.append(loss.detach())


def trained(options, completep, pipe, tensor, steps=4):
    """This rank's weights before and after some steps, by their names in a GPTModel; the steps' losses and norms."""
    from megatron_patches.models import gpt, pipeline_gpt

    engine, script, mpu = prepared(options, completep, pipe, tensor), load_script(), gpt.DeepSpeedMPU()
    model = gpt_of(engine.module)
    data = micro_batches(mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size())
    batches = ds_plugin.get_plugin(engine).batches(lambda n: map(pipeline_gpt.micro_batch, data) if pipe > 1 else data)

    def weights():
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    start, losses, norms = weights(), [], []
    for _ in range(steps):
        seen = Losses()
        script.train_step(engine, batches, seen)
        losses.append(torch.stack(seen).mean().item())
        norms.append(float(engine.get_global_grad_norm()))
    if completep is not None:  # one rate for all groups is refused on every stage, and changes nothing
        for group in engine.basic_optimizer.param_groups:
            group["lr"] = 0.02
        with pytest.raises(ConfigError, match="completep: at this step the role"):
            script.train_step(engine, batches, Losses())
    return start, losses, norms, weights()


@pytest.mark.parametrize("name", [slow(name) if name == "tied, folded" else name for name in OPTIONS])
def test_a_pipeline_of_every_kind_is_the_whole_model(workers, name):
    options, completep, pipe, tensor = OPTIONS[name]
    expected = workers(tensor).run(trained, options, completep, 1, tensor)
    found = workers(pipe * tensor).run(trained, options, completep, pipe, tensor)
    tied = "embedding.word_embeddings.weight"
    for rank in range(tensor):
        stages = [found[stage * tensor + rank] for stage in range(pipe)]
        start, losses, norms, end = expected[rank]
        assert min(norms) > 0.2 and losses[0] != losses[-1]
        assert {name for stage in stages for name in stage[0]} == start.keys()
        for first, stage_losses, stage_norms, last in stages:
            for parameter, value in first.items():
                assert torch.equal(value, start[parameter]), parameter
            assert stage_losses == pytest.approx(losses, abs=1e-5)
            assert stage_norms == pytest.approx(norms, rel=1e-5)
            for parameter, value in last.items():
                torch.testing.assert_close(value, end[parameter], atol=1e-5, rtol=0, msg=parameter)
        if options.get("tie_embeddings"):
            assert torch.equal(stages[0][3][tied], stages[-1][3][tied])


# -- universal checkpoints ---------------------------------------------------------------------------------------------

HALF = 3


def half(saves, options, completep, pipe, tensor, resumed=False):
    """A run's first and second half, or from its universal checkpoint the second; its losses, and what it ends with."""
    from megatron_patches.models import gpt, pipeline_gpt

    changes = {"weight_averaging": {"enabled": True, "interval": 1, "window": 2}}
    if resumed:
        changes["checkpoint"] = {"load_universal": True}
    engine, script = prepared(options, completep, pipe, tensor, **changes), load_script()
    model, mpu, plugin = gpt_of(engine.module), gpt.DeepSpeedMPU(), ds_plugin.get_plugin(engine)
    if resumed:
        engine.load_checkpoint(saves)
    ranks = mpu.get_data_parallel_world_size()
    data = itertools.islice(
        micro_batches(mpu.get_data_parallel_rank(), ranks), HALF * BATCH // MICRO // ranks if resumed else 0, None
    )
    batches = plugin.batches(lambda n: map(pipeline_gpt.micro_batch, data) if pipe > 1 else data)
    losses = []
    for step in range(HALF if resumed else 2 * HALF):
        if step == HALF:
            engine.save_checkpoint(saves, tag="half")
        seen = Losses()
        script.train_step(engine, batches, seen)
        losses.append(torch.stack(seen).mean().item())

    def weights():
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    groups = [{key: value for key, value in g.items() if key != "params"} for g in engine.optimizer.param_groups]
    with plugin.averaged_weights():
        average = weights()
    return losses[-HALF:], groups, {"weights": weights(), "average": average}


def convert(saves):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return main(["to-universal", f"{saves}/half", f"{saves}/universal"])


@pytest.mark.parametrize(
    ("tensor", "options", "residual", "others"),
    [
        pytest.param(1, LEARNED, "forward", (2,), id="tied, forward"),
        slow(2, ROPE, "folded", (4,), id="tensor 2, folded"),
    ],
)
def test_a_pipelines_universal_checkpoint(workers, tmp_path, tensor, options, residual, others):
    """All but the number of data-parallel ranks stays as it was; other stages are refused, and nobody hangs."""
    completep, saves = {"residual": residual}, str(tmp_path)
    whole = workers(4).run(half, saves, options, completep, 2, tensor)
    assert workers(1).run(convert, saves) == [0]
    for ranks in others:
        found = workers(ranks).run(half, saves, options, completep, 2, tensor, True)
        for stage in range(2):
            losses, groups, ends = found[stage * ranks // 2]
            expected_losses, expected_groups, expected = whole[stage * 4 // 2]
            assert losses == pytest.approx(expected_losses, abs=1e-6) and groups == expected_groups
            for kind, values in expected.items():
                for name, value in values.items():
                    tolerance = 0 if ranks == 4 else 2e-6
                    torch.testing.assert_close(ends[kind][name], value, atol=tolerance, rtol=0, msg=f"{kind} {name}")
    errors = workers(tensor).run(half, saves, options, completep, 1, tensor, True, expect="errors")
    assert {error.type for error in errors} == {"CheckpointError"} and "absent in this model" in errors[0].message


# -- what is refused, and the launcher -------------------------------------------------------------------------------

PIPE = {"model__pipeline_parallel": 2}
REFUSED = {
    # name: (JSON, what the message must hold)
    "layers": (config(model__pipeline_parallel=3), ["pipeline_parallel = 3", "num_layers = 2"]),
    "zero": (config(**PIPE, zero_optimization__stage=2), ["zero_optimization.stage: 2", "write stage 1"]),
    "norm": (config(**PIPE, zero_optimization__stage=0), ["gradient_clipping: 1.0", "stage 0", "write stage 1"]),
    "bf16": (
        config(**PIPE, zero_optimization__stage=0) | {"gradient_clipping": 0.0, "bf16": {"enabled": True}},
        ["zero_optimization.stage: 0", "bf16", "write stage 1"],
    ),
    "tied": (
        config(**PIPE, model__tie_embeddings=True, zero_optimization__offload_optimizer={"device": "cpu"})
        | {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
        ["data_types.grad_accum_dtype: 'fp32'", "tie_embeddings", "remove it"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_pipeline_would_train_wrongly_is_refused(name):
    json_config, parts = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        load_settings(json_config)
    assert all(part in str(caught.value) for part in parts), caught.value


def refusals():
    from megatron.core import parallel_state

    from megatron_patches import megatron_on_cpu
    from megatron_patches.models import gpt, pipeline_gpt

    megatron_on_cpu.enable()
    messages = []

    def attempt(function):
        with pytest.raises((ConfigError, StateError)) as caught:
            function()
        messages.append(str(caught.value))

    def sized(**changes):
        return gpt.GPTConfig.model_validate({**config()["model"], **changes})

    attempt(lambda: gpt.initialize_parallel(sized(tensor_parallel=2, pipeline_parallel=2), 1))
    normed = sized(tensor_parallel=2, qk_norm=True)
    gpt.initialize_parallel(normed, 1)
    described = gpt.transformer_config(normed, torch.float32), gpt.layer_spec(normed)
    attempt(lambda: pipeline_gpt.build_pipeline(normed, 64, *described))
    parallel_state.destroy_model_parallel()
    cut = sized(pipeline_parallel=2)
    gpt.initialize_parallel(cut, 1)
    described = gpt.transformer_config(cut, torch.float32), gpt.layer_spec(cut)
    attempt(lambda: gpt.build_gpt(cut, 64, *described))
    attempt(lambda: pipeline_gpt.build_pipeline(cut, 0, *described))
    attempt(lambda: pipeline_gpt.build_pipeline(sized(num_layers=4, pipeline_parallel=4), 64, *described))
    engine = prepared({}, {"residual": "folded"}, 2, 1, zero_optimization={"stage": 0}, gradient_clipping=0.0)
    engine.gradient_clipping = lambda: 1.0
    attempt(lambda: CompleteP(engine, ds_plugin.get_plugin(engine).config.completep))
    return messages


def test_what_cannot_be_built_is_refused_on_every_rank(workers):
    first, second = workers(2).run(refusals)
    assert first == second
    expected = ["= 2 x 2 does not divide the 2 ranks", "qk_norm", "megatron_patches.models.pipeline_gpt.build_pipeline"]
    expected += ["vocab_size = 0", "made for pipeline_parallel = 2", 'residual: "folded" with gradient_clipping 1.0']
    assert all(part in found for part, found in zip(expected, first, strict=True)), first


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_after_step_25_and_resumed_under_the_launcher(folder):  # noqa: F811
    recipe, script = ROOT / "configs" / "gpt_3d_8cpu.json", ROOT / "launch_scripts" / "pretrain_gpt.py"
    arguments = [script, "--deepspeed_config", recipe, "--data", folder / "text", "--runs", folder / "runs"]
    arguments += ["--cache", folder / "cache", "--steps", "30", "--name"]
    ended = launch([*arguments, "whole"], ranks=8, timeout=300)
    assert ended.returncode == 0, ended.stdout
    cut = folder / "runs" / "cut"
    with Launched([*arguments, "cut"], ranks=8) as launched:
        launched.wait_for_file(cut / "metrics.csv", "\n25,", timeout=300)
        launched.kill()
    assert not (cut / "summary.json").exists()
    ended = launch([*arguments, "cut", "--resume"], ranks=8, timeout=300)
    assert ended.returncode == 0 and "resumed from step 20" in ended.stdout, ended.stdout
    assert metrics(folder, "cut") == metrics(folder, "whole")
    mean, again = averaged(folder, "whole"), averaged(folder, "cut")
    assert mean.keys() == again.keys() and all(torch.equal(mean[name], again[name]) for name in mean)
