"""CompleteP (arXiv 2505.01618): hyperparameters tuned on a small model hold at any width and depth.

The names below are all that a script needs. The rules, and what needs no megatron-core, are in `ds_plugin.completep`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_plugin.completep.folding import fold, fold_attention, load_plain, unfold
    from ds_plugin.completep.model import describe, finished_roles, ratios_of
    from ds_plugin.completep.param_groups import build_param_groups
    from megatron_patches.completep.building import building
    from megatron_patches.completep.layers import finish, prepare

_HOMES = {
    **dict.fromkeys(("fold", "fold_attention", "load_plain", "unfold"), "ds_plugin.completep.folding"),
    **dict.fromkeys(("describe", "finished_roles", "ratios_of"), "ds_plugin.completep.model"),
    "build_param_groups": "ds_plugin.completep.param_groups",
    **dict.fromkeys(("finish", "prepare"), "megatron_patches.completep.layers"),
    "building": "megatron_patches.completep.building",
}

__all__ = [
    "build_param_groups",
    "building",
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


def __getattr__(name: str) -> Any:  # keeps this importable without torch
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
