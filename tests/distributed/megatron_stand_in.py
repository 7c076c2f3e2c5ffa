"""Runs of tests/reference/megatron_loop, the stand-in for Megatron-LM's loop, with and without the methods.

The stand-in has Megatron-LM's names and calls over the real megatron-core; what is compared on it is bitwise.
"""

import contextlib
import io
import json
import logging
import sys
from pathlib import Path

import torch

from ds_plugin.core import errors

FOLDER = Path(__file__).resolve().parents[1] / "reference" / "megatron_loop"
SCRIPT = FOLDER / "pretrain_small.py"
FULL, STEPS, BATCH = 32, 8, 4
LENGTHS = [8, 16, 16, 24, 32, 32, 32, 32]  # 8 + 24 * step / 5, floored to a multiple of 8
WARMUP = {
    "enabled": True, "start_length": 8, "end_length": FULL, "duration": {"steps": 5}, "multiple_of": 8,
    "preflight": False,  # what is trained on is compared with a twin's; the preflight has tests of its own
}  # fmt: skip
AVERAGING = {"enabled": True, "interval": 2, "window": 2}
OPTIONS = {
    "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "context_parallel_size": 1,
    "sequence_parallel": False, "num_layers": 2, "seq_length": FULL, "full_length": FULL, "micro_batch_size": 2,
    "global_batch_size": BATCH, "train_iters": STEPS, "lr": 0.01, "min_lr": 0.001, "lr_decay_iters": STEPS,
    "eval_interval": 4, "eval_iters": 1, "save": None, "save_interval": 4, "load": None, "ckpt_step": None,
    "finetune": False, "no_save_optim": None, "save_retain_interval": None, "async_save": False,
    "seed": 1234, "skip_train": False, "overflows": [], "unknown_entries": [], "dropout": 0.0, "fp16": False,
}  # fmt: skip
BY_TOKENS = {**WARMUP, "learning_rate": {"by": "tokens"}, "duration": {"tokens": 300}, "report_interval": 3}
RECIPE = {"enabled": True, "base_width": 8, "base_depth": 1}
ALL_THREE = {"sequence_length_warmup": BY_TOKENS, "weight_averaging": AVERAGING, "completep": RECIPE}
LAYOUTS = {
    "tensor": {"tensor_model_parallel_size": 2, "num_layers": 1},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "data": {},
}


def run(folder, sections, options, twin=None):
    """The script under ``python -m megatron_patches``: its exit code, what it said, and the stand-in's record."""
    from megatron_patches.training_loop import script

    file = Path(folder) / f"methods_{torch.distributed.get_rank()}.json"
    file.write_text(json.dumps(sections))
    errors.OTHERS_WAIT_SECONDS = 0
    sys.path.insert(0, str(FOLDER))
    script.prepare_megatron(SCRIPT)
    from megatron.training import training

    if twin is not None:
        twin(training)
    warned = io.StringIO()
    logging.getLogger("ds_plugin").addHandler(logging.StreamHandler(warned))
    arguments = ["--options", json.dumps({**OPTIONS, **options})]
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()) as out:
        code = script.run([str(SCRIPT), *arguments, "--ds-plugin-config", str(file)])
    record = {"code": code, "said": said.getvalue(), "warned": warned.getvalue(), **training.RECORD}
    record["out"] = out.getvalue()
    return {**record, "full": training.get_args().seq_length}


def read_through(training, changed):
    """Have training batches pass through ``changed(batches)``, a generator, on the ranks that read any."""
    build = training.build_train_valid_test_data_iterators

    def iterators(provider):
        train, valid, test = build(provider)
        if train is not None:
            train.iterable = changed(train.iterable)
        return train, valid, test

    training.build_train_valid_test_data_iterators = iterators


def by_hand(training):
    """Sequence length warmup written into the loop: the twin of the hooks."""
    train_step = training.train_step

    def shorter(*args, iteration):
        options = training.get_args()
        options.seq_length = LENGTHS[iteration]
        result = train_step(*args, iteration=iteration)
        options.seq_length = FULL
        return result

    def narrowed(batches):
        for batch in batches:
            length = training.get_args().seq_length
            for name in ("tokens", "labels", "loss_mask", "position_ids"):
                batch[name] = batch[name][:, :length].clone()
            batch["attention_mask"] = batch["attention_mask"][:, :, :length, :length].clone()
            yield batch

    training.train_step = shorter
    read_through(training, narrowed)


def same(found, expected):
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]
