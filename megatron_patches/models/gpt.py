"""Build a megatron-core GPT for a training script, in steps that CompleteP may come between.

    cfg = GPTConfig(...)
    initialize_parallel(cfg, seed)               # process groups and seeds
    config, spec = transformer_config(cfg, dtype), layer_spec(cfg)
    model = build_gpt(cfg, vocab_size, config, spec)
    deepspeed.initialize(model=model, mpu=DeepSpeedMPU(), ...)

    loss = model(tokens, positions, None, labels=labels)

tokens, positions, labels: [batch, length] int64; loss: [batch, length] float32, one value per token. No attention mask
is needed: causal attention builds its own from the size of the scores.
"""

import math
import random
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field, model_validator

from ds_plugin.core.errors import ConfigError, StateError
from ds_plugin.core.settings_model import Layers, Length, Ranks, SectionConfig, Width
from megatron_patches import megatron_on_cpu

VOCAB_MULTIPLE = 64  # every usual tensor-parallel size divides it: the model's size does not depend on that
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_SEED = 2**31 - 1  # megatron adds up to 2718 + tensor_parallel, and numpy takes 32 bits


class GPTConfig(SectionConfig):
    """The shape of a decoder-only transformer and how it is cut. Unknown keys and wrong types are errors."""

    num_layers: Layers = Field(description="transformer layers")
    hidden_size: Width = Field(description="width of the residual stream")
    num_attention_heads: Width = Field(description="query heads; divides hidden_size")
    num_query_groups: Width | None = Field(None, description="key/value heads; null: one per query head")
    ffn_hidden_size: Width | None = Field(None, description="width of the MLP; null: 4 * hidden_size")
    seq_length: Length = Field(description="longest sequence in tokens; also the number of learned positions")
    position_embedding: Literal["learned", "rope"] = Field("learned", description="absolute table or rotary")
    normalization: Literal["LayerNorm", "RMSNorm"] = Field("LayerNorm", description="kind of every norm")
    activation: Literal["gelu", "swiglu"] = Field("gelu", description="swiglu adds a gate of the MLP's width")
    qk_norm: bool = Field(False, description="a norm on the queries and keys of every head")
    bias: bool = Field(True, description="biases of the linear layers (the output layer never has one)")
    tie_embeddings: bool = Field(False, description="use the word embedding as the output layer")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="of embeddings, attention and residual branches")
    init_std: float = Field(0.02, gt=0.0, le=10.0, description="standard deviation of the initial weights")
    tensor_parallel: Ranks = Field(1, description="ranks that share each layer")
    pipeline_parallel: Ranks = Field(1, description="stages of DeepSpeed's pipeline; divides num_layers")

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def kv_channels(self) -> int:
        """The size of a head, by TransformerConfig's name."""
        return self.hidden_size // self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def model_ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @model_validator(mode="after")
    def _sizes_fit(self) -> "GPTConfig":
        heads, groups = self.num_attention_heads, self.query_groups
        for name, value, of, total in (
            ("num_attention_heads", heads, "hidden_size", self.hidden_size),
            ("num_query_groups", groups, "num_attention_heads", heads),
            # whole query groups go to a rank; heads come first because the default ties the two
            ("tensor_parallel", self.tensor_parallel, "num_attention_heads", heads),
            ("tensor_parallel", self.tensor_parallel, "num_query_groups", groups),
            ("tensor_parallel", self.tensor_parallel, "ffn_hidden_size", self.ffn_size),
            ("pipeline_parallel", self.pipeline_parallel, "num_layers", self.num_layers),
        ):
            if total % value:
                raise ValueError(f"{name} = {value} does not divide {of} = {total}; write a divisor of {total}")
        if self.position_embedding == "rope" and (head := self.hidden_size // heads) % 2:
            what = f"position_embedding='rope' needs an even head size, not hidden_size / num_attention_heads = {head}"
            raise ValueError(f"{what}; write another, or position_embedding='learned'")
        return self


def initialize_parallel(cfg: GPTConfig, seed: int) -> None:
    """Create megatron's process groups (again only seed), and seed `random`, numpy, torch and megatron's random number
    tracker, whose model-parallel stream differs per rank. Raises StateError without torch.distributed, or for groups of
    another size; ConfigError: sizes do not divide the ranks, seed out of range, neither a GPU nor `megatron_on_cpu`."""
    from megatron.core import parallel_state, tensor_parallel

    if not dist.is_initialized():
        raise StateError("torch.distributed is not initialised; call deepspeed.init_distributed() first")
    if not torch.cuda.is_available() and not megatron_on_cpu.enabled():
        raise ConfigError("megatron-core found no GPU; call megatron_patches.megatron_on_cpu.enable() to run here")
    if not 0 <= seed <= _MAX_SEED:
        raise ConfigError(f"seed = {seed} is out of range; use 0 to {_MAX_SEED}")
    if (ranks := dist.get_world_size()) % cfg.model_ranks:
        asked = f"tensor_parallel x pipeline_parallel = {cfg.tensor_parallel} x {cfg.pipeline_parallel}"
        raise ConfigError(f"{asked} does not divide the {ranks} ranks of this job; start a multiple of it")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(cfg.tensor_parallel, cfg.pipeline_parallel)
    check_build(cfg)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def transformer_config(cfg: GPTConfig, dtype: torch.dtype, **more: Any) -> Any:
    """The megatron-core TransformerConfig of `cfg` with float32, bfloat16 or float16 parameters; else ConfigError. On
    the CPU a model starts the same whatever tensor_parallel is; on a GPU each rank draws its own part of a weight.
    ``more``: fields that `cfg` does not know; with multi_latent_attention it is an MLATransformerConfig."""
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    if dtype not in _DTYPES:
        raise ConfigError(f"dtype = {dtype} is not supported; use one of {', '.join(map(str, _DTYPES))}")
    kind = MLATransformerConfig if more.get("multi_latent_attention") else TransformerConfig
    return kind(
        num_layers=cfg.num_layers,
        hidden_size=cfg.hidden_size,
        num_attention_heads=cfg.num_attention_heads,
        num_query_groups=cfg.query_groups,
        ffn_hidden_size=cfg.ffn_size,
        normalization=cfg.normalization,
        activation_func=F.silu if cfg.activation == "swiglu" else F.gelu,
        gated_linear_unit=cfg.activation == "swiglu",
        add_bias_linear=cfg.bias,
        qk_layernorm=cfg.qk_norm,
        hidden_dropout=cfg.dropout,
        attention_dropout=cfg.dropout,
        init_method_std=cfg.init_std,
        tensor_model_parallel_size=cfg.tensor_parallel,
        use_cpu_initialization=megatron_on_cpu.on_cpu(),
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        # The fused kernels need extensions that the wheel lacks, and a fused residual add hides the branch's output.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        **more,
    )


def layer_spec(cfg: GPTConfig, **kind: Any) -> Any:
    """The ModuleSpec of one layer, new on every call: Transformer Engine's with a GPU and that package. ``kind``: of
    megatron-core's function that makes it, such as ``num_experts``."""
    from megatron.core.models.gpt import gpt_layer_specs

    # megatron's own answer: a package that is there but fails to import does not count.
    if gpt_layer_specs.HAVE_TE and not megatron_on_cpu.on_cpu():
        return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=cfg.qk_norm, **kind)
    # Without the argument, apex's LayerNorm would be chosen for RMSNorm.
    return gpt_layer_specs.get_gpt_layer_local_spec(normalization=cfg.normalization, qk_layernorm=cfg.qk_norm, **kind)


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """The next multiple of lcm(64, tensor_parallel), as in Megatron-LM: 50257 becomes 50304 for 1, 2, ... 64."""
    multiple = math.lcm(VOCAB_MULTIPLE, tensor_parallel)
    return -(-vocab_size // multiple) * multiple


def build_gpt(cfg: GPTConfig, vocab_size: int, config: Any, spec: Any) -> Any:
    """A megatron-core GPTModel with parameters of `config.params_dtype`, vocabulary padded by `padded_vocab_size`.
    Raises as `check_build`, and ConfigError for pipeline_parallel above 1, and inside deepspeed.zero.Init, which cuts
    position embeddings before megatron initialises them."""
    from megatron.core.models.gpt import GPTModel

    check_build(cfg, vocab_size)
    if cfg.pipeline_parallel > 1:
        raise ConfigError("pipeline_parallel > 1 needs megatron_patches.models.pipeline_gpt.build_pipeline")
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=padded_vocab_size(vocab_size, cfg.tensor_parallel),
        max_sequence_length=cfg.seq_length,
        share_embeddings_and_output_weights=cfg.tie_embeddings,
        position_embedding_type="learned_absolute" if cfg.position_embedding == "learned" else "rope",
    )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ConfigError("build_gpt was called inside deepspeed.zero.Init; call it outside it, also for ZeRO-3")
    return in_one_dtype(model, config)


def in_one_dtype(model: Any, config: Any) -> Any:
    """The model; torch's norms and position embeddings are float32 whatever params_dtype says."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(config.params_dtype)
    return model


class DeepSpeedMPU:
    """megatron-core's process groups in the words DeepSpeed asks of an `mpu`; a PipelineModule brings its own.
    "model_parallel" is DeepSpeed's old word for tensor_model_parallel; megatron's own of that name spans the pipeline
    too. Sequence parallel methods are left out: DeepSpeed takes their presence for its Ulysses mode."""

    def __init__(self) -> None:
        from megatron.core import parallel_state

        if not parallel_state.model_parallel_is_initialized():
            raise StateError("DeepSpeedMPU needs megatron's process groups; call gpt.initialize_parallel first")
        self._state = parallel_state

    def __getattr__(self, name: str) -> Any:
        name = name.replace("get_model_parallel_", "get_tensor_model_parallel_")
        if not name.startswith(("get_tensor_model_parallel_", "get_pipeline_model_parallel_", "get_data_parallel_")):
            raise AttributeError(f"DeepSpeedMPU has no {name!r}")
        return getattr(self._state, name)

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._state.get_data_parallel_group())


def check_build(cfg: GPTConfig, vocab_size: int = 1) -> None:
    """Raises StateError where the process groups do not fit `cfg`, ConfigError for a vocabulary below 1."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        raise StateError("megatron's process groups do not exist; call gpt.initialize_parallel(cfg, seed) first")
    found = {"tensor_parallel": parallel_state.get_tensor_model_parallel_world_size()}
    if cfg.pipeline_parallel > 1:  # with 1 the stages of existing groups are the business of whoever made the groups
        found["pipeline_parallel"] = parallel_state.get_pipeline_model_parallel_world_size()
    for name, size in found.items():
        if size != (asked := getattr(cfg, name)):
            what = f"megatron's process groups were made for {name} = {size}, the model asks for {asked}"
            raise StateError(f"{what}; use one value, or parallel_state.destroy_model_parallel() between two")
    if vocab_size < 1:
        raise ConfigError(f"vocab_size = {vocab_size} is out of range; use the tokenizer's number of tokens")
