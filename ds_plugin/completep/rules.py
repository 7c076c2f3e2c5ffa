"""Table 1 of CompleteP (Dey et al., arXiv 2505.01618) as pure functions of (role, m_N, m_L, alpha), and its relatives.

m_N is the width ratio, hidden size / base hidden size; m_L the depth ratio, layers / base layers. Every multiplier
applies to the base model's value.

Recipes: ``completep`` is the table; ``mup`` its width-only column (m_L taken as 1), ``standard`` its column without any
scaling (m_N and m_L taken as 1); ``completed_p`` adds the rules of Complete(d)P (arXiv 2512.22382) for the batch
ratio m_B and the token ratio m_D, and absorbs the logit multiplier into the unembedding.

Folding: a matrix whose output is multiplied by c can hold c times its weights instead. Under Adam with decoupled weight
decay the two train alike if init and learning rate are multiplied by c, weight decay and epsilon by 1/c: gradients are
1/c of what they were, so Adam's quotient is the same, and every step is c times as long. Logits are folded into the
unembedding, or, where that is the word embedding too, into the gains and biases of the final norm.
"""

import enum
import math
from dataclasses import dataclass
from typing import Literal

Recipe = Literal["completep", "mup", "standard", "completed_p"]
EpsScope = Literal["table", "all"]


class Role(enum.Enum):
    """The parameter classes of Table 1, pre-LN transformer."""

    EMBEDDING = "embedding"  # token and learned position embeddings; a tied unembedding too
    HIDDEN = "hidden"  # matrices inside a block
    BRANCH_OUT = "branch_out"  # folded mode only: those that end a residual branch; hidden matrices to Table 1
    BLOCK_NORM = "block_norm"  # gains and biases of the norms inside a block
    QK_NORM = "qk_norm"  # gains and biases of the norms on queries and keys; a block norm to Table 1
    BLOCK_BIAS = "block_bias"  # biases inside a block
    #: folded mode only: those that end a residual branch; so do gains and biases of a norm after it (Gemma 2)
    BRANCH_OUT_BIAS = "branch_out_bias"
    FINAL_NORM = "final_norm"  # and norms right after the embedding, and the output layer's bias
    LOGIT_NORM = "logit_norm"  # folded mode with tied embeddings only: the final norm, which scales the logits
    UNEMBEDDING = "unembedding"  # an untied output matrix
    SCALED_EMBEDDING = "scaled_embedding"  # folded mode only: one whose output is multiplied by sqrt(width) (Gemma)
    SCALED_LOGIT_NORM = "scaled_logit_norm"  # folded mode only: the final norm of a model with that one tied


@dataclass(frozen=True)
class Ratios:
    """How the model and its training differ from the base's; below 1 for smaller ones."""

    m_N: float
    m_L: float
    alpha: float = 1.0
    m_B: float = 1.0  # batch ratio; completed_p only
    m_D: float = 1.0  # ratio of training tokens; completed_p only


@dataclass(frozen=True)
class Multipliers:
    """What the base model's init std, learning rate, weight decay, AdamW eps and 1 - beta are multiplied by."""

    init_std: float
    lr: float
    weight_decay: float
    eps: float
    one_minus_beta: float = 1.0


def effective(recipe: Recipe, ratios: Ratios) -> Ratios:
    """The ratios a recipe reacts to: the others are taken as 1."""
    if recipe == "completed_p":
        return ratios
    m_N = 1.0 if recipe == "standard" else ratios.m_N
    return Ratios(m_N, ratios.m_L if recipe == "completep" else 1.0, ratios.alpha)


def multipliers(
    role: Role, ratios: Ratios, *, recipe: Recipe = "completep", eps_scope: EpsScope = "table", folded: bool = False
) -> Multipliers:
    """One row of the recipe's table; ``folded``: with `fold_factor` in it. ``eps_scope="all"`` gives every role the
    block's epsilon, as the paper's reference code does; the table states the rule for block parameters only."""
    reacted = effective(recipe, ratios)
    row = _table_1(role, reacted, eps_scope)
    if recipe == "completed_p":
        row = _completed(role, row, reacted, eps_scope)
    if folded:
        c = fold_factor(role, ratios, recipe)
        row = Multipliers(row.init_std * c, row.lr * c, row.weight_decay / c, row.eps / c, row.one_minus_beta)
    return row


def fold_factor(role: Role, ratios: Ratios, recipe: Recipe = "completep") -> float:
    """What folded mode multiplies a role's weights by, in place of an output in the forward pass; 1 for most. Gradients
    are 1/c of the forward mode's: a norm over all of them must weigh these by c."""
    if role in (Role.BRANCH_OUT, Role.BRANCH_OUT_BIAS):
        return residual_multiplier(ratios, recipe)
    if role in (Role.SCALED_EMBEDDING, Role.SCALED_LOGIT_NORM):  # the base's sqrt(width) in place of the model's
        c = effective(recipe, ratios).m_N ** -0.5
        return c if role is Role.SCALED_EMBEDDING else logit_multiplier(ratios, recipe, tied=True) / c
    if role in (Role.UNEMBEDDING, Role.LOGIT_NORM):
        return logit_multiplier(ratios, recipe, tied=role is Role.LOGIT_NORM)
    return 1.0


def _table_1(role: Role, ratios: Ratios, eps_scope: EpsScope) -> Multipliers:
    m_N, m_L, alpha = ratios.m_N, ratios.m_L, ratios.alpha
    block_lr, block_eps = m_L ** (alpha - 1), 1 / (m_N * m_L**alpha)
    other_eps = block_eps if eps_scope == "all" else 1.0
    match role:  # init_std, lr, weight_decay, eps
        case Role.EMBEDDING | Role.UNEMBEDDING | Role.SCALED_EMBEDDING:
            return Multipliers(1, 1, 1, other_eps)
        case Role.FINAL_NORM | Role.LOGIT_NORM | Role.SCALED_LOGIT_NORM:
            return Multipliers(1, 1, 0, other_eps)
        case Role.HIDDEN | Role.BRANCH_OUT:
            return Multipliers(1 / math.sqrt(m_N), block_lr / m_N, m_N, block_eps)
        case Role.BLOCK_NORM | Role.QK_NORM | Role.BLOCK_BIAS | Role.BRANCH_OUT_BIAS:
            return Multipliers(1, block_lr, 0, block_eps)


def _completed(role: Role, row: Multipliers, ratios: Ratios, eps_scope: EpsScope) -> Multipliers:
    """Complete(d)P on top of a row of Table 1."""
    init_std, lr, weight_decay, eps = row.init_std, row.lr, row.weight_decay, row.eps
    if eps_scope == "table":
        embedding, of_norms = 1 / ratios.m_N, ratios.m_L**-ratios.alpha
        others = {Role.EMBEDDING: embedding, Role.SCALED_EMBEDDING: embedding, Role.QK_NORM: of_norms}
        eps = others.get(role, eps)
    if role is Role.UNEMBEDDING:  # the logit multiplier 1/m_N, absorbed
        init_std, lr, weight_decay = init_std / ratios.m_N, lr / ratios.m_N, weight_decay * ratios.m_N
    batch = math.sqrt(ratios.m_B / ratios.m_D)
    return Multipliers(init_std, lr * batch, weight_decay * batch, eps / batch, ratios.m_B / ratios.m_D)


def residual_multiplier(ratios: Ratios, recipe: Recipe = "completep") -> float:
    """What the output of each residual branch (attention, MLP) is multiplied by before it is added: m_L^-alpha."""
    return effective(recipe, ratios).m_L ** -ratios.alpha


def logit_multiplier(ratios: Ratios, recipe: Recipe = "completep", *, tied: bool = False) -> float:
    """What the logits are multiplied by: m_N^-1; 1 where it is absorbed into an untied unembedding."""
    if recipe == "completed_p" and not tied:
        return 1.0
    return 1 / effective(recipe, ratios).m_N


def attention_scale(head_dim: int, base_head_dim: int, recipe: Recipe = "completep") -> float:
    """The factor on q.k: 1/d_head as in muP, times sqrt(base d_head): the base model keeps its 1/sqrt(d_head)."""
    return 1 / math.sqrt(head_dim) if recipe == "standard" else math.sqrt(base_head_dim) / head_dim
