"""The methods in Megatron-LM's training loop, on its stand-in (`megatron_stand_in`)."""

import functools
import importlib.metadata
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from ds_plugin.config import PluginConfig
from ds_plugin.core.errors import ConfigError, PluginError
from megatron_patches.training_loop import preflight
from tests.distributed import plain
from tests.distributed.megatron_stand_in import (
    ALL_THREE,
    AVERAGING,
    BATCH,
    BY_TOKENS,
    FOLDER,
    FULL,
    LAYOUTS,
    LENGTHS,
    OPTIONS,
    RECIPE,
    SCRIPT,
    STEPS,
    WARMUP,
    by_hand,
    run,
    same,
)
from tests.harness import slow
from tests.reference import averaging


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


def copied_late(training):
    """Snapshots are read at the fence before the optimizer's next step."""
    plain.copy_late()


def test_a_step_waits_for_the_copy_of_the_last_snapshot(workers, tmp_path):
    for found in workers(2).run(run, str(tmp_path), {"weight_averaging": AVERAGING}, {}, twin=copied_late):
        averages = [weights for *_, weights in found["evaluations"][1::2]]
        for weights, steps in zip(averages, [(2, 4), (6, 8), (6, 8)], strict=True):
            assert same(weights, averaging.mean([found["weights"][step - 1] for step in steps])) == []


def written_where_a_writer_is(hooked, plain, iterations, marks):
    """TensorBoard and W&B have each evaluation under its own name, and without its mark Megatron-LM's."""
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
    ours = {"sequence length", "trained tokens"}
    assert [entry for entry in found["tensorboard"] if entry[0] not in ours] == scalars
    assert [entry for entry in found["wandb"] if not ours & entry[0].keys()] == logged
    assert expected["tensorboard"] == [entry for entry in scalars if "averaged" not in entry[0]]
    assert expected["wandb"] == [entry for entry in logged if "averaged" not in str(entry)]


REHEARSED = {**WARMUP, "preflight": True, "learning_rate": {"by": "tokens"}}


def of_adam(training):
    """Record how much room the preflight takes for Adam's state, and how much that has once there is one."""
    from megatron_patches.training_loop.preflight import adams_state

    setup, evaluate = training.setup_model_and_optimizer, training.evaluate_and_print_results
    kept = []

    def bytes_to_come():
        return sum(tensor.nbytes for tensor in adams_state(kept[0]))

    def set_up(*args, **kwargs):
        model, optimizer, scheduler = setup(*args, **kwargs)
        kept.append(optimizer)
        training.RECORD["room"].append(bytes_to_come())
        return model, optimizer, scheduler

    def with_states(*args, **kwargs):
        inner = [single.optimizer for single in kept[0].chained_optimizers]
        states = [state for optimizer in inner for state in optimizer.state.values()]
        found = sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))
        training.RECORD["state"].append((found, bytes_to_come()))
        return evaluate(*args, **kwargs)

    training.setup_model_and_optimizer, training.evaluate_and_print_results = set_up, with_states


@pytest.mark.parametrize("layout", [slow("tensor"), "pipeline", slow("data")])
def test_the_preflight_leaves_no_trace(workers, tmp_path, layout):
    """Passes at full length before the first short iteration, of a resumed run, too: everything else is as without."""
    options = {**LAYOUTS[layout], "dropout": 0.1, "save": str(tmp_path / "run"), "save_interval": 2, "train_iters": 5}
    sections = {"sequence_length_warmup": REHEARSED, "weight_averaging": AVERAGING, "completep": RECIPE}
    without = {**sections, "sequence_length_warmup": {**REHEARSED, "preflight": False}}
    micro_batches = 1 if layout == "data" else 2
    for resumed in (False, True):  # the stand-in's checkpoints have no random streams: a resumed run draws anew
        load = {**options, "load": options["save"], "ckpt_step": 2, "save": None} if resumed else options
        rehearsed = workers(2).run(run, str(tmp_path), sections, load, twin=of_adam)
        plain = workers(2).run(run, str(tmp_path), without, {**load, "save": None})
        for found, expected in zip(rehearsed, plain, strict=True):
            assert found["code"] == expected["code"] == 0
            trained = expected["train"]
            assert len({shape for shape, _ in trained}) == 4 - resumed and trained[0][0] != (2, FULL)
            assert found["train"] == [((2, FULL), trained[0][1])] * micro_batches + trained
            for name in ("losses", "lr", "tokens of the log", "eval", "operations"):
                assert found[name] == expected[name], name
            for one, other in zip(found["weights"], expected["weights"], strict=True):
                assert same(one, other) == []
            assert [e[:4] for e in found["evaluations"]] == [e[:4] for e in expected["evaluations"]]
            state, to_come = found["state"][0]
            assert found["room"] == [0 if resumed else state] and state > 0 == to_come
        said = "sequence length warmup: preflight: an iteration at 32 tokens fits"
        assert [said in found["out"] for found in (*rehearsed, *plain)] == [True, False, False, False]


def out_of_memory(training):
    """Megatron-LM's passes of more than 24 tokens fail, as they would on a GPU."""
    schedule = training.get_forward_backward_func

    def limited(*, seq_length, **settings):
        if seq_length > 24:
            raise torch.OutOfMemoryError("Tried to allocate 9 GiB")
        return schedule()(seq_length=seq_length, **settings)

    training.get_forward_backward_func = lambda: limited


def notes_of(*args):
    try:
        run(*args, twin=out_of_memory)
    except torch.OutOfMemoryError as error:
        return error.__notes__, sys.modules["megatron.training.training"].RECORD["losses"]
    return None


def test_an_out_of_memory_shows_before_the_first_iteration(workers, tmp_path):
    sections = {"sequence_length_warmup": REHEARSED}
    for notes, losses in workers(2).run(notes_of, str(tmp_path), sections, LAYOUTS["data"]):
        assert "a step at the full length of 32 tokens, does not fit" in notes[0] and "--micro-batch-size" in notes[0]
        assert losses == []


def test_what_the_preflight_could_not_put_back_leaves_it_out(workers, tmp_path):
    options = {**LAYOUTS["data"], "qk_clip": True, "train_iters": 1}
    ranks = workers(2).run(run, str(tmp_path), {"sequence_length_warmup": REHEARSED}, options)
    assert [found["code"] for found in ranks] == [0, 0]
    assert [shape for found in ranks for shape, _ in found["train"]] == [(2, 8)] * 2
    assert "preflight: none at 32 tokens, since --qk-clip keeps" in ranks[0]["out"]
    assert "--moe-routing-trace-path keeps" in preflight.left_out(SimpleNamespace(moe_routing_trace_path="x"))
    by_default = SimpleNamespace(fp8="hybrid", fp8_recipe="delayed"), SimpleNamespace(fp8=None, fp8_recipe="delayed")
    assert [preflight.left_out(options) is None for options in by_default] == [False, True]


def test_the_preflights_room_is_the_optimizers_own():
    """By the dtypes that a precision-aware Adam is told, whose masters are state; none where it cannot be known."""
    weight, gain = (torch.nn.Parameter(torch.zeros(10, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))

    def room(inner, **config):
        chain = [SimpleNamespace(optimizer=inner, config=SimpleNamespace(**config))]
        return sum(tensor.nbytes for tensor in preflight.adams_state(SimpleNamespace(chained_optimizers=chain)))

    groups = [{"params": [weight]}, {"params": [gain]}]
    inner = SimpleNamespace(param_groups=groups, state={})
    assert room(inner, optimizer="adam") == 2 * 80
    assert room(inner, optimizer="muon") == room(inner, optimizer="adam", optimizer_cpu_offload=True) == 0
    assert room(None, optimizer="adam") == 0
    dtypes = {"main_params_dtype": torch.float32, "exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.float32}
    aware = SimpleNamespace(param_groups=groups, state={}, master_weights=True, store_param_remainders=False)
    assert room(aware, optimizer="adam", **dtypes) == 2 * (20 + 40 + 40)
    aware.store_param_remainders = True
    assert room(aware, optimizer="adam", **dtypes) == (20 + 40 + 20) + (20 + 40 + 40)
    aware.master_weights = False  # Megatron keeps them itself
    assert room(aware, optimizer="adam", **dtypes) == 2 * (20 + 40)
    aware.state[weight] = {"exp_avg": weight}
    assert room(aware, optimizer="adam", **dtypes) == 20 + 40
    in_the_chain = SimpleNamespace(chained_optimizers=[], config=SimpleNamespace(optimizer="adam"))
    assert preflight.adams_state(SimpleNamespace(chained_optimizers=[in_the_chain])) == []


def test_the_preflight_leaves_nothing_for_the_log_and_for_later_checks():
    """Megatron-LM's sums are empty, whatever it calls them, and its spike checks have seen no loss of full length."""
    from megatron.core import rerun_state_machine
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    tracker = {"values": torch.ones(1), "loss_values": torch.ones(2), "reduce_group": None}
    before, MTPLossLoggingHelper.tracker = MTPLossLoggingHelper.tracker, tracker
    machine = rerun_state_machine.get_rerun_state_machine()
    options, config = SimpleNamespace(seq_length=8, mtp_num_layers=1), SimpleNamespace(timers="Megatron-LM's")
    try:
        with preflight.leaving_no_trace(options, {"seq_length": 32}, config):
            assert (options.seq_length, config.timers) == (32, None)
            for _ in range(2):
                machine.validate_result(
                    torch.tensor(float("nan")), rejection_func=torch.isnan, message="a loss", fatal=True
                )
                large = functools.partial(machine.is_unexpectedly_large, threshold=10, context="loss")
                machine.validate_result(torch.tensor(500.0), rejection_func=large, message="a loss", fatal=False)
    finally:
        MTPLossLoggingHelper.tracker = before
        rerun_state_machine.destroy_rerun_state_machine()
    assert (options.seq_length, config.timers) == (8, "Megatron-LM's") and "validate_result" not in vars(machine)
    assert machine.large_value_counts == machine.max_values == {}
    assert [name for name, value in tracker.items() if value is not None and value.any()] == []


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
    import megatron.core.models.gpt as models

    from ds_plugin.completep.config import CompletePConfig
    from megatron_patches.completep import finish, prepare
    from megatron_patches.completep.optimizer import build_optimizer

    section = CompletePConfig.model_validate({**RECIPE, "residual": "folded"})  # as it is if the JSON does not say
    model = models.GPTModel

    def build(*, config, transformer_layer_spec, **kwargs):
        config, transformer_layer_spec = prepare(config, transformer_layer_spec, section)
        built = model(config=config, transformer_layer_spec=transformer_layer_spec, **kwargs)
        finish(built, section)
        return built

    models.GPTModel = build
    training.get_megatron_optimizer = lambda config, chunks, config_overrides: build_optimizer(config, chunks, section)


@pytest.fixture(scope="module")
def saved(workers, tmp_path_factory):
    """A folder with a run of all three methods in it, and one of none; what both have recorded."""
    folder = tmp_path_factory.mktemp("saved")
    options = {**LAYOUTS["pipeline"], "save": str(folder / "run")}
    whole = workers(2).run(run, str(folder), ALL_THREE, options)
    short = {**LAYOUTS["pipeline"], "train_iters": 3, "save": str(folder / "plain"), "save_interval": 3}
    return folder, whole, workers(2).run(run, str(folder), {}, short)


def loading(folder, **changes):
    """Options that go on from the run's fourth iteration."""
    return {**LAYOUTS["pipeline"], "load": str(folder / "run"), "ckpt_step": 4, **changes}


def test_completep_is_the_recipe_applied_by_its_own_functions(workers, tmp_path, saved):
    short = {**LAYOUTS["pipeline"], "train_iters": 3}
    alone = workers(2).run(run, str(tmp_path), {"completep": RECIPE}, short)
    explicit = workers(2).run(run, str(tmp_path), {}, short, twin=explicit_completep)
    assert alone[1]["losses"] == explicit[1]["losses"] != saved[2][1]["losses"]
    assert same(alone[0]["weights"][-1], explicit[0]["weights"][-1]) == []


def test_a_resumed_run_is_the_uninterrupted_one(workers, saved):
    """All three methods, learning rates by tokens; stopped after four iterations and resumed, nothing is lost."""
    folder, whole, _ = saved
    resumed = workers(2).run(run, str(folder), ALL_THREE, loading(folder, save=str(folder / "resumed")))
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
    lines = [[line for line in run[-1]["printed"] if "consumed samples" in line] for run in (whole, resumed)]
    assert lines[1] == lines[0][4:] and "loss ratio: " in lines[1][0]  # of the third iteration's report


LONGER = {**ALL_THREE, "sequence_length_warmup": {**BY_TOKENS, "duration": {"tokens": 400}}}
WIDER = {**ALL_THREE, "completep": {**RECIPE, "base_width": 4}}
FORWARD = {**ALL_THREE, "completep": {**RECIPE, "residual": "forward"}}
AVERAGING_ALONE = {"weight_averaging": AVERAGING}
OURS, STOCK = {"finetune": True, "train_iters": 1}, {"finetune": True, "train_iters": 1, "ckpt_step": None}


@pytest.mark.parametrize(
    ("changed", "given", "words"),
    [  # weights go where the forward pass is theirs
        slow(LONGER, {}, "give the same section"),
        slow(WIDER, {}, "another completep: base_width 8 there, 4 here;"),
        (FORWARD, {}, 'another completep: residual "folded" there, "forward" here; give the same section'),
        (FORWARD, OURS, "residual branches x 1 there, x 0.5 here, logits x 1 there, x 0.5 here; give"),
        slow(FORWARD, STOCK, "weights of a run without this plugin"),
        slow(AVERAGING_ALONE, OURS, None),
        ({**AVERAGING_ALONE, "completep": RECIPE}, STOCK, None),
        slow(WIDER, OURS, None),
    ],
)
def test_what_a_checkpoint_is_resumed_with(workers, saved, changed, given, words):
    folder, *_ = saved
    from_stock = {"load": str(folder / "plain")} if given is STOCK else {}
    ranks = workers(2).run(run, str(folder), changed, loading(folder, **given, **from_stock))
    if words is not None:
        refused(ranks, words)
    assert words is not None or [found["code"] for found in ranks] == [0, 0], ranks[0]["said"]


def test_a_checkpoint_that_is_not_whole_is_refused(workers, saved, tmp_path):
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    load, folder = loading(tmp_path), tmp_path / "run" / "ds_plugin" / "iter_0000004"
    tracker = tmp_path / "run" / "latest_checkpointed_iteration.txt"
    tracker.rename(tmp_path / "tracker")  # Megatron-LM does without, where --ckpt-step is given
    refused(workers(2).run(run, str(tmp_path), FORWARD, load), 'residual "folded" there, "forward" here')
    (tmp_path / "tracker").rename(tracker)
    (folder / "weight_averaging_rank_00001.safetensors").unlink()
    refused(workers(2).run(run, str(tmp_path), ALL_THREE, load), "and is missing now")
    manifest = folder / "ds_plugin.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 1}))
    refused(workers(2).run(run, str(tmp_path), ALL_THREE, load), "ds_plugin.json has format 1, this version reads 4")
    manifest.unlink()
    refused(workers(2).run(run, str(tmp_path), ALL_THREE, load), "a checkpoint of a run without this plugin")


def test_a_run_of_none_is_gone_on_with_at_full_length(workers, saved):
    folder, *_ = saved
    of_another = {**LAYOUTS["pipeline"], "load": str(folder / "plain"), "train_iters": 4}
    sections = {"sequence_length_warmup": BY_TOKENS, "weight_averaging": AVERAGING}
    ranks = workers(2).run(run, str(folder), sections, of_another)
    assert "iterations at full length" in ranks[0]["warned"].replace("\n", " ")
    for found in ranks:
        assert found["code"] == 0
        assert {shape for shape, _ in found["train"]} == {(2, FULL)}  # 3 x 4 x 32 tokens are beyond the warmup's 300


def test_the_average_is_saved_beside_each_checkpoint(workers, tmp_path):
    """The weights alone, by Megatron-LM's function; nothing else of the run changes, and no run resumes from them."""
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
    assert "could be compared" not in as_by_hand[0]["warned"]  # it is sealed
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
    """One rank has said so, and none has trained."""
    for rank, found in enumerate(ranks):
        assert found["code"] == 2 and "train" not in found
        assert (words in found["said"]) == ("error: " in found["said"]) == (rank == 0), found["said"]


def test_data_that_cannot_be_cut_are_refused_on_the_ranks_that_read_none_too(workers, tmp_path):
    options = {**LAYOUTS["tensor"], "unknown_entries": ["cu_seqlens"]}
    refused(workers(2).run(run, str(tmp_path), {"sequence_length_warmup": WARMUP}, options), "'cu_seqlens'")
    refused(
        workers(2).run(
            run, str(tmp_path), {"sequence_length_warmup": WARMUP}, {**LAYOUTS["tensor"], "full_length": 24}
        ),
        "24 positions, 32 are to be trained",
    )


LOADED = {  # what is asked for, beside --load run, and the trackers' texts: what Megatron-LM takes of which folder
    "nothing": ({"load": None}, {"run": "8"}, None),
    "the last": ({}, {"run": "8"}, ("run", 8, False)),
    "an earlier": ({"ckpt_step": 4}, {"run": "8"}, ("run", 4, False)),
    "an earlier, without a tracker": ({"ckpt_step": 4}, {}, ("run", 4, False)),
    "none yet": ({}, {}, None),
    "damaged": ({}, {"run": "eight"}, None),  # Megatron-LM ends on it
    "weights": ({"finetune": True}, {"run": "8"}, ("run", 8, True)),
    "frozen": ({"freeze_all_layers": True}, {"run": "8"}, ("run", 8, True)),
    "a release": ({"ckpt_step": 4}, {"run": "release"}, ("run", 0, True)),
    "begun from another": ({"pretrained_checkpoint": "base"}, {"base": "8"}, ("base", 8, True)),
    "begun from another, going on": ({"pretrained_checkpoint": "base"}, {"base": "8", "run": "3"}, ("run", 3, False)),
    "only another": ({"pretrained_checkpoint": "base", "load": None}, {"base": "8"}, ("base", 8, True)),
}


@pytest.mark.parametrize("case", LOADED)
def test_what_megatron_will_load(tmp_path, case):
    from megatron_patches.training_loop import state

    changes, trackers, expected = LOADED[case]
    for name, text in trackers.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / state.TRACKER).write_text(f"{text}\n")
    given = {"load": "run", "finetune": False, "ckpt_step": None, "pretrained_checkpoint": None, **changes}
    for name in ("load", "pretrained_checkpoint"):
        given[name] = given[name] and str(tmp_path / given[name])
    found = state.Methods(PluginConfig(), lambda: SimpleNamespace(**given)).to_load()
    assert found == (expected and (tmp_path / expected[0], *expected[1:]))


# -- refusals ----------------------------------------------------------------------------------------------------------
REFUSED: dict[str, tuple[str, dict, dict]] = {
    # section, changes of it, options: words of the message
    "--rampup-batch-size": ("sequence_length_warmup", {}, {"rampup_batch_size": [2, 2, 8]}),
    "--cuda-graph-impl local": ("sequence_length_warmup", {}, {"cuda_graph_impl": "local"}),
    "--tp-comm-overlap": ("sequence_length_warmup", {}, {"tp_comm_overlap": True}),
    "--sft": ("sequence_length_warmup", {}, {"sft": True}),
    "is not --seq-length 64": ("sequence_length_warmup", {}, {"seq_length": 64}),
    '"mask" and --context-parallel-size 2': ("sequence_length_warmup", {"mode": "mask"}, {"context_parallel_size": 2}),
    "not divisible by 24": ("sequence_length_warmup", {}, {"context_parallel_size": 3}),
    "--dataloader-type external": ("sequence_length_warmup", {"mode": "carry"}, {"dataloader_type": "external"}),
    "--iterations-to-skip [3]": ("sequence_length_warmup", {"mode": "carry"}, {"iterations_to_skip": [3]}),
    "--exp-avg-sq-dtype fp8": ("sequence_length_warmup", {"variance": True}, {"exp_avg_sq_dtype": "fp8"}),
    "--use-megatron-fsdp": ("weight_averaging", {}, {"use_megatron_fsdp": True}),
    "--non-persistent-save-interval 2": ("weight_averaging", {}, {"non_persistent_save_interval": 2}),
    "restart: --use-precision-aware-optimizer True": (
        "weight_averaging",
        {"restart": {"patience": 1}},
        {"use_precision_aware_optimizer": True},
    ),
    "save_average: --async-save True": ("weight_averaging", {"save_average": True}, {"async_save": True}),
    "--use-mup": ("completep", {}, {"use_mup": True}),
    "--decoupled-lr 0.1": ("completep", {}, {"decoupled_lr": 0.1}),
    "--moe-latent-size 4": ("completep", {}, {"moe_latent_size": 4}),
}
SECTIONS = {"sequence_length_warmup": WARMUP, "weight_averaging": AVERAGING, "completep": RECIPE}


def refusals():
    """What each rank is told when only the last of them has the option, and whether a model was built."""
    from megatron_patches.training_loop.loop import Loop

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
    from megatron_patches.training_loop import script

    sys.path.insert(0, str(FOLDER))
    script.prepare_megatron(SCRIPT)
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
    from megatron_patches.training_loop import script

    sys.path.insert(0, str(FOLDER))
    script.prepare_megatron(SCRIPT)
    from megatron.training import training

    training.num_floating_point_operations = lambda *args: args
    script.install(PluginConfig.from_dict({"sequence_length_warmup": WARMUP}))
    wrapper = training.num_floating_point_operations
    megatron_patches.revert()
    return wrapper is training.num_floating_point_operations, wrapper(1, 2)


def test_a_wrapper_kept_by_another_module_is_megatrons_after_the_undoing(workers):
    assert workers(1).run(kept) == [(False, (1, 2))]


def test_a_missing_name_is_one_error_and_nothing_is_patched(workers):
    [(told, untouched, count, again, other)] = workers(1).run(lacking, "train_step")
    assert "has no train_step" in told and importlib.metadata.version("megatron-core") in told and str(FOLDER) in told
    assert untouched and count == again == 12 + 7 and "one configuration holds in a process" in other
