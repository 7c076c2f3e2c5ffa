"""Latent attention and multi-token prediction written from the rules in plain torch, slowly: as the report on
DeepSeek-V3 has them, in the mixture of experts of `tests.reference.experts`.

Queries, and keys with values, go through a latent vector each, with a norm; of every head some numbers turn with the
position, and those of the keys are shared by all heads. A prediction k makes of the stream at a token and the embedding
k tokens on a stream of its own, and of that, by one more block, the logits of the next token after. Rows by rank: the
gradient at a latent vector of r numbers is of order (n r)^-1/2, at a prediction's stream 1/n whatever the depth.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.reference.completep import rotate
from tests.reference.experts import MoEBlock, ReferenceMoE, name_of


class LatentBlock(MoEBlock):
    """``ranks``: the queries' (None: no latent vector) and that of keys and values; ``sizes``: of a head's numbers that
    do not turn, that do, and of a value. ``offset``: a learnable logit of attending to nothing, one a head."""

    def __init__(self, heads, branch, *, width, ranks, sizes, offset, **kind):
        still, turning, value = self.sizes = sizes
        super().__init__(heads, branch, (still + turning) ** -0.5, width=width, **kind)
        del self.qkv
        self.q_rank, self.kv_rank = ranks
        if self.q_rank:
            self.linear_q_down_proj = nn.Linear(width, self.q_rank, bias=False)
            self.q_layernorm = nn.RMSNorm(self.q_rank, eps=1e-5)
            self.linear_q_up_proj = nn.Linear(self.q_rank, heads * (still + turning), bias=False)
        else:
            self.linear_q_proj = nn.Linear(width, heads * (still + turning), bias=False)
        self.linear_kv_down_proj = nn.Linear(width, self.kv_rank + turning, bias=False)
        self.kv_layernorm = nn.RMSNorm(self.kv_rank, eps=1e-5)
        self.linear_kv_up_proj = nn.Linear(self.kv_rank, heads * (still + value), bias=False)
        self.proj = nn.Linear(heads * value, width, bias=False)
        self.softmax_offset = nn.Parameter(torch.zeros(heads)) if offset else None

    def attention(self, x):
        batch, length, _ = x.shape
        still, turning, value = self.sizes
        if self.q_rank:
            q = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(x)))
        else:
            q = self.linear_q_proj(x)
        q, q_turning = q.view(batch, length, self.heads, -1).split([still, turning], dim=-1)
        latent, k_turning = self.linear_kv_down_proj(x).split([self.kv_rank, turning], dim=-1)
        kv = self.linear_kv_up_proj(self.kv_layernorm(latent)).view(batch, length, self.heads, -1)
        k, v = kv.split([still, value], dim=-1)
        k_turning = rotate(pairs_apart(k_turning[:, :, None])).expand(-1, -1, self.heads, -1)
        q = torch.cat([q, rotate(pairs_apart(q_turning))], dim=-1)
        q, k, v = (t.transpose(1, 2) for t in (q, torch.cat([k, k_turning], dim=-1), v))
        scores = (q @ k.transpose(-1, -2)) * self.attention_scale
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf)
        if self.softmax_offset is not None:
            nothing = self.softmax_offset.view(1, -1, 1, 1).expand(batch, -1, length, 1)
            weights = torch.cat([scores, nothing], dim=-1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, length, -1))


def pairs_apart(x):
    """Numbers 2 i and 2 i + 1 turn together in these models: the first of all pairs, then the second."""
    return torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)


class Prediction(nn.Module):
    def __init__(self, width, block):
        super().__init__()
        self.enorm, self.hnorm, self.final_norm = (nn.RMSNorm(width, eps=1e-5) for _ in range(3))
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.block = block

    def forward(self, hidden, embedded):
        return self.final_norm(self.block(self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))))


class ReferenceLatent(ReferenceMoE):
    """``base_ranks``: as ``ranks``, the base's. ``predictions``: how many, and what their losses count together."""

    def __init__(self, *, ranks, base_ranks, sizes, offset=False, predictions=(0, 0.0), **more):
        super().__init__(**more)
        kind = {**self.kind, "ranks": ranks, "sizes": sizes, "offset": offset}

        def block():
            return LatentBlock(more["heads"], self.branch, **kind)

        self.blocks = nn.ModuleList(block() for _ in range(more["depth"]))
        number, self.factor = predictions
        self.predictions = nn.ModuleList(Prediction(more["width"], block()) for _ in range(number))
        self.m_q, self.m_kv = (new / old if new else 1.0 for new, old in zip(ranks, base_ranks, strict=True))

    def forward(self, tokens, labels):
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        hidden = self.final_norm(x)
        loss = self.losses(hidden, labels).double().mean()
        counted, others = torch.ones_like(labels), 0.0
        for prediction in self.predictions:
            tokens, labels, counted = (ahead(t) for t in (tokens, labels, counted))
            hidden = prediction(hidden, self.tokens(tokens))
            others = others + (counted * self.losses(hidden, labels)).sum() / counted.sum()
        others = others * self.factor / max(len(self.predictions), 1)
        return loss + (others - others.detach() if len(self.predictions) else 0.0)  # they train, and are not reported

    def losses(self, hidden, labels):
        logits = self.unembedding(hidden) / self.m_N
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)

    def row(self, name):
        """Init std, learning rate, weight decay and eps of a parameter, of the base's."""
        n, depth, depth_lr = self.m_N, self.m_L**self.alpha, self.m_L ** (self.alpha - 1)
        if name.startswith("predictions") and ".block." not in name:
            return (n**-0.5, 1 / n, n, 1 / n) if "eh_proj" in name else (1, 1, 0, 1)
        inner = in_block(name)
        q, kv = self.m_q, self.m_kv
        sizes = {  # fan-in and fan-out
            "linear_q_proj": (n, n), "linear_q_down_proj": (n, q), "linear_q_up_proj": (q, n),
            "linear_kv_down_proj": (n, kv), "linear_kv_up_proj": (kv, n),
        }  # fmt: skip
        if (module := inner.removesuffix(".weight")) in sizes:
            m_in, m_out = sizes[module]
            return (m_in**-0.5, depth_lr / m_in, m_in, (n * m_out) ** -0.5 / depth)
        if module in ("q_layernorm", "kv_layernorm"):
            return (1, depth_lr, 0, (n * (q if module == "q_layernorm" else kv)) ** -0.5 / depth)
        if module == "softmax_offset":
            return (1, depth_lr, 0, 1 / n / depth)
        return super().row(f"blocks.0.{inner}" if inner else name)

    @staticmethod
    def name_of(name):
        """The name megatron-core 0.16 gives to a parameter."""
        inner = in_block(name)
        if inner == "softmax_offset":
            theirs = f"self_attention.core_attention.{inner}"
        elif inner.startswith(("linear_", "q_layernorm", "kv_layernorm")):
            theirs = f"self_attention.{inner}"
        else:
            theirs = name_of(f"blocks.0.{inner}").removeprefix("decoder.layers.0.") if inner else ""
        if name.startswith("blocks."):
            return f"decoder.layers.{name.split('.')[1]}.{theirs}"
        if not name.startswith("predictions."):
            return name_of(name)
        _, number, own = name.replace("final_norm", "final_layernorm").split(".", 2)
        return f"mtp.layers.{number}.{f'transformer_layer.{theirs}' if inner else own}"


def in_block(name):
    """A parameter's name inside its block; empty where it is in none."""
    return name.split(".", 2)[2] if name.startswith("blocks.") else name.partition(".block.")[2]


def ahead(tokens):
    """Each token's next one; at the end, where there is none, 0."""
    return F.pad(tokens[:, 1:], (0, 1))
