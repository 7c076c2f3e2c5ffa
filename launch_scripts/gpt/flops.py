"""Floating-point operations of training, as the field counts them."""

import torch

from launch_scripts.gpt.export import parameter_sizes
from megatron_patches.models.gpt import GPTConfig


class Flops:
    """Operations of a forward and backward pass for one token of a sample: 6 N + 12 layers width length.

    N counts the parameters that multiply: all but the embeddings, of which a tied word embedding multiplies too.
    Attention is counted as if it were not causal (Chowdhery et al., arXiv 2204.02311, appendix B). Every
    rank makes one.
    """

    def __init__(self, model: torch.nn.Module, config: GPTConfig):
        sizes = parameter_sizes(model)
        looked_up = (n for n in sizes if "embedding" in n and not ("word" in n and config.tie_embeddings))
        self.parameters = sum(sizes.values())
        self.multiplying = self.parameters - sum(sizes[name] for name in looked_up)
        self._attention = 12 * config.num_layers * config.hidden_size

    def per_token(self, length: int) -> float:
        """Of a token in a sample of ``length`` tokens."""
        return 6.0 * self.multiplying + self._attention * length
