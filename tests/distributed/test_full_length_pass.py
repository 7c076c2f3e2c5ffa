"""The full-length pass holds what a step at full length holds, and ends on all ranks or on none."""

import itertools
import multiprocessing
import os
import signal
import sys
import time

import deepspeed
import pytest
import torch
import torch.distributed as dist

import ds_plugin
from ds_plugin.core import full_length_pass
from tests import harness
from tests.distributed import pipelined, plain
from tests.distributed.pipelined import Layout
from tests.harness import slow

ROWS, WIDTH = 20, 1024  # so that activations, gradients and Adam's state are all a good part of the whole
BUCKET = 20_000  # elements; DeepSpeed's own is larger than all of this
WARMUP = {"sequence_length_warmup": {**plain.WARMUP, "duration": {"steps": 1000}}}


def _batch(step):
    generator = torch.Generator().manual_seed(step + 100 * dist.get_rank())
    tokens = torch.randint(0, plain.VOCAB, (ROWS, plain.LENGTH + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def _peak(sections, zero, precision, accumulation, offload):
    """Of two steps, and what lives after the first one's first micro-batch began."""
    config = plain.deepspeed_config(zero, precision, accumulation, **sections)
    config["train_micro_batch_size_per_gpu"] = ROWS
    config["zero_optimization"] |= {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if zero == 3:
        config["zero_optimization"] |= {"stage3_prefetch_bucket_size": BUCKET, "stage3_max_live_parameters": BUCKET}
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    with harness.benchmark("bench_completep").Held() as bytes_of:
        engine = plain.make(config, WIDTH)
        engine.train()
        peaks = []
        for step in range(2):
            bytes_of.peak = 0
            for micro in range(accumulation):
                engine.backward(engine(*_batch(step * accumulation + micro)))
                engine.step()
            peaks.append(bytes_of.peak)
    return peaks


def _both(*case):
    short, _ = _peak(WARMUP, *case)
    _, step = _peak({}, *case)
    return short, step


@pytest.mark.parametrize(
    ("zero", "precision", "accumulation", "offload"),
    [
        (0, "fp32", 1, False),
        slow(0, "bf16", 2, False),
        (1, "bf16", 2, False),
        slow(2, "fp32", 1, False),
        (2, "bf16", 2, True),
        (3, "fp32", 1, False),
        slow(3, "bf16", 2, True),
    ],
)
def test_the_first_short_step_needs_what_a_full_one_needs(workers, zero, precision, accumulation, offload):
    """At the peak, in bytes: the weights' copies, gradients, buckets, Adam's state and activations of a real step."""
    for short, step in workers(2).run(_both, zero, precision, accumulation, offload):
        assert short == pytest.approx(step, rel=0.02)


PIPELINE = {"hidden_size": 128, "ffn_hidden_size": 256}


def _pipelined_peak(layout, zero, precision, sections):
    changes = {"zero_optimization": {"stage": zero, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}}
    with harness.benchmark("bench_completep").Held() as bytes_of:
        engine = pipelined.make(layout, ds_plugin.initialize, zero, precision, {**changes, **sections}, size=PIPELINE)
        data, peaks = pipelined.batches(engine), []
        for _ in range(2):
            bytes_of.peak = 0
            engine.train_batch(data)
            peaks.append(bytes_of.peak)
    return peaks


def _both_pipelined(layout, zero, precision):
    warmup = {**plain.WARMUP, "end_length": pipelined.LENGTH, "duration": {"steps": 1000}}
    short, _ = _pipelined_peak(layout, zero, precision, {"sequence_length_warmup": warmup})
    _, step = _pipelined_peak(layout, zero, precision, {})
    return short, step


@pytest.mark.parametrize(("zero", "precision"), [slow(0, "fp32"), (1, "bf16")])
def test_a_pipelines_first_short_step_needs_what_a_full_one_needs(workers, zero, precision):
    layout = Layout(pipe=2)
    for short, step in workers(layout.ranks).run(_both_pipelined, layout, zero, precision):
        assert short == pytest.approx(step, rel=0.02)


LONG, NARROW, DEEP = 64, 64, 4  # activations are the most of it, so that it matters how many are in flight


def _blocks():
    for _ in range(DEEP):
        yield from (torch.nn.Linear(NARROW, 4 * NARROW), torch.nn.GELU(), torch.nn.Linear(4 * NARROW, NARROW))


def _in_flight(sections):
    layers = [torch.nn.Embedding(plain.VOCAB, NARROW), *_blocks(), torch.nn.Linear(NARROW, plain.VOCAB)]
    loss_fn = lambda logits, labels: torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels)  # noqa: E731
    model = deepspeed.PipelineModule(layers, num_stages=2, loss_fn=loss_fn, partition_method="uniform")
    with harness.benchmark("bench_completep").Held() as bytes_of:
        engine = ds_plugin.initialize(model=model, config=plain.deepspeed_config(accumulation=4, **sections))[0]
        tokens = torch.arange(plain.MICRO * LONG).view(plain.MICRO, LONG) % plain.VOCAB
        bytes_of.peak = 0
        for _ in range(2):
            engine.train_batch(itertools.repeat((tokens, tokens)))
    return bytes_of.peak


def _both_in_flight():
    warmup = {**plain.WARMUP, "end_length": LONG, "duration": {"steps": 1000}}
    return _in_flight({"sequence_length_warmup": warmup}), _in_flight({})


def test_a_pipelines_pass_has_as_many_micro_batches_in_flight_as_a_step_beside_gradients(workers):
    for short, full in workers(2).run(_both_in_flight):
        assert short == pytest.approx(full, rel=0.02)


# -- where forward is not the module's --------------------------------------------------------------------------------


class Trainer(plain.TinyLM):
    """Its engine's forward runs its training_step: redirected for one call, as Lightning's strategies do."""

    def training_step(self, batch, index):
        return self(*batch)

    def redirect(self):
        ordinary = self.forward

        def redirected(*args, **kwargs):
            self.forward = ordinary
            return self.training_step(*args, **kwargs)

        self.forward = redirected


def _redirected(preflight):
    torch.manual_seed(7)
    section = {**plain.WARMUP, "preflight": preflight}
    config = plain.deepspeed_config(2, sequence_length_warmup=section)

    def shorten(args, kwargs, length):
        batch = tuple(value[:, :length] for value in args[0])
        return (batch, *args[1:]), kwargs, batch[0].numel(), batch[0].numel()

    engine = ds_plugin.initialize(model=Trainer(), config=config, shorten=shorten)[0]
    engine.train()
    losses, lengths = [], []
    engine.module.embedding.register_forward_hook(lambda module, args, out: lengths.append(args[0].shape[1]))
    for step in range(3):
        engine.module.redirect()
        loss = engine(plain.micro_batch(step), step)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses, lengths


def test_a_redirected_forward_is_run_and_is_still_there_for_the_step(workers):
    for (losses, lengths), (expected, short) in zip(
        workers(2).run(_redirected, True), workers(2).run(_redirected, False), strict=True
    ):
        assert losses == expected and lengths == [plain.LENGTH, *short] and plain.LENGTH not in short


# -- an out-of-memory -------------------------------------------------------------------------------------------------


def _without_room():
    """The accelerator has room for the weights and not for what Adam keeps: said, and nothing stays allocated."""

    def refuse(*args, **kwargs):
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB")

    engine = plain.make(plain.deepspeed_config(1, **WARMUP))
    engine.train()
    kept, full_length_pass.torch.empty_like = torch.empty_like, refuse
    try:
        plain.train(engine, 1)
    except torch.OutOfMemoryError as error:
        gradients = [name for name, p in engine.module.named_parameters() if p.grad is not None]
        return error.__notes__, engine.global_steps, gradients
    finally:
        full_length_pass.torch.empty_like = kept
    return None


def test_no_room_for_the_optimizers_state_is_said_before_the_first_step(workers):
    [(notes, steps, gradients)] = workers(1).run(_without_room)
    assert f"a step at the full length of {plain.LENGTH} tokens, does not fit" in notes[0]
    assert steps == 0 and gradients == []


def _fail_on_rank_1(rank, folder, failing):
    sys.stderr = open(f"{folder}/said{rank}", "w")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    try:
        with full_length_pass.ending_together():
            if failing and rank == 1:
                raise torch.OutOfMemoryError("Tried to allocate 9 GiB")
            dist.all_reduce(torch.ones(1))  # rank 1 never comes
    except torch.OutOfMemoryError:
        if failing == "lingers":  # on a GPU nobody hears that it has failed; here they do when it ends
            time.sleep(30)
        raise
    with full_length_pass.ending_together():  # another block is another word
        dist.barrier()


@pytest.mark.parametrize("failing", ["ends", "lingers", None])
def test_one_ranks_error_ends_those_that_wait_for_it(tmp_path, failing):
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_fail_on_rank_1, args=(rank, str(tmp_path), failing)) for rank in range(3)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + 20
    for process in (ranks[0], ranks[2], ranks[1]):
        if failing == "lingers" and process is ranks[1]:
            process.kill()
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()
    ended = [process.exitcode for process in ranks]
    assert ended == {"ends": [1, 1, 1], "lingers": [1, -signal.SIGKILL, 1], None: [0, 0, 0]}[failing]
    for rank in (0, 2):
        said = (tmp_path / f"said{rank}").read_text()
        assert ("rank 1 failed with OutOfMemoryError: Tried to allocate 9 GiB" in said) == bool(failing)
