"""CompleteP on megatron-core's own optimizer: param groups by role, checks, and clipping in the folded mode.

It uses megatron-core's extension point, ``get_megatron_optimizer(..., config_overrides=...)``. What to know of it:

* Overrides are plain dicts merged into the group. The scheduler reads a group's ``max_lr``, ``min_lr`` and ``wd_mult``;
  its ``init_lr``, where warmup starts, is global.
* A checkpoint's groups are recognised by ``wd_mult`` and ``lr_mult`` (in 0.19 also ``max_lr`` and ``min_lr``), not by
  eps, so that two roles could get each other's. Nothing else reads ``lr_mult``: the role's name is written there.
* The group whose learning rate is logged says ``default_config``: the embeddings, whose multiplier is mostly 1.
* Muon trains what has two dimensions and is not marked as an embedding or an output layer; in 0.16 by a function of its
  own, which sets the config's ``optimizer`` to "adam". Layer-wise, a rank's groups hold what it updates alone.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, get_args

import torch

from ds_plugin.completep.config import CompletePConfig
from ds_plugin.completep.model import finished_roles, ratios_of
from ds_plugin.completep.muon import with_muon
from ds_plugin.completep.param_groups import check_rates, group_settings, groups_built, refuse_unused
from ds_plugin.completep.rules import FANS, MuonScale, Ratios, Role
from ds_plugin.completep.supported import unwrapped
from ds_plugin.core.errors import CheckpointError, ConfigError, PluginError, raise_on_all_ranks, warn
from ds_plugin.core.patch import replaced

# Private names of megatron-core's optimizers, here only.
_CHAIN = "chained_optimizers"
_GRADS_FOR_NORM = ("get_main_grads_for_grad_norm", "get_grads_for_grad_norm")  # 0.16, 0.19; those of `_PARAMETERS`
_PARAMETERS = "get_parameters"
_SHARD_INDEX = "model_param_group_index_map"  # DistributedOptimizer: model parameter -> (group, position)
_BY_GROUP = ("float16_groups", "fp32_from_fp32_groups")  # Float16Optimizer: model parameters by group
_LAYER_WISE = "dp_cp_params_list"  # LayerWiseDistributedOptimizer: which rank updates what
_LOADS = ("load_state_dict", "load_state_dict_from_file")  # the second of that one, which does not go by the first
_MUON = "TensorParallelMuon"  # the class of what a Muon's member of the chain holds
_ADAMS_TOO = "is_embedding_or_output_parameter"  # on a parameter: a matrix that Muon leaves to Adam
_TORCH_FSDP = "TorchFullyShardedDataParallel"  # a chunk's class: its gradients are DTensors

Chunks = Sequence[torch.nn.Module]  # of a model: one, or a pipeline rank's
_MUONS = ("muon", "dist_muon")  # OptimizerConfig.optimizer; the second layer-wise
_ROLE_KEY = "lr_mult"
_STATE_KEY = "completep"
_WRITERS = "the scheduler (OptimizerParamScheduler does, from init_lr 0), or the training loop,"


def build_optimizer(
    optimizer_config: Any,
    model_chunks: Chunks,
    section: CompletePConfig,
    *,
    get_optimizer: Callable[..., Any] | None = None,
    **arguments: Any,
) -> Any:
    """``get_megatron_optimizer`` with the groups of the section's recipe, checked now and after each load of a state,
    and clipping that knows the mode. Steps are refused where learning rates and weight decays are not in their ratios.
    ``optimizer_config`` holds the base model's values. ``model_chunks``: in DistributedDataParallel, finished.
    ``get_optimizer``: megatron-core's function, where its name is bound to another; ``arguments`` go to it. Every rank
    calls it. Raises ConfigError, on every rank: the rules do not hold for the optimizer, the chunks are not finished,
    or a parameter did not land in the group of its role."""
    build = get_optimizer or _builder(optimizer_config)
    with raise_on_all_ranks():
        overrides = config_overrides(model_chunks, section, optimizer_config)
    refuse_unused_in(model_chunks, section)
    optimizer = build(optimizer_config, list(model_chunks), config_overrides=overrides, **arguments)
    watch_groups(optimizer, model_chunks, section, optimizer_config)
    return optimizer


def refuse_unused_in(model_chunks: Chunks, section: CompletePConfig) -> None:
    """`refuse_unused` for chunks. Every rank calls it."""
    refuse_unused(section, [role for *_, role in _parameters(model_chunks, section)])


def watch_groups(optimizer: Any, model_chunks: Chunks, section: CompletePConfig, optimizer_config: Any) -> None:
    """`build_optimizer` for one that was built with `config_overrides`: it is checked, now and after each load of a
    state and before each step, and clips by the mode. Every rank calls it. Raises ConfigError, on every rank."""
    with raise_on_all_ranks():
        check_groups(optimizer, model_chunks, section)
    clip_as_unfolded(optimizer, model_chunks, section)
    inner_step = optimizer.step
    ratios = _ratios(model_chunks, section, optimizer_config, muon=any(map(_is_muon, _singles(optimizer))))
    rows = {role.value: section.multipliers(role, ratios) for role in Role}

    def checked(load: Callable[..., None], state: Any, *args: Any, **kwargs: Any) -> None:
        _take_rates_of(optimizer, state)  # of a file there is nothing to take
        load(state, *args, **kwargs)
        check_groups(optimizer, model_chunks, section)  # groups come with the state, an eps of another base's too

    def step(*args: Any, **kwargs: Any) -> Any:
        groups = [group for single in _singles(optimizer) for group in single.param_groups]
        check_rates(groups, [group[_ROLE_KEY] for group in groups], rows, written_by=_WRITERS)
        return inner_step(*args, **kwargs)

    for name in (name for name in _LOADS if hasattr(optimizer, name)):
        setattr(optimizer, name, functools.partial(checked, getattr(optimizer, name)))
    optimizer.step = step


def _builder(optimizer_config: Any) -> Callable[..., Any]:
    """megatron-core's function for a config."""
    if optimizer_config.optimizer not in _MUONS:
        from megatron.core.optimizer import get_megatron_optimizer

        return get_megatron_optimizer
    from megatron.core.optimizer.muon import get_megatron_muon_optimizer

    layer_wise = optimizer_config.optimizer.startswith("dist_")
    return functools.partial(get_megatron_muon_optimizer, layer_wise_distributed_optimizer=layer_wise)


def _take_rates_of(optimizer: Any, state: Any) -> None:
    """Give the groups of an optimizer's state the rates of this run, where all of them are one factor away: another
    base learning rate, to anneal with. By its rates some versions recognise a group, and all schedule it. Whether the
    scheduler's state may differ, too, is megatron-core's to say (``override_opt_param_scheduler``)."""
    here = {group[_ROLE_KEY]: group for single in _singles(optimizer) for group in single.param_groups}
    saved = [group for group in _groups_in(state) if group.get(_ROLE_KEY) in here and group.get("max_lr")]
    factors = [here[group[_ROLE_KEY]]["max_lr"] / group["max_lr"] for group in saved]
    if not factors or _same(factors[0], 1.0) or not all(_same(factor, factors[0]) for factor in factors):
        return  # another recipe is refused by what differs
    warn("completep: learning rates are %g times the checkpoint's, as this run's base has them", factors[0])
    for group in saved:
        group.update({name: here[group[_ROLE_KEY]][name] for name in ("max_lr", "min_lr")})


def _groups_in(state: Any) -> Iterator[dict[str, Any]]:
    for value in state.values() if isinstance(state, dict) else state if isinstance(state, list) else ():
        yield from _groups_in(value)
    if isinstance(state, dict):
        yield from (group for group in state.get("param_groups", ()) if isinstance(group, dict))


def config_overrides(model_chunks: Chunks, section: CompletePConfig, optimizer_config: Any) -> dict[Any, Any]:
    """``{ParamKey: ParamGroupOverride}`` for ``get_megatron_optimizer``, by role. Raises as `build_optimizer`."""
    from megatron.core.optimizer import ParamKey
    from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate

    _check_config(optimizer_config)
    if any(getattr(getattr(chunk, "ddp_config", None), "use_megatron_fsdp", False) for chunk in model_chunks):
        raise ConfigError("completep: Megatron-FSDP replaces the parameters; write use_megatron_fsdp=False")
    if any(type(chunk).__name__ == _TORCH_FSDP for chunk in model_chunks):
        raise ConfigError(f"completep: {_TORCH_FSDP} replaces the parameters; use DistributedDataParallel")
    muon = optimizer_config.optimizer in _MUONS
    parameters = list(_parameters(model_chunks, section))
    if muon:
        _check_muon(unwrapped(model_chunks[0]).config, optimizer_config, [name for name, *_ in parameters])
    groups = _group_values(section, _ratios(model_chunks, section, optimizer_config, muon=muon), optimizer_config)
    for _, parameter, role in parameters if muon else []:
        if parameter.dim() == 2 and role not in FANS:  # learned positions are not marked
            setattr(parameter, _ADAMS_TOO, True)
    role_by_id = {id(parameter): role for _, parameter, role in parameters}
    for chunk in model_chunks:
        groups_built(unwrapped(chunk))

    def key(role: Role) -> Any:
        predicate = ParamWithNamePredicate(f"completep_{role.value}", lambda p, name: role_by_id.get(id(p)) is role)
        return ParamKey(with_name_predicate=predicate)

    return {key(role): groups[role] for role in Role if role in role_by_id.values()}


def check_groups(optimizer: Any, model_chunks: Chunks, section: CompletePConfig) -> None:
    """Raise ConfigError for a parameter this rank optimizes (a part of) in another group than its role's, or with other
    settings; but for the ``lr`` and ``weight_decay`` of the moment, which are the scheduler's."""
    singles = _singles(optimizer)
    if bare := next((type(single).__name__ for single in singles if not hasattr(single, "config")), None):
        what = f"megatron-core's layer-wise optimizer holds {bare} itself, which fp32 parameters do not step by"
        raise ConfigError(f"completep: {what}; write bf16=True, or leave layer-wise out")
    ratios = _ratios(model_chunks, section, singles[0].config, muon=any(map(_is_muon, singles)))
    expected = _group_values(section, ratios, singles[0].config)
    found = {id(p): (group, _is_muon(single)) for single in singles for p, group in _optimized(single)}
    # megatron-core 0.16 takes groups out of a list that it walks through, and some experts' stay with other matrices
    for single in singles if not hasattr(optimizer, _LAYER_WISE) else []:
        if _is_muon(single) and len({group["is_expert_parallel"] for group in single.param_groups}) > 1:
            what = "megatron-core's Muon has experts' matrices and others together, and would clip by another norm"
            raise ConfigError(f'completep: {what}; write optimizer="dist_muon", or no expert parallelism')
    on_other_ranks = any(hasattr(each, _SHARD_INDEX) or hasattr(each, _LAYER_WISE) for each in [optimizer, *singles])
    for name, parameter, role in _parameters(model_chunks, section):
        if id(parameter) not in found:
            if parameter.requires_grad and not on_other_ranks:
                raise ConfigError(f"completep: {name!r} is in no param group; wrap the model before build_optimizer")
            continue
        group, by_muon = found[id(parameter)]
        if by_muon != (role in ratios.muon.rates):
            how = "by Muon and has a rule of Adam's" if by_muon else "by Adam and has a rule of Muon's"
            raise ConfigError(f"completep: parameter {name!r} (role {role.value}) is trained {how}; use AdamW for all")
        for setting, value in expected[role].items():
            if setting not in ("lr", "weight_decay") and not _same(held := group.get(setting), value):
                what = f"parameter {name!r} (role {role.value}) has {setting} {held!r}, expected {value!r}"
                remedy = "use build_optimizer's groups alone, and resume with the same recipe and learning rate"
                raise ConfigError(f"completep: {what}; {remedy}")


def check_scheduler(scheduler: Any) -> None:
    """Raises ConfigError for an OptimizerParamScheduler whose warmup does not start at 0, the same for all groups."""
    if scheduler.init_lr != 0:
        raise ConfigError(f"completep: init_lr is {scheduler.init_lr!r} for all groups; write 0.0 (lr_warmup_init)")


def clip_as_unfolded(optimizer: Any, model_chunks: Chunks, section: CompletePConfig) -> None:
    """Make the gradient norm, for clipping and the log, that of the forward mode when multipliers are folded: a role
    with fold factor c has gradients 1/c of the forward mode's, and megatron-core now collects one float32 number per
    factor: c times the norm of the gradients that have it. Nothing is copied, reduced or synchronised in addition."""
    ratios = ratios_of(unwrapped(model_chunks[0]).config, section)
    factors = {role.value: section.fold_factor(role, ratios) for role in Role}
    for single in _singles(optimizer) if set(factors.values()) != {1.0} else []:
        name = next((name for name in _GRADS_FOR_NORM if hasattr(type(single), name)), None)
        if name is None:
            what = f"megatron-core {metadata.version('megatron-core')} has no {type(single).__name__}"
            known = " or ".join(_GRADS_FOR_NORM)
            raise PluginError(f'{what}.{known}; use a tested version, or write "residual": "forward"')
        collect = getattr(type(single), name).__get__(single)
        setattr(single, name, functools.partial(_weighted, single, collect, factors))


def _weighted(optimizer: Any, collect: Callable[..., Any], factors: dict[str, float], *args: Any) -> list[torch.Tensor]:
    parts: dict[float, list[torch.nn.Parameter]] = {}
    for group in optimizer.param_groups:  # read anew: loading a checkpoint replaces the groups
        if group["params"]:
            parts.setdefault(factors[group[_ROLE_KEY]], []).extend(group["params"])
    norms = []
    for factor, parameters in parts.items():
        with replaced(optimizer, _PARAMETERS, lambda parameters=parameters: parameters):
            grads = collect(*args)  # in 0.19, of a group
        if grads:
            # float32 also for 16-bit gradients: megatron-core's kernels want tensors of one dtype
            each = torch._foreach_norm(grads, 2, dtype=torch.float32)
            norms.append(factor * torch.linalg.vector_norm(torch.stack(each)))
    return norms


def checkpoint_state(section: CompletePConfig) -> dict[str, Any]:
    """What a checkpoint's common state says of the section, for `check_checkpoint_state` on a resume."""
    return {_STATE_KEY: section.model_dump()}


def check_checkpoint_state(state: Mapping[str, Any], section: CompletePConfig) -> None:
    """Before the optimizer's state is loaded: raises CheckpointError for a common state of another section, or none."""
    if (stored := state.get(_STATE_KEY)) is None:
        raise CheckpointError("completep: the checkpoint was written without it; resume without it, or start anew")
    if values := section.differences(stored):
        raise CheckpointError(f"completep: the checkpoint belongs to another recipe: {values}; resume with its values")


def _group_values(section: CompletePConfig, ratios: Ratios, config: Any) -> dict[Role, dict[str, Any]]:
    base = {"lr": config.lr, "weight_decay": config.weight_decay, "eps": config.adam_eps}
    values: dict[Role, dict[str, Any]] = {}
    for role in Role:
        row = section.multipliers(role, ratios)
        settings = group_settings(row, **base, betas=(config.adam_beta1, config.adam_beta2))
        scheduled = {"max_lr": config.lr * row.lr, "min_lr": config.min_lr * row.lr, "wd_mult": row.weight_decay}
        values[role] = {_ROLE_KEY: role.value, **settings, **scheduled}
    values[Role.EMBEDDING]["default_config"] = True
    return values


def _check_muon(model: Any, config: Any, names: Sequence[str]) -> None:
    """Raises ConfigError for a Muon that the rules do not cover. ``model``: the TransformerConfig."""
    if (scale := config.muon_scale_mode) not in (known := get_args(MuonScale)):
        raise ConfigError(f"completep: OptimizerConfig.muon_scale_mode is {scale!r}: no rule; use {', '.join(known)}")
    ranks = max(model.tensor_model_parallel_size, model.expert_tensor_parallel_size or 1)
    if config.muon_tp_mode == "blockwise" and ranks > 1:
        what = f"over {ranks} tensor-parallel ranks, each of which would take its part for a matrix"
        raise ConfigError(f'completep: OptimizerConfig.muon_tp_mode is "blockwise" {what}; write "duplicated"')
    if name := next((name for name in names if name.endswith((".experts.weight1", ".experts.weight2"))), None):
        what = "holds all experts' matrices, which Muon would take for one"
        raise ConfigError(f"completep: {name!r} {what}; leave out moe_use_legacy_grouped_gemm, or use AdamW")


def _check_config(config: Any) -> None:
    for name, least in (("lr", "above 0"), ("min_lr", "0.0 for none")):
        value = getattr(config, name)
        if not isinstance(value, (int, float)) or value < 0 or (name == "lr" and value == 0):
            raise ConfigError(f"completep: OptimizerConfig.{name} is {value!r}; write the base model's, {least}")
    muon = config.optimizer in _MUONS
    layer_wise = "use_layer_wise_distributed_optimizer"
    both = (None, "it sets the learning rate of embedding and output layer, as the recipe does")
    for name, (plain, why) in {
        "optimizer": (config.optimizer if muon else "adam", "the rules hold for AdamW and Muon"),
        "decoupled_weight_decay": (True, "the rules hold for weight decay decoupled from the gradient"),
        "decoupled_lr": both,
        "decoupled_min_lr": both,
        "apply_wd_to_qk_layernorm": (False, "the recipe gives norms no weight decay"),
        layer_wise: (muon and getattr(config, layer_wise, False), "it is Muon's"),
        "muon_scalar_optimizer": ("adam", "what Muon does not train has AdamW's rules"),
        "optimizer_cuda_graph": (False, "it keeps one learning rate in a tensor"),
    }.items():
        if (value := getattr(config, name, plain)) != plain:
            raise ConfigError(f"completep: OptimizerConfig.{name} is {value!r}: {why}; write {plain!r}")


def _parameters(chunks: Chunks, section: CompletePConfig) -> Iterator[tuple[str, torch.nn.Parameter, Role]]:
    for chunk in chunks:
        model = unwrapped(chunk)
        roles = finished_roles(model, section)
        for name, parameter in model.named_parameters():
            yield name, parameter, roles[name]


def _ratios(chunks: Chunks, section: CompletePConfig, config: Any, *, muon: bool) -> Ratios:
    model = unwrapped(chunks[0]).config
    ratios = ratios_of(model, section)
    if not muon:
        return ratios
    return with_muon(ratios, model, section, config.muon_scale_mode, split_qkv=config.muon_split_qkv)


def _singles(optimizer: Any) -> list[Any]:
    """The members of a chain, of one in it too."""
    members = getattr(optimizer, _CHAIN, None)
    return [optimizer] if members is None else [single for member in members for single in _singles(member)]


def _is_muon(single: Any) -> bool:
    return type(getattr(single, "optimizer", None)).__name__ == _MUON


def _optimized(optimizer: Any) -> list[tuple[torch.nn.Parameter, Mapping[str, Any]]]:
    """The model's parameters that this rank updates (a part of), each with its param group."""
    groups = optimizer.param_groups
    if hasattr(optimizer, _SHARD_INDEX):
        return [(p, groups[index]) for p, (index, _) in getattr(optimizer, _SHARD_INDEX).items()]
    by_group = [getattr(optimizer, name) for name in _BY_GROUP if hasattr(optimizer, name)]
    by_group = by_group or [[group["params"] for group in groups]]
    return [(p, group) for lists in by_group for members, group in zip(lists, groups, strict=True) for p in members]


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, float) and isinstance(found, (int, float)):
        return math.isclose(found, expected, rel_tol=1e-9)
    return bool(found == expected or (isinstance(expected, tuple) and list(expected) == found))
