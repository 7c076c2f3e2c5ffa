"""The examples, run as they are: each makes its data itself, trains, and leaves an average that can be loaded."""

import contextlib
import io
import runpy
import sys

import pytest
from safetensors import safe_open

from tests.harness import ROOT, slow
from tests.hugging_face import let_through

EXAMPLES = ROOT / "launch_scripts" / "examples"


def _run(name, folder, steps):
    """What it prints, twice: the second run goes on where the first has ended."""
    printed = []
    for until in steps:
        let_through()
        sys.argv = [name, "--steps", str(until), "--out", str(folder)]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            if name == "sft.py":
                from ds_plugin.huggingface import script

                assert script.run(str(EXAMPLES / name), sys.argv[1:]) == 0
            else:
                runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        printed.append(out.getvalue())
    return printed


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nano_loop.py", "step 20, length 128"),
        ("accelerate_loop.py", "held out: "),
        slow("trainer.py", "averaged model of "),
        slow("sft.py", ""),
    ],
)
def test_an_example_trains_resumes_and_leaves_an_average(workers, tmp_path, name, said):
    if name == "sft.py":
        pytest.importorskip("trl", reason="trl is not installed")
    steps = {"nano_loop.py": (10, 20), "accelerate_loop.py": (20, 22), "trainer.py": (20, 22), "sft.py": (10,)}[name]
    printed = workers(1).run(_run, name, tmp_path / "out", steps, timeout=300)[0]
    assert said in printed[-1]
    with safe_open(tmp_path / "out" / "averaged" / "model.safetensors", "pt") as file:
        assert len(list(file.keys())) > 10
    assert len((EXAMPLES / name).read_text().splitlines()) <= 80
