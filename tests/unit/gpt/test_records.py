"""Texts out of records: JSON lines, parquet, saved data sets, folders of several kinds; and what is refused in them."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from ds_plugin.core.errors import DataError
from ds_plugin.sweeps import text as sweep_text
from launch_scripts.gpt.corpus import Corpus, prepare
from tests.unit.gpt.test_corpus import documents

RECORDS = [{"text": "aab", "id": 1}, {"text": "é", "id": 2}]
TEXTS = [[97, 97, 98, 0], [0xC3, 0xA9, 0]]


def make(source: Path, tmp_path: Path, **more) -> Corpus:
    return prepare(str(source), tokenizer=None, cache_dir=tmp_path / "cache", **more)


def write(path: Path, records: list) -> Path:
    """The records in the format that the name asks for; a folder is a saved data set."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    if path.name.endswith((".jsonl", ".json")):
        path.write_bytes(lines)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        pytest.importorskip("datasets").Dataset.from_list(records).save_to_disk(str(path))
    return path


KINDS = ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "saved"]


@pytest.mark.parametrize("name", KINDS)
def test_the_texts_of_records_and_not_their_syntax(tmp_path: Path, name: str):
    corpus = make(write(tmp_path / name, RECORDS), tmp_path)
    assert documents(corpus) == TEXTS and corpus.text_bytes == 5 and corpus.left_out == {}
    assert make(tmp_path / name, tmp_path) == corpus  # found again
    renamed = [{"body": record["text"], "text": "x"} for record in RECORDS]
    other = make(write(tmp_path / "other" / name, renamed), tmp_path, text_key="body")
    assert documents(other) == TEXTS and other.prefix != make(tmp_path / "other" / name, tmp_path).prefix


@pytest.mark.parametrize("name", KINDS)
def test_records_without_a_text_are_left_out_and_said(tmp_path: Path, name: str):
    records = [*RECORDS, {"text": None, "id": 3}, {"text": "", "id": 4}, {"text": "a\0b", "id": 5}]
    corpus = make(write(tmp_path / name, records), tmp_path)
    assert documents(corpus) == TEXTS
    reasons = ("have no text", "are empty", "hold a NUL byte")
    assert corpus.left_out == {f"records that {reason}": 1 for reason in reasons}
    assert "left out: 1 records that have no text; 1 records that are empty" in corpus.describe()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "saved"])
def test_a_key_that_no_record_has(tmp_path: Path, name: str):
    write(tmp_path / name, [{"body": "ab", "id": 1}])
    with pytest.raises(DataError, match=rf"{name}' hold 'body', 'id' and no 'text'; give --text-key one of them"):
        make(tmp_path / name, tmp_path)


@pytest.mark.parametrize("name", ["a.parquet", "saved"])
def test_a_column_of_another_type(tmp_path: Path, name: str):
    with pytest.raises(DataError, match=f"'id' in .*{name}' is of type int64, not a text"):
        make(write(tmp_path / name, RECORDS), tmp_path, text_key="id")


def test_a_folder_of_several_kinds(tmp_path: Path):
    """As a data set comes from a hub: parquet and JSON lines, and the README beside them is not trained on."""
    folder = tmp_path / "hub"
    write(folder / "data" / "train-0.jsonl.gz", [{"text": "one"}])
    write(folder / "more.jsonl", [{"text": "two"}])
    (folder / "README.md").write_text("---\nlicense: mit\n---")
    (folder / "config.json").write_text('{"text": 3}\n')
    corpus = make(folder, tmp_path)
    assert sorted(documents(corpus)) == [[*b"one", 0], [*b"two", 0]]
    assert corpus.left_out == {"files beside the records": 2}
    write(folder / "third.parquet", [{"text": "three"}])
    write(folder / "inner" / "saved", [{"text": "four"}])
    corpus = make(folder, tmp_path)
    assert sorted(bytes(document[:-1]).decode() for document in documents(corpus)) == ["four", "one", "three", "two"]
    assert corpus.left_out == {"files beside the records": 2}


def test_splits_are_not_mixed(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    part = datasets.Dataset.from_list(RECORDS)
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(DataError, match="splits' holds the splits test, train of a data set; give the folder of one"):
        make(tmp_path / "splits", tmp_path)
    assert make(tmp_path / "splits" / "train", tmp_path).documents == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "b', "line 2 of .*a.jsonl' is no JSON object"),
        ("a.jsonl", b'{"text": "a"}\n\n["b"]\n', r"line 3 of .*a.jsonl' is no JSON object \(a list\)"),
        ("a.jsonl", b"[" * 100000, "line 1 of .*a.jsonl' is no JSON object .*recursion"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1 of .*a.jsonl' is no JSON object .*utf-8"),
        ("a.jsonl", b"\n\n", "holds no text: its files hold no records; give plain text files or records with a"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "holds no text: 1 records that are not UTF-8"),
        ("a.jsonl.gz", b"plain", "a.jsonl.gz' cannot be read .*BadGzipFile"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "a.jsonl.gz' cannot be read .*EOFError"),
        ("a.parquet", b"PAR1 and no more", "a.parquet' cannot be read .*Arrow"),
    ],
)
def test_damaged_records(tmp_path: Path, name: str, content: bytes, message: str):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        make(tmp_path / name, tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_saved_data_set(tmp_path: Path):
    folder = write(tmp_path / "saved", RECORDS)
    (shard,) = folder.glob("*.arrow")
    shard.write_bytes(shard.read_bytes()[:40])
    with pytest.raises(DataError, match="saved' cannot be read"):
        make(folder, tmp_path)


@pytest.mark.parametrize("missing", ["pyarrow", "datasets"])
def test_a_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str):
    source = write(tmp_path / ("a.parquet" if missing == "pyarrow" else "saved"), RECORDS)
    for name in (missing, f"{missing}.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=rf"needs the package '{missing}.*pip install 'ds-plugin\[data\]'"):
        make(source, tmp_path)


def test_the_sweeps_say_that_records_are_no_text(tmp_path: Path):
    write(tmp_path / "a.jsonl", RECORDS)
    for source in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(DataError, match="a.jsonl' holds records, not plain text; give the prefix"):
            sweep_text.find(str(source), 1)
    with pytest.raises(DataError, match="'' names nothing"):
        sweep_text.find("", 1)
