"""Which row of Table 1 each parameter of a megatron-core GPTModel belongs to, by name, with local or TransformerEngine
layers (TE folds the norm before a linear into it: ``layer_norm_weight``). A name that matches nothing is an error: a
parameter trained by the wrong rule would show as nothing but a worse model."""

import re

from ds_plugin.completep.rules import Role
from ds_plugin.core.errors import ConfigError

_LAYER = r"decoder\.layers\.\d+\."
_LINEAR = r"(self_attention\.linear_(qkv|proj)|mlp\.linear_fc[12])"
_PATTERNS: tuple[tuple[str, Role], ...] = (
    (r"embedding\.(word|position)_embeddings\.weight", Role.EMBEDDING),
    (rf"{_LAYER}(input_layernorm|pre_mlp_layernorm)\.(weight|bias)", Role.BLOCK_NORM),
    (rf"{_LAYER}(self_attention\.linear_qkv|mlp\.linear_fc1)\.layer_norm_(weight|bias)", Role.BLOCK_NORM),
    (rf"{_LAYER}self_attention\.[qk]_layernorm\.(weight|bias)", Role.QK_NORM),
    (rf"{_LAYER}{_LINEAR}\.weight", Role.HIDDEN),
    (rf"{_LAYER}{_LINEAR}\.bias", Role.BLOCK_BIAS),
    (r"decoder\.final_layernorm\.(weight|bias)", Role.FINAL_NORM),
    (r"output_layer\.weight", Role.UNEMBEDDING),
)
_BRANCH_OUT = re.compile(rf"{_LAYER}(self_attention\.linear_proj|mlp\.linear_fc2)\.(weight|bias)")


def role_of(name: str, *, folded: bool = False, tied: bool = False) -> Role:
    """The role of a parameter by its name inside the GPTModel; layers may be wrapped by torch.compile.

    ``folded``: multipliers are folded into the weights, so that those which carry one have roles of their own.
    ``tied``: the output layer is the word embedding; a pipeline's last stage holds a copy of it. Raises ConfigError:
    the name is not one of a dense GPT's.
    """
    name = name.replace("_orig_mod.", "")
    if folded and (found := _BRANCH_OUT.fullmatch(name)):
        return Role.BRANCH_OUT if found[2] == "weight" else Role.BRANCH_OUT_BIAS
    if tied and name == "output_layer.weight":
        return Role.EMBEDDING
    for pattern, role in _PATTERNS:
        if re.fullmatch(pattern, name):
            return Role.LOGIT_NORM if role is Role.FINAL_NORM and folded and tied else role
    raise ConfigError(
        f"completep: parameter {name!r} has no role in Table 1 (dense megatron-core GPT models are supported: no MoE, "
        'MLA, MTP or Mamba layers); disable "completep" or build the model from supported layers'
    )
