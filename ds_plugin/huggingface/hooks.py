"""Where the methods come in: reversible patches of functions that the libraries look up when they call them.

``deepspeed.initialize``            reads the sections; before any checkpoint is loaded, so that a resume restores ours
``Accelerator._prepare_deepspeed``  keeps the sections out of Accelerate's sight, and gives "auto" its value
of the Trainer, six methods         see `trainer`
"""

import contextlib
import contextvars
import functools
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ds_plugin.completep import prepare_decoder
from ds_plugin.config import load_json, refuse_misspelt, split_config
from ds_plugin.core.errors import ConfigError, PluginError, warn
from ds_plugin.core.patch import Patch, replaced
from ds_plugin.deepspeed_engine import attach
from ds_plugin.huggingface import sections, trainer
from ds_plugin.sequence_length_warmup.config import SequenceLengthWarmupConfig
from ds_plugin.sequence_length_warmup.slicing import ByName, Shorten

_ACCELERATE = "accelerate.accelerator.Accelerator"
_TRAINER = "transformers.trainer.Trainer"
_patches: list[Patch] = []
#: of the model that Accelerate prepares
_prepared: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("sections", default=None)


def enable(config: str | Path | Mapping[str, Any] | None = None) -> None:
    """Put the methods into this process's Trainer, Accelerate and Lightning. Call it before a model is prepared.

    Whose DeepSpeed JSON has a section gets its method; in a process without one nothing changes. ``config``: a JSON
    with the sections, for runs whose DeepSpeed JSON cannot hold them, such as one that ``accelerate config`` made. A
    call without one keeps what an earlier one gave, as ``ds-plugin run --config`` does.

    Raises:
        ConfigError: ``config`` is wrong, or another than before, or none of the three libraries is installed.
        PluginError: a library has no function of a name that is patched.
    """
    loaded = load_json(config) if config is not None else sections.given
    refuse_misspelt(loaded)
    found = sections.of(loaded)
    if config is not None and not found:
        raise ConfigError(f"enable: the config has none of the sections {', '.join(sections.SECTIONS)}; add one")
    if sections.given and found != sections.given:
        raise ConfigError(
            "enable: the config has other sections than the one given before; call disable() between them"
        )
    if not _patches:
        _patches.extend(_make())
    try:
        for patch in _patches:
            patch.apply()  # unless it is on
    except PluginError:
        disable()
        raise
    sections.given = found


def disable() -> None:
    """Undo `enable`. Engines that have their methods keep them; `ds_plugin.detach` takes those off."""
    while _patches:
        _patches[-1].revert()  # may refuse; then it is still ours to revert
        _patches.pop()
    sections.given = {}


def _make() -> list[Patch]:
    found = {name for name in ("transformers", "accelerate", "lightning") if importlib.util.find_spec(name)}
    if not found:
        raise ConfigError("enable: none of transformers, accelerate and lightning is installed; install one")
    made = [_patch("deepspeed.initialize", _initialize, "reads the methods' sections")]
    if "accelerate" in found:
        made.append(_patch(f"{_ACCELERATE}._prepare_deepspeed", _prepare, "keeps the sections out of Accelerate's way"))
    if "transformers" in found:
        made += [_patch(f"{_TRAINER}.{name}", *hook) for name, hook in trainer.HOOKS.items()]
    return made


def _patch(target: str, ours: Callable[..., Any], reason: str) -> Patch:
    """``ours`` is called with the function in whose place it is, then with that one's arguments."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        if not patch.applied:  # a module imported in the meantime may have kept this function
            return pkgutil.resolve_name(target)(*args, **kwargs)
        return ours(patch.original, *args, **kwargs)

    with contextlib.suppress(AttributeError):  # the patch names what is missing
        functools.update_wrapper(replacement, pkgutil.resolve_name(target))
    patch = Patch(target, replacement, reason=reason, prefixes=())
    return patch


def _prepare(original: Callable[..., Any], accelerator: Any, *args: Any) -> Any:
    """Accelerate builds an engine of the model among ``args``."""
    import torch

    config = accelerator.deepspeed_plugin.deepspeed_config
    model = next((arg for arg in args if isinstance(arg, torch.nn.Module)), None)
    if model is None:  # data loaders alone: nothing is built
        return original(accelerator, *args)
    owner = trainer.of_accelerator(accelerator)
    with sections.out_of(config) as found:
        steps = trainer.steps_of(owner)
        given = sections.with_given(found)
        token = _prepared.set(sections.resolve(given, model, getattr(owner, "args", None), steps))
        try:
            if owner is not None:
                trainer.refuse(_prepared.get() or {})
            return original(accelerator, *args)
        finally:
            _prepared.reset(token)


def _initialize(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a library calls for an engine: with the sections where something is trained, without them where not, as of
    a reference model or before an evaluation."""
    kwargs = dict(inspect.signature(attach.initialize).bind(*args, **kwargs).arguments)  # all by name
    with _config(kwargs) as (config, is_own), sections.out_of(config) as found:
        prepared = _prepared.get()
        if not is_own and kwargs.get("optimizer") is None and kwargs.get("model_parameters") is None:
            if found or prepared:
                what = "initialize() without optimizer and model_parameters, as for a reference model"
                warn(f"{what}: this engine gets none of the methods; give model_parameters to train it with them")
            return original(**kwargs, config=config)
        if prepared is None:  # Lightning's call, or a script's
            prepared = sections.resolve(sections.with_given(found), kwargs.get("model"), None)
        whole = {**config, **prepared}
        methods = split_config(whole)[1]
        if methods.completep is not None:
            prepare_decoder(kwargs["model"], methods.completep)
        cut = _of_lightning(kwargs.get("model"), config, methods.sequence_length_warmup)
        return attach.initialize(**kwargs, config=whole, shorten=cut)


@contextlib.contextmanager
def _config(kwargs: dict[str, Any]) -> Iterator[tuple[dict[str, Any], bool]]:
    """The DeepSpeed config taken out of the arguments of a call, as a dict, and whether it was a file, which is how
    a script calls; libraries give a dict."""
    args: Any = kwargs.get("args")
    of_args = getattr(args, "deepspeed_config", None)
    given = [kwargs.pop(name, None) for name in ("config", "config_params")] + [of_args]
    configs = [config for config in given if config is not None]
    if len(configs) != 1:
        raise ConfigError(attach.ONE_CONFIG % (len(configs) or "none"))
    is_own = not isinstance(configs[0], Mapping)
    with contextlib.nullcontext() if of_args is None else replaced(args, "deepspeed_config", None):
        yield dict(load_json(configs[0]) if is_own else configs[0]), is_own


def _of_lightning(model: Any, config: Mapping[str, Any], warmup: SequenceLengthWarmupConfig | None) -> Shorten | None:
    """Lightning gives its engine a batch and a number, by position, and has its forward redirected to training_step.
    Raises ConfigError: the warmup does something else than to cut."""
    modules = [sys.modules.get(name) for name in ("lightning.pytorch", "pytorch_lightning")]
    if not any(module is not None and isinstance(model, module.LightningModule) for module in modules):
        return None
    if warmup is not None and (warmup.keeps_tokens or warmup.mode == "carry"):
        what = f'mode: "{warmup.mode}"' if warmup.mode != "truncate" else 'tokens_per_step: "constant"'
        said = "a LightningModule's training_step is given a batch, which can only be cut"
        raise ConfigError(f'sequence_length_warmup.{what}: {said}; write "mode": "truncate" alone')
    cut = ByName(model.training_step, micro_batch=config.get("train_micro_batch_size_per_gpu"))
    return lambda args, kwargs, length: cut(args, kwargs, length)
