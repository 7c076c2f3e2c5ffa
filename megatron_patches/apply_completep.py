"""CompleteP in a script that builds its own objects: megatron-core's builders, rebound.

Where a script can be changed, prefer `completep.building` and `completep.optimizer.build_optimizer`. An optimizer that
is not built by ``get_megatron_optimizer`` is not reached from here.
"""

import contextlib
import inspect
import pkgutil
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ds_plugin.completep.config import CompletePConfig
from ds_plugin.completep.supported import check_model
from ds_plugin.config import PluginConfig
from ds_plugin.core.errors import ConfigError, PluginError, StateError
from ds_plugin.core.patch import Change, Patch
from megatron_patches.completep.build import scaled_builds
from megatron_patches.completep.layers import give_back
from megatron_patches.completep.optimizer import build_optimizer, check_scheduler

_LANGUAGE_MODULE = "megatron.core.models.common.language_module.language_module.LanguageModule"
_OPTIMIZER = "megatron.core.optimizer.get_megatron_optimizer"
_MUON = "megatron.core.optimizer.muon.get_megatron_muon_optimizer"
_SCHEDULER = "megatron.core.optimizer_param_scheduler.OptimizerParamScheduler"
_applied: tuple[CompletePConfig, tuple[Change, ...]] | None = None


def apply_completep(section: CompletePConfig) -> None:
    """Give every GPTModel and optimizer that is built from now on the section's recipe, folded if it does not say
    ``residual``; again is a no-op. The config that a model is built from is changed itself: the script goes on to use
    it. `megatron_patches.revert()` undoes it, on the configs too; models that were built can still be trained. Raises
    StateError: another section is in force; PluginError, with nothing changed: megatron-core lacks a symbol."""
    global _applied
    section = section.folded_by_default()
    if not section.enabled or in_force(_applied, section):
        return
    patches = _patches(section)
    with all_or_none(patches):
        _applied = section, patches


def of_megatron(sections: PluginConfig) -> PluginConfig:
    """The sections with what ``completep`` is by default in a loop of Megatron's: folded."""
    section = sections.completep
    return sections if section is None else replace(sections, completep=section.folded_by_default())


def in_force(before: tuple[Any, Sequence[Change]] | None, asked: Any) -> bool:
    """Whether it is on already. Raises StateError: something else is."""
    if before is None or not any(patch.applied for patch in before[1]):
        return False
    if before[0] != asked:
        raise StateError(f"one configuration holds in a process: revert() {before[0]!r} before {asked!r}")
    return True


@contextlib.contextmanager
def all_or_none(patches: Sequence[Change]) -> Iterator[None]:
    """Apply changes for the block and what follows; where megatron-core lacks a symbol, none stays."""
    try:
        for patch in patches:
            patch.apply()
        yield
    except PluginError:
        for patch in reversed(patches):
            patch.revert()
        raise


def _patches(section: CompletePConfig) -> tuple[Change, ...]:
    configs: list[weakref.ref[Any]] = []

    def build_language_model(self: Any, *args: Any, **kwargs: Any) -> None:
        check_model(self)  # before it has parameters, which no recipe would reach
        language_model.original(self, *args, **kwargs)

    def give_configs_back() -> None:
        for config in configs:
            if (found := config()) is not None:
                give_back(found, models_live=True)

    inside: list[str] = []  # the function whose original is building

    def optimizer_patch(target: str) -> Patch:
        def get_optimizer(*args: Any, **kwargs: Any) -> Any:
            from megatron.core import optimizer as stock

            if not patch.applied:  # a module imported in the meantime may have kept this function
                return pkgutil.resolve_name(target)(*args, **kwargs)
            if inside:  # Muon's asks for Adam's, with our groups
                return patch.original(*args, **kwargs)
            given = inspect.signature(patch.original).bind(*args, **kwargs).arguments
            config, chunks, overrides = (given.pop(n, None) for n in ("config", "model_chunks", "config_overrides"))
            # the standard ones, which Megatron-LM's training loop always gives, say nothing that the recipe does not
            if overrides and overrides != stock.get_standard_config_overrides(config):
                raise ConfigError(f"completep: remove the config_overrides {list(overrides)}; the recipe sets the same")
            inside.append(target)
            try:
                return build_optimizer(config, chunks, section, get_optimizer=patch.original, **given)
            finally:
                inside.clear()

        patch = Patch(target, get_optimizer, reason="completep: param groups", prefixes=everywhere)
        return patch

    def build_scheduler(self: Any, *args: Any, **kwargs: Any) -> None:
        scheduler.original(self, *args, **kwargs)
        check_scheduler(self)

    # The function may be bound in any module, a script's too, and a binding that is missed would train with the base
    # model's groups. A class stays the same object, whoever holds it.
    everywhere = tuple({name.partition(".")[0] for name in sys.modules} - {"megatron_patches"} | {"megatron"})
    model = scaled_builds(section, lambda config: configs.append(weakref.ref(config)))
    language_model = Patch(f"{_LANGUAGE_MODULE}.__init__", build_language_model, reason="completep: other models")
    optimizers = [optimizer_patch(_OPTIMIZER)]
    with contextlib.suppress(ImportError, AttributeError):
        # in 0.16 a function of its own, which asks the other for what Adam trains; later it only calls the other
        if "config" in inspect.signature(pkgutil.resolve_name(_MUON)).parameters:
            optimizers.append(optimizer_patch(_MUON))
    scheduler = Patch(f"{_SCHEDULER}.__init__", build_scheduler, reason="completep: warmup starts at 0")
    given = Change("TransformerConfig objects", lambda: None, give_configs_back, reason="completep: configs' fields")
    return model, language_model, *optimizers, scheduler, given
