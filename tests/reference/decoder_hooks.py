"""CompleteP's forward mode on transformers' decoders, spelt out by names and hooks: what the folded mode must equal.

Slow and plain, and shares no code with the package: which module ends a branch is written down for each family, each
multiplier of the paper's Table 1 is a hook, and the optimizer has a group for every parameter.
"""

import math
import re

import torch
from torch import nn

#: last parts of the names of the modules that end a layer's residual branches
ENDS = {
    "Llama": ("self_attn.o_proj", "mlp.down_proj"),
    "Mistral": ("self_attn.o_proj", "mlp.down_proj"),
    "Qwen3": ("self_attn.o_proj", "mlp.down_proj"),
    "GPT2": ("attn.c_proj", "mlp.c_proj"),
    "GPTNeoX": ("attention.dense", "mlp.dense_4h_to_h"),
    "OPT": ("self_attn.out_proj", "fc2"),
    "Phi": ("self_attn.dense", "mlp.fc2"),
    "Gemma": ("self_attn.o_proj", "mlp.down_proj"),
    "Gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "Gemma3": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
GEMMA = ("Gemma", "Gemma2", "Gemma3")  # embeddings times sqrt(width), norms that multiply by 1 + weight


class Twin:
    """A model of transformers with the multipliers in its forward pass. ``folded``: a prepared model of the same
    config, whose weights are taken over, divided by what is folded into them."""

    def __init__(self, model, folded, family, *, m_N, m_L, head_dim, base_head_dim):
        self.model, self.family, self.m_N, self.m_L = model, family, m_N, m_L
        self.tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        self.ends = tuple(f".{end}" for end in ENDS[family])
        with torch.no_grad():
            for (name, mine), (other, theirs) in zip(model.named_parameters(), folded.named_parameters(), strict=True):
                assert name == other
                mine.copy_(self.unfolded(name, theirs))
        for name, module in model.named_modules():
            if self.in_layer(f"{name}.") and name.endswith(self.ends):
                module.register_forward_hook(lambda module, args, output: output * (1 / m_L))
            if hasattr(module, "scaling") and self.in_layer(f"{name}."):
                module.scaling = math.sqrt(base_head_dim) / head_dim
        model.get_output_embeddings().register_forward_pre_hook(lambda module, args: (args[0] / m_N,))
        if family in GEMMA:
            model.get_input_embeddings().register_forward_hook(lambda module, args, output: output / math.sqrt(m_N))

    def in_layer(self, name):
        return re.search(r"\.(layers|h)\.\d+\.", name) is not None

    def unfolded(self, name, weight):
        gemma = self.family in GEMMA
        module, _, kind = name.rpartition(".")
        factor = 1.0
        if self.in_layer(name) and module.endswith(self.ends):
            factor = 1 / self.m_L
        elif name in ("lm_head.weight", "embed_out.weight"):
            factor = 1 / self.m_N
        elif "embed_tokens" in name and gemma:
            factor = 1 / math.sqrt(self.m_N)
        elif self.tied and not self.in_layer(name) and re.search(r"(norm|ln_f)\.(weight|bias)$", name):
            factor = 1 / math.sqrt(self.m_N) if gemma else 1 / self.m_N
        if gemma and "norm" in name:
            return (1 + weight) / factor - 1
        return weight / factor

    def groups(self, lr, weight_decay, eps):
        """Table 1 with alpha 1."""
        m_N, m_L = self.m_N, self.m_L
        for name, p in self.model.named_parameters():
            group = {"params": [p], "lr": lr, "weight_decay": weight_decay, "eps": eps}
            if self.in_layer(name):
                group["eps"] = eps / m_N / m_L
            if self.in_layer(name) and p.dim() == 2:
                group |= {"lr": lr / m_N, "weight_decay": weight_decay * m_N}
            if p.dim() == 1:
                group["weight_decay"] = 0.0
            yield group


def mean_loss(model, tokens):
    """Of the next token, in double: single numbers near 4 lie 5e-7 apart. ``tokens``: [batch, length + 1]."""
    logits = model(tokens[:, :-1]).logits.double()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
