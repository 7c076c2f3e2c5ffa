"""Averaging under every ZeRO stage, precision and rank count against the full-gather reference: equal bit for bit."""

import pytest
import torch
import torch.distributed as dist

import ds_plugin
from ds_plugin.core.errors import StateError
from ds_plugin.deepspeed_engine.readings import step_was_finite
from ds_plugin.weight_averaging import swap
from ds_plugin.weight_averaging.state.fragments import check
from tests.distributed import plain
from tests.harness import slow
from tests.reference import averaging as reference


def _compare_with_gathered(zero, precision, extra):
    config = plain.deepspeed_config(zero, precision, weight_averaging=plain.AVERAGING)
    config["zero_optimization"].update(extra)
    config["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW: DeepSpeed's own for CPUs would have to be compiled
    engine = plain.make(config)
    plugin = ds_plugin.get_plugin(engine)
    snapshots = []

    def after_step(engine):
        if engine.global_steps % 2 == 0:
            snapshots.append(reference.full_masters(engine))

    plain.train(engine, 9, after_step)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    expected = {name: value.to(dtype) for name, value in reference.mean(snapshots[-3:]).items()}
    masters, parameters = reference.full_masters(engine), reference.full_parameters(engine)
    laid_out = _by_fragments(plugin.averager.shards)
    untouched = _untouched(engine)
    raw = plain.evaluate(engine)
    with plugin.averaged_weights():
        during = reference.full_parameters(engine)
        averaged = plain.evaluate(engine)
    again = plain.evaluate(engine)
    pairs = zip(untouched, _untouched(engine), strict=True)
    assert all(torch.equal(before, after) for before, after in pairs) and len(untouched) > 2
    return {
        "during": _different(during, expected),
        "moved": len(_different(during, parameters)),
        "after": _different(reference.full_parameters(engine), parameters)
        + _different(reference.full_masters(engine), masters),
        "losses": (raw, averaged, again),
        "laid_out": _different(laid_out, masters),
        "steps": plugin.averager.steps,
        "parameters": len(parameters),
        "dtype": str(next(iter(during.values())).dtype),
    }


def _untouched(engine):
    """What no swap may change and no weight shows: the random stream and the optimizer's state."""
    entries = [entry for state in engine.optimizer.state.values() for entry in state.values()]
    return [torch.get_rng_state(), *(entry.clone() for entry in entries if torch.is_tensor(entry))]


def _by_fragments(shards):
    """The whole masters put together from the ranks' fragments; each element is in one of them (or, alike, in all)."""
    tensors, found = shards.tensors(), shards.fragments()
    check(found, tensors)
    ranks = [None] * dist.get_world_size()
    mine = [(f, tensors[f.shard].reshape(-1)[f.offset : f.offset + f.count].clone()) for f in found]
    dist.all_gather_object(ranks, mine)
    parts = [part for rank in (ranks[:1] if shards.layout == "replicated" else ranks) for part in rank]
    masters, covered = {f.name: torch.full(f.shape, float("nan")) for f, _ in parts}, 0
    for f, values in parts:
        masters[f.name].view(-1)[f.start : f.start + f.count] = values
        covered += f.count
    assert covered == sum(m.numel() for m in masters.values())
    return masters


def _different(found, expected):
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


LAYOUTS = [
    # ranks, stage, precision, more of zero_optimization
    slow(3, 0, "fp32", {}),
    (3, 1, "fp32", {}),
    slow(3, 2, "fp32", {}),
    slow(3, 3, "fp32", {}),
    (3, 3, "fp32", {"sub_group_size": 300}),
    slow(3, 3, "fp32", {"stage3_param_persistence_threshold": 0}),
    (2, 2, "fp32", {"offload_optimizer": {"device": "cpu"}}),
    slow(3, 3, "fp32", {"offload_optimizer": {"device": "cpu"}}),
    (2, 3, "bf16", {"offload_optimizer": {"device": "cpu"}}),
    (2, 1, "bf16", {}),
    slow(2, 2, "bf16", {}),
    slow(2, 3, "bf16", {}),
    (2, 0, "bf16", {}),
    slow(1, 1, "fp32", {}),
    slow(4, 2, "fp32", {}),
    slow(4, 3, "bf16", {}),
]


@pytest.mark.parametrize(("ranks", "zero", "precision", "extra"), LAYOUTS)
def test_equals_the_mean_of_gathered_snapshots(workers, ranks, zero, precision, extra):
    for found in workers(ranks).run(_compare_with_gathered, zero, precision, extra):
        assert found["during"] == []
        assert found["after"] == []
        assert found["laid_out"] == []
        assert found["moved"] >= found["parameters"] - 2  # the average is not the trained weights
        assert found["steps"] == [4, 6, 8]
        assert found["dtype"] == ("torch.float32" if precision == "fp32" else "torch.bfloat16")
        raw, averaged, again = found["losses"]
        assert raw == again and raw != averaged


def _boundary_by_hand():
    """DeepSpeed's other way to accumulate: the caller names the boundary and calls step() once per window."""
    engine = plain.make(plain.deepspeed_config(1, accumulation=2, weight_averaging=plain.AVERAGING))
    plugin, entered = ds_plugin.get_plugin(engine), []
    for step in range(4):
        for micro in range(2):
            engine.set_gradient_accumulation_boundary(micro == 1)
            engine.backward(engine(*plain.micro_batch(2 * step + micro)))
            if micro == 0:
                with pytest.raises(StateError, match="accumulation step"), plugin.averaged_weights():
                    pass
        engine.step()
        if plugin.has_average:
            with plugin.averaged_weights():
                entered.append(engine.global_steps)
    return entered


def test_windows_that_the_caller_closes(workers):
    assert workers(2).run(_boundary_by_hand) == [[2, 3, 4]] * 2


def _skipped_step(zero):
    """bf16 with DeepSpeed's overflow check: a step whose gradients are not finite is skipped."""
    config = plain.deepspeed_config(zero, sequence_length_warmup=plain.WARMUP, weight_averaging=plain.AVERAGING)
    config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    engine = plain.make(config)
    plugin = ds_plugin.get_plugin(engine)
    plain.train(engine, 1)
    loss = engine(*plain.micro_batch(1))
    engine.backward(loss * float("nan"))
    engine.step()
    skipped = engine.was_step_applied(), engine.global_steps, list(plugin.averager.steps)
    ledger = plugin.ledger.read, plugin.ledger.trained
    plain.train(engine, 2)
    return skipped, ledger, plugin.averager.steps


@pytest.mark.parametrize("zero", [0, slow(1), 3])
def test_a_skipped_step_leaves_no_snapshot_and_trains_no_tokens(workers, zero):
    for skipped, ledger, steps in workers(2).run(_skipped_step, zero):
        assert skipped == (False, 2, []) and steps == [4]
        assert ledger == (2 * 2 * plain.MICRO * plain.LENGTH, 2 * plain.MICRO * 4)  # two steps read, 4 tokens trained


def _bf16_optimizer():
    """ZeRO 1 with fp32 gradient accumulation is DeepSpeed's BF16_Optimizer, another wrapper with other attributes."""
    config = plain.deepspeed_config(
        1, "bf16", weight_averaging=plain.AVERAGING, data_types={"grad_accum_dtype": "fp32"}
    )
    engine = plain.make(config)
    snapshots = []
    plain.train(engine, 5, lambda e: snapshots.append(reference.full_masters(e)))
    before = reference.full_parameters(engine)
    expected = {name: value.bfloat16() for name, value in reference.mean([snapshots[1], snapshots[3]]).items()}
    with ds_plugin.get_plugin(engine).averaged_weights():
        wrong = _different(reference.full_parameters(engine), expected)
        shards = ds_plugin.get_plugin(engine).averager.shards
        wrong += _different({n: m.bfloat16() for n, m in _by_fragments(shards).items()}, expected)
    return type(engine.optimizer).__name__, wrong, _different(reference.full_parameters(engine), before)


def test_bf16_optimizer(workers):
    for name, wrong, different in workers(2).run(_bf16_optimizer):
        assert name == "BF16_Optimizer" and wrong == different == []


def _losses_with_and_without_reading(zero):
    sections = {"weight_averaging": plain.AVERAGING}

    def read(engine):
        if engine.global_steps >= 2:
            with ds_plugin.get_plugin(engine).averaged_weights():
                plain.evaluate(engine)

    with_reading = plain.train(plain.make(plain.deepspeed_config(zero, **sections)), 5, read)
    without = plain.train(plain.make(plain.deepspeed_config(zero, **sections)), 5)
    return with_reading, without


@pytest.mark.parametrize("zero", [slow(0), 1, 3])
def test_reading_the_average_changes_no_later_loss(workers, zero):
    for with_reading, without in workers(2).run(_losses_with_and_without_reading, zero):
        assert with_reading == without


def _collectives(zero, section, extra):
    config = plain.deepspeed_config(zero, weight_averaging={**plain.AVERAGING, **section})
    config["zero_optimization"].update(extra)
    engine = plain.make(config)
    plain.train(engine, 3)
    plugin = ds_plugin.get_plugin(engine)
    averager, shards = plugin.averager, plugin.averager.shards

    def swap(inside=lambda: None):
        with plugin.averaged_weights():
            inside()

    return {
        "barrier": plain.collectives(dist.barrier),  # the counter counts
        "snapshot": plain.collectives(lambda: averager.snapshot(4, finite=step_was_finite(engine, shards.tensors()))),
        "evaluate": plain.collectives(lambda: plain.evaluate(engine)),
        "swap": plain.collectives(swap),
        "swap_and_evaluate": plain.collectives(lambda: swap(lambda: plain.evaluate(engine))),
        "elements": sum(t.numel() for t in shards.tensors()),
    }


BANK = {"mode": "ema", "window": 5, "horizons": [2]}
STAGES = [(0, {}), (1, {}), (2, {}), (3, {}), (3, {"stage3_param_persistence_threshold": 0})]
USUAL = [(*STAGES[0], BANK), (*STAGES[1], {}), (*STAGES[2], {"mode": "block"}), (*STAGES[3], BANK), (*STAGES[4], {})]
REST = [(*stage, section) for stage in STAGES for section in ({}, {"mode": "block"}, BANK)]


@pytest.mark.parametrize(("zero", "extra", "section"), [*USUAL, *(slow(*c) for c in REST if c not in USUAL)], ids=str)
def test_a_snapshot_makes_no_collective_and_a_swap_one_refresh(workers, zero, section, extra):
    for found in workers(2).run(_collectives, zero, section, extra):
        assert [name for name, _ in found["barrier"]] == ["c10d::barrier"]
        assert found["snapshot"] == []
        # on the way in ranks tell each other that it was allocated, exchanged and refreshed: a small object each time
        swap, both = found["swap"], found["swap_and_evaluate"]
        agreed = swap[:4]
        assert [name for name, _ in agreed] == ["c10d::allgather_"] * 4 and sum(size for _, size in agreed) < 100
        if zero in (1, 2):  # the ordinary all-gather, there and back: the whole parameters, from this rank's part
            refresh = ("c10d::_allgather_base_", 3 * found["elements"])
            assert swap == both == [*agreed, refresh, *agreed[:2], refresh]
        else:
            assert swap == [*agreed, *agreed[:2]]
        if zero == 0:
            assert both == swap
        if zero == 3 and extra:  # the forward's own and nothing else
            assert both == swap + found["evaluate"] and found["evaluate"] != []
        elif zero == 3:  # small parameters stay gathered; the average's are gathered once, by the forward
            assert found["evaluate"] == [] and len(both) > len(swap)


class Counting(plain.TinyLM):
    """With a BatchNorm, whose statistics a forward pass in training mode changes."""

    def __init__(self):
        super().__init__()
        self.statistics = torch.nn.BatchNorm1d(plain.LENGTH, affine=False)

    def forward(self, input_ids, labels):
        self.statistics(input_ids.to(self.head.weight.dtype))
        return super().forward(input_ids, labels)


def _failing_swaps(zero, precision):
    """On one rank the exchange fails, or the refresh after it, or the way out. Then training goes on."""
    torch.manual_seed(7)
    config = plain.deepspeed_config(zero, precision, weight_averaging=plain.AVERAGING)
    engine = ds_plugin.initialize(model=Counting(), config=config)[0]
    plugin, messages = ds_plugin.get_plugin(engine), []
    plain.train(engine, 4)

    def state():
        buffers = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
        return {**reference.full_masters(engine), **reference.full_parameters(engine), **buffers}

    def failing(method):
        def fails(self):
            method(self)
            if dist.get_rank() == 0:
                raise torch.OutOfMemoryError(f"in {method.__name__}")

        return fails

    before, wrong, shards = state(), [], type(plugin.averager.shards)
    for owner, name in ((swap.Exchange, "forth"), (shards, "refresh")):
        with pytest.MonkeyPatch.context() as patch:
            kept = getattr(owner, name)

            def once(self, kept=kept, patch=patch):
                patch.undo()  # the way back is not to fail
                failing(kept)(self)

            patch.setattr(owner, name, once)
            with pytest.raises((torch.OutOfMemoryError, RuntimeError)) as caught, plugin.averaged_weights():
                raise AssertionError("entered")
        messages.append(str(caught.value))
        wrong += _different(state(), before)
    with plugin.averaged_weights():
        engine(*plain.micro_batch(0))  # in training mode: its statistics change
        changed = [name for name in _different(state(), before) if "running" in name]
    wrong += _different(state(), before)
    plain.train(engine, 1)
    with pytest.MonkeyPatch.context() as patch:
        try:
            with plugin.averaged_weights():
                patch.setattr(shards, "refresh", failing(shards.refresh))
            messages.append(None)
        except StateError as error:
            messages.append(str(error))
            with pytest.raises(StateError, match="engine.step.. while the averaged .* start again from the last chec"):
                engine.step()
    return messages, wrong, changed


@pytest.mark.parametrize(("zero", "precision"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (3, "fp32")])
def test_a_swap_that_fails_on_one_rank_is_undone_on_all(workers, zero, precision):
    said = ["in forth", "in refresh"]
    ranks = workers(2).run(_failing_swaps, zero, precision)
    for rank, ((*entering, leaving), wrong, changed) in enumerate(ranks):
        assert entering == [f"rank 0 failed with OutOfMemoryError: {s}" if rank else s for s in said]
        assert wrong == [] and len(changed) == 2  # the mean and the variance
        assert (leaving is None) == (rank > 0)
    assert "could not be put back (OutOfMemoryError: in refresh)" in ranks[0][0][-1]


def _grown(zero):
    """A param group is added to the optimizer after attach."""
    engine = plain.make(plain.deepspeed_config(zero, weight_averaging=plain.AVERAGING))
    plugin = ds_plugin.get_plugin(engine)
    plain.train(engine, 2)
    engine.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    messages = []
    for use in (lambda: plain.train(engine, 2), lambda: plugin.averaged_weights().__enter__()):
        with pytest.raises(StateError) as caught:
            use()
        messages.append(str(caught.value))
    return messages, plugin.averager.steps


def test_a_param_group_added_after_attach_is_one_error(workers):
    for messages, steps in workers(2).run(_grown, 0):
        assert steps == [2] and messages[0] == messages[1]
        assert "has 10 master weights" in messages[0] and "had 9 of" in messages[0]


def _refusals(tmp_path):
    engine = plain.make(plain.deepspeed_config(1, accumulation=2, weight_averaging=plain.AVERAGING))
    plugin = ds_plugin.get_plugin(engine)
    plain.train(engine, 2)
    messages = {}

    def attempt(name, function):
        try:
            function()
            messages[name] = None
        except StateError as error:
            messages[name] = str(error)

    with plugin.averaged_weights():
        attempt("backward", lambda: engine.backward(engine(*plain.micro_batch(0))))
        attempt("step", engine.step)
        attempt("save", lambda: engine.save_checkpoint(tmp_path, tag="swapped"))
        attempt("load", lambda: engine.load_checkpoint(tmp_path))
        attempt("detach", lambda: ds_plugin.detach(engine))
    loss = engine(*plain.micro_batch(0))
    engine.backward(loss)
    engine.step()  # the first half of an accumulation step
    attempt("mid-window", lambda: plugin.averaged_weights().__enter__())
    return messages


def test_steps_and_saves_are_refused_while_swapped(workers, tmp_path):
    for messages in workers(2).run(_refusals, str(tmp_path)):
        for name in ("backward", "step", "save", "load", "detach"):
            assert "while the averaged weights are swapped in" in messages[name], messages
        assert "accumulation step" in messages["mid-window"]
    assert not (tmp_path / "swapped").exists()
