"""The mask mode: samples at full length, attention confined to fragments of the current length (arXiv 2503.15450)."""

import functools
import importlib.util
from typing import Any

import torch

from ds_plugin.core.errors import ConfigError
from ds_plugin.sequence_length_warmup.slicing import named

_MASK = "attention_mask"  # the forward argument of a megatron-core GPT
_MODE, _OTHERWISE = 'sequence_length_warmup.mode: "mask"', 'or write "truncate" or "carry"'


def fragment_mask(full: int, length: int, device: torch.device | str | None = None) -> torch.Tensor:
    """[1, 1, full, full] bool, True where attention is masked out (megatron-core's convention): a query sees the keys
    at or before it within its own fragment of ``length`` tokens, the last of which may be shorter."""
    position = torch.arange(full, device=device)
    fragment = position // length
    allowed = (fragment[:, None] == fragment[None, :]) & (position[:, None] >= position[None, :])
    return ~allowed[None, None]


def check_model(module: torch.nn.Module) -> None:
    """Raises ConfigError for a model that would pass over the mask: with an attention of TransformerEngine, which takes
    none with a causal mask type, or one that is not megatron-core's."""
    cores, others = [], []
    if importlib.util.find_spec("megatron") is not None:  # else the model is not of it
        from megatron.core.transformer.attention import Attention
        from megatron.core.transformer.dot_product_attention import DotProductAttention

        cores = [m.core_attention for m in module.modules() if isinstance(m, Attention)]
        others = [type(core).__name__ for core in cores if not isinstance(core, DotProductAttention)]
    config: Any = getattr(module, "config", None)
    window = getattr(config, "window_size", None)
    if others:
        what = f"the core attention is {others[0]}, which takes no mask but its causal one"
        trouble = f'{what}; use the local layer spec, "tokens_per_step": "constant" (samples that are such fragments)'
    elif window:
        trouble = f"the model's window_size is {window}, with which it drops any mask but its own; leave it out"
    elif getattr(config, "masked_softmax_fusion", False) and (config.bf16 or config.fp16):
        trouble = "the model's masked_softmax_fusion is on, which drops any mask but its own; leave it out"
    elif not cores:
        remedy = "give initialize(..., shorten=function) that puts it into (args, kwargs, length)"
        trouble = f"how a {type(module).__name__}, no megatron-core GPT, takes a mask is not known; {remedy}"
    else:
        return
    raise ConfigError(f"{_MODE} and {trouble}, {_OTHERWISE}")


class BlockDiagonalCausalMask:
    """A `Shorten` that shortens nothing: it adds the mask of the current length, built once for each length."""

    def __init__(self, names: list[str]):
        """``names``: the positional arguments of the model's forward, in order."""
        self.names, self._mask = names, functools.lru_cache(maxsize=1)(fragment_mask)

    def __call__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], length: int
    ) -> tuple[tuple[Any, ...], dict[str, Any], int, int]:
        given = named(self.names, args, kwargs)
        tokens = given.get("input_ids")
        if not torch.is_tensor(tokens) or _MASK not in self.names:
            said = f"looks for the forward arguments 'input_ids' and '{_MASK}'; it was given {', '.join(given)}"
            raise ConfigError(f"{_MODE} {said}")
        if given.get(_MASK) is not None:
            remedy = f"give None (the model is causal), {_OTHERWISE}"
            raise ConfigError(f"{_MODE} and the batch brings an {_MASK} of its own; {remedy}")
        rows, full = tokens.shape
        if length < full:
            given[_MASK] = self._mask(full, length, tokens.device)
        return tuple(given.pop(name) for name in self.names[: len(args)]), given, rows * full, rows * full
