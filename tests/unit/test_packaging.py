"""setup.py's ranges and the pins the scripts install must agree, and leave a user's own torch alone."""

import re
import runpy
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def requirements(monkeypatch):
    kept = {}
    monkeypatch.setattr(setuptools, "setup", kept.update)
    runpy.run_path(str(ROOT / "setup.py"))
    lines = [*kept["install_requires"], *(line for extra in kept["extras_require"].values() for line in extra)]
    return {Requirement(line).name: Requirement(line) for line in lines}


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
