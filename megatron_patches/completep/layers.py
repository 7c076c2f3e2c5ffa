"""CompleteP in the model: init, residual branches, attention scale and logits of a megatron-core GPTModel.

`prepare` uses megatron-core's own extension points before the model is built (config fields and the layer spec);
`finish` does to the built model what they do not reach. Both change nothing at the base model's size, bit for bit,
but the output projections' init: megatron's default divides it by sqrt(2 x layers), Table 1 does not.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch

from ds_plugin.errors import ConfigError
from megatron_patches.completep import rules
from megatron_patches.completep.config import CompletePConfig
from megatron_patches.completep.roles import roles_of
from megatron_patches.completep.rules import Ratios, Role

_MARK = "completep_applied"  # on the TransformerConfig by prepare(), on the model by finish()


def ratios_of(config: Any, section: CompletePConfig) -> Ratios:
    """The ratios of a TransformerConfig against the section's base model."""
    return section.ratios(config.hidden_size, config.num_layers)


def prepare(config: Any, layer_spec: Any, section: CompletePConfig | None) -> tuple[Any, Any]:
    """A TransformerConfig and a layer spec that build the scaled model; the given ones are left as they are.

    Without a section (the method is off) the given ones are returned.

    Raises:
        ConfigError: the config asks for something the rules do not cover or that sets the same quantity another way.
    """
    if section is None:
        return config, layer_spec
    _refuse_unsupported(config)
    ratios = ratios_of(config, section)
    std = config.init_method_std
    hidden_std = std * section.multipliers(Role.HIDDEN, ratios).init_std
    hidden = functools.partial(torch.nn.init.normal_, mean=0.0, std=hidden_std)
    head_dim = config.kv_channels or config.hidden_size // config.num_attention_heads
    config = copy.copy(config)  # not dataclasses.replace: it would run the host's __post_init__ a second time
    config.init_method = hidden
    config.output_layer_init_method = functools.partial(
        torch.nn.init.normal_, mean=0.0, std=std * section.multipliers(Role.BRANCH_OUT, ratios).init_std
    )
    config.embedding_init_method = functools.partial(torch.nn.init.normal_, mean=0.0, std=std)
    if section.base_head_dim is not None and section.base_head_dim != head_dim:
        config.softmax_scale = rules.attention_scale(head_dim, section.base_head_dim, section.recipe)
    setattr(config, _MARK, section)

    branch = rules.residual_multiplier(ratios, section.recipe)
    if section.residual == "forward" and (branch != 1.0 or config.fp32_residual_connection):
        layer_spec = copy.deepcopy(layer_spec)
        for name in ("self_attn_bda", "mlp_bda"):
            if not hasattr(layer_spec.submodules, name):
                raise ConfigError(
                    f"completep: the layer spec {type(layer_spec.submodules).__name__} has no {name!r}, where residual "
                    "branches are added; use a GPT transformer layer spec (local or TransformerEngine)"
                )
            setattr(layer_spec.submodules, name, scaled_bias_dropout_add(branch))
    return config, layer_spec


def finished_roles(model: torch.nn.Module, section: CompletePConfig) -> dict[str, Role]:
    """The role of every parameter of a model that `finish` has been called on.

    Raises:
        ConfigError: it has not, or as `finish` does.
    """
    roles = _checked_roles(model, section)
    if not getattr(model, _MARK, False):
        raise ConfigError(
            "completep: the model is not finished; call megatron_patches.completep.finish(model, section) right after "
            "it is built, before any weights are loaded"
        )
    return roles


def finish(model: torch.nn.Module, section: CompletePConfig | None) -> dict[str, Role]:
    """Complete a model right after it is built, once: unembedding init and logits. Returns the role of every parameter.

    It scales weights as they were drawn: call it before any are loaded. A second call changes nothing, nor does one
    without a section (the method is off), which returns no roles.

    Raises:
        ConfigError: the model was not built from `prepare`'s config, has a parameter without a role, or was built
            inside ``deepspeed.zero.Init``.
    """
    if section is None:
        return {}
    roles = _checked_roles(model, section)
    if getattr(model, _MARK, False):
        return roles
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ConfigError(
            "completep: the model was built inside deepspeed.zero.Init, where its weights cannot be scaled; build it "
            "outside, deepspeed.initialize partitions it for ZeRO 3"
        )
    config: Any = model.config
    ratios = ratios_of(config, section)
    output_layer = getattr(model, "output_layer", None)
    if output_layer is not None:
        if Role.UNEMBEDDING in roles.values():
            # The host draws an untied output layer with init_method, which is the hidden matrices' here. Scaling it
            # needs no random numbers, so tensor-parallel ranks stay in step.
            hidden, unembedding = (section.multipliers(role, ratios) for role in (Role.HIDDEN, Role.UNEMBEDDING))
            scale = unembedding.init_std / hidden.init_std
            with torch.no_grad():
                output_layer.weight.mul_(scale)
        tied = Role.UNEMBEDDING not in roles.values()
        logits = rules.logit_multiplier(ratios, section.recipe, tied=tied)
        if logits != 1.0 and (tied or section.residual == "forward"):
            output_layer.register_forward_pre_hook(functools.partial(_scale_input, multiplier=logits))
    setattr(model, _MARK, True)
    return roles


def _checked_roles(model: torch.nn.Module, section: CompletePConfig) -> dict[str, Role]:
    built_with = getattr(getattr(model, "config", None), _MARK, None)
    if built_with != section:
        found = "without it" if built_with is None else f"with {_short(built_with)}"
        raise ConfigError(
            f"completep: the JSON asks for {_short(section)} but the model was built {found}; build it from "
            "config, spec = megatron_patches.completep.prepare(config, spec, section)"
        )
    tied = getattr(model, "share_embeddings_and_output_weights", False)
    return roles_of(model.named_parameters(), folded=section.residual == "folded", tied=tied)


def describe(model: torch.nn.Module, section: CompletePConfig) -> str:
    """The ratios and the multipliers of the forward pass in one line."""
    ratios = ratios_of(model.config, section)
    return (
        f"CompleteP: recipe {section.recipe}, alpha {ratios.alpha:g}, m_N {ratios.m_N:g}, m_L {ratios.m_L:g}; "
        f"residual branches x {rules.residual_multiplier(ratios, section.recipe):g}"
    )


def scaled_bias_dropout_add(multiplier: float) -> Callable[[bool, bool], Callable[..., torch.Tensor]]:
    """A layer spec's bias-dropout-add whose branch is multiplied before it is added to the residual stream.

    The sum has the residual's dtype: at alpha = 1 a branch is a 1/L-th of the stream, which bf16 would lose.
    """

    def get_bias_dropout_add(training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        def bias_dropout_add(
            x_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, prob: float
        ) -> torch.Tensor:
            x, bias = x_with_bias
            if bias is not None:
                x = x + bias
            x = torch.nn.functional.dropout(x, p=prob, training=training)
            return residual + x.to(residual.dtype) * multiplier

        return bias_dropout_add

    return get_bias_dropout_add


def _scale_input(module: torch.nn.Module, args: tuple[Any, ...], *, multiplier: float) -> tuple[Any, ...]:
    return (args[0] * multiplier, *args[1:])


def _refuse_unsupported(config: Any) -> None:
    """Everything that sets one of our quantities another way, or adds parameters without a role."""
    refused = {
        "num_moe_experts": None,
        "multi_latent_attention": False,
        "mtp_num_layers": None,
        "apply_query_key_layer_scaling": False,
        "use_mup": False,
        "softmax_scale": None,
        "heterogeneous_block_specs": False,
        "inference_fuse_tp_communication": False,  # adds residuals in kernels of its own
        "enable_hyper_connections": False,  # residual streams of another kind
    }
    for name, plain in refused.items():
        value = getattr(config, name, plain)
        if value not in (plain, None):
            raise ConfigError(
                f"completep: TransformerConfig.{name} is {value!r}, which cannot be combined; leave it at {plain!r}"
            )


def _short(section: CompletePConfig) -> str:
    return (
        f"recipe {section.recipe}, base_width {section.base_width}, base_depth {section.base_depth}, "
        f"alpha {section.alpha}"
    )


__all__ = ["describe", "finish", "finished_roles", "prepare", "ratios_of", "scaled_bias_dropout_add"]
