"""The mask mode in Megatron-LM's loop: each model chunk's attention mask, joined with that of the fragments."""

import functools
from typing import Any

import torch

from ds_plugin.core.errors import ConfigError
from ds_plugin.sequence_length_warmup.mask import check_model, fragment_mask
from ds_plugin.sequence_length_warmup.slicing import argument_names
from megatron_patches.training_loop.lengths import Lengths

_MASK = "attention_mask"


def masked(model: torch.nn.Module, lengths: Lengths) -> None:
    """Have ``model``, a GPTModel chunk, confine attention to fragments of the iteration's length while it trains. On
    every pipeline stage: Megatron-LM gives those in the middle no mask. One that it gives, as of documents by
    ``--reset-attention-mask``, holds as well. Raises ConfigError: the model would pass over a mask."""
    check_model(model)
    names, of = argument_names(model.forward), functools.lru_cache(maxsize=1)(fragment_mask)
    if _MASK not in names:
        what = f"the forward pass of {type(model).__name__} takes no {_MASK!r}"
        raise ConfigError(f'sequence_length_warmup.mode: "mask" and {what}; write "truncate" or "carry"')
    place = names.index(_MASK)

    def confine(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not module.training or lengths.length == lengths.full:
            return None
        theirs = args[place] if len(args) > place else kwargs.get(_MASK)
        mask = of(lengths.full, lengths.length, next(module.parameters()).device)
        mask = mask if theirs is None else mask | theirs
        if len(args) > place:
            return (*args[:place], mask, *args[place + 1 :]), kwargs
        return args, {**kwargs, _MASK: mask}

    model.register_forward_pre_hook(confine, with_kwargs=True)
