"""Text into a Megatron indexed dataset: what is read, how it is counted, and what an interruption leaves."""

import json
import math
import os
import struct
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from ds_plugin.core.errors import ConfigError, DataError
from launch_scripts.gpt.corpus import Corpus, entropy, prepare
from launch_scripts.gpt.text import cut, document_limit, find_text_files


def make(source: object, tmp_path: Path, tokenizer: Path | None = None, **more) -> Corpus:
    return prepare(str(source), tokenizer=tokenizer, cache_dir=tmp_path / "cache", **more)


def documents(corpus: Corpus) -> list[list[int]]:
    dataset = IndexedDataset(str(corpus.prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two texts (of two names that sort against the order of writing), one empty file and two that are not text."""
    root = tmp_path / "texts"
    (root / "inner").mkdir(parents=True)
    (root / "z.txt").write_bytes(b"aab")
    (root / "inner" / "a.txt").write_bytes("é".encode())
    (root / "empty.txt").write_bytes(b"")
    (root / "nul.txt").write_bytes(b"a\0b")
    (root / "latin.txt").write_bytes(b"\xe9")
    (root / ".hidden").write_bytes(b"never")
    return root


def test_bytes_of_a_folder(folder: Path, tmp_path: Path):
    corpus = make(folder, tmp_path)
    assert documents(corpus) == [[97, 97, 98, 0], [0xC3, 0xA9, 0]]  # by the hash of the name, each ended by NUL
    assert (corpus.vocab_size, corpus.eod, corpus.tokens, corpus.documents) == (256, 0, 7, 2)
    assert corpus.text_bytes == 5
    left_out = {"files that are empty": 1, "files that hold a NUL byte": 1, "files that are not UTF-8": 1}
    assert corpus.left_out == left_out
    said = corpus.describe()
    assert said.startswith("data: 7 tokens in 2 documents; left out: 1 files that") and said.count(";") == 3
    assert IndexedDataset(str(corpus.prefix)).index.dtype is np.uint8


def test_unigram_entropy_of_aab(tmp_path: Path):
    (tmp_path / "t.txt").write_bytes(b"aab")
    # a 1/2, b 1/4, end of document 1/4: 1/2 ln 2 + 2 * 1/4 ln 4 = 3/2 ln 2
    assert make(tmp_path / "t.txt", tmp_path).unigram_entropy == pytest.approx(1.5 * math.log(2), abs=1e-15)


@pytest.mark.parametrize(
    ("counts", "expected"), [([5], 0.0), ([1, 1], math.log(2)), ([1, 0, 1, 0], math.log(2)), ([4] * 8, math.log(8))]
)
def test_entropy(counts: list[int], expected: float):
    assert entropy(np.array(counts)) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("text", "limit", "pieces"),
    [
        (b"ab", 4, [b"ab"]),
        (b"abcd", 4, [b"abcd"]),
        (b"ab\ncd\nef", 4, [b"ab\n", b"cd\n", b"ef"]),
        (b"a\nb\nc", 4, [b"a\nb\n", b"c"]),
        (b"abcdefghi", 4, [b"abcd", b"efgh", b"i"]),
        ("abcé".encode(), 4, [b"abc", "é".encode()]),  # the two bytes of é stay together
        ("abé".encode() + b"c", 4, ["abé".encode(), b"c"]),
        ("😀😀".encode(), 4, ["😀".encode(), "😀".encode()]),
    ],
)
def test_cut(text: bytes, limit: int, pieces: list[bytes]):
    assert cut(text, limit) == pieces


def test_one_long_file_becomes_many_documents(tmp_path: Path):
    line = b"x" * 63 + b"\n"
    (tmp_path / "t.txt").write_bytes(line * 6400)  # 400 KiB: 1/200 of it is 2048, exactly 32 lines
    corpus = make(tmp_path / "t.txt", tmp_path)
    assert corpus.documents == 200
    assert corpus.tokens == 64 * 6400 + 200
    assert documents(corpus)[0] == list(line * 32) + [0]


def test_document_limit_leaves_many_files_whole(tmp_path: Path):
    for number in range(200):
        (tmp_path / f"{number}.txt").write_bytes(b"x")
    files = find_text_files(str(tmp_path)).files
    assert document_limit(files) == 1 << 20
    assert document_limit(files[:199]) == 1 << 10


def test_second_start_reads_nothing(folder: Path, tmp_path: Path):
    seen: list[tuple[int, int]] = []
    first = make(folder, tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 9), (9, 9)]
    seen.clear()
    assert make(folder, tmp_path, progress=lambda done, total: seen.append((done, total))) == first
    assert seen == []


def test_changed_text_makes_a_new_dataset(folder: Path, tmp_path: Path):
    first = make(folder, tmp_path)
    (folder / "z.txt").write_bytes(b"aabb")
    second = make(folder, tmp_path)
    assert second.prefix != first.prefix and second.tokens == first.tokens + 1


def test_interrupted_preparation_leaves_nothing(folder: Path, tmp_path: Path):
    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(folder, tmp_path, progress=stop)
    assert list((tmp_path / "cache").iterdir()) == []
    assert make(folder, tmp_path).tokens == 7


def test_a_killed_preparation_is_swept_at_a_later_start(folder: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    cache.mkdir()
    left = cache / ".texts-bytes-0a.999999999.tmp.bin"
    left.write_bytes(b"x")
    make(folder, tmp_path)
    assert left.exists()  # just written: another run's
    os.utime(left, (0, 0))
    make(folder, tmp_path)
    assert not left.exists()


def test_dataset_without_index_is_made_again(folder: Path, tmp_path: Path):
    """What a power cut between the renames leaves: .bin and .json, no .idx."""
    corpus = make(folder, tmp_path)
    Path(f"{corpus.prefix}.idx").unlink()
    assert make(folder, tmp_path) == corpus and Path(f"{corpus.prefix}.idx").is_file()


def test_sidecar(folder: Path, tmp_path: Path):
    corpus = make(folder, tmp_path)
    record = json.loads(Path(f"{corpus.prefix}.json").read_text())
    assert record["tokenizer"] == "bytes" and record["tokens_counted"] == record["tokens"] == 7
    assert record["unigram_entropy"] == corpus.unigram_entropy
    assert set(record["versions"]) == {"megatron-core", "numpy", "tokenizers", "torch"}


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_existing_prefix_without_sidecar(folder: Path, tmp_path: Path, suffix: str):
    made = make(folder, tmp_path)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for kind in (".bin", ".idx"):
        (theirs / f"set{kind}").write_bytes(Path(f"{made.prefix}{kind}").read_bytes())
    for _ in range(2):  # counted, then read from the cache
        found = make(theirs / f"set{suffix}", tmp_path)
        assert found.prefix == theirs / "set"
        assert (found.vocab_size, found.eod, found.tokens, found.documents) == (256, 0, 7, 2)
        assert found.unigram_entropy == pytest.approx(made.unigram_entropy, abs=1e-15)
    assert sorted(p.name for p in theirs.iterdir()) == ["set.bin", "set.idx"]


def test_own_prefix_uses_its_sidecar(folder: Path, tmp_path: Path):
    made = make(folder, tmp_path)
    assert make(f"{made.prefix}.bin", tmp_path).text_bytes == made.text_bytes == 5


def test_large_prefix_is_counted_in_strides(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from launch_scripts.gpt import indexed as module

    (tmp_path / "t.txt").write_bytes(b"ab" * 50000)
    made = make(tmp_path / "t.txt", tmp_path)
    monkeypatch.setattr(module, "COUNT_AT_MOST", 8000)
    monkeypatch.setattr(module, "COUNT_BLOCK", 1000)
    counts, counted = module.count_tokens(made.prefix, np.uint8, made.tokens)
    assert counted == 8000 and abs(int(counts[97]) - 4000) <= 8 and abs(int(counts[98]) - 4000) <= 8
    Path(f"{made.prefix}.json").unlink()
    with pytest.raises(DataError, match="give the tokenizer file"):
        make(made.prefix, tmp_path)


def test_real_standard_library(tmp_path: Path):
    source = Path(sysconfig.get_path("stdlib")) / "json"
    corpus = make(source, tmp_path)
    files = sorted(p for p in source.rglob("*") if p.is_file())
    text = [p for p in files if b"\0" not in p.read_bytes()]  # byte code holds NULs
    assert corpus.text_bytes == sum(p.stat().st_size for p in text)
    assert sum(corpus.left_out.values()) == len(files) - len(text)
    assert corpus.tokens == corpus.text_bytes + corpus.documents
    assert 2.5 < corpus.unigram_entropy < 4.0  # program text


def test_stdlib_is_the_librarys_own_text():
    names = [file.name for file in find_text_files("stdlib").files]
    assert {"json/decoder.py", "os.py"} <= set(names)
    # the end of the list is the validation part: it must not be one corner of the alphabet
    last = names[-40:]
    assert len({name.split("/")[-1][:6] for name in last}) > 15 and last != sorted(last)
    assert not any("site-packages" in name or "__pycache__" in name for name in names)
    assert {Path(name).suffix for name in names} <= {".py", ".txt", ".rst", ".html"}


# --------------------------------------------------------------------------------------------------- tokenizer files


def save_tokenizer(path: Path, *special: str, truncate: int | None = None) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "one": 1, "two": 2, "far": 70000}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(list(special))
    if truncate:
        tokenizer.enable_truncation(truncate)
    tokenizer.save(str(path))
    return path


def test_tokenizer_file(tmp_path: Path):
    (tmp_path / "t.txt").write_text("one two two three")
    tokenizer = save_tokenizer(tmp_path / "words.json", "[SEP]", "</s>", truncate=2)
    corpus = make(tmp_path / "t.txt", tmp_path, tokenizer)
    eod = corpus.eod
    assert documents(corpus) == [[1, 2, 2, 0, eod]]  # whole in spite of the file's truncation
    from tokenizers import Tokenizer

    assert Tokenizer.from_file(str(tokenizer)).id_to_token(eod) == "</s>"  # named before [SEP]
    assert corpus.vocab_size == 70001  # the largest number, not the count of 6
    assert IndexedDataset(str(corpus.prefix)).index.dtype is np.int32
    assert corpus.prefix != make(tmp_path / "t.txt", tmp_path).prefix


def test_adopted_prefix_with_the_wrong_tokenizer(tmp_path: Path):
    (tmp_path / "t.txt").write_text("far far")
    made = make(tmp_path / "t.txt", tmp_path, save_tokenizer(tmp_path / "large.json", "</s>"))
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    small = Tokenizer(WordLevel({"</s>": 0}, unk_token="</s>"))
    small.save(str(tmp_path / "small.json"))
    with pytest.raises(DataError, match="holds token 70000, but the tokenizer 'small' has only 1"):
        make(made.prefix, tmp_path, tmp_path / "small.json")


# ------------------------------------------------------------------------------------------------------------ errors


def test_nothing_there(tmp_path: Path):
    with pytest.raises(DataError, match="nowhere' does not exist; give a text file"):
        make(tmp_path / "nowhere", tmp_path)


@pytest.mark.parametrize("source", ["", " ", "a\0b"])
def test_a_name_that_names_nothing(tmp_path: Path, source: str):
    with pytest.raises(DataError, match="names nothing; give a text file or folder, or 'stdlib'"):
        make(source, tmp_path)


def test_names_that_are_not_utf8(tmp_path: Path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / os.fsdecode(b"\xff.txt")).write_text("ab")
    assert make(folder, tmp_path).tokens == 3 == make(folder, tmp_path).tokens  # made, then found
    (folder / os.fsdecode(b"\xff.txt")).write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"caf\\udce9' holds no text"):
        make(folder, tmp_path)


def test_a_cache_that_cannot_be_written(folder: Path, tmp_path: Path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(DataError, match="cannot be prepared in .*cache.*give --cache a folder that can be written"):
        make(folder, tmp_path)


def test_folder_without_files(tmp_path: Path):
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="void' holds no files"):
        make(tmp_path / "void", tmp_path)


def test_file_that_is_not_text(tmp_path: Path):
    (tmp_path / "blob").write_bytes(b"\xff\xfe\0")
    with pytest.raises(DataError, match="holds no text: 1 files that hold a NUL byte"):
        make(tmp_path / "blob", tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(("there", "missing"), [(".bin", ".idx"), (".idx", ".bin")])
@pytest.mark.parametrize("given", ["", ".bin", ".idx"])
def test_half_a_dataset(tmp_path: Path, there: str, missing: str, given: str):
    (tmp_path / f"half{there}").write_bytes(b"x")
    with pytest.raises(DataError, match=f"has no half{missing}"):
        make(tmp_path / f"half{given}", tmp_path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # megatron-core's half-built reader
@pytest.mark.parametrize(
    ("damage", "content", "message"),
    [
        (".idx", b"cut", "is not a Megatron index"),
        (".bin", b"cut", "its index needs at least 7"),
        (".bin", b"", "bin' is empty"),
        (".json", b"{", "json is damaged"),
    ],
)
def test_damaged_dataset(folder: Path, tmp_path: Path, damage: str, content: bytes, message: str):
    """Found before anything is trained: in a dataset that is given, and in the cache of its text."""
    made = make(folder, tmp_path)
    Path(f"{made.prefix}{damage}").write_bytes(content)
    for source in (f"{made.prefix}.bin", folder):
        with pytest.raises(DataError, match=message):
            make(source, tmp_path)
    with pytest.raises(DataError, match="; delete it and" if damage == ".json" else r"; delete '.*\.idx', and it is"):
        make(folder, tmp_path)
    Path(f"{made.prefix}{'.json' if damage == '.json' else '.idx'}").unlink()  # as the message says
    assert make(folder, tmp_path) == made


def write_index(prefix: Path, lengths: list[int], pointers: list[int], ends: list[int], code: int = 1) -> Path:
    """An .idx file of the format's first version, and 8 bytes of .bin; code 1 is uint8, 4 int32, 6 float64."""
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(ends))
    arrays = (np.array(lengths, "<i4"), np.array(pointers, "<i8"), np.array(ends, "<i8"))
    prefix.with_suffix(".idx").write_bytes(head + b"".join(array.tobytes() for array in arrays))
    prefix.with_suffix(".bin").write_bytes(b"abcd\0fg\0")
    return prefix


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (([5, 3], [0, 5], [0, 1, 2]), None),
        (([5, -3], [0, 5], [0, 1, 2]), "holds a length or position of -3"),
        (([5, 3], [0, -5], [0, 1, 2]), "holds a length or position of -5"),
        (([5, 3], [0, 5], [0, -1, 2]), "holds a length or position of -1"),
        (([5, 3], [0, 2**63 - 2], [0, 1, 2]), f"needs at least {2**63 - 2}"),
        (([5, 3], [0, 6], [0, 1, 2]), "needs at least 9"),
        (([5, 3], [0, 5], [0, 2, 1, 2]), "documents that are not in order"),
        (([5, 3], [0, 5], [0, 1, 7]), "is not a Megatron index"),
        (([0, 0], [0, 0], [0, 1, 2]), "holds no tokens"),
        (([], [], [0]), "holds no tokens"),
        (([1, 1], [0, 4], [0, 1, 2], 4), "does not hold token numbers but int32 from 6776320 to 1684234849"),
        (([1], [0], [0, 1], 6), "does not hold token numbers but float64"),
    ],
)
def test_an_index_that_cannot_be(tmp_path: Path, index: tuple, message: str | None):
    prefix = write_index(tmp_path / "set", *index)
    if message is None:
        assert make(prefix, tmp_path).tokens == 8
        return
    with pytest.raises(DataError, match=message):
        make(prefix, tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": 8}, "says 8 tokens in 2 documents.*has 7 in 2"),
        ({"documents": 1}, "says 7 tokens in 1 documents"),
        ({"eod": 256}, "with 256 at the end of each and 256 in all"),
        ({"vocab_size": 100}, "holds token 195, but .*json' has only 100"),
        ({"vocab_size": 2**31}, "json is damaged"),
        ({"unigram_entropy": math.nan}, "json is damaged"),
        ({"eod": -1}, "json is damaged"),
    ],
)
def test_a_description_that_does_not_fit(folder: Path, tmp_path: Path, changed: dict, message: str):
    made = make(folder, tmp_path)
    sidecar = Path(f"{made.prefix}.json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | changed))
    with pytest.raises(DataError, match=message):
        make(made.prefix, tmp_path)


def test_a_json_beside_somebodys_dataset_may_be_anything(folder: Path, tmp_path: Path):
    made = make(folder, tmp_path)
    Path(f"{made.prefix}.json").write_text('{"license": "MIT"}')
    assert (found := make(made.prefix, tmp_path)).tokens == 7 and found.text_bytes == 0


def test_tokenizer_errors(tmp_path: Path):
    (tmp_path / "t.txt").write_text("one")
    with pytest.raises(ConfigError, match="none.json' does not exist"):
        make(tmp_path / "t.txt", tmp_path, tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match="bad.json' is not a Hugging Face tokenizers file"):
        make(tmp_path / "t.txt", tmp_path, tmp_path / "bad.json")
    with pytest.raises(ConfigError, match="noend.json' has no end-of-document token; name one .* by --eod, or add"):
        make(tmp_path / "t.txt", tmp_path, save_tokenizer(tmp_path / "noend.json", "[CLS]"))
    with pytest.raises(ConfigError, match="'<end>' names a token, and there is no tokenizer"):
        make(tmp_path / "t.txt", tmp_path, eod="<end>")
    (tmp_path / "void").mkdir()
    with pytest.raises(ConfigError, match="void/tokenizer.json' does not exist; give a tokenizer.json or the folder"):
        make(tmp_path / "t.txt", tmp_path, tmp_path / "void")


def test_a_tokenizers_folder_and_its_end_of_document(tmp_path: Path):
    (tmp_path / "t.txt").write_text("one two")
    folder = tmp_path / "words"
    folder.mkdir()
    saved = save_tokenizer(folder / "tokenizer.json", "</s>", "<end>", "<stop>")
    numbers = {token: make(tmp_path / "t.txt", tmp_path, saved, eod=token).eod for token in ("</s>", "<end>", "<stop>")}
    assert len(set(numbers.values())) == 3
    assert make(tmp_path / "t.txt", tmp_path, folder).eod == numbers["</s>"]  # the first of the usual names
    for eos in ("<stop>", {"content": "<stop>", "lstrip": False}):
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        corpus = make(tmp_path / "t.txt", tmp_path, folder)
        assert corpus.eod == numbers["<stop>"] and documents(corpus)[0][-1] == corpus.eod
        assert corpus.prefix.name.startswith("t-words-")
    assert make(tmp_path / "t.txt", tmp_path, folder, eod="<end>").eod == numbers["<end>"]
    with pytest.raises(ConfigError, match="has no token '<nope>', name one of its tokens by --eod"):
        make(tmp_path / "t.txt", tmp_path, folder, eod="<nope>")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<nope>"}')
    with pytest.raises(ConfigError, match="has no token '<nope>', which tokenizer_config.json names"):
        make(tmp_path / "t.txt", tmp_path, folder)
    for damaged in ("[]", "{", '{"eos_token": 3}'):
        (folder / "tokenizer_config.json").write_text(damaged)
        with pytest.raises(ConfigError, match="tokenizer_config.json' cannot be read"):
            make(tmp_path / "t.txt", tmp_path, folder)


def test_a_vocabulary_with_a_gap_and_one_without_an_unknown_token(tmp_path: Path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    (tmp_path / "t.txt").write_text("one")
    Tokenizer(WordLevel({"one": 0, "</s>": 1}, unk_token="</s>")).save(str(tmp_path / "gap.json"))
    saved = json.loads((tmp_path / "gap.json").read_text())
    saved["model"]["vocab"]["</s>"] = 2**31
    (tmp_path / "gap.json").write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match="gap.json' numbers its 2 tokens up to 2147483648.*stay below 4194304"):
        make(tmp_path / "t.txt", tmp_path, tmp_path / "gap.json")
    Tokenizer(WordLevel({"two": 0, "</s>": 1}, unk_token="[UNK]")).save(str(tmp_path / "nounk.json"))
    with pytest.raises(ConfigError, match="nounk.json' cannot encode the text .*UNK.*unknown token"):
        make(tmp_path / "t.txt", tmp_path, tmp_path / "nounk.json")
    assert list((tmp_path / "cache").iterdir()) == []
