"""What a model that CompleteP has scaled says of itself, by the marks that `megatron_patches.completep` or
`prepare_decoder` leaves on it: its section, its ratios, the role of each parameter."""

from dataclasses import dataclass
from typing import Any

import torch

from ds_plugin.completep import rules, sizes
from ds_plugin.completep.config import CompletePConfig
from ds_plugin.completep.roles import role_of
from ds_plugin.completep.rules import Ratios, Role
from ds_plugin.completep.supported import MARK, ROLES, check_model, is_decoder, is_transformer_config, label, unwrapped
from ds_plugin.core.errors import ConfigError


def ratios_of(config: Any, section: CompletePConfig) -> Ratios:
    """The ratios of a TransformerConfig, or of a decoder's config, against the section's base model. Raises
    ConfigError: a size in it has no ratio to the base's (see `sizes`)."""
    if is_transformer_config(config):
        dims, experts = sizes.dims_of(config, section), sizes.experts_of(config, section)
        return section.ratios(config.hidden_size, config.num_layers, dims, experts)
    if given := next((name for name in sizes.OF_MEGATRON if getattr(section, name) is not None), None):
        what = f"of {label(config)}'s model the sizes are taken to grow in proportion"
        raise ConfigError(f"completep.{given}: {what}; keep the base's proportions, and leave it out")
    return section.ratios(config.hidden_size, config.num_hidden_layers)


@dataclass(frozen=True, slots=True)  # Megatron-Bridge sets all that it finds in attributes and tuples of a config
class Prepared:
    """What lies on a prepared TransformerConfig."""

    section: CompletePConfig
    fields: dict[str, tuple[Any, Any]]  # value before and after


def applied_section(config: Any) -> CompletePConfig | None:
    """The section that a TransformerConfig was prepared with; None: it is not `prepare`'s."""
    return getattr(getattr(config, MARK, None), "section", None)


def finished_roles(model: torch.nn.Module, section: CompletePConfig) -> dict[str, Role]:
    """The roles of a model that `finish` has been called on, by the parameters' names there; it may be wrapped. Raises
    ConfigError: it is not finished, or as `finish` does."""
    model = unwrapped(model)
    check_model(model)
    roles = checked_roles(model, section)
    if not hasattr(model, MARK):
        remedy = "call megatron_patches.completep.finish(model, section) on it as built, before any weights are loaded"
        raise ConfigError(f"completep: the model is not finished; {remedy}")
    return roles


def checked_roles(model: torch.nn.Module, section: CompletePConfig) -> dict[str, Role]:
    """The roles of a model, finished or not. Raises ConfigError: it was built without the section."""
    names = [name for name, _ in model.named_parameters()]
    if is_decoder(model):
        roles = getattr(model, ROLES)
        if values := in_force(model, section).differences(getattr(model, MARK).model_dump()):
            what = f"the model was prepared with another section: {values}"
            raise ConfigError(f"completep: {what}; give both the same one")
        if added := [name for name in names if name not in roles]:
            what = f"parameter {added[0]!r} came to the model after prepare_decoder()"
            raise ConfigError(f"completep: {what} and has no role; prepare the model when it is whole")
        return {name: roles[name] for name in names}
    if section.roles:
        raise ConfigError("completep.roles: a megatron-core GPT's parameters have their roles already; leave it out")
    built_with = getattr(model, MARK, None) or applied_section(getattr(model, "config", None))
    if built_with != section:
        found = "without it" if built_with is None else f"with {_short(built_with)}"
        what = f"completep: the JSON asks for {_short(section)} but the model was built {found}"
        remedy = "build it from config, spec = megatron_patches.completep.prepare(config, spec, section)"
        raise ConfigError(f"{what}; {remedy}")
    config: Any = model.config
    kind = {"folded": section.residual == "folded", "tied": is_tied(model), "latent": config.multi_latent_attention}
    ratios = ratios_of(config, section)
    return {name: section.merged(role_of(name, **kind), ratios) for name in names}


def in_force(model: torch.nn.Module, section: CompletePConfig) -> CompletePConfig:
    """The section as it holds for a model: of a decoder folded, where it does not say ``residual``."""
    return section.folded_by_default() if is_decoder(unwrapped(model)) else section


def is_tied(model: torch.nn.Module) -> bool:
    """Whether the output layer is the word embedding."""
    return bool(getattr(model, "share_embeddings_and_output_weights", False))


def check_gains(config: Any, *, tied: bool) -> None:
    """Raises ConfigError: the final norm's gains, which a tied output layer's multiplier goes into, are 1 + weight."""
    if tied and getattr(config, "layernorm_zero_centered_gamma", False):
        raise ConfigError(
            "completep: TransformerConfig.layernorm_zero_centered_gamma is True: nothing folds into the final norm's "
            'gains, 1 + weight; leave it False, untie the embeddings, or write "residual": "forward"'
        )


def describe(model: torch.nn.Module, section: CompletePConfig) -> str:
    """The ratios, of other sizes where they are not the width's, and the forward pass's multipliers in one line."""
    r, folded = ratios_of(model.config, section), ", folded into the weights" if section.residual == "folded" else ""
    branches = f"residual branches x {rules.residual_multiplier(r, section.recipe):g}{folded}"
    others = "".join(f", {name} {ratio:g}" for name, ratio in r.dims.items() if ratio != r.m_N)
    if (e := r.experts) != rules.Experts():
        others += f"; experts by {e.rule}, weights of the {e.form} form: m_E {e.m_E:g}, m_K {e.m_K:g}"
    return f"CompleteP: recipe {section.recipe}, alpha {r.alpha:g}, m_N {r.m_N:g}, m_L {r.m_L:g}{others}; {branches}"


def _short(section: CompletePConfig) -> str:
    return ", ".join(f"{n} {getattr(section, n)}" for n in ("recipe", "residual", "base_width", "base_depth", "alpha"))
