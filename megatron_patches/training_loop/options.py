"""Which of Megatron-LM's options the methods go with."""

import math
from typing import Any

from ds_plugin.config import PluginConfig
from ds_plugin.core.errors import ConfigError

# option: (the value it has when it is off, or the values that go together, why others do not); an option that a version
# lacks is off
_STATE = {
    "override_ckpt_iteration": (None, "the weights of one iteration would come with the method's state of another"),
    "freeze_all_layers": (False, "nothing is trained"),
    "non_persistent_save_interval": (None, "the method's state is saved with ordinary checkpoints only"),
    "ckpt_convert_format": (None, "a conversion leaves the method's state behind; convert without it"),
}
_WARMUP = {
    "rampup_batch_size": (None, "both change how many tokens a step has"),
    "step_batch_size_schedule": (None, "both change how many tokens a step has"),
    "cuda_graph_impl": ("none", "a captured graph has one length"),
    "enable_cuda_graph": (False, "a captured graph has one length"),
    "external_cuda_graph": (False, "a captured graph has one length"),
    "tp_comm_overlap": (False, "its buffers are made for one length"),
    "hybrid_context_parallel": (False, "it packs samples by their own lengths"),
    "decoder_seq_length": (None, "there are two lengths"),
    "sft": (False, "packed samples have no length to shorten"),
    "perform_rl_step": (False, "its samples are generated"),
    "vision_pretraining": (False, "images have no length"),
    **_STATE,
}
_AVERAGING = {
    "use_torch_fsdp2": (False, "it keeps the weights in another way; use the distributed optimizer"),
    "use_megatron_fsdp": (False, "it keeps the weights in another way; use the distributed optimizer"),
    "use_custom_fsdp": (False, "it keeps the weights in another way; use the distributed optimizer"),
    "optimizer_cpu_offload": (False, "it keeps the weights in another way"),
    "perform_rl_step": (False, "it exchanges the weights itself"),
    **_STATE,
}
_SAVE_AVERAGE = {
    "async_save": (False, "two saves at a time would share the process's writers"),
}
_NO_GPT = "the model is no GPTModel of megatron-core, which is what it has rules for"
_COMPLETEP = {
    "use_mup": (False, "both scale the same quantities"),
    "decoupled_lr": (None, "both set the learning rates of the embedding and the output layer"),
    "num_experts": (None, "it has no rules for mixtures of experts"),
    "multi_latent_attention": (False, "it has no rules for latent attention"),
    "mtp_num_layers": (None, "it has no rules for multi-token prediction"),
    "optimizer": ("adam", "its rules hold for adam, with decoupled weight decay"),
    "use_layer_wise_distributed_optimizer": (False, "it has param groups of its own"),
    "optimizer_cuda_graph": (False, "it keeps one learning rate in a tensor"),
    "decoupled_min_lr": (None, "both set the learning rates of the embedding and the output layer"),
    "lr_warmup_init": (0.0, "its warmup must start at 0, as the start is one value for all param groups"),
    "no_weight_decay_cond_type": (None, "both say which parameters decay"),
    "apply_wd_to_qk_layernorm": (False, "both say which parameters decay"),
    "use_torch_fsdp2": (False, "it replaces the parameters; use the distributed optimizer"),
    "use_megatron_fsdp": (False, "it replaces the parameters; use the distributed optimizer"),
    "use_custom_fsdp": (False, "it replaces the parameters; use the distributed optimizer"),
    "init_method_xavier_uniform": (False, "both set the init"),
    "softmax_type": (("vanilla", "off-by-one"), "it has no rule for a learned offset of the softmax"),
    "experimental_attention_variant": (None, "it has no rules for its attention"),
    "linear_attention_freq": (None, "it has no rules for linear attention"),
    "heterogeneous_layers_config_path": (None, "its rules hold for layers that are alike"),
    "heterogeneous_layers_config_encoded_json": (None, "its rules hold for layers that are alike"),
    "enable_hyper_connections": (False, "it has no rules for their residual streams"),
    "apply_query_key_layer_scaling": (False, "both scale the attention"),
    "is_hybrid_model": (False, _NO_GPT),
    "hybrid_layer_pattern": (None, _NO_GPT),
    "hybrid_override_pattern": (None, _NO_GPT),
    "hybrid_attention_ratio": (0.0, _NO_GPT),
    "hybrid_mlp_ratio": (0.0, _NO_GPT),
    "vision_pretraining": (False, _NO_GPT),
    "use_legacy_models": (False, _NO_GPT),
}


def check_options(sections: PluginConfig, options: Any) -> None:
    """Raise ConfigError for the first option that an enabled method cannot go with, naming both and the remedy."""
    averaging = sections.weight_averaging
    for name, section, refused in (
        ("sequence_length_warmup", sections.sequence_length_warmup, _WARMUP),
        ("weight_averaging", averaging, _AVERAGING),
        ("weight_averaging.save_average", averaging if averaging and averaging.save_average else None, _SAVE_AVERAGE),
        ("completep", sections.completep, _COMPLETEP),
    ):
        for option, (off, why) in refused.items() if section is not None else ():
            value, fine = getattr(options, option, None), off if isinstance(off, tuple) else (off,)
            if value not in (*fine, None, False):
                raise ConfigError(
                    f"{name}: --{option.replace('_', '-')} {value} does not go together with it: {why}; leave one of "
                    "the two out"
                )
    if averaging is not None and averaging.restart is not None:
        raise ConfigError(
            "weight_averaging.restart: not supported in Megatron-LM's training loop; remove it, or train with DeepSpeed"
        )


def layout_multiple(options: Any) -> int:
    """The number of equal parts that the layout cuts each sample into.

    Sequence parallelism: one for each tensor-parallel rank; context parallelism: two for each of its ranks.
    """
    tensor = options.tensor_model_parallel_size if options.sequence_parallel else 1
    context = options.context_parallel_size
    return math.lcm(tensor * context, 2 * context if context > 1 else 1)
