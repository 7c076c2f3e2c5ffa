"""Floating-point operations of training, as the field counts them."""

import math

import torch

from ds_plugin import compat
from ds_plugin.run.export import parameter_count
from megatron_patches.gpt import GPTConfig


class Flops:
    """Operations of a forward and backward pass for one token of a sample: 6 N + 12 layers width length.

    N counts the parameters that multiply: all but the embeddings, of which a tied word embedding multiplies too.
    Attention is counted as if it were not causal (Chowdhery et al., arXiv 2204.02311, appendix B).
    """

    def __init__(self, model: torch.nn.Module, config: GPTConfig):
        looked_up = sum(
            math.prod(compat.global_shape(p)) * (config.tensor_parallel if "word" in name else 1)
            for name, p in model.named_parameters()
            if "embedding" in name and not ("word" in name and config.tie_embeddings)
        )
        self.multiplying = parameter_count(model) - looked_up
        self._attention = 12 * config.num_layers * config.hidden_size

    def per_token(self, length: int) -> float:
        """Of a token in a sample of ``length`` tokens."""
        return 6.0 * self.multiplying + self._attention * length
