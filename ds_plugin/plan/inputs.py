"""A recipe for a number of ranks, read and validated as the framework that it is for would have it. A ``megatron``
section holds the options of Megatron-LM's scripts by name, without dashes. It is read as the ``model``, ``training``,
``optimizer`` and ``scheduler`` that the other recipes have."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ds_plugin.config import PluginConfig, load_json, split_config
from ds_plugin.core.arguments import MOST
from ds_plugin.core.errors import ConfigError
from ds_plugin.core.settings_model import Ranks, Rate, Tokens, nearest, parse_section
from ds_plugin.deepspeed_engine import json_check
from ds_plugin.deepspeed_engine.masters import refuse_nvme
from ds_plugin.plan.costs import Layout
from ds_plugin.sequence_length_warmup.plan import plan
from ds_plugin.sequence_length_warmup.schedule import LengthSchedule
from megatron_patches.models.gpt import GPTConfig, padded_vocab_size
from megatron_patches.training_loop.options import check_options, layout_multiple

MEGATRON = "megatron"
#: options of models whose parameters `GPTConfig` does not describe
_NOT_COUNTED = ("num-experts", "multi-latent-attention", "mtp-num-layers", "kv-channels")
_LEARNED = "learned_absolute"  # the only kind of position embedding that has parameters
_Size = Annotated[int, Field(ge=1, le=MOST, description="a whole number, 1 or more")]
_Rate = Annotated[Rate, Field(description="a number, 0 or more")]
_Warmup = Annotated[float, Field(ge=0, le=1e15)]


@dataclass(frozen=True)
class Job:
    """What a plan is made of, whichever framework's recipe it was read from."""

    source: str
    model: GPTConfig
    methods: PluginConfig
    deepspeed: Mapping[str, Any]  # the rest of the JSON; Megatron-LM's options in DeepSpeed's words
    options: Mapping[str, Any]  # Megatron-LM's; empty for DeepSpeed
    layout: Layout
    batch: int  # samples of a step, all ranks together
    micro_batch: int
    padded_vocab: int
    steps: int
    scheduler: LengthSchedule | None


class _Training(BaseModel):
    """How long a run is; what else the section holds is the script's."""

    model_config = ConfigDict(strict=True)

    steps: int = Field(0, ge=0, le=MOST)
    tokens: Tokens | None = None


class _Options(BaseModel):
    """Megatron-LM's options that are read here alone; its parser and `GPTConfig` look at the others."""

    model_config = ConfigDict(strict=True, extra="allow", alias_generator=lambda name: name.replace("_", "-"))

    micro_batch_size: _Size
    global_batch_size: _Size
    train_iters: _Size
    vocab_size: _Size
    lr: Rate = Field(gt=0, description="a number above 0")
    weight_decay: _Rate
    min_lr: _Rate = 0.0
    lr_warmup_iters: _Warmup | None = None
    lr_warmup_fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    lr_decay_iters: _Size | None = None
    lr_warmup_samples: _Warmup = 0.0
    context_parallel_size: Ranks = 1
    make_vocab_size_divisible_by: _Size = 128


def read_job(
    source: str | Path | Mapping[str, Any], ranks: int, *, per_node: int = 8, vocab_size: int | None = None
) -> Job:
    """``vocab_size``: of a recipe for DeepSpeed; Megatron-LM's say it. Raises ConfigError: the recipe is wrong, or its
    sizes do not divide the ranks or one another."""
    config, options = load_json(source), {}
    named = "the config" if isinstance(source, Mapping) else str(source)
    if MEGATRON in config:
        options = config.pop(MEGATRON)
        config |= _as_deepspeed(options, config)
    for section in ("model", "training"):
        if section not in config:
            hint = _hint(section, config, 'configs/ has complete ones; "megatron" is another way')
            raise ConfigError(f'{named}: section "{section}" is missing; {hint}')
    model = parse_section(GPTConfig, MEGATRON if options else "model", config.pop("model"))
    training = config.pop("training")
    deepspeed, methods = split_config(config)
    skipped = "scheduler" if options else None  # Megatron-LM has its own
    json_check.check({key: value for key, value in deepspeed.items() if key != skipped}, auto=True)
    if not deepspeed.get("optimizer"):
        raise ConfigError('optimizer: missing; write {"type": "AdamW", "params": {"lr": 0.001}}')
    context = options.get("context-parallel-size", 1)
    layout = Layout(ranks, per_node, model.tensor_parallel, model.pipeline_parallel, context)
    if ranks % (unit := model.model_ranks * context):
        what = f"tensor {layout.tensor} x pipeline {layout.pipeline} x context {context} parallel ranks"
        remedy = f"plan for a multiple of {unit}, or lower one of them"
        raise ConfigError(f"{what} do not divide --world-size {ranks}; {remedy}")
    batch, micro = json_check.batch_sizes(deepspeed, layout.data)
    defaults = {"tensor_model_parallel_size": 1, "context_parallel_size": 1, "sequence_parallel": False}
    parsed = SimpleNamespace(**defaults | {name.replace("-", "_"): value for name, value in options.items()})
    if options:
        check_options(methods, parsed)
        if methods.completep is not None:
            methods = replace(methods, completep=methods.completep.folded_by_default())
    elif methods.weight_averaging is not None:
        refuse_nvme(deepspeed)
    run, scheduler = parse_section(_Training, "training", training), None
    if (warmup := methods.sequence_length_warmup) is not None:
        warmup = warmup.in_run(steps=run.steps or None, tokens=run.tokens)
        if warmup.end_length != (full := model.seq_length):
            option = "--seq-length" if options else "model.seq_length"
            what = f"{warmup.end_length} is not {option} {full}, so the full length would never be trained"
            raise ConfigError(f"sequence_length_warmup.end_length: {what}; write {full}")
        scheduler = LengthSchedule(warmup, layout_multiple=layout_multiple(parsed))
        methods = replace(methods, sequence_length_warmup=warmup)
    vocab = vocab_size or options.get("vocab-size")
    if vocab is None:
        raise ConfigError("--vocab-size: missing; write the tokenizer's, e.g. 50257, 256 for bytes")
    multiple = options.get("make-vocab-size-divisible-by", 128) * layout.tensor
    padded = -(-vocab // multiple) * multiple if options else padded_vocab_size(vocab, layout.tensor)
    steps = _steps(run, training, scheduler, batch * model.seq_length)
    return Job(named, model, methods, deepspeed, options, layout, batch, micro, padded, steps, scheduler)


def _hint(name: str, there: Iterable[str], otherwise: str) -> str:
    guess = nearest(name, there)
    return f'is "{guess}" meant to be it?' if guess else otherwise


def _steps(run: _Training, section: Any, scheduler: LengthSchedule | None, batch: int) -> int:
    """``batch``: in tokens, at full length."""
    if run.tokens is not None:
        needed = -(-run.tokens // batch)
        if scheduler is not None:
            needed = plan(scheduler, batch // scheduler.config.end_length, tokens=run.tokens).steps
        return min(run.steps or needed, needed)
    if not run.steps:
        hint = _hint("steps", set(section) - {"steps"}, "write the optimizer steps in all, e.g. 300, or tokens")
        raise ConfigError(f"training.steps: missing; {hint}")
    return run.steps


def _as_deepspeed(given: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron-LM's options in the words of the other recipes."""
    for name in given if isinstance(given, Mapping) else ():
        if name.startswith("-") or "_" in name:
            raise ConfigError(f'{MEGATRON}.{name}: write the option as "{name.strip("-").replace("_", "-")}"')
    for name in ("model", "training", "optimizer", "scheduler", "train_batch_size"):
        if name in config:
            raise ConfigError(f'{name}: "{MEGATRON}" says it already; leave it out')
    read, get = parse_section(_Options, MEGATRON, given), given.get
    for name in _NOT_COUNTED:
        if get(name):
            what = "a plan counts dense models only, whose heads divide the width"
            raise ConfigError(f"{MEGATRON}.{name}: {get(name)!r}, and {what}; leave it out")
    if get("swiglu") and get("ffn-hidden-size") is None:
        what = "with swiglu Megatron-LM takes 8/3 of hidden-size, down to a multiple of 64"
        raise ConfigError(f"{MEGATRON}.ffn-hidden-size: missing, and {what}; write it")
    rise = read.lr_warmup_samples / read.global_batch_size if read.lr_warmup_iters is None else read.lr_warmup_iters
    if read.lr_warmup_fraction is not None:
        rise = read.lr_warmup_fraction * (read.lr_decay_iters or read.train_iters)
    same = ("num-layers", "hidden-size", "num-attention-heads", "ffn-hidden-size", "seq-length", "normalization")
    model = {name.replace("-", "_"): given[name] for name in same if name in given} | {
        # without the flag Megatron-LM does not look at the number of groups
        "num_query_groups": get("num-query-groups", 1) if get("group-query-attention") else None,
        "init_std": get("init-method-std", 0.02),
        "tensor_parallel": get("tensor-model-parallel-size", 1),
        "pipeline_parallel": get("pipeline-model-parallel-size", 1),
        "position_embedding": "learned" if get("position-embedding-type", _LEARNED) == _LEARNED else "rope",
        "activation": "swiglu" if get("swiglu") else "gelu",
        "qk_norm": bool(get("qk-layernorm")),
        "bias": not get("disable-bias-linear"),
        "tie_embeddings": not get("untie-embeddings-and-output-weights"),
    }
    betas = [get("adam-beta1", 0.9), get("adam-beta2", 0.999)]
    adam = {"lr": read.lr, "weight_decay": read.weight_decay, "eps": get("adam-eps", 1e-8), "betas": betas}
    decay = {"cos_min_ratio": read.min_lr / read.lr, "warmup_num_steps": rise}
    return {
        "model": model,
        "training": {"steps": read.train_iters},
        "optimizer": {"type": "Muon" if "muon" in str(get("optimizer")) else "AdamW", "params": adam},
        "scheduler": {"type": "WarmupCosineLR", "params": decay},
        "train_batch_size": read.global_batch_size,
        "train_micro_batch_size_per_gpu": read.micro_batch_size,
        "zero_optimization": {"stage": 1 if get("use-distributed-optimizer") else 0},
        **{name: {"enabled": True} for name in ("bf16", "fp16") if get(name)},
    }


def arguments(options: Mapping[str, Any]) -> list[str]:
    """Megatron-LM's command line: a flag for true, nothing for false, a name and its value(s) for the rest."""
    words = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [] if value is False else [f"--{name}", *map(str, values)]
    return words
