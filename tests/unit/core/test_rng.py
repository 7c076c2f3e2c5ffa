"""Random streams: what is drawn after a load is what would have been drawn after the save, bit for bit."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ds_plugin.core import rng
from ds_plugin.core.errors import CheckpointError


def draw() -> list:
    """Draws from every stream, Gaussian ones too: Python and NumPy keep a second Gaussian in store."""
    drawn = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *torch.rand(3).tolist()]
    if torch.cuda.is_available():
        drawn += torch.rand(3, device="cuda").tolist()
    return drawn


class FakeTracker:
    """Stands in for megatron-core's tracker, which needs a GPU to add a stream."""

    def __init__(self, states: dict):
        self.states = states

    def is_initialized(self) -> bool:
        return True

    def get_states(self) -> dict:
        return dict(self.states)

    def set_states(self, states: dict) -> None:
        self.states = states


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> FakeTracker:
    import megatron.core.tensor_parallel.random as module

    tracker = FakeTracker({"model-parallel-rng": torch.Generator().manual_seed(7).get_state()})
    monkeypatch.setattr(module, "_CUDA_RNG_STATE_TRACKER", tracker)
    monkeypatch.setattr(module, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True)
    return tracker


def test_round_trip(tmp_path: Path):
    draw()  # leaves a Gaussian in store in both Python and NumPy
    rng.save(tmp_path / "rank0.safetensors")
    expected = draw() + draw()
    assert draw() + draw() != expected
    rng.load(tmp_path / "rank0.safetensors")
    assert draw() + draw() == expected


def test_saving_draws_nothing(tmp_path: Path):
    before = rng.capture()
    rng.save(tmp_path / "x")
    after = rng.capture()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_save_load_save_gives_the_same_file(tmp_path: Path):
    rng.save(tmp_path / "a")
    draw()
    rng.load(tmp_path / "a")
    rng.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_states_are_plain_tensors():
    states = rng.capture()
    assert {"python", "numpy", "torch"} <= set(states)
    assert all(state.dtype == torch.uint8 and state.device.type == "cpu" for state in states.values())


def test_megatron_tracker(tmp_path: Path, tracker: FakeTracker):
    saved = tracker.states["model-parallel-rng"].clone()
    rng.save(tmp_path / "x")
    tracker.states["model-parallel-rng"] = torch.Generator().manual_seed(8).get_state()
    rng.load(tmp_path / "x")
    assert torch.equal(tracker.states["model-parallel-rng"], saved)


def test_graph_safe_tracker_keeps_its_generator(tmp_path: Path, tracker: FakeTracker):
    generator = torch.Generator().manual_seed(7)
    tracker.states = {"model-parallel-rng": generator}
    rng.save(tmp_path / "x")
    expected = torch.rand(4, generator=generator)
    rng.load(tmp_path / "x")
    assert tracker.states["model-parallel-rng"] is generator
    assert torch.equal(torch.rand(4, generator=generator), expected)


def test_no_tracker_is_set_up_by_looking():
    import megatron.core.tensor_parallel.random as module

    if module._CUDA_RNG_STATE_TRACKER_INITIALIZED:
        pytest.skip("something else in this process set one up")
    rng.capture()
    assert not module._CUDA_RNG_STATE_TRACKER_INITIALIZED


def test_without_megatron(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "megatron.core.tensor_parallel.random", raising=False)
    assert not any(name.startswith("megatron.") for name in rng.capture())


def test_other_streams_are_refused(tmp_path: Path, tracker: FakeTracker):
    rng.save(tmp_path / "x")
    tracker.states = {"another-rng": tracker.states["model-parallel-rng"]}
    with pytest.raises(CheckpointError, match="model-parallel-rng.*another-rng.*resume on the same kind"):
        rng.load(tmp_path / "x")


def test_missing_and_damaged_files(tmp_path: Path):
    with pytest.raises(CheckpointError, match="none' cannot be read"):
        rng.load(tmp_path / "none")
    rng.save(tmp_path / "x")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        rng.load(tmp_path / "x")


@pytest.mark.parametrize("name", ["python", "numpy", "torch"])
def test_damaged_state_changes_nothing(name: str):
    streams = rng.capture()
    draw()
    before = rng.capture()
    streams[name] = streams[name][:-100].clone()
    with pytest.raises(CheckpointError, match="is damaged"):
        rng.restore(streams)
    after = rng.capture()
    assert all(torch.equal(before[key], after[key]) for key in before)
