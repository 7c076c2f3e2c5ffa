"""The check of a GPU where there is none: what it says is missing, how it judges, and what becomes of a part."""

import os
import signal
import subprocess
import sys
import time
import zipfile

import pytest

from tests import harness

MISSING = "no-such-package"


@pytest.fixture
def check():
    return harness.benchmark("gpu_check")


def script(*arguments, **env):
    command = ["bash", str(harness.ROOT / "launch_scripts" / "gpu_check.sh"), *map(str, arguments)]
    env = {**os.environ, **harness.RANK_ENV, "DS_PLUGIN_PYTHON": sys.executable, **env}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def test_without_a_gpu_it_says_so_before_anything_heavy_is_imported():
    done = script(PYTHONPROFILEIMPORTTIME="1")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and done.stdout == "" and errors[-1].startswith("error: no GPU: ")
    assert "CUDA_VISIBLE_DEVICES ''" in errors[-1] or "libcuda.so.1" in errors[-1]
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in imported and not {"torch", "deepspeed", "megatron.core", "numpy"} & imported


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dryrun"], "unrecognized arguments: --dryrun"),
        (["--wheels", "/no/such", "--dry-run"], "--wheels: /no/such is no folder; give the one that holds the wheels"),
    ],
)
def test_wrong_arguments(arguments, said):
    done = script(*arguments)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_an_interpreter_that_is_activated_is_found(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    done = script("--nope", DS_PLUGIN_PYTHON="", VIRTUAL_ENV=str(tmp_path))
    assert done.returncode == 2 and "unrecognized arguments: --nope" in done.stderr


def test_packages_are_missing_by_name(check, capsys, monkeypatch):
    monkeypatch.setattr(check, "PACKAGES", {"json": "json", MISSING: "no_such.package"})
    assert check.main(["--dry-run"]) == 2
    assert f"error: packages are missing: {MISSING}; install them, or give --wheels DIR" in capsys.readouterr().err


@pytest.mark.parametrize(("cuda", "said"), [(None, ["torch is built without CUDA"]), ("12.8", [])])
def test_a_torch_without_cuda(check, monkeypatch, cuda, said):
    monkeypatch.setattr(check, "_torch_cuda", lambda: cuda)
    monkeypatch.setattr(check, "_no_device", lambda: None)
    assert [line.split(";")[0] for line in check.missing(dry_run=False)] == said


def test_missing_packages_come_as_wheels(check, tmp_path, monkeypatch):
    """One that is there is installed; one that is not is named, beside pip's own message."""
    site, wheels = tmp_path / "site", tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_TARGET", str(site))
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(check, "PACKAGES", {"brought-along": "brought_along"})
    with pytest.raises(check.Unfit, match=f"pip could not install brought-along from {wheels}"):
        check.install(wheels)
    with zipfile.ZipFile(wheels / "brought_along-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("brought_along.py", "")
        info = "brought_along-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: brought-along\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    check.install(wheels)
    assert check.missing(dry_run=True) == []


# -- what becomes of a part ------------------------------------------------------------------------------------------


def figures(*found, then=None):
    def part():
        yield from found
        if then is not None:
            then()

    return part


def below_two(name, value):
    return {"value": value, "passed": value < 2}


@pytest.mark.parametrize(
    ("part", "status", "why", "kept"),
    [
        (figures(("a", 1)), "passed", None, ["a"]),
        (figures(("a", 1), ("b", 2)), "failed", "out of bounds: b", ["a", "b"]),
        (figures(("a", 1), then=lambda: 1 / 0), "failed", "ZeroDivisionError: division by zero", ["a"]),
        (figures(("a", 1), then=lambda: time.sleep(5)), "failed", "OverTime: took longer than its 0 s", ["a"]),
        (figures(("not run", "there is none")), "not run", "there is none", []),
    ],
)
def test_figures_until_an_error_are_kept(check, part, status, why, kept):
    handler = signal.getsignal(signal.SIGALRM)
    began = time.monotonic()
    record = check.ran(part, below_two, 0.2)
    assert record["status"] == status and record.get("error", record.get("reason")) == why
    assert list(record.get("figures", {})) == kept and time.monotonic() - began < 2
    assert signal.getsignal(signal.SIGALRM) is handler and signal.getitimer(signal.ITIMER_REAL)[0] == 0
