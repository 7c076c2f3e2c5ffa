"""Checkpoints for the tests of merging."""

import pytest

from tests.unit.weight_averaging.folders import weights_of, write


@pytest.fixture
def checkpoints(tmp_path):
    return [write(tmp_path / f"step{seed}", weights_of(seed)) for seed in (1, 2, 3)]
