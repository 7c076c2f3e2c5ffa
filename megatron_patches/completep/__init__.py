"""CompleteP (arXiv 2505.01618): hyperparameters tuned on a small model hold at any width and depth."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_patches.completep.layers import describe, finish, finished_roles, prepare, ratios_of
    from megatron_patches.completep.param_groups import build_param_groups

__all__ = ["build_param_groups", "describe", "finish", "finished_roles", "prepare", "ratios_of"]


def __getattr__(name: str) -> Any:  # keeps the config importable without torch
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    home = "param_groups" if name == "build_param_groups" else "layers"
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
