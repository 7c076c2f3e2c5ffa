"""A mixture of experts written from the rules in plain torch, slowly: Jiang et al. (arXiv 2601.20205) at a fixed share
of active experts, Complete-muE (arXiv 2605.23893) at any, on top of Table 1 of arXiv 2505.01618.

A Llama whose MLP is ``experts`` of which each token goes through ``active``, weighted by the softmax of their scores
times ``sums_to``, and through shared experts. The rows are spelt out again here; eps where no paper has one by the
gradient's scale at init. Names of parameters are megatron-core's, with experts that are modules of their own.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import nn

from tests.reference.completep import Block, ReferenceGPT, megatron_name


class Gated(nn.Module):
    """SwiGLU of any hidden size."""

    def __init__(self, width, hidden):
        super().__init__()
        self.linear_fc1 = nn.Linear(width, 2 * hidden, bias=False)
        self.linear_fc2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        gate, x = self.linear_fc1(x).chunk(2, dim=-1)
        return self.linear_fc2(F.silu(gate) * x)


class MoEBlock(Block):
    def __init__(self, *args, width, experts, active, hidden, shared, sums_to, **kind):
        super().__init__(width, *args, **kind)
        del self.fc1, self.fc2
        self.active, self.sums_to = active, sums_to
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(Gated(width, hidden) for _ in range(experts))
        if shared:
            self.shared_experts = Gated(width, shared)

    def mlp(self, x):
        scores, chosen = self.router(x).topk(self.active, dim=-1)
        weights = scores.softmax(-1) * self.sums_to
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            weight = (weights * (chosen == number)).sum(-1, keepdim=True)
            out = out + weight * expert(x)  # of all tokens: those of others weigh nothing
        return out + self.shared_experts(x) if hasattr(self, "shared_experts") else out


class ReferenceMoE(ReferenceGPT):
    """``base``: its experts, active ones, hidden sizes of one and of the shared ones, and what weights sum to."""

    def __init__(self, *, width, depth, heads, experts, active, hidden, shared, sums_to, base, rule, **more):
        kind = {"swiglu": True, "rms_norm": True, "rotary": True, "bias": False, "query_groups": heads}
        super().__init__(width=width, depth=0, heads=heads, **kind, **more)
        self.m_L = depth / more["base_depth"]
        scale = math.sqrt(more["base_head_dim"]) / (width // heads)
        size = {"width": width, "experts": experts, "active": active, "hidden": hidden, "shared": shared}
        self.kind = {**size, "sums_to": sums_to, **kind, "qk_norm": False}
        self.branch = self.m_L ** -more["alpha"]
        self.blocks = nn.ModuleList(MoEBlock(heads, self.branch, scale, **self.kind) for _ in range(depth))
        self.m_E, self.m_K, self.m_M = (new / old for new, old in zip((experts, active, hidden), base, strict=False))
        self.m_S = shared / base[3] if shared else 1.0
        self.of_sum, self.rule = active != base[1] and (sums_to, base[4]) == (active, base[1]), rule

    def row(self, name):
        """Init std, learning rate, weight decay and eps of a parameter, of the base's."""
        n, depth, depth_lr = self.m_N, self.m_L**self.alpha, self.m_L ** (self.alpha - 1)
        if not name.startswith("blocks"):
            return (1, 1, 0 if "norm" in name else 1, 1)
        if "norm" in name:
            return (1, depth_lr, 0, 1 / n / depth)
        sizes = {  # fan-in and fan-out
            "qkv": (n, n), "proj": (n, n), "router": (n, n), "shared_experts.linear_fc1": (n, self.m_S),
            "shared_experts.linear_fc2": (self.m_S, n),
        }  # fmt: skip
        inner = name.split(".", 2)[2].removesuffix(".weight")
        if inner in sizes:
            m_in, m_out = sizes[inner]
            return (m_in**-0.5, depth_lr / m_in, m_in, (n * m_out) ** -0.5 / depth)
        # Complete-muE's std is (m_K / m_M)^1/2, Jiang's m_N^1/2 / m_M; in the sum form 1 / m_K of that
        k = self.m_K if self.of_sum else 1
        std = ((self.m_K / self.m_M) ** 0.5 if self.rule == "mue" else n**0.5 / self.m_M) / k
        if inner.endswith("linear_fc2"):
            return (std, depth_lr / self.m_M / k, self.m_M * k, k / self.m_E / n / depth)
        return (n**-0.5, depth_lr / n, n, std * k / self.m_E / n**0.5 / depth)

    @staticmethod
    def name_of(name):
        return name_of(name)

    def groups(self, lr, weight_decay, eps):
        """AdamW groups, one per parameter."""
        for name, p in self.named_parameters():
            _, rate, decay, epsilon = self.row(name)
            yield {"params": [p], "lr": lr * rate, "weight_decay": weight_decay * decay, "eps": eps * epsilon}

    def copy_from(self, theirs):
        """Take over weights by their megatron-core names."""
        theirs = dict(theirs)
        with torch.no_grad():
            for name, p in self.named_parameters():
                weight = theirs.pop(self.name_of(name))
                assert weight.shape == p.shape, name
                p.copy_(weight)
        assert not theirs, f"left over: {list(theirs)}"


def name_of(name):
    """The name megatron-core gives to a parameter of `ReferenceMoE`."""
    _, index, inner = name.split(".", 2) if name.startswith("blocks.") else ("", "", "")
    if inner.startswith(("experts.", "shared_experts.", "router.")):
        return f"decoder.layers.{index}.mlp.{re.sub('^experts', 'experts.local_experts', inner)}"
    return megatron_name(name)
