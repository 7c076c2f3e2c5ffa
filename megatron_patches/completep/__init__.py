"""CompleteP (arXiv 2505.01618): hyperparameters tuned on a small model hold at any width and depth."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_patches.completep.folding import fold, fold_attention, load_plain, unfold
    from megatron_patches.completep.layers import describe, finish, finished_roles, prepare, ratios_of
    from megatron_patches.completep.param_groups import build_param_groups

_HOMES = {
    **dict.fromkeys(("describe", "finish", "finished_roles", "prepare", "ratios_of"), "layers"),
    **dict.fromkeys(("fold", "fold_attention", "load_plain", "unfold"), "folding"),
    "build_param_groups": "param_groups",
}

__all__ = [
    "build_param_groups",
    "describe",
    "finish",
    "finished_roles",
    "fold",
    "fold_attention",
    "load_plain",
    "prepare",
    "ratios_of",
    "unfold",
]


def __getattr__(name: str) -> Any:  # keeps the config importable without torch
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
