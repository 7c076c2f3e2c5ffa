"""The methods in Megatron-Bridge's ``pretrain``, on CPU processes; where megatron-bridge is installed (Python 3.12)."""

import importlib.util
import json
import re

import pytest

from tests import harness

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ITERATIONS, SAVED = 40, 12
SECTIONS = {
    "sequence_length_warmup": {
        "enabled": True,
        "start_length": 8,
        "end_length": 32,
        "schedule": "linear",
        "duration": {"steps": 20},
        "multiple_of": 8,
        "learning_rate": {"by": "tokens"},
    },
    "weight_averaging": {"enabled": True, "mode": "sliding", "window": 4, "interval": 2},
    "completep": {"enabled": True, "base_width": 16, "base_depth": 2},
}
WARMUP = SECTIONS["sequence_length_warmup"]
VIRTUAL = {
    "model.virtual_pipeline_model_parallel_size": 2,
    "model.overlap_p2p_comm": True,  # gloo would mix up batched sends in both directions
    "model.batch_p2p_comm": False,
}
LAYOUTS = {
    "dp2": {},
    "tp2": {"tp": 2},
    "sequence parallel": {"tp": 2, "model.sequence_parallel": True},
    "pp2": {"pp": 2},
    "virtual stages": {"pp": 2, **VIRTUAL},
}


def has_bridge():
    try:
        return importlib.util.find_spec("megatron.bridge") is not None
    except ImportError:
        return False


def test_megatron_bridge_is_tested_or_its_absence_is_said():
    if not has_bridge():
        pytest.skip("megatron-bridge is not installed: docs/bridge.md says how, for Python 3.12")


needs_bridge = pytest.mark.skipif(not has_bridge(), reason="megatron-bridge is not installed")


class Runs:
    """Runs of `tests.bridge_training`, each made once."""

    def __init__(self, folder):
        self.folder, self._done = folder, {}

    def started(self, name, ranks=1, script=("--module", "tests.bridge_training"), environment=None, **settings):
        told = {"folder": str(self.folder / name), "iterations": ITERATIONS, "out": str(self.folder / f"{name}.json")}
        given = ["--no_local_rank", *script]
        return harness.Launched([*given, json.dumps(told | settings)], ranks, environment)

    def __call__(self, name, ranks=1, **settings):
        """The run's losses by iteration, and its output; of the averages {(iteration, steps): loss as printed}."""
        if name not in self._done:
            with self.started(name, ranks, **settings) as launched:
                done = launched.wait(600)
            assert done.returncode == 0, done.stdout[-4000:]
            self._done[name] = Run(json.loads((self.folder / f"{name}.json").read_text()), done.stdout)
        return self._done[name]


class Run:
    def __init__(self, losses, output):
        self.train = {int(at): float.fromhex(loss) for at, loss in losses["train"].items()}
        self.valid = {int(at): float.fromhex(found[0]) for at, found in losses["valid"].items()}
        self.exported = float.fromhex(losses.get("exported", "0x0p0"))
        found = re.findall(
            r"validation loss at iteration (\d+) \| average of steps (.*?) \| lm loss value: (\S+)", output
        )
        self.averaged = {(int(iteration), steps): float(loss) for iteration, steps, loss in found}
        self.lengths = [int(length) for length in re.findall(r"iteration +\d+ \| sequence length: +(\d+)", output)]
        self.output = output


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("bridge"))


def with_all(**warmup):
    return {**SECTIONS, "sequence_length_warmup": {**WARMUP, **warmup}}


@needs_bridge
def test_all_three_methods_train(runs):
    run = runs("all", sections=SECTIONS)
    assert run.lengths[0] == 8 and run.lengths[-1] == 32 and sorted(run.lengths) == run.lengths
    assert len(run.train) == ITERATIONS and run.train[ITERATIONS] < 0.6 * run.train[1]
    assert list(run.averaged)[:2] == [(5, "2 to 4"), (10, "4 to 10")]
    ended = run.averaged[ITERATIONS, f"{ITERATIONS - 6} to {ITERATIONS}"]
    assert ended != pytest.approx(run.valid[ITERATIONS], abs=1e-3) and ended < run.train[1]


@needs_bridge
def test_tensorboard_has_what_the_methods_say(runs):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = str(runs.folder / "board")
    run = runs("tensorboard", sections=SECTIONS, **{"logger.tensorboard_dir": folder})
    events = accumulator.EventAccumulator(folder).Reload()

    def written(name):
        return [(event.step, round(event.value, 5)) for event in events.Scalars(name)]

    assert written("sequence length") == list(enumerate(run.lengths, 1))
    last = [loss for (at, _), loss in sorted(run.averaged.items())]
    assert [value for _, value in written("lm loss validation, averaged")][: len(last)] == pytest.approx(last, abs=2e-5)
    assert run.train == runs("all", sections=SECTIONS).train


@needs_bridge
@pytest.mark.parametrize(("name", "layout"), LAYOUTS.items())
def test_layouts_agree(runs, name, layout):
    one, two = runs("all", sections=SECTIONS), runs(name, ranks=2, sections=SECTIONS, **layout)
    assert two.lengths == one.lengths
    for kind in ("train", "valid", "averaged"):
        assert getattr(two, kind) == pytest.approx(getattr(one, kind), abs=1e-5, rel=0), kind


@needs_bridge
@pytest.mark.parametrize("mode", ["truncate", "carry"])
def test_a_killed_run_goes_on_as_the_uninterrupted(runs, mode):
    name, settings = f"whole {mode}", {"sections": with_all(mode=mode), "checkpoint.save_interval": SAVED}
    whole = runs(name, ranks=2, **settings)
    killed = f"killed {mode}"
    with runs.started(killed, ranks=2, **settings) as launched:
        launched.wait_for(f"iteration       {SAVED + 3}/", 600)
    resumed = runs(killed, ranks=2, **settings)
    assert min(resumed.train) == SAVED + 1
    for kind in ("train", "valid", "averaged"):
        found, expected = getattr(resumed, kind), getattr(whole, kind)
        assert len(found) >= 6 and {at: expected[at] for at in found} == found, kind


@needs_bridge
def test_methods_that_are_off_change_no_bit(runs):
    plain, off = runs("plain"), runs("off", sections={})
    averaging = runs("averaging", sections={"weight_averaging": SECTIONS["weight_averaging"]})
    assert plain.train == off.train == averaging.train and plain.valid == off.valid == averaging.valid
    assert averaging.averaged and not off.averaged


@needs_bridge
@pytest.mark.parametrize(
    ("name", "warmup"),
    [
        ("carry", {"mode": "carry", "interleave": 2}),
        ("mask", {"mode": "mask"}),
        ("constant", {"tokens_per_step": "constant"}),
        ("adaptive", {"pacing": "adaptive", "adaptive": {"loss_ratio": 1.005}}),
    ],
)
def test_every_mode_agrees_on_one_and_two_ranks(runs, name, warmup):
    one, two = (runs(f"{name} {n}", ranks=n, sections=with_all(**warmup), iterations=24) for n in (1, 2))
    other = runs("all", sections=SECTIONS).train
    assert two.lengths == one.lengths and two.train == pytest.approx(one.train, abs=1e-5, rel=0)
    assert name == "adaptive" or any(abs(one.train[at] - other[at]) > 1e-3 for at in one.train)


@needs_bridge
def test_the_full_length_is_rehearsed_and_leaves_no_trace(runs):
    rehearsed, not_ = runs("all", sections=SECTIONS), runs("not rehearsed", sections=with_all(preflight=False))
    assert "an iteration at 32 tokens fits" in rehearsed.output and "tokens fits" not in not_.output
    assert rehearsed.train == not_.train


@needs_bridge
def test_a_script_without_a_line_of_ours_is_run_with_the_methods(runs):
    (runs.folder / "sitecustomize.py").write_text("from tests import bridge_on_cpu\n\nbridge_on_cpu.enable()\n")
    (runs.folder / "methods.json").write_text(json.dumps(SECTIONS))
    script = harness.ROOT / "tests" / "bridge_training.py"
    command = ["--module", "ds_plugin", "run", "--config", runs.folder / "methods.json", script]
    environment = {"PYTHONPATH": f"{runs.folder}:{harness.ROOT}"}
    run = runs("run", script=command, environment=environment)
    assert run.train == runs("all", sections=SECTIONS).train
    refused = {"script": command, "environment": environment, "dataset.dataloader_type": "batch"}
    with runs.started("run refused", ranks=2, **refused) as launched:
        done = launched.wait(300)
    assert done.returncode != 0 and done.stdout.count("error: sequence_length_warmup: cfg.dataset") == 1
    assert "ds_plugin.core.errors.ConfigError" not in done.stdout


REFUSED = {
    "finetuning": ({"dataset.dataloader_type": "batch"}, "cfg.dataset.dataloader_type is 'batch'"),
    "graphs": ({"model.cuda_graph_impl": "local"}, "cfg.model.cuda_graph_impl local"),
    "local": ({"checkpoint.non_persistent_ckpt_type": "local"}, "cfg.checkpoint.non_persistent_ckpt_type is 'local'"),
    "trained": ({"checkpoint.pretrained_checkpoint": "there"}, "cfg.checkpoint.pretrained_checkpoint is 'there'"),
    "groups": ({"dist.use_decentralized_pg": True}, "cfg.dist.use_decentralized_pg is True"),
    "length": ({"model.seq_length": 64, "dataset.seq_length": 64}, "sequence_length_warmup.end_length: 32 is not"),
}


@needs_bridge
@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused_before_the_model_is_built(runs, name):
    changes, said = REFUSED[name]
    with runs.started(f"refused {name}", ranks=2, sections=SECTIONS, **changes) as launched:
        done = launched.wait(300)
    assert done.returncode != 0 and said in done.stdout and "number of parameters" not in done.stdout


@needs_bridge
@pytest.mark.parametrize("tp", [1, 2])
def test_an_average_is_a_hugging_face_model(runs, tp):
    run = runs(f"export {tp}", ranks=tp, tp=tp, sections=SECTIONS, export=str(runs.folder / f"exported {tp}"))
    line = r"validation loss at iteration 40 on test set \| average of steps .*? \| lm loss value: (\S+)"
    assert run.exported == pytest.approx(float(re.search(line, run.output)[1]), abs=2e-5)


@needs_bridge
def test_a_saved_average_is_a_checkpoint_of_its_own(runs):
    sections = {**SECTIONS, "weight_averaging": {**SECTIONS["weight_averaging"], "save_average": True}}
    saved = runs("saved", sections=sections, **{"checkpoint.save_interval": 20})
    averaged = str(runs.folder / "saved" / "averaged")
    only = {"checkpoint.load": averaged, "checkpoint.finetune": True, "validation.skip_train": True}
    again = runs("from the average", sections={"completep": SECTIONS["completep"]}, **only)
    line = r"on test set( \| average of steps 34 to 40)? \| lm loss value: (\S+)"
    (_, raw), (_, average) = re.findall(line, saved.output)
    assert raw != average and re.findall(line, again.output) == [("", average)]
    with runs.started("resumed from it", sections=SECTIONS, **{"checkpoint.load": averaged}) as launched:
        done = launched.wait(300)
    assert done.returncode != 0 and "is the average of steps 34 to 40, which has no optimizer state" in done.stdout
