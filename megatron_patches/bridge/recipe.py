"""CompleteP in Megatron-Bridge: on the model's configuration and layer spec, and as overrides of param groups."""

import inspect
from typing import Any

from ds_plugin.completep.config import CompletePConfig
from ds_plugin.core.errors import ConfigError, raise_on_all_ranks
from megatron_patches.bridge.options import hooks_of
from megatron_patches.completep.layers import finish, prepared
from megatron_patches.completep.optimizer import check_scheduler, config_overrides, refuse_unused_in, watch_groups


class Recipe:
    """For the one model and optimizer that a container describes. What it sets there but for the values of the recipe
    is taken back once they are built: a checkpoint's run_config.yaml is read where there is no plugin, too."""

    def __init__(self, section: CompletePConfig, cfg: Any) -> None:
        """``cfg``: the ConfigContainer, finalized. Raises ConfigError: it has overrides of its own."""
        self.section, self.cfg = section, cfg
        self._watched = False
        self._provider, self._spec = cfg.optimizer_config_override_provider, cfg.model.transformer_layer_spec
        if (theirs := type(self._provider).__name__) != "OptimizerConfigOverrideProvider":
            what = f"cfg.optimizer_config_override_provider is a {theirs}; the recipe sets the same"
            raise ConfigError(f"completep: {what}; leave one of the two out")
        cfg.model.transformer_layer_spec = self._scaled_spec
        cfg.optimizer_config_override_provider = self
        hooks_of(cfg.model).append(self._finish)  # after what may draw weights anew

    def _scaled_spec(self, config: Any, vp_stage: int | None = None) -> Any:
        spec = self._spec
        if callable(spec):
            staged = {"vp_stage": vp_stage} if "vp_stage" in inspect.signature(spec).parameters else {}
            spec = spec(config, **staged)
        with prepared(getattr(config, "transformer", config), spec, self.section) as scaled:
            return scaled

    def _finish(self, model: list[Any]) -> list[Any]:
        with raise_on_all_ranks():
            for chunk in model:
                finish(chunk, self.section)
        return model

    def take_back(self) -> None:
        """Once they are built, or the run has ended before: the container's own again."""
        if self._finish in (hooks := hooks_of(self.cfg.model)):
            hooks.remove(self._finish)
            self.cfg.model.transformer_layer_spec = self._spec
            self.cfg.optimizer_config_override_provider = self._provider

    def build_config_overrides(self, context: Any) -> dict[Any, dict[str, Any]]:
        """The param groups by role, as Bridge asks for them. Raises ConfigError, on every rank."""
        self.take_back()
        with raise_on_all_ranks():
            overrides = config_overrides(context.model, self.section, context.optimizer_config)
        refuse_unused_in(context.model, self.section)
        return overrides

    def watch(self, optimizer: Any, model: list[Any], scheduler: Any) -> None:
        """The optimizer is built, and has loaded nothing: look at its groups, now and later. Raises ConfigError."""
        if self._watched:
            return
        self._watched = True
        check_scheduler(scheduler)
        watch_groups(optimizer, model, self.section, self.cfg.optimizer)
