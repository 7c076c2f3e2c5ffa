"""The example script's own `train`, on real text, in every layout it offers."""

import importlib.util
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from launch_scripts.gpt.folder import read_metrics
from megatron_patches import megatron_on_cpu
from tests.harness import slow

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
TIMES = ("tokens_per_second",)


def config(**changes):
    base = {
        "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 32},
        "training": {
            "steps": STEPS, "eval_interval": 10, "eval_samples": 16, "save_interval": 10, "log_interval": 4,
        },
        "sequence_length_warmup": {
            "enabled": True, "start_length": 8, "end_length": 32, "duration": {"steps": 12}, "multiple_of": 8,
        },
        "completep": {"enabled": True, "base_width": 16, "base_depth": 1, "base_head_dim": 8},
        "weight_averaging": {"enabled": True, "window": 3, "interval": 2},
        "train_batch_size": 8,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"total_num_steps": "auto", "warmup_max_lr": 0.01, "warmup_num_steps": 4},
        },
    }  # fmt: skip
    for path, value in changes.items():
        section, key = path.split("__")
        base[section] = {**base[section], key: value}
    return base


def load_script():
    spec = importlib.util.spec_from_file_location("pretrain_gpt", ROOT / "launch_scripts" / "pretrain_gpt.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(folder, name, json_config, *flags):
    """The script on these ranks, without the launcher; returns what every rank ends with."""
    from launch_scripts.gpt import settings
    from launch_scripts.gpt.folder import RunFolder
    from launch_scripts.gpt.progress import Progress

    folder = Path(folder)
    path = folder / f"{name}.json"
    if dist.get_rank() == 0:
        path.write_text(json.dumps(json_config))
    dist.barrier()
    text = folder / "text"
    arguments = [
        "--config",
        str(path),
        "--name",
        name,
        "--runs",
        str(folder / "runs"),
        "--cache",
        str(folder / "cache"),
    ]
    args = settings.parser().parse_args([*arguments, "--data", str(text), *flags])
    script = load_script()
    run = settings.load_settings(args)
    megatron_on_cpu.enable()
    engine = script.train(args, run, RunFolder.open(args.runs, args.name, args.resume), Progress(STEPS, False))
    return megatron_on_cpu.check_replicas(engine.module)


@pytest.fixture
def folder(tmp_path):
    """A folder with some real text to train on."""
    text = tmp_path / "text"
    text.mkdir()
    for name in ("argparse", "ast", "inspect", "typing"):
        source = Path(importlib.util.find_spec(name).origin)
        (text / source.name).write_text(source.read_text())
    return tmp_path


def metrics(folder, name):
    found = read_metrics(folder / "runs" / name / "metrics.csv")
    return {column: values for column, values in found.items() if column not in TIMES}


def summary(folder, name):
    return json.loads((folder / "runs" / name / "summary.json").read_text())


def files(path):
    """All files below a run's folder; but for the lock, which names the process that held it last."""
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize(
    "others", [[(2, 3, 1), (2, 1, 2)], slow([(2, 1, 1), (2, 2, 1), (4, 1, 2)])], ids=["some", "the rest"]
)
def test_fp32_losses_agree_across_stages_and_layouts(workers, folder, others):
    runs, steps = {}, 10
    for ranks, zero, tensor_parallel in [(2, 0, 1), *others]:
        name = f"zero{zero}tp{tensor_parallel}"
        settings = config(zero_optimization__stage=zero, model__tensor_parallel=tensor_parallel, training__steps=steps)
        compared = workers(ranks).run(run_script, str(folder), name, settings)
        assert compared == [0 if tensor_parallel == 1 else compared[0]] * ranks
        assert tensor_parallel == 1 or compared[0] > 0
        runs[name] = metrics(folder, name)
        assert (folder / "runs" / name / "report.png").stat().st_size > 10_000
    reference = runs["zero0tp1"]
    assert reference["step"] == list(range(1, steps + 1))
    assert reference["train_loss"][0] - reference["train_loss"][-1] > 0.3
    for name, run in runs.items():
        for column in ("train_loss", "eval_loss", "eval_loss_averaged", "lr"):
            assert run[column] == pytest.approx(reference[column], abs=1e-5), (name, column)
        for column in ("length", "tokens_trained", "tokens_read"):
            assert run[column] == reference[column], (name, column)


# 8 + 24 t / 12 = 8 + 2t, floored to 8
LENGTHS = [8, 8, 8, 16, 16, 16, 16, 24, 24, 24, 24, 32, 32, 32, 32, 32, 32, 32, 32, 32]


def test_the_summary_is_what_was_measured(workers, folder):
    workers(2).run(run_script, str(folder), "a", config())
    found, rows = summary(folder, "a"), metrics(folder, "a")
    assert rows["length"] == LENGTHS
    assert found["steps"] == STEPS
    assert (found["first_length"], found["last_length"]) == (8, 32)
    assert found["tokens_read"] == STEPS * 8 * 32
    assert found["tokens_trained"] == 8 * sum(LENGTHS)
    assert (found["zero_stage"], found["world_size"], found["tensor_parallel"]) == (1, 2, 1)
    assert found["eval_loss"] == rows["eval_loss"][-1] and found["train_loss"] == rows["train_loss"][-1]
    assert found["eval_loss_averaged"] == rows["eval_loss_averaged"][-1] != found["eval_loss"]
    assert found["averaged_steps"] == [16, 18, 20]
    assert 2.5 < found["unigram_entropy"] < 4
    assert {"torch", "deepspeed", "megatron-core", "python"} <= set(found["versions"])
    assert found["wall_seconds"] > 0
    averaged = load_file(folder / "runs" / "a" / "averaged.safetensors")
    assert averaged["embedding.word_embeddings.weight"].shape == (256, 32)
    assert sum(t.numel() for t in averaged.values()) == found["parameters"]


@pytest.mark.parametrize("zero", [slow(0), slow(1), 2, slow(3)])
def test_bf16_trains(workers, folder, zero):
    workers(2).run(run_script, str(folder), "bf16", config(), "--precision", "bf16", "--zero-stage", str(zero))
    rows = metrics(folder, "bf16")
    assert rows["train_loss"][0] - rows["train_loss"][-1] > 0.5
    assert rows["eval_loss_averaged"][-1] is not None
    assert summary(folder, "bf16")["precision"] == "bfloat16"


CARRY = {"mode": "carry", "interleave": 3, "learning_rate": {"by": "tokens"}, "duration": {"tokens": 1500}}
HELD = {"pacing": "adaptive", "adaptive": {"variance_max": 0.1}, "report_interval": 3}  # exceeded from step 9 on


@pytest.mark.parametrize(
    ("zero", "dropout", "warmup"), [slow(1, 0.0, {}), (1, 0.1, {**CARRY, **HELD}), slow(3, 0.0, {**CARRY})]
)
def test_resumed_metrics_are_bitwise_those_of_an_uninterrupted_run(workers, folder, zero, dropout, warmup):
    pool, settings = workers(2), config(zero_optimization__stage=zero, model__dropout=dropout)
    settings["sequence_length_warmup"] |= warmup
    pool.run(run_script, str(folder), "whole", settings)
    # what an interruption after step 13 leaves: the checkpoint of step 10 and three rows more
    cut = folder / "runs" / "cut"
    shutil.copytree(folder / "runs" / "whole", cut)
    (cut / "summary.json").unlink()
    (cut / "checkpoints" / "latest").write_text("step00000010")
    lines = (cut / "metrics.csv").read_text().splitlines(keepends=True)
    (cut / "metrics.csv").write_text("".join(lines[: 1 + 13]))
    pool.run(run_script, str(folder), "cut", settings, "--resume")
    assert metrics(folder, "cut") == metrics(folder, "whole")
    held = {None: {None}, "adaptive": {0, 1}}[warmup.get("pacing")]
    assert set(metrics(folder, "whole")["length_held"]) == held
    for key in ("averaged_steps", "stability", "flops", "tokens_carried", "tokens_discarded"):
        assert summary(folder, "cut")[key] == summary(folder, "whole")[key], key
    first, second = (load_file(folder / "runs" / name / "averaged.safetensors") for name in ("whole", "cut"))
    assert all((first[name] == second[name]).all() for name in first)


def _by_tokens(mode):
    settings = config(sequence_length_warmup__mode=mode, sequence_length_warmup__learning_rate={"by": "tokens"})
    del settings["training"]["steps"]
    settings["training"]["tokens"] = 3000
    settings["sequence_length_warmup"] |= {"report_interval": 10, "variance": True}
    settings["scheduler"]["params"] |= {"warmup_num_steps": 2, "warmup_type": "linear"}
    return settings


def test_a_run_that_ends_by_tokens(workers, folder):
    workers(2).run(run_script, str(folder), "a", _by_tokens("truncate"))
    found, rows = summary(folder, "a"), metrics(folder, "a")
    # 8 samples a step: 1472 tokens in the 11 steps below full length, then 256 a step until 3000 are reached
    assert found["steps"] == 17 and found["tokens_trained"] == 1472 + 6 * 256
    assert found["tokens_discarded"] == 17 * 256 - 3008 and found["tokens_carried"] == 0
    # "auto": 3000 tokens are 12 full batches; two of them warm up, and DeepSpeed lags a step behind
    before = [0, *rows["tokens_trained"][:-1]]
    full = [tokens / 256 for tokens in [0, *before[:-1]]]
    expected = [0.0] + [0.01 * (p / 2 if p < 2 else max(0.0, (12 - p) / 10)) for p in full[1:]]
    assert rows["lr"] == pytest.approx(expected, rel=1e-9)
    # 12,704 parameters a layer, 64 of the last norm, 256 x 32 of the unembedding; attention 12 x 2 x 32 a token
    done = [b - a for a, b in zip(before, rows["tokens_trained"], strict=True)]
    flops = sum(n * (6 * 33664 + 768 * length) for n, length in zip(done, rows["length"], strict=True))
    assert found["flops"] == rows["flops"][-1] == flops
    reported = [step for step, value in zip(rows["step"], rows["adam_variance_l1"], strict=True) if value is not None]
    assert reported == [10] and set(found["stability"]) >= {"max_loss_ratio", "pearson_variance_max"}


def test_a_run_that_throws_nothing_away(workers, folder):
    settings = _by_tokens("carry")
    settings["model"]["position_embedding"] = "rope"  # tables as long as the stretch, which may begin within a sample
    workers(2).run(run_script, str(folder), "a", settings)
    found, rows = summary(folder, "a"), metrics(folder, "a")
    assert found["tokens_discarded"] == 0 and 3000 <= found["tokens_trained"] < 3256
    for trained, read, carried in zip(rows["tokens_trained"], rows["tokens_read"], rows["tokens_carried"], strict=True):
        assert read == trained + carried
    assert rows["length"][-1] == 32 and rows["tokens_carried"][-1] == 0
    assert rows["train_loss"][0] - rows["train_loss"][-1] > 0.5


def test_methods_off(workers, folder):
    steps = 4
    off = {
        key: value
        for key, value in config(training__steps=steps).items()
        if key not in ("sequence_length_warmup", "completep", "weight_averaging")
    }
    workers(2).run(run_script, str(folder), "off", off)
    found, rows = summary(folder, "off"), metrics(folder, "off")
    assert set(rows["length"]) == {32} and found["tokens_read"] == found["tokens_trained"] == steps * 8 * 32
    assert found["eval_loss_averaged"] is None and found["methods"] == {}
    assert not (folder / "runs" / "off" / "averaged.safetensors").exists()


def test_gradient_accumulation_gives_the_same_run(workers, folder):
    short = config(training__steps=6, training__eval_interval=6)
    workers(2).run(run_script, str(folder), "one", short)
    accumulated = {**short, "gradient_accumulation_steps": 2}
    workers(2).run(run_script, str(folder), "two", accumulated)
    one, two = metrics(folder, "one"), metrics(folder, "two")
    for column in ("train_loss", "eval_loss_averaged"):
        assert two[column] == pytest.approx(one[column], abs=1e-5)
    assert two["tokens_trained"] == one["tokens_trained"] and two["length"] == one["length"]


class _Services:
    """Stand-ins for wandb and comet_ml, as they treat steps: a step that lies behind is dropped."""

    def __init__(self):
        self.kept, self.dropped, self.thinned, self.told = [], [], [], {}
        self.wandb, self.comet = types.ModuleType("wandb"), types.ModuleType("comet_ml")
        self.wandb.init, self.wandb.log, self.wandb.Image = lambda **_: None, self._log, lambda path: f"image {path}"
        self.wandb.config = types.SimpleNamespace(update=lambda flat, **_: self.told.update(wandb=flat))
        self.comet.start, self.comet.__version__ = lambda **_: self, "3.50.0"
        self.log_parameters = lambda flat: self.told.update(comet=flat)
        self.log_image = lambda path, name, step: self.told.update(image=(Path(path).name, name, step))

    def _log(self, data, step=None, commit=None):
        last = self.kept[-1][0] if self.kept else 0
        (self.kept if step >= last else self.dropped).append((step, data))

    def __internal_api__log_metric__(self, name, value, step):
        self.thinned.append((name, step, value))


def _watched(folder, settings):
    services = _Services()
    sys.modules["wandb"], sys.modules["comet_ml"] = services.wandb, services.comet
    run_script(folder, "watched", settings)
    return services.kept, services.dropped, services.thinned, services.told


def test_deepspeeds_monitor_gets_the_same_values(workers, folder):
    boards = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    place = {"enabled": True, "output_path": str(folder / "monitor")}
    monitors = {
        "csv_monitor": {**place, "job_name": "csv"},
        "tensorboard": {**place, "job_name": "board"},
        "wandb": {"enabled": True, "project": "p"},
        "comet": {"enabled": True, "samples_log_interval": 32, "api_key": "secret"},
    }
    kept, dropped, thinned, told = workers(2).run(_watched, str(folder), {**config(), **monitors})[0]
    rows, png = metrics(folder, "watched"), folder / "runs" / "watched" / "report.png"
    read = (4, 8, 10, 12, 16, 20)  # the steps whose losses are read from the device; 8 samples each
    written = {path.stem: path.read_text().splitlines()[1:] for path in (folder / "monitor" / "csv").glob("*.csv")}
    for name in ("train_loss", "eval_loss_averaged", "length", "tokens_trained"):
        expected = [(8 * step, rows[name][step - 1]) for step in read if rows[name][step - 1] is not None]
        assert [tuple(map(float, line.split(","))) for line in written[f"Run_{name}"]] == expected, name
        assert [(step, data[f"Run/{name}"]) for step, data in kept if f"Run/{name}" in data] == expected, name
    # W&B keeps all of DeepSpeed's own series beside ours, Comet thins both by samples
    assert [step for step, data in kept if "Train/Samples/lr" in data] == [8 * step for step in range(1, STEPS + 1)]
    assert dropped == []
    for name in ("Run/train_loss", "Train/Samples/lr"):
        every = [step for series, step, _ in thinned if series == name]
        assert every == [first + 32 * i for i, first in enumerate([every[0]] * 5)], (name, every)
    assert told["wandb"] == told["comet"] and "secret" not in json.dumps(told)
    assert told["wandb"]["model.hidden_size"] == 32 and told["wandb"]["weight_averaging.window"] == 3
    assert told["image"] == ("report.png", "Run/report", 160) and kept[-1] == (160, {"Run/report": f"image {png}"})
    found = boards.EventAccumulator(str(folder / "monitor" / "board"))
    found.Reload()
    assert "hidden_size" in found.Tensors("Run/settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert [image.step for image in found.Images("Run/report")] == [160]
    assert [event.step for event in found.Scalars("Run/train_loss")] == [8 * step for step in read]


def _resume_with(folder, json_config, *flags):
    run_script(folder, "a", json_config, "--resume", *flags)


def four_steps(**changes):
    return config(training__steps=4, training__save_interval=2, **changes)


CHANGED = [
    (four_steps(model__hidden_size=64), (), ["model.hidden_size", "32", "64"]),
    (four_steps(training__seed=5), (), ["seed", "1234", "5"]),
    (four_steps(completep__enabled=False), (), ["completep", "'base_width': 16", "None"]),
    (four_steps(model__seq_length=16, sequence_length_warmup__end_length=16), (), ["model.seq_length", "32", "16"]),
    (four_steps(completep__base_width=8), (), ["completep", "'base_width': 16", "'base_width': 8"]),
    (four_steps(), ("--tag", "step00000003"), ["step00000003", "step00000002"]),
]


def test_a_run_of_another_kind_is_not_resumed(workers, folder):
    pool = workers(2)
    pool.run(run_script, str(folder), "a", four_steps())
    kept = files(folder / "runs" / "a")
    for changed, flags, parts in CHANGED:
        for error in pool.run(_resume_with, str(folder), changed, *flags, expect="errors", timeout=60):
            assert error is not None and error.type.endswith("CheckpointError"), error
            assert all(part in error.message for part in parts), error.message
    assert files(folder / "runs" / "a") == kept
    streams = folder / "runs" / "a" / "checkpoints" / "step00000004" / "rng_rank_00001.safetensors"
    whole = streams.read_bytes()
    streams.write_bytes(whole[:100])  # of one rank, found after the engine was loaded
    later = folder / "runs" / "a" / "metrics.csv"
    later.write_text(later.read_text() + "5" + 14 * "," + "\n")
    kept = files(folder / "runs" / "a")
    for error in pool.run(_resume_with, str(folder), four_steps(), expect="errors", timeout=60):
        assert error is not None and "rng_rank_00001" in error.message, error
    assert files(folder / "runs" / "a") == kept
    streams.write_bytes(whole)
    later.unlink()  # nothing depends on it: the run ends again, and says nothing of what it does not know
    pool.run(_resume_with, str(folder), four_steps(), timeout=60)
    assert metrics(folder, "a")["step"] == []
    found = summary(folder, "a")
    assert (found["steps"], found["first_length"], found["eval_loss"]) == (4, None, None)
