"""A GPT written from Table 1 of arXiv 2505.01618 in plain torch, slowly and in one place.

Pre-LN; by default learned positions, LayerNorm, biases and GELU, as in the paper. Options turn it into a Llama: grouped
queries, SwiGLU, RMSNorm, rotary positions, no biases; and add norms on queries and keys. It shares no code with the
package: the multipliers are spelt out again here, from the paper. Weights lie as in megatron-core, so that they can be
copied over.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, width, heads, branch, attention_scale, *, query_groups, swiglu, rms_norm, rotary, bias, qk_norm):
        super().__init__()
        self.heads, self.query_groups, self.head_dim = heads, query_groups, width // heads
        self.branch, self.attention_scale, self.swiglu, self.rotary = branch, attention_scale, swiglu, rotary
        norm = functools.partial(nn.RMSNorm, eps=1e-5) if rms_norm else nn.LayerNorm
        self.norm_1, self.norm_2 = norm(width), norm(width)
        self.qkv = nn.Linear(width, (heads + 2 * query_groups) * self.head_dim, bias)
        if qk_norm:
            self.q_norm, self.k_norm = norm(self.head_dim), norm(self.head_dim)
        self.proj = nn.Linear(width, width, bias)
        self.fc1 = nn.Linear(width, 8 * width if swiglu else 4 * width, bias)
        self.fc2 = nn.Linear(4 * width, width, bias)

    def attention(self, x):
        batch, length, width = x.shape
        shared_by = self.heads // self.query_groups  # query heads that look at the same keys and values
        # group by group: the queries of its heads, then its keys, then its values
        groups = self.qkv(x).view(batch, length, self.query_groups, shared_by + 2, self.head_dim)
        q = groups[..., :shared_by, :].reshape(batch, length, self.heads, self.head_dim)
        k, v = groups[..., shared_by, :], groups[..., shared_by + 1, :]
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(shared_by, dim=2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [batch, heads, length, head_dim]
        scores = (q @ k.transpose(-1, -2)) * self.attention_scale
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, length, width))

    def mlp(self, x):
        x = self.fc1(x)
        if self.swiglu:
            gate, x = x.chunk(2, dim=-1)
            return self.fc2(F.silu(gate) * x)
        return self.fc2(F.gelu(x))

    def forward(self, x):
        x = x + self.branch * self.attention(self.norm_1(x))
        return x + self.branch * self.mlp(self.norm_2(x))


def rotate(x):
    """Rotary positions, [batch, length, heads, head_dim]: number i of a head turns together with number i + d/2."""
    length, half = x.shape[1], x.shape[3] // 2
    speeds = 10000.0 ** (-torch.arange(half) / half)
    angles = (torch.arange(length)[:, None] * speeds)[:, None, :]  # the same for every head
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


class ReferenceGPT(nn.Module):
    """Returns the mean loss of (tokens, labels), both [batch, length].

    ``block_eps_everywhere``: the epsilon of the blocks for every parameter, as the paper's reference code has it.
    """

    def __init__(
        self, *, vocab, length, width, depth, heads, base_width, base_depth, base_head_dim, alpha, tied,
        query_groups=None, swiglu=False, rms_norm=False, rotary=False, bias=True, qk_norm=False,
        block_eps_everywhere=False,
    ):  # fmt: skip
        super().__init__()
        self.m_N, self.m_L, self.alpha, self.tied = width / base_width, depth / base_depth, alpha, tied
        self.rotary, self.block_eps_everywhere = rotary, block_eps_everywhere
        self.tokens = nn.Embedding(vocab, width)
        if not rotary:
            self.positions = nn.Embedding(length, width)
        scale = math.sqrt(base_head_dim) / (width // heads)
        kind = {"query_groups": query_groups or heads, "swiglu": swiglu, "rms_norm": rms_norm, "rotary": rotary,
                "bias": bias, "qk_norm": qk_norm}  # fmt: skip
        self.blocks = nn.ModuleList(Block(width, heads, self.m_L**-alpha, scale, **kind) for _ in range(depth))
        self.final_norm = nn.RMSNorm(width, eps=1e-5) if rms_norm else nn.LayerNorm(width)
        if not tied:
            self.unembedding = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens, labels):
        x = self.tokens(tokens)
        if not self.rotary:
            x = x + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        weight = self.tokens.weight if self.tied else self.unembedding.weight
        logits = F.linear(self.final_norm(x), weight) / self.m_N
        # The mean in double: single numbers near 4 lie 5e-7 apart, which would not measure a difference of 1e-6.
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").double().mean()

    def groups(self, lr, weight_decay, eps):
        """AdamW groups, one per parameter, straight from the table."""
        m_N, m_L, alpha = self.m_N, self.m_L, self.alpha
        block_eps, block_lr = eps / m_N / m_L**alpha, lr * m_L ** (alpha - 1)
        other_eps = block_eps if self.block_eps_everywhere else eps
        for name, p in self.named_parameters():
            group = {"params": [p], "lr": lr, "weight_decay": weight_decay, "eps": other_eps}  # embedding, unembedding
            if name.startswith("final_norm"):
                group["weight_decay"] = 0.0
            elif name.startswith("blocks") and p.dim() == 2:
                group |= {"lr": block_lr / m_N, "weight_decay": weight_decay * m_N, "eps": block_eps}
            elif name.startswith("blocks"):  # biases, and the gains of all norms, those of queries and keys too
                group |= {"lr": block_lr, "weight_decay": 0.0, "eps": block_eps}
            yield group

    def copy_from_megatron(self, model):
        """Take over the weights of a megatron-core GPTModel without tensor parallelism."""
        self.copy_from(dict(model.named_parameters()))

    def copy_from(self, theirs):
        """Take over weights by their megatron-core names."""
        theirs = dict(theirs)
        with torch.no_grad():
            for name, p in self.named_parameters():
                weight = theirs.pop(megatron_name(name))
                assert weight.shape == p.shape, name  # copy_ would broadcast
                p.copy_(weight)
        assert not theirs, f"left over: {list(theirs)}"


def megatron_name(name):
    """The name megatron-core gives to a parameter of `ReferenceGPT`."""
    if name.startswith("blocks."):
        _, index, module, kind = name.split(".")
        inner = {
            "norm_1": "input_layernorm", "norm_2": "pre_mlp_layernorm", "qkv": "self_attention.linear_qkv",
            "q_norm": "self_attention.q_layernorm", "k_norm": "self_attention.k_layernorm",
            "proj": "self_attention.linear_proj", "fc1": "mlp.linear_fc1", "fc2": "mlp.linear_fc2",
        }[module]  # fmt: skip
        return f"decoder.layers.{index}.{inner}.{kind}"
    outer = {"tokens": "embedding.word_embeddings", "positions": "embedding.position_embeddings",
             "final_norm": "decoder.final_layernorm", "unembedding": "output_layer"}  # fmt: skip
    module, kind = name.split(".")
    return f"{outer[module]}.{kind}"
