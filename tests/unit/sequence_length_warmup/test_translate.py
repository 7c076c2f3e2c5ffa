"""DeepSpeed's own curricula: what each becomes, step by step the same lengths, and every refusal by name."""

import copy
import json
import logging
import subprocess
import sys

import pytest
from deepspeed.runtime.data_pipeline.config import get_data_efficiency_config
from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler

from ds_plugin.cli.main import main
from ds_plugin.config import PluginConfig, say_once, split_config
from ds_plugin.core.errors import ConfigError
from ds_plugin.sequence_length_warmup.schedule import LengthSchedule
from ds_plugin.sequence_length_warmup.translate import translate

OURS = {"enabled": True, "end_length": 256, "duration": {"steps": 150}}
DEEPSPEEDS = {"train_batch_size": 8, "zero_optimization": {"stage": 1}}


def linear(low=8, high=1024, total=40000, step=8, **more):
    return {
        "min_difficulty": low,
        "max_difficulty": high,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": total, "difficulty_step": step},
        **more,
    }


def root(low, high, total, step, degree):
    schedule = {"total_curriculum_step": total, "difficulty_step": step, "root_degree": degree}
    return linear(low, high, schedule_type="fixed_root", schedule_config=schedule)


def discrete(low, high, lengths, last):
    schedule = {"difficulty": lengths, "max_step": last}
    return linear(low, high, schedule_type="fixed_discrete", schedule_config=schedule)


def legacy(schedule, **more):
    return {"curriculum_learning": {"enabled": True, "curriculum_type": "seqlen", **schedule, **more}}


def without(section, *keys):
    return {key: value for key, value in section.items() if key not in keys}


METRIC = {
    "index_to_sample_path": "dummy",
    "index_to_metric_path": "dummy",
    "difficulty_type": "value",
    "clustering_type": "single_cluster",
}
RARITY = {**METRIC, "difficulty_type": "percentile", **root(1, 100, 110000, 1, 2)}


def metrics(name="seqlen", schedule=None, *, others=None, block=None, sampling=None, efficiency=None, **more):
    """DeepSpeed's data_efficiency with one metric; the switches are on unless told otherwise."""
    metric = {**METRIC, **(schedule or linear()), **more}
    return {
        "data_efficiency": {
            "enabled": True,
            "seed": 1234,
            "data_sampling": {
                "enabled": True,
                "num_workers": 2,
                "curriculum_learning": {
                    "enabled": True,
                    "data_cluster_path": "clusters",
                    "curriculum_metrics": {name: metric, **(others or {})},
                    **(block or {}),
                },
                **(sampling or {}),
            },
            **(efficiency or {}),
        }
    }


PATH = "data_efficiency.data_sampling.curriculum_learning"
SEQLEN = f"{PATH}.curriculum_metrics.seqlen"

LINEAR = {
    "enabled": True, "start_length": 8, "end_length": 1024, "schedule": "linear", "duration": {"steps": 40000},
    "multiple_of": 8,
}  # fmt: skip

TRANSLATED = [
    # the example of DeepSpeed's documentation
    (legacy(linear()), LINEAR, ["curriculum_learning is read", "no argument curriculum_seqlen"]),
    (metrics("seqlen"), LINEAR, [SEQLEN, "sampler is off"]),
    (metrics("seqlen_truncate"), LINEAR, [f"{PATH}.curriculum_metrics.seqlen_truncate"]),
    (metrics("seqlen_reshape"), {**LINEAR, "mode": "carry"}, ["reshape", "carry trains them in later steps"]),
    (metrics(clustering_type="schedule_based"), LINEAR, ["sampler is off"]),
    (legacy(root(64, 2048, 1000, 16, 2)), {
        "enabled": True, "start_length": 64, "end_length": 2048, "schedule": "root", "root_degree": 2,
        "duration": {"steps": 1000}, "multiple_of": 16,
    }, ["root"]),
    (legacy(discrete(64, 1024, [64, 256, 1024], [1000, 5000])), {
        "enabled": True, "start_length": 64, "end_length": 1024, "schedule": "discrete", "lengths": [64, 256, 1024],
        "boundaries": [1000, 5000], "duration": {"steps": 5000}, "multiple_of": 8,
    }, ["discrete"]),
    # the difficulties alone count, and 12, 20, 100 have 4 in common with 8
    (legacy(discrete(1, 100, [12, 20, 100], [1, 2])), {
        "enabled": True, "start_length": 12, "end_length": 100, "schedule": "discrete", "lengths": [12, 20, 100],
        "boundaries": [1, 2], "duration": {"steps": 2}, "multiple_of": 4,
    }, []),
    # 250 = 31 * 8 + 2: the largest multiple that still divides it
    (legacy(linear(8, 250, 150, 8)), {**LINEAR, "end_length": 250, "duration": {"steps": 150}, "multiple_of": 2},
     ['"multiple_of": 2']),
    (legacy(linear(total=4e4)), LINEAR, []),
    (legacy(linear(schedule_config=root(8, 1024, 40000, 8, 2)["schedule_config"])), LINEAR, []),
]  # fmt: skip


@pytest.mark.parametrize(("old", "section", "said"), TRANSLATED)
def test_what_each_becomes(old, section, said):
    given = {**DEEPSPEEDS, **old}
    before = copy.deepcopy(given)
    new, notes = translate(given)
    assert given == before
    assert new["sequence_length_warmup"] == section
    assert len(notes) == 1 and "\n" not in notes[0] and all(part in notes[0] for part in said), notes
    assert without(new, "sequence_length_warmup", "data_efficiency") == DEEPSPEEDS
    assert PluginConfig.from_dict(new).sequence_length_warmup is not None
    assert translate(new) == (new, [])


def test_deepspeed_keeps_the_rest_of_its_section():
    routing = {"enabled": True, "random_ltd": {"enabled": True, "total_layer_num": 24}}
    old = metrics(efficiency={"data_routing": routing}, sampling={"num_epochs": 3})
    rest, plugin = split_config({**DEEPSPEEDS, **old})
    assert rest["data_efficiency"] == {
        "enabled": True,
        "seed": 1234,
        "data_sampling": {"enabled": True, "num_workers": 2, "num_epochs": 3},
        "data_routing": routing,
    }
    assert plugin.sequence_length_warmup.end_length == 1024
    read = get_data_efficiency_config(rest)
    assert read["data_sampling"]["curriculum_learning"]["enabled"] is False
    assert read["data_routing"]["random_ltd"]["enabled"] is True


@pytest.mark.parametrize("off", [None, {}, {"enabled": False}, {**linear(), "enabled": False}])
def test_the_removed_section_is_dropped_when_off(off):
    new, notes = translate({**DEEPSPEEDS, "curriculum_learning": off})
    assert new == DEEPSPEEDS and len(notes) == 1 and "curriculum_learning is off" in notes[0]
    beside = {**DEEPSPEEDS, "sequence_length_warmup": OURS}
    assert translate({**beside, "curriculum_learning": off})[0] == beside


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"sequence_length_warmup": OURS},
        {"data_efficiency": None},
        {"data_efficiency": {"enabled": True, "data_sampling": None}},
        metrics(block={"enabled": False}),
        {"sequence_length_warmup": OURS, **metrics(block={"enabled": False})},
        metrics("vocabularyrarity", RARITY),  # chooses samples; their length is no affair of it
        {"sequence_length_warmup": {**OURS, "enabled": False}, **metrics("vocabularyrarity", RARITY)},
        {"data_efficiency": {"data_sampling": {"dynamic_batching": {"enabled": True, "max_tokens": 100}}}},
    ],
)
def test_nothing_to_translate(config):
    assert translate(config) == (config, [])


def scheduler(old):
    section = PluginConfig.from_dict(translate(legacy(old))[0]).sequence_length_warmup
    return LengthSchedule(section)


PARITY = [
    # low, high, total steps, difficulty_step, root degree
    (8, 1024, 15000, 8, 1),  # Megatron-DeepSpeed's own recipes
    (80, 2048, 11000, 8, 1),
    (64, 1024, 4500, 8, 1),
    (8, 64, 7, 8, 1),
    (8, 128, 60, 16, 1),  # a start below the step: 16, not 0
    (20, 64, 44, 8, 1),  # a start between two multiples
    (8, 64, 2, 8, 1),  # fewer steps than increments
    (64, 64, 10, 8, 1),
    (1, 23, 66, 1, 1),  # step 45 is exactly 16, and 15 in floats
    (8, 1024, 1000, 8, 2),
    (80, 2048, 1100, 8, 2),
    (8, 512, 729, 8, 3),
    (64, 1088, 4096, 64, 4),
    (8, 128, 60, 8, 1_000),  # nearly a jump
    (1, 18, 289, 1, 2),  # step 9 is exactly 4, and 3 in floats
    (1, 23, 10648, 1, 3),
]


@pytest.mark.parametrize(("low", "high", "total", "step", "degree"), PARITY)
def test_every_step_has_deepspeeds_length(low, high, total, step, degree):
    old = root(low, high, total, step, degree) if degree > 1 else linear(low, high, total, step)
    ours, theirs = scheduler(old), CurriculumScheduler(old)
    for position in range(1, total + 20):
        mine, deepspeeds = ours.length_at(position), theirs.get_difficulty(position)
        if mine != deepspeeds:
            # DeepSpeed computes in floats and may stay one multiple below where the exact value is just a multiple;
            # of these schedules only those with difficulty_step 1 do.
            exact = (mine - low) ** degree * total == (high - low) ** degree * position
            assert exact and mine - deepspeeds == step == 1, (position, mine, deepspeeds)


def test_floats_are_why_they_may_differ():
    for old, position, mine, deepspeeds in [
        (linear(1, 23, 66, 1), 45, 16, 15),  # 1 + 22 * 45 / 66 = 16
        (root(1, 18, 289, 1, 2), 9, 4, 3),  # 1 + 17 * sqrt(9 / 289) = 4
    ]:
        assert scheduler(old).length_at(position) == mine
        assert CurriculumScheduler(old).get_difficulty(position) == deepspeeds


@pytest.mark.parametrize(
    ("low", "high", "lengths", "last"),
    [(64, 1024, [64, 256, 1024], [10, 50]), (1, 5, [1, 2, 3, 4, 5], [2, 4, 6, 8]), (1, 100, [12, 20, 100], [1, 2])],
)
def test_discrete_steps_are_deepspeeds(low, high, lengths, last):
    old = discrete(low, high, lengths, last)
    ours, theirs = scheduler(old), CurriculumScheduler(old)
    positions = range(1, last[-1] + 10)
    assert [ours.length_at(t) for t in positions] == [theirs.get_difficulty(t) for t in positions]


@pytest.mark.parametrize("old", [linear(8, 250, 150, 8), linear(5, 2047, 3000, 8), root(20, 22, 50, 8, 2)])
def test_a_full_length_that_the_step_does_not_divide(old):
    """Finer strides: less than one difficulty_step from DeepSpeed's at every step, and the same full length."""
    ours, theirs = scheduler(old), CurriculumScheduler(old)
    total = old["schedule_config"]["total_curriculum_step"]
    for position in range(1, 3 * total):
        assert abs(ours.length_at(position) - theirs.get_difficulty(position)) < 8
    assert ours.length_at(total) == ours.length_at(3 * total) == theirs.get_difficulty(3 * total)


REFUSED = [
    # config, what the one message must hold: the key, the value, the remedy
    ({"curriculum_learning": True}, ['"curriculum_learning" must be a JSON object', "got True"]),
    (legacy(linear(), enabled="true"), ["curriculum_learning.enabled", "boolean, got 'true'"]),
    (legacy({}), ["curriculum_learning.min_difficulty: missing", "e.g. 8", "sequence_length_warmup"]),
    ({"curriculum_learning": {"enabled": True, **linear()}}, ["curriculum_type: missing", '"seqlen"']),
    (legacy(linear(), curriculum_type="rarity"), ["curriculum_learning.curriculum_type", "'seqlen', got 'rarity'"]),
    (legacy(linear(), min_dificulty=8), ["curriculum_learning.min_dificulty", "8", '"min_difficulty"']),
    (legacy(linear(low=0)), ["curriculum_learning.min_difficulty", "greater than or equal to 1, got 0"]),
    (legacy(linear(low="8")), ["curriculum_learning.min_difficulty", "integer", "'8'"]),
    (legacy(linear(low=2048)), ["curriculum_learning is read", "start_length: 2048", "at most 1024"]),
    (legacy(linear(high=1e3 + 0.5)), ["curriculum_learning.max_difficulty", "1000.5"]),
    (legacy(without(linear(), "max_difficulty")), ["curriculum_learning.max_difficulty: missing", "e.g. 1024"]),
    (legacy(without(linear(), "schedule_type")), ["curriculum_learning.schedule_type: missing", '"fixed_linear"']),
    (legacy(linear(schedule_type="linear")), ["curriculum_learning.schedule_type", "'fixed_linear'", "got 'linear'"]),
    (legacy(linear(schedule_type="custom")), ["schedule_type", "got 'custom'", "package.module:function"]),
    (legacy(without(linear(), "schedule_config")), ["schedule_config.total_curriculum_step: missing", "e.g. 1000"]),
    (legacy(linear(schedule_config=[])), ["curriculum_learning.schedule_config", "[]"]),
    (legacy(linear(total=0)), ["schedule_config.total_curriculum_step", "got 0"]),
    (legacy(linear(step=0)), ["schedule_config.difficulty_step", "got 0"]),
    (legacy(root(8, 64, 9, 8, 1.5)), ["schedule_config.root_degree", "1.5"]),
    (legacy(linear(schedule_type="fixed_root")), ["schedule_config.root_degree: missing", "e.g. 2"]),
    (legacy(linear(schedule_config={"max_step": [5]})), ["schedule_config.max_step: unknown key", "[5]"]),
    (legacy(discrete(8, 64, [8, 64], [5, 9])), ["boundaries: [5, 9]", "one less"]),
    (legacy(discrete(8, 64, [64], [])), ["schedule_config.difficulty", "at least 2", "[64]"]),
    (legacy(discrete(8, 64, [8, 64, 32], [5, 9])), ["lengths: [8, 64, 32]", "in order"]),
    (legacy(discrete(8, 64, [8, 16, 64], [9, 9])), ["boundaries: [9, 9]", "in order"]),
    (legacy(discrete(8, 128, [8, 64], [5])), ["curriculum_learning is read", "end_length: 128", "write 64"]),
    (legacy(discrete(16, 64, [8, 64], [5])), ["curriculum_learning is read", "start_length: 16", "write 8"]),
    (metrics(difficulty_type="percentile"), [f"{SEQLEN}.difficulty_type", "'value', got 'percentile'"]),
    (metrics(clustering=1), [f"{SEQLEN}.clustering: unknown key", '"clustering_type"']),
    (metrics(schedule=linear(schedule_type="custom")), [f"{SEQLEN}.schedule_type", "got 'custom'", "module:function"]),
    (metrics(block={"curriculum_metrics": {"seqlen": 8}}), [SEQLEN, "JSON object", "8"]),
    (metrics(others={"vocabularyrarity": RARITY}), ["curriculum_metrics: 'vocabularyrarity' beside", "remove"]),
    (metrics(others={"seqlen_reshape": linear()}), ["curriculum_metrics: 'seqlen_reshape' beside 'seqlen'", "remove"]),
    # both set the length
    ({"sequence_length_warmup": OURS, **legacy(linear())}, ["curriculum_learning", "true", "both set", "remove one"]),
    ({"sequence_length_warmup": {"enabled": False}, **legacy(linear())}, ["sequence_length_warmup", "both set"]),
    ({"sequence_length_warmup": OURS, **metrics()}, [PATH, "sequence_length_warmup", "both set", "remove one"]),
    ({"sequence_length_warmup": {"enabled": False}, **metrics()}, [PATH, "sequence_length_warmup", "both set"]),
    ({"sequence_length_warmup": OURS, **metrics("vocabularyrarity", RARITY)}, [PATH, "or the samples", "remove one"]),
    # DeepSpeed's sampler runs whatever the switches above it say
    ({"sequence_length_warmup": OURS, **metrics(efficiency={"enabled": False})}, [PATH, "both set", "remove one"]),
    ({**legacy(linear()), **metrics()}, [PATH, "curriculum_learning is given too", "both set", "remove one"]),
    # a batch size ramp
    *[
        ({**warmup, **metrics(block={"enabled": block}, sampling={"dynamic_batching": {"enabled": True}})},
         ["dynamic_batching.enabled: True", '"enabled": false'])
        for warmup, block in (({"sequence_length_warmup": OURS}, False), (legacy(linear()), False), ({}, True))
    ],
]  # fmt: skip


@pytest.mark.parametrize(("config", "parts"), REFUSED)
def test_refusals_name_key_value_and_remedy(config, parts):
    with pytest.raises(ConfigError) as caught:
        translate(config)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


@pytest.fixture
def log(monkeypatch, caplog):
    say_once.cache_clear()
    monkeypatch.delenv("RANK", raising=False)
    caplog.set_level(logging.INFO, logger="ds_plugin")
    return caplog


def test_the_log_says_it_once(log):
    for _ in range(2):
        rest, plugin = split_config({**DEEPSPEEDS, **legacy(linear())})
        assert rest == DEEPSPEEDS and plugin.sequence_length_warmup.duration.steps == 40000
        assert PluginConfig.from_dict(legacy(linear())) == plugin
    split_config({**DEEPSPEEDS, **legacy(linear(high=2048))})
    said = [record.getMessage() for record in log.records]
    assert len(said) == 2 and '"end_length": 1024' in said[0] and '"end_length": 2048' in said[1]


def test_other_ranks_say_nothing(log, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    split_config(legacy(linear()))
    assert not log.records


@pytest.fixture
def old_file(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps({**DEEPSPEEDS, **legacy(linear())}))
    return path


def test_command_prints_the_new_file(old_file):
    command = [sys.executable, "-m", "ds_plugin", "translate-config", "--config", str(old_file)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == {**DEEPSPEEDS, "sequence_length_warmup": LINEAR}
    assert len(ended.stderr.splitlines()) == 1 and ended.stderr.startswith("note: curriculum_learning is read as")


def test_command_writes_the_new_file(old_file, tmp_path, capsys):
    out = tmp_path / "new.json"
    assert main(["translate-config", "--config", str(old_file), "--out", str(out)]) == 0
    assert json.loads(out.read_text()) == {**DEEPSPEEDS, "sequence_length_warmup": LINEAR}
    assert sorted(tmp_path.iterdir()) == [out, old_file]
    assert capsys.readouterr().out == ""
    assert main(["translate-config", "--config", str(out)]) == 0  # what is new already stays as it is
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads(out.read_text()) and said.err == "note: nothing to translate\n"


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (json.dumps(legacy(linear(schedule_type="custom"))), ["schedule_type", "got 'custom'", "module:function"]),
        (json.dumps({"sequence_length_warmup": {**OURS, "strt_length": 8}}), ["strt_length", '"start_length"']),
        ("{", ["old.json", "not JSON"]),
        (b"\xff\xfe", ["old.json", "not JSON", "utf-8"]),
        (None, ["old.json", "cannot be read"]),
    ],
)
def test_command_refuses_in_one_line(tmp_path, capsys, config, parts):
    path, out = tmp_path / "old.json", tmp_path / "new.json"
    if config is not None:
        path.write_bytes(config if isinstance(config, bytes) else config.encode())
    assert main(["translate-config", "--config", str(path), "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and not out.exists()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    assert all(part in said.err for part in parts), said.err


def test_command_names_a_place_it_cannot_write(old_file, tmp_path, capsys):
    assert main(["translate-config", "--config", str(old_file), "--out", str(tmp_path / "no" / "new.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: argument --out: ") and error.count("\n") == 1
    assert "no/new.json is not a file" in error


IGNORED = [
    # a curriculum that DeepSpeed does not read, and what is said of it
    ({"data_efficiency": {"enabled": True, "curriculum_learning": linear()}}, ["data_efficiency.curriculum_learning"]),
    ({"zero_optimization": {"curriculum_learning": {"enabled": True}}}, ["zero_optimization.curriculum_learning: "]),
    (metrics(efficiency={"enabled": False}), [f"{PATH}: ", "since data_efficiency is not on"]),
    (metrics(sampling={"enabled": False}), [f"{PATH}: ", "since data_efficiency.data_sampling is not on"]),
]


@pytest.mark.parametrize(("config", "parts"), IGNORED)
def test_a_curriculum_that_deepspeed_ignores_is_told(config, parts, tmp_path, capsys):
    new, notes = translate(config)
    assert new == config and len(notes) == 1 and all(part in notes[0] for part in parts), notes
    path = tmp_path / "old.json"
    path.write_text(json.dumps(config))
    assert main(["translate-config", "--config", str(path)]) == 0
    assert notes[0] in capsys.readouterr().err


def test_a_curriculum_that_is_off_or_read_has_no_such_note():
    for config in (metrics(block={"enabled": False}), metrics(), metrics("voc", RARITY), {**DEEPSPEEDS}):
        assert not [note for note in translate(config)[1] if "ignores" in note]
