"""pyproject.toml's ranges and the pins the scripts install must agree, and leave a user's own torch alone."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.unit import test_readme

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    found = {Requirement(line).name: Requirement(line) for line in lines}
    return {name: requirement for name, requirement in found.items() if name != "ds-plugin"}  # extras of extras


def pins(python):
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), line
            found[requirement.name.lower()] = str(requirement.specifier).removeprefix("==")
    return found


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_requirement_is_pinned_within_its_range(requirements, python):
    pinned = pins(python)
    for name, requirement in requirements.items():
        assert pinned[name.lower()] in requirement.specifier, name


def test_tested_torch_versions_are_not_replaced(requirements):
    assert all(version in requirements["torch"].specifier for version in ("2.11.0", "2.13.0", "2.13.0+cpu"))


def test_gpu_extensions_are_never_required(requirements):
    assert not {"apex", "transformer-engine", "transformer_engine"} & set(requirements)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the sdist, built from what is committed or would be."""
    folder = tmp_path_factory.mktemp("built")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    made = []
    for kind in ("wheel", "sdist"):  # each in a process of its own, as pip and build do it
        code = f"import sys, setuptools.build_meta as b; print(b.build_{kind}(sys.argv[1]))"
        command = [sys.executable, "-c", code, str(folder)]
        done = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True, check=True)
        made.append(folder / done.stdout.splitlines()[-1])
    wheel, sdist = made
    return wheel, sdist


@pytest.mark.slow
def test_wheel_and_sdist_hold_cards_recipes_and_the_changelog(built):
    wheel, sdist = built
    inside = zipfile.ZipFile(wheel).namelist()
    share = "ds_plugin-0.1.0.data/data/share/ds-plugin"
    cards = [path for top in ("ds_plugin", "megatron_patches") for path in (ROOT / top).rglob("*.md")]
    expected = [path.relative_to(ROOT).as_posix() for path in cards]
    assert len(expected) >= 3
    expected += [f"{share}/configs/{path.name}" for path in (ROOT / "configs").iterdir()]
    expected += [f"{share}/CHANGELOG.md", "ds_plugin/py.typed", "megatron_patches/py.typed"]
    assert set(expected) <= set(inside)
    assert not [name for name in inside if name.startswith(("tests", "launch_scripts", "benchmarks"))]
    packed = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    assert {"CHANGELOG.md", "configs/quickstart.json", "launch_scripts/pretrain_gpt.py", "LICENSE"} <= packed


@pytest.mark.slow
def test_the_wheel_runs_where_the_repository_is_not(built, tmp_path):
    """README's blocks and the command on what pip installs from the wheel; other packages are this environment's."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--quiet"]
    subprocess.run([*pip, "--target", str(tmp_path / "site"), str(built[0])], check=True)
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text())
    said = test_readme.run_blocks(tmp_path, tmp_path / "site")
    assert said[-2:] == ["evaluated True [1, 2]", "active True"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, str(tmp_path / "site" / "bin" / "ds-plugin"), "env"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "active patches" in done.stdout, done.stderr
