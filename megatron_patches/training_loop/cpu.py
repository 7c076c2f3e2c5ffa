"""What Megatron-LM's scripts ask for at their start, on a machine without a GPU.

Beyond `megatron_on_cpu`, which is for the library: CUDA's compiler for old fused kernels, triton for an inference
feature, and a build of the data index helpers, which the installed megatron-core brings along.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ds_plugin.core.errors import ConfigError
from ds_plugin.core.patch import Patch
from megatron_patches import megatron_on_cpu

_NEEDS_TRITON = "megatron.core.transformer.custom_layers.batch_invariant_kernels"
_HELPERS = "megatron.core.datasets.helpers_cpp"
_COMPILE = "megatron.core.datasets.utils.compile_helpers"
_FUSED = "megatron.legacy.fused_kernels.load"


def enable() -> None:
    """Make a Megatron-LM checkout's training scripts start without a GPU. Its folder is importable already."""
    megatron_on_cpu.enable(pretend_cuda=True)
    if importlib.util.find_spec("triton") is None and _NEEDS_TRITON not in sys.modules:
        sys.modules[_NEEDS_TRITON] = _WithoutTriton(_NEEDS_TRITON)
    if (helpers := _installed_helpers()) is not None:
        _load(_HELPERS, helpers)
        _never(_COMPILE, "the index helpers are built already")
    with contextlib.suppress(ModuleNotFoundError):
        if importlib.util.find_spec(_FUSED.rpartition(".")[0]) is not None:
            _never(_FUSED, "fused kernels need CUDA's compiler")


def _never(target: str, reason: str) -> None:
    Patch(target, lambda *args, **kwargs: None, reason=reason).apply()


def _installed_helpers() -> Path | None:
    """The helpers that the installed package has built; None: the checkout builds its own."""
    try:
        folder = Path(str(importlib.metadata.distribution("megatron-core").locate_file("megatron/core/datasets")))
    except importlib.metadata.PackageNotFoundError:
        return None
    return next(folder.glob("helpers_cpp*.so"), None)


def _load(name: str, path: Path) -> None:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    setattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2], module)


class _WithoutTriton(ModuleType):
    """Stands in for the kernels that need triton: they are off, and nothing else of them can be used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return (lambda: False) if name.startswith("is_") else _unavailable


def _unavailable(*args: Any, **kwargs: Any) -> None:
    raise ConfigError("batch-invariant kernels need triton, which is not installed; train without them")
