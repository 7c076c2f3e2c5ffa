"""Which models the rules cover, what may be around one, and how anything else is called in an error. Classes are told
by their names, so that nothing is imported for it."""

from typing import Any

import torch

from ds_plugin.core.errors import ConfigError

MODELS = (
    "megatron-core GPTModels, dense or with experts, the same in DeepSpeed's pipeline "
    "(megatron_patches.models.pipeline_gpt), and decoders that ds_plugin.completep.prepare_decoder(model, section) has "
    "been called on as they were built"
)
#: why layers of state space models, alone or between others in a hybrid model, have no rules
MAMBA = "on Mamba layers muP and the spectral condition fail (Vankadara et al., NeurIPS 2024)"
MARK = "completep_applied"  # on a finished or prepared model its section, on a TransformerConfig a `Prepared`
ROLES = "completep_roles"  # on a prepared decoder: its parameters' roles, by name
_HYBRID = ("MambaModel", "HybridModel", "MambaStackSubmodules", "HybridStackSubmodules")  # of layers, Mamba's too
_PIPELINE = "PipelineGPT"  # our model in DeepSpeed's pipeline; its stage is a StageOfGPT
_COMPILED = "_orig_mod"  # where torch.compile keeps the module
_INSIDE = (_COMPILED, "module")  # where others do


def unwrapped(model: Any) -> Any:
    """The model inside torch.compile, DistributedDataParallel, Float16Module or a DeepSpeed engine; or itself."""
    names = () if is_known(model) else _INSIDE
    inside = [found for name in names if isinstance(found := getattr(model, name, None), torch.nn.Module)]
    return unwrapped(inside[0]) if inside else model


def bare_model(model: Any) -> Any:
    """The model as it was built. Raises ConfigError: it is not of a supported kind, or something is around it that may
    have copied its weights (torch.compile has not)."""
    bare = unwrapped(model)
    check_model(bare)
    while model is not bare and isinstance(getattr(model, _COMPILED, None), torch.nn.Module):
        model = getattr(model, _COMPILED)
    if model is not bare:
        what = f"{label(model)} around {label(bare)}"
        raise ConfigError(f"completep: given {what}; give the model itself, before it is wrapped")
    return bare


def gpt_of(model: Any) -> Any:
    """A model under the names of a GPTModel: a `PipelineGPT`'s stage as a `StageOfGPT`, any other as it is."""
    return model.gpt if is_a(model, _PIPELINE) else model


def is_foreign_pipeline(model: Any) -> bool:
    """Whether this is another model for DeepSpeed's pipeline."""
    return is_a(model, "PipelineModule") and not is_a(model, _PIPELINE)


def is_decoder(model: Any) -> bool:
    """Whether this is a model that `prepare_decoder` has been called on, not wrapped."""
    return ROLES in getattr(model, "__dict__", {})  # not hasattr: wrappers pass it on


def is_known(model: Any) -> bool:
    """Whether roles can be told of this model, not wrapped."""
    return is_decoder(model) or is_a(model, "GPTModel", "StageOfGPT")


def check_model(model: Any) -> None:
    """Raises ConfigError for a model of another kind."""
    if not is_known(model):
        why = f": {MAMBA}" if is_a(model, *_HYBRID) else ""
        remedy = f"supported are {MODELS}; build one of them, or leave the section out"
        raise ConfigError(f"completep: this is {label(model)}{why}; {remedy}")


def is_transformer_config(config: Any) -> bool:
    """Whether this is megatron-core's."""
    return is_a(config, "TransformerConfig")


def check_config(config: Any) -> None:
    """Raises ConfigError for what is no TransformerConfig."""
    if not is_transformer_config(config):
        raise ConfigError(
            f"completep: the config is {label(config)}; supported are megatron-core's TransformerConfig (for a "
            "GPTConfig, gpt.transformer_config(cfg, dtype)) and MLATransformerConfig"
        )
    if config.multi_latent_attention and not is_a(config, "MLATransformerConfig"):
        what = f"{label(config)}.multi_latent_attention is {config.multi_latent_attention!r}"
        raise ConfigError(f"completep: {what}, and it has no ranks; use an MLATransformerConfig")


def check_layer(layer: Any) -> None:
    """Raises ConfigError for a layer spec whose layers may be Mamba's, or whose tokens see later ones, as an encoder's
    do."""
    if is_a(layer.submodules, *_HYBRID):
        what = f"the layer spec is of {type(layer.submodules).__name__}, of a hybrid model, and {MAMBA}"
        raise ConfigError(f"completep: {what}; use a GPT layer spec")
    params = getattr(getattr(layer.submodules, "self_attention", None), "params", None) or {}
    if (name := getattr(params.get("attn_mask_type"), "name", None)) in ("padding", "no_mask"):
        what = f"the layer spec's attn_mask_type is {name!r}, an encoder's as in BERT and T5"
        raise ConfigError(f"completep: {what}; use a decoder-only GPT layer spec")


def label(thing: Any) -> str:
    """What kind of object this is, for an error: whose, and its class."""
    cls = type(thing)
    known = {"transformers": "Hugging Face's ", "megatron": "megatron-core's ", "deepspeed": "DeepSpeed's "}
    return known.get(cls.__module__.partition(".")[0], f"{cls.__module__}.") + cls.__name__


def is_a(thing: Any, *names: str) -> bool:
    """Whether an object's class, or one that it is derived from, has one of these names."""
    return any(cls.__name__ in names for cls in type(thing).__mro__)
