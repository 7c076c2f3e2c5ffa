"""Small files: whatever stands in one, reading it ends in one error that names the file and what is wrong in it."""

import json
import math

import pytest

from ds_plugin.config import load_json
from ds_plugin.core.errors import CheckpointError, ConfigError, DataError, PluginError
from ds_plugin.core.json_files import Manifest, read_json, read_tag, trouble
from ds_plugin.weight_averaging.merge.merge import open_source

#: of every JSON file: content (None: there is none, a list: a folder), what is said of it
DAMAGED = {
    "missing": (None, "No such file"),
    "folder": ([], "Is a directory"),
    "empty": (b"", "not JSON"),
    "cut": (b'{"a": 1', "not JSON"),
    "not utf-8": (b'{"a": "\xff"}', "not JSON"),
    "lists too deep": (b"[" * 100_000, "too deep"),
    "objects too deep": (b'{"a":' * 101 + b"1" + b"}" * 101, "more than 100 deep"),
    "too many digits": (b'{"a": 1' + b"0" * 5000 + b"}", "digits"),
    "repeats a key": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "repeats the key"),
    "list": (b"[1]", "a list in place of a JSON object"),
    "null": (b"null", "a NoneType"),
}


def put(path, content):
    path.mkdir() if content == [] else content is None or path.write_bytes(content)
    return path


@pytest.mark.parametrize("error", [CheckpointError, ConfigError, DataError])
@pytest.mark.parametrize(("content", "said"), DAMAGED.values(), ids=DAMAGED)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, said, error):
    path = put(tmp_path / "small.json", content)
    with pytest.raises(error) as caught:
        read_json(path, error=error, remedy="make it again")
    message = str(caught.value)
    assert message.startswith(str(path)) and said in message and message.endswith("; make it again")
    assert "\n" not in message and len(message) < 300 + len(str(path))


def test_a_name_that_is_none_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path / "a\0b")


def test_types_are_looked_at_and_the_rest_is_kept(tmp_path):
    path = put(tmp_path / "a.json", json.dumps({"a": [0.1, -1e-300], "b": None, "c": math.inf, "d": "x"}).encode())
    assert read_json(path, {"a": list[float]}) == {"a": [0.1, -1e-300], "b": None, "c": math.inf, "d": "x"}
    for model, said in (({"e": int}, "e: field required"), ({"a": list[int]}, "a: 0: "), ({"d": int}, "d: input")):
        with pytest.raises(CheckpointError, match=said):
            read_json(path, model)
    for wrong in ({"world_size": -2}, {"world_size": 1_000_000}, {"world_size": True}, {"state": {"a": 5}}):
        with pytest.raises(CheckpointError, match=f"{next(iter(wrong))}: "):
            read_json(put(path, json.dumps(wrong).encode()), Manifest)


@pytest.mark.parametrize(
    "content",
    [None, [], b"", b" \n", b".", b"..", b"a/../..", b"/etc", b"\xff", b"a\0b", b"a\nb", b"9" * 5000, b"a" * 241],
    ids=lambda c: repr(c)[:12],
)
def test_a_tracker_names_a_folder_below_its_own(tmp_path, content):
    path = put(tmp_path / "latest", content)
    with pytest.raises(CheckpointError) as caught:
        read_tag(path, remedy="give a tag")
    assert str(caught.value).startswith(str(path)) and str(caught.value).endswith("; give a tag")
    assert len(str(caught.value)) < 300 + len(str(path))


def test_tags_as_frameworks_write_them(tmp_path):
    for tag in ("global_step10", "epoch 1/step2", "0000100", "schritt_ü"):
        assert read_tag(put(tmp_path / "latest", f"{tag}\n".encode())) == tag


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2**64, -(10**400)])
def test_a_number_that_no_setting_has_is_named_by_its_place(tmp_path, value):
    config = {"zero_optimization": {"stage": 1}, "optimizer": {"params": {"betas": (0.9, value)}}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    for source in (config, path):
        with pytest.raises(ConfigError, match=r"optimizer\.params\.betas\.1: "):
            load_json(source)
    assert trouble(config) is None


@pytest.mark.parametrize("config", [{"a": {1: 2}}, {None: 1}, {"a": ["b\0c"]}, {"a": "b" * 5000}, {"a" * 5000: 1}])
def test_keys_and_texts_that_no_setting_has(config):
    with pytest.raises(ConfigError, match="no text|a text of"):
        load_json(config)
    assert load_json({"steps_per_print": math.inf}) == {"steps_per_print": math.inf}  # as Accelerate writes it


def test_a_config_that_holds_itself_is_refused():
    config = {"a": {}}
    config["a"] |= {"b": config, "c": config}
    with pytest.raises(ConfigError, match="more than 100 deep"):
        load_json(config)


# -- the readers: each names the file that is wrong --------------------------------------------------------------------


@pytest.mark.parametrize("tracker", ["latest", "latest_universal", "latest_checkpointed_iteration.txt"])
@pytest.mark.parametrize("content", [b".", b"\xff", b"", b"1" * 5000], ids=repr)
def test_merge_follows_no_tracker_in_circles(tmp_path, tracker, content):
    (tmp_path / tracker).write_bytes(content)
    with pytest.raises(CheckpointError, match=tracker):
        open_source(tmp_path)


def header(entries):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content",
    [
        header(b"[" * 100_000),
        header({"a": entry(shape=(-1, -2))}),
        header({"a": entry(shape=(1,), offsets=(0, 4)), "b": entry(shape=(2,), offsets=(0, 8))}),
        header(b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2)),
        header({"a": entry(shape=("2",))}),
        header({"a": entry(offsets=(0, 8.0))}),
        header({"a": entry(dtype=["F32"])}),
        header({"a": entry(shape=(10**300,))}),
        header({"a": 5}),
        header([]),
    ],
    ids=lambda content: repr(content[8:40]),
)
def test_merge_refuses_a_header_that_is_wrong(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "", 3])
def test_an_index_names_files_beside_it(tmp_path, name):
    (tmp_path / "model.safetensors").write_bytes(header({"a": entry()}))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(PluginError, match=index.name):
        open_source(tmp_path)
