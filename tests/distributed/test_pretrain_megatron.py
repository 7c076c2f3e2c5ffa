"""The methods in Megatron-LM's training loop: on the stand-in of tests/reference/megatron_loop, and on a checkout.

The stand-in has the names and calls of the host's loop over the real megatron-core; what is compared on it is bitwise.
"""

import contextlib
import importlib.metadata
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ds_plugin.config import PluginConfig
from ds_plugin.errors import ConfigError, PluginError
from ds_plugin.run import plan_inputs
from ds_plugin.weight_averaging.merge import merge
from megatron_patches.completep import rules
from tests import harness
from tests.megatron_lm import logged, real
from tests.reference import averaging
from tests.unit.weight_averaging.test_merge_torch_dist import read as read_tensors

FOLDER = Path(__file__).resolve().parents[1] / "reference" / "megatron_loop"
SCRIPT = FOLDER / "pretrain_small.py"
FULL, STEPS, BATCH = 32, 8, 4
LENGTHS = [8, 16, 16, 24, 32, 32, 32, 32]  # 8 + 24 * step / 5, floored to a multiple of 8
WARMUP = {"enabled": True, "start_length": 8, "end_length": FULL, "duration": {"steps": 5}, "multiple_of": 8}
AVERAGING = {"enabled": True, "interval": 2, "window": 2}
OPTIONS = {
    "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "context_parallel_size": 1,
    "sequence_parallel": False, "num_layers": 2, "seq_length": FULL, "full_length": FULL, "micro_batch_size": 2,
    "global_batch_size": BATCH, "train_iters": STEPS, "lr": 0.01, "min_lr": 0.001, "lr_decay_iters": STEPS,
    "eval_interval": 4, "eval_iters": 1, "save": None, "save_interval": 4, "load": None, "ckpt_step": None,
    "finetune": False, "no_save_optim": None, "save_retain_interval": None, "async_save": False,
    "seed": 1234, "skip_train": False, "overflows": [], "unknown_entries": [],
}  # fmt: skip
LAYOUTS = {
    "tensor": {"tensor_model_parallel_size": 2, "num_layers": 1},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "data": {},
}


def run(folder, sections, options, twin=None):
    """The script under ``python -m megatron_patches``: its exit code, what it said, and the stand-in's record."""
    from megatron_patches.pretrain import script

    file = Path(folder) / f"methods_{torch.distributed.get_rank()}.json"
    file.write_text(json.dumps(sections))
    sys.path.insert(0, str(FOLDER))
    script.prepare_host(SCRIPT)
    from megatron.training import training

    if twin is not None:
        twin(training)
    warned = io.StringIO()
    logging.getLogger("ds_plugin").addHandler(logging.StreamHandler(warned))
    arguments = ["--options", json.dumps({**OPTIONS, **options})]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = script.run([str(SCRIPT), *arguments, "--ds-plugin-config", str(file)])
    record = {"code": code, "said": said.getvalue(), "warned": warned.getvalue(), **training.RECORD}
    return {**record, "full": training.get_args().seq_length}


def by_hand(training):
    """Sequence length warmup written into the loop: the twin of the hooks."""
    train_step, build = training.train_step, training.build_train_valid_test_data_iterators

    def shorter(*args, iteration):
        options = training.get_args()
        options.seq_length = LENGTHS[iteration]
        result = train_step(*args, iteration=iteration)
        options.seq_length = FULL
        return result

    def narrowed(batches):
        for batch in batches:
            length = training.get_args().seq_length
            for name in ("tokens", "labels", "loss_mask", "position_ids"):
                batch[name] = batch[name][:, :length].clone()
            batch["attention_mask"] = batch["attention_mask"][:, :, :length, :length].clone()
            yield batch

    def iterators(provider):
        train, valid, test = build(provider)
        if train is not None:
            train.iterable = narrowed(train.iterable)
        return train, valid, test

    training.train_step, training.build_train_valid_test_data_iterators = shorter, iterators


def same(found, expected):
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_warmup_and_averaging_equal_their_twins(workers, tmp_path, layout):
    """Lengths, losses, weights, averages and counts, on every rank of each way to share a model out."""
    options = {**LAYOUTS[layout], "overflows": [5], "save": str(tmp_path / "run")}
    sections = {"sequence_length_warmup": WARMUP, "weight_averaging": AVERAGING}
    hooked = workers(2).run(run, str(tmp_path), sections, options)
    plain = workers(2).run(run, str(tmp_path), {}, {**options, "save": str(tmp_path / "plain")}, twin=by_hand)
    micro_batches = 1 if layout == "data" else 2  # on a rank; also of an evaluation
    tokens = [BATCH * length for length in LENGTHS]
    trained = [sum(t for i, t in enumerate(tokens[:n]) if i != 5) for n in range(1, STEPS + 1)]
    for found, expected in zip(hooked, plain, strict=True):
        assert found["code"] == 0 and found["full"] == FULL
        assert [shape for shape, _ in found["train"]] == [(2, n) for n in LENGTHS for _ in range(micro_batches)]
        assert found["train"] == expected["train"]
        assert found["losses"] == expected["losses"] and found["lr"] == expected["lr"]
        assert [same(a, b) for a, b in zip(found["weights"], expected["weights"], strict=True)] == [[]] * STEPS
        # counts: tokens in the log and the progress file, and operations at each iteration's length
        assert found["tokens of the log"] == tokens
        operations = [BATCH * (1000 * n + n * n) for n in LENGTHS]
        assert found["operations"] == [sum(operations)]
        assert found["progress"] == [(n, trained[n - 1], sum(operations[:n])) for n in (4, 8)]
        # evaluation: of full length, raw as without us, averaged on the same samples; their stream goes on undisturbed
        raw, averaged = found["evaluations"][0::2], found["evaluations"][1::2]
        assert [(p, losses, told, n) for p, losses, told, n, _ in raw] == [e[:4] for e in expected["evaluations"]]
        steps = [(2, 4), (4, 8), (4, 8)]  # the sixth was not applied
        said = [f"average of steps {first} to {last}" for first, last in steps]
        assert [e[0].partition(" | ")[2] for e in averaged] == said
        assert [e[2] for e in averaged] == [True] * 3
        seen = [found["eval"][i : i + micro_batches] for i in range(0, 6 * micro_batches, micro_batches)]
        assert seen[0::2] == seen[1::2] and sum(seen[0::2], []) == expected["eval"]
        assert {shape for shape, _ in found["eval"]} == {(2, FULL)}
        for (*_, weights), both in zip(averaged, steps, strict=True):
            assert same(weights, averaging.mean([expected["weights"][step - 1] for step in both])) == []
        assert all(a[1] != r[1] for r, a in zip(raw, averaged, strict=True)) or raw[0][1] == [None]
    written_where_a_writer_is(hooked, plain, [4, 8, 8], ["", ", averaged"])
    printed = [line for line in hooked[-1]["printed"] if "consumed samples" in line]
    assert "consumed samples:            4 | sequence length:     8 | trained tokens:             32 |" in printed[0]
    assert [int(line.split("trained tokens:")[1].split("|")[0]) for line in printed] == trained
    assert [f["train"] for f in hooked][0][0][0] == hooked[1]["train"][0][0]


def written_where_a_writer_is(hooked, plain, iterations, marks):
    """TensorBoard and W&B have each evaluation under its own name, and without its mark the host's."""
    found, expected = hooked[-1], plain[-1]
    assert not any(name in rank for rank in hooked[:-1] for name in ("tensorboard", "wandb"))
    losses = iter([losses[-1] for _, losses, *_ in found["evaluations"]])
    scalars, logged = [], []
    for step in iterations:
        for mark in marks:
            loss = next(losses)
            scalars.append((f"lm loss validation{mark}", loss, step))
            scalars.append((f"lm loss validation vs samples{mark}", loss, step * BATCH))
            logged.append(({f"lm loss validation{mark}": loss}, step))
    assert found["tensorboard"] == scalars and found["wandb"] == logged
    assert expected["tensorboard"] == [entry for entry in scalars if "averaged" not in entry[0]]
    assert expected["wandb"] == [entry for entry in logged if "averaged" not in str(entry)]


def test_averages_of_several_horizons_are_written_apart(workers, tmp_path):
    bank = {"enabled": True, "interval": 2, "mode": "ema", "horizons": [2, 5]}
    options = {**LAYOUTS["data"], "train_iters": 4}
    hooked = workers(2).run(run, str(tmp_path), {"weight_averaging": bank}, options)
    plain = workers(2).run(run, str(tmp_path), {}, options)
    assert [found["code"] for found in hooked] == [0, 0]
    written_where_a_writer_is(hooked, plain, [4, 4], ["", ", averaged, horizon 2", ", averaged, horizon 5"])


def test_hooks_that_change_nothing_leave_every_bit(workers, tmp_path):
    """Lengths that are full from the first iteration on, and an average that is never taken, against no hooks."""
    still = {**WARMUP, "start_length": FULL, "learning_rate": {"by": "tokens"}}
    sections = {"sequence_length_warmup": still, "weight_averaging": {**AVERAGING, "start_step": 1000}}
    options = {**LAYOUTS["data"], "train_iters": 4}
    off = {"sequence_length_warmup": {**WARMUP, "enabled": False}}
    hooked = workers(2).run(run, str(tmp_path), sections, options)
    plain = workers(2).run(run, str(tmp_path), off, options)
    for found, expected in zip(hooked, plain, strict=True):
        assert found["code"] == expected["code"] == 0
        for name in ("train", "eval", "losses", "lr", "operations", "progress", "tokens of the log"):
            assert found.get(name) == expected.get(name), name
        assert [same(a, b) for a, b in zip(found["weights"], expected["weights"], strict=True)] == [[]] * 4
        assert [e[:4] for e in found["evaluations"]] == [e[:4] for e in expected["evaluations"]]


def explicit_completep(training):
    """The recipe by the package's own functions, in a loop without hooks."""
    import megatron.core.models.gpt as host

    from megatron_patches.completep import finish, prepare
    from megatron_patches.completep.config import CompletePConfig
    from megatron_patches.completep.megatron import build_optimizer

    section = CompletePConfig.model_validate({**RECIPE, "residual": "folded"})  # as it is if the JSON does not say
    model = host.GPTModel

    def build(*, config, transformer_layer_spec, **kwargs):
        config, transformer_layer_spec = prepare(config, transformer_layer_spec, section)
        built = model(config=config, transformer_layer_spec=transformer_layer_spec, **kwargs)
        finish(built, section)
        return built

    host.GPTModel = build
    training.get_megatron_optimizer = lambda config, chunks, config_overrides: build_optimizer(config, chunks, section)


RECIPE = {"enabled": True, "base_width": 8, "base_depth": 1}


def test_completep_and_resume(workers, tmp_path):
    """All three methods, learning rates by tokens; stopped after four iterations and resumed, nothing is lost.

    CompleteP alone equals the recipe applied by its own functions.
    """
    short = {**LAYOUTS["pipeline"], "train_iters": 3}
    alone = workers(2).run(run, str(tmp_path), {"completep": RECIPE}, short)
    explicit = workers(2).run(run, str(tmp_path), {}, short, twin=explicit_completep)
    plain = workers(2).run(run, str(tmp_path), {}, {**short, "save": str(tmp_path / "plain"), "save_interval": 3})
    assert alone[1]["losses"] == explicit[1]["losses"] != plain[1]["losses"]
    assert same(alone[0]["weights"][-1], explicit[0]["weights"][-1]) == []

    by_tokens = {**WARMUP, "learning_rate": {"by": "tokens"}, "duration": {"tokens": 300}}
    sections = {"sequence_length_warmup": by_tokens, "weight_averaging": AVERAGING, "completep": RECIPE}
    options = {**LAYOUTS["pipeline"], "save": str(tmp_path / "run")}
    whole = workers(2).run(run, str(tmp_path), sections, options)
    resumed = workers(2).run(run, str(tmp_path), sections, {**options, "load": options["save"], "ckpt_step": 4})
    lengths, tokens = [], 0
    for _ in range(STEPS):  # the next token's position, in a duration of 300
        lengths.append(max(8, (8 + 24 * min(tokens + 1, 300) // 300) // 8 * 8))
        tokens += BATCH * lengths[-1]
    done = [sum(BATCH * n for n in lengths[:step]) // FULL for step in range(1, STEPS + 1)]  # samples of full length
    assert len(set(lengths)) > 2 and lengths[4] < FULL
    for found, again in zip(whole, resumed, strict=True):
        assert found["code"] == again["code"] == 0
        assert [shape[1] for shape, _ in found["train"]][::2] == lengths
        rates = [0.001 + 0.009 * (1 - samples / (BATCH * STEPS)) for samples in done]
        top = max(found["lr"])
        assert found["lr"] == pytest.approx([top * rate / rates[0] for rate in rates])
        for name in ("losses", "lr", "tokens of the log"):
            assert again[name] == found[name][4:], name
        assert [same(a, b) for a, b in zip(again["weights"], found["weights"][4:], strict=True)] == [[]] * 4
        assert again["progress"] == found["progress"][1:] and again["operations"] == found["operations"]
        for (*one, weights), (*two, expected) in zip(again["evaluations"], found["evaluations"][2:], strict=True):
            assert one == two and same(weights, expected) == []

    folder = tmp_path / "run" / "ds_plugin" / "iter_0000004"
    load = {**options, "load": options["save"], "ckpt_step": 4, "save": None}
    longer = {**sections, "sequence_length_warmup": {**by_tokens, "duration": {"tokens": 400}}}
    wider = {**sections, "completep": {**RECIPE, "base_width": 4}}
    forward = {**sections, "completep": {**RECIPE, "residual": "forward"}}
    for changed, words in (
        (longer, "give the same section"),
        (wider, "another completep: base_width 8 there, 4 here;"),
        (forward, 'another completep: residual "folded" there, "forward" here; give the same section'),
    ):
        refused(workers(2).run(run, str(tmp_path), changed, load), words)
    ours = {**load, "finetune": True, "train_iters": 1}
    stock = {**ours, "load": str(tmp_path / "plain"), "ckpt_step": None}
    averaging_alone = {"weight_averaging": AVERAGING}
    for changed, given, words in (  # weights go where the forward pass is theirs
        (forward, ours, "residual branches x 1 there, x 0.5 here, logits x 1 there, x 0.5 here; give"),
        (forward, stock, "weights of a run without this plugin"),
        (averaging_alone, ours, None),
        ({**averaging_alone, "completep": RECIPE}, stock, None),
        (wider, ours, None),
    ):
        ranks = workers(2).run(run, str(tmp_path), changed, given)
        if words is not None:
            refused(ranks, words)
        assert words is not None or [found["code"] for found in ranks] == [0, 0], ranks[0]["said"]
    tracker = tmp_path / "run" / "latest_checkpointed_iteration.txt"
    tracker.rename(tmp_path / "tracker")  # the host does without, where --ckpt-step is given
    refused(workers(2).run(run, str(tmp_path), forward, load), 'residual "folded" there, "forward" here')
    (tmp_path / "tracker").rename(tracker)
    (folder / "weight_averaging_rank_00001.safetensors").unlink()
    refused(workers(2).run(run, str(tmp_path), sections, load), "weight_averaging_rank_00001.safetensors is missing")
    (folder / "ds_plugin.json").unlink()
    refused(workers(2).run(run, str(tmp_path), sections, load), "a checkpoint of a run without this plugin")
    of_another = {**options, "load": str(tmp_path / "plain"), "save": None, "train_iters": 4}
    del sections["completep"]
    ranks = workers(2).run(run, str(tmp_path), sections, of_another)
    assert "iterations at full length" in ranks[0]["warned"].replace("\n", " ")
    for found in ranks:
        assert found["code"] == 0
        assert {shape for shape, _ in found["train"]} == {(2, FULL)}  # 3 x 4 x 32 tokens are beyond the warmup's 300


def test_the_average_is_saved_beside_each_checkpoint(workers, tmp_path):
    """The weights alone, by the host's function; nothing else of the run is touched, and no run resumes from them."""
    options = {**LAYOUTS["pipeline"], "save": str(tmp_path / "run"), "save_retain_interval": 8}
    sections = {"weight_averaging": {**AVERAGING, "save_average": True}}
    found = workers(2).run(run, str(tmp_path), sections, options)
    plain = workers(2).run(run, str(tmp_path), {}, {**LAYOUTS["pipeline"]})
    root = tmp_path / "run"
    for rank, (one, other) in enumerate(zip(found, plain, strict=True)):
        assert one["losses"] == other["losses"]
        assert [same(a, b) for a, b in zip(one["weights"], other["weights"], strict=True)] == [[]] * STEPS
        assert one["saves"] == [(str(root / "averaged"), True, None, None), (str(root), None, 8, {})] * 2
        for step in (4, 8):
            file = f"iter_{step:07d}/rank_{rank}.pt"
            saved = torch.load(root / "averaged" / file, weights_only=True)
            expected = averaging_of(one, step)
            weights = {name.removeprefix("module."): value for name, value in saved["model"][0].items()}
            assert saved["adam"] == [] and saved["scheduler"] is None
            assert same({name: weights[name] for name in expected}, expected) == []
            assert torch.load(root / file, weights_only=True)["adam"] != []

    load = {**options, "save": None, "load": str(root / "averaged"), "train_iters": 1}
    started = workers(2).run(run, str(tmp_path), {}, {**load, "finetune": True})
    as_by_hand = workers(2).run(run, str(tmp_path), sections, {**load, "finetune": True})
    assert started[1]["losses"] == as_by_hand[1]["losses"] != found[1]["losses"][:1]
    refused(workers(2).run(run, str(tmp_path), sections, load), "the average of steps 6 to 8, which has no optimizer")

    bank = {"enabled": True, "interval": 2, "mode": "ema", "horizons": [2, 5], "save_average": True}
    options["save"] = str(tmp_path / "bank")
    shutil.copytree(root / "averaged" / "iter_0000004", tmp_path / "bank" / "averaged" / "horizon_2" / "iter_0000002")
    found = workers(2).run(run, str(tmp_path), {"weight_averaging": bank}, {**options, "train_iters": 4})
    kept = sorted(str(path.relative_to(tmp_path / "bank")) for path in (tmp_path / "bank" / "averaged").rglob("iter_*"))
    for one in found:
        assert [save for save, *_ in one["saves"]] == [
            str(tmp_path / "bank" / name) for name in ("averaged/horizon_2", "averaged/horizon_5", "")
        ]
    assert kept == [  # what is of an iteration that the run has not kept is gone
        f"averaged/{horizon}/{part}iter_0000004"
        for horizon in ("horizon_2", "horizon_5")
        for part in ("ds_plugin/", "")
    ]


def averaging_of(found, step):
    return averaging.mean([found["weights"][step - 3], found["weights"][step - 1]])


def refused(ranks, words):
    """Every rank has said so, and none has trained."""
    for found in ranks:
        assert found["code"] == 2 and words in found["said"], found["said"]
        assert "train" not in found


def test_data_that_cannot_be_cut_are_refused_on_the_ranks_that_read_none_too(workers, tmp_path):
    options = {**LAYOUTS["tensor"], "unknown_entries": ["cu_seqlens"]}
    refused(workers(2).run(run, str(tmp_path), {"sequence_length_warmup": WARMUP}, options), "'cu_seqlens'")
    refused(
        workers(2).run(
            run, str(tmp_path), {"sequence_length_warmup": WARMUP}, {**LAYOUTS["tensor"], "full_length": 24}
        ),
        "24 positions, 32 are to be trained",
    )


LOADED = {  # what is asked for, beside --load run, and the trackers' texts: what the host takes of which folder
    "nothing": ({"load": None}, {"run": "8"}, None),
    "the last": ({}, {"run": "8"}, ("run", 8, False)),
    "an earlier": ({"ckpt_step": 4}, {"run": "8"}, ("run", 4, False)),
    "an earlier, without a tracker": ({"ckpt_step": 4}, {}, ("run", 4, False)),
    "none yet": ({}, {}, None),
    "damaged": ({}, {"run": "eight"}, None),  # the host ends on it
    "weights": ({"finetune": True}, {"run": "8"}, ("run", 8, True)),
    "frozen": ({"freeze_all_layers": True}, {"run": "8"}, ("run", 8, True)),
    "a release": ({"ckpt_step": 4}, {"run": "release"}, ("run", 0, True)),
    "begun from another": ({"pretrained_checkpoint": "base"}, {"base": "8"}, ("base", 8, True)),
    "begun from another, going on": ({"pretrained_checkpoint": "base"}, {"base": "8", "run": "3"}, ("run", 3, False)),
    "only another": ({"pretrained_checkpoint": "base", "load": None}, {"base": "8"}, ("base", 8, True)),
}


@pytest.mark.parametrize("case", LOADED)
def test_what_the_host_will_load(tmp_path, case):
    from megatron_patches.pretrain import state

    changes, trackers, expected = LOADED[case]
    for name, text in trackers.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / state.TRACKER).write_text(f"{text}\n")
    given = {"load": "run", "finetune": False, "ckpt_step": None, "pretrained_checkpoint": None, **changes}
    for name in ("load", "pretrained_checkpoint"):
        given[name] = given[name] and str(tmp_path / given[name])
    found = state._to_load(SimpleNamespace(**given))
    assert found == (expected and (tmp_path / expected[0], *expected[1:]))


# -- refusals ----------------------------------------------------------------------------------------------------------
REFUSED = {
    # section, changes of it, options: words of the message
    "--rampup-batch-size": ("sequence_length_warmup", {}, {"rampup_batch_size": [2, 2, 8]}),
    "--cuda-graph-impl local": ("sequence_length_warmup", {}, {"cuda_graph_impl": "local"}),
    "--tp-comm-overlap": ("sequence_length_warmup", {}, {"tp_comm_overlap": True}),
    "--sft": ("sequence_length_warmup", {}, {"sft": True}),
    "is not --seq-length 64": ("sequence_length_warmup", {}, {"seq_length": 64}),
    "mode: 'carry' is not supported": ("sequence_length_warmup", {"mode": "carry"}, {}),
    "pacing: 'adaptive' is not": ("sequence_length_warmup", {"pacing": "adaptive"}, {}),
    "not divisible by 24": ("sequence_length_warmup", {}, {"context_parallel_size": 3}),
    "--use-megatron-fsdp": ("weight_averaging", {}, {"use_megatron_fsdp": True}),
    "--non-persistent-save-interval 2": ("weight_averaging", {}, {"non_persistent_save_interval": 2}),
    "save_average: --async-save True": ("weight_averaging", {"save_average": True}, {"async_save": True}),
    "weight_averaging.restart": ("weight_averaging", {"restart": {"patience": 2}}, {}),
    "--use-mup": ("completep", {}, {"use_mup": True}),
    "--decoupled-lr 0.1": ("completep", {}, {"decoupled_lr": 0.1}),
    "--num-experts 4": ("completep", {}, {"num_experts": 4}),
}
SECTIONS = {"sequence_length_warmup": WARMUP, "weight_averaging": AVERAGING, "completep": RECIPE}


def refusals():
    """What each rank is told when only the last of them has the option, and whether a model was built."""
    from megatron_patches.pretrain.loop import Loop

    built, told = [], {}
    for words, (name, changes, options) in REFUSED.items():
        last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        sections = PluginConfig.from_dict({name: {**SECTIONS[name], **changes}})
        given = SimpleNamespace(**{**OPTIONS, **(options if last or changes else {})})
        try:
            Loop(sections, lambda given=given: given).setup_model_and_optimizer(built.append, words)
        except ConfigError as error:
            told[words] = str(error).removesuffix(" (seen on rank 1)")
    return told, built


def test_what_does_not_go_together_is_refused_by_name_before_the_model_is_built(workers):
    (first, built), (second, _) = workers(2).run(refusals)
    assert [words for words in REFUSED if words not in first.get(words, "")] == [] and built == []
    assert first == second


def lacking(name):
    import megatron_patches
    from megatron_patches.pretrain import script

    sys.path.insert(0, str(FOLDER))
    script.prepare_host(SCRIPT)
    from megatron.training import training

    before = megatron_patches.active(), dict(vars(training))
    removed = vars(training).pop(name)
    sections = PluginConfig.from_dict(SECTIONS)
    try:
        script.install(sections)
    except PluginError as error:
        told = str(error)
    setattr(training, name, removed)
    untouched = megatron_patches.active() == before[0] and all(vars(training)[n] is v for n, v in before[1].items())
    script.install(sections)
    count = len(megatron_patches.active()) - len(before[0])
    script.install(sections)
    again = len(megatron_patches.active()) - len(before[0])
    try:
        script.install(PluginConfig.from_dict({"weight_averaging": AVERAGING}))
    except PluginError as error:
        other = str(error)
    return told, untouched, count, again, other


def kept():
    """A wrapper that somebody imported, called while it is on and after the undoing."""
    import megatron_patches
    from megatron_patches.pretrain import script

    sys.path.insert(0, str(FOLDER))
    script.prepare_host(SCRIPT)
    from megatron.training import training

    training.num_floating_point_operations = lambda *args: args
    script.install(PluginConfig.from_dict({"sequence_length_warmup": WARMUP}))
    wrapper = training.num_floating_point_operations
    megatron_patches.revert()
    return wrapper is training.num_floating_point_operations, wrapper(1, 2)


def test_a_wrapper_kept_by_another_module_is_the_hosts_after_the_undoing(workers):
    assert workers(1).run(kept) == [(False, (1, 2))]


def test_a_missing_name_is_one_error_and_nothing_is_patched(workers):
    [(told, untouched, count, again, other)] = workers(1).run(lacking, "train_step")
    assert "has no train_step" in told and importlib.metadata.version("megatron-core") in told and str(FOLDER) in told
    assert untouched and count == again == 12 + 3 and "one configuration holds in a process" in other


# -- a checkout of Megatron-LM -----------------------------------------------------------------------------------------
CHECKOUT = os.environ.get("MEGATRON_LM_PATH")


def test_a_checkout_is_tested_or_its_absence_is_said():
    if CHECKOUT is None:
        assert "MEGATRON_LM_PATH" not in os.environ
        warnings.warn(
            "MEGATRON_LM_PATH is not set: Megatron-LM's own script was not run, only the stand-in; set it to a "
            "checkout of core_r0.16.0 (Python 3.12 or newer: of main), and select the slow tests",
            stacklevel=1,
        )
    else:
        assert Path(CHECKOUT, "pretrain_gpt.py").is_file()


def finished(started):
    with started:
        done = started.wait(1500)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


UNTOUCHED = """
import sys
import warnings
from pathlib import Path
from megatron_patches.pretrain import script

if __name__ == "__main__":
    script.prepare_host(Path(sys.argv[1]))
    sys.argv = sys.argv[1:]
    script.execute(Path(sys.argv[0]))
"""

RECIPES = {"gpt-tiny_all_megatron-2xcpu": 2, "llama-7b_all_megatron-64xh100": 64}  # and their ranks
PARSED = """
import sys
from pathlib import Path
from ds_plugin.config import PluginConfig, load_json
from megatron_patches.pretrain import options, script

recipe = load_json(sys.argv[1])
script.prepare_host(Path(sys.argv[2]))
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args
from megatron_patches.completep import prepare

del sys.argv[1:3]
args = parse_args()
validate_args(args)
sections = PluginConfig.from_dict(recipe)
options.check_options(sections, args)
config, spec = core_transformer_config_from_args(args), get_gpt_layer_local_spec(normalization=args.normalization)
scaled, _ = prepare(config, spec, sections.completep.on_megatron())
sizes = config.num_layers, config.hidden_size, config.kv_channels
print("PARSED", args.data_parallel_size, *sizes, scaled.softmax_scale)
"""

if CHECKOUT is not None:

    @pytest.mark.slow
    @pytest.mark.timeout(600)
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_the_checkout_takes_the_recipe(recipe):
        """Its own parser, checks and model config, at the recipe's ranks; the plan is of the same model and layout."""
        file, ranks = harness.ROOT / "configs" / f"{recipe}.json", RECIPES[recipe]
        job = plan_inputs.read_job(file, ranks)
        place = {"WORLD_SIZE": str(ranks), "RANK": "0", "LOCAL_RANK": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        given = [*plan_inputs.arguments(job.options), "--no-rope-fusion"]  # that wants TransformerEngine
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                PARSED,
                file,
                Path(CHECKOUT, "pretrain_gpt.py"),
                *given,
            ],
            env={**os.environ, **place},
            cwd=harness.ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found = next(line for line in done.stdout.splitlines() if line.startswith("PARSED")).split()[1:]
        model, section = job.settings.model, job.settings.plugin.completep
        head = model.hidden_size // model.num_attention_heads
        scale = None if section.base_head_dim == head else rules.attention_scale(head, section.base_head_dim)
        expected = [job.layout.data, model.num_layers, model.hidden_size, head, scale]
        assert found == [str(value) for value in expected]

    @pytest.mark.slow
    @pytest.mark.timeout(7200)
    @pytest.mark.parametrize("layout", ["torch_dist", "torch"])
    def test_the_real_script_killed_and_resumed_equals_the_uninterrupted(tmp_path, layout):
        """TP2 x PP2 x DP2, all three methods, through four lengths; killed after the checkpoint at iteration 30."""
        warmup = {"enabled": True, "start_length": 16, "end_length": 64, "duration": {"steps": 40}, "multiple_of": 16}
        sections = {
            "sequence_length_warmup": {**warmup, "learning_rate": {"by": "tokens"}},
            "weight_averaging": {"enabled": True, "interval": 5, "window": 3},
            "completep": {"enabled": True, "base_width": 16, "base_depth": 2},
        }
        save = ["--ckpt-format", layout, "--save"]
        whole, evaluations = logged(finished(real(CHECKOUT, tmp_path, "whole", sections, *save, tmp_path / "whole")))
        lengths = [max(16, (16 + 48 * min(step, 40) // 40) // 16 * 16) for step in range(1, 61)]
        assert [int(whole[step]["sequence length"]) for step in range(1, 61)] == lengths and len(set(lengths)) == 4
        assert int(whole[60]["trained tokens"]) == 8 * sum(lengths)
        prefixes = [line.partition(" | lm loss")[0] for line in evaluations]
        assert prefixes[:4] == [
            "iteration 25", "iteration 25 | average of steps 15 to 25",
            "iteration 50", "iteration 50 | average of steps 40 to 50",
        ]  # fmt: skip

        with real(CHECKOUT, tmp_path, "killed", sections, *save, tmp_path / "killed") as killed:
            killed.wait_for("iteration       31/", 1500)
            before, _ = logged(killed.output)
        assert before[30] == whole[30] and 60 not in before
        tracker = tmp_path / "killed" / "latest_checkpointed_iteration.txt"
        assert tracker.read_text() == "30"
        again = [*save, tmp_path / "killed", "--load", tmp_path / "killed"]
        resumed, later = logged(finished(real(CHECKOUT, tmp_path, "killed", sections, *again)))
        assert min(resumed) == 31 and later == evaluations[2:]
        for step in range(31, 61):
            names = set(whole[step]) - ({"lm loss"} if step == 32 else set())  # there the host logs a mean of two
            assert {n: resumed[step][n] for n in names} == {n: whole[step][n] for n in names}, step

    @pytest.mark.slow
    @pytest.mark.timeout(3600)
    def test_the_real_script_with_hooks_that_change_nothing_logs_what_it_logs_alone(tmp_path):
        (tmp_path / "untouched.py").write_text(UNTOUCHED)
        few = ["--train-iters", "8", "--eval-interval", "4", "--lr-warmup-iters", "2"]
        alone, evaluations = logged(finished(real(CHECKOUT, tmp_path, "alone", {}, *few, program="untouched")))
        still = {"enabled": True, "start_length": 64, "end_length": 64, "duration": {"steps": 5}}
        sections = {
            "sequence_length_warmup": {**still, "learning_rate": {"by": "tokens"}},
            "weight_averaging": {"enabled": True, "interval": 2, "start_step": 1000},
        }
        hooked, same_evaluations = logged(finished(real(CHECKOUT, tmp_path, "hooked", sections, *few)))
        off, off_evaluations = logged(finished(real(CHECKOUT, tmp_path, "off", {}, *few)))
        assert off == alone and off_evaluations == same_evaluations == evaluations and len(evaluations) == 4
        ours = ("sequence length", "trained tokens")
        assert {s: {n: v for n, v in line.items() if n not in ours} for s, line in hooked.items()} == alone
        assert sorted(alone) == list(range(1, 9))

    @pytest.mark.slow
    @pytest.mark.timeout(3600)
    def test_the_average_beside_a_real_checkpoint_is_the_mean_of_checkpoints(tmp_path):
        """Saved at TP2 x PP2 x DP2; bit for bit the offline merge of the run's own; and trained on from at one rank."""
        sections = {"weight_averaging": {"enabled": True, "interval": 2, "window": 3, "save_average": True}}
        save = ["--ckpt-format", "torch_dist", "--save", tmp_path / "run", "--save-interval", "2"]
        few = ["--eval-interval", "100", "--lr-warmup-iters", "2", "--lr-decay-iters", "6"]
        finished(real(CHECKOUT, tmp_path, "run", sections, *save, *few, "--train-iters", "6"))
        averaged = tmp_path / "run" / "averaged"
        assert (averaged / "latest_checkpointed_iteration.txt").read_text() == "6"
        merge([tmp_path / "run" / f"iter_{n:07d}" for n in (2, 4, 6)], tmp_path / "merged")
        expected = read_tensors(tmp_path / "merged")
        found = read_tensors(averaged / "iter_0000006")
        names = [name for name in expected if "decoder" in name or "embedding" in name or "output_layer" in name]
        assert len(names) >= 10 and [name for name in names if not torch.equal(found[name], expected[name])] == []
        assert not any("optimizer" in name for name in found)
        one = ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1", "--global-batch-size", "2"]
        load = ["--load", averaged, "--train-iters", "6", "--ckpt-format", "torch_dist", *few, *one]
        started = finished(real(CHECKOUT, tmp_path, "again", {}, *load, "--finetune", ranks=1))
        assert min(logged(started)[0]) == 1 and "successfully loaded checkpoint" in started
        with real(CHECKOUT, tmp_path, "resumed", sections, *load, ranks=1) as resumed:
            done = resumed.wait(600)
        assert done.returncode != 0 and "no optimizer state; give --finetune" in done.stdout

    @pytest.mark.slow
    @pytest.mark.timeout(3600)
    def test_stock_code_runs_a_checkpoint_of_completep(tmp_path):
        """Folded, as it is where the JSON does not say: the script alone has the same losses on the same batches."""
        (tmp_path / "untouched.py").write_text(UNTOUCHED)
        few = ["--train-iters", "6", "--eval-interval", "6", "--lr-warmup-iters", "2", "--ckpt-format", "torch_dist"]
        losses = {}
        for residual in ({}, {"residual": "forward"}):
            folder = tmp_path / residual.get("residual", "not said")
            sections = {"completep": {"enabled": True, "base_width": 16, "base_depth": 2, **residual}}
            _, trained = logged(finished(real(CHECKOUT, tmp_path, "run", sections, *few, "--save", folder)))
            load = [*few, "--load", folder, "--finetune", "--skip-train"]
            _, alone = logged(finished(real(CHECKOUT, tmp_path, "alone", {}, *load, program="untouched")))
            assert trained[0].startswith("iteration 6 |") and alone[0].startswith("iteration 0 on validation set")
            losses[folder.name] = [line.rpartition(" ")[2] for line in (trained[0], alone[0])]
        assert losses["not said"][0] == losses["not said"][1] and losses["forward"][0] != losses["forward"][1]

    @pytest.mark.slow
    @pytest.mark.timeout(600)
    def test_the_launch_script_on_two_nodes(tmp_path):
        """Of one process each; a node without a number is told what is missing before anything starts."""
        place = {"NODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(harness.free_port()), "PROCESSES": "1"}
        environment = {**os.environ, **place, "MEGATRON": CHECKOUT, "DS_PLUGIN_PYTHON": sys.executable}
        few = ["--train-iters", "5", "--lr-warmup-iters", "2", "--eval-iters", "0"]
        command = ["bash", harness.ROOT / "launch_scripts" / "pretrain_megatron.sh", *few]

        def started(name, **more):
            with open(tmp_path / name, "w") as said:
                return subprocess.Popen(command, env={**environment, **more}, stdout=said, stderr=subprocess.STDOUT)

        nodes = [started(number, NODE_RANK=number) for number in "01"] + [started("nameless")]
        try:
            codes = [node.wait(500) for node in nodes]
        finally:
            for node in nodes:
                node.terminate()  # torchrun ends its processes
        first, second, nameless = [(tmp_path / name).read_text() for name in ("0", "1", "nameless")]
        assert codes == [0, 0, 1], first
        assert list(logged(second)[0]) == [1, 5] and "world size: 2, data-parallel size: 2" in first
        assert "give each node its number" in nameless
