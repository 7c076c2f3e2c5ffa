"""CompleteP on megatron-core's own optimizer: param groups by role, checks, and clipping in the folded mode.

    optimizer = build_optimizer(optimizer_config, model_chunks, section)
    scheduler = OptimizerParamScheduler(optimizer, init_lr=0.0, ...)
    check_scheduler(scheduler)

It uses megatron-core's extension point, ``get_megatron_optimizer(..., config_overrides=...)``. What to know of it:

* Overrides are plain dicts merged into the group, so any key reaches the optimizer: ``eps``, ``betas``, and the initial
  ``lr`` and ``weight_decay``, which otherwise have the base values until the scheduler's first step.
* The scheduler reads a group's ``max_lr``, ``min_lr`` and ``wd_mult``; its ``init_lr``, where warmup starts, is global.
* When a checkpoint is loaded, groups are recognised by ``wd_mult`` and ``lr_mult`` (in 0.19 also by ``max_lr`` and
  ``min_lr``), not by eps: two roles that agree in those would get each other's eps. Nothing else reads ``lr_mult``, so
  the role's name is written there.
* The group whose learning rate is logged says ``default_config``: the embeddings, whose multiplier is mostly 1.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import torch

from ds_plugin.completep.config import CompletePConfig
from ds_plugin.completep.model import finished_roles, ratios_of
from ds_plugin.completep.param_groups import check_rates, group_settings, groups_built
from ds_plugin.completep.rules import Ratios, Role
from ds_plugin.completep.supported import unwrapped
from ds_plugin.core.errors import CheckpointError, ConfigError, PluginError, raise_on_all_ranks

# Private names of megatron-core's optimizers, here only.
_CHAIN = "chained_optimizers"
_GRADS_FOR_NORM = ("get_main_grads_for_grad_norm", "get_grads_for_grad_norm")  # 0.16, 0.19
_SHARD_INDEX = "model_param_group_index_map"  # DistributedOptimizer: model parameter -> (group, position)
_HALF_GROUPS, _FULL_GROUPS = "float16_groups", "fp32_from_fp32_groups"  # Float16Optimizer: model parameters by group

_ROLE_KEY = "lr_mult"
_STATE_KEY = "completep"


def build_optimizer(
    optimizer_config: Any,
    model_chunks: Sequence[torch.nn.Module],
    section: CompletePConfig,
    *,
    get_optimizer: Callable[..., Any] | None = None,
    **arguments: Any,
) -> Any:
    """``get_megatron_optimizer`` with the groups of the section's recipe, checked, and clipping that knows the mode.

    The groups are checked again whenever the optimizer loads a state, and their learning rates and weight decays before
    each step, which is refused where they are not in the ratios of their roles.

    ``optimizer_config`` holds the base model's values. ``model_chunks``: in DistributedDataParallel, built and finished
    under `prepare` and `finish`. ``get_optimizer``: megatron-core's function, where its name is bound to another;
    ``arguments`` go to it. Collective.

    Raises:
        ConfigError: the optimizer is not one the rules hold for, the chunks are not finished, or a parameter did not
            land in the group of its role; on every rank with the same message.
    """
    with raise_on_all_ranks():
        overrides = config_overrides(model_chunks, section, optimizer_config)
    from megatron.core.optimizer import get_megatron_optimizer

    build = get_optimizer or get_megatron_optimizer
    optimizer = build(optimizer_config, list(model_chunks), config_overrides=overrides, **arguments)
    with raise_on_all_ranks():
        check_groups(optimizer, model_chunks, section)
    clip_as_unfolded(optimizer, model_chunks, section)
    inner_load, inner_step = optimizer.load_state_dict, optimizer.step
    rows = {role.value: section.multipliers(role, _ratios(model_chunks, section)) for role in Role}

    def load_state_dict(*args: Any, **kwargs: Any) -> None:
        inner_load(*args, **kwargs)
        check_groups(optimizer, model_chunks, section)  # groups come with the state, an eps of another base's too

    def step(*args: Any, **kwargs: Any) -> Any:
        groups = [group for single in _singles(optimizer) for group in single.param_groups]
        by = "the scheduler (OptimizerParamScheduler does, from init_lr 0), or the training loop,"
        check_rates(groups, [group[_ROLE_KEY] for group in groups], rows, written_by=by)
        return inner_step(*args, **kwargs)

    optimizer.load_state_dict, optimizer.step = load_state_dict, step
    return optimizer


def config_overrides(
    model_chunks: Sequence[torch.nn.Module], section: CompletePConfig, optimizer_config: Any
) -> dict[Any, dict[str, Any]]:
    """``{ParamKey: ParamGroupOverride}`` for ``get_megatron_optimizer``: one entry per role present in these chunks.

    A key matches the parameters of its role by identity, whatever wrappers call them. Raises as `build_optimizer`.
    """
    from megatron.core.optimizer import ParamKey
    from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate

    _check_config(optimizer_config)
    if any(getattr(getattr(chunk, "ddp_config", None), "use_megatron_fsdp", False) for chunk in model_chunks):
        raise ConfigError(
            "completep: Megatron-FSDP replaces the parameters and has optimizer states of its own; use the distributed "
            "optimizer (DistributedDataParallelConfig.use_megatron_fsdp=False, use_distributed_optimizer=True)"
        )
    role_by_id = {id(parameter): role for _, parameter, role in _parameters(model_chunks, section)}
    groups = _group_values(section, _ratios(model_chunks, section), optimizer_config)
    for chunk in model_chunks:
        groups_built(unwrapped(chunk))

    def key(role: Role) -> Any:
        def belongs(parameter: Any, name: str) -> bool:
            return role_by_id.get(id(parameter)) is role

        return ParamKey(with_name_predicate=ParamWithNamePredicate(name=f"completep_{role.value}", fn=belongs))

    present = set(role_by_id.values())
    return {key(role): groups[role] for role in Role if role in present}


def check_groups(optimizer: Any, model_chunks: Sequence[torch.nn.Module], section: CompletePConfig) -> None:
    """Prove that every parameter this rank optimizes (a part of) lies in the group of its role, with its settings; but
    for the ``lr`` and ``weight_decay`` of the moment, which are the scheduler's.

    Raises:
        ConfigError: naming the parameter, the setting, the value found and the one expected.
    """
    singles = _singles(optimizer)
    expected = _group_values(section, _ratios(model_chunks, section), singles[0].config)
    found = {id(parameter): group for single in singles for parameter, group in _optimized(single)}
    elsewhere = any(hasattr(single, _SHARD_INDEX) for single in singles)  # on the rank that holds its shard
    for name, parameter, role in _parameters(model_chunks, section):
        if id(parameter) not in found:
            if parameter.requires_grad and not elsewhere:
                raise ConfigError(
                    f"completep: parameter {name!r} is in no param group; build the optimizer with "
                    "optimizer.build_optimizer after the model is wrapped"
                )
            continue
        group = found[id(parameter)]
        for setting, value in expected[role].items():
            if setting not in ("lr", "weight_decay") and not _same(group.get(setting), value):
                raise ConfigError(
                    f"completep: parameter {name!r} (role {role.value}) is in a param group with {setting} "
                    f"{group.get(setting)!r}, expected {value!r}; give the optimizer the overrides of "
                    "optimizer.config_overrides alone, and resume with the same recipe and learning rate"
                )


def check_scheduler(scheduler: Any) -> None:
    """Raises ConfigError for an OptimizerParamScheduler whose warmup does not start at 0, the same for all groups."""
    if scheduler.init_lr != 0:
        raise ConfigError(
            f"completep: the scheduler's init_lr is {scheduler.init_lr!r} for all param groups, which would not keep "
            "their ratios during warmup; write 0.0 (lr_warmup_init)"
        )


def clip_as_unfolded(optimizer: Any, model_chunks: Sequence[torch.nn.Module], section: CompletePConfig) -> None:
    """Make the gradient norm, for clipping and the log, that of the forward mode when multipliers are folded.

    A role with fold factor c has gradients 1/c of the forward mode's. What megatron-core collects for its norm becomes,
    on this optimizer, one float32 number per factor: c times the norm of the gradients that have it. Nothing is copied,
    reduced or synchronised in addition; gradients, and the count of their zeros, stay as they are.

    Raises:
        PluginError: this megatron-core does not collect gradients the way this was written for.
    """
    ratios = _ratios(model_chunks, section)
    factors = {role.value: section.fold_factor(role, ratios) for role in Role}
    if set(factors.values()) == {1.0}:
        return
    for single in _singles(optimizer):
        name = next((name for name in _GRADS_FOR_NORM if hasattr(type(single), name)), None)
        if name is None:
            raise PluginError(
                f"megatron-core {metadata.version('megatron-core')} has no {type(single).__name__}."
                f"{' or '.join(_GRADS_FOR_NORM)} to scale the gradient norm by; use a version this plugin was tested "
                'with, or "residual": "forward"'
            )
        setattr(single, name, _weighted(single, getattr(type(single), name), factors))


def checkpoint_state(section: CompletePConfig) -> dict[str, Any]:
    """What to add to a checkpoint's common state."""
    return {_STATE_KEY: section.model_dump()}


def check_checkpoint_state(state: Mapping[str, Any], section: CompletePConfig) -> None:
    """Compare a loaded common state with this run's section, before the optimizer's state is loaded.

    Raises:
        CheckpointError: it has none (the run that wrote it had no CompleteP), or another.
    """
    stored = state.get(_STATE_KEY)
    if stored is None:
        raise CheckpointError(
            "completep: the checkpoint was written without it, its weights belong to another parametrization; resume "
            'without "completep", or start anew'
        )
    if different := section.differences(stored):
        values = ", ".join(f"{name} {there!r} there, {here!r} here" for name, there, here in different)
        raise CheckpointError(f"completep: the checkpoint belongs to another recipe: {values}; resume with its values")


class _Part:
    """An optimizer as its own methods see it, with the parameters of some of its groups only."""

    def __init__(self, optimizer: Any, parameters: list[torch.nn.Parameter]) -> None:
        self._optimizer, self._parameters = optimizer, parameters

    def get_parameters(self) -> list[torch.nn.Parameter]:
        return self._parameters

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def _weighted(optimizer: Any, collect: Callable[..., Any], factors: Mapping[str, float]) -> Callable[..., Any]:
    def grads_for_norm(*args: Any, **kwargs: Any) -> list[torch.Tensor]:
        parts: dict[float, list[torch.nn.Parameter]] = {}
        for group in optimizer.param_groups:  # read anew: loading a checkpoint replaces the groups
            if group["params"]:
                parts.setdefault(factors[group[_ROLE_KEY]], []).extend(group["params"])
        norms = []
        for factor, parameters in parts.items():
            grads = collect(_Part(optimizer, parameters), *args, **kwargs)
            if grads:
                # float32 also for 16-bit gradients; megatron-core's kernels want tensors of one dtype in a list.
                each = torch._foreach_norm(grads, 2, dtype=torch.float32)
                norms.append(factor * torch.linalg.vector_norm(torch.stack(each)))
        return norms

    return grads_for_norm


def _group_values(section: CompletePConfig, ratios: Ratios, optimizer_config: Any) -> dict[Role, dict[str, Any]]:
    c = optimizer_config
    values = {}
    for role in Role:
        m = section.multipliers(role, ratios)
        values[role] = {
            _ROLE_KEY: role.value,
            **group_settings(
                m, lr=c.lr, weight_decay=c.weight_decay, eps=c.adam_eps, betas=(c.adam_beta1, c.adam_beta2)
            ),
            "max_lr": c.lr * m.lr,
            "min_lr": c.min_lr * m.lr,
            "wd_mult": m.weight_decay,
        }
        if role is Role.EMBEDDING:
            values[role]["default_config"] = True
    return values


def _check_config(config: Any) -> None:
    """Refuse optimizers that the rules do not hold for, and settings that set the same quantity another way."""
    if config.optimizer != "adam":
        raise ConfigError(
            f"completep: OptimizerConfig.optimizer is {config.optimizer!r}; the rules hold for AdamW, write 'adam'"
        )
    for name, why in (("lr", "learning rate"), ("min_lr", "smallest learning rate, 0.0 for none")):
        value = getattr(config, name)
        if not isinstance(value, (int, float)) or value < 0 or (name == "lr" and value == 0):
            raise ConfigError(f"completep: OptimizerConfig.{name} is {value!r}; write the base model's {why}")
    both = (None, "it sets the learning rate of embedding and output layer, as the recipe does")
    refused = {
        "decoupled_weight_decay": (True, "the rules hold for weight decay decoupled from the gradient"),
        "decoupled_lr": both,
        "decoupled_min_lr": both,
        "apply_wd_to_qk_layernorm": (False, "the recipe gives norms no weight decay"),
        "use_layer_wise_distributed_optimizer": (False, "it has param groups of its own"),
        "optimizer_cuda_graph": (False, "it keeps one learning rate in a tensor"),
    }
    for name, (plain, why) in refused.items():
        value = getattr(config, name, plain)
        if value != plain:
            raise ConfigError(f"completep: OptimizerConfig.{name} is {value!r}: {why}; leave it at {plain!r}")


def _parameters(
    model_chunks: Sequence[torch.nn.Module], section: CompletePConfig
) -> Iterator[tuple[str, torch.nn.Parameter, Role]]:
    """Name inside the GPTModel, parameter and role, over all chunks."""
    for chunk in model_chunks:
        model = unwrapped(chunk)
        roles = finished_roles(model, section)
        for name, parameter in model.named_parameters():
            yield name, parameter, roles[name]


def _ratios(model_chunks: Sequence[torch.nn.Module], section: CompletePConfig) -> Ratios:
    return ratios_of(unwrapped(model_chunks[0]).config, section)


def _singles(optimizer: Any) -> list[Any]:
    """The optimizers of a chain, or the one given; those without parameters on this rank have no groups."""
    return list(getattr(optimizer, _CHAIN, [optimizer]))


def _optimized(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, Mapping[str, Any]]]:
    """The model's parameters that this rank updates (a part of), each with its param group."""
    groups = optimizer.param_groups
    if hasattr(optimizer, _SHARD_INDEX):
        yield from ((p, groups[index]) for p, (index, _) in getattr(optimizer, _SHARD_INDEX).items())
        return
    members = [group["params"] for group in groups]
    if hasattr(optimizer, _HALF_GROUPS):
        kinds = zip(getattr(optimizer, _HALF_GROUPS), getattr(optimizer, _FULL_GROUPS), strict=True)
        members = [[*half, *full] for half, full in kinds]
    for parameters, group in zip(members, groups, strict=True):
        yield from ((p, group) for p in parameters)


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, float) and isinstance(found, (int, float)):
        return math.isclose(found, expected, rel_tol=1e-9)
    return bool(found == expected or (isinstance(expected, tuple) and list(expected) == found))
