"""CompleteP for any pre-norm decoder in torch, Hugging Face's among them, without touching its forward pass.

In the folded mode (see `rules`) init, the optimizer's groups and the scale of attention are all there is to change.
Roles are found by a module's type and place: the embedding and the output layer by the model's own methods, the layers
as the one ModuleList of ``config.num_hidden_layers``, where a residual branch ends by what a layer adds to its stream
(`probe`). What is not recognised is an error that names it.
"""

import hashlib
import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ds_plugin.completep import probe, rules
from ds_plugin.completep.config import CompletePConfig
from ds_plugin.completep.model import checked_roles, describe, ratios_of
from ds_plugin.completep.param_groups import await_groups, build_param_groups, refuse_unused
from ds_plugin.completep.rules import FANS, Ratios, Role
from ds_plugin.completep.supported import MARK, ROLES, check_model, is_decoder, label, unwrapped
from ds_plugin.core.errors import ConfigError
from ds_plugin.core.settings_model import parse_section

_MATRICES = (Role.EMBEDDING, Role.SCALED_EMBEDDING, Role.UNEMBEDDING, *FANS)
_SCALING = "scaling"  # where attention modules keep their factor on q.k
_LOADED = "_is_hf_initialized"  # transformers' from_pretrained leaves it on parameters, from_config does not
_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads")
_STD = ("initializer_range", "init_std", "initializer_factor")  # names of the init std in configs


class _Place(NamedTuple):
    """A parameter where it lies. ``kind``: matrix, bias, gain, shift (a norm's bias), embedding, or "" for others;
    ``inner``: its module's name in its layer (None outside of all), whose number ``layer`` is."""

    name: str
    parameter: nn.Parameter
    module: nn.Module
    kind: str
    inner: str | None
    layer: int


def prepare_decoder(
    model: nn.Module, settings: CompletePConfig | Mapping[str, Any] | None, *, seed: int | None = None,
    init_std: float | None = None, trained: Literal["refuse", "redraw", "keep"] = "refuse",
) -> None:  # fmt: skip
    """Scale a freshly built decoder, once: draw its init anew by Table 1, set its attention scale, and leave the roles
    on it, from which `ds_plugin.initialize` and `optimizer_groups` build the param groups.

    ``model``: has ``get_input_embeddings()``, ``get_output_embeddings()`` and a ``config`` with ``num_hidden_layers``,
    ``hidden_size`` and ``num_attention_heads``; one built inside ``deepspeed.zero.Init`` is prepared by all ranks
    together. ``settings``: the ``completep`` section; nothing happens without one or with the method off. ``seed``: of
    the init, which neither ranks nor devices' number changes; None: torch's. ``init_std``: the base model's; None: the
    config's. ``trained``: what to do with weights that from_pretrained has left: refuse them, redraw them, or keep what
    was trained under this very section.

    Raises ConfigError, and leaves the model as it was: the rules do not cover it, a parameter has no role, its weights
    were trained or quantized, or its attention scale cannot be set.
    """
    given = parse_section(CompletePConfig, "completep", settings) if isinstance(settings, Mapping) else settings
    if given is None or not given.enabled:
        return
    section = given.folded_by_default()
    model = getattr(model, "_orig_mod", model)  # what torch.compile is around
    if is_decoder(model):
        checked_roles(model, section)
        return
    _check_kind(model, section)
    places, std = _places(model), _base_std(model, init_std)
    roles, gains = _roles(model, places, section), _start_of_gains(places, trained)
    attention = _attention_scale(model, section)
    ratios, seed = ratios_of(model.config, section), torch.initial_seed() if seed is None else seed
    roles = {name: section.merged(role, ratios) for name, role in roles.items()}  # those that were given
    for place in places if trained != "keep" else ():
        role, gain = roles[place.name], gains.get(place.name, 1.0)
        row = section.multipliers(role, ratios)
        with probe.whole([place.parameter], write=True):
            _draw(place, role, section.fold_factor(role, ratios), std * row.init_std, gain, seed)
    for module, scale in attention.items():
        setattr(module, _SCALING, scale)
    await_groups(model)
    setattr(model, ROLES, roles)
    setattr(model, MARK, section)
    logging.getLogger("ds_plugin").info("%s", describe(model, section))


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers. Raises ConfigError: there is not one ModuleList of so many."""
    depth = model.config.num_hidden_layers  # type: ignore[union-attr]
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    outer = [m for m in found if not any(m is not other and m in set(other.modules()) for other in found)]
    if len(outer) != 1:
        what = f"{label(model)} has {len(outer)} ModuleLists of config.num_hidden_layers = {depth} modules"
        raise ConfigError(f"completep: {what}, where its layers would be one; decoders of equal layers are supported")
    return outer[0]


def optimizer_groups(
    model: nn.Module, *, lr: float, weight_decay: float, eps: float = 1e-8, betas: Sequence[float] = (0.9, 0.999)
) -> list[dict[str, Any]]:
    """`build_param_groups` of a prepared decoder, which may be wrapped, for a torch AdamW that no DeepSpeed is around:
    the base model's hyperparameters in, one group per role out. Raises ConfigError: it is not prepared."""
    section, roles, ratios = _prepared(model)
    refuse_unused(section, roles.values())
    return build_param_groups(model, roles, ratios, section, lr=lr, weight_decay=weight_decay, eps=eps, betas=betas)


def clip_grad_norm_(model: nn.Module, max_norm: float) -> torch.Tensor:
    """torch's own, of a prepared decoder, by the forward mode's gradient norm, which it returns; for loops without
    DeepSpeed, whose engine does so itself."""
    model, (section, roles, ratios) = unwrapped(model), _prepared(model)
    named = [(roles[name], p) for name, p in model.named_parameters() if p.grad is not None]
    norms = torch._foreach_norm([p.grad for _, p in named if p.grad is not None], 2, dtype=torch.float32)
    weighed = [norm * section.fold_factor(role, ratios) for norm, (role, _) in zip(norms, named, strict=True)]
    total = torch.linalg.vector_norm(torch.stack(weighed))
    torch.nn.utils.clip_grads_with_norm_([p for _, p in named], max_norm, total)
    return total


def _prepared(model: Any) -> tuple[CompletePConfig, dict[str, Role], Ratios]:
    model = unwrapped(model)
    check_model(model)
    if (section := getattr(model, MARK, None)) is None:
        raise ConfigError("completep: the model is not finished; see megatron_patches.completep.finish")
    return section, checked_roles(model, section), ratios_of(model.config, section)


# -- what is refused -------------------------------------------------------------------------------------------------


def _check_kind(model: Any, section: CompletePConfig) -> None:
    kind, config = label(model), getattr(model, "config", object())
    owners = {type(module).__module__.partition(".")[0] for module in model.modules()}
    missing = [f"config.{name}" for name in _SIZES if not isinstance(getattr(config, name, None), int)]
    for name in ("get_input_embeddings", "get_output_embeddings"):
        found = getattr(model, name)() if hasattr(model, name) else None
        if not isinstance(getattr(found, "weight", None), nn.Parameter):
            missing.append(f"{name}() with a weight")
    odd = [name for name, p in model.named_parameters() if p.is_meta or not p.is_floating_point()]
    for holds, why in (
        (section.residual != "folded", 'keeps its forward pass, and "residual" is "forward"; write "folded"'),
        ("peft" in owners, "holds PEFT's adapters, which train pretrained weights; disable completep"),
        (getattr(config, "is_encoder_decoder", False), "is an encoder-decoder; decoder-only models are supported"),
        (getattr(config, "quantization_config", None), "is quantized by its config; train unquantized weights"),
        (missing, f"has no {', '.join(missing)}; give a causal language model, or give this one what it lacks"),
        (odd, f"has {', '.join(odd[:1])} on device meta or of whole numbers; build the model plainly"),
    ):
        if holds:
            raise ConfigError(f"completep: {kind} {why}")


def _start_of_gains(places: list[_Place], trained: str) -> dict[str, float]:
    """By name, what all gains of a norm were built with: 0 where a norm multiplies by 1 + weight."""
    gains, starts = [place for place in places if place.kind == "gain"], {}
    changed = [place.name for place in places if trained == "refuse" and getattr(place.parameter, _LOADED, False)]
    with probe.whole([place.parameter for place in gains]):
        for name, p, *_ in gains:
            starts[name] = float(p.detach().flatten()[0].item())
            if starts[name] not in (0.0, 1.0) or bool((p != starts[name]).any()):
                changed.append(name)
    if changed and trained != "keep":
        raise ConfigError(
            f"completep: {changed[0]!r} has been trained or loaded, and CompleteP draws weights anew; build the model "
            'from its config, or give prepare_decoder trained="redraw" if it was not, "keep" if under this section'
        )
    return starts


def _base_std(model: Any, given: float | None) -> float:
    found = next((value for n in _STD if isinstance(value := getattr(model.config, n, None), float)), 0.0)
    if not 0 < (std := found if given is None else given) < math.inf:
        raise ConfigError(f"completep: the init std is {std!r}; give prepare_decoder the base model's, init_std=0.02")
    return std


# -- roles -----------------------------------------------------------------------------------------------------------


def _places(model: nn.Module) -> list[_Place]:
    """Every parameter once, as ``named_parameters()`` names it."""
    inner = {m: (name, i) for i, each in enumerate(layers_of(model)) for name, m in each.named_modules()}
    experts = {m for each in inner if isinstance(each, nn.ModuleList) for m in each.modules()}  # lists inside a layer
    modules, places = dict(model.named_modules()), []
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    for name, p in model.named_parameters():
        owner, _, attribute = name.rpartition(".")
        # a tied weight has the output layer's name where that one comes first
        module = embedding if p is getattr(embedding, "weight", None) else modules[owner]
        within, number = inner.get(module, (None, -1))
        kind = "" if module in experts else _kind(module, attribute, p)
        places.append(_Place(name, p, module, kind, within, number))
    return places


def _kind(module: nn.Module, attribute: str, parameter: nn.Parameter) -> str:
    name = type(module).__name__
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Linear) or name == "Conv1D":  # transformers' has its weight the other way round
        return {"weight": "matrix", "bias": "bias"}.get(attribute, "")
    if "Norm" in name and len(getattr(parameter, "ds_shape", parameter.shape)) == 1:
        return {"weight": "gain", "bias": "shift"}.get(attribute, "")
    return ""


def _roles(model: Any, places: list[_Place], section: CompletePConfig) -> dict[str, Role]:
    given = _given_roles(places, section)
    first = {place.inner for place in places if place.layer == 0}
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    for place in places:
        outside = place.inner is None
        known = place.kind != "" and (outside or (place.kind != "embedding" and place.inner in first))
        if outside and place.kind in ("matrix", "bias"):
            known = place.module is output
        if place.name not in given and not known:
            raise ConfigError(_unrecognised(place))
    # an untied output layer takes part in nothing that is looked at
    needed = [p.parameter for p in places if p.layer == 0 or (p.inner is None and p.parameter is not output.weight)]
    tied = output.weight is embedding.weight
    with probe.whole(needed + ([embedding.weight] if tied else [])):
        seen = probe.first_layer(model, layers_of(model)[0], embedding)
    roles = {place.name: _role(place, seen, embedding, tied, model.config.hidden_size) for place in places} | given
    folds = section.fold_factor(Role.LOGIT_NORM, ratios_of(model.config, section)) != 1.0
    if tied and folds and not {Role.LOGIT_NORM, Role.SCALED_LOGIT_NORM} & set(roles.values()):
        what = f"{label(model)} ties its embeddings and has no final norm with gains, where the logits' factor would go"
        raise ConfigError(f"completep: {what}; write tie_word_embeddings=False")
    return roles


def _given_roles(places: list[_Place], section: CompletePConfig) -> dict[str, Role]:
    given: dict[str, Role] = {}
    for pattern, role in section.roles.items():
        names = [place.name for place in places if re.fullmatch(pattern, place.name)]
        if not names:
            what = f"completep.roles: {pattern!r} matches no parameter of the model, such as {places[0].name!r}"
            raise ConfigError(f"{what}; write an expression of whole names, or take it out")
        given |= {name: Role(role) for name in names}
    return given


def _unrecognised(place: _Place) -> str:
    shape = list(getattr(place.parameter, "ds_shape", place.parameter.shape))
    vector, inside = len(shape) < 2, place.inner is not None
    likely = (Role.BLOCK_BIAS if vector else Role.HIDDEN) if inside else (Role.FINAL_NORM if vector else Role.EMBEDDING)
    pattern = re.sub(rf"\.{place.layer}\.", ".[0-9]+.", place.name, count=1) if inside else place.name
    known = ", ".join(role.value for role in Role)
    return (
        f"completep: parameter {place.name!r} of shape {shape} in a {type(place.module).__name__} has no role; write "
        f'"roles": {{"{pattern}": "{likely.value}"}} in the section if that is what it is (roles: {known}), or disable '
        '"completep"'
    )


def _role(place: _Place, seen: probe.Seen, embedding: nn.Module, tied: bool, width: int) -> Role:
    """Of a recognised parameter; for others what the section says takes the place of this."""
    scaled = abs(seen.embedding_factor / math.sqrt(width) - 1) < 0.02  # any other factor is no matter of the width
    if place.inner is not None:
        if place.inner in seen.ends:
            return Role.BRANCH_OUT if place.kind == "matrix" else Role.BRANCH_OUT_BIAS
        if place.kind in ("gain", "shift"):
            return Role.QK_NORM if "." in place.inner else Role.BLOCK_NORM
        return Role.HIDDEN if place.kind == "matrix" else Role.BLOCK_BIAS
    if place.kind == "embedding":
        return Role.SCALED_EMBEDDING if place.module is embedding and scaled else Role.EMBEDDING
    if place.kind == "matrix":
        return Role.UNEMBEDDING
    if place.kind == "bias" or place.module in seen.before or not tied:
        return Role.FINAL_NORM
    return Role.SCALED_LOGIT_NORM if scaled else Role.LOGIT_NORM


# -- what is set -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _draw(place: _Place, role: Role, factor: float, std: float, gain: float, seed: int) -> None:
    """A parameter's init: matrices by a generator of their own, so that no other parameter, rank or shard counts."""
    p = place.parameter
    if role in _MATRICES:
        number = int.from_bytes(hashlib.sha256(f"{seed} {place.name}".encode()).digest()[:7])
        generator = torch.Generator(p.device).manual_seed(number)
        p.copy_(torch.empty(p.shape, dtype=torch.float32, device=p.device).normal_(0.0, std, generator=generator))
        if (padding := getattr(place.module, "padding_idx", None)) is not None:
            p[padding].zero_()
    elif place.kind in ("bias", "shift"):
        p.zero_()
    elif place.kind == "gain":
        p.fill_(factor + gain - 1.0)  # where the norm multiplies by 1 + weight, 1 + it is the factor
    else:
        p.mul_(factor)


def _attention_scale(model: Any, section: CompletePConfig) -> dict[nn.Module, float]:
    """By attention module, the factor on q.k to set; none where heads are as large as the base's."""
    config, base = model.config, section.base_head_dim
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if base in (None, head):
        return {}
    scale, usual = rules.attention_scale(head, base, section.recipe), head**-0.5
    found: dict[nn.Module, float] = {}
    for layer in layers_of(model):
        modules = {m: vars(m)[_SCALING] for m in layer.modules() if isinstance(vars(m).get(_SCALING), float)}
        if not modules or not all(math.isclose(value, usual, rel_tol=1e-6) for value in modules.values()):
            what = f"the numbers {_SCALING!r} of {label(layer)}'s modules are {list(modules.values())}"
            remedy = f"keep the base's head size {base}, or leave base_head_dim out"
            raise ConfigError(f"completep.base_head_dim: {what}, not 1 / sqrt(head size {head}); {remedy}")
        found |= dict.fromkeys(modules, scale)
    if scale != usual:
        told = "completep: attention is scaled by %g in place of %g: set it as `%s` where the weights run elsewhere"
        logging.getLogger("ds_plugin").warning(told, scale, usual, _SCALING)
    return found
