"""Which of Megatron-LM's options the methods go with."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from ds_plugin.completep.supported import MAMBA
from ds_plugin.config import PluginConfig
from ds_plugin.core.errors import ConfigError
from ds_plugin.core.patch import replaced

#: values of an option, beside none, that every method goes with
_FINE: dict[str, tuple[Any, ...]] = {
    "cuda_graph_impl": ("none",),
    "optimizer": ("adam", "muon", "dist_muon"),
    "dataloader_type": ("single", "cyclic"),
    "iterations_to_skip": ([],),
    "phase_transition_iterations": ([],),
    "exp_avg_sq_dtype": ("fp32", "bf16", torch.float32, torch.bfloat16),
}
_STATE = {
    "nothing is trained": "freeze_all_layers",
    "the method's state is saved with ordinary checkpoints only": "non_persistent_save_interval",
    "a conversion leaves the method's state behind; convert without it": "ckpt_convert_format",
}
_FSDP = "use_torch_fsdp2 use_megatron_fsdp use_custom_fsdp"
#: by method, why, and which options it does not go with; one that a version lacks is off
_REFUSED = {
    "sequence_length_warmup": {
        "both change how many tokens a step has": "rampup_batch_size step_batch_size_schedule",
        "a captured graph has one length": "cuda_graph_impl enable_cuda_graph external_cuda_graph",
        "its buffers are made for one length": "tp_comm_overlap",
        "it packs samples by their own lengths": "hybrid_context_parallel",
        "there are two lengths": "decoder_seq_length",
        "packed samples have no length to shorten": "sft",
        "its samples are generated": "perform_rl_step",
        "images have no length": "vision_pretraining",
        "the other model's logits are of the full length": "logits_save_dir logits_load_dir",
        "its samples say where their documents end at the full length": "dataloader_inter_document_masking",
        **_STATE,
    },
    "sequence_length_warmup.mode carry": {
        "its samples are found again by their number": "dataloader_type phase_transition_iterations",
        "their iterations would read ahead of it": "iterations_to_skip",
    },
    "sequence_length_warmup.variance": {"the optimizer scales what it keeps in so few bits": "exp_avg_sq_dtype"},
    "weight_averaging": {
        "it keeps the weights in another way; use the distributed optimizer": f"{_FSDP} optimizer_cpu_offload",
        "it exchanges the weights itself": "perform_rl_step",
        **_STATE,
    },
    "weight_averaging.restart": {"its state holds the masters, which a restart sets": "use_precision_aware_optimizer"},
    "weight_averaging.save_average": {"two saves at a time would share the process's writers": "async_save"},
    "completep": {
        "both scale the same": "use_mup apply_query_key_layer_scaling",
        "both set the same": """decoupled_lr decoupled_min_lr init_method_xavier_uniform
            no_weight_decay_cond_type apply_wd_to_qk_layernorm""",
        "it has no rules for that": """moe_latent_size experimental_attention_variant linear_attention_freq
            enable_hyper_connections heterogeneous_layers_config_path heterogeneous_layers_config_encoded_json""",
        MAMBA: """is_hybrid_model hybrid_layer_pattern hybrid_override_pattern hybrid_attention_ratio
            hybrid_mlp_ratio""",
        "it has rules for a GPTModel of megatron-core": "vision_pretraining use_legacy_models",
        "its rules hold for adam and muon, with decoupled weight decay": "optimizer",
        "it keeps one learning rate in a tensor": "optimizer_cuda_graph",
        "its warmup must start at 0, as the start is one value for all param groups": "lr_warmup_init",
        "it replaces the parameters; use the distributed optimizer": _FSDP,
    },
}


def check_options(sections: PluginConfig, options: Any) -> None:
    """Raise ConfigError for the first option that an enabled method cannot go with, naming both and the remedy."""
    averaging, warmup = sections.weight_averaging, sections.sequence_length_warmup
    enabled = {
        "sequence_length_warmup": warmup is not None,
        "sequence_length_warmup.mode carry": warmup is not None and warmup.mode == "carry",
        "sequence_length_warmup.variance": warmup is not None and warmup.reads_variance,
        "weight_averaging": averaging is not None,
        "weight_averaging.restart": averaging is not None and averaging.restart is not None,
        "weight_averaging.save_average": averaging is not None and averaging.save_average,
        "completep": sections.completep is not None,
    }
    for name in filter(enabled.get, _REFUSED):
        for option, why in ((option, why) for why, listed in _REFUSED[name].items() for option in listed.split()):
            value = getattr(options, option, None)
            if value not in (*_FINE.get(option, ()), None, False):
                given = f"{name}: {spelled(options, option)} {value}"
                raise ConfigError(f"{given} does not go together with it: {why}; leave one of the two out")
    if warmup is not None and warmup.mode == "mask" and options.context_parallel_size > 1:
        given = f"{spelled(options, 'context_parallel_size')} {options.context_parallel_size}"
        what = f"{given} divides the mask with the samples"
        raise ConfigError(f'sequence_length_warmup.mode: "mask" and {what}; write "truncate" or "carry"')


def iterations_of(options: Any) -> int:
    """Of the whole run; with ``--train-samples`` at one batch size."""
    return options.train_iters or (options.train_samples or 0) // options.global_batch_size


def layout_multiple(options: Any) -> int:
    """Into how many equal parts the layout cuts each sample: with sequence parallelism one for each tensor-parallel
    rank, with context parallelism two for each of its ranks."""
    tensor = options.tensor_model_parallel_size if options.sequence_parallel else 1
    context = options.context_parallel_size
    return math.lcm(tensor * context, 2 * context if context > 1 else 1)


def spelled(options: Any, name: str) -> str:
    """The option as the run's user writes it."""
    return str(options.spelled(name)) if hasattr(type(options), "spelled") else f"--{name.replace('_', '-')}"


@contextlib.contextmanager
def set_to(options: Any, **values: Any) -> Iterator[None]:
    """The options have these values in the block. Options that lie elsewhere say where, by ``place(name)``."""
    with contextlib.ExitStack() as stack:
        for name, value in values.items():
            owner, field = options.place(name) if hasattr(type(options), "place") else (options, name)
            stack.enter_context(replaced(owner, field, value))
        yield
