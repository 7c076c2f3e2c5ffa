"""Which row of Table 1 each parameter of a megatron-core GPTModel belongs to, by name, with local or TransformerEngine
layers (TE folds the norm before a linear into it: ``layer_norm_weight``), latent attention, multi-token prediction, and
experts that are modules of their own, grouped in two matrices, or TE's. A name that matches nothing is an error: a
parameter trained by the wrong rule would show as nothing but a worse model."""

import re

from ds_plugin.completep.rules import ENDS, Role
from ds_plugin.completep.supported import MAMBA
from ds_plugin.core.errors import ConfigError

_MTP = r"mtp\.layers\.\d+"
_LAYER = rf"(decoder\.layers\.\d+|{_MTP}\.(transformer_layer|mtp_model_layer))\."
_ENDS = r"self_attention\.linear_proj|mlp\.linear_fc2"
_EXPERTS = r"mlp\.experts\.(local_experts\.\d+\.)?"
#: matrices inside a block, their biases beside them
_MATRICES: tuple[tuple[str, Role], ...] = (
    (r"self_attention\.linear_qkv\.weight", Role.QKV),
    (r"self_attention\.linear_proj\.weight", Role.ATTENTION_OUT),
    (r"self_attention\.linear_q_proj\.weight", Role.QKV),  # latent attention whose queries have no rank
    (r"self_attention\.linear_q_down_proj\.weight", Role.Q_DOWN),
    (r"self_attention\.linear_q_up_proj\.weight", Role.Q_UP),
    (r"self_attention\.linear_(kv|qkv)_down_proj\.weight", Role.KV_DOWN),  # to both latent vectors: in one proportion
    (r"self_attention\.linear_kv_up_proj\.weight", Role.KV_UP),
    (r"mlp\.linear_fc1\.weight", Role.MLP_UP),
    (r"mlp\.linear_fc2\.weight", Role.MLP_DOWN),
    (r"mlp\.router\.weight|mlp\.shared_experts\.gate_weight", Role.ROUTER),
    (rf"{_EXPERTS}(linear_fc1\.weight\d*|weight1)", Role.EXPERT_UP),
    (rf"{_EXPERTS}(linear_fc2\.weight\d*|weight2)", Role.EXPERT_DOWN),
    (r"mlp\.shared_experts\.linear_fc1\.weight", Role.SHARED_UP),
    (r"mlp\.shared_experts\.linear_fc2\.weight", Role.SHARED_DOWN),
)
_OTHERS: tuple[tuple[str, Role], ...] = (
    (r"embedding\.(word|position)_embeddings\.weight", Role.EMBEDDING),
    (rf"{_LAYER}(input_layernorm|pre_mlp_layernorm)\.(weight|bias)", Role.BLOCK_NORM),
    (rf"{_LAYER}(self_attention\.linear_qkv|mlp\.linear_fc1)\.layer_norm_(weight|bias)", Role.BLOCK_NORM),
    (rf"{_LAYER}self_attention\.linear_(q|(q|kv|qkv)_down)_proj\.layer_norm_(weight|bias)", Role.BLOCK_NORM),
    (rf"{_LAYER}self_attention\.linear_q_up_proj\.layer_norm_(weight|bias)", Role.Q_LATENT_NORM),
    (rf"{_LAYER}self_attention\.(kv_layernorm\.|linear_kv_up_proj\.layer_norm_)(weight|bias)", Role.KV_LATENT_NORM),
    (rf"{_LAYER}self_attention\.[qk]_layernorm\.(weight|bias)", Role.QK_NORM),
    (rf"{_LAYER}self_attention\.core_attention\.softmax_offset", Role.SOFTMAX_OFFSET),
    (rf"{_LAYER}({_ENDS})\.post_layernorm\.(weight|bias)", Role.BLOCK_NORM),  # after a branch, as Gemma's and Olmo's
    (rf"(decoder|{_MTP})\.final_layernorm\.(weight|bias)", Role.FINAL_NORM),
    (rf"{_MTP}\.[eh]norm\.(weight|bias)", Role.FINAL_NORM),
    (rf"{_MTP}\.eh_proj\.weight", Role.MTP_PROJECTION),
    (r"output_layer\.weight", Role.UNEMBEDDING),
)


def role_of(name: str, *, folded: bool = False, tied: bool = False, latent: bool = False) -> Role:
    """The role of a parameter by its name inside the GPTModel; layers may be wrapped by torch.compile. Of a matrix
    inside a block, by its place: `rules.merged` says whose group it is in.

    ``folded``: multipliers are folded into the weights, so that vectors which carry one have roles of their own.
    ``tied``: the output layer is the word embedding; a pipeline's last stage holds a copy of it. ``latent``: attention
    is, where a norm of the same name as one on queries is on their latent vector. Raises ConfigError: the name is not
    one of a supported GPT's.
    """
    name = name.replace("_orig_mod.", "")
    if tied and name == "output_layer.weight":
        return Role.EMBEDDING
    for pattern, role in _MATRICES:
        if re.fullmatch(_LAYER + f"({pattern})", name):
            return role
        if re.fullmatch(_LAYER + f"({pattern.replace('weight', 'bias')})", name) and role is not Role.ROUTER:
            return Role.BRANCH_OUT_BIAS if folded and role in ENDS else Role.BLOCK_BIAS
    for pattern, role in _OTHERS:
        if re.fullmatch(pattern, name):
            if ".post_layernorm." in name and folded:
                what = f"{name!r} is of a norm after a residual branch, which no weights before it can scale"
                raise ConfigError(f'completep: {what}; write "residual": "forward"')
            if role is Role.QK_NORM and latent:
                return Role.Q_LATENT_NORM
            return Role.LOGIT_NORM if "final_layernorm" in name and folded and tied else role
    why = MAMBA if ".mixer." in name else "supported are megatron-core GPT models, dense or with experts"
    remedy = 'disable "completep" or build the model from supported layers'
    raise ConfigError(f"completep: parameter {name!r} has no role: {why}; {remedy}")
