"""Seals of plain files; those of checkpoints: tests/distributed/test_seals.py."""

import json
import os
import shutil

import pytest

from ds_plugin.core import seals
from ds_plugin.core.errors import CheckpointError
from tests.damage import damages


def _checkpoint(root, step, of=2):
    """``of`` processes' files in two folders, sealed."""
    ours, theirs = root / "ours", root / "theirs"
    ours.mkdir(parents=True)
    (theirs / "deep").mkdir(parents=True)
    for rank in range(of):
        for path in (ours / f"state_{rank}", theirs / "deep" / f"weights_{rank}"):
            path.write_bytes(f"{step} {path.name}".encode() * 500)
    (ours / ".left.tmp").write_text("a killed writer's")
    (theirs / ".metadata").write_text(f"where each tensor of {step} is")  # of torch.distributed.checkpoint
    for rank in range(of):
        sealer = seals.Sealer(rank, of)
        sealer.open(ours)
        sealer.close(ours, [ours / "state_0", ours / "state_1", theirs], f"step {step}")
        sealer.wait()
    return ours


def test_no_damage_goes_unseen(tmp_path):
    _checkpoint(tmp_path / "other", 2)
    ours = _checkpoint(tmp_path / "whole", 1)
    seal, other = ours / "ds_plugin_seal_00000.json", ours / "ds_plugin_seal_00001.json"
    weights, index = (tmp_path / "whole" / "theirs" / name for name in ("deep/weights_1", ".metadata"))
    of_ours = [(path, ours / "state_1") for path in (ours / "state_0", weights, index)]
    for path, sibling in [*of_ours, (seal, other)]:
        whole = path.read_bytes()
        another = tmp_path / "other" / path.relative_to(tmp_path / "whole")
        for name, damage in damages(another, sibling).items():
            assert seals.verify(ours) == []
            damage(path)
            if (name, path) == ("deleted", seal):  # or the run was killed before it wrote one
                assert seals.verify(ours) == [f"{seal} is missing"]
            else:
                with pytest.raises(CheckpointError, match=f"{path.parent}.*no-verify"):
                    seals.verify(ours)
            path.write_bytes(whole)


def test_each_process_looks_at_its_share(tmp_path):
    ours = _checkpoint(tmp_path, 1)
    (ours / "state_0").write_bytes(b"")
    found = []
    for index in range(3):
        try:
            found.append(str(seals.verify(ours, index=index, of=3)))
        except CheckpointError:
            found.append("damaged")
    assert sorted(found) == ["[]", "[]", "damaged"]


def test_what_is_not_sealed_is_not_judged(tmp_path):
    assert seals.verify(tmp_path) == [f"{tmp_path} has no seals"]
    ours = _checkpoint(tmp_path, 1)
    (ours / "written later").write_text("by somebody")
    assert seals.verify(ours) == []


def test_a_save_breaks_the_seal_of_an_earlier_one_before_it_writes(tmp_path):
    ours = _checkpoint(tmp_path, 1, of=1)
    seals.Sealer(0, 1).open(ours)
    (ours / "state_0").write_text("half")
    assert seals.verify(ours) == [f"{ours} has no seals"]


def test_the_seals_of_a_save_of_more_processes_do_not_count(tmp_path):
    ours = _checkpoint(tmp_path, 1)
    sealer = seals.Sealer(0, 1)
    sealer.open(ours)
    (ours / "state_0").write_text("new")
    assert seals.verify(ours) == [f"{ours} has no seals"]  # killed before it is sealed
    sealer.close(ours, [ours / "state_0"], "later")
    sealer.wait()
    assert seals.verify(ours) == []


def test_a_checkpoint_removed_meanwhile_ends_in_a_warning(tmp_path, caplog):
    """A script may remove old checkpoints while they are hashed."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "large").write_bytes(bytes(64 << 20))
    sealer = seals.Sealer(0, 1)
    sealer.close(folder, [folder], "a")
    shutil.rmtree(folder)
    sealer.wait()
    assert not folder.exists() and "is not sealed" in caplog.text


@pytest.mark.parametrize("text", ["[" * 10_000, "[]", "{}", os.fsdecode(b"\xff"), json.dumps({"sha256": 1})])
def test_a_seal_that_is_none(tmp_path, text):
    (tmp_path / "ds_plugin_seal_00000.json").write_text(text, errors="surrogateescape")
    with pytest.raises(CheckpointError, match="damaged"):
        seals.verify(tmp_path)
