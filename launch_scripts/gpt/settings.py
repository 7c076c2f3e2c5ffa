"""What the example script reads: one JSON file, and the flags that override it.

The JSON is a DeepSpeed config with our sections and two of the script's own, ``model`` and ``training``.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from pydantic import Field, model_validator

from ds_plugin.config import PluginConfig, load_json, split_config
from ds_plugin.core.errors import ConfigError
from ds_plugin.core.settings_model import SectionConfig, Steps, Tokens, Waiting, nearest, parse_section
from ds_plugin.deepspeed_engine import json_check
from ds_plugin.deepspeed_engine.masters import refuse_nvme
from ds_plugin.sequence_length_warmup.plan import Plan, plan
from ds_plugin.sequence_length_warmup.schedule import LengthSchedule
from megatron_patches.models.gpt import GPTConfig


class TrainingConfig(SectionConfig):
    """The ``training`` section: how long, on what, what is measured along the way. Intervals are in optimizer steps."""

    steps: int = Field(0, ge=0, le=10**9, description="optimizer steps in all, e.g. 300")
    tokens: Tokens | None = Field(None, description="trained tokens in all, in place of steps or as another end")
    seed: int = Field(1234, ge=1, le=2**31 - 1, description="seed of the weights and of the sample order")
    data: str = Field("stdlib", description="text or record files, a folder of them, a .bin/.idx prefix, or stdlib")
    text_key: str = Field("text", min_length=1, description="what of a record (.jsonl, .parquet, ...) is its text")
    tokenizer: str | None = Field(
        None, min_length=1, description="a Hugging Face tokenizers file, or the folder of one; null for bytes"
    )
    eod: str | None = Field(None, min_length=1, description="the tokenizer's end-of-document token")
    split: str = Field("98,2,0", description="shares of training, validation and test documents")
    eval_interval: Steps = Field(50, description="steps between evaluations; the last step is always evaluated")
    eval_samples: int = Field(
        64, ge=1, le=10**6, description="samples of an evaluation, always the same (rounded up to whole micro-batches)"
    )
    save_interval: Steps = Field(100, description="steps between checkpoints; the last step is always saved")
    log_interval: Waiting = Field(5, description="steps between two reads of the training loss")
    data_workers: int = Field(0, ge=0, le=256, description="processes that load data, per rank")
    skipped_in_a_row: Steps = Field(1000, description="so many steps without an update (fp16 overflows) end the run")

    @model_validator(mode="after")
    def _ends(self) -> "TrainingConfig":
        if self.steps == 0 and self.tokens is None:
            raise ValueError(
                "training.steps: missing; write the optimizer steps in all, e.g. 300, or the trained tokens as "
                '"tokens": 10000000'
            )
        return self

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizers file, None for bytes."""
        return Path(self.tokenizer) if self.tokenizer is not None else None


@dataclass(frozen=True)
class Settings:
    """All the script needs, validated. ``deepspeed``: the config for ``ds_plugin.initialize``, with our sections."""

    deepspeed: dict[str, Any]
    model: GPTConfig
    training: TrainingConfig
    plugin: PluginConfig
    step_limit: int | None = None  # where the run ends at the latest; training.steps is what it should come to

    @property
    def open_ended(self) -> bool:
        """Whether the run may take more steps than planned: it ends by tokens, and lengths may be held."""
        warmup = self.plugin.sequence_length_warmup
        return self.training.tokens is not None and warmup is not None and warmup.pacing == "adaptive"

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            if (self.deepspeed.get(name) or {}).get("enabled"):
                return dtype
        return torch.float32


#: flag -> where it goes in the JSON
_OVERRIDES: Mapping[str, tuple[str, ...]] = {
    "steps": ("training", "steps"),
    "tokens": ("training", "tokens"),
    "seed": ("training", "seed"),
    "data": ("training", "data"),
    "text_key": ("training", "text_key"),
    "tokenizer": ("training", "tokenizer"),
    "eod": ("training", "eod"),
    "eval_interval": ("training", "eval_interval"),
    "save_interval": ("training", "save_interval"),
    "num_layers": ("model", "num_layers"),
    "hidden_size": ("model", "hidden_size"),
    "num_attention_heads": ("model", "num_attention_heads"),
    "seq_length": ("model", "seq_length"),
    "tensor_parallel": ("model", "tensor_parallel"),
    "pipeline_parallel": ("model", "pipeline_parallel"),
    "zero_stage": ("zero_optimization", "stage"),
}
_DEEPSPEED_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu")


def parser() -> argparse.ArgumentParser:
    """The script's flags. Every flag but the run's own (name, resume, where to write) overrides a key of the JSON."""
    p = argparse.ArgumentParser(description="Pre-train a megatron-core GPT with DeepSpeed and the three methods.")
    p.add_argument("--deepspeed_config", "--config", dest="config", required=True, help="the JSON file")
    p.add_argument("--name", default="run", help="the run is written to RUNS/NAME")
    p.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs")
    p.add_argument("--cache", type=Path, default=Path("data"), help="folder for prepared data")
    p.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    p.add_argument("--tag", help="with --resume: the checkpoint to go on from")
    p.add_argument("--no-verify", action="store_true", help="with --resume: do not compare files with what was saved")
    p.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # some launchers add it
    p.add_argument("--data", help="text, .jsonl, .jsonl.gz or .parquet, a folder of such files, or a .bin/.idx prefix")
    p.add_argument("--text-key", help='what of each record is its text, "text" if not given')
    p.add_argument("--tokenizer", help="a Hugging Face tokenizer.json, or the folder of one")
    p.add_argument("--eod", help="the tokenizer's end-of-document token, such as '<|endoftext|>'")
    for flag in ("steps", "tokens", "seed", "eval-interval", "save-interval", "num-layers", "hidden-size"):
        p.add_argument(f"--{flag}", type=int, metavar="N", help=_replaced(flag))
    for flag in ("num-attention-heads", "seq-length", "tensor-parallel", "pipeline-parallel", "zero-stage"):
        p.add_argument(f"--{flag}", type=int, metavar="N", help=_replaced(flag))
    p.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="in place of the JSON's bf16 and fp16")
    return p


def _replaced(flag: str) -> str:
    return f"in place of the JSON's {'.'.join(_OVERRIDES[flag.replace('-', '_')])}"


def load_settings(args: argparse.Namespace) -> Settings:
    """Read the JSON, apply the flags, and validate all of it.

    Raises:
        ConfigError: with the field, its value and the remedy.
    """
    if args.tag is not None and not args.resume:
        raise ConfigError(f"--tag: {args.tag!r} without --resume; add --resume to go on from that checkpoint")
    config = load_json(args.config)
    for flag, path in _OVERRIDES.items():
        value = getattr(args, flag)
        if value is not None:
            section = config.setdefault(path[0], {})
            if not isinstance(section, dict):
                raise ConfigError(f'"{path[0]}" must be a JSON object, got {section!r}')
            section[path[1]] = value
    if args.precision is not None:
        config = {key: value for key, value in config.items() if key not in ("bf16", "bfloat16", "fp16")}
        if args.precision != "fp32":
            config[args.precision] = {"enabled": True}
    _rename_bfloat16(config)
    for name in ("model", "training"):
        if name not in config:
            guess = nearest(name, config)
            hint = (
                f'is "{guess}" meant to be it?'
                if guess
                else f'add "{name}": {{...}}, as configs/quickstart.json has it'
            )
            raise ConfigError(f'{args.config}: section "{name}" is missing; {hint}')
    model = parse_section(GPTConfig, "model", config.pop("model"))
    training = parse_section(TrainingConfig, "training", config.pop("training"))
    deepspeed, plugin = split_config(config)
    ranks, rest = divmod(dist.get_world_size() if dist.is_initialized() else 0, model.model_ranks)
    json_check.check(deepspeed, ranks if ranks and not rest else None, auto=True)  # the rest is refused with the groups
    limit = training.steps or None
    if (warmup := plugin.sequence_length_warmup) is not None and warmup.duration.share is not None:
        warmup = warmup.in_run(steps=limit, tokens=training.tokens)
        plugin = dataclasses.replace(plugin, sequence_length_warmup=warmup)
        config.update(plugin.to_dict())
    training = _with_steps(config, training, model, plugin)
    _fill_auto(config, training, model, plugin)
    _check_together(config, model, plugin)
    return Settings(config, model, training, plugin, limit)


def _rename_bfloat16(config: dict[str, Any]) -> None:
    """DeepSpeed's older name for bf16, which it reads where there is no other: here there is one name for it."""
    if not isinstance(config.get("bfloat16"), dict):  # a wrong one is refused by its name
        return
    older = config.pop("bfloat16")
    if config.get("bf16") is None:
        config["bf16"] = older
    elif config["bf16"] != older:
        raise ConfigError(
            f'bfloat16: {older!r} and bf16: {config["bf16"]!r}; DeepSpeed reads "bf16" alone then, remove "bfloat16"'
        )


def _batch(config: Mapping[str, Any], model: GPTConfig) -> int:
    """Samples of an optimizer step, all ranks together; 1 when the JSON does not say, which is refused elsewhere."""
    if config.get("train_batch_size") is not None:
        return config["train_batch_size"]
    ranks = dist.get_world_size() // model.model_ranks if dist.is_initialized() else 1
    micro, steps = config.get("train_micro_batch_size_per_gpu"), config.get("gradient_accumulation_steps")
    return max(1, (micro or 1) * (steps or 1) * ranks)


def _planned(
    config: Mapping[str, Any], model: GPTConfig, plugin: PluginConfig, steps: int | None, tokens: int | None
) -> Plan:
    """What a run of so many steps or tokens comes to."""
    batch, warmup = _batch(config, model), plugin.sequence_length_warmup
    if warmup is None:
        count = steps if steps is not None else -(-(tokens or 0) // (batch * model.seq_length))
        return Plan(count, count * batch * model.seq_length, count * batch * model.seq_length)
    scheduler = LengthSchedule(warmup)
    return plan(scheduler, batch, steps=steps, tokens=tokens)


def _with_steps(
    config: Mapping[str, Any], training: TrainingConfig, model: GPTConfig, plugin: PluginConfig
) -> TrainingConfig:
    """The settings with the steps that ``tokens`` take filled in, if nothing is held."""
    if training.tokens is None:
        return training
    steps = _planned(config, model, plugin, None, training.tokens).steps
    return training.model_copy(update={"steps": min(training.steps or steps, steps)})


def _fill_auto(config: dict[str, Any], training: TrainingConfig, model: GPTConfig, plugin: PluginConfig) -> None:
    """``"auto"`` for the scheduler's length means the run's own, so that the two cannot disagree.

    A scheduler that follows tokens counts full-length batches.
    """
    params = (config.get("scheduler") or {}).get("params") or {}
    if params.get("total_num_steps") != "auto":
        return
    params["total_num_steps"] = training.steps
    warmup = plugin.sequence_length_warmup
    if warmup is not None and warmup.learning_rate.by == "tokens":
        tokens = training.tokens or _planned(config, model, plugin, training.steps, None).trained
        params["total_num_steps"] = -(-tokens // (_batch(config, model) * model.seq_length))


def _check_together(config: Mapping[str, Any], model: GPTConfig, plugin: PluginConfig) -> None:
    if all(config.get(key) is None for key in _DEEPSPEED_BATCH):
        raise ConfigError("train_micro_batch_size_per_gpu: missing; write the samples per rank and micro-batch, e.g. 8")
    if not (config.get("optimizer") or {}).get("type"):
        raise ConfigError('optimizer: missing; write {"type": "AdamW", "params": {"lr": 0.001}}')
    if config.get("managed_gradient_accumulation") is False:
        raise ConfigError("managed_gradient_accumulation: False is not for this script, whose loop counts; remove it")
    half = next((name for name in ("bf16", "fp16") if (config.get(name) or {}).get("enabled")), None)
    if half == "fp16" and not get_accelerator().is_fp16_supported():
        raise ConfigError("fp16.enabled: True, but this machine's accelerator has no fp16; write bf16 or neither")
    stage = (config.get("zero_optimization") or {}).get("stage", 0)
    if half and stage == 0 and model.tensor_parallel > 1 and config.get("gradient_clipping"):
        raise ConfigError(
            f"zero_optimization.stage: 0 with {half} and tensor_parallel {model.tensor_parallel}: DeepSpeed clips by a "
            "wrong gradient norm there (it leaves out the shards of other tensor-parallel ranks); write stage 1"
        )
    if model.pipeline_parallel > 1:
        _check_pipeline(config, model, half)
    if plugin.weight_averaging is not None:
        refuse_nvme(config)
    warmup = plugin.sequence_length_warmup
    if warmup is not None and warmup.end_length != model.seq_length:
        raise ConfigError(
            f"sequence_length_warmup.end_length: {warmup.end_length} is not model.seq_length {model.seq_length}, so "
            f"training would never see the full length; write {model.seq_length}"
        )


def _check_pipeline(config: Mapping[str, Any], model: GPTConfig, half: str | None) -> None:
    """What DeepSpeed's pipeline would train wrongly, or refuse by an assertion."""
    zero, where = config.get("zero_optimization") or {}, f"with pipeline_parallel {model.pipeline_parallel}"
    stage = zero.get("stage", 0)
    if stage > 1:
        raise ConfigError(f"zero_optimization.stage: {stage} {where}: DeepSpeed's pipeline takes 0 or 1; write stage 1")
    if stage == 0 and config.get("gradient_clipping"):
        raise ConfigError(
            f"gradient_clipping: {config['gradient_clipping']} {where} and zero_optimization.stage 0: DeepSpeed clips "
            "by a wrong gradient norm there (it leaves out parameters of later stages); write stage 1, or "
            '"gradient_clipping": 0'
        )
    if stage == 0 and half == "bf16":
        raise ConfigError(
            f"zero_optimization.stage: 0 {where} and bf16: DeepSpeed cannot load the checkpoints that it writes there; "
            "write stage 1"
        )
    accumulated = (config.get("data_types") or {}).get("grad_accum_dtype")
    offloaded = ((zero.get("offload_optimizer") or {}).get("device") or "none") != "none"
    if model.tie_embeddings and accumulated is not None and (half == "fp16" or offloaded):
        raise ConfigError(
            f"data_types.grad_accum_dtype: {accumulated!r} {where} and model.tie_embeddings: DeepSpeed does not add up "
            "the gradients of the tied weight there; remove it, or untie the embeddings"
        )
