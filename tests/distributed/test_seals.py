"""Checkpoints with something wrong in them: every file of ours and of DeepSpeed's, and what a resume says."""

import re
import shutil

import pytest

import ds_plugin
from ds_plugin.core import seals
from ds_plugin.core.errors import CheckpointError
from tests.damage import damages
from tests.distributed import plain

SECTIONS = {
    "sequence_length_warmup": plain.WARMUP,
    "weight_averaging": {**plain.AVERAGING, "save_average": True},
}


def _saved(zero, folder):
    """Two checkpoints; their folders, sealed."""
    engine = plain.make(plain.deepspeed_config(zero, **SECTIONS))
    for tag in ("first", "second"):
        plain.train(engine, 4)
        engine.save_checkpoint(folder, tag=tag)
    ds_plugin.get_plugin(engine).sealer.wait()


def _sibling(path):
    """Another rank's file of the same kind."""
    swapped = re.sub(r"rank_(\d+)", lambda m: f"rank_{'1' if int(m[1]) == 0 else '0':0>{len(m[1])}}", path.name)
    swapped = re.sub(r"seal_0000(\d)", lambda m: f"seal_0000{1 - int(m[1])}", swapped)
    other = path.with_name(swapped)
    return other if other != path and other.is_file() else None


@pytest.mark.parametrize("zero", [1, 3])
def test_no_damage_to_any_file_goes_unseen(workers, tmp_path, zero, record_property):
    workers(2).run(_saved, zero, str(tmp_path))
    first, second = tmp_path / "first", tmp_path / "second"
    files = sorted(path for path in second.rglob("*") if path.is_file())
    kinds = {"ds_plugin.json", "weight_averaging_rank_00001.safetensors", "model.safetensors"}
    assert kinds < {path.name for path in files} and sum(path.suffix == ".pt" for path in files) >= 3
    tried = 0
    for path in files:
        whole = path.read_bytes()
        for name, damage in damages(first / path.relative_to(second), _sibling(path)).items():
            damage(path)
            if path.is_file() and path.read_bytes() == whole:
                continue  # equal in both: a tokenizer's, a config
            if name == "deleted" and "seal" in path.name:
                assert seals.verify(second) == [f"{path} is missing"]
            else:
                with pytest.raises(CheckpointError):
                    seals.verify(second)
            path.write_bytes(whole)
            tried += 1
    assert seals.verify(second) == [] and tried >= 5 * len(files)
    record_property("tried", tried)


def _resumes(zero, folder, of):
    """What an engine says to each damage of one of DeepSpeed's own files, and that it is as it was."""
    engine, said = plain.make(plain.deepspeed_config(zero, **SECTIONS)), {}
    before = plain.train(engine, 2)
    for name in of:
        try:
            engine.load_checkpoint(folder, tag=name)
        except CheckpointError as error:
            said[name] = str(error)
        assert engine.global_steps == 2
        assert ds_plugin.get_plugin(engine).ledger.read == 2 * 2 * plain.MICRO * plain.LENGTH
    after = plain.train(engine, 2)
    ds_plugin.get_plugin(engine).sealer.verify = False
    engine.load_checkpoint(folder, tag="unsealed")
    return said, before + after, engine.global_steps


@pytest.mark.parametrize("zero", [1, 3])
def test_a_resume_looks_before_it_loads(workers, tmp_path, zero, record_property):
    pool = workers(2)
    pool.run(_saved, zero, str(tmp_path))
    states = sorted(path.name for path in (tmp_path / "second").glob("*optim_states.pt"))
    wanted = {}
    for name in ("flipped", "halved", "deleted", "of another rank"):
        shutil.copytree(tmp_path / "second", tmp_path / name)
        path = tmp_path / name / states[0]
        damages(tmp_path / "first" / path.name, path.with_name(states[1]))[name](path)
        wanted[name] = str(path)
    shutil.copytree(tmp_path / "second", tmp_path / "unsealed")
    path = tmp_path / "unsealed" / "written later"
    path.write_text("by somebody")
    found = pool.run(_resumes, zero, str(tmp_path), list(wanted))
    undisturbed = pool.run(_resumes, zero, str(tmp_path), [])
    for (said, *rest), (nothing, *expected) in zip(found, undisturbed, strict=True):
        assert said.keys() == wanted.keys() and nothing == {} and rest == expected and rest[-1] == 8
        for name, path in wanted.items():
            assert path in said[name] and "no-verify" in said[name], said[name]
    record_property("tried", len(wanted))
