"""Pre-train a megatron-core GPT with DeepSpeed and the three methods, everything from one JSON file.

    deepspeed launch_scripts/pretrain_gpt.py --deepspeed_config configs/quickstart.json --name first

Read `train` first: it is the whole loop. What the methods add to an ordinary DeepSpeed script is marked with (*).

A copy of this file for another model needs `ds_plugin`, and `megatron_patches` where the model is megatron-core's. The
folder ``launch_scripts/gpt/`` is the application around the loop (data, run folder, progress, report) and is not
installed: take it along, or use your own.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where launch_scripts.gpt is found

from ds_plugin.deepspeed_engine import startup

startup.quiet()
startup.announce("starting DeepSpeed and Megatron-core ...")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

import ds_plugin
from ds_plugin.core.errors import PluginError, raise_on_all_ranks
from ds_plugin.deepspeed_engine import compat
from launch_scripts.gpt import corpus, data, settings
from launch_scripts.gpt.folder import RunFolder
from launch_scripts.gpt.optimizer import choose_optimizer, decay_groups
from launch_scripts.gpt.progress import Progress
from launch_scripts.gpt.recorder import Recorder
from megatron_patches import megatron_on_cpu
from megatron_patches.completep import finish, prepare
from megatron_patches.models import gpt, pipeline_gpt

Batch = dict[str, torch.Tensor]


def build_model(run: settings.Settings, vocab_size: int) -> torch.nn.Module:
    """The GPT of the ``model`` section or this rank's stage of it, with CompleteP's forward and init when enabled."""
    config, spec = gpt.transformer_config(run.model, run.dtype), gpt.layer_spec(run.model)
    config, spec = prepare(config, spec, run.plugin.completep)  # (*)
    build = gpt.build_gpt if run.model.pipeline_parallel == 1 else pipeline_gpt.build_pipeline
    model = build(run.model, vocab_size, config, spec)
    finish(model, run.plugin.completep)  # (*)
    return model


def build_engine(run: settings.Settings, model: torch.nn.Module) -> Any:
    """The DeepSpeed engine; the optimizer is the fastest AdamW this machine has."""
    config, optimizer = choose_optimizer(run.deepspeed)
    # CompleteP makes its own groups; without it, norms and biases go without weight decay.
    groups = None if run.plugin.completep is not None else decay_groups(model)
    mpu = None if is_pipeline(model) else gpt.DeepSpeedMPU()  # a pipeline's model brings its own
    engine, *_ = ds_plugin.initialize(  # (*) in place of deepspeed.initialize
        model=model, config=config, optimizer=optimizer, model_parameters=groups, mpu=mpu
    )
    return engine


def is_pipeline(model: torch.nn.Module) -> bool:
    """Whether the model is a stage of DeepSpeed's pipeline, whose engine takes a whole step's micro-batches at once."""
    return isinstance(model, pipeline_gpt.PipelineGPT)


def loss_of(engine: Any, batch: Batch) -> torch.Tensor:
    """Mean loss in nats per token of one micro-batch; the attention mask is causal and needs no tensor."""
    tokens, positions, labels = (
        batch[name].to(engine.device, non_blocking=True) for name in ("tokens", "position_ids", "labels")
    )
    return engine(tokens, positions, None, labels=labels).mean()


def build_data(
    run: settings.Settings, text: corpus.Corpus, engine: Any, cache: Path
) -> tuple[Callable[[int], Iterator[Any]], Callable[[], Iterator[Any]], int]:
    """Two functions: this rank's training micro-batches from the n-th on, and an evaluation's, always the same; and how
    many those are. Each as the engine takes it."""
    cfg, mpu, micro = run.training, gpt.DeepSpeedMPU(), engine.train_micro_batch_size_per_gpu()
    ranks = mpu.get_data_parallel_world_size()
    count = -(-cfg.eval_samples // (micro * ranks))
    training, validation = data.build_datasets(
        text,
        sequence_length=run.model.seq_length,
        train_samples=cfg.steps * engine.train_batch_size(),
        valid_samples=count * micro * ranks,
        seed=cfg.seed,
        split=cfg.split,
        cache_dir=cache,
    )
    assert validation is not None  # eval_samples is at least 1
    batches = partial(data.batches, micro_batch=micro, dp_rank=mpu.get_data_parallel_rank(), dp_size=ranks)
    layout = pipeline_gpt.micro_batch if is_pipeline(engine.module) else lambda batch: batch

    def from_micro_batch(n: int) -> Iterator[Any]:
        start = n * micro * ranks
        return map(layout, batches(training, start_sample=start, num_workers=cfg.data_workers, loop=run.open_ended))

    return from_micro_batch, lambda: map(layout, islice(batches(validation, start_sample=0), count)), count


def train_step(engine: Any, batches: Iterator[Any], record: Recorder) -> None:
    """One optimizer step on the next micro-batches."""
    if is_pipeline(engine.module):
        record.loss(engine.train_batch(batches))
        return
    for _ in range(engine.gradient_accumulation_steps()):
        loss = loss_of(engine, next(batches))
        engine.backward(loss)
        engine.step()
        record.loss(loss)


@torch.no_grad()
def evaluate(engine: Any, batches: Iterator[Any], count: int) -> float:
    """Mean loss over the ``count`` micro-batches of all ranks, at full length."""
    if is_pipeline(engine.module):
        return engine.eval_batch(batches, num_micro_batches=count).item()
    engine.eval()
    total = torch.stack([loss_of(engine, batch) for batch in batches]).mean()
    engine.train()
    dist.all_reduce(total)  # tensor-parallel ranks hold equal values, so the mean over all ranks is the mean over data
    return total.item() / dist.get_world_size()


def train(args: Any, run: settings.Settings, folder: RunFolder, progress: Progress) -> Any:
    """Prepare, build, train, and leave a finished run folder. Returns the engine."""
    cfg = run.training
    text = corpus.prepare(
        cfg.data,
        tokenizer=cfg.tokenizer_path,
        cache_dir=args.cache,
        text_key=cfg.text_key,
        eod=cfg.eod,
        progress=progress.data,
    )
    progress.message(text.describe())
    progress.stage("building the model")
    gpt.initialize_parallel(run.model, cfg.seed)
    engine = build_engine(run, build_model(run, text.vocab_size))
    plugin = ds_plugin.get_plugin(engine)  # (*) the methods' handle: lengths, tokens, the average
    training_batches, evaluation_batches, count = build_data(run, text, engine, args.cache)

    record = Recorder(engine, run, folder, text, progress)
    if args.resume:
        record.resume(args.tag, verify=not args.no_verify)
    batches = plugin.batches(training_batches)  # (*) of each step's length, from the step the engine is at
    engine.train()
    while not record.finished:
        record.before_step()
        train_step(engine, batches, record)
        record.after_step()
        step = engine.global_steps
        if step % cfg.eval_interval == 0 or record.finished:
            record.evaluation(evaluate(engine, evaluation_batches(), count))
            if plugin.has_average:
                with plugin.averaged_weights():  # (*)
                    record.averaged_evaluation(evaluate(engine, evaluation_batches(), count))
        record.write()
        if step % cfg.save_interval == 0 or record.finished:
            record.save()
    if megatron_on_cpu.enabled():
        megatron_on_cpu.check_replicas(engine.module)  # what tensor-parallel ranks hold alike must have stayed alike
    record.finish()
    return engine


def main() -> int:
    """Exit code 0, or 2 with one message when the settings, the data or the checkpoint cannot be used."""
    args = settings.parser().parse_args()
    compat.skip_inference_kernel()
    deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name())
    try:
        with raise_on_all_ranks():
            run = settings.load_settings(args)
        if not torch.cuda.is_available():
            megatron_on_cpu.enable()
        with Progress(run.training.steps, enabled=dist.get_rank() == 0) as progress:
            train(args, run, RunFolder.open(args.runs, args.name, args.resume), progress)
    except PluginError as error:
        return startup.fail(error)
    except KeyboardInterrupt:
        return startup.interrupted()
    startup.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
