"""The ``completep`` section of the JSON."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator

from ds_plugin.completep import rules
from ds_plugin.completep.rules import EpsScope, Experts, Multipliers, Ratios, Recipe, Role
from ds_plugin.core.settings_model import Heads, Layers, Ratio, SectionConfig, Width

_FOR_STANDARD = "alpha base_head_dim eps_scope batch_ratio token_ratio weight_decay_exponent embedding_lr_exponent"
#: by recipe, the settings that it does not react to; the base's size is asked for all the same
WITHOUT_EFFECT: Mapping[Recipe, tuple[str, ...]] = {
    "completep": ("batch_ratio", "token_ratio"),
    "mup": ("alpha", "batch_ratio", "token_ratio"),
    "standard": tuple(_FOR_STANDARD.split()),
    "completed_p": (),
}


class CompletePConfig(SectionConfig):
    """The base model, whose hyperparameters the JSON holds, and the depth exponent."""

    enabled: bool = Field(False, description="whether the method is on")
    base_width: Width = Field(description="hidden size of the model the hyperparameters were tuned on, e.g. 256")
    base_depth: Layers = Field(description="number of layers of the model the hyperparameters were tuned on, e.g. 2")
    base_head_dim: Width | None = Field(
        None, description="its head size, e.g. 64; null when this model's heads have the same size; 1 for 1/head size"
    )
    recipe: Recipe = Field(
        "completep",
        description="completep; mup (width only), standard (no scaling), completed_p (batch and tokens too)",
    )
    residual: Literal["forward", "folded"] = Field(
        "forward",
        description="where the multipliers of residual branches and logits go: into the forward pass, or folded into "
        "the weights, learning rates, weight decay and eps (Adam and Muon only; the forward pass is megatron-core's "
        "own); by default forward with DeepSpeed's optimizers, folded in Megatron-LM's scripts",
    )
    base_num_heads: Heads | None = Field(
        None, description="its number of attention heads, e.g. 4; this and the next seven: null when in proportion"
    )
    base_num_query_groups: Heads | None = Field(
        None, description="its number of key and value heads; each must be shared by as many heads as in this model"
    )
    base_ffn_hidden_size: Width | None = Field(None, description="the hidden size of its MLP, e.g. 1024")
    base_moe_ffn_hidden_size: Width | None = Field(None, description="the hidden size of one of its experts, e.g. 256")
    base_moe_shared_expert_intermediate_size: int | None = Field(
        None, ge=0, le=2**20, description="the hidden size of its shared experts together, 0 for none"
    )
    base_num_moe_experts: Heads | None = Field(None, description="its number of experts, e.g. 8")
    base_moe_router_topk: Heads | None = Field(None, description="of these, how many a token goes through, e.g. 2")
    base_moe_router_topk_scaling_factor: Ratio | None = Field(
        None, description="what the weights of a token's experts sum to in the base, e.g. 1.0"
    )
    base_q_lora_rank: Width | None = Field(
        None, description="latent attention: the rank of its queries, asked for since ranks are mostly kept, e.g. 512"
    )
    base_kv_lora_rank: Width | None = Field(None, description="latent attention: the rank of its keys and values")
    moe: Literal["fixed_sparsity", "mue"] | None = Field(
        None,
        description="for experts whose number, share or size is not the base's: fixed_sparsity (Jiang et al., the same "
        "active share) or mue (Complete-muE, any share)",
    )
    alpha: float = Field(1.0, ge=0.5, le=1.0, description="depth exponent; CompleteP is 1, 0.5 the best before it")
    batch_ratio: Ratio = Field(1.0, description="completed_p: this run's batch in tokens over the base run's")
    token_ratio: Ratio = Field(1.0, description="completed_p: this run's training tokens over the base run's")
    eps_scope: EpsScope = Field(
        "table",
        description="which parameters get the scaled AdamW eps: those of Table 1, or all, as the reference code; "
        "embedding: Table 1's, and the embeddings 1 / m_N",
    )
    weight_decay_exponent: float = Field(
        1.0, ge=0.0, le=2.0, description="weight decay of matrices grows by width^this; 1 keeps lr x weight decay"
    )
    embedding_lr_exponent: float = Field(
        0.0, ge=0.0, le=1.0, description="embeddings' learning rate falls by width^this; 0.5 for large vocabularies"
    )
    embedding_multiplier: Ratio = Field(1.0, description="what embeddings are multiplied by, in the base model too")
    output_multiplier: Ratio = Field(1.0, description="what logits are multiplied by, in the base model too")
    lr_multipliers: dict[str, Ratio] = Field(
        {},
        description='by role, what its learning rate is multiplied by, in the base model too, e.g. {"mlp_down": 0.5}; '
        "hidden, block_norm, block_bias, embedding and final_norm stand for all of their kind",
    )

    roles: dict[str, str] = Field(
        {},
        description="of decoders, for parameters whose role is not recognised: a regular expression of whole names to "
        'a role, e.g. {"model.layers.[0-9]+.gate.weight": "hidden"}',
    )

    def folded_by_default(self) -> "CompletePConfig":
        """The section as Megatron-LM's scripts and decoders take it: folded, unless it says ``residual`` itself. Then
        a checkpoint runs where this plugin is not; in the forward mode it would run there without the multipliers."""
        return self if "residual" in self.model_fields_set else self.model_copy(update={"residual": "folded"})

    def differences(self, stored: object) -> str:
        """``setting value there, value here`` wherever the section of a checkpoint is another one; else empty."""
        here, there = self.model_dump(), dict(stored) if isinstance(stored, Mapping) else {}
        names = [n for n in sorted({*there, *here}) if there.get(n) != here.get(n)]
        return ", ".join(f"{n} {json.dumps(there.get(n))} there, {json.dumps(here.get(n))} here" for n in names)

    def ratios(
        self, width: int, depth: int, dims: Mapping[str, float] | None = None, experts: Experts | None = None
    ) -> Ratios:
        """Of a model of this hidden size and number of layers against the base model; ``dims``, ``experts``: as
        `sizes.dims_of` and `sizes.experts_of` give them, for other sizes than those in proportion."""
        return Ratios(
            width / self.base_width, depth / self.base_depth, self.alpha, self.batch_ratio, self.token_ratio,
            dims or {}, experts or Experts(), decay_exponent=self.weight_decay_exponent, output=self.output_multiplier,
            embedding_exponent=self.embedding_lr_exponent, embedding=self.embedding_multiplier,
        )  # fmt: skip

    def multipliers(self, role: Role, ratios: Ratios) -> Multipliers:
        """The row of this section's recipe, with the role's own factor on the learning rate."""
        folded = self.residual == "folded"
        row = rules.multipliers(role, ratios, recipe=self.recipe, eps_scope=self.eps_scope, folded=folded)
        of_kind = self.lr_multipliers.get(rules.kind_of(role).value, 1.0)
        return replace(row, lr=row.lr * self.lr_multipliers.get(role.value, of_kind))

    def merged(self, role: Role, ratios: Ratios) -> Role:
        """`rules.merged`, but for a role with a factor of its own."""
        own = role.value in self.lr_multipliers
        return role if own else rules.merged(role, ratios, folded=self.residual == "folded")

    def fold_factor(self, role: Role, ratios: Ratios) -> float:
        """What the role's weights are multiplied by, and its gradients divided by, against the forward mode."""
        return rules.fold_factor(role, ratios, self.recipe) if self.residual == "folded" else 1.0

    @model_validator(mode="after")
    def _ratios_fit(self) -> "CompletePConfig":
        for name in WITHOUT_EFFECT[self.recipe]:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                takes = " or ".join(f'"{recipe}"' for recipe, without in WITHOUT_EFFECT.items() if name not in without)
                what = f"{value!r} has no effect with recipe {self.recipe!r}"
                raise ValueError(f'completep.{name}: {what}; remove it, or write "recipe": {takes}')
        known = [each.value for each in Role]
        if unknown := [role for role in self.lr_multipliers if role not in known]:
            raise ValueError(f"completep.lr_multipliers: {unknown[0]!r} is no role; roles are {', '.join(known)}")
        for pattern, role in self.roles.items():
            if role not in known:
                raise ValueError(f"completep.roles: {pattern!r} is given {role!r}; roles are {', '.join(known)}")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"completep.roles: {pattern!r} is no regular expression: {error}") from None
        return self
