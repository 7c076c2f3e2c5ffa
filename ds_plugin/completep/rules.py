"""Table 1 of CompleteP (Dey et al., arXiv 2505.01618) as pure functions of (role, m_N, m_L, alpha), and its relatives.

m_N is the width ratio, hidden size / base hidden size; m_L the depth ratio, layers / base layers. Every multiplier
applies to the base model's value.

Where dimensions do not grow in proportion, a matrix inside a block has its own ratios, m_in of its fan-in and m_out of
its fan-out; its row is init std m_in^-1/2, learning rate m_L^(alpha-1) / m_in, weight decay m_in (their product stays),
eps (m_N m_out)^-1/2 m_L^-alpha. Why the last: a gradient at a vector of n elements, the stream, is of order 1/n at
each. Through a matrix of k to n with weights of order k^-1/2 it is n^1/2 k^-1/2 / n = (n k)^-1/2, and through one of j
to k before it, k^1/2 j^-1/2 (n k)^-1/2 = (n j)^-1/2: (n size)^-1/2 at a vector of any size. Entries of the matrix's
gradient are that at its output times inputs of order 1, a norm's alike at its vector. In proportion this is Table 1.

Recipes: ``completep`` is the table; ``mup`` its width-only column (m_L taken as 1), ``standard`` its column without any
scaling (m_N and m_L taken as 1); ``completed_p`` adds the rules of Complete(d)P (arXiv 2512.22382) for the batch
ratio m_B and the token ratio m_D, and absorbs the logit multiplier into the unembedding.

Embeddings keep their rate in Table 1: over the matrices' it grows as the width. For vocabularies much larger than the
width Hayou and Liu (arXiv 2506.15025) derive the width's square root, a rate of m_N^-1/2: ``embedding_exponent``.

Muon's update of a matrix is s times one whose singular values are about 1, whatever the gradient's size: s =
sqrt(out / in) (``unit_rms_norm``), sqrt(max(out, in)) (``spectral``; times a constant too, as Moonlight's 0.2) or
sqrt(max(1, out / in)) (``shape_scaling``, DeepSpeed's). In line with inputs of order 1 it changes outputs by lr s
sqrt(in / out), which is to stay: the learning rate goes as sqrt(out / in) / s over the base's (`muon_rate`). For square
matrices that is 1, m_N^-1/2 and 1 (arXiv 2603.00541 and 2512.05620 give the first). Each of L layers then changes the
stream by m_L^-alpha of that, so that the depth's factor is m_L^(alpha-1), as under Adam. Weight decay is by the rate's
inverse, so that the share of a weight that a step takes away stays. Init and eps are Adam's; so are all other rows.

Folding: a matrix whose output is multiplied by c can hold c times its weights instead. Under Adam with decoupled weight
decay the two train alike if init and learning rate are multiplied by c, weight decay and epsilon by 1/c: gradients are
1/c of what they were, so Adam's quotient is the same, and every step is c times as long. So it is under Muon, in each
of its scales: the update does not change with the gradient's size, nor with what the weights are. Logits are folded
into the unembedding, or, where that is the word embedding too, into the gains and biases of the final norm."""

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Recipe = Literal["completep", "mup", "standard", "completed_p"]
EpsScope = Literal["table", "all", "embedding"]
MuonScale = Literal["unit_rms_norm", "spectral", "shape_scaling"]


class Role(enum.Enum):
    """The parameter classes of Table 1, pre-LN transformer."""

    EMBEDDING = "embedding"  # token and learned position embeddings; a tied unembedding too
    HIDDEN = "hidden"  # matrices inside a block
    BRANCH_OUT = "branch_out"  # folded mode only: those that end a residual branch; hidden matrices to Table 1
    #: hidden matrices of a model whose dimensions are not in proportion to its base's; the second ends the branch
    QKV = "qkv"
    ATTENTION_OUT = "attention_out"
    MLP_UP = "mlp_up"
    MLP_DOWN = "mlp_down"
    Q_DOWN = "q_down"  # latent attention: from the stream to the queries' latent vector, and from there to the heads
    Q_UP = "q_up"
    KV_DOWN = "kv_down"  # the same of keys and values
    KV_UP = "kv_up"
    MTP_PROJECTION = "mtp_projection"  # of a multi-token prediction: stream and embedding, 2 n to n; in no branch
    ROUTER = "router"  # and a shared expert's gate
    EXPERT_UP = "expert_up"
    EXPERT_DOWN = "expert_down"
    SHARED_UP = "shared_up"  # of experts that every token goes through
    SHARED_DOWN = "shared_down"
    BLOCK_NORM = "block_norm"  # gains and biases of the norms inside a block
    QK_NORM = "qk_norm"  # gains and biases of the norms on queries and keys; a block norm to Table 1
    Q_LATENT_NORM = "q_latent_norm"  # of the queries' latent vector; a block norm where its rank is in proportion
    KV_LATENT_NORM = "kv_latent_norm"
    BLOCK_BIAS = "block_bias"  # biases inside a block
    SOFTMAX_OFFSET = "softmax_offset"  # learnable, added to q.k; a bias to Table 1, but drawn as the matrices are
    #: folded mode only: those that end a residual branch; so do gains and biases of a norm after it (Gemma 2)
    BRANCH_OUT_BIAS = "branch_out_bias"
    FINAL_NORM = "final_norm"  # and others in no block: right after the embedding, before a multi-token prediction's
    LOGIT_NORM = "logit_norm"  # folded mode with tied embeddings only: the final norm, which scales the logits
    UNEMBEDDING = "unembedding"  # an untied output matrix
    SCALED_EMBEDDING = "scaled_embedding"  # folded mode only: one whose output is multiplied by sqrt(width) (Gemma)
    SCALED_LOGIT_NORM = "scaled_logit_norm"  # folded mode only: the final norm of a model with that one tied


#: of the matrices inside a block, which of the model's dimensions their fan-in and fan-out are (see `Ratios.of`)
FANS: Mapping[Role, tuple[str, str]] = {
    **dict.fromkeys((Role.HIDDEN, Role.BRANCH_OUT, Role.MTP_PROJECTION), ("width", "width")),
    Role.QKV: ("width", "heads"),
    Role.ATTENTION_OUT: ("heads", "width"),
    Role.MLP_UP: ("width", "ffn"),
    Role.MLP_DOWN: ("ffn", "width"),
    Role.Q_DOWN: ("width", "q_rank"),
    Role.Q_UP: ("q_rank", "heads"),
    Role.KV_DOWN: ("width", "kv_rank"),
    Role.KV_UP: ("kv_rank", "heads"),
    Role.ROUTER: ("width", "width"),  # Jiang et al. give its eps so
    Role.EXPERT_UP: ("width", "expert_ffn"),
    Role.EXPERT_DOWN: ("expert_ffn", "width"),
    Role.SHARED_UP: ("width", "shared_ffn"),
    Role.SHARED_DOWN: ("shared_ffn", "width"),
}
#: and of norms inside a block: the stream's, and that of the vector they are on, where it is another
_SIZES = {**FANS, Role.Q_LATENT_NORM: ("width", "q_rank"), Role.KV_LATENT_NORM: ("width", "kv_rank")}
#: matrices that end a residual branch
ENDS = (Role.BRANCH_OUT, Role.ATTENTION_OUT, Role.MLP_DOWN, Role.EXPERT_DOWN, Role.SHARED_DOWN)
#: dense ones, which are hidden matrices to Table 1 where their dimensions are in proportion
_DENSE = (Role.QKV, Role.ATTENTION_OUT, Role.MLP_UP, Role.MLP_DOWN, Role.Q_DOWN, Role.Q_UP, Role.KV_DOWN, Role.KV_UP)
_KINDS = {
    **dict.fromkeys((Role.BRANCH_OUT, *_DENSE), Role.HIDDEN),
    **dict.fromkeys((Role.QK_NORM, Role.Q_LATENT_NORM, Role.KV_LATENT_NORM), Role.BLOCK_NORM),
    **dict.fromkeys((Role.SOFTMAX_OFFSET, Role.BRANCH_OUT_BIAS), Role.BLOCK_BIAS),
    **dict.fromkeys((Role.LOGIT_NORM, Role.SCALED_LOGIT_NORM), Role.FINAL_NORM),
    Role.SCALED_EMBEDDING: Role.EMBEDDING,
}


def kind_of(role: Role) -> Role:
    """What a role is to Table 1, whatever the mode and the embeddings: itself for most."""
    return _KINDS.get(role, role)


@dataclass(frozen=True)
class Experts:
    """How a mixture of experts differs from the base's.

    ``rule``: ``fixed_sparsity``, Jiang et al. (arXiv 2601.20205): each token goes through the same share of the
    experts; ``mue``, Complete-muE (arXiv 2605.23893): the share may change. Both are Table 1's hidden row where the
    experts' number, the active ones and the hidden size of one over the model's are the base's. ``form``: the weights
    of a token's experts sum to a constant (``mean``), or to their number (``sum``)."""

    rule: Literal["fixed_sparsity", "mue"] = "fixed_sparsity"
    form: Literal["mean", "sum"] = "mean"
    m_E: float = 1.0  # ratio of the number of experts
    m_K: float = 1.0  # of those that a token goes through


@dataclass(frozen=True)
class Muon:
    """What Muon trains: the `muon_rate` of each role's matrices, of no role without it; and the base's learning rate of
    these over that of all others."""

    rates: Mapping[Role, float] = field(default_factory=dict)
    lr: float = 1.0


@dataclass(frozen=True)
class Ratios:
    """How the model and its training differ from the base's; below 1 for smaller ones."""

    m_N: float
    m_L: float
    alpha: float = 1.0
    m_B: float = 1.0  # batch ratio; completed_p only
    m_D: float = 1.0  # ratio of training tokens; completed_p only
    dims: Mapping[str, float] = field(default_factory=dict)  # of dimensions that are not in proportion to the width
    experts: Experts = Experts()
    #: what a user has set for every size: the exponents of a matrix's weight decay in m_in and of the embeddings' rate
    #: in 1 / m_N, and what the embeddings' and the output layer's results are multiplied by
    decay_exponent: float = 1.0
    embedding_exponent: float = 0.0
    embedding: float = 1.0
    output: float = 1.0
    muon: Muon = Muon()

    def of(self, dimension: str) -> float:
        """The ratio of a dimension in `FANS`."""
        return self.dims.get(dimension, self.m_N)


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
    if recipe == "standard":
        return Ratios(1.0, 1.0, muon=replace(ratios.muon, rates=dict.fromkeys(ratios.muon.rates, 1.0)))
    if recipe == "completed_p":
        return ratios
    return replace(ratios, m_B=1.0, m_D=1.0, m_L=ratios.m_L if recipe == "completep" else 1.0)


def merged(role: Role, ratios: Ratios, *, folded: bool) -> Role:
    """The role in whose param group a dense matrix or a latent norm is: Table 1's where its dimensions are in
    proportion, so that a model in proportion has as few groups as the table has rows; others are in their own."""
    latent_norm = role in _SIZES and role not in FANS
    if (role in _DENSE or latent_norm) and all(ratios.of(dimension) == ratios.m_N for dimension in _SIZES[role]):
        return Role.BRANCH_OUT if folded and role in ENDS else kind_of(role)
    return role


def multipliers(
    role: Role, ratios: Ratios, *, recipe: Recipe = "completep", eps_scope: EpsScope = "table", folded: bool = False
) -> Multipliers:
    """One row of the recipe's table; ``folded``: with `fold_factor` in it. ``eps_scope="all"`` gives every role the
    block's epsilon, as the paper's reference code does; the table states the rule for block parameters only.
    ``"embedding"``: as the table, and the embeddings 1 / m_N of theirs, as Complete(d)P."""
    reacted, completed = effective(recipe, ratios), recipe == "completed_p"
    eps_scope = "embedding" if completed and eps_scope == "table" else eps_scope
    init_std, lr, weight_decay, eps = _row(role, reacted, eps_scope, completed)
    one_minus_beta, c = reacted.m_B / reacted.m_D, fold_factor(role, ratios, recipe) if folded else 1.0
    batch = math.sqrt(one_minus_beta)
    return Multipliers(init_std * c, lr * batch * c, weight_decay * batch / c, eps / batch / c, one_minus_beta)


def muon_rate(scale: MuonScale, shape: tuple[float, float], growth: tuple[float, float]) -> float:
    """What the base's learning rate of a matrix that Muon trains is multiplied by for its size. ``shape``: its fan-out
    and fan-in; ``growth``: how many times the base's they are."""
    rates = []
    for out, fan_in in (shape, (shape[0] / growth[0], shape[1] / growth[1])):
        aspect = out / fan_in
        scales = {"unit_rms_norm": aspect, "spectral": max(out, fan_in), "shape_scaling": max(1.0, aspect)}
        rates.append(math.sqrt(aspect) / math.sqrt(scales[scale]))
    return rates[0] / rates[1]


def fold_factor(role: Role, ratios: Ratios, recipe: Recipe = "completep") -> float:
    """What folded mode multiplies a role's weights by, in place of an output in the forward pass; 1 for most. Gradients
    are 1/c of the forward mode's: a norm over all of them must weigh these by c."""
    if role in ENDS or role is Role.BRANCH_OUT_BIAS:
        return residual_multiplier(ratios, recipe)
    # a scaled embedding has the base's sqrt(width) in place of the model's
    of_width = effective(recipe, ratios).m_N ** -0.5 if role in (Role.SCALED_EMBEDDING, Role.SCALED_LOGIT_NORM) else 1.0
    if role in (Role.EMBEDDING, Role.SCALED_EMBEDDING):
        return ratios.embedding * of_width
    if role in (Role.LOGIT_NORM, Role.SCALED_LOGIT_NORM):  # the output layer is the embedding, with its factor
        return logit_multiplier(ratios, recipe, tied=True) / (ratios.embedding * of_width)
    return logit_multiplier(ratios, recipe) if role is Role.UNEMBEDDING else 1.0


def _row(role: Role, ratios: Ratios, eps_scope: EpsScope, completed: bool) -> tuple[float, float, float, float]:
    """Init std, lr, weight decay, eps: Table 1's, Complete(d)P's before m_B, m_D, or with Muon's lr and decay."""
    m_N, m_L, alpha, exponent = ratios.m_N, ratios.m_L, ratios.alpha, ratios.decay_exponent
    m_in, m_out = (ratios.of(dimension) for dimension in _SIZES.get(role, ("width", "width")))
    block_lr, block_eps = m_L ** (alpha - 1), 1 / (math.sqrt(m_N * m_out) * m_L**alpha)
    other_eps = block_eps if eps_scope == "all" else 1.0
    std, eps = 1 / math.sqrt(m_in), block_eps
    match kind_of(role):
        case Role.EMBEDDING:
            return 1, m_N**-ratios.embedding_exponent, 1, 1 / m_N if eps_scope == "embedding" else other_eps
        case Role.UNEMBEDDING:
            absorbed = m_N if completed else 1.0  # of the logit multiplier 1/m_N
            return 1 / absorbed, 1 / absorbed, absorbed**exponent, other_eps
        case Role.FINAL_NORM:
            return 1, 1, 0, other_eps
        case Role.BLOCK_NORM | Role.BLOCK_BIAS:
            by_depth = completed and role is Role.QK_NORM and eps_scope != "all"
            return 1, block_lr, 0, m_L**-alpha if by_depth else block_eps
        case Role.MTP_PROJECTION:  # it returns a stream of its own, and no residual multiplier stands behind it
            block_lr, eps = 1.0, block_eps if eps_scope == "all" else 1 / m_N
        case Role.EXPERT_UP | Role.EXPERT_DOWN:
            m_in, std, eps = _expert(role, ratios)
    if (rate := ratios.muon.rates.get(role)) is not None:
        return std, ratios.muon.lr * rate * block_lr, rate**-exponent, eps
    return std, block_lr / m_in, m_in**exponent, eps


def _expert(role: Role, ratios: Ratios) -> tuple[float, float, float]:
    """m_in, init std and eps of an expert's matrix. A token's add up to one long down-projection: in the sum form of
    m_M m_K inputs; in the mean form each is divided by m_K, so that for the same output its weights are m_K times that.

    eps is no source's at another share: an expert's gradient is of m_K / m_E of the tokens, times the weight that each
    gives it (1 / m_K in the mean form), beside what it is of in a dense model."""
    m_N, m_M, depth, experts = ratios.m_N, ratios.of("expert_ffn"), ratios.m_L**ratios.alpha, ratios.experts
    k = experts.m_K if experts.form == "sum" else 1.0
    std = (math.sqrt(experts.m_K / m_M) if experts.rule == "mue" else math.sqrt(m_N) / m_M) / k
    seen = k / experts.m_E
    if role is Role.EXPERT_UP:
        return m_N, 1 / math.sqrt(m_N), std * seen / (math.sqrt(m_N) * depth)
    return m_M * k, std, seen / (m_N * depth)


def residual_multiplier(ratios: Ratios, recipe: Recipe = "completep") -> float:
    """What the output of each residual branch (attention, MLP) is multiplied by before it is added: m_L^-alpha."""
    return effective(recipe, ratios).m_L ** -ratios.alpha


def logit_multiplier(ratios: Ratios, recipe: Recipe = "completep", *, tied: bool = False) -> float:
    """The logits' factor: m_N^-1, or 1 where an untied unembedding absorbs it; times what a user has set."""
    absorbed = recipe == "completed_p" and not tied
    return ratios.output if absorbed else ratios.output / effective(recipe, ratios).m_N


def attention_scale(head_dim: int, base_head_dim: int, recipe: Recipe = "completep") -> float:
    """The factor on q.k: 1/d_head as in muP, times sqrt(base d_head): the base model keeps its 1/sqrt(d_head)."""
    return 1 / math.sqrt(head_dim) if recipe == "standard" else math.sqrt(base_head_dim) / head_dim
