"""What Megatron-LM's scripts ask for at their start, on a machine without a GPU, beyond `megatron_on_cpu`: CUDA's
compiler for old fused kernels, triton for an inference feature, and a build of the data index helpers."""

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
_DATASETS = "megatron.core.datasets"
_COMPILE = f"{_DATASETS}.utils.compile_helpers"
_FUSED = "megatron.legacy.fused_kernels.load"


def enable() -> None:
    """Make a Megatron-LM checkout's training scripts start without a GPU. Its folder is importable already."""
    if importlib.util.find_spec("triton") is None and _NEEDS_TRITON not in sys.modules:
        sys.modules[_NEEDS_TRITON] = _WithoutTriton(_NEEDS_TRITON)
    megatron_on_cpu.enable(pretend_cuda=True)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        folder = Path(str(importlib.metadata.distribution("megatron-core").locate_file("megatron/core/datasets")))
        if any(folder.glob("helpers_cpp*.so")):  # else the checkout builds its own
            importlib.import_module(_DATASETS).__path__.append(str(folder))
            Patch(_COMPILE, lambda *args, **kwargs: None, reason="the index helpers are built already").apply()
    with contextlib.suppress(ModuleNotFoundError):
        if importlib.util.find_spec(_FUSED.rpartition(".")[0]) is not None:
            Patch(_FUSED, lambda *args, **kwargs: None, reason="fused kernels need CUDA's compiler").apply()


class _WithoutTriton(ModuleType):
    """Stands in for the kernels that need triton: they are off."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return (lambda: False) if name.startswith("is_") else self._unavailable

    @staticmethod
    def _unavailable(*args: Any, **kwargs: Any) -> None:
        raise ConfigError("batch-invariant kernels need triton, which is not installed; train without them")
