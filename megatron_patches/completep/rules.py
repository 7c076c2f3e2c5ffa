"""Table 1 of CompleteP (Dey et al., arXiv 2505.01618) as pure functions of (role, m_N, m_L, alpha). Nothing here
knows a host.

m_N is the width ratio, hidden size / base hidden size; m_L the depth ratio, layers / base layers. Every multiplier
applies to the base model's value: init standard deviation s, learning rate eta, weight decay lambda, AdamW epsilon.
"""

import enum
import math
from dataclasses import dataclass
from typing import Literal


class Role(enum.Enum):
    """The parameter classes of Table 1, pre-LN transformer."""

    EMBEDDING = "embedding"  # token and learned position embeddings; a tied unembedding too
    HIDDEN = "hidden"  # matrices inside a block
    BLOCK_NORM = "block_norm"  # gains and biases of the norms inside a block
    BLOCK_BIAS = "block_bias"  # biases inside a block
    FINAL_NORM = "final_norm"
    UNEMBEDDING = "unembedding"  # an untied output matrix


@dataclass(frozen=True)
class Ratios:
    """How the model differs from its base. Ratios below 1 (a model smaller than its base) are fine."""

    m_N: float
    m_L: float
    alpha: float = 1.0


@dataclass(frozen=True)
class Multipliers:
    """What the base model's init std, learning rate, weight decay and AdamW eps are multiplied by."""

    init_std: float
    lr: float
    weight_decay: float
    eps: float


def multipliers(role: Role, ratios: Ratios, *, eps_scope: Literal["table", "all"] = "table") -> Multipliers:
    """One row of Table 1.

    ``eps_scope="all"`` gives every role the block's epsilon, as the paper's reference code does; the table states the
    rule for block parameters only. An ``init_std`` of 1 on a norm or bias is vacuous: they start at ones and zeros.
    """
    m_N, m_L, alpha = ratios.m_N, ratios.m_L, ratios.alpha
    block_eps = 1 / (m_N * m_L**alpha)
    block_lr = m_L ** (alpha - 1)
    other_eps = block_eps if eps_scope == "all" else 1.0
    match role:
        case Role.EMBEDDING | Role.UNEMBEDDING:
            return Multipliers(init_std=1, lr=1, weight_decay=1, eps=other_eps)
        case Role.FINAL_NORM:
            return Multipliers(init_std=1, lr=1, weight_decay=0, eps=other_eps)
        case Role.HIDDEN:
            return Multipliers(init_std=1 / math.sqrt(m_N), lr=block_lr / m_N, weight_decay=m_N, eps=block_eps)
        case Role.BLOCK_NORM | Role.BLOCK_BIAS:
            return Multipliers(init_std=1, lr=block_lr, weight_decay=0, eps=block_eps)


def residual_multiplier(ratios: Ratios) -> float:
    """What the output of each residual branch (attention, MLP) is multiplied by before it is added: m_L^-alpha."""
    return ratios.m_L**-ratios.alpha


def logit_multiplier(ratios: Ratios) -> float:
    """What the logits are multiplied by: m_N^-1."""
    return 1 / ratios.m_N


def attention_scale(head_dim: int, base_head_dim: int) -> float:
    """The factor on q.k: 1/d_head as in muP, times sqrt(base d_head): the base model keeps its 1/sqrt(d_head)."""
    return math.sqrt(base_head_dim) / head_dim
