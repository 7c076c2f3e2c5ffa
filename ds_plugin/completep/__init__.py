"""CompleteP (arXiv 2505.01618) without a framework: the rules, roles of parameters, param groups, folding; and any
decoder in torch, Hugging Face's among them, whose forward pass stays as it is."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_plugin.completep.decoder import clip_grad_norm_, optimizer_groups, prepare_decoder

__all__ = ["clip_grad_norm_", "optimizer_groups", "prepare_decoder"]


def __getattr__(name: str) -> Any:  # keeps this importable without torch
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ds_plugin.completep import decoder

    return getattr(decoder, name)
