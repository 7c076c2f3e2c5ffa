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
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ds_plugin.completep import probe, rules
from ds_plugin.completep.config import CompletePConfig
from ds_plugin.completep.model import checked_roles, describe, ratios_of
from ds_plugin.completep.param_groups import await_groups
from ds_plugin.completep.rules import Role
from ds_plugin.completep.supported import MARK, ROLES, check_model, is_decoder, label, unwrapped
from ds_plugin.core.errors import ConfigError
from ds_plugin.core.settings_model import parse_section

Trained = Literal["refuse", "redraw", "keep"]
_MATRICES = (Role.EMBEDDING, Role.SCALED_EMBEDDING, Role.HIDDEN, Role.BRANCH_OUT, Role.UNEMBEDDING)
_SCALING = "scaling"  # where attention modules keep their factor on q.k
_LOADED = "_is_hf_initialized"  # transformers' from_pretrained leaves it on parameters, from_config does not
_STD = ("initializer_range", "init_std", "initializer_factor")  # names of the init std in configs


class _Place(NamedTuple):
    """A parameter, where it lies. ``kind``: matrix, bias, gain, shift (a norm's bias), embedding, or "" for others;
    ``inner``: its module's name in its layer, None outside; ``layer``: the layer's number."""

    name: str
    parameter: nn.Parameter
    module: nn.Module
    kind: str
    inner: str | None
    layer: int


def prepare_decoder(
    model: nn.Module,
    settings: CompletePConfig | Mapping[str, Any] | None,
    *,
    seed: int | None = None,
    init_std: float | None = None,
    trained: Trained = "refuse",
) -> None:
    """Scale a freshly built decoder, once: draw its init anew by Table 1, set its attention scale, and leave the roles
    on it, from which `ds_plugin.initialize` and `optimizer_groups` build the param groups.

    ``model``: on any device but meta, also built inside ``deepspeed.zero.Init`` (every rank calls this then). It has
    ``get_input_embeddings()``, ``get_output_embeddings()`` and a ``config`` with ``num_hidden_layers``, ``hidden_size``
    and ``num_attention_heads``. ``settings``: the ``completep`` section; without one, or with the method off, nothing
    happens. ``seed``: of the init, the same on every rank and independent of their number; None: torch's.
    ``init_std``: the base model's; None: the config's. ``trained``: what to do with weights that were not just drawn:
    refuse, redraw all the same, or keep those that were trained under this very section. A second call with the same
    section does nothing.

    Raises ConfigError, and leaves the model as it was: it is of a kind that the rules do not cover, has a parameter
    without a role, pretrained or quantized weights, or an attention scale that cannot be set.
    """
    if settings is None:
        return
    if not isinstance(settings, CompletePConfig):
        settings = parse_section(CompletePConfig, "completep", settings)
    if not settings.enabled:
        return
    section = settings.folded_by_default()
    model = getattr(model, "_orig_mod", model)  # what torch.compile is around
    if is_decoder(model):
        checked_roles(model, section)
        return
    _check_kind(model, section)
    places = _places(model)
    std = _base_std(model, init_std)
    roles, gains = _roles(model, places, section), _start_of_gains(places, trained)
    attention = _attention_scale(model, section)
    ratios, seed = ratios_of(model.config, section), torch.initial_seed() if seed is None else seed
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
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth}
    outer = [m for name, m in found.items() if not any(name.startswith(f"{other}.") for other in found)]
    if len(outer) != 1:
        what = f"{label(model)} has {len(outer)} ModuleLists of config.num_hidden_layers = {depth} modules"
        raise ConfigError(f"completep: {what}, where its layers would be one; decoders of equal layers are supported")
    return outer[0]


def branch_ends(model: nn.Module) -> list[nn.Module]:
    """Of a prepared decoder's last layer, the modules that end its residual branches, as they are defined."""
    last, roles = layers_of(model)[-1], getattr(model, ROLES)
    modules = dict(model.named_modules())
    named = {name.rpartition(".")[0] for name, role in roles.items() if role in (Role.BRANCH_OUT, Role.BRANCH_OUT_BIAS)}
    inside = set(last.modules())
    return [module for name, module in modules.items() if name in named and module in inside]


def clip_grad_norm_(model: nn.Module, max_norm: float) -> torch.Tensor:
    """`torch.nn.utils.clip_grad_norm_` of a prepared decoder by the forward mode's gradient norm, which it returns;
    for loops without DeepSpeed, whose engine does so itself."""
    model = unwrapped(model)
    check_model(model)
    section, roles = getattr(model, MARK), getattr(model, ROLES)
    ratios = ratios_of(model.config, section)
    named = [(roles[name], p) for name, p in model.named_parameters() if p.grad is not None]
    norms = torch._foreach_norm([p.grad for _, p in named if p.grad is not None], 2, dtype=torch.float32)
    weighed = [norm * section.fold_factor(role, ratios) for norm, (role, _) in zip(norms, named, strict=True)]
    total = torch.linalg.vector_norm(torch.stack(weighed))
    torch.nn.utils.clip_grads_with_norm_([p for _, p in named], max_norm, total)
    return total


# -- what is refused -------------------------------------------------------------------------------------------------


def _check_kind(model: Any, section: CompletePConfig) -> None:
    if section.residual != "folded":
        remedy = 'a decoder\'s forward pass stays as it is, write "folded" or leave it out'
        raise ConfigError(f"completep.residual: {section.residual!r} is for megatron-core's GPT; {remedy}")
    kind, config = label(model), getattr(model, "config", object())
    if any(type(module).__module__.partition(".")[0] == "peft" for module in model.modules()):
        raise ConfigError(f"completep: {kind} holds PEFT's adapters of pretrained weights; disable completep")
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"completep: {kind} is an encoder-decoder; decoder-only models are supported")
    if getattr(config, "quantization_config", None) is not None:
        remedy = "CompleteP is for training from the start, build it without"
        raise ConfigError(f"completep: {kind} is quantized, by config.quantization_config; {remedy}")
    missing = [name for name in ("get_input_embeddings", "get_output_embeddings") if not hasattr(model, name)]
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    missing += [f"config.{name}" for name in names if not isinstance(getattr(config, name, None), int)]
    if not missing:
        for name in ("get_input_embeddings", "get_output_embeddings"):
            if not isinstance(getattr(getattr(model, name)(), "weight", None), nn.Parameter):
                missing.append(f"what {name}() returns")
    if missing:
        remedy = "give a causal language model, or give this one these methods and settings"
        raise ConfigError(f"completep: {kind} has no {', '.join(missing)}; {remedy}")
    for name, p in model.named_parameters():
        if p.is_meta or not p.is_floating_point():
            what = f"parameter {name!r} is {p.dtype} on device {p.device}"
            raise ConfigError(f"completep: {what}, and its init cannot be drawn; build the model plainly")


def _start_of_gains(places: Iterable[_Place], trained: Trained) -> dict[str, float]:
    """By name, the one value that all gains of a norm were built with: 0 where a norm multiplies by 1 + weight."""
    places = list(places)
    gains, found = [place for place in places if place.kind == "gain"], {}
    with probe.whole([place.parameter for place in gains]):
        for place in gains:
            value = place.parameter.detach().float()
            constant = value.numel() > 0 and bool((value == value.flatten()[0]).all()) and value.flatten()[0] in (0, 1)
            found[place.name] = float(value.flatten()[0].item()) if constant else math.nan
    loaded = [place.name for place in places if getattr(place.parameter, _LOADED, False)]
    loaded += [name for name, value in found.items() if math.isnan(value)]
    if loaded and trained == "refuse":
        raise ConfigError(
            f"completep: {loaded[0]!r} has been trained or loaded, it is not as it was built, and CompleteP draws all "
            'weights anew; disable "completep" to go on training, or give prepare_decoder trained="redraw" if that is '
            'meant, or "keep" for weights that were trained under this section'
        )
    # those that were trained start anew at what their kind does: others' are told by theirs, most norms start at 1
    usual = next((value for value in found.values() if not math.isnan(value)), 1.0)
    return {name: usual if math.isnan(value) else value for name, value in found.items()}


def _base_std(model: Any, given: float | None) -> float:
    if given is None:
        values = [getattr(model.config, name, None) for name in _STD]
        given = next((value for value in values if isinstance(value, float)), None)
    if given is None or not 0 < given < math.inf:
        raise ConfigError(f"completep: the init std is {given!r}; give prepare_decoder the base model's, init_std=0.02")
    return given


# -- roles -----------------------------------------------------------------------------------------------------------


def _places(model: nn.Module) -> list[_Place]:
    """Every parameter once, as ``named_parameters()`` names it."""
    inner = {m: (name, i) for i, each in enumerate(layers_of(model)) for name, m in each.named_modules()}
    lists = [m for m in inner if isinstance(m, nn.ModuleList)]  # inside a layer: experts, of which one would be last
    hidden = {m for each in lists for m in each.modules()}
    modules, places = dict(model.named_modules()), []
    for name, p in model.named_parameters():
        owner, _, attribute = name.rpartition(".")
        module = modules[owner]
        within, number = inner.get(module, (None, -1))
        kind = "" if module in hidden else _kind(module, attribute, p)
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
    _check_whole(model, roles, section, tied)
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


def _check_whole(model: Any, roles: Mapping[str, Role], section: CompletePConfig, tied: bool) -> None:
    found, ratios = set(roles.values()), ratios_of(model.config, section)
    if not found & {Role.BRANCH_OUT, Role.BRANCH_OUT_BIAS}:
        what = f"in {label(model)} nothing was seen that ends a residual branch (an output projection of zeros?)"
        raise ConfigError(f'completep: {what}; name it in "roles" as "branch_out"')
    folds = section.fold_factor(Role.LOGIT_NORM, ratios) != 1.0
    if tied and folds and not found & {Role.LOGIT_NORM, Role.SCALED_LOGIT_NORM}:
        what = f"{label(model)} ties its embeddings and has no final norm with gains, where the logits' factor would go"
        raise ConfigError(f"completep: {what}; write tie_word_embeddings=False")


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
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if section.base_head_dim in (None, head):
        return {}
    found: dict[nn.Module, float] = {}
    scale = rules.attention_scale(head, section.base_head_dim, section.recipe)
    remedy = f"keep the base's head size {section.base_head_dim}, or leave base_head_dim out"
    for layer in layers_of(model):
        modules = [module for module in layer.modules() if isinstance(vars(module).get(_SCALING), float)]
        if not modules:
            what = f"{label(layer)} has no module with a number {_SCALING!r}, where its attention scale would be set"
            raise ConfigError(f"completep.base_head_dim: {what}; {remedy}")
        for module in modules:
            if not math.isclose(value := getattr(module, _SCALING), head**-0.5, rel_tol=1e-6):
                what = f"{label(module)}.{_SCALING} is {value:g}, not 1 / sqrt(head size {head})"
                raise ConfigError(f"completep.base_head_dim: {what}, and is not scaled; {remedy}")
            found[module] = scale
    if scale != head**-0.5:
        told = "completep: attention is scaled by %g in place of %g: set it as `%s` where the weights run elsewhere"
        logging.getLogger("ds_plugin").warning(told, scale, head**-0.5, _SCALING)
    return found
