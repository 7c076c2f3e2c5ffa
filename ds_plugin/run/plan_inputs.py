"""A recipe for a number of ranks, read and validated as the host that it is for would have it.

A file with a ``megatron`` section is for Megatron-LM's scripts: the section holds their options by name, without the
dashes, and is read as the ``model``, ``training``, ``optimizer`` and ``scheduler`` that the other recipes have.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ds_plugin.config import load_json
from ds_plugin.config_model import nearest
from ds_plugin.errors import ConfigError, PluginError
from ds_plugin.run import host_config, settings
from ds_plugin.run.plan_costs import Layout
from ds_plugin.sequence_length_warmup.scheduler import SequenceLengthScheduler
from megatron_patches.gpt import padded_vocab_size

MEGATRON = "megatron"
_STAGES = "pipeline-model-parallel-size"


@dataclass(frozen=True)
class Job:
    """What is planned."""

    source: str
    settings: settings.Settings
    layout: Layout
    batch: int  # samples of a step, all ranks together
    micro_batch: int
    accumulation: int  # micro-batches of a step on one rank
    padded_vocab: int
    partitions: int  # ranks that divide one copy of the fp32 masters
    scheduler: SequenceLengthScheduler | None
    options: Mapping[str, Any]  # Megatron-LM's; empty for DeepSpeed


def read_job(
    source: str | Path | Mapping[str, Any], ranks: int, *, per_node: int = 8, vocab_size: int | None = None
) -> Job:
    """``vocab_size``: where no tokenizer of the recipe says it.

    Raises:
        ConfigError: the recipe is wrong, or its sizes do not divide the ranks or one another.
    """
    for name, value in (("--world-size", ranks), ("--ranks-per-node", per_node)):
        if value < 1:
            raise ConfigError(f"{name}: {value} is not a number of ranks; write 1 or more")
    config = load_json(source)
    named = source if not isinstance(source, Mapping) else "the config"
    options: Mapping[str, Any] = {}
    if MEGATRON in config:
        options = _megatron_options(config.pop(MEGATRON), config)
        config |= _as_deepspeed(options)
    for section in ("model", "training"):
        if section not in config:
            guess = nearest(section, config)
            hint = f'is "{guess}" meant to be it?' if guess else 'configs/ has complete ones; "megatron" is another way'
            raise ConfigError(f'{named}: section "{section}" is missing; {hint}')
    host_config.check_types(config)
    layout = _layout(config, options, ranks, per_node)
    batch, micro, accumulation = _batch(config, layout)
    run = _settings(config, batch)
    if options:
        run = _as_megatron_takes(run, options)
    warmup = run.plugin.sequence_length_warmup
    vocab = _vocabulary(run, vocab_size if vocab_size is not None else options.get("vocab-size"))
    stage = (run.host.get("zero_optimization") or {}).get("stage", 0)
    return Job(
        source=str(named),
        settings=run,
        layout=layout,
        batch=batch,
        micro_batch=micro,
        accumulation=accumulation,
        padded_vocab=_padded(vocab, options, layout),
        partitions=layout.data * layout.context if stage >= 1 else 1,
        scheduler=None if warmup is None else SequenceLengthScheduler(warmup, layout_multiple=_parts(options)),
        options=options,
    )


def arguments(options: Mapping[str, Any]) -> list[str]:
    """Megatron-LM's command line: a flag for true, nothing for false, a name and its value(s) for the rest."""
    words = []
    for name, value in options.items():
        if value is False:
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{name}", *(str(v) for v in values)]
    return words


# -- any host ----------------------------------------------------------------------------------------------------------


def _layout(config: Mapping[str, Any], options: Mapping[str, Any], ranks: int, per_node: int) -> Layout:
    model = config["model"] if isinstance(config["model"], Mapping) else {}
    sizes = {"tensor_parallel": model.get("tensor_parallel", 1)}
    if options:
        for option in (_STAGES, "context-parallel-size"):
            sizes[option] = options.get(option, 1)
    else:
        sizes |= {"pipeline_parallel": model.get("pipeline_parallel", 1), "context": 1}
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"{name}: {size!r} is not a number of ranks; write 1 or more")
    tensor, pipeline, context = sizes.values()
    together = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    if ranks % (tensor * pipeline * context):
        raise ConfigError(
            f"{together} do{'' if ' x ' in together else 'es'} not divide --world-size {ranks}; plan for a multiple of "
            f"{tensor * pipeline * context} ranks, or lower it"
        )
    layers = model.get("num_layers")
    if isinstance(layers, int) and options and layers % pipeline:
        raise ConfigError(f"{_STAGES}: {pipeline} does not divide the {layers} layers; write a divisor of {layers}")
    return Layout(ranks, per_node, tensor, pipeline, context)


def _batch(config: Mapping[str, Any], layout: Layout) -> tuple[int, int, int]:
    """Samples of a step, of a micro-batch, micro-batches of a step: given two, DeepSpeed works out the third."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    batch, micro, steps = (config.get(name) for name in names)
    ranks = layout.data
    if batch is None and micro is None:
        raise ConfigError("train_micro_batch_size_per_gpu: missing; write the samples per rank and micro-batch, e.g. 8")
    if batch is None:
        assert micro is not None
        return micro * (steps or 1) * ranks, micro, steps or 1
    unit = (micro or 1) * (steps or 1) * ranks
    whole = batch % unit == 0 if micro is None or steps is None else batch == unit
    if not whole:
        given = "".join(
            f" x {name} {value}" for name, value in zip(names[1:], (micro, steps), strict=True) if value is not None
        )
        nearby = f"{max(1, batch // unit) * unit} or {(batch // unit + 1) * unit}" if None in (micro, steps) else unit
        raise ConfigError(
            f"train_batch_size: {batch} is not {'a multiple of ' if None in (micro, steps) else ''}the {ranks} "
            f"data-parallel rank(s){given} = {unit}; write {nearby}, or another number of ranks"
        )
    if micro is None:
        micro = batch // (ranks * (steps or 1))
    return batch, micro, batch // (ranks * micro)


def _settings(config: dict[str, Any], batch: int) -> settings.Settings:
    args = settings.parser().parse_args(["--config", ""])
    args.config = {**config, "train_batch_size": batch}  # there are no ranks that could be counted
    return settings.load_settings(args)


def _vocabulary(run: settings.Settings, given: int | None) -> int:
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, int) or given < 1:
            raise ConfigError(f"--vocab-size: {given!r} is not a number of tokens; write 1 or more")
        return given
    from ds_plugin.run.tokens import load_encoder

    data, path = run.training.data, run.training.tokenizer_path
    if path is None and (data == "stdlib" or Path(data).exists()) and Path(data).suffix not in (".bin", ".idx"):
        return load_encoder(None).vocab_size
    if path is None:
        raise ConfigError(
            f"training.data: {data!r} does not say how large the vocabulary is; give --vocab-size, e.g. 50257"
        )
    try:
        return load_encoder(path).vocab_size
    except PluginError as error:
        raise ConfigError(f"{error}; or give --vocab-size, e.g. 50257") from None


def _padded(vocab: int, options: Mapping[str, Any], layout: Layout) -> int:
    if not options:
        return padded_vocab_size(vocab, layout.tensor)
    multiple = options.get("make-vocab-size-divisible-by", 128) * layout.tensor
    return -(-vocab // multiple) * multiple


# -- Megatron-LM's -----------------------------------------------------------------------------------------------------

#: option -> what it is in the other recipes
_MODEL = {
    "num-layers": "num_layers",
    "hidden-size": "hidden_size",
    "num-attention-heads": "num_attention_heads",
    "num-query-groups": "num_query_groups",
    "ffn-hidden-size": "ffn_hidden_size",
    "seq-length": "seq_length",
    "normalization": "normalization",
    "init-method-std": "init_std",
    "tensor-model-parallel-size": "tensor_parallel",
}
_NEEDED = (
    "num-layers", "hidden-size", "num-attention-heads", "seq-length", "max-position-embeddings", "micro-batch-size",
    "global-batch-size", "train-iters", "vocab-size", "lr", "weight-decay",
)  # fmt: skip
_WHOLE = (
    *_NEEDED[:9], "num-query-groups", "ffn-hidden-size", "tensor-model-parallel-size", _STAGES,
    "context-parallel-size", "make-vocab-size-divisible-by",
)  # fmt: skip
_NUMBERS = (
    "min-lr", "weight-decay", "lr-warmup-iters", "lr-warmup-samples", "adam-eps", "adam-beta1", "adam-beta2",
    "init-method-std",
)  # fmt: skip
_TWICE = ("model", "training", "optimizer", "scheduler", "train_batch_size")


def _megatron_options(options: Any, config: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(options, Mapping):
        raise ConfigError(f'"{MEGATRON}" must be a JSON object of Megatron-LM\'s options, got {options!r}')
    for name in options:
        if name.startswith("-") or "_" in name:
            raise ConfigError(f'{MEGATRON}.{name}: write the option as "{name.strip("-").replace("_", "-")}"')
    for name in _NEEDED:
        if name not in options:
            guess = nearest(name, set(options) - set(_NEEDED))
            hint = f'is "{guess}" meant to be it?' if guess else f"write Megatron-LM's --{name}"
            raise ConfigError(f"{MEGATRON}.{name}: missing; {hint}")
    for names, whole, above, said in (
        (_WHOLE, True, 0, "a whole number above 0"),
        (("lr",), False, 0, "a number above 0"),
        (_NUMBERS, False, -1, "a number of at least 0"),
    ):
        for name in (n for n in names if n in options):
            if not host_config.is_number(options[name], whole=whole) or options[name] <= above:
                raise ConfigError(f"{MEGATRON}.{name}: {options[name]!r}; write {said}")
    for name in _TWICE:
        if name in config:
            raise ConfigError(f'{name}: "{MEGATRON}" says it already; leave it out')
    return options


def _as_deepspeed(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options in the words of the other recipes."""
    get = options.get
    model = {ours: options[name] for name, ours in _MODEL.items() if name in options}
    if not get("group-query-attention"):  # without it Megatron-LM does not look at the number of groups
        model.pop("num_query_groups", None)
    model |= {
        "position_embedding": "rope" if get("position-embedding-type") == "rope" else "learned",
        "activation": "swiglu" if get("swiglu") else "gelu",
        "qk_norm": bool(get("qk-layernorm")),
        "bias": not get("disable-bias-linear"),
        "tie_embeddings": not get("untie-embeddings-and-output-weights"),
    }
    least = get("min-lr", 0.0) / options["lr"]
    rise = get("lr-warmup-iters", get("lr-warmup-samples", 0) / options["global-batch-size"])
    precision = {name: {"enabled": True} for name in ("bf16", "fp16") if get(name)}
    return {
        "model": model,
        "training": {"steps": options["train-iters"], "data": "megatron"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": options["lr"],
                "weight_decay": options["weight-decay"],
                "eps": get("adam-eps", 1e-8),
                "betas": [get("adam-beta1", 0.9), get("adam-beta2", 0.999)],
            },
        },
        "scheduler": {"type": "WarmupCosineLR", "params": {"cos_min_ratio": least, "warmup_num_steps": rise}},
        "train_batch_size": options["global-batch-size"],
        "train_micro_batch_size_per_gpu": options["micro-batch-size"],
        "zero_optimization": {"stage": 1 if get("use-distributed-optimizer") else 0},
        **precision,
    }


def _as_megatron_takes(run: settings.Settings, options: Mapping[str, Any]) -> settings.Settings:
    """With CompleteP as its scripts have it. Raises ConfigError for what the wrapped training loop would refuse."""
    from megatron_patches.pretrain.lengths import Lengths
    from megatron_patches.pretrain.options import check_options

    check_options(run.plugin, SimpleNamespace(**{name.replace("-", "_"): value for name, value in options.items()}))
    if run.plugin.sequence_length_warmup is not None:
        Lengths(run.plugin.sequence_length_warmup, full=run.model.seq_length, layout_multiple=_parts(options))
    if run.plugin.completep is None:
        return run
    return replace(run, plugin=replace(run.plugin, completep=run.plugin.completep.on_megatron()))


def _parts(options: Mapping[str, Any]) -> int:
    """Equal parts that the layout cuts a sample into; DeepSpeed's recipes have neither."""
    if not options:
        return 1
    from megatron_patches.pretrain.options import layout_multiple

    return layout_multiple(
        argparse.Namespace(
            tensor_model_parallel_size=options.get("tensor-model-parallel-size", 1),
            sequence_parallel=bool(options.get("sequence-parallel")),
            context_parallel_size=options.get("context-parallel-size", 1),
        )
    )
