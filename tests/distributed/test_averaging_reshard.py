"""The window on another number of ranks or another ZeRO stage: bit for bit the snapshots that were taken."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ds_plugin
from ds_plugin.cli.main import main
from ds_plugin.core import seals
from ds_plugin.core.errors import CheckpointError, PluginError
from ds_plugin.deepspeed_engine import checkpoint
from ds_plugin.weight_averaging.state.files import shard_name
from tests.distributed import pipelined, plain
from tests.distributed.pipelined import Layout
from tests.harness import slow
from tests.reference import averaging as reference

SLIDING = {"enabled": True, "window": 3, "interval": 1}
# the averages lie in the folders that are converted, where the converter looks into every folder
BLOCK = {"enabled": True, "mode": "block", "window": 2, "interval": 1, "save_average": True}
EMA = {"enabled": True, "mode": "ema", "horizons": [2, 5], "interval": 1, "save_average": True}
UNIVERSAL = {"checkpoint": {"load_universal": True}}


def _config(zero, precision, section, universal=False):
    return plain.deepspeed_config(zero, precision, weight_averaging=section, **(UNIVERSAL if universal else {}))


def _low(tensors, precision):
    return {name: value.to(torch.float32 if precision == "fp32" else torch.bfloat16) for name, value in tensors.items()}


def _different(found, expected):
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def _average(engine):
    with ds_plugin.get_plugin(engine).averaged_weights():
        return reference.full_parameters(engine)


def _hop(folder, zero, precision, section, tag, steps, before=None):
    """Train and save under ``tag``; with ``before`` (what an earlier hop returned) from the universal checkpoint.

    Returns the gathered snapshots of all hops, and what was wrong: with the average right after the load, and then
    after ``steps`` more steps.
    """
    engine = plain.make(_config(zero, precision, section, universal=before is not None))
    plugin, held, wrong = ds_plugin.get_plugin(engine), [], []
    if before is not None:
        held = list(before["held"])
        assert engine.load_checkpoint(folder)[0] is not None
        wrong += _different(_average(engine), before["average"])
        for shards, pad in _padding(plugin.averager):
            assert not pad.any(), shards
    plain.train(engine, steps, lambda e: held.append(reference.full_masters(e)))
    expected = {
        "sliding": lambda: reference.mean(held[-3:]),
        "block": lambda: reference.last_block(held, 2),
        "ema": lambda: reference.ema(held, 2),
    }[plugin.averager.config.mode]()
    average = _average(engine)
    wrong += _different(average, _low(expected, precision))
    engine.save_checkpoint(folder, tag=tag)
    return {"held": held, "average": average, "wrong": wrong, "steps": list(plugin.averager.steps)}


def _padding(averager):
    """Of every shard: what no fragment covers, in every buffer."""
    covered = [torch.zeros(t.numel(), dtype=torch.bool) for t in averager.shards.tensors()]
    for f in averager.shards.fragments():
        covered[f.shard][f.offset : f.offset + f.count] = True
    for name, buffer in averager.mode.tensors().items():
        yield name, buffer.view(-1)[~covered[int(name.rpartition(".")[2])]]


def _convert(folder, tag):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = main(["to-universal", f"{folder}/{tag}", f"{folder}/{tag}_universal"])
    return code, printed.getvalue()


@pytest.mark.parametrize(
    ("zero", "precision", "section", "later"),
    [(1, "fp32", SLIDING, 2), slow(2, "bf16", BLOCK, 1), slow(3, "fp32", SLIDING, 3), (3, "bf16", EMA, 3)],
)
def test_two_hops_of_universal_checkpoints(workers, tmp_path, zero, precision, section, later):
    """2 ranks -> 3 -> 1, the last under another ZeRO stage where DeepSpeed can."""
    found, folder = None, str(tmp_path)
    for hop, (ranks, stage) in enumerate([(2, zero), (3, zero), (1, later)]):
        results = workers(ranks).run(_hop, folder, stage, precision, section, f"hop{hop}", 3 if hop == 0 else 1, found)
        assert all(result["wrong"] == [] for result in results), hop
        assert all(result["steps"] == results[0]["steps"] for result in results) and results[0]["steps"]
        found = results[0]
        if hop < 2:
            [(code, printed)] = workers(1).run(_convert, folder, f"hop{hop}")
            assert code == 0, printed
            taken = tmp_path / f"hop{hop}_universal" / shard_name(ranks - 1)
            assert taken.read_bytes() == (tmp_path / f"hop{hop}" / shard_name(ranks - 1)).read_bytes()
    assert len(found["held"]) == 5


def test_what_a_conversion_takes_along(tmp_path, monkeypatch):
    """Without DeepSpeed's part: the files of this save alone, copied where there are no hard links."""
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "ds_plugin.json").write_text(json.dumps({"world_size": 2, "state": {"weight_averaging": {}}}))
    for rank in (0, 2):  # the third is of an earlier save on three ranks
        (folder / shard_name(rank)).write_bytes(b"%d" % rank)
    with pytest.raises(CheckpointError, match="rank_00001.safetensors is missing"):
        checkpoint.to_universal(folder, tmp_path / "target")
    assert not (tmp_path / "target").exists()
    (folder / shard_name(1)).write_bytes(b"1")
    monkeypatch.setattr(ds_to_universal, "main", lambda args: None)
    checkpoint.to_universal(folder, tmp_path / "linked")
    assert (tmp_path / "linked" / shard_name(1)).samefile(folder / shard_name(1))
    monkeypatch.setattr(checkpoint.os, "link", lambda *a: (_ for _ in ()).throw(OSError))
    checkpoint.to_universal(folder, tmp_path / "copied")
    assert not (tmp_path / "copied" / shard_name(1)).samefile(folder / shard_name(1))
    for target in (tmp_path / "linked", tmp_path / "copied"):
        names = ["ds_plugin.json", shard_name(0), shard_name(1)]
        assert sorted(path.name for path in target.iterdir()) == sorted([*names, "ds_plugin_seal_00000.json"])
        assert seals.verify(target) == []
        assert all((target / name).read_bytes() == (folder / name).read_bytes() for name in names)


def _saved(folder, zero, section=SLIDING):
    engine = plain.make(_config(zero, "fp32", section))
    plain.train(engine, 3)
    engine.save_checkpoint(folder, tag="saved")
    ds_plugin.get_plugin(engine).sealer.wait()
    return _average(engine)


def _loaded(folder, zero, expected, section=SLIDING, **options):
    """What is wrong after an ordinary load, and the window's steps after two more optimizer steps."""
    engine = plain.make(_config(zero, "fp32", section))
    engine.load_checkpoint(folder, tag="saved", **options)
    wrong = _different(_average(engine), expected)
    plain.train(engine, 2)
    return wrong, list(ds_plugin.get_plugin(engine).averager.steps)


@pytest.mark.parametrize(
    ("saved", "loaded", "options"),
    [
        ((2, 0), (3, 0), {}),  # every rank holds all
        ((2, 1), (2, 2), {}),
        slow((2, 2), (3, 1), {"load_optimizer_states": False}),
    ],
)
def test_ordinary_checkpoints_where_deepspeed_loads_them(workers, tmp_path, saved, loaded, options):
    expected = workers(saved[0]).run(_saved, str(tmp_path), saved[1])[0]
    for wrong, steps in workers(loaded[0]).run(_loaded, str(tmp_path), loaded[1], expected, **options):
        assert wrong == [] and steps == [3, 4, 5]


def _refused(folder, cases):
    """What an engine of ZeRO 2 says to each damage, and whether its own window was left alone."""
    messages = {}
    for name, damage in cases.items():
        engine = plain.make(_config(2, "fp32", SLIDING))
        plain.train(engine, 1)
        target = Path(folder) / name
        if dist.get_rank() == 0:
            shutil.copytree(Path(folder) / "saved", target)
            damage(target)
        dist.barrier()
        try:
            engine.load_checkpoint(folder, tag=name, load_optimizer_states=False)
        except PluginError as error:
            messages[name] = f"{type(error).__name__} {error}"
        assert ds_plugin.get_plugin(engine).averager.steps == [1]  # it was looked at before anything was loaded
    return messages


def _missing(tag):
    (tag / shard_name(2)).unlink()


def _truncated(tag):
    path = tag / shard_name(2)
    path.write_bytes(path.read_bytes()[:-8])


def _altered(tag):
    path = tag / shard_name(2)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def _altered_layout(tag):
    path = tag / shard_name(1)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    header = json.loads(metadata["header"])
    header["fragments"][0][-1] += 1
    save_file(load_file(path), path, metadata={**metadata, "header": json.dumps(header)})


def _other_rank(tag):
    shutil.copy(tag / shard_name(0), tag / shard_name(1))


def _other_run(tag):
    shutil.copy(tag.parent / "other" / shard_name(1), tag / shard_name(1))


REFUSED = {
    "missing": (_missing, [shard_name(2), "missing", "no-verify"]),
    "truncated": (_truncated, [shard_name(2), "bytes", "no-verify"]),
    "altered": (_altered, [shard_name(2), "no-verify"]),
    "altered_layout": (_altered_layout, [shard_name(1), "no-verify"]),
    "other_rank": (_other_rank, [shard_name(1), "no-verify"]),
    "other_run": (_other_run, [shard_name(1), "no-verify"]),
}


def test_files_that_do_not_fit_end_all_ranks_alike(workers, tmp_path):
    workers(3).run(_saved, str(tmp_path), 1)
    (tmp_path / "saved").rename(tmp_path / "other")
    workers(3).run(_saved, str(tmp_path), 1)
    found = workers(2).run(_refused, str(tmp_path), {name: damage for name, (damage, _) in REFUSED.items()})
    assert found[0].keys() == REFUSED.keys()
    for messages in found:
        for name, (_, parts) in REFUSED.items():
            assert all(part in messages[name] for part in ["CheckpointError", *parts]), messages[name]
    seen = [{name: text.partition(" (seen on rank")[0] for name, text in messages.items()} for messages in found]
    assert seen[0] == seen[1]


# -- pipelines ---------------------------------------------------------------------------------------------------------

PIPELINE = Layout(pipe=2, data=2)


def _pipeline(layout, folder, steps, expected=None, size=None):
    """Save after ``steps``; or load, with the average that the earlier run had on each stage."""
    sections = {"weight_averaging": SLIDING, **({} if expected is None else UNIVERSAL)}
    engine = pipelined.make(layout, ds_plugin.initialize, 1, sections=sections, size=size)
    if expected is not None:
        try:
            engine.load_checkpoint(folder)
        except PluginError as error:
            return str(error)
        return _different(_average(engine), expected[engine.grid.get_stage_id()])
    pipelined.train(engine, steps)
    engine.save_checkpoint(folder, tag="saved")
    return engine.grid.get_stage_id(), _average(engine)


def test_each_stage_of_a_pipeline_reads_its_own(workers, tmp_path):
    expected = dict(workers(PIPELINE.ranks).run(_pipeline, PIPELINE, str(tmp_path), 2))
    assert len(expected) == 2 and not expected[0].keys() & expected[1].keys()
    [(code, printed)] = workers(1).run(_convert, str(tmp_path), "saved")
    assert code == 0, printed
    narrow = Layout(pipe=2)
    assert workers(2).run(_pipeline, narrow, str(tmp_path), 0, expected) == [[], []]
    first, second = workers(2).run(_pipeline, narrow, str(tmp_path), 0, expected, {"num_layers": 5})
    assert first == second and "parameter 5." in first and "absent" in first
    [message] = workers(1).run(_pipeline, Layout(), str(tmp_path), 0, {0: {**expected[0], **expected[1]}})
    assert "in none of" in message and "tensor and pipeline parallelism" in message
    manifest = tmp_path / "saved_universal" / "ds_plugin.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 1}))
    first, second = workers(2).run(_pipeline, narrow, str(tmp_path), 0, expected)
    assert first == second and "has format 1, this version reads 2" in first
