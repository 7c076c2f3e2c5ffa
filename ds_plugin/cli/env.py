"""Which versions a run used, and which optional packages were found."""

import importlib.metadata
import importlib.util
import platform

_REQUIRED = ("torch", "deepspeed", "megatron-core", "pydantic", "numpy", "safetensors", "tokenizers")
_OPTIONAL = {
    "apex": "apex.optimizers",
    "transformer-engine": "transformer_engine",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
}


def versions() -> dict[str, str]:
    """Versions of Python and the packages results depend on; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in _REQUIRED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["ds-plugin"] = _own_version()
    return found


def optional() -> dict[str, str | None]:
    """Each optional package's version, "found" when it has none, None when it is not installed."""
    result: dict[str, str | None] = {}
    for name, module in _OPTIONAL.items():
        result[name] = None
        if importlib.util.find_spec(module.split(".")[0]) is None:
            continue
        try:
            usable = importlib.util.find_spec(module) is not None
        except ImportError:
            usable = False
        # the "apex" of the package index is an unrelated web toolkit, without apex.optimizers
        if usable:
            try:
                result[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                result[name] = "found"
    return result


def accelerator() -> str:
    """DeepSpeed's accelerator on this machine, with its devices and communication backend."""
    import torch
    from deepspeed.accelerator import get_accelerator

    found = get_accelerator()
    backend = found.communication_backend_name()
    if found.device_name() == "cpu":
        return f"cpu, {torch.get_num_threads()} threads per process, {backend}"
    return f"{found.device_count()} x {torch.cuda.get_device_name(0)}, {backend}"


def _own_version() -> str:
    import ds_plugin

    return ds_plugin.__version__
