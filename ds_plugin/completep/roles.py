"""Which row of Table 1 each parameter of a megatron-core GPTModel belongs to, by name, with local or TransformerEngine
layers (TE folds the norm before a linear into it: ``layer_norm_weight``), latent attention, multi-token prediction, and
experts that are modules of their own, grouped in two matrices, or TE's. A name that matches nothing is an error: a
parameter trained by the wrong rule would show as nothing but a worse model."""

import re

from ds_plugin.completep.rules import ENDS, FANS, Role
from ds_plugin.completep.supported import MAMBA
from ds_plugin.core.errors import ConfigError

_MTP = r"mtp\.layers\.\d+"
_LAYER = rf"(decoder\.layers\.\d+|{_MTP}\.(transformer_layer|mtp_model_layer))\."
_EXPERTS = r"mlp\.experts\.(local_experts\.\d+\.)?"
#: of weights inside a layer, their biases beside them
_IN_LAYER = {
    r"self_attention\.linear_(qkv|q_proj)\.weight": Role.QKV,  # the second: latent, where queries have no rank
    r"self_attention\.linear_proj\.weight": Role.ATTENTION_OUT,
    r"self_attention\.linear_q_down_proj\.weight": Role.Q_DOWN,
    r"self_attention\.linear_q_up_proj\.weight": Role.Q_UP,
    r"self_attention\.linear_(kv|qkv)_down_proj\.weight": Role.KV_DOWN,  # to both latent vectors: in one proportion
    r"self_attention\.linear_kv_up_proj\.weight": Role.KV_UP,
    r"mlp\.linear_fc1\.weight": Role.MLP_UP,
    r"mlp\.linear_fc2\.weight": Role.MLP_DOWN,
    r"mlp\.router\.weight|mlp\.shared_experts\.gate_weight": Role.ROUTER,
    rf"{_EXPERTS}(linear_fc1\.weight\d*|weight1)": Role.EXPERT_UP,
    rf"{_EXPERTS}(linear_fc2\.weight\d*|weight2)": Role.EXPERT_DOWN,
    r"mlp\.shared_experts\.linear_fc1\.weight": Role.SHARED_UP,
    r"mlp\.shared_experts\.linear_fc2\.weight": Role.SHARED_DOWN,
    r"(input|pre_mlp)_layernorm\.weight": Role.BLOCK_NORM,
    r"(self_attention\.linear_(qkv|q_proj|(q|kv|qkv)_down_proj)|mlp\.linear_fc1)\.layer_norm_weight": Role.BLOCK_NORM,
    r"(self_attention\.linear_proj|mlp\.linear_fc2)\.post_layernorm\.weight": Role.BLOCK_NORM,  # as Gemma's and Olmo's
    r"self_attention\.linear_q_up_proj\.layer_norm_weight": Role.Q_LATENT_NORM,
    r"self_attention\.(kv_layernorm\.|linear_kv_up_proj\.layer_norm_)weight": Role.KV_LATENT_NORM,
    r"self_attention\.[qk]_layernorm\.weight": Role.QK_NORM,
    r"self_attention\.core_attention\.softmax_offset": Role.SOFTMAX_OFFSET,
}
_ROLES = {f"{_LAYER}({place})": role for place, role in _IN_LAYER.items()} | {
    r"embedding\.(word|position)_embeddings\.weight": Role.EMBEDDING,
    rf"(decoder|{_MTP})\.final_layernorm\.weight|{_MTP}\.[eh]norm\.weight": Role.FINAL_NORM,
    rf"{_MTP}\.eh_proj\.weight": Role.MTP_PROJECTION,
    r"output_layer\.weight": Role.UNEMBEDDING,
}
_WITHOUT_BIAS = (Role.ROUTER, Role.EMBEDDING, Role.MTP_PROJECTION, Role.UNEMBEDDING)


def role_of(name: str, *, folded: bool = False, tied: bool = False, latent: bool = False) -> Role:
    """The role of a parameter by its name inside the GPTModel; layers may be wrapped by torch.compile. Of a matrix
    inside a block, by its place: `rules.merged` says whose group it is in.

    ``folded``: multipliers are folded into the weights, so that vectors which carry one have roles of their own.
    ``tied``: the output layer is the word embedding; a pipeline's last stage holds a copy of it. ``latent``: attention
    is, where a norm of the same name as one on queries is on their latent vector. Raises ConfigError: the name is not
    one of a supported GPT's."""
    name = name.replace("_orig_mod.", "")
    if tied and name == "output_layer.weight":
        return Role.EMBEDDING
    weight = re.sub(r"bias(?=\d*$)", "weight", name)  # of which this is, or which it is beside
    role = next((role for pattern, role in _ROLES.items() if re.fullmatch(pattern, weight)), None)
    if role is None or (weight != name and role in _WITHOUT_BIAS):
        why = MAMBA if ".mixer." in name else "supported are megatron-core GPT models, dense or with experts"
        remedy = 'disable "completep" or build the model from supported layers'
        raise ConfigError(f"completep: parameter {name!r} has no role: {why}; {remedy}")
    if ".post_layernorm." in name and folded:
        what = f"{name!r} is of a norm after a residual branch, which no weights before it can scale"
        raise ConfigError(f'completep: {what}; write "residual": "forward"')
    if weight != name and role in FANS:
        return Role.BRANCH_OUT_BIAS if folded and role in ENDS else Role.BLOCK_BIAS
    if role is Role.QK_NORM and latent:
        return Role.Q_LATENT_NORM
    return Role.LOGIT_NORM if "final_layernorm" in name and folded and tied else role
