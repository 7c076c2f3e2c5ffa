"""CompleteP (arXiv 2505.01618): hyperparameters tuned on a small model hold at any width and depth.

The names below are all that a script needs. The rules, and what needs no megatron-core, are in `ds_plugin.completep`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_plugin.completep.folding import fold, fold_attention, load_plain, unfold
    from ds_plugin.completep.model import describe, finished_roles, ratios_of
    from ds_plugin.completep.param_groups import build_param_groups
    from megatron_patches.completep.build import building
    from megatron_patches.completep.layers import finish, prepare

_HOMES = {
    "ds_plugin.completep.folding": ("fold", "fold_attention", "load_plain", "unfold"),
    "ds_plugin.completep.model": ("describe", "finished_roles", "ratios_of"),
    "ds_plugin.completep.param_groups": ("build_param_groups",),
    "megatron_patches.completep.build": ("building",),
    "megatron_patches.completep.layers": ("finish", "prepare"),
}
__all__ = [
    "build_param_groups", "building", "describe", "finish", "finished_roles", "fold", "fold_attention", "load_plain",
    "prepare", "ratios_of", "unfold",
]  # fmt: skip


def __getattr__(name: str) -> Any:  # keeps this importable without torch
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
