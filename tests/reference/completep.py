"""A GPT written from Table 1 of arXiv 2505.01618 in plain torch, slowly and in one place.

Pre-LN, learned positions, biases, GELU, untied or tied unembedding. It shares no code with the package: the
multipliers are spelt out again here, from the paper.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, width, heads, branch, attention_scale):
        super().__init__()
        self.heads, self.branch, self.attention_scale = heads, branch, attention_scale
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def attention(self, x):
        batch, length, width = x.shape
        # each head's q, k and v lie beside each other, as in megatron-core
        q, k, v = self.qkv(x).view(batch, length, self.heads, -1).transpose(1, 2).chunk(3, dim=-1)
        scores = (q @ k.transpose(-1, -2)) * self.attention_scale
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, length, width))

    def forward(self, x):
        x = x + self.branch * self.attention(self.norm_1(x))
        return x + self.branch * self.fc2(F.gelu(self.fc1(self.norm_2(x))))


class ReferenceGPT(nn.Module):
    """Returns the mean loss of (tokens, labels), both [batch, length]."""

    def __init__(self, *, vocab, length, width, depth, heads, base_width, base_depth, base_head_dim, alpha, tied):
        super().__init__()
        self.m_N, self.m_L, self.alpha, self.tied = width / base_width, depth / base_depth, alpha, tied
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
        scale = math.sqrt(base_head_dim) / (width // heads)
        self.blocks = nn.ModuleList(Block(width, heads, self.m_L**-alpha, scale) for _ in range(depth))
        self.final_norm = nn.LayerNorm(width)
        if not tied:
            self.unembedding = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens, labels):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        weight = self.tokens.weight if self.tied else self.unembedding.weight
        logits = F.linear(self.final_norm(x), weight) / self.m_N
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def groups(self, lr, weight_decay, eps):
        """AdamW groups, one per parameter, straight from the table."""
        m_N, m_L, alpha = self.m_N, self.m_L, self.alpha
        block_eps, block_lr = eps / m_N / m_L**alpha, lr * m_L ** (alpha - 1)
        for name, p in self.named_parameters():
            group = {"params": [p], "lr": lr, "weight_decay": weight_decay, "eps": eps}  # embedding, unembedding
            if name.startswith("final_norm"):
                group["weight_decay"] = 0.0
            elif name.startswith("blocks") and p.dim() == 2:
                group |= {"lr": block_lr / m_N, "weight_decay": weight_decay * m_N, "eps": block_eps}
            elif name.startswith("blocks"):
                group |= {"lr": block_lr, "weight_decay": 0.0, "eps": block_eps}
            yield group

    def copy_from_megatron(self, model):
        """Take over the weights of a megatron-core GPTModel without tensor parallelism."""
        theirs = dict(model.named_parameters())
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(theirs.pop(megatron_name(name)))
        assert not theirs, f"left over: {list(theirs)}"


def megatron_name(name):
    """The name megatron-core gives to a parameter of `ReferenceGPT`."""
    if name.startswith("blocks."):
        _, index, module, kind = name.split(".")
        inner = {
            "norm_1": "input_layernorm", "norm_2": "pre_mlp_layernorm", "qkv": "self_attention.linear_qkv",
            "proj": "self_attention.linear_proj", "fc1": "mlp.linear_fc1", "fc2": "mlp.linear_fc2",
        }[module]  # fmt: skip
        return f"decoder.layers.{index}.{inner}.{kind}"
    outer = {"tokens": "embedding.word_embeddings", "positions": "embedding.position_embeddings",
             "final_norm": "decoder.final_layernorm", "unembedding": "output_layer"}  # fmt: skip
    module, kind = name.split(".")
    return f"{outer[module]}.{kind}"
