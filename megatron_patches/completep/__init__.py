"""CompleteP (arXiv 2505.01618): hyperparameters tuned on a small model hold at any width and depth.

The names below are all that a script needs. The rules, and what needs no megatron-core, are in `ds_plugin.completep`.
"""

from ds_plugin.completep.folding import fold, fold_attention, load_plain, unfold
from ds_plugin.completep.model import describe, finished_roles, ratios_of
from ds_plugin.completep.param_groups import build_param_groups
from megatron_patches.completep.build import building
from megatron_patches.completep.layers import finish, prepare

__all__ = [
    "build_param_groups", "building", "describe", "finish", "finished_roles", "fold", "fold_attention", "load_plain",
    "prepare", "ratios_of", "unfold",
]  # fmt: skip
