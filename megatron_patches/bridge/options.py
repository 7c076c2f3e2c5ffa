"""A Megatron-Bridge run's settings, by the names of Megatron-LM's options, and what the methods do not go with."""

import functools
from collections.abc import Iterator
from typing import Any

from ds_plugin.config import PluginConfig
from ds_plugin.core.errors import ConfigError
from megatron_patches.training_loop.options import check_options

#: of the container; the first that has a field of an option's name is where that option lies
_PARTS = "model train checkpoint optimizer ddp dist dataset scheduler validation logger"
_COUNTS = {"iteration": "step", "curr_iteration": "step"}  # of the run's state
_FINETUNING = "batches of finetuning have lengths of their own"
#: by method, why, and which fields it does not go with, by their values that are fine
_REFUSED: dict[str, dict[str, dict[str, tuple[Any, ...]]]] = {
    "": {
        "its process groups are not megatron-core's own": {"dist.use_decentralized_pg": (False,)},
        "a start within the process would meet the state of the one before": {"inprocess_restart.enabled": (False,)},
        "the method's state is saved with ordinary checkpoints only": {"checkpoint.non_persistent_ckpt_type": ()},
        "adapters are trained, not the model": {"peft": ()},
        "the method waits within the optimizer's step, which a graph would not run": {
            "optimizer.optimizer_cuda_graph": (False,)
        },
    },
    "sequence_length_warmup": {
        _FINETUNING: {"dataset.dataloader_type": ("single", "cyclic"), "train.num_epochs": ()},
        "packed samples have no length to shorten": {
            "dataset.enable_in_batch_packing": (False,),
            "dataset.enable_offline_packing": (False,),
        },
    },
    "completep": {
        "weights that were trained are not scaled as they were drawn": {"checkpoint.pretrained_checkpoint": ()},
        "its init cannot be scaled": {"model.init_model_with_meta_device": (False,)},
    },
}
_HOOKS = ("pre_wrap_hooks", "_pre_wrap_hooks")  # a field of newer models' configurations, private in the others
_LOADS_WEIGHTS = "load_weights"  # how Bridge calls the pre-wrap hooks by which a Hugging Face model's come in


class Options:
    """What the loop's core reads and sets, where Bridge has it: in the container's parts, or in the run's state."""

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg
        self.state: Any = None  # Bridge's GlobalState, once there is one

    def place(self, name: str) -> tuple[Any, str]:
        """The object that holds the option, and what it is called there. Raises AttributeError: Bridge has none."""
        if name in _COUNTS or name.startswith("consumed_"):
            return self.state.train_state, _COUNTS.get(name, name)
        if name == "data_parallel_size":
            return self.cfg, name
        for _, part in self._parts():
            if name in vars(part):
                return part, name
        raise AttributeError(name)

    def spelled(self, name: str) -> str:
        """The option as one writes it, for messages."""
        return next((f"cfg.{at}.{name}" for at, part in self._parts() if name in vars(part)), name)

    def _parts(self) -> Iterator[tuple[str, Any]]:
        for name in _PARTS.split():
            yield name, (part := getattr(self.cfg, name))
            if name == "model" and hasattr(part, "transformer"):  # newer models hold their TransformerConfig
                yield "model.transformer", part.transformer

    def __getattr__(self, name: str) -> Any:
        owner, field = self.place(name)
        return getattr(owner, field)

    @property
    def save_retain_interval(self) -> int | None:
        """Not None: Bridge removes older checkpoints."""
        return self.cfg.checkpoint.most_recent_k if self.cfg.checkpoint.most_recent_k >= 0 else None


def check(sections: PluginConfig, options: Options) -> None:
    """Raises ConfigError for the first setting that a method cannot go with, naming both and the remedy."""
    on = {name: section for name in vars(sections) if (section := getattr(sections, name)) is not None}
    for method, reasons in _REFUSED.items() if on else ():
        if method and method not in on:
            continue
        name = method or next(iter(on))
        for why, field, fine in ((why, *each) for why, fields in reasons.items() for each in fields.items()):
            value = functools.reduce(lambda part, at: getattr(part, at, None), field.split("."), options.cfg)
            if value is not None and value not in fine:
                said = type(value).__name__ if field == "peft" else repr(value)
                raise ConfigError(f"{name}: cfg.{field} is {said}: {why}; leave one of the two out")
    if "sequence_length_warmup" in on and not hasattr(options.cfg.model, "seq_length"):
        kind = type(options.cfg.model).__name__
        raise ConfigError(f"sequence_length_warmup: cfg.model is a {kind}, which has no seq_length; leave it out")
    for hook in hooks_of(options.cfg.model) if "completep" in on else []:
        if _LOADS_WEIGHTS in (name := getattr(getattr(hook, "func", hook), "__name__", "")):
            what = f"cfg.model has the hook {name}, which loads weights that were not drawn by the recipe"
            raise ConfigError(f"completep: {what}; write load_weights=False")
    check_options(sections, options)


def hooks_of(model: Any) -> list[Any]:
    """The hooks of a model's configuration that change the model before it is wrapped; the list itself."""
    for name in _HOOKS:
        if isinstance(found := vars(model).get(name), list):
            return found
    model._pre_wrap_hooks = found = []
    return found
