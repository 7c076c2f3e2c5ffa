"""pyproject.toml's ranges and the pins the scripts install must agree, and leave a user's own torch alone."""

import datetime
import re
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import ds_plugin
from tests import wheel

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


def test_one_version_everywhere():
    """The package's, its metadata's, the citation's and the changelog's first release, which has a date."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert ds_plugin.__version__ == version
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    releases = re.findall(r"^## \[(.+?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    dated = [(name, rest) for name, rest in releases if name != "Unreleased"]
    assert dated[0][0] == version and datetime.date.fromisoformat(dated[0][1].removeprefix(" - "))


def test_gpu_extensions_are_never_required(requirements):
    assert not {"apex", "transformer-engine", "transformer_engine"} & set(requirements)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the sdist."""
    folder = tmp_path_factory.mktemp("built")
    return wheel.build(folder, "wheel"), wheel.build(folder, "sdist")


@pytest.mark.slow
def test_wheel_and_sdist_hold_cards_recipes_and_the_changelog(built):
    of_wheel, sdist = built
    inside = zipfile.ZipFile(of_wheel).namelist()
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
