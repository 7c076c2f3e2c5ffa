"""CompleteP in the model: init, residual branches, attention scale and logits of a megatron-core GPTModel.

`prepare` uses megatron-core's extension points before the model is built (config fields and the layer spec), `finish`
does to the built model what they do not reach. At the base model's size nothing changes, bit for bit, but the output
projections' init: megatron's default divides it by sqrt(2 x layers), Table 1 does not.
"""

import contextlib
import copy
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch

from ds_plugin.completep import rules
from ds_plugin.completep.config import CompletePConfig
from ds_plugin.completep.model import MARK, Prepared, check_gains, checked_roles, is_tied, ratios_of
from ds_plugin.completep.param_groups import await_groups
from ds_plugin.completep.rules import Ratios, Role
from ds_plugin.completep.sizes import head_size
from ds_plugin.completep.supported import MAMBA, bare_model, check_config, check_layer, gpt_of
from ds_plugin.core.errors import ConfigError
from megatron_patches.completep.residual import check_branches, scale_before, scale_input, scaled_add

#: a TransformerConfig's init methods, and what is drawn by them
_DRAWN = {
    "init_method": Role.HIDDEN,
    "output_layer_init_method": Role.BRANCH_OUT,
    "embedding_init_method": Role.EMBEDDING,
}
_ADDS = ("self_attn_bda", "mlp_bda")  # of a layer's submodules: what adds a residual branch to the stream
#: on an init method of ours: the base model's std, not to be scaled twice (``dataclasses.replace`` drops the mark)
_BASE_STD = "completep_base_std"
#: fields that set one of our quantities another way, or add streams, or parameters without a role
_UNSUPPORTED = {
    "not covered": """moe_latent_size apply_query_key_layer_scaling use_mup softmax_scale linear_attention_freq
        heterogeneous_block_specs inference_fuse_tp_communication enable_hyper_connections
        experimental_attention_variant""",
    MAMBA: "is_hybrid_model",
}


def prepare(config: Any, layer_spec: Any, section: CompletePConfig | None) -> tuple[Any, Any]:
    """A TransformerConfig, whose init methods' std's are the base model's, and a layer spec that build the scaled
    model; without a section the given ones, which are left as they are. The model holds the returned config; a
    multi-token prediction's block spec is to be made of the returned spec, or put through `scaled_spec`. Raises
    ConfigError: it asks for what the rules do not cover, or what sets the same quantity another way."""
    if section is None:
        return config, layer_spec
    config = copy.copy(config)  # not dataclasses.replace: it would run __post_init__ a second time
    with prepared(config, layer_spec, section) as spec:
        return config, spec


@contextlib.contextmanager
def prepared(config: Any, layer_spec: Any, section: CompletePConfig) -> Iterator[Any]:
    """`prepare` on the given TransformerConfig itself, since who gave it goes on to use it; yields the layer spec. It
    may be prepared already, shared by models or stages, its size changed; where the block fails it is as it was."""
    check_config(config)
    before = dict(vars(config))
    try:
        stds = base_stds(config)  # before: what is ours knows it, whatever depth the given ones were made for
        give_back(config)
        for name, why in ((name, why) for why, names in _UNSUPPORTED.items() for name in names.split()):
            if value := getattr(config, name, None):
                raise ConfigError(f"completep: TransformerConfig.{name} is {value!r}: {why}; leave it off")
        spec = scaled_spec(config, layer_spec, section)
        values: dict[str, Any] = {}
        for name, role in _DRAWN.items():
            std = stds[name] * section.multipliers(role, ratios_of(config, section)).init_std
            values[name] = functools.partial(torch.nn.init.normal_, mean=0.0, std=std)
            setattr(values[name], _BASE_STD, stds[name])
        if section.base_head_dim not in (None, head := head_size(config)):
            values["softmax_scale"] = rules.attention_scale(head, section.base_head_dim, section.recipe)
        if section.residual == "forward" and config.fp32_residual_connection and config.pipeline_dtype is not None:
            values["pipeline_dtype"] = torch.float32  # what a stage sends to the next is the stream
        fields = {name: (getattr(config, name), value) for name, value in values.items()}
        vars(config).update({**values, MARK: Prepared(section, fields)})
        yield spec
    except BaseException:
        vars(config).pop(MARK, None)
        vars(config).update(before)
        raise


def give_back(config: Any, *, models_live: bool = False) -> None:
    """Take back what `prepared` set on a config and still holds; ``models_live``: but what they read as they train."""
    done: Prepared | None = vars(config).pop(MARK, None)
    for name, (given, ours) in (done.fields if done is not None else {}).items():
        if getattr(config, name) == ours and not (models_live and name == "pipeline_dtype"):
            setattr(config, name, given)


def scaled_spec(config: Any, layer_spec: Any, section: CompletePConfig) -> Any:
    """A layer's, block's or multi-token prediction block's spec that scales residual branches. Raises as `prepare`."""
    for layer in _layers(layer_spec):
        _check_layer(layer, section)
    branch = rules.residual_multiplier(ratios_of(config, section), section.recipe)
    if section.residual == "forward" and (branch != 1.0 or config.fp32_residual_connection):
        layer_spec = copy.deepcopy(layer_spec)
        for layer in _layers(layer_spec):
            for name in _ADDS:
                setattr(layer.submodules, name, scaled_add(getattr(layer.submodules, name), branch))
    return layer_spec


def base_stds(config: Any) -> dict[str, float]:
    """The std of each of a TransformerConfig's init methods; ``init_method``'s in place of std / sqrt(2 x layers)."""
    stds = {}
    for name in _DRAWN:
        method = getattr(config, name)
        settings = {"mean": 0.0, "std": 1.0, **getattr(method, "keywords", {})}
        normal = getattr(method, "func", None) is torch.nn.init.normal_ and not method.args
        if not normal or settings.keys() != {"mean", "std"} or settings["mean"] != 0:
            remedy = "write init_method_std, or functools.partial(torch.nn.init.normal_, mean=0.0, std=...)"
            raise ConfigError(f"completep: TransformerConfig.{name} is {method!r}, which cannot be scaled; {remedy}")
        stds[name] = float(getattr(method, _BASE_STD, settings["std"]))
    given, plain = stds["output_layer_init_method"], stds["init_method"]
    by_depth = [std / math.sqrt(2 * config.num_layers) for std in (plain, config.init_method_std)]
    if any(math.isclose(given, std, rel_tol=1e-9) for std in by_depth):
        stds["output_layer_init_method"] = plain
    return stds


def _layers(layer_spec: Any) -> list[Any]:
    layers = getattr(getattr(layer_spec, "submodules", layer_spec), "layer_specs", None) or [layer_spec]
    return [_transformer_layer(getattr(layer, "submodules", None)) or layer for layer in layers]


def _transformer_layer(prediction: Any) -> Any:
    """The transformer layer, or its spec, in a multi-token prediction's, by megatron-core's version; None in others."""
    return getattr(prediction, "transformer_layer", None) or getattr(prediction, "mtp_model_layer", None)


def _check_layer(layer: Any, section: CompletePConfig) -> None:
    from megatron.core.transformer.identity_op import IdentityOp

    if not hasattr(layer, "submodules"):
        raise ConfigError(f"completep: the layer spec is {layer!r}, which names no submodules; give a ModuleSpec")
    check_layer(layer)
    kind = f"completep: the layer spec {type(layer.submodules).__name__}"
    for name in _ADDS:
        if (add := getattr(layer.submodules, name, None)) is None:
            raise ConfigError(f"{kind} has no {name!r}, where residual branches are added; use a GPT layer's")
        if section.residual == "forward" and scaled_add(add, 1.0) is None:
            raise ConfigError(f'{kind} has a {name} of its own, {add!r}; remove it, or write "residual": "folded"')
    cross = getattr(layer.submodules, "cross_attention", None)
    cross = getattr(cross, "module", cross)
    if cross is not None and not issubclass(cross, IdentityOp):
        raise ConfigError(f"{kind} has cross-attention {cross.__name__!r}; use a decoder-only GPT layer spec")


def finish(model: torch.nn.Module, section: CompletePConfig | None) -> dict[str, Role]:
    """Complete a model, or a pipeline's stage, once: unembedding init and logits. Returns the role of every parameter;
    none without a section (the method is off). It scales weights as they were drawn: call it right after the model is
    built, before any are loaded. From then on no optimizer steps until param groups are built by role. Raises
    ConfigError: the model is of another kind, was not built from `prepare`'s config, has a parameter without a role, is
    wrapped in what may have copied its weights, or was built inside ``deepspeed.zero.Init`` or on the meta device."""
    if section is None:
        return {}
    gpt: Any = bare_model(gpt_of(model))
    roles = checked_roles(gpt, section)
    if hasattr(gpt, MARK):
        return roles
    for name, p in gpt.named_parameters():
        if hasattr(p, "ds_id") or p.is_meta:
            where = "on device meta" if p.is_meta else "inside deepspeed.zero.Init, which ZeRO 3 does not need"
            raise ConfigError(f"completep: {name!r} was built {where}; its init cannot be scaled, build it outside")
    ratios, tied = ratios_of(gpt.config, section), is_tied(gpt)
    if section.residual == "folded":
        check_gains(gpt.config, tied=tied)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            attention = type(gpt.get_submodule(name.rpartition(".")[0])).__name__
            if roles[name] is Role.SOFTMAX_OFFSET and attention != "DotProductAttention":
                continue  # TransformerEngine's draws it in a way of its own
            if (scale := _init_scale(roles[name], section, ratios)) != 1.0:
                parameter.mul_(scale)
    layers, multipliers = list(gpt.decoder.layers), forward_multipliers(gpt, section)
    branch = multipliers["residual branches"]
    predictions = list(gpt.mtp.layers) if getattr(gpt, "mtp", None) is not None else []
    check_branches([*layers, *map(_transformer_layer, predictions)], _ADDS, branch)
    c = section.fold_factor(Role.LOGIT_NORM, ratios) if tied else 1.0
    for prediction in predictions if c != 1.0 else []:  # its norm is on what a final norm returns, c times as large
        prediction.hnorm.eps *= c * c
    if (logits := multipliers["logits"]) != 1.0 and (output_layer := getattr(gpt, "output_layer", None)) is not None:
        output_layer.register_forward_pre_hook(functools.partial(scale_input, multiplier=logits))
    if (embeddings := multipliers["embeddings"]) != 1.0 and (embedding := getattr(gpt, "embedding", None)) is not None:
        embedding.register_forward_hook(functools.partial(_scale_output, multiplier=embeddings))
    if branch != 1.0 and layers:
        scale_before(layers[-1], branch)  # of a pipeline's stage or chunk too: there its backward pass begins
    for layer in layers if gpt.config.softmax_scale is not None else []:
        layer.self_attention.softmax_scale = gpt.config.softmax_scale  # dynamic-batching inference looks there
    await_groups(gpt)
    setattr(gpt, MARK, section)
    return roles


def _scale_output(module: torch.nn.Module, args: tuple[Any, ...], output: Any, *, multiplier: float) -> Any:
    return output * multiplier


def _init_scale(role: Role, section: CompletePConfig, ratios: Ratios) -> float:
    """What a parameter is multiplied by as it was drawn: no random numbers, so tensor-parallel ranks stay in step."""
    if role in (Role.UNEMBEDDING, Role.SOFTMAX_OFFSET, *rules.FANS):  # the first two are drawn as hidden matrices are
        drawn = Role.BRANCH_OUT if role in rules.ENDS else Role.HIDDEN
        return section.multipliers(role, ratios).init_std / section.multipliers(drawn, ratios).init_std
    return section.fold_factor(role, ratios) if role is Role.LOGIT_NORM else 1.0


def forward_multipliers(model: torch.nn.Module, section: CompletePConfig | None) -> dict[str, float]:
    """What a forward pass of the model multiplies beside its weights, under a section; None: in stock code."""
    config: Any = model.config
    head = head_size(config)
    found = {"embeddings": 1.0, "residual branches": 1.0, "logits": 1.0, "q.k": 1 / math.sqrt(head)}
    if section is not None and section.residual == "forward":
        ratios = ratios_of(config, section)
        found["embeddings"] = section.embedding_multiplier
        found["residual branches"] = rules.residual_multiplier(ratios, section.recipe)
        found["logits"] = rules.logit_multiplier(ratios, section.recipe, tied=is_tied(model))
    if section is not None and section.base_head_dim not in (None, head):
        found["q.k"] = rules.attention_scale(head, section.base_head_dim, section.recipe)
    return found
