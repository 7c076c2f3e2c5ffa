"""What the benchmarks share that train small models from scratch: a model, its data, a JSON, an evaluation.

One rank in one process, on the CPU; `prepare_process` makes the process such a one.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import ds_plugin
from ds_plugin.core.files import atomic_write
from ds_plugin.deepspeed_engine import startup
from ds_plugin.sweeps.trial import start_host
from launch_scripts.gpt import corpus, data
from launch_scripts.gpt.optimizer import choose_optimizer, decay_groups
from megatron_patches.models import gpt

_EVALUATED_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Small:
    """The model, and the text it learns. ``length`` is in tokens, ``eval_samples`` a multiple of 16."""

    layers: int = 4
    width: int = 96
    heads: int = 2
    length: int = 256
    eval_samples: int
    data: str = corpus.STDLIB


def json_of(batch: int, lr: float, scheduler: dict[str, Any]) -> dict[str, Any]:
    """A run's JSON without any method: ``batch`` samples a step, AdamW at the peak rate ``lr``."""
    return {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": batch,
        "gradient_clipping": 1.0,
        "steps_per_print": 1_000_000,
        "zero_optimization": {"stage": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": lr, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
        "scheduler": scheduler,
    }


def cosine(steps: int, warmup: int) -> dict[str, Any]:
    """The scheduler of `json_of` that warms up and decays to a tenth."""
    warmed = {"warmup_num_steps": warmup, "warmup_type": "linear"}
    return {"type": "WarmupCosineLR", "params": {**warmed, "total_num_steps": steps, "cos_min_ratio": 0.1}}


def build(config: dict[str, Any], small: Small, seed: int, cache: Path) -> tuple[Any, corpus.Corpus]:
    """The engine that trains by the JSON ``config``, and the text; ``cache`` keeps prepared data."""
    model_config = gpt.GPTConfig.model_validate(
        {
            "num_layers": small.layers,
            "hidden_size": small.width,
            "num_attention_heads": small.heads,
            "seq_length": small.length,
        }
    )
    gpt.initialize_parallel(model_config, seed)
    text = corpus.prepare(small.data, tokenizer=None, cache_dir=cache)
    transformer = gpt.transformer_config(model_config, torch.float32)
    model = gpt.build_gpt(model_config, text.vocab_size, transformer, gpt.layer_spec(model_config))
    host, optimizer = choose_optimizer(config)
    engine, *_ = ds_plugin.initialize(
        model=model, config=host, optimizer=optimizer, model_parameters=decay_groups(model), mpu=gpt.DeepSpeedMPU()
    )
    return engine, text


class Samples:
    """``count`` training samples in the order of ``seed``, and evaluation batches that are the same for every run."""

    def __init__(self, small: Small, text: corpus.Corpus, cache: Path, *, count: int, seed: int):
        prepare = partial(data.build_datasets, text, sequence_length=small.length, cache_dir=cache)
        self._training, _ = prepare(train_samples=count, valid_samples=small.eval_samples, seed=seed)
        _, validation = prepare(train_samples=count, valid_samples=small.eval_samples, seed=1234)
        assert validation is not None
        read = data.batches(validation, start_sample=0, micro_batch=_EVALUATED_AT_ONCE, dp_rank=0, dp_size=1)
        self.evaluation = list(islice(read, small.eval_samples // _EVALUATED_AT_ONCE))

    def batches(self, size: int, first: int = 0) -> Iterator[Any]:
        """Training batches of ``size`` samples, from the one numbered ``first`` on."""
        return data.batches(self._training, start_sample=first * size, micro_batch=size, dp_rank=0, dp_size=1)


def loss_of(engine: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean loss over the batch, in nats per token."""
    return engine(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]).mean()


@torch.no_grad()
def evaluate(engine: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    """Mean loss over the batches. The engine trains on."""
    engine.eval()
    found = mean(loss_of(engine, batch).item() for batch in batches)
    engine.train()
    return found


def prepare_process() -> None:
    """Make this process one that can train: a world of one rank, one thread."""
    startup.quiet()
    torch.set_num_threads(1)
    startup.skip_inference_kernel()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it, though there is no launcher
    start_host()


def save_figure(figure: Any, path: Path) -> None:
    """Write matplotlib's figure to ``path``, whole or not at all, and let go of it."""
    from matplotlib import pyplot

    figure.tight_layout()
    atomic_write(path, lambda temporary: figure.savefig(temporary, dpi=110))
    pyplot.close(figure)
