"""The stability instruments under every layout against gathering everything; what they cost between two reports."""

import collections
import contextlib
import json

import deepspeed
import numpy as np
import pytest
import torch
import torch.distributed as dist

from ds_plugin.core import loss_statistics
from ds_plugin.core.errors import StateError
from ds_plugin.core.loss_statistics import StabilityMonitor, adam_variance
from ds_plugin.core.patch import replaced
from ds_plugin.deepspeed_engine.readings import EngineReadings
from tests.distributed import plain
from tests.harness import slow
from tests.reference import stability as reference

ACCUMULATION = 2


def make(zero, precision="fp32", extra=None, **sections):
    config = plain.deepspeed_config(zero, precision, ACCUMULATION, **sections)
    config["zero_optimization"].update(extra or {})
    config["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW: DeepSpeed's own for CPUs would have to be compiled
    return plain.make(config)


def train(engine, monitor, steps, after_step=None):
    """As `plain.train`, with the monitor called as the plugin calls it; (micro-batches' losses, reports)."""
    losses, reports = [], []
    for _ in range(steps):
        index = engine.global_steps * ACCUMULATION
        for micro in range(ACCUMULATION):
            loss = engine(*plain.micro_batch(index + micro))
            monitor.record(loss)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        reports.append(monitor.close_step())
        if after_step is not None:
            after_step(engine)
    return losses, reports


def _against_gathered(zero, precision, extra, sections):
    engine = make(zero, precision, extra, **sections)
    monitor, expected = StabilityMonitor(EngineReadings(engine), 3, variance=True), []
    before = adam_variance(EngineReadings(engine))
    before = before and [value.item() for value in before]

    def after_step(engine):
        expected.append(reference.variance(reference.full_variances(engine).values()))

    losses, reports = train(engine, monitor, 8, after_step)
    reports.append(monitor.report())  # the steps 7 and 8
    return {
        "before": before,
        "wrapper": type(engine.optimizer).__name__,
        "losses": reference.mean_losses(losses, ACCUMULATION),
        "variances": expected,
        "reports": reports,
        "summary": monitor.summary(),
        "nothing": monitor.report(),
    }


LAYOUTS = [
    # ranks, stage, precision, more of zero_optimization, more of the JSON
    slow(1, 0, "fp32", {}, {}),
    slow(3, 0, "fp32", {}, {}),
    (3, 1, "fp32", {}, {}),
    slow(3, 2, "fp32", {}, {}),
    slow(3, 3, "fp32", {}, {}),
    (2, 3, "fp32", {"sub_group_size": 300}, {}),
    (2, 0, "bf16", {}, {}),
    slow(2, 1, "bf16", {}, {}),
    slow(2, 2, "bf16", {}, {}),
    slow(3, 3, "bf16", {}, {}),
    (2, 1, "bf16", {}, {"data_types": {"grad_accum_dtype": "fp32"}}),  # BF16_Optimizer
    (2, 2, "fp32", {"offload_optimizer": {"device": "cpu"}}, {}),
    slow(2, 3, "bf16", {"offload_optimizer": {"device": "cpu"}}, {}),
]


@pytest.mark.parametrize(("ranks", "zero", "precision", "extra", "sections"), LAYOUTS)
def test_equals_the_gathered_state(workers, ranks, zero, precision, extra, sections):
    results = workers(ranks).run(_against_gathered, zero, precision, extra, sections)
    for found in results:
        reports, ratios = found["reports"], reference.ratios(found["losses"])
        ratios = [None, *(pytest.approx(ratio, rel=1e-12) for ratio in ratios)]
        assert [i for i, report in enumerate(reports) if report] == [2, 5, 8]
        for report, step, first in zip((reports[2], reports[5], reports[8]), (3, 6, 8), (1, 3, 6), strict=True):
            assert report.step == step
            assert report.loss_ratio == ratios[step - 1]
            assert report.max_loss_ratio == max(ratio.expected for ratio in ratios[first:step])
            l1, maximum = found["variances"][step - 1]
            assert report.variance_l1 == pytest.approx(l1, rel=1e-6) and l1 > 0
            assert report.variance_max == pytest.approx(maximum, rel=1e-6)
        # FP16_UnfusedOptimizer takes a step on zeros when it is built
        assert found["before"] == ([0, 0] if found["wrapper"] == "FP16_UnfusedOptimizer" else None)
        assert found["nothing"] is None  # no step was closed since the report before
        _check_summary(found["summary"], [reports[i] for i in (2, 5, 8)], ratios[1:])
        assert (found["reports"], found["summary"]) == (results[0]["reports"], results[0]["summary"])  # on all ranks
    assert (results[0]["wrapper"] == "BF16_Optimizer") == bool(sections)


def _check_summary(summary, reports, ratios):
    ratios = [ratio.expected for ratio in ratios]
    assert summary["steps_above_1.2"] == sum(ratio > 1.2 for ratio in ratios)
    assert summary["steps_above_1.5"] == sum(ratio > 1.5 for ratio in ratios)
    assert summary["max_loss_ratio"] == pytest.approx(max(ratios), rel=1e-12)
    x = [report.loss_ratio for report in reports]
    for name in ("variance_l1", "variance_max"):
        y = [getattr(report, name) for report in reports]
        assert summary[f"pearson_{name}"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)


def _against_one_process(zero):
    """The whole batch in one process with torch's own AdamW, every step."""
    engine = make(zero)
    torch.manual_seed(7)
    twin = plain.TinyLM()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1)
    monitor, reports, expected, losses = StabilityMonitor(EngineReadings(engine), 1, variance=True), [], [], []
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = engine.get_lr()[0]
        reports += train(engine, monitor, 1)[1]
        batches = [
            plain.micro_batch(ACCUMULATION * step + micro, rank)
            for micro in range(ACCUMULATION)
            for rank in range(dist.get_world_size())
        ]
        loss = twin(*(torch.cat(tensors) for tensors in zip(*batches, strict=True)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        expected.append(reference.variance([state["exp_avg_sq"] for state in optimizer.state.values()]))
    return losses, expected, reports


@pytest.mark.parametrize("zero", [0, slow(1), slow(2), 3])
def test_equals_one_process(workers, zero):
    for losses, expected, reports in workers(2).run(_against_one_process, zero):
        assert [report.loss_ratio for report in reports[1:]] == pytest.approx(reference.ratios(losses), rel=1e-4)
        assert [report.variance_l1 for report in reports] == pytest.approx([l1 for l1, _ in expected], rel=1e-3)
        assert [report.variance_max for report in reports] == pytest.approx([top for _, top in expected], rel=1e-3)


# -- what it costs -----------------------------------------------------------------------------------------------------

SYNCS = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "to", "nonzero")
COLLECTIVES = [
    name
    for name in dir(dist)
    if name.startswith(
        ("all_", "reduce", "broadcast", "gather", "scatter", "barrier", "send", "recv", "isend", "irecv")
    )
    and callable(getattr(dist, name))
]


@contextlib.contextmanager
def counted():
    """How often a tensor was read by the CPU, and a collective started."""
    syncs, collectives = collections.Counter(), collections.Counter()

    def count(counter, name, function):
        def counting(*args, **kwargs):
            counter[name] += 1
            return function(*args, **kwargs)

        return counting

    with pytest.MonkeyPatch.context() as patch:
        for name in SYNCS:
            patch.setattr(torch.Tensor, name, count(syncs, name, getattr(torch.Tensor, name)))
        for name in COLLECTIVES:
            patch.setattr(dist, name, count(collectives, name, getattr(dist, name)))
        yield syncs, collectives


def _cost(zero, variance):
    engine = make(zero)
    monitor = StabilityMonitor(EngineReadings(engine), 4, lambda: {"length": 16}, variance=variance)
    train(engine, monitor, 4)  # Adam has a state
    loss, between, at_report = torch.ones((), requires_grad=True), [], []
    for step in range(8):
        with counted() as counts:
            monitor.record(loss)
            monitor.record(loss.bfloat16().expand(3, 2))
            report = monitor.close_step()
        (at_report if report else between).append(tuple(dict(c) for c in counts))
        assert (report is not None) == (step in (3, 7))
    return between, at_report


def _elements(variance):
    engine = make(1)
    monitor = StabilityMonitor(EngineReadings(engine), 4, lambda: {"length": 16}, variance=variance)
    train(engine, monitor, 3)
    return plain.collectives(lambda: monitor.close_step())


def test_a_report_without_variance_exchanges_none(workers):
    """4 sums, squares, counts of finite ones and of all; step and length; two more for the variance. In and out."""
    for variance, numbers in ((False, 4 * 4 + 2), (True, 4 * 4 + 4)):
        for found in workers(1).run(_elements, variance):
            assert [elements for _, elements in found] == [2 * numbers], found


@pytest.mark.parametrize(("zero", "variance"), [slow(0, True), slow(2, True), (3, True), (2, False)])
def test_one_collective_and_one_read_per_interval(workers, zero, variance):
    for between, at_report in workers(2).run(_cost, zero, variance):
        assert between == [({}, {})] * 6
        for syncs, collectives in at_report:
            assert collectives == {"all_gather_into_tensor": 1}
            moved = syncs.pop("to", 0)  # Adam's sums to the device of the engine: from the device it is on already
            assert bool(moved) == variance
            assert syncs == {"cpu": 1, "numpy": 1}  # the table, and the same memory as an array


# -- ranks that differ -------------------------------------------------------------------------------------------------


def _disagree(name):
    engine = make(1)
    numbers = {"length": 16, "tokens": 157_300_000_001}  # in float32 both token counts below are the same
    monitor = StabilityMonitor(EngineReadings(engine), 2, lambda: numbers)
    train(engine, monitor, 3)
    if dist.get_rank() == 2:
        numbers["length"] -= name == "length"
        numbers["tokens"] += name == "tokens"
        engine.global_steps += name == "step"
    with pytest.raises(StateError) as caught:
        monitor.close_step()
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "values"), [("length", (15, 16)), ("tokens", (157_300_000_002, 157_300_000_001)), ("step", (4, 3))]
)
def test_every_rank_raises_when_one_differs(workers, name, values):
    messages = workers(3).run(_disagree, name)
    assert len(set(messages)) == 1
    assert f"{name} is {values[0]} on rank 2 and {values[1]} on rank 0" in messages[0]


# -- losses that are missing -------------------------------------------------------------------------------------------


def _missing_losses():
    """Rank 1 computes no loss, as an earlier pipeline stage; in steps 3 and 4 nobody records one."""
    engine = make(1)
    monitor, reports = StabilityMonitor(EngineReadings(engine), 2, variance=True), []
    for step, value in enumerate([4.0, 6.0, None, None, 2.0, 5.0], start=1):
        if value is not None and dist.get_rank() == 0:
            for micro in range(ACCUMULATION):
                monitor.record(torch.full((2, 3), value + micro - 0.5))
        engine.global_steps = step
        reports.append(monitor.close_step())
    return reports, monitor.summary()


def test_losses_that_nobody_records_have_no_ratio(workers):
    for reports, summary in workers(2).run(_missing_losses):
        assert [(r.step, r.loss_ratio, r.max_loss_ratio) for r in reports if r] == [
            (2, 1.5, 1.5),
            (4, None, None),
            (6, 2.5, 2.5),
        ]
        assert all(r.variance_l1 is None and r.variance_max is None for r in reports if r)  # no step was taken
        assert summary == {
            "steps_above_1.2": 2,
            "steps_above_1.5": 1,
            "max_loss_ratio": 2.5,
            "pearson_variance_l1": None,
            "pearson_variance_max": None,
        }


def _one_nan():
    """One element of one rank's state is not finite."""
    engine = make(1)
    monitor = StabilityMonitor(EngineReadings(engine), 2, variance=True)
    train(engine, monitor, 2)
    if dist.get_rank() == 1:
        next(iter(engine.optimizer.state.values()))["exp_avg_sq"][0] = float("nan")
    for _ in range(2):
        monitor.record(torch.tensor(1.0))
        report = monitor.close_step()
    return repr(report)


def test_what_is_not_finite_on_one_rank_shows_on_all(workers):
    for report in workers(2).run(_one_nan):
        assert "variance_l1=nan, variance_max=nan" in report


NAN, INF = float("nan"), float("inf")
NOT_FINITE = [
    # losses of each rank's micro-batches in one step, the step's loss by hand: the mean of the finite ones, and its
    # standard error: of 1, 3, 5 the deviation is 2, and 2 / sqrt(3) the error
    ([[4.0, 4.0], [4.0, 4.0]], 4.0, 0.0),
    ([[NAN, 1.0], [3.0, 5.0]], 3.0, 2 / 3**0.5),
    ([[NAN, NAN], [2.0, INF]], 2.0, 0.0),
    ([[-INF, NAN], [NAN, NAN]], INF, 0.0),
    ([[], [NAN, 6.0]], 6.0, 0.0),
    ([[], []], None, 0.0),
]


def _not_finite():
    engine = make(1)
    monitor, fed = StabilityMonitor(EngineReadings(engine), len(NOT_FINITE)), []
    monitor.loss_ratio.feed = lambda loss, length, error: fed.append((loss, round(error, 12)))
    for losses, *_ in NOT_FINITE:
        for loss in losses[dist.get_rank()]:
            monitor.record(torch.tensor([loss, loss]))
        monitor.close_step()
    return fed


def test_micro_batches_without_a_finite_loss_are_left_out(workers):
    assert workers(2).run(_not_finite) == [[(loss, round(error, 12)) for _, loss, error in NOT_FINITE]] * 2


def _infinite_gradient(zero, precision, extra):
    """In step 2 of 3 the losses are finite and their gradients are not, on one rank."""
    engine = make(zero, precision, extra)
    monitor, fed, norms = StabilityMonitor(EngineReadings(engine), 3), [], []
    monitor.loss_ratio.feed = lambda loss, length, error: fed.append(loss)
    for step in range(3):
        for micro in range(ACCUMULATION):
            loss = engine(*plain.micro_batch(step * ACCUMULATION + micro))
            monitor.record(torch.ones(()))
            root = (loss * 0.0).sqrt()  # 0, and its gradient NaN
            engine.backward(loss + root if step == 1 and dist.get_rank() == 1 else loss)
            engine.step()
        norms.append((engine.get_global_grad_norm(), engine.was_step_applied()))
        monitor.close_step()
    return fed, norms


@pytest.mark.parametrize(("zero", "precision"), [slow(1, "fp32"), (3, "fp32"), (0, "bf16"), (0, "fp32")])
def test_a_gradient_norm_that_is_not_finite_makes_its_step_infinite(workers, zero, precision):
    for fed, norms in workers(2).run(_infinite_gradient, zero, precision, {}):
        assert fed[:2] == [1.0, 1.0 if (zero, precision) == (0, "fp32") else INF], norms  # that one has no norm


def _other_optimizer():
    config = plain.deepspeed_config(0, accumulation=ACCUMULATION)
    config["optimizer"] = {"type": "SGD", "params": {"lr": 0.01}}
    engine = plain.make(config)
    return train(engine, StabilityMonitor(EngineReadings(engine), 2, variance=True), 2)[1][-1]


def test_an_optimizer_without_variances(workers):
    for report in workers(2).run(_other_optimizer):
        assert report.loss_ratio is not None and report.variance_l1 is None and report.variance_max is None


def _elements_with_experts(precision, apart):
    """The l1 norm over variances of 1 is the number of elements: of the model, and what the ranks add up to."""
    engine = plain.with_experts(plain.deepspeed_config(0, precision), apart)
    plain.train(engine, 1)
    readings = EngineReadings(engine)
    for variance, _ in readings.adam_variances():
        variance.fill_(1)
    total, _ = adam_variance(readings)
    dist.all_reduce(total)
    named = engine.module.named_parameters()
    return total.item(), sum(p.numel() * (2 if "experts" in name else 1) for name, p in named)


@pytest.mark.parametrize(("precision", "apart"), [("fp32", True), slow("fp32", False), ("bf16", True)])
def test_experts_lie_on_fewer_ranks(workers, precision, apart):
    """Of four ranks two hold each expert."""
    for found, expected in workers(4).run(_elements_with_experts, precision, apart):
        assert found == expected


def _chunks():
    engine = make(3)
    plain.train(engine, 2)
    whole = [value.item() for value in adam_variance(EngineReadings(engine))]
    with replaced(loss_statistics, "CHUNK_CPU", 7):
        return whole, [value.item() for value in adam_variance(EngineReadings(engine))]


def test_reading_in_chunks_changes_nothing(workers):
    for whole, chunked in workers(2).run(_chunks):
        assert chunked[0] == pytest.approx(whole[0], rel=1e-6)  # in float32: another order rounds otherwise
        assert chunked[1] == whole[1]


# -- resuming ----------------------------------------------------------------------------------------------------------


def _resume(zero, precision, folder):
    """Save after step 6 of 13, in the middle of the second interval of 4; then the same run without a save."""

    def run(save):
        engine = make(zero, precision)
        monitor = StabilityMonitor(EngineReadings(engine), 4, variance=True)
        _, reports = train(engine, monitor, 6)
        if save:
            state = json.dumps(monitor.state())
            engine.save_checkpoint(folder, tag="6")
            saved = reports + train(engine, monitor, 7)[1], monitor.summary()  # saving changes nothing
            engine = make(zero, precision)
            engine.load_checkpoint(folder, tag="6")
            monitor = StabilityMonitor(EngineReadings(engine), 4, variance=True)
            monitor.record(torch.tensor(99.0))  # dropped, as is what was recorded before any load
            monitor.load_state(json.loads(state))
        reports += train(engine, monitor, 7)[1]
        result = reports, monitor.summary(), json.dumps(monitor.state())
        return (*result, state, *saved) if save else result

    return run(False), run(True)


@pytest.mark.parametrize(
    ("zero", "precision"), [slow(0, "fp32"), (0, "bf16"), slow(1, "bf16"), slow(2, "fp32"), (3, "fp32")]
)
def test_a_resumed_run_reports_what_an_uninterrupted_one_does(workers, tmp_path, zero, precision):
    results = workers(2).run(_resume, zero, precision, str(tmp_path))
    for whole, resumed in results:
        reports, summary, state, middle, saved_reports, saved_summary = resumed
        assert (reports, summary, state) == whole
        assert (saved_reports, saved_summary) == whole[:2]
        assert len(json.loads(middle)["ratios"]) == 2
        assert [report.step for report in reports if report] == [4, 8, 12]
        assert all(report.variance_l1 > 0 for report in reports if report)
    assert len({resumed[3] for _, resumed in results}) == 1  # the state is the same on all ranks


def _early():
    """A report in the middle of an interval keeps the losses of the step that is open."""
    engine = make(1)
    monitor = StabilityMonitor(EngineReadings(engine), 3)
    reports = []
    for value in (2.0, 1.0):
        monitor.record(torch.tensor(value))
        reports.append(monitor.close_step())
    monitor.record(torch.tensor(3.0))
    reports.append(monitor.report())
    monitor.record(torch.tensor(5.0))
    reports.append(monitor.close_step())
    reports.append(monitor.report())
    monitor.load_state(None)
    return [report and report.loss_ratio for report in reports], monitor.report(), monitor.summary()["max_loss_ratio"]


def test_an_early_report_keeps_the_open_step(workers):
    assert workers(1).run(_early) == [([None, None, 0.5, None, 4.0], None, None)]


# -- the pipeline engine -----------------------------------------------------------------------------------------------


def _pipeline(zero):
    """Two stages of two data-parallel ranks: each stage holds other parameters, only the last one knows the loss."""
    from deepspeed.pipe import PipelineModule

    def loss_fn(outputs, labels):
        loss = torch.nn.functional.mse_loss(outputs, labels)
        monitor.record(loss)
        return loss

    torch.manual_seed(7)
    layers = [torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 11), torch.nn.Linear(11, 3)]
    model = PipelineModule(layers, num_stages=2, loss_fn=loss_fn, partition_method="uniform")
    engine = deepspeed.initialize(model=model, config=plain.deepspeed_config(zero, accumulation=ACCUMULATION))[0]
    monitor = StabilityMonitor(EngineReadings(engine), 2, variance=True)
    stage, replica = engine.stage_id, engine.grid.get_data_parallel_rank()
    generator = torch.Generator().manual_seed(replica)

    def batches():
        while True:
            yield torch.randn(plain.MICRO, 5, generator=generator), torch.randn(plain.MICRO, 3, generator=generator)

    iterator, losses, reports = batches(), [], []
    for _ in range(4):
        losses.append(engine.train_batch(iterator).item())  # the mean over the batch, told to every stage
        reports.append(monitor.close_step())
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (stage, replica, list(reference.full_variances(engine).values())))
    whole = [v for stage, replica, variances in parts for v in variances if replica == 0]
    return reports[-1], losses, reference.variance(whole), {stage for stage, _, _ in parts}


@pytest.mark.parametrize("zero", [slow(0), 1])
def test_pipeline_stages_hold_different_parameters(workers, zero):
    for report, losses, (l1, maximum), stages in workers(4).run(_pipeline, zero):
        assert stages == {0, 1}
        assert report.loss_ratio == pytest.approx(reference.ratios(losses)[-1], rel=1e-6)
        assert report.variance_l1 == pytest.approx(l1, rel=1e-6)
        assert report.variance_max == pytest.approx(maximum, rel=1e-6)
