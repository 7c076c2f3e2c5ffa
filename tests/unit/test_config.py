"""The JSON sections: what is accepted, and that every refusal names the field, the value and the remedy."""

import json

import pytest

from ds_plugin.config import PluginConfig, load_json, split_config
from ds_plugin.core.errors import ConfigError
from ds_plugin.core.settings_model import parse_section
from ds_plugin.sequence_length_warmup.config import SequenceLengthWarmupConfig

WARMUP = {"enabled": True, "end_length": 256, "duration": {"steps": 150}}
COMPLETEP = {"enabled": True, "base_width": 64, "base_depth": 2}
AVERAGING = {"enabled": True, "interval": 10}


def section(name, base, **changes):
    merged = {**base, **changes}
    return {name: {key: value for key, value in merged.items() if value != "<absent>"}}


def warmup(**changes):
    return section("sequence_length_warmup", WARMUP, **changes)


def completep(**changes):
    return section("completep", COMPLETEP, **changes)


def averaging(**changes):
    return section("weight_averaging", AVERAGING, **changes)


BAD = [
    # config, what the one message must hold: the field, the value, the remedy
    (warmup(strt_length=8), ["sequence_length_warmup.strt_length", "8", '"start_length"']),
    (warmup(colour="red"), ["sequence_length_warmup.colour", "'red'", "known keys are"]),
    (warmup(duration={"setps": 5}), ["sequence_length_warmup.duration.setps", '"steps"']),
    (warmup(duration=150), ["sequence_length_warmup.duration", "150"]),
    (warmup(start_length="8"), ["sequence_length_warmup.start_length", "'8'", "integer"]),
    (warmup(start_length=True), ["sequence_length_warmup.start_length", "True", "integer"]),
    (warmup(start_length="auto"), ["sequence_length_warmup.start_length", "'auto'"]),
    (warmup(start_length=0), ["sequence_length_warmup.start_length", "greater than or equal to 1", "0"]),
    (warmup(start_length=512), ["start_length", "512", "256"]),
    (warmup(end_length=250), ["end_length", "250", "248 or 256"]),
    (warmup(end_length="<absent>"), ["sequence_length_warmup.end_length", "missing", "1024"]),
    (warmup(duration="<absent>"), ["sequence_length_warmup.duration", "missing", '{"steps": N}']),
    (warmup(mode="drop"), ["sequence_length_warmup.mode", "'truncate', 'carry' or 'mask'", "'drop'"]),
    (warmup(schedule="cubic"), ["sequence_length_warmup.schedule", "'cubic'", "'linear'", "package.module:function"]),
    (warmup(duration={}), ["sequence_length_warmup.duration", '{"steps": N} or {"tokens": N}']),
    (warmup(duration={"steps": 5, "tokens": 9}), ["sequence_length_warmup.duration", "steps 5 and tokens 9"]),
    (warmup(duration={"tokens": 0}), ["sequence_length_warmup.duration.tokens", "0"]),
    (warmup(root_degree=2), ["root_degree", "2", '"schedule": "root"']),
    (warmup(schedule="root", root_degree=0), ["root_degree", "0"]),
    (warmup(lengths=[8, 256]), ["lengths", "[8, 256]", '"schedule": "discrete"']),
    (warmup(schedule="discrete"), ["sequence_length_warmup.lengths", "missing", "[64, 256, 1024]"]),
    (warmup(schedule="discrete", lengths=[8, 256]), ["sequence_length_warmup.boundaries", "missing"]),
    (warmup(schedule="discrete", lengths=[8, 256], boundaries=[5, 150]), ["boundaries", "[5, 150]", "one less"]),
    (warmup(schedule="discrete", lengths=[8, 64, 256], boundaries=[150, 5]), ["boundaries", "[150, 5]", "order"]),
    (warmup(schedule="discrete", lengths=[8, 60, 256], boundaries=[5, 150]), ["lengths", "[60]", "multiple_of 8"]),
    (warmup(schedule="discrete", lengths=[16, 256], boundaries=[150]), ["start_length", "8", "write 16"]),
    (warmup(schedule="discrete", lengths=[8, 256], boundaries=[100]), ["duration.steps", "150", "write 100"]),
    (
        warmup(schedule="discrete", lengths=[8, 96, 256], boundaries=[5, 150], tokens_per_step="constant"),
        ["lengths", "[96]", "do not divide end_length 256"],
    ),
    (warmup(interleave=4), ["interleave", "4", '"mode": "carry"']),
    (warmup(max_distinct_lengths=4, mode="carry"), ["max_distinct_lengths", "4", "'carry'", "discrete"]),
    (
        warmup(max_distinct_lengths=4, schedule="discrete", lengths=[8, 256], boundaries=[150]),
        ["max_distinct_lengths", "4", "'discrete'"],
    ),
    (warmup(max_distinct_lengths=1), ["max_distinct_lengths", "1"]),
    (warmup(adaptive={}), ["adaptive", '"pacing": "adaptive"']),
    (warmup(shifts_labels=True), ["shifts_labels", "'truncate'", '"mode": "carry"']),
    (warmup(pacing="adaptive", adaptive={"loss_ratio": 1.0}), ["adaptive.loss_ratio", "1.0"]),
    (warmup(learning_rate={"by": "samples"}), ["learning_rate.by", "'steps' or 'tokens'", "'samples'"]),
    (completep(base_width="<absent>"), ["completep.base_width", "missing", "256"]),
    (completep(base_width=0), ["completep.base_width", "0"]),
    (completep(base_width=64.5), ["completep.base_width", "64.5"]),
    (completep(alpha=0.4), ["completep.alpha", "0.5", "0.4"]),
    (completep(recipe="complete"), ["completep.recipe", "'completep'", "'complete'"]),
    (completep(batch_ratio=2.0), ["completep.batch_ratio", "2.0", "completed_p"]),
    (completep(alpha=1.5), ["completep.alpha", "1.5"]),
    (averaging(window=0), ["weight_averaging.window", "greater than or equal to 1", "0"]),
    (averaging(window=10**9), ["weight_averaging.window", "less than or equal to 10000", "1000000000"]),
    (averaging(interval="<absent>"), ["weight_averaging.interval", "missing"]),
    (averaging(mode="swa"), ["weight_averaging.mode", "'sliding'", "'swa'"]),
    (averaging(mode="ema"), ["weight_averaging.horizons", "missing", "[10, 100]"]),
    (averaging(mode="ema", horizons=[10, 10]), ["weight_averaging.horizons", "[10, 10]", "different"]),
    (averaging(mode="ema", horizons=[]), ["weight_averaging.horizons", "[]"]),
    (averaging(mode="ema", horizons=[0]), ["weight_averaging.horizons", "greater than or equal to 1", "0"]),
    (averaging(mode="ema", horizons=[9], window=3), ["weight_averaging.window", "3", '"horizons"']),
    (averaging(horizons=[10]), ["weight_averaging.horizons", "[10]", "'sliding'"]),
    (averaging(weights="ema"), ["weight_averaging.weights", "'ema'", "'mean', 'minus-sqrt', 'cosine', 'wma'"]),
    (averaging(weights="uniform"), ["weight_averaging.weights", "'uniform'", "write 'mean'"]),
    (averaging(weights="linear"), ["weight_averaging.weights", "'linear'", "write 'wma'", "'mean'", "weighted_merge"]),
    (averaging(weights="1-sqrt"), ["weight_averaging.weights", "'1-sqrt'", "write 'minus-sqrt'"]),
    (averaging(weights=[1, 10**400], window=2), ["weight_averaging.weights.1", "1329 bits"]),
    (averaging(weights=[1, float("inf")], window=2), ["weight_averaging.weights", "inf"]),
    (averaging(weights=[1, 2]), ["weight_averaging.weights", "2 numbers", "window of 5"]),
    (averaging(weights=[1, 0], window=2), ["weight_averaging.weights", "newest"]),
    (averaging(weights=[-1, 1], window=2), ["weight_averaging.weights", "[-1, 1]"]),
    (averaging(mode="block", weights="wma"), ["weight_averaging.weights", "'wma'", '"sliding"']),
    *(
        (make(**{field: value}), [field, said])
        for make, field, value, said in (
            (warmup, "start_length", 2**31, "less than or equal to 16777216"),
            (warmup, "end_length", 2**31, "less than or equal to 16777216"),
            (warmup, "multiple_of", 2**31, "less than or equal to 16777216"),
            (warmup, "duration", {"steps": 10**6 + 1}, "less than or equal to 1000000"),
            (warmup, "duration", {"tokens": 10**16}, "less than or equal to 1000000000000000"),
            (warmup, "root_degree", 10**7, "less than or equal to 1000"),
            (warmup, "max_distinct_lengths", 10**30, "bits"),
            (warmup, "max_distinct_lengths", 10**9, "less than or equal to 1000"),
            (warmup, "interleave", 2**31, "less than or equal to 1000"),
            (warmup, "report_interval", 2**31, "less than or equal to 10000"),
            (warmup, "lengths", [*range(8, 8 * 1001, 8), 10**6], "at most 1000 items"),
            (warmup, "lengths", [-8, 256], "greater than or equal to 1"),
            (warmup, "adaptive", {"loss_ratio": float("inf")}, "not a finite number"),
            (warmup, "adaptive", {"loss_ratio": 1e9}, "less than or equal to 1000"),
            (warmup, "adaptive", {"variance_max": float("nan")}, "not a finite number"),
            (completep, "base_width", 2**31, "less than or equal to 1048576"),
            (completep, "base_depth", 2**31, "less than or equal to 10000"),
            (completep, "base_head_dim", 2**31, "less than or equal to 1048576"),
            (completep, "alpha", float("nan"), "not a finite number"),
            (completep, "batch_ratio", float("inf"), "not a finite number"),
            (completep, "batch_ratio", 1e-300, "greater than or equal to 0.000001"),
            (completep, "token_ratio", 1e300, "less than or equal to 1000000"),
            (averaging, "interval", 2**31, "less than or equal to 1000000000"),
            (averaging, "start_step", 2**31, "less than or equal to 1000000000"),
            (averaging, "horizons", [10**7], "less than or equal to 1000000"),
            (averaging, "horizons", list(range(1, 18)), "at most 16 items"),
            (averaging, "restart", {"patience": 2**31}, "less than or equal to 10000"),
            (averaging, "restart", {"loss_ratio": 1e9}, "less than or equal to 1000"),
        )
    ),
    ({"COMPLETEP": COMPLETEP}, ["COMPLETEP", '"completep"']),
    ({"sequence_length_warmup": True}, ["sequence_length_warmup", "JSON object", "True"]),
    ({"sequence_lenght_warmup": WARMUP}, ["sequence_lenght_warmup", '"sequence_length_warmup"']),
    ({"weight-averaging": AVERAGING}, ["weight-averaging", '"weight_averaging"']),
    # translated where they can be (sequence_length_warmup/test_translate.py)
    ({"curriculum_learning": {"enabled": True}}, ["curriculum_learning", "sequence_length_warmup", "missing"]),
    ({"curriculum_learning": "seqlen"}, ["curriculum_learning", "a JSON object", "'seqlen'"]),
]


@pytest.mark.parametrize(("config", "parts"), BAD, ids=lambda v: json.dumps(v)[:60] if isinstance(v, dict) else "")
def test_refusals_name_field_value_and_remedy(config, parts):
    with pytest.raises(ConfigError) as caught:
        PluginConfig.from_dict(config)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_whether_a_model_shifts_labels_is_said_where_samples_are_cut():
    for changes in ({"mode": "carry"}, {"tokens_per_step": "constant"}):
        found = PluginConfig.from_dict(warmup(shifts_labels=False, **changes))
        assert found.sequence_length_warmup.shifts_labels is False


def test_a_disabled_section_is_checked_too():
    with pytest.raises(ConfigError, match="strt_length"):
        PluginConfig.from_dict(warmup(enabled=False, strt_length=8))


def test_all_wrong_fields_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        PluginConfig.from_dict(averaging(window=0, interval=0))
    assert "window" in str(caught.value) and "interval" in str(caught.value)


def test_sections_are_stripped_and_the_rest_untouched():
    theirs = {"train_batch_size": 8, "zero_optimization": {"stage": 1}, "completion": {"not": "ours"}}
    given = {**theirs, **warmup(), **completep(), **averaging(enabled=False)}
    before = json.dumps(given)
    rest, plugin = split_config(given)
    assert rest == theirs
    assert json.dumps(given) == before
    assert plugin.sequence_length_warmup is not None and plugin.sequence_length_warmup.start_length == 8
    assert plugin.completep is not None and plugin.completep.alpha == 1.0
    assert plugin.weight_averaging is None  # disabled is as good as absent


def test_enabled_defaults_to_false():
    assert PluginConfig.from_dict(averaging(enabled="<absent>")).weight_averaging is None


def test_an_integer_is_a_fine_alpha():
    assert PluginConfig.from_dict(completep(alpha=1)).completep.alpha == 1.0


def test_parsed_sections_cannot_be_changed():
    parsed = parse_section(SequenceLengthWarmupConfig, "sequence_length_warmup", WARMUP)
    with pytest.raises(Exception, match="frozen"):
        parsed.start_length = 16


@pytest.mark.parametrize(
    ("text", "parts"),
    [("{", ["not JSON"]), ("[1]", ["JSON object", "list"]), ('{"a": 1, "a": 2}', ["repeats", "a"])],
)
def test_files_that_are_no_config(tmp_path, text, parts):
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_json(path)
    assert all(part in str(caught.value) for part in parts)


def test_missing_file_names_itself(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.json"):
        load_json(tmp_path / "nowhere.json")
