"""The dry run: against numbers worked out by hand, and against the model, groups and averager that are really built."""

import json
from pathlib import Path

import pytest

from ds_plugin.cli.main import main
from ds_plugin.deepspeed_engine.masters import NVME_REFUSED
from ds_plugin.plan import costs, inputs, plan
from ds_plugin.plan.costs import RATES, Layout
from ds_plugin.weight_averaging.config import WeightAveragingConfig
from megatron_patches.models.gpt import GPTConfig
from tests import harness

ROOT = Path(__file__).resolve().parents[3]

MODEL = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16}
LLAMA = {"position_embedding": "rope", "normalization": "RMSNorm", "activation": "swiglu", "bias": False}
COMPLETEP = {"enabled": True, "base_width": 16, "base_depth": 2, "base_head_dim": 8}
WARMUP = {"enabled": True, "start_length": 4, "end_length": 16, "duration": {"steps": 6}, "multiple_of": 4}
AVERAGING = {"enabled": True, "window": 3, "interval": 4, "start_step": 5}


def recipe(**changes):
    config = {
        "model": MODEL,
        "training": {"steps": 20},
        "sequence_length_warmup": WARMUP,
        "completep": COMPLETEP,
        "weight_averaging": AVERAGING,
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1, "torch_adam": True}},
        **changes,
    }
    return {key: value for key, value in config.items() if value is not None}


MEGATRON = {
    "num-layers": 4, "hidden-size": 32, "num-attention-heads": 4, "seq-length": 16, "max-position-embeddings": 16,
    "micro-batch-size": 2, "global-batch-size": 8, "train-iters": 20, "vocab-size": 255, "lr": 0.01,
    "weight-decay": 0.1, "use-distributed-optimizer": True,
}  # fmt: skip


def megatron(**options):
    sections = {"sequence_length_warmup": WARMUP, "completep": COMPLETEP, "weight_averaging": AVERAGING}
    return {**sections, "megatron": {**MEGATRON, **{name.replace("_", "-"): value for name, value in options.items()}}}


def planned(config, ranks, vocab_size=256, device="cpu", **given):
    vocab_size = None if "megatron" in config else vocab_size
    job = inputs.read_job(config, ranks, vocab_size=vocab_size, **given)
    return plan.make(job, RATES[device], pinned=device == "gpu")


# -- against what is really built --------------------------------------------------------------------------------------

SHAPES = [
    {},
    {"tie_embeddings": True, "qk_norm": True},
    {**LLAMA, "num_query_groups": 2, "ffn_hidden_size": 80},
]


def _counted(shapes, tensor):
    """For each shape: how many parameters this rank has."""
    import torch

    from megatron_patches import megatron_on_cpu
    from megatron_patches.models import gpt

    megatron_on_cpu.enable()
    counts = []
    for shape in shapes:
        cfg = GPTConfig.model_validate({**MODEL, **shape, "tensor_parallel": tensor})
        gpt.initialize_parallel(cfg, 1)
        model = gpt.build_gpt(cfg, 256, gpt.transformer_config(cfg, torch.float32), gpt.layer_spec(cfg))
        counts.append(sum(p.numel() for p in model.parameters()))
    return counts


@pytest.mark.parametrize("tensor", [1, 2])
def test_parameters_are_those_of_the_built_model(workers, tensor):
    # norms on queries and keys are refused under tensor parallelism
    shapes = SHAPES if tensor == 1 else [{**shape, "qk_norm": False} for shape in SHAPES]
    layout = Layout(tensor, tensor=tensor)
    expected = [costs.parameters(GPTConfig.model_validate({**MODEL, **shape}), 256, layout) for shape in shapes]
    assert workers(tensor).run(_counted, shapes, tensor) == [expected] * tensor


#: with shapes, what their sections say besides
BASES = [{}, {"residual": "folded"}, {"base_ffn_hidden_size": 64, "base_num_heads": 1, "residual": "folded"}]


def _by_role(shapes):
    """For each shape: the tensors and parameters of each role."""
    import torch

    from ds_plugin.completep.config import CompletePConfig
    from megatron_patches import completep, megatron_on_cpu
    from megatron_patches.models import gpt

    megatron_on_cpu.enable()
    found = []
    for shape, base in shapes:
        cfg, section = GPTConfig.model_validate({**MODEL, **shape}), CompletePConfig.model_validate(COMPLETEP | base)
        gpt.initialize_parallel(cfg, 1)
        built = completep.prepare(gpt.transformer_config(cfg, torch.float32), gpt.layer_spec(cfg), section)
        model = gpt.build_gpt(cfg, 256, *built)
        counts = {}
        for name, role in completep.finish(model, section).items():
            tensors, parameters = counts.get(role.value, (0, 0))
            counts[role.value] = tensors + 1, parameters + model.get_parameter(name).numel()
        found.append(counts)
    return found


def test_roles_hold_what_they_hold_in_the_built_model(workers):
    shapes = list(zip(SHAPES, BASES, strict=True))
    for (shape, base), built in zip(shapes, workers(1).run(_by_role, shapes)[0], strict=True):
        found = planned(recipe(model={**MODEL, **shape}, completep=COMPLETEP | base), 1)
        rows = found["completep"]["roles"]
        assert {role: (row["tensors"], row["parameters"]) for role, row in rows.items()} == built
        assert sum(row["parameters"] for row in rows.values()) == found["parameters"]["all"]
    assert {"qkv", "attention_out", "mlp_up", "mlp_down"} <= set(built)
    assert (rows["qkv"]["m_in"], rows["qkv"]["m_out"]) == (2, 4) and rows["mlp_down"]["m_in"] == 80 / 64


def _built(config):
    import torch

    import ds_plugin
    from megatron_patches import completep, megatron_on_cpu
    from megatron_patches.models import gpt

    megatron_on_cpu.enable()
    job = inputs.read_job(config, 2, vocab_size=256)
    section, spec = job.methods.completep, gpt.layer_spec(job.model)
    gpt.initialize_parallel(job.model, 1)
    built, spec = completep.prepare(gpt.transformer_config(job.model, torch.float32), spec, section)
    model = gpt.build_gpt(job.model, 256, built, spec)
    completep.finish(model, section)
    given = {name: value for name, value in config.items() if name not in ("model", "training")}
    engine = ds_plugin.initialize(model=model, config=given, mpu=gpt.DeepSpeedMPU())[0]
    plugin = ds_plugin.get_plugin(engine)
    groups = {g["role"]: (g["lr"], g["weight_decay"], g["eps"]) for g in engine.basic_optimizer.param_groups}
    due = [step for step in range(1, 21) if plugin.averager.due(step)]
    masters = sum(t.numel() for t in plugin.averager.shards.tensors())
    return groups, plugin.averager.memory.rank, due, masters, engine.train_batch_size(), plugin.length


def test_rates_memory_and_snapshots_are_those_of_the_engine(workers):
    config = recipe(gradient_accumulation_steps=3)
    found = planned(config, 2)
    for groups, memory, due, masters, batch, length in workers(2).run(_built, config):
        rows = found["completep"]["roles"]
        assert groups == {role: (row["lr"], row["weight_decay"], row["eps"]) for role, row in rows.items()}
        averaging, padded = found["averaging"], masters - found["parameters"]["fp32 masters"]
        assert 0 <= padded <= 4 * len(groups)  # DeepSpeed pads
        assert memory == averaging["memory bytes"] + 4 * 4 * padded
        assert due == [8, 12, 16, 20] and (averaging["first snapshot"], averaging["snapshots"]) == (8, 4)
        assert batch == found["batch"]["samples"] == 12 and length == found["lengths"][0]["length"] == 4


# -- lengths and tokens ------------------------------------------------------------------------------------------------


def test_lengths_by_hand():
    """4 + 12 t / 6 floored to 4: steps 1 to 6 have 6, 8, 10, 12, 14, 16. 4 samples a step."""
    found = planned(recipe(), 2)
    assert found["lengths"] == [
        {"length": 4, "from_step": 1, "from_token": 1},
        {"length": 8, "from_step": 2, "from_token": 17},
        {"length": 12, "from_step": 4, "from_token": 81},
        {"length": 16, "from_step": 6, "from_token": 177},
    ]
    trained = 4 * (4 + 8 + 8 + 12 + 12) + 15 * 64
    assert found["tokens"] == {
        "steps": 20, "trained": trained, "read": 20 * 64, "discarded": 1280 - trained, "carried": 0,
    }  # fmt: skip


def test_tokens_end_the_run_and_the_rest_is_carried():
    config = recipe(
        training={"tokens": 3000}, sequence_length_warmup={**WARMUP, "mode": "carry", "interleave": 2},
    )  # fmt: skip
    assert 3000 <= planned(config, 2)["tokens"]["trained"] < 3000 + 64
    run = planned({**config, "training": {"steps": 3}}, 2)["tokens"]
    assert run["discarded"] == 0 and run["carried"] == run["read"] - run["trained"] > 0
    assert planned(recipe(training={"tokens": 3000}, sequence_length_warmup=None), 2)["tokens"]["steps"] == 47


@pytest.mark.parametrize(("by", "ends"), [("steps", 5), ("tokens", 8)])
def test_where_the_learning_rate_is_at_its_peak(by, ends):
    """By tokens: five full batches are 320 tokens, and 176, 240, 304, 368 are trained after steps 5 to 8."""
    scheduler = {"type": "WarmupCosineLR", "params": {"total_num_steps": "auto", "warmup_num_steps": 5}}
    warmup = {**WARMUP, "learning_rate": {"by": by}}
    found = planned(recipe(scheduler=scheduler, sequence_length_warmup=warmup), 2)
    assert found["lr_peak_from_step"] == ends
    assert "note" not in found["averaging"]  # the first snapshot is that of step 8
    early = planned(recipe(scheduler={**scheduler, "params": {"warmup_num_steps": 9, "total_num_steps": 20}}), 2)
    said = "note the first snapshot is taken before the learning rate is at its peak, at step 9"
    assert said in plan.text(early)
    assert "the run ends before the first snapshot" in plan.text(planned(recipe(training={"steps": 7}), 2))


# -- averaging ---------------------------------------------------------------------------------------------------------


def test_pinned_buffers_are_rounded_up():
    """1003 floats are 4012 bytes, 4032 to the next line of the cache. Five of them 20160, pinned 16384 + 4096."""
    config = WeightAveragingConfig(enabled=True, interval=1, window=4)
    assert costs.averaging(config, 1003, pinned=True) == (16384 + 4096, 0)
    files = WeightAveragingConfig(enabled=True, interval=1, window=3, storage="files", storage_path="/scratch")
    assert costs.averaging(files, 1003, pinned=True) == (4096, 3 * 4012)
    in_memory = WeightAveragingConfig(enabled=True, interval=1, window=3, storage="memory")
    assert costs.averaging(in_memory, 1003, pinned=True) == (4096 + 3 * 4012, 0)
    halves = WeightAveragingConfig(enabled=True, interval=1, window=3, deltas="bf16")
    assert costs.averaging(halves, 1003, pinned=False) == (2 * 4012 + 2 * 2006, 0)


def test_offloaded_masters_are_not_pinned_and_nodes_have_their_ranks():
    given = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    found = planned(recipe(**given), 4, per_node=2, device="gpu")["averaging"]
    assert found["memory bytes"] == 4 * found["snapshot bytes"]
    assert found["node memory bytes"] == 2 * found["memory bytes"]
    assert planned(recipe(), 4, device="gpu")["averaging"]["memory bytes"] > found["memory bytes"]


@pytest.mark.parametrize(("stage", "partitions"), [(0, 1), (1, 4), (3, 4)])
def test_zero_divides_the_masters(stage, partitions):
    found = planned(recipe(zero_optimization={"stage": stage}), 4)["parameters"]
    assert found["fp32 masters"] == -(-found["all"] // partitions)


# -- time --------------------------------------------------------------------------------------------------------------


def test_seconds_by_hand():
    found = planned(recipe(), 2)
    cpu, seconds, masters = RATES["cpu"], found["seconds"], found["parameters"]["fp32 masters"]
    assert seconds["snapshot"] == seconds["swap"] / 2 == pytest.approx(4 * masters / cpu.link)
    assert seconds["averaging adds"] == pytest.approx(4 * masters / cpu.link / 4)
    looked_up = 256 * 32 + 16 * 32  # words and positions
    multiplying = found["parameters"]["all"] - looked_up
    assert seconds["full-length step"] == pytest.approx(6 * multiplying * 64 / (2 * cpu.flops))


def test_rates_are_the_measured_ones():
    measured = json.loads((ROOT / "docs/results/scaling/measured.json").read_text())["rates"]
    assert {"link", "flops"} == set(measured)
    for name, rate in measured.items():
        assert getattr(RATES["cpu"], name) == float(f"{rate['value']:.2g}"), name


def test_scaling_tables_are_the_published_ones():
    bench = harness.benchmark("scaling")
    document = (ROOT / "docs/scaling.md").read_text()
    rows = bench.work_out()
    assert bench.table(rows) in document
    seven = rows[0]  # 7e9 parameters on 64 ranks, by hand: Llama 2's 6738415616 x 4 / 64
    assert seven["parameters"] == 6738415616 and seven["snapshot"] == 6738415616 * 4 // 64
    measured = json.loads((ROOT / "docs/results/scaling/measured.json").read_text())
    assert bench.compared(measured["compared"]) in document
    exact = [row for row in measured["compared"] if row["what"].startswith("bytes")]
    assert {row["processes"] for row in exact} == {1, 2, 4, 8}
    assert all(row["measured"] == pytest.approx(row["predicted"], rel=1e-4) for row in exact)


# -- Megatron-LM -------------------------------------------------------------------------------------------------------


def test_a_megatron_recipe_by_hand():
    """Two stages of two layers, tensor parallel 2, so 2 data-parallel ranks of 8."""
    found = planned(megatron(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, vocab_size=300), 8)
    assert found["recipe"] == "the config, Megatron-LM" and found["layout"]["data"] == 2
    assert found["batch"] == {"samples": 8, "tokens": 128, "micro-batch": 2}
    # 12 h^2 + 13 h in a layer, of which norms (4 h) and two biases (2 h) are on both tensor-parallel ranks
    layer = (12 * 32**2 + 7 * 32) // 2 + 6 * 32
    first = 2 * layer + 512 * 32 // 2 + 16 * 32  # 300 padded to 512 = 2 x (128 x 2); positions are on both
    assert found["parameters"]["of a rank"] == first
    assert found["parameters"]["all"] == 4 * (12 * 32**2 + 13 * 32) + 512 * 32 + 16 * 32 + 2 * 32
    assert "branch_out" in found["completep"]["roles"]  # in its scripts multipliers are folded
    said = {**megatron(), "completep": {**COMPLETEP, "residual": "forward"}}
    assert "branch_out" not in planned(said, 1)["completep"]["roles"]


def test_what_a_megatron_recipe_says_otherwise():
    """The rate's warmup as a share; positions that are no table."""
    share = planned(megatron(lr_warmup_fraction=0.5), 1)
    assert share["lr_peak_from_step"] == planned(megatron(lr_warmup_iters=10), 1)["lr_peak_from_step"] > 1
    decay = planned(megatron(lr_warmup_fraction=0.5, lr_decay_iters=10), 1)
    assert decay["lr_peak_from_step"] == planned(megatron(lr_warmup_iters=5), 1)["lr_peak_from_step"]
    learned, none, rope = (
        planned(megatron(**given), 1)["parameters"]["all"]
        for given in ({}, {"position_embedding_type": "none"}, {"position_embedding_type": "rope"})
    )
    assert learned == none + 16 * 32 and none == rope


def test_a_tied_embedding_is_on_both_ends_of_the_pipeline():
    cfg = GPTConfig(**{**MODEL, "tie_embeddings": True, "position_embedding": "rope"})
    stage = 2 * (12 * 32**2 + 13 * 32) + 256 * 32 + 2 * 32  # the last has the norm besides
    assert costs.parameters(cfg, 256, Layout(2, pipeline=2)) == stage


def test_the_command_line_of_a_megatron_recipe(tmp_path, capsys):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(megatron(bf16=True, swiglu=False, split=[98, 2])))
    assert main(["plan", "--config", str(path), "--world-size", "4", "--arguments"]) == 0
    words = capsys.readouterr().out.split()
    assert words[:2] == ["--num-layers", "4"] and words[-4:] == ["--bf16", "--split", "98", "2"]
    assert "--swiglu" not in words


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_prints_what_it_writes(tmp_path, capsys):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe()))
    given = [
        "plan",
        "--config",
        str(path),
        "--world-size",
        "2",
        "--vocab-size",
        "256",
        "--device",
        "cpu",
        "--json",
        str(tmp_path / "out.json"),
    ]
    assert main(given) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    printed = capsys.readouterr().out
    assert printed == plan.text(found) + "\n"
    assert found["completep"]["roles"]["hidden"]["lr"] == 0.005
    for said in (
        "steps 20, trained 1,136, read 1,280, discarded 144, carried 0",
        "first snapshot 8, snapshots 4",
        "m_N 2",
    ):
        assert said in printed


NVME = {"stage": 1, "offload_optimizer": {"device": "nvme"}}
BAD = [
    # recipe, ranks, what the one message must hold
    (recipe(train_batch_size=30), 4, ["train_batch_size: 30", "4 data-parallel rank(s)", "24 or 32"]),
    (recipe(train_batch_size=30, gradient_accumulation_steps=2), 4, ["train_batch_size: 30", "= 16", "write 16"]),
    (recipe(train_batch_size=6, train_micro_batch_size_per_gpu=None), 4, ["train_batch_size: 6", "4 or 8"]),
    (recipe(train_micro_batch_size_per_gpu=None), 2, ["train_micro_batch_size_per_gpu: missing"]),
    (recipe(train_micro_batch_size_per_gpu="auto"), 2, ["micro_batch_size_per_gpu: input", "integer, got 'auto'"]),
    (
        recipe(model={**MODEL, "tensor_parallel": 4}),
        6,
        ["tensor 4 x pipeline 1", "do not divide --world-size 6", "multiple of 4"],
    ),
    (recipe(model={**MODEL, "tensor_parallel": 3}), 6, ["tensor_parallel = 3 does not divide num_attention_heads = 4"]),
    (recipe(model={**MODEL, "pipeline_parallel": 2}), 3, ["pipeline 2 x context 1", "do not divide --world-size 3"]),
    (recipe(model={**MODEL, "pipeline_parallel": 3}), 3, ["pipeline_parallel = 3 does not divide num_layers = 4"]),
    (recipe(model=None), 2, ['section "model" is missing']),
    (recipe(training={"stesp": 3}), 2, ["training.steps: missing", 'is "stesp" meant']),
    (recipe(completep={**COMPLETEP, "alpha": 2.0}), 2, ["completep.alpha"]),
    (recipe(sequence_length_warmup={**WARMUP, "end_length": 32}), 2, ["end_length: 32 is not model.seq_length 16"]),
    (recipe(), 0, ["--world-size: 0"]),
    (recipe(zero_optimization=5), 2, ["zero_optimization: 5", "a JSON object"]),
    (recipe(zero_optimization={"stage": "1"}), 2, ["zero_optimization.stage: input", "integer, got '1'"]),
    (recipe(zero_optimization=NVME), 2, [NVME_REFUSED]),
    (recipe(bf16=1), 2, ["bf16: 1", "a JSON object"]),
    (recipe(zero_optimization={"stge": 1}), 2, ["zero_optimization.stge", 'did you mean "stage"?']),
    ([1], 2, ["a list in place of a JSON object"]),
    (recipe(optimizer={"type": "AdamW", "params": {"lr": "x"}}), 2, ["optimizer.params.lr", "got 'x'"]),
    (recipe(training={"tokens": 9}, sequence_length_warmup=None, optimizer=None), 2, ["optimizer: missing"]),
    (megatron(lr=0), 2, ["megatron.lr", "greater than 0, got 0"]),
    (megatron(num_experts=8), 2, ["megatron.num-experts: 8", "dense models only"]),
    (megatron(kv_channels=16), 2, ["megatron.kv-channels: 16", "heads divide the width"]),
    (megatron(swiglu=True), 2, ["megatron.ffn-hidden-size: missing", "8/3 of hidden-size"]),
    (megatron(optimizer="muon"), 2, ["completep: the optimizer is Muon"]),
    (megatron(num_layers="4"), 2, ["megatron.num_layers", "integer", "'4'"]),
    (megatron(lr_warmup_samples=-1), 2, ["megatron.lr-warmup-samples", "got -1"]),
    (megatron(pipeline_model_parallel_size=3), 3, ["pipeline_parallel = 3 does not divide num_layers = 4"]),
    (megatron(pipeline_model_parallel_size=2), 3, ["pipeline 2 x context 1", "do not divide --world-size 3"]),
    (megatron(global_batch_size=6), 2, ["train_batch_size: 6", "4 or 8"]),
    (megatron(rampup_batch_size=[2, 2, 10]), 2, ["--rampup-batch-size", "leave one of the two out"]),
    (megatron(context_parallel_size=3), 3, ["end_length: 16", "not divisible by 12"]),
    ({**megatron(), "training": {"steps": 3}}, 2, ['training: "megatron" says it already']),
    ({**megatron(), "megatron": {"num_layers": 4}}, 2, ['write the option as "num-layers"']),
    (
        {**megatron(), "megatron": {}},
        2,
        ["megatron.global-batch-size: missing", "megatron.lr: missing; write a number above 0"],
    ),
]


@pytest.mark.parametrize(("config", "ranks", "said"), BAD)
def test_one_message_and_exit_code_2(tmp_path, capsys, config, ranks, said):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(config))
    assert main(["plan", "--config", str(path), "--world-size", str(ranks), "--vocab-size", "256"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    for part in said:
        assert part in err


def test_what_goes_to_nvme_is_planned_without_averaging():
    assert planned(recipe(zero_optimization=NVME, weight_averaging=None), 2)["averaging"] is None


def test_a_misspelt_key_of_deepspeeds_is_said_and_the_plan_made(tmp_path, capsys, caplog):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe(gradient_clippping=1.0)))
    assert main(["plan", "--config", str(path), "--world-size", "2", "--vocab-size", "256"]) == 0
    [said] = [record.getMessage() for record in caplog.records if record.name == "ds_plugin"]
    assert said.startswith("gradient_clippping: DeepSpeed") and 'did you mean "gradient_clipping"?' in said


def test_no_half_written_plan(tmp_path, capsys):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe()))
    target = tmp_path / "missing" / "plan.json"
    assert main(["plan", "--config", str(path), "--world-size", "2", "--vocab-size", "256", "--json", str(target)]) == 2
    assert "plan.json is not a file in a folder that exists" in capsys.readouterr().err and not target.parent.exists()
    assert main(["plan", "--config", str(path), "--world-size", "2", "--vocab-size", "256", "--arguments"]) == 2
    assert 'no "megatron" section' in capsys.readouterr().err
    assert main(["plan", "--config", str(path), "--world-size", "2"]) == 2
    assert "--vocab-size: missing" in capsys.readouterr().err
