"""The dry run: against numbers worked out by hand, and against the model, groups and averager that are really built."""

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from ds_plugin.__main__ import main
from ds_plugin.run import plan, plan_costs, plan_inputs
from ds_plugin.run.plan_costs import Layout
from ds_plugin.sequence_length_warmup.config import SequenceLengthWarmupConfig
from ds_plugin.sequence_length_warmup.plan import plan as totals
from ds_plugin.sequence_length_warmup.scheduler import SequenceLengthScheduler
from ds_plugin.weight_averaging.config import WeightAveragingConfig
from ds_plugin.weight_averaging.zero_shards import NVME_REFUSED
from megatron_patches.completep.rules import Role
from megatron_patches.gpt import GPTConfig
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


def planned(config, ranks, **given):
    device = given.pop("device", "cpu")
    return plan.make(plan_inputs.read_job(config, ranks, **given), device=device)


# -- against what is really built --------------------------------------------------------------------------------------

SHAPES = [
    {},
    {"tie_embeddings": True, "qk_norm": True},
    {**LLAMA, "num_query_groups": 2, "ffn_hidden_size": 80},
]


def _counted(shapes, tensor):
    """For each shape: how many parameters of each role this rank has, without folding and with it."""
    import torch

    from megatron_patches import cpu_host, gpt
    from megatron_patches.completep.roles import roles_of

    cpu_host.enable()
    counts = []
    for shape in shapes:
        cfg = GPTConfig.model_validate({**MODEL, **shape, "tensor_parallel": tensor})
        gpt.initialize_parallel(cfg, 1)
        model = gpt.build_gpt(cfg, 256, gpt.transformer_config(cfg, torch.float32), gpt.layer_spec(cfg))
        for folded in (False, True):
            roles = roles_of(model.named_parameters(), folded=folded, tied=cfg.tie_embeddings)
            found = {}
            for name, parameter in model.named_parameters():
                found[roles[name]] = found.get(roles[name], 0) + parameter.numel()
            counts.append(found)
    return counts


@pytest.mark.parametrize("tensor", [1, 2])
def test_parameters_are_those_of_the_built_model(workers, tensor):
    # norms on queries and keys are refused under tensor parallelism
    shapes = SHAPES if tensor == 1 else [{**shape, "qk_norm": False} for shape in SHAPES]
    expected = []
    for shape in shapes:
        cfg = GPTConfig.model_validate({**MODEL, **shape})
        for folded in (False, True):
            parts, layout = plan_costs.parts(cfg, 256, folded=folded), Layout(tensor, tensor=tensor)
            expected.append(plan_costs.local_parameters(parts, 4, layout, tied=cfg.tie_embeddings))
            if tensor == 1:
                assert plan_costs.parameters(parts, 4) == expected[-1]
    assert workers(tensor).run(_counted, shapes, tensor) == [expected] * tensor


def _built(config):
    import torch

    import ds_plugin
    from megatron_patches import completep, cpu_host, gpt

    cpu_host.enable()
    job = plan_inputs.read_job(config, 2)
    run = job.settings
    gpt.initialize_parallel(run.model, 1)
    spec = gpt.layer_spec(run.model)
    built, spec = completep.prepare(gpt.transformer_config(run.model, torch.float32), spec, run.plugin.completep)
    model = gpt.build_gpt(run.model, 256, built, spec)
    completep.finish(model, run.plugin.completep)
    engine = ds_plugin.initialize(model=model, config=run.host, mpu=gpt.DeepSpeedMPU())[0]
    plugin = ds_plugin.attached(engine)
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
        averaging = found["weight_averaging"]
        assert 0 <= masters - found["parameters"]["fp32 masters of a rank"] <= 4 * len(groups)  # DeepSpeed pads
        assert memory == averaging["host_bytes"] + 4 * 4 * (masters - found["parameters"]["fp32 masters of a rank"])
        assert due == [8, 12, 16, 20] and averaging["snapshots"] == 4
        assert (averaging["first_snapshot"], averaging["last_snapshot"]) == (8, 20)
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
    assert found["run"] == {
        "steps": 20, "tokens_trained": trained, "tokens_read": 20 * 64, "tokens_discarded": 1280 - trained,
        "tokens_carried": 0,
    }  # fmt: skip


@pytest.mark.parametrize("mode", ["truncate", "mask", "carry"])
@pytest.mark.parametrize("duration", [{"steps": 37}, {"tokens": 9000}])
def test_the_walk_ends_where_the_plan_does(mode, duration):
    section = {**WARMUP, "end_length": 64, "mode": mode, "duration": duration}
    section |= {"interleave": 3} if mode == "carry" else {}
    scheduler = SequenceLengthScheduler(SequenceLengthWarmupConfig.model_validate(section))
    job = SimpleNamespace(
        batch=6, scheduler=scheduler, settings=SimpleNamespace(model=GPTConfig(**{**MODEL, "seq_length": 64}))
    )
    for steps in (1, 20, 60):
        expected = totals(scheduler, 6, steps=steps)
        assert list(plan.walk(job, steps))[-1][1:] == (expected.trained, expected.read)


def test_tokens_end_the_run_and_the_rest_is_carried():
    config = recipe(
        training={"tokens": 3000}, sequence_length_warmup={**WARMUP, "mode": "carry", "interleave": 2},
    )  # fmt: skip
    run = planned(config, 2)["run"]
    assert 3000 <= run["tokens_trained"] < 3000 + 64
    assert run["tokens_discarded"] == 0 and run["tokens_carried"] == run["tokens_read"] - run["tokens_trained"]


@pytest.mark.parametrize(("by", "ends"), [("steps", 5), ("tokens", 8)])
def test_where_the_learning_rate_is_at_its_peak(by, ends):
    """By tokens: five full batches are 320 tokens, and 176, 240, 304, 368 are trained after steps 5 to 8."""
    scheduler = {"type": "WarmupCosineLR", "params": {"total_num_steps": "auto", "warmup_num_steps": 5}}
    warmup = {**WARMUP, "learning_rate": {"by": by}}
    found = planned(recipe(scheduler=scheduler, sequence_length_warmup=warmup), 2)
    assert found["lr_warmup_ends"] == ends
    assert "note:" not in plan.text(found)  # the first snapshot is that of step 8
    early = planned(recipe(scheduler={**scheduler, "params": {"warmup_num_steps": 9, "total_num_steps": 20}}), 2)
    assert "note: the first is taken before the learning rate is at its peak, at step 9" in plan.text(early)


# -- averaging ---------------------------------------------------------------------------------------------------------


def test_pinned_buffers_are_rounded_up():
    """1003 floats are 4012 bytes, 4032 to the next line of the cache. Five of them 20160, pinned 16384 + 4096."""
    config = WeightAveragingConfig(enabled=True, interval=1, window=4)
    masters = {"a": 1000, "b": 3}
    taken = plan_costs.averaging(config, masters, pinned=True)
    assert (taken.snapshot, taken.exact, taken.held, taken.files) == (4012, 5 * 4012, 16384 + 4096, 0)
    files = WeightAveragingConfig(enabled=True, interval=1, window=3, storage="files", storage_path="/scratch")
    taken = plan_costs.averaging(files, masters, pinned=True)
    assert (taken.held, taken.files) == (4096, 3 * 4012)
    memory = WeightAveragingConfig(enabled=True, interval=1, window=3, storage="memory")
    assert plan_costs.averaging(memory, masters, pinned=True).held == 4096 + 3 * 4012
    halves = WeightAveragingConfig(enabled=True, interval=1, window=3, deltas="bf16")
    assert plan_costs.averaging(halves, masters, pinned=False).held == 2 * 4012 + 2 * 2006


def test_a_rank_with_more_than_its_share_counts():
    """10 + 3 matrices' and 2 + 1 norms' elements over 4 ranks: by role 3, 1, 1, 1; in two groups 4 and 1."""
    local = {Role.HIDDEN: 10, Role.UNEMBEDDING: 3, Role.BLOCK_NORM: 2, Role.FINAL_NORM: 1}
    by_role = {"hidden": 3, "unembedding": 1, "block_norm": 1, "final_norm": 1}
    assert plan_costs.shares(local, 4, by_role=True) == by_role
    assert plan_costs.shares(local, 4, by_role=False) == {"decayed": 4, "not decayed": 1}


def test_offloaded_masters_are_not_pinned_and_nodes_have_their_ranks():
    given = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    found = planned(recipe(**given), 4, per_node=2, device="gpu")["weight_averaging"]
    assert found["host_bytes"] == found["host_bytes_before_rounding"] == 4 * found["snapshot_bytes"]
    assert found["node_host_bytes"] == 2 * found["host_bytes"]
    here, there = (planned(recipe(**z), 4, device="gpu")["seconds"]["rates"] for z in (given, {}))
    assert here["snapshot"] == plan_costs.CPU.snapshot and there["snapshot"] == 1 / 25e9


@pytest.mark.parametrize(("stage", "partitions"), [(0, 1), (1, 4), (3, 4)])
def test_zero_divides_the_masters(stage, partitions):
    found = planned(recipe(zero_optimization={"stage": stage}), 4)
    assert found["layout"]["share the masters"] == partitions
    masters = found["parameters"]["fp32 masters of a rank"]
    assert 0 <= masters - found["parameters"]["all"] / partitions < len(found["completep"]["roles"])


# -- time --------------------------------------------------------------------------------------------------------------


def test_seconds_by_hand():
    """Without ZeRO a snapshot in fp32 is looked at; a report once in 20 steps reads Adam's moments where asked to."""
    found = planned(recipe(zero_optimization={"stage": 0}), 2)
    held, cpu, seconds = 4 * found["parameters"]["all"], plan_costs.CPU, found["seconds"]
    assert seconds["weight_averaging"] == pytest.approx(cpu.averaging_step + held * cpu.looked_at / 4)
    report = cpu.report_base + 2 * cpu.report_rank
    assert seconds["sequence_length_warmup"] == pytest.approx(cpu.warmup_step + report / 20)
    asked = recipe(zero_optimization={"stage": 0})
    asked["sequence_length_warmup"] = {**asked["sequence_length_warmup"], "variance": True}
    read = planned(asked, 2)["seconds"]["sequence_length_warmup"]
    assert read == pytest.approx(cpu.warmup_step + (held * cpu.report + report) / 20)
    # 7 gradients of branches, and twice the inputs of the logits and of the last MLP's second matrix; 32 tokens
    assert seconds["completep"] == pytest.approx((9 * 32 + 2 * 128) * 32 * 4 * cpu.multiply)
    multiplying = found["parameters"]["all"] - found["parameters"]["embedding"]
    assert seconds["step"] == pytest.approx(6 * multiplying * 64 / (2 * cpu.flops))
    folded = planned(recipe(completep={**COMPLETEP, "residual": "folded"}), 2)["seconds"]
    assert folded["completep"] == 0.0


def test_rates_are_the_measured_ones():
    measured = json.loads((ROOT / "docs/results/scaling/measured.json").read_text())["rates"]
    for name, rate in measured.items():
        assert getattr(plan_costs.CPU, name) == float(f"{rate['value']:.2g}"), name


def test_scaling_tables_are_the_published_ones():
    bench = harness.benchmark("scaling")
    rows = bench.work_out()
    document = (ROOT / "docs/scaling.md").read_text()
    for table in bench.tables(rows).split("\n\n"):
        assert table in document
    with (ROOT / "docs/results/scaling/tables.csv").open() as file:
        published = list(csv.DictReader(file))
    for row, kept in zip(rows, published, strict=True):
        assert {name: str(value) for name, value in row.items()} == kept
    seven = rows[0]  # 7e9 parameters on 64 ranks, by hand: Llama 2's 6738415616 x 4 / 64, rounded up by group
    assert seven["parameters"] == 6738415616 and seven["snapshot_bytes"] == 6738415616 * 4 // 64
    assert seven["host_bytes"] == 6 * seven["snapshot_bytes"]


def test_measured_figures_are_the_published_ones():
    bench = harness.benchmark("scaling_measure")
    measured = json.loads((ROOT / "docs/results/scaling/measured.json").read_text())
    assert bench.compared(measured["compared"]) in (ROOT / "docs/scaling.md").read_text()
    exact = [row for row in measured["compared"] if row["what"] == "bytes of a snapshot"]
    assert [row["processes"] for row in exact] == [1, 2, 4, 8]
    assert all(math.isclose(row["measured"], row["predicted"], rel_tol=1e-4) for row in exact)


# -- Megatron-LM -------------------------------------------------------------------------------------------------------


def test_a_megatron_recipe_by_hand():
    """Two stages of two layers, tensor parallel 2, so 2 data-parallel ranks of 8."""
    found = planned(megatron(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, vocab_size=300), 8)
    assert found["host"] == "Megatron-LM" and found["layout"]["data"] == 2
    assert found["batch"] == {"samples": 8, "tokens": 128, "micro_batch": 2, "micro_batches": 2}
    # 12 h^2 + 13 h in a layer, of which norms (4 h) and two biases (2 h) are on both tensor-parallel ranks
    layer = (12 * 32**2 + 7 * 32) // 2 + 6 * 32
    first = 2 * layer + 512 * 32 // 2 + 16 * 32  # 300 padded to 512 = 2 x (128 x 2); positions are on both
    assert found["parameters"]["on the fullest rank"] == first
    assert found["parameters"]["all"] == 4 * (12 * 32**2 + 13 * 32) + 512 * 32 + 16 * 32 + 2 * 32
    assert found["parameters"]["embedding"] == 512 * 32 + 16 * 32
    # what ends a branch, h^2 and 4 h^2 and their biases, has roles of its own: in its scripts multipliers are folded
    assert found["parameters"]["branch_out"] == 4 * 5 * 32**2 and found["parameters"]["branch_out_bias"] == 4 * 2 * 32
    assert "branch_out" in found["completep"]["roles"] and found["seconds"]["completep"] == 0.0


def test_a_megatron_recipe_that_says_where_multipliers_go():
    said = {**megatron(), "completep": {**COMPLETEP, "residual": "forward"}}
    found = planned(said, 1)
    assert "branch_out" not in found["parameters"] and found["seconds"]["completep"] > 0


def test_a_tied_embedding_is_on_both_ends_of_the_pipeline():
    cfg = GPTConfig(**{**MODEL, "tie_embeddings": True, "position_embedding": "rope"})
    local = plan_costs.local_parameters(plan_costs.parts(cfg, 256), 4, Layout(2, pipeline=2), tied=True)
    assert local[Role.EMBEDDING] == 256 * 32 and Role.FINAL_NORM in local  # the last stage has the norm besides


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
        "--device",
        "cpu",
        "--json",
        str(tmp_path / "out.json"),
    ]
    assert main(given) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    printed = capsys.readouterr().out
    assert printed == plan.text(found) + "\n"
    assert found["completep"]["m_N"] == 2 and found["completep"]["roles"]["hidden"]["lr"] == 0.005
    for said in ("20 steps; 1,280 tokens read, 1,136 trained, 144 discarded", "4 snapshots, from step 8 every 4 to"):
        assert said in printed


NVME = {"stage": 1, "offload_optimizer": {"device": "nvme"}}
BAD = [
    # recipe, ranks, what the one message must hold
    (recipe(train_batch_size=30), 4, ["train_batch_size: 30", "4 data-parallel rank(s)", "24 or 32"]),
    (recipe(train_batch_size=30, gradient_accumulation_steps=2), 4, ["train_batch_size: 30", "= 16", "write 16"]),
    (recipe(train_batch_size=6, train_micro_batch_size_per_gpu=None), 4, ["train_batch_size: 6", "4 or 8"]),
    (recipe(train_micro_batch_size_per_gpu=None), 2, ["train_micro_batch_size_per_gpu: missing"]),
    (recipe(train_micro_batch_size_per_gpu="auto"), 2, ["train_micro_batch_size_per_gpu: 'auto'", "1 or more"]),
    (recipe(model={**MODEL, "tensor_parallel": 4}), 6, ["tensor_parallel 4 does not divide --world-size 6"]),
    (recipe(model={**MODEL, "tensor_parallel": 3}), 6, ["tensor_parallel = 3 does not divide num_attention_heads = 4"]),
    (recipe(model={**MODEL, "pipeline_parallel": 2}), 3, ["pipeline_parallel 2 does not divide --world-size 3"]),
    (recipe(model={**MODEL, "pipeline_parallel": 3}), 3, ["pipeline_parallel = 3 does not divide num_layers = 4"]),
    (recipe(model=None), 2, ['section "model" is missing']),
    (recipe(training={"stesp": 3}), 2, ["training.stesp", '"steps"']),
    (recipe(training={"steps": 20, "data": "data/corpus"}), 2, ["training.data: 'data/corpus'", "--vocab-size"]),
    (recipe(completep={**COMPLETEP, "alpha": 2.0}), 2, ["completep.alpha"]),
    (recipe(sequence_length_warmup={**WARMUP, "end_length": 32}), 2, ["end_length: 32 is not model.seq_length 16"]),
    (recipe(), 0, ["--world-size: 0"]),
    (recipe(zero_optimization=5), 2, ["zero_optimization: 5", "a JSON object"]),
    (recipe(zero_optimization={"stage": "1"}), 2, ["zero_optimization.stage: '1'", "0, 1, 2 or 3"]),
    (recipe(zero_optimization=NVME), 2, [NVME_REFUSED]),
    (recipe(bf16=1), 2, ["bf16: 1", "a JSON object"]),
    (recipe(zero_optimization={"stge": 1}), 2, ["zero_optimization.stge", 'did you mean "stage"?']),
    ([1], 2, ["must hold a JSON object", "got list"]),
    (recipe(optimizer={"type": "AdamW", "params": {"lr": "x"}}), 2, ["optimizer.params.lr: 'x'"]),
    (recipe(training={"tokens": 9}, sequence_length_warmup=None, optimizer=None), 2, ["optimizer: missing"]),
    (megatron(lr=0), 2, ["megatron.lr: 0", "above 0"]),
    (megatron(num_layers="4"), 2, ["megatron.num-layers: '4'", "whole number"]),
    (megatron(lr_warmup_samples=-1), 2, ["megatron.lr-warmup-samples: -1"]),
    (megatron(pipeline_model_parallel_size=3), 3, ["pipeline-model-parallel-size: 3", "4 layers"]),
    (megatron(pipeline_model_parallel_size=2), 3, ["pipeline-model-parallel-size 2 does not divide --world-size 3"]),
    (megatron(global_batch_size=6), 2, ["train_batch_size: 6", "4 or 8"]),
    (megatron(rampup_batch_size=[2, 2, 10]), 2, ["--rampup-batch-size", "leave one of the two out"]),
    (megatron(context_parallel_size=3), 3, ["end_length: 16", "not divisible by 12"]),
    ({**megatron(), "training": {"steps": 3}}, 2, ['training: "megatron" says it already']),
    ({**megatron(), "megatron": {"num_layers": 4}}, 2, ['write the option as "num-layers"']),
    ({**megatron(), "megatron": {}}, 2, ["megatron.num-layers: missing"]),
]


@pytest.mark.parametrize(("config", "ranks", "said"), BAD)
def test_one_message_and_exit_code_2(tmp_path, capsys, config, ranks, said):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(config))
    assert main(["plan", "--config", str(path), "--world-size", str(ranks)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    for part in said:
        assert part in err


def test_what_goes_to_nvme_is_planned_without_averaging():
    assert planned(recipe(zero_optimization=NVME, weight_averaging=None), 2)["weight_averaging"] is None


def test_a_misspelt_key_of_deepspeeds_is_said_and_the_plan_made(tmp_path, capsys, caplog):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe(gradient_clippping=1.0)))
    assert main(["plan", "--config", str(path), "--world-size", "2"]) == 0
    [said] = [record.getMessage() for record in caplog.records if record.name == "ds_plugin"]
    assert said.startswith("gradient_clippping: DeepSpeed") and 'did you mean "gradient_clipping"?' in said


def test_no_half_written_plan(tmp_path, capsys):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe()))
    target = tmp_path / "missing" / "plan.json"
    assert main(["plan", "--config", str(path), "--world-size", "2", "--json", str(target)]) == 2
    assert "cannot be written" in capsys.readouterr().err and not target.parent.exists()
    assert main(["plan", "--config", str(path), "--world-size", "2", "--arguments"]) == 2
    assert 'no "megatron" section' in capsys.readouterr().err
