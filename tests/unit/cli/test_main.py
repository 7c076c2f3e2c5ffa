"""The `ds-plugin` command: whose script is run, and errors in one line."""

import json

import pytest

from ds_plugin.cli.main import framework_of, main
from ds_plugin.sweeps import builders, coord_check
from ds_plugin.sweeps.coord_check import LAST_BLOCK, Row
from ds_plugin.sweeps.records import read_records, write_records
from megatron_patches.training_loop import script


@pytest.fixture
def started(monkeypatch):
    """What would have been run by Megatron-LM's door."""
    given = []
    monkeypatch.setattr(script, "run", lambda arguments: given.append(arguments) or 0)
    return given


@pytest.mark.parametrize("line", ["import megatron.core", "from megatron.training import pretrain"])
def test_a_megatron_script_is_told_by_its_imports(tmp_path, started, line):
    path = tmp_path / "train.py"
    path.write_text(f"def main():\n    {line}\n")
    assert main(["run", "--config", "methods.json", str(path), "--lr", "1", "--help"]) == 0
    assert started == [[str(path), "--lr", "1", "--help", "--ds-plugin-config", "methods.json"]]


@pytest.mark.parametrize("line", ["import megatron.bridge", "from megatron.bridge.training.pretrain import pretrain"])
def test_a_script_of_megatron_bridges_is_told_from_megatron_lms(tmp_path, monkeypatch, started, line):
    from megatron_patches.bridge import script as of_bridge

    given = []
    monkeypatch.setattr(of_bridge, "run", lambda arguments: given.append(arguments) or 0)
    path = tmp_path / "train.py"
    path.write_text(f"import megatron.core\n{line}\nfrom megatron import core\n")
    assert main(["run", str(path), "--lr", "1"]) == 0
    assert given == [[str(path), "--lr", "1"]] and not started
    path.write_text("from megatron import bridge\n")
    assert framework_of(path) == "megatron-bridge"


def test_whose_script_it_is_can_be_said(tmp_path, started):
    path = tmp_path / "train.py"
    path.write_text("from mine import train\n")
    assert main(["run", "--framework", "megatron", str(path)]) == 0
    assert started == [[str(path)]]


def test_a_hugging_face_script_or_module_is_run_with_its_arguments(tmp_path, monkeypatch):
    from ds_plugin.huggingface import script as of_huggingface

    given = []
    monkeypatch.setattr(of_huggingface, "run", lambda *args, **settings: given.append((*args, settings)) or 0)
    path = tmp_path / "train.py"
    path.write_text("from trl import SFTTrainer\n")
    assert main(["run", "--config", "methods.json", str(path), "--lr", "1", "--help"]) == 0
    assert main(["run", "-m", "axolotl.cli.train", "config.yml"]) == 0
    assert given == [
        (str(path), ["--lr", "1", "--help"], {"config": "methods.json", "module": False}),
        ("axolotl.cli.train", ["config.yml"], {"config": None, "module": True}),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read as a Python script: [Errno 2]"),
        ("def", "cannot be read as a Python script: invalid syntax"),
        ("import deepspeed", "ds_plugin.initialize"),
        ("import torch", "--framework megatron-bridge or megatron or huggingface"),
    ],
)
def test_what_cannot_be_run_is_one_error(tmp_path, capsys, started, text, said):
    path = tmp_path / "train.py"
    if text is not None:
        path.write_text(text)
    assert main(["run", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: run: ") and said in error and error.count("\n") == 1
    assert not started


@pytest.mark.parametrize("error", [FileNotFoundError("its data"), KeyboardInterrupt()])
def test_an_error_of_the_script_s_own_keeps_its_traceback(tmp_path, monkeypatch, error):
    from ds_plugin.huggingface import script as of_huggingface

    def train(*args, **settings):
        raise error

    monkeypatch.setattr(of_huggingface, "run", train)
    path = tmp_path / "train.py"
    path.write_text("import trl\n")
    with pytest.raises(type(error)):
        main(["run", str(path)])


def test_a_relative_import_names_no_framework(tmp_path):
    path = tmp_path / "train.py"
    path.write_text("from .megatron import train\nimport megatron.core\n")
    assert framework_of(path) == "megatron"
    path.write_text("from . import megatron\n")
    with pytest.raises(Exception, match="imports no framework"):
        framework_of(path)


def test_every_command_describes_itself(capsys):
    for command in ("run", "plan", "rules", "coord-check", "lr-transfer", "tune-warmup", "merge", "to-universal"):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0 and f"ds-plugin {command}" in capsys.readouterr().out


def test_the_json_is_given_by_config(tmp_path, capsys):
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"steps_per_print": 1}))
    assert main(["translate-config", "--config", str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == {"steps_per_print": 1}


WHOLE, FINITE = "is not a whole number from 1 to 2147483647", "is not a finite number above 0"
PLAN, CHECK = "plan --config recipe.json --world-size 8", "coord-check --out out"
TUNE, TRANSFER = "tune-warmup --script {file} --config {file}", "lr-transfer --out out"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "COMMAND"),
        ("plann", "invalid choice: 'plann'"),
        ("plan --config recipe.json", "--world-size"),
        *[(f"plan --config recipe.json --world-size {n}", f"{n} {WHOLE}") for n in ("0", "-8", "8.0", "1" + "0" * 400)],
        *[(f"{PLAN} {flag} 0", f"argument {flag}: 0 {WHOLE}") for flag in ("--ranks-per-node", "--vocab-size")],
        *[(f"{PLAN} --link {rate}", f"argument --link: {rate} {FINITE}") for rate in ("0", "-1", "nan", "inf", "fast")],
        (f"{PLAN} --flops 0", FINITE),
        (f"{PLAN} --json {{folder}}", "is not a file in a folder that exists"),
        (PLAN, "recipe.json"),
        *[(f"{CHECK} --{name} 0", f"--{name}: 0 {WHOLE}") for name in ("seeds", "steps", "widths", "head-dim")],
        *[(f"{CHECK} --lr {rate}", f"argument --lr: {rate} {FINITE}") for rate in ("-0.1", "nan", "inf")],
        (f"{CHECK} --init-std nan", FINITE),
        (f"{CHECK} --widths 64,,128", WHOLE),
        (f"{CHECK} --at-most 1", "is not a finite number above 1"),
        (f"{CHECK} --hf nowhere", "nowhere is no file or folder"),
        (f"{CHECK} --hf {{file}} --builder a:b", "not allowed with argument --hf"),
        *[
            (f"{CHECK} --builder {name}", f"--builder: {name}: ")
            for name in ("json:nothing", "nowhere:f", "json", "json:__name__")
        ],
        (f"{CHECK} --recipes mup,mupp", "mupp is not one of completep, mup"),
        (f"{CHECK} --alpha 3", "completep.alpha"),
        (f"{CHECK} --base-width 60", "width 60 is not divisible by --head-dim 16"),
        *[(f"{CHECK} --experts {mix}", f"{mix} is not EXPERTS:ACT") for mix in ("8", "8:1", "2:3", "8:2:0", "8:2:1/0")],
        (f"{CHECK} --experts 8:2:5/3", "moe_ffn_hidden_size is 5/3 of width 64, which is no whole number"),
        (f"{CHECK} --moe mue", "--moe: there are no experts"),
        (f"{CHECK} --experts 8:2 --builder a:b", "--experts: of Megatron's GPT alone"),
        ("coord-check --out {file}", "a file is in its place"),
        *[(f"{TRANSFER} --shapes {text}", f"{text} is not WIDTHxDEPTH") for text in ("64", "0x2", "64x2x2", "64xx")],
        (f"{TRANSFER} --shapes 64x2,64x2:8:2", "--shapes: one has experts; give the base's"),
        (f"{TRANSFER} --exponents=-2000", "-2000 is not a whole number from -100 to 20"),
        (f"{TRANSFER} --workers 0", WHOLE),
        (f"{TRANSFER} --data {{file}}", "holds 3 tokens of text where 130 are needed"),
        (f"{TRANSFER} --data nowhere", "'nowhere' holds 0 tokens"),
        (TUNE, "--durations"),
        (f"{TUNE} --durations 0,5", "0 is not a whole number from 1 to 10**15"),
        (f"{TUNE} --durations 5 --threshold inf", "is not a finite number above 1"),
        (f"{TUNE} --durations 5 --steps 0", WHOLE),
        ("tune-warmup --script nowhere --config {file} --durations 5", "nowhere is not a file that exists"),
        ("merge a b --out out --workers 0", WHOLE),
        ("merge a b --out out --shard-gb nan", FINITE),
    ],
)
def test_what_cannot_be_meant_is_one_error_and_exit_code_2(tmp_path, monkeypatch, capsys, line, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("abc")
    assert main(line.format(file=tmp_path / "file", folder=tmp_path).split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # nothing was begun


def test_an_interrupted_coordinate_check_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    def measure(builder, shape, base, *, seed, steps, lr):
        if shape.depth == 4 and not whole:
            raise KeyboardInterrupt
        measured.append(shape.depth)
        return [Row(shape.recipe, shape.width, shape.depth, seed, step, LAST_BLOCK, lr) for step in range(steps)]

    whole, measured = [], []
    monkeypatch.setattr(builders, "start_megatron", lambda: None)
    monkeypatch.setattr(coord_check, "measure", measure)
    given = ["--widths", "64", "--depths", "2,4", "--recipes", "mup", "--seeds", "1", "--steps", "3", "--lr", "0.5"]
    assert main(["coord-check", *given, "--out", str(tmp_path / "new" / "out")]) == 130
    path = tmp_path / "new" / "out" / "coord_check.csv"
    rows = read_records(Row, path)
    assert rows == [Row("mup", 64, 2, 1, step, LAST_BLOCK, 0.5) for step in range(3)]
    assert capsys.readouterr().err.startswith("interrupted: ")
    # the same command goes on; the threshold is of the spread over all
    whole.append(True)
    given += ["--out", str(tmp_path / "new" / "out"), "--at-most"]
    assert main(["coord-check", *given, "1.5"]) == 0 and measured == [2, 4]
    rows = [Row(**{**vars(row), "change": row.change * row.depth}) for row in read_records(Row, path)]
    write_records(Row, rows, path)
    assert main(["coord-check", *given, "1.5"]) == 1 and measured == [2, 4]
    assert "mup: the last block's spread 2x is above --at-most 1.5" in capsys.readouterr().out
    assert main(["coord-check", *given, "1.5", "--lr", "0.25"]) == 2
