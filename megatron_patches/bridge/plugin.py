"""The methods in a run of Megatron-Bridge's ``pretrain``: see `attach`.

Where Bridge has a door, it is used: callbacks around an iteration, a checkpoint manager, overrides of the optimizer's
param groups, a model's layer spec and pre-wrap hook. Nothing leads to the data iterators, the forward and backward
passes and the evaluation; those three functions are patched, from the run's start until `Plugin.detach`.
"""

import contextlib
import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_plugin.config import PluginConfig, load_json
from ds_plugin.core.errors import ConfigError, PluginError, StateError, raise_on_all_ranks
from ds_plugin.core.patch import Change, Patch, replaced
from megatron_patches.apply_completep import all_or_none, of_megatron
from megatron_patches.bridge import options as bridge_options
from megatron_patches.bridge.recipe import Recipe
from megatron_patches.training_loop import state
from megatron_patches.training_loop.core import Core, Marked, no_step

MANAGER = "megatron_patches.bridge.checkpoints.Manager"
_TRAINING = "megatron.bridge.training"
_DATA = "megatron.bridge.data.loaders.setup_data_iterators"
_PASSES = f"{_TRAINING}.train.get_forward_backward_func"
_EVALUATION = f"{_TRAINING}.eval.evaluate_and_print_results"
_EVENTS = ("on_train_start", "on_train_step_start", "on_train_step_end")
# Private names of Bridge's GlobalState, here only: its loggers, on the last rank, and an iteration's floating-point
# operations, summed up in its forward steps.
_LOGGERS = ("_tensorboard_logger", "_wandb_logger", "_mlflow_logger", "_comet_logger")
_SUMS = "_flops_"

_attached: "Plugin | None" = None


def attach(cfg: Any, source: PluginConfig | str | Path, *, verify: bool = True) -> "Plugin":
    """The methods of a JSON file, or of its sections, for a run of Bridge's, before it begins::

        plugin = megatron_patches.bridge.attach(cfg, "ds_plugin.json")
        pretrain(cfg, forward_step, callbacks=plugin.callbacks())

    ``cfg``: the ConfigContainer, which is completed. ``verify``: compare a checkpoint's files with what was saved,
    before it is loaded. Without a section nothing is changed. Raises ConfigError: a setting that a method does not go
    with, or a wrong file; PluginError: Bridge lacks a part that is needed; StateError: a plugin is attached already
    (`Plugin.detach`)."""
    global _attached
    sections = source if isinstance(source, PluginConfig) else PluginConfig.from_dict(load_json(source))
    plugin = Plugin(of_megatron(sections), lambda: plugin._options, cfg=cfg, verify=verify)
    if not plugin.on:
        return plugin
    if _attached is not None:
        raise StateError("megatron_patches.bridge: a plugin is attached already; detach() it first")
    _probe()
    bridge_options.check(sections, plugin._options)
    if (theirs := cfg.checkpoint.custom_manager_class) is not None:
        what = f"cfg.checkpoint.custom_manager_class is {theirs!r}, and the methods' state is saved by a class of ours"
        raise ConfigError(f"megatron_patches.bridge: {what}; leave one of the two out")
    allow = importlib.import_module("megatron.bridge.utils.instantiate_utils").register_allowed_target_prefix
    allow("megatron_patches.")
    cfg.checkpoint.custom_manager_class = MANAGER
    _attached = plugin
    return plugin


def attached(checkpoint_config: Any) -> "Plugin":
    """The plugin of the run that this is the configuration of. Raises StateError: there is none."""
    if _attached is None or _attached.cfg.checkpoint is not checkpoint_config:
        raise StateError(f"{MANAGER} is made by attach(cfg, FILE) alone; call it with this run's cfg")
    return _attached


def _probe() -> None:
    """Raises PluginError for a Bridge whose parts are elsewhere, or called otherwise."""
    callbacks = importlib.import_module(f"{_TRAINING}.callbacks")
    checkpoint = importlib.import_module(f"{_TRAINING}.config").CheckpointConfig
    lacking = [name for name in _EVENTS if name not in callbacks.VALID_EVENTS]
    lacking += [] if hasattr(checkpoint, "custom_manager_class") else ["CheckpointConfig.custom_manager_class"]
    for target in (_DATA, _PASSES, _EVALUATION):
        module, _, name = target.rpartition(".")
        lacking += [] if callable(getattr(importlib.import_module(module), name, None)) else [target]
    if lacking:
        version = importlib.import_module("megatron.bridge").__version__
        raise PluginError(f"Megatron-Bridge {version} has no {', '.join(lacking)}; use a tested version (0.6)")


@dataclass(eq=False, kw_only=True)
class Plugin(Core):
    """The methods of one run; made by `attach`."""

    cfg: Any
    recipe: Recipe | None = None
    _guard: Change | None = None
    _patches: dict[str, Patch] = field(default_factory=dict)  # by what they replace
    _iteration: contextlib.ExitStack | None = None  # open while one runs
    _taken: bool = False
    _stepped: bool = False  # the optimizer, in this iteration
    _train: Any = None  # the training data's iterators

    def __post_init__(self) -> None:
        self._options = bridge_options.Options(self.cfg)

    @property
    def on(self) -> bool:
        """Whether any method is."""
        return self.sections != PluginConfig()

    def callbacks(self, *own: Any, manager: Any = None) -> Any:
        """A CallbackManager for ``pretrain``: the methods', then ``own``, Callback objects. ``manager``: one that there
        is already, to which the methods' are added."""
        manager = manager or importlib.import_module(f"{_TRAINING}.callbacks").CallbackManager()
        for event in _EVENTS if self.on else ():
            manager.register(event, getattr(self, f"_{event}"))
        manager.add(list(own))
        return manager

    def detach(self) -> None:
        """After the run: Bridge as it was."""
        global _attached
        for patch in [*self._patches.values(), *filter(None, [self._guard])]:
            patch.revert()
        if self.recipe is not None:
            self.recipe.take_back()
        if _attached is self:
            _attached = None
            if self.cfg.checkpoint.custom_manager_class == MANAGER:  # the run has not come to `begin`
                self.cfg.checkpoint.custom_manager_class = None

    def start(self) -> None:
        """The configuration is complete, and there is no model yet. Raises ConfigError, on every rank."""
        with raise_on_all_ranks():
            bridge_options.check(self.sections, self._options)
            if self.sections.completep is not None:
                self.recipe = Recipe(self.sections.completep, self.cfg)
        self.begin()
        self._guard = no_step("pretrain has no callbacks=plugin.callbacks(); give them")
        patches = [
            Patch(_DATA, self._data, reason="the batches of the training loop"),
            Patch(_PASSES, self._get_passes, reason="an iteration's losses, the full length before it", prefixes=()),
            Patch(_EVALUATION, self._evaluate, reason="evaluation of the average"),
        ]
        self._patches = {patch.name: patch for patch in patches}
        with all_or_none([self._guard, *patches]):
            # this run's alone: a checkpoint's run_config.yaml is read where there is no plugin, too
            self.cfg.checkpoint.custom_manager_class = None

    def take_over(self, ctx: Any, scheduler: Any) -> None:
        """Bridge's context has a model and an optimizer, loaded if they ever are."""
        if self._taken:
            return
        self._taken, self._options.state = True, ctx.state
        assert self._guard is not None
        self._guard.revert()  # steps are seen from here on
        core = importlib.import_module("megatron.core.utils").get_model_config(ctx.model[0])
        if self.lengths is not None and core is not self.cfg.model and getattr(core, "seq_length", None) is not None:
            what = "the model's seq_length is not cfg.model's, which the loop is given"
            raise PluginError(f"sequence_length_warmup: {what}; leave the section out for this model")
        self.take(ctx.model, ctx.optimizer, scheduler)
        optimizer, step = ctx.optimizer, ctx.optimizer.step

        def seen(*args: Any, **kwargs: Any) -> Any:
            if self._iteration is None:
                raise StateError("megatron_patches.bridge: give pretrain callbacks=plugin.callbacks()")
            self._stepped = True
            return step(*args, **kwargs)

        optimizer.step, self._optimizer, self._model = seen, optimizer, ctx.model

    def load(self, ctx: Any, stock: Callable[[Any], tuple[int, int]]) -> tuple[int, int]:
        """Refuse what no run can go on from, load it by ``stock``, and take over the methods' state."""
        self._options.state = ctx.state
        if self.recipe is not None:
            self.recipe.watch(ctx.optimizer, ctx.model, ctx.opt_param_scheduler)
        found = state.check(self, ctx.model)
        iteration, operations = stock(ctx)
        root = found[0] if found is not None else self.cfg.checkpoint.load  # a copy's folder has a name of its own
        if iteration > 0 and not self.cfg.checkpoint.finetune and root is not None:
            self._loaded = (Path(root), iteration)
        self.take_over(ctx, ctx.opt_param_scheduler)
        return iteration, operations

    def to_load(self) -> tuple[Path, int, bool] | None:
        """What Bridge will find; an iteration's own folder may be given, or a link to it."""
        c = self.cfg.checkpoint
        for given, weights_alone in ((c.load, bool(c.finetune)), (c.pretrained_checkpoint, True)):
            folder = Path(given or "").resolve()
            if given is not None and (number := re.fullmatch(r"iter_(\d{7,})", folder.name)):
                return folder.parent, int(number[1]), weights_alone
            if (found := super().to_load()) is not None:
                return found
        return None

    def save_average(self, bridge: Any, folder: Path | str, horizon: int | None = None) -> None:
        """Write the average as a Hugging Face model by ``bridge``, an AutoBridge, between two iterations or at the end
        of the training: in a callback, as its process groups go with the run. Every rank calls it. ``horizon``: which
        of the averages, in mode ema. Raises StateError as `WeightAverager.read`."""
        if self.averager is None:
            raise StateError("megatron_patches.bridge: weight_averaging is off; there is no average to save")
        with self.averager.averaged_weights(horizon):
            bridge.save_hf_pretrained(list(self._model), folder)

    @contextlib.contextmanager
    def weights_alone(self, ctx: Any) -> Iterator[Any]:
        """The context of a save that has the weights alone."""
        alone = {"optimizer": None, "opt_param_scheduler": None, "train_data_iterator": None}
        with contextlib.ExitStack() as stack:
            for name, value in {"save_optim": False, "save_rng": False, "most_recent_k": -1}.items():
                stack.enter_context(replaced(self.cfg.checkpoint, name, value))
            yield type(ctx)(**{**vars(ctx), **alone})

    def _data(self, *args: Any, **kwargs: Any) -> Any:
        with self.reading_on():
            train, valid, test = self._patches[_DATA].original(*args, **kwargs)
        self.over_data(train, valid, test)
        self._train = train
        return train, valid, test

    def _get_passes(self, *args: Any, **kwargs: Any) -> Any:
        stock = self._patches[_PASSES].original(*args, **kwargs)

        def passes(**settings: Any) -> Any:
            if not self.hears:
                return stock(**settings)
            model = settings["model"]
            iterators = [self._train] * len(model) if len(model) > 1 else self._train
            config = importlib.import_module("megatron.core.utils").get_model_config(model[0])
            given = {"data_iterator": iterators, "model": model, "optimizer": self._optimizer, "config": config}
            return self.passes(stock, given)(**settings)

        return passes

    @contextlib.contextmanager
    def untraced(self) -> Iterator[None]:
        """Bridge's sums of an iteration know nothing of the block."""
        before = {name: value for name, value in vars(self._options.state).items() if name.startswith(_SUMS)}
        yield
        vars(self._options.state).update(before)

    def _evaluate(self, run_state: Any, prefix: str, *args: Any, **kwargs: Any) -> Any:
        stock = self._patches[_EVALUATION].original

        def run(said: str) -> Any:
            if not self._mark:
                return stock(run_state, said, *args, **kwargs)
            with contextlib.ExitStack() as stack:
                for name in _LOGGERS:
                    if (logger := getattr(run_state, name)) is not None:
                        mark = self._mark.replace(",", "") if "mlflow" in name else self._mark  # which takes no comma
                        stack.enter_context(replaced(run_state, name, Marked(logger, mark)))
                return stock(run_state, said, *args, **{**kwargs, "callback_manager": None})  # not the run's own losses

        return self.evaluated(run, prefix)

    def _on_train_start(self, context: Any) -> None:
        if not self._taken and self.recipe is not None:
            self.recipe.watch(context.optimizer, context.model, context.scheduler)
        self.take_over(context, context.scheduler)

    def _on_train_step_start(self, context: Any) -> None:
        self._stepped, self._iteration = False, contextlib.ExitStack()
        self._iteration.enter_context(self.step())

    def _on_train_step_end(self, context: Any) -> None:
        assert self._iteration is not None
        self._iteration.close()
        self._iteration = None
        if not self._stepped:  # Bridge leaves before the optimizer's step
            return
        self.after_step(applied=not context.skipped_iter, norm=context.grad_norm)
        iteration, run_state = context.state.train_state.step + 1, context.state
        if values := self.figures():
            if (writer := run_state.tensorboard_logger) is not None:
                for name, value in values.items():
                    writer.add_scalar(name, value, iteration)
            if (wandb := run_state.wandb_logger) is not None:
                wandb.log(values, iteration)
            for logger in filter(None, (run_state.mlflow_logger, run_state.comet_logger)):
                logger.log_metrics(values, step=iteration)
        if (said := self.line()) and iteration % self.cfg.logger.log_interval == 0:
            log = importlib.import_module("megatron.bridge.utils.common_utils")
            log.print_rank_last(f" iteration {iteration:8d} |{said}")
