"""CompleteP in the model: init, residual branches, attention scale and logits of a megatron-core GPTModel.

`prepare` uses megatron-core's own extension points before the model is built (config fields and the layer spec), on a
copy; `prepared` does so on the very config that a script builds its model from. `finish` does to the built model what
they do not reach. Both change nothing at the base model's size, bit for bit, but the output projections' init:
megatron's default divides it by sqrt(2 x layers), Table 1 does not.

Residual branches and logits are multiplied in the forward pass (``"residual": "forward"``), or their multipliers are
folded into the weights (``"folded"``), which leaves modules and forward pass megatron-core's own.
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
from ds_plugin.completep.supported import bare_model, check_config, check_mask, gpt_of
from ds_plugin.core.errors import ConfigError
from megatron_patches.completep.residual import scale_before, scale_input, scaled_add

#: a TransformerConfig's init methods, and what is drawn by them
_DRAWN = {
    "init_method": Role.HIDDEN,
    "output_layer_init_method": Role.BRANCH_OUT,
    "embedding_init_method": Role.EMBEDDING,
}
_ADDS = ("self_attn_bda", "mlp_bda")  # of a layer's submodules: what adds a residual branch to the stream
#: on an init method that is ours: the base model's std, which a config without a mark (by ``dataclasses.replace`` of a
#: prepared one) must not scale twice
_BASE_STD = "completep_base_std"
#: where megatron-core's dynamic-batching inference looks for an attention scale; without it, it takes 1 / sqrt(head)
_INFERENCE_SCALE = "softmax_scale"
_FIELDS = (*_DRAWN, "softmax_scale", "pipeline_dtype")
_READ_LATER = ("pipeline_dtype",)  # of those, while the model trains; the others while it is built


def prepare(config: Any, layer_spec: Any, section: CompletePConfig | None) -> tuple[Any, Any]:
    """A TransformerConfig and a layer spec that build the scaled model; the given ones are left as they are, and
    returned without a section (the method is off).

    The std's of the config's init methods are the base model's. The model holds the returned config: what a training
    loop sets on it (``finalize_model_grads_func``, ...) belongs there.

    Raises:
        ConfigError: the config asks for something the rules do not cover or that sets the same quantity another way.
    """
    if section is None:
        return config, layer_spec
    check_config(config)
    config = copy.copy(config)  # not dataclasses.replace: it would run __post_init__ a second time
    with prepared(config, layer_spec, section) as scaled_spec:
        return config, scaled_spec


@contextlib.contextmanager
def prepared(config: Any, layer_spec: Any, section: CompletePConfig) -> Iterator[Any]:
    """`prepare` on the given TransformerConfig itself, since who gave it goes on to use it; yields the layer spec.

    A config that is prepared already is so anew, from the values that it had before: it may be that of several models
    or virtual stages, and have another size by now. When the block fails, it is left as it was.
    """
    check_config(config)
    before = dict(vars(config))
    try:
        stds = base_stds(config)  # before: what is ours knows it, whatever depth the given ones were made for
        give_back(config)
        _refuse_unsupported(config, section)
        scaled_spec = _scaled_spec(config, layer_spec, section)
        values = _scaled_fields(config, section, stds)
        fields = {name: (getattr(config, name), value) for name, value in values.items()}
        vars(config).update({**values, MARK: Prepared(section, fields)})
        yield scaled_spec
    except BaseException:
        for name in (MARK, *_FIELDS):
            vars(config).pop(name, None)
            if name in before:
                vars(config)[name] = before[name]
        raise


def give_back(config: Any, *, models_live: bool = False) -> None:
    """Take back what `prepared` has set on a config, where it still holds; ``models_live``: but for what models that
    were built from it still read."""
    done: Prepared | None = vars(config).pop(MARK, None)
    for name, (given, ours) in (done.fields if done is not None else {}).items():
        if getattr(config, name) == ours and not (models_live and name in _READ_LATER):
            setattr(config, name, given)


def _scaled_fields(config: Any, section: CompletePConfig, stds: dict[str, float]) -> dict[str, Any]:
    """The fields to set, a subset of `_FIELDS`; ``stds``: the given config's `base_stds`."""
    ratios = ratios_of(config, section)
    fields: dict[str, Any] = {}
    for name, role in _DRAWN.items():
        std = stds[name] * section.multipliers(role, ratios).init_std
        fields[name] = functools.partial(torch.nn.init.normal_, mean=0.0, std=std)
        setattr(fields[name], _BASE_STD, stds[name])
    head_dim = config.kv_channels or config.hidden_size // config.num_attention_heads
    if section.base_head_dim is not None and section.base_head_dim != head_dim:
        fields["softmax_scale"] = rules.attention_scale(head_dim, section.base_head_dim, section.recipe)
    if section.residual == "forward" and config.fp32_residual_connection and config.pipeline_dtype is not None:
        fields["pipeline_dtype"] = torch.float32  # what a stage sends to the next is the stream
    return fields


def _scaled_spec(config: Any, layer_spec: Any, section: CompletePConfig) -> Any:
    """The layer spec with residual branches that are multiplied, or the given one where nothing is."""
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
    """The std of each of a TransformerConfig's init methods, as the base model's.

    megatron-core gives the output projections std / sqrt(2 x layers), which Table 1 has not: there it is
    ``init_method``'s, unless the config says another. Raises ConfigError for what is no plain normal distribution.
    """
    stds = {name: _std(name, getattr(config, name)) for name in _DRAWN}
    given, plain = stds["output_layer_init_method"], stds["init_method"]
    by_depth = [std / math.sqrt(2 * config.num_layers) for std in (plain, config.init_method_std)]
    if any(math.isclose(given, std, rel_tol=1e-9) for std in by_depth):
        stds["output_layer_init_method"] = plain
    return stds


def _std(name: str, method: Any) -> float:
    if (base := getattr(method, _BASE_STD, None)) is not None:
        return float(base)
    settings = {"mean": 0.0, "std": 1.0, **getattr(method, "keywords", {})}
    plain = getattr(method, "func", None) is torch.nn.init.normal_ and not method.args
    if not plain or settings.keys() != {"mean", "std"} or settings["mean"] != 0:
        raise ConfigError(
            f"completep: TransformerConfig.{name} is {method!r}; the rules scale normal distributions around 0: write "
            "init_method_std, or give functools.partial(torch.nn.init.normal_, mean=0.0, std=...)"
        )
    return float(settings["std"])


def _layers(layer_spec: Any) -> list[Any]:
    """The layer specs inside a block's spec, or the one given."""
    return getattr(getattr(layer_spec, "submodules", layer_spec), "layer_specs", None) or [layer_spec]


def _check_layer(layer: Any, section: CompletePConfig) -> None:
    """Refuse a layer whose residual branches are not added by the two submodules that this method knows."""
    from megatron.core.transformer.identity_op import IdentityOp

    if not hasattr(layer, "submodules"):
        raise ConfigError(f"completep: the layer spec is {layer!r}, which names no submodules; give a ModuleSpec")
    check_mask(layer)
    kind = type(layer.submodules).__name__
    for name in _ADDS:
        if not hasattr(layer.submodules, name):
            raise ConfigError(
                f"completep: the layer spec {kind} has no {name!r}, where residual branches are added; use a GPT "
                "transformer layer spec (local or TransformerEngine), not Mamba's or a hybrid one"
            )
        add = getattr(layer.submodules, name)
        if section.residual == "forward" and scaled_add(add, 1.0) is None:
            raise ConfigError(
                f"completep: the layer spec {kind} has a {name} of its own, {add!r}, which the forward mode would "
                'replace by its own; leave it at get_bias_dropout_add, or write "residual": "folded"'
            )
    cross = getattr(layer.submodules, "cross_attention", None)
    cross = getattr(cross, "module", cross)
    if cross is not None and not issubclass(cross, IdentityOp):
        raise ConfigError(
            f"completep: the layer spec {kind} has cross-attention {cross.__name__!r}, which Table 1 does not cover; "
            "use a decoder-only GPT layer spec"
        )


def finish(model: torch.nn.Module, section: CompletePConfig | None) -> dict[str, Role]:
    """Complete a model, or a pipeline's stage, once: unembedding init and logits. Returns the role of every parameter.

    It scales weights as they were drawn: call it right after the model is built, before any are loaded. A second call
    changes nothing, nor does one without a section (the method is off), which returns no roles.

    From then on no optimizer steps on its gradients until param groups are built by role (`param_groups.await_groups`).

    Raises:
        ConfigError: the model is of another kind, was not built from `prepare`'s config, has a parameter without a
            role, is wrapped in something that may have copied its weights (torch.compile has not), or was built inside
            ``deepspeed.zero.Init`` or on the meta device.
    """
    if section is None:
        return {}
    gpt: Any = bare_model(gpt_of(model))
    roles = checked_roles(gpt, section)
    if hasattr(gpt, MARK):
        return roles
    for name, p in gpt.named_parameters():
        if hasattr(p, "ds_id"):
            raise ConfigError(
                "completep: the model was built inside deepspeed.zero.Init, where its weights cannot be scaled; build "
                "it outside, deepspeed.initialize partitions it for ZeRO 3"
            )
        if p.is_meta:
            raise ConfigError(
                f"completep: parameter {name!r} has no values yet (device meta), so its init cannot be scaled; build "
                "the model without init_model_with_meta_device"
            )
    ratios, tied = ratios_of(gpt.config, section), is_tied(gpt)
    if section.residual == "folded":
        check_gains(gpt.config, tied=tied)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            scale = _init_scale(roles[name], section, ratios)
            if scale != 1.0:
                parameter.mul_(scale)
    layers = list(gpt.decoder.layers)
    if section.residual == "forward":
        logits = rules.logit_multiplier(ratios, section.recipe, tied=tied)
        if logits != 1.0 and (output_layer := getattr(gpt, "output_layer", None)) is not None:
            output_layer.register_forward_pre_hook(functools.partial(scale_input, multiplier=logits))
        branch = rules.residual_multiplier(ratios, section.recipe)
        if branch != 1.0 and layers:
            scale_before(layers[-1], branch)  # of a pipeline's stage or chunk too: there its backward pass begins
    if gpt.config.softmax_scale is not None:
        for layer in layers:
            setattr(layer.self_attention, _INFERENCE_SCALE, gpt.config.softmax_scale)
    await_groups(gpt)
    setattr(gpt, MARK, section)
    return roles


def _init_scale(role: Role, section: CompletePConfig, ratios: Ratios) -> float:
    """What a parameter is multiplied by as it was drawn. No random numbers, so tensor-parallel ranks stay in step.

    An untied output layer is drawn with init_method, which is the hidden matrices' here, and norms start at one.
    """
    if role is Role.UNEMBEDDING:
        return section.multipliers(role, ratios).init_std / section.multipliers(Role.HIDDEN, ratios).init_std
    return section.fold_factor(role, ratios) if role is Role.LOGIT_NORM else 1.0


def forward_multipliers(model: torch.nn.Module, section: CompletePConfig | None) -> dict[str, float]:
    """What a forward pass of the model multiplies beside its weights, under a section; None: in stock code."""
    config: Any = model.config
    head = config.kv_channels
    found = {"residual branches": 1.0, "logits": 1.0, "q.k": rules.attention_scale(head, head, "standard")}
    if section is not None and section.residual == "forward":
        ratios = ratios_of(config, section)
        found["residual branches"] = rules.residual_multiplier(ratios, section.recipe)
        found["logits"] = rules.logit_multiplier(ratios, section.recipe, tied=is_tied(model))
    if section is not None and section.base_head_dim not in (None, head):
        found["q.k"] = rules.attention_scale(head, section.base_head_dim, section.recipe)
    return found


def _refuse_unsupported(config: Any, section: CompletePConfig) -> None:
    """Refuse what sets one of our quantities another way, or adds parameters without a role."""
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
        "is_hybrid_model": False,  # Mamba layers
        "experimental_attention_variant": None,
        "linear_attention_freq": None,
    }
    for name, plain in refused.items():
        value = getattr(config, name, plain)
        if value not in (plain, None):
            raise ConfigError(
                f"completep: TransformerConfig.{name} is {value!r}, which cannot be combined; leave it at {plain!r}"
            )
