"""Which versions a run used, and which optional packages were found."""

import importlib.metadata
import importlib.util
import platform
from typing import Any

from ds_plugin import __version__

_REQUIRED = (
    "torch", "deepspeed", "megatron-core", "pydantic", "numpy", "safetensors", "tokenizers", "transformers",
    "accelerate", "peft", "trl",
)  # fmt: skip
_OPTIONAL = {"apex": "apex.optimizers", "transformer-engine": "transformer_engine"}
_OPTIONAL |= {name: name for name in ("tensorboard", "wandb")}


def versions() -> dict[str, str]:
    """Versions of Python and the packages results depend on; absent ones are left out."""
    known = {name: _version(name) for name in _REQUIRED}
    found = {name: version for name, version in known.items() if version is not None}
    return {"python": platform.python_version(), **found, "ds-plugin": __version__}


def optional() -> dict[str, str | None]:
    """Each optional package's version, "found" when it has none, None when it is not installed."""
    return {name: (_version(name) or "found") if _usable(module) else None for name, module in _OPTIONAL.items()}


def accelerator() -> str:
    """The accelerator on this machine, DeepSpeed's where that is installed, with its devices and backend."""
    import torch

    if _usable("deepspeed"):
        from deepspeed.accelerator import get_accelerator

        kind, backend = get_accelerator().device_name(), get_accelerator().communication_backend_name()
    else:
        kind = (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")).type
        backend = torch.distributed.get_default_backend_for_device(kind)
    if kind == "cpu":
        return f"cpu, {torch.get_num_threads()} threads per process, {backend}"
    devices: Any = torch.get_device_module(kind)
    return f"{devices.device_count()} x {devices.get_device_name(0)}, {backend}"


def _version(name: str) -> str | None:
    return next((found.version for found in importlib.metadata.distributions(name=name)), None)


def _usable(module: str) -> bool:
    # the "apex" of the package index is an unrelated web toolkit, without apex.optimizers
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False
