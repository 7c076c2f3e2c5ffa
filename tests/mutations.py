"""Breakages that the tests must notice: ``python tests/mutations.py [--baseline] [NAME...]``.

Each is one line of a method, written wrong, and the smallest selection of tests that has to turn red by it. It is made
in a copy of the tracked files, so the tree stays as it is. Ends with 1 unless every selection was red; with
``--baseline``, which breaks nothing, unless every one was green.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
GREEN, RED = 0, 1  # what pytest ends with; other codes say that the selection did not run
SECONDS = 120  # for each test; one that waits longer for the other ranks is red


class Mutation(NamedTuple):
    """``old``, which occurs once in ``file``, becomes ``new``; ``test`` is red then."""

    file: str
    old: str
    new: str
    test: str


_RULES, _TEST_RULES = "ds_plugin/completep/rules.py", "tests/unit/completep/test_rules.py"
_ENGINE, _AVERAGING = "ds_plugin/deepspeed_engine/engine.py", "ds_plugin/weight_averaging"
_WARMUP = "ds_plugin/sequence_length_warmup"
_UNIT, _RANKS = "tests/unit", "tests/distributed"

MUTATIONS = {
    # weight averaging
    "fence, engine": Mutation(
        _ENGINE,
        "compat.before_steps(self.engine, self.averager.before_step)",
        "contextlib.nullcontext()",
        f"{_RANKS}/test_averaging_storage.py::test_a_step_waits_for_the_last_snapshot_and_no_micro_batch_does[False]",
    ),
    "fence, pipeline": Mutation(
        _ENGINE,
        "undo.enter_context(compat.before_steps(",
        "compat.is_pipeline(self.engine) or undo.enter_context(compat.before_steps(",
        f"{_RANKS}/test_pipelined_averaging.py::test_a_batch_waits_for_the_copy_of_the_last_snapshot[1]",
    ),
    "fence, Megatron": Mutation(
        "megatron_patches/training_loop/core.py",
        "averager.before_step()",
        "pass",
        f"{_RANKS}/test_pretrain_megatron.py::test_a_step_waits_for_the_copy_of_the_last_snapshot",
    ),
    "snapshots of a spike": Mutation(
        f"{_AVERAGING}/spike.py",
        "averager.forget_from(self.since)",
        "pass",
        f"{_RANKS}/test_averaging_spikes.py::test_a_lasting_spike_is_undone",
    ),
    "divisor of the mean": Mutation(
        f"{_AVERAGING}/window.py",
        "np.divide(total, np.float32(count), out=out)",
        "np.divide(total, np.float32(count + 1), out=out)",
        f"{_UNIT}/weight_averaging/test_averager.py::test_the_window_slides_and_the_mean_is_bitwise",
    ),
    "order of the weights": Mutation(
        f"{_AVERAGING}/window.py",
        "return [float(i + 1) for i in range(count)]",
        "return [float(count - i) for i in range(count)]",
        f"{_UNIT}/weight_averaging/test_window.py::test_read_weights",
    ),
    "seal of a window's file": Mutation(
        f"{_AVERAGING}/state/files.py",
        'if found["header_sha256"] != _seal(found["header"]):',
        "if False:",
        f"{_UNIT}/weight_averaging/test_reshard.py::test_files_that_were_changed_are_named",
    ),
    "swap back after an evaluation": Mutation(
        f"{_AVERAGING}/averager.py",
        "Exchange(self.masters(), self._spare, scratch).forth()",
        "Exchange(self.masters(), self._spare, scratch).back()",
        f"{_UNIT}/weight_averaging/test_averager.py::test_weights_return_when_the_evaluation_fails",
    ),
    "a snapshot's device": Mutation(
        f"{_AVERAGING}/snapshots/stager.py",
        "initializer=streams.set_device_index,",
        "initializer=lambda device: None,",
        f"{_UNIT}/weight_averaging/test_stager.py::test_the_worker_says_which_device_is_its_own",
    ),
    # sequence length warmup
    "token ledger on a resume": Mutation(
        f"{_WARMUP}/ledger.py",
        'self.start_at(state["ledger"]["read"], state["ledger"]["trained"])',
        "self.start_at(0, 0)",
        f"{_RANKS}/test_warmup_carry.py::test_killed_and_resumed_it_trains_the_same[0-1]",
    ),
    "position ids after a cut": Mutation(
        f"{_WARMUP}/slicing.py",
        "torch.where(positions - positions[..., :1] == count, ",
        "torch.where(positions == count, ",
        f"{_UNIT}/sequence_length_warmup/test_batches.py::test_a_span_of_named_arguments",
    ),
    "order of carried tokens": Mutation(
        f"{_WARMUP}/carry.py",
        "self.open.append(",
        "self.open.appendleft(",
        f"{_UNIT}/sequence_length_warmup/test_carry.py::test_windows_take_turns_and_are_drained_at_full_length",
    ),
    "floor of the pacing": Mutation(
        f"{_WARMUP}/pacing.py",
        "lowest = -(-start // multiple_of) * multiple_of",
        "lowest = start // multiple_of * multiple_of",
        f"{_UNIT}/sequence_length_warmup/test_pacing.py::test_linear",
    ),
    "room for Adam's state": Mutation(
        "ds_plugin/core/full_length_pass.py",
        "for kind in kinds(each)]",
        "for kind in kinds(each)[:1]]",
        f"{_RANKS}/test_pretrain_megatron.py::test_the_preflights_room_is_the_optimizers_own",
    ),
    "an error of one rank": Mutation(
        "ds_plugin/core/errors.py",
        "if not failed:",
        "if caught is None:",
        f"{_RANKS}/test_warmup_preflight.py::test_what_one_rank_cannot_lengthen_for_the_preflight_is_said_on_all",
    ),
    # CompleteP
    "eps of a role": Mutation(_RULES, "math.sqrt(m_N * m_out) * m_L**alpha", "m_N", f"{_TEST_RULES}::test_table_1"),
    "residual multiplier": Mutation(
        _RULES,
        "return effective(recipe, ratios).m_L ** -ratios.alpha",
        "return 1.0",
        f"{_TEST_RULES}::test_forward_multipliers",
    ),
    "attention scale": Mutation(
        _RULES,
        "else math.sqrt(base_head_dim) / head_dim",
        "else 1 / math.sqrt(head_dim)",
        f"{_TEST_RULES}::test_forward_multipliers",
    ),
    "init of output projections": Mutation(
        "megatron_patches/completep/layers.py",
        'stds["output_layer_init_method"] = plain',
        "pass",
        f"{_RANKS}/test_completep.py::test_init",
    ),
    "fold factor under ZeRO 3": Mutation(
        "ds_plugin/deepspeed_engine/gradient_norm.py",
        "norm * factors[group_of[i]]",
        "norm",
        f"{_RANKS}/test_completep_deepspeed.py::test_folded_mode_clips_as_the_forward_mode_does[stage 3]",
    ),
}


def copied(root: Path, folder: Path) -> None:
    """Copy the tracked files of ``root``, as they are now."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)


def outcome(mutation: Mutation, *, broken: bool) -> int:
    """What pytest ends with on the mutation's selection, in a copy of the tree; what it said, if that is no result."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        folder = Path(name)
        copied(ROOT, folder)
        if broken:
            path = folder / mutation.file
            text = path.read_text("utf-8")
            if (count := text.count(mutation.old)) != 1:
                raise SystemExit(f"{mutation.file} has {mutation.old!r} {count} times; write what is there once")
            path.write_text(text.replace(mutation.old, mutation.new), "utf-8")
        pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--timeout={SECONDS}"]
        env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run([*pytest, mutation.test], cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode not in (GREEN, RED):
        print(done.stdout[-2000:], done.stderr[-2000:], file=sys.stderr)
    return done.returncode


def main() -> int:
    """Run what was asked for; 0 if all of it ended as it should."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all if none is given: {', '.join(MUTATIONS)}")
    parser.add_argument("--baseline", action="store_true", help="run the selections on the unbroken tree")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in MUTATIONS]:
        parser.error(f"no such breakage: {', '.join(unknown)}")
    expected, failed = GREEN if args.baseline else RED, []
    for name in args.names or MUTATIONS:
        start = time.monotonic()
        code = outcome(MUTATIONS[name], broken=not args.baseline)
        said = {GREEN: "green", RED: "red"}.get(code, f"did not run: {code}")
        print(f"{name:32} {said:8} {time.monotonic() - start:6.1f} s", flush=True)
        failed += [name] if code != expected else []
    if failed:
        print(f"not {'green' if args.baseline else 'red'}: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
