"""The check of a GPU in miniature: every part has a verdict, and a bound that is broken is an exit code."""

import json
import math
from types import SimpleNamespace

import pytest

from tests import harness


def _run(out, *names, limit=200.0):
    check, parts = harness.benchmark("gpu_check"), harness.benchmark("gpu_parts")
    for name in names and set(parts.PARTS) - set(names):
        del parts.PARTS[name]
    return check.main(["--dry-run", "--out", out], limit=limit)


def test_a_dry_run_has_a_verdict_on_every_part(workers, tmp_path):
    [code] = workers(1).run(_run, str(tmp_path / "new" / "found.json"))
    described = json.loads((tmp_path / "new" / "found.json").read_text())
    status = {name: part["status"] for name, part in described["parts"].items()}
    measured = ("precision", "zero", "memory", "snapshot", "completep", "warmup", "optimizer")
    expected = {**dict.fromkeys(measured, "passed"), "transformer_engine": "not run"}
    assert status == expected, [part.get("error") for part in described["parts"].values()]
    assert code == 0
    assert described["parts"]["transformer_engine"]["reason"].startswith("transformer_engine does not import: ")
    figures = {key: f for name in measured for key, f in described["parts"][name]["figures"].items()}
    assert all(math.isfinite(f["value"]) for f in figures.values() if not isinstance(f["value"], str))
    judged = {key for key, f in figures.items() if f["bound"]}
    on_a_gpu = {"is fused", "overhead at interval 100", "folded: time over unpatched"}
    on_a_gpu |= {"length 8, carry: time over DeepSpeed's"}
    assert on_a_gpu <= figures.keys() - judged
    assert {"fp16, stage 3: loss scale after over before", "stage 2: resumed, largest difference"} <= judged
    assert {"device memory, bytes", "stage 0: full-length pass over step"} <= judged
    assert described["parts"]["optimizer"]["figures"]["chosen"]["value"] == "torch.optim.adamw.AdamW"
    assert described["device"].startswith("cpu") and {"python", "torch", "deepspeed"} <= described["versions"].keys()
    assert described["seconds"] > 0 and {path.name for path in tmp_path.rglob("*.json")} == {"found.json"}


def _snapshot_of_an_overflow(out):
    """As if the averager were not told that a step was skipped."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    DeepSpeedEngine.was_step_applied = lambda engine: True
    return _run(out, "precision")


def test_what_is_broken_is_named_and_an_exit_code(workers, tmp_path):
    out = tmp_path / "found.json"
    assert workers(1).run(_snapshot_of_an_overflow, str(out)) == [1]
    [part] = json.loads(out.read_text())["parts"].values()
    assert part["status"] == "failed" and "out of bounds: fp16, stage 0: tokens trained by it" in part["error"]


def test_a_part_that_finds_no_time_says_so(workers, tmp_path):
    out = tmp_path / "found.json"
    assert workers(1).run(_run, str(out), "zero", limit=0.0) == [1]
    assert json.loads(out.read_text())["parts"] == {"zero": {"status": "not run", "reason": "no time was left"}}


# -- the arithmetic ---------------------------------------------------------------------------------------------------


def test_the_share_of_copies_under_kernels_by_hand():
    """SnapshotStager 0-4 and 6-8; kernels 1-3, 2-3.5 within and beside it, 7-9: (2.5 + 1) of 6."""
    parts = harness.benchmark("gpu_parts")
    assert parts.under([(0, 4), (6, 8)], [(7, 9), (1, 3), (2, 3.5)]) == 3.5 / 6
    assert parts.under([(0, 4)], []) == 0


def test_spans_of_a_trace_by_hand():
    parts = harness.benchmark("gpu_parts")
    events = [
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pinned)", "ts": 2e6, "dur": 5e5},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pageable -> Device)", "ts": 0, "dur": 1},
        {"cat": "kernel", "name": "gemm", "ts": 1e6, "dur": 1e6},
        {"cat": "gpu_user_annotation", "name": "Optimizer.step", "ts": 0, "dur": 9e6},
        {"name": "process_name", "ph": "M"},
    ]
    assert parts.spans({"traceEvents": events}) == ([(2.0, 2.5)], [(1.0, 2.0)])


@pytest.mark.parametrize(
    ("value", "bound", "passed"),
    [(1.02, [0.98, 1.02], True), (0.97, [0.98, 1.02], False), (math.nan, [0.98, 1.02], False), (7, [1, None], True)],
)
def test_verdicts_by_hand(value, bound, passed):
    check = harness.benchmark("gpu_check")
    limits = tuple(math.inf if limit is None else limit for limit in bound)
    found = check.judged(value, limits)
    assert found.pop("value") is value and found == {"bound": bound, "passed": passed}
    assert check.judged(value, None) == check.judged(value) and check.judged(value)["bound"] is None


def test_times_are_judged_on_a_gpu_only():
    bound = harness.benchmark("gpu_parts").Rig.on_a_gpu
    assert bound(SimpleNamespace(dry_run=False), 0, 1.01) == (0, 1.01)
    assert bound(SimpleNamespace(dry_run=True), 0, 1.01) is None
