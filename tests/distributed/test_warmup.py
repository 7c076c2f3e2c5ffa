"""Sequence length warmup on the plain engine: what is refused, on every rank alike."""

import pytest
import torch
import torch.distributed as dist

import ds_plugin
from tests.distributed import plain
from tests.distributed.warmup import MICROS, carry, run, section


def _engine_without_batches():
    engine = plain.make(plain.deepspeed_config(accumulation=MICROS, **section(mode="carry")))
    engine.train()
    engine(*plain.micro_batch(0))


def _own_batches():
    engine, _ = carry()
    engine.train()
    engine(*plain.micro_batch(0))


def _reads_ahead():
    engine, batches = carry()
    for _ in range(MICROS + 1):
        next(batches)


def _short_samples():
    engine, _ = carry()
    batches = ds_plugin.get_plugin(engine).batches(lambda n: iter([{"input_ids": torch.zeros(2, 12).long()}] * 9))
    next(batches)


def _grows():
    engine, _ = carry()
    engine.set_train_batch_size(48)


def _no_scheduler():
    config = plain.deepspeed_config(**section(learning_rate={"by": "tokens"}))
    del config["scheduler"]
    plain.make(config)


def _other_mode(folder):
    engine, batches = carry()
    run(engine, batches, 2)
    engine.save_checkpoint(folder)
    plain.make(plain.deepspeed_config(accumulation=MICROS, **section())).load_checkpoint(folder)


def _section_removed(folder):
    engine, batches = carry()
    run(engine, batches, 2)
    engine.save_checkpoint(folder)
    plain.make(plain.deepspeed_config(accumulation=MICROS, weight_averaging=plain.AVERAGING)).load_checkpoint(folder)


def _other_end(folder):
    engine, batches = carry()
    run(engine, batches, 2)
    engine.save_checkpoint(folder)
    carry(end_length=8)[0].load_checkpoint(folder)


def _held_in_other_units(folder):
    changes = {"pacing": "adaptive", "report_interval": 1}
    engine = plain.make(plain.deepspeed_config(**section(**changes)))
    plain.train(engine, 2)
    ds_plugin.get_plugin(engine).warmup.hold.lag = 3
    engine.save_checkpoint(folder)
    plain.make(plain.deepspeed_config(**section(**changes, duration={"tokens": 99}))).load_checkpoint(folder)


def _detached():
    engine, batches = carry()
    run(engine, batches, 1)
    ds_plugin.detach(engine)
    next(batches)


def _broken_on_one_rank():
    schedule = "math:floor" if dist.get_rank() else "no.such.module:f"
    plain.make(plain.deepspeed_config(**section(schedule=schedule)))


def _sequence_first_on_one_rank():
    engine = plain.make(plain.deepspeed_config(**section()))
    engine.train()
    tokens, labels = plain.micro_batch(0)
    engine(*((tokens.T, labels.T) if dist.get_rank() else (tokens, labels)))


def _reads_packed_rows():
    packed = {"input_ids": torch.zeros(1, 16).long(), "position_ids": torch.arange(16)[None] % 9}
    next(ds_plugin.get_plugin(carry()[0]).batches(lambda first: iter([packed] * 9)))


class Pairs(plain.TinyLM):
    def forward(self, input_ids, labels, decoder_input_ids=None):
        raise AssertionError("never called")


def _carried_pairs():
    ds_plugin.initialize(model=Pairs(), config=plain.deepspeed_config(**section(mode="carry")))


def _rank_dependent():
    plain.make(plain.deepspeed_config(**section(start_length=4 + 4 * dist.get_rank())))


def _nested_ulysses():
    engine = plain.make(plain.deepspeed_config(**section()))
    ds_plugin.get_plugin(engine).warmup.parts = 2
    engine.train()
    engine(*plain.micro_batch(0))


REFUSED = {
    "batches not read through us": (_engine_without_batches, "StateError", ["'carry'", "batches(from_micro_batch)"]),
    "batches of another length": (_own_batches, "StateError", ["16 tokens", "trains 4", "plugin.batches"]),
    "read ahead": (_reads_ahead, "StateError", ["micro-batch 4", "step of 3", "ahead"]),
    "short samples": (_short_samples, "ConfigError", ["end_length", "16", "12"]),
    "batch ramp-up": (_grows, "StateError", ["48", "ramp-up", "one of the two"]),
    "no scheduler": (_no_scheduler, "ConfigError", ["learning_rate.by", '"tokens"', "no scheduler"]),
    "carried tokens of another mode": (_other_mode, "CheckpointError", ["mode", "'carry'", "'truncate'"]),
    "the section removed": (_section_removed, "CheckpointError", ["carries tokens of 2 batches", "same section"]),
    "another full length": (_other_end, "CheckpointError", ["end_length", "16", "8"]),
    "held in other units": (_held_in_other_units, "CheckpointError", ["3 steps", "duration in steps", "tokens"]),
    "read after detach": (_detached, "StateError", ["detached"]),
    "a schedule broken on one rank": (_broken_on_one_rank, "ConfigError", ["'no.such.module:f'", "cannot be imported"]),
    "samples in another dimension on one rank": (
        _sequence_first_on_one_rank,
        "ConfigError",
        ["input_ids", "[16, 2, ...]", "train_micro_batch_size_per_gpu is 2"],
    ),
    "packed rows that are read": (_reads_packed_rows, "ConfigError", ["position_ids [1, 16]", "begins anew"]),
    "carried pairs": (_carried_pairs, "ConfigError", ["Pairs", "encoder-decoder", '"truncate"']),
    "ranks that disagree": (_rank_dependent, "ConfigError", ["ranks disagree", "section", "rank 1"]),
    "samples divided over ranks": (_nested_ulysses, "StateError", ["divided over 2 ranks", "batches("]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_on_every_rank(workers, tmp_path, case):
    function, kind, parts = REFUSED[case]
    arguments = [str(tmp_path)] if function.__code__.co_argcount else []
    for error in workers(2).run(function, *arguments, expect="errors"):
        assert error.type == kind and all(part in error.message for part in parts), error
