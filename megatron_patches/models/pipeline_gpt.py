"""The GPT of `gpt` cut into the stages of DeepSpeed's pipeline, parameter for parameter the same model.

    model = build_pipeline(cfg, vocab_size, config, spec)               # the rest is as for build_gpt
    engine, *_ = deepspeed.initialize(model=model, ...)                 # no mpu: the module brings its own
    loss = engine.train_batch(map(micro_batch, batches))

A parameter's name is the GPTModel's behind the prefix DeepSpeed numbers its layers with; `gpt_name` takes it off. Each
layer takes what the one before it returns; inside, modules have their place in a GPTModel.
"""

import contextlib
import functools
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch.nn import ModuleDict

from ds_plugin.core.errors import ConfigError
from megatron_patches.models.gpt import GPTConfig, check_build, in_one_dtype, padded_vocab_size

_TIED = "embedding"  # DeepSpeed's key for the layers that share the word embedding
_WORDS = "embedding.word_embeddings.weight"
_PREFIX = re.compile(rf"^(\d+|tied_modules\.{_TIED})\.")


class Embedding(torch.nn.Module):
    """(tokens, positions), each [batch, length] int64 -> the residual stream [length, batch, width]."""

    def __init__(self, config: Any, cfg: GPTConfig, rows: int):
        from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding

        super().__init__()
        kind: Any = "learned_absolute" if cfg.position_embedding == "learned" else "rope"
        self.embedding = LanguageModelEmbedding(config, rows, cfg.seq_length, kind)

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> Any:
        return self.embedding(*inputs)


class Layer(torch.nn.Module):
    """[length, batch, width] -> the same; the causal mask is made from the scores' own size. ``index``: from 0 in the
    whole model; ``rotary``: length -> the angles' table, None with learned positions."""

    def __init__(self, config: Any, spec: Any, index: int, rotary: torch.nn.Module | None):
        from megatron.core.transformer.spec_utils import build_module

        super().__init__()
        self.index, self.rotary = str(index), rotary
        layer = build_module(spec, config=config, layer_number=index + 1)
        self.decoder = ModuleDict({"layers": ModuleDict({self.index: layer})})

    def forward(self, stream: torch.Tensor) -> Any:
        layer: Any = self.decoder["layers"][self.index]  # type: ignore[index]
        angles = None if self.rotary is None else self.rotary(stream.shape[0])
        return layer(stream, attention_mask=None, rotary_pos_emb=angles)[0]


class FinalNorm(torch.nn.Module):
    """The layer norm after the last block, under the names that a GPTModel gives its parameters."""

    def __init__(self, config: Any):
        from megatron.core.transformer.transformer_block import LayerNormImpl  # the one a GPTModel would have

        super().__init__()
        norm = LayerNormImpl(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self.decoder = ModuleDict({"final_layernorm": norm})

    def forward(self, stream: torch.Tensor) -> Any:
        return self.decoder["final_layernorm"](stream)


class Output(torch.nn.Module):
    """[length, batch, width] -> logits [length, batch, this rank's part of the vocabulary]. ``tied``: by a copy of the
    word embedding; DeepSpeed makes it the first stage's and adds the gradients of the two."""

    def __init__(self, config: Any, rows: int, tied: bool):
        from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding

        super().__init__()
        if tied:
            words = VocabParallelEmbedding(rows, config.hidden_size, init_method=config.init_method, config=config)
            self.embedding = ModuleDict({"word_embeddings": words})
        settings: Any = {"config": config, "init_method": config.init_method, "skip_weight_param_allocation": tied}
        self.output_layer = ColumnParallelLinear(config.hidden_size, rows, bias=False, **settings)
        self.tied = tied

    def forward(self, stream: torch.Tensor) -> Any:
        weight: Any = self.embedding["word_embeddings"].weight if self.tied else None
        return self.output_layer(stream, weight=weight)[0]


def mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> Any:
    """Mean cross entropy in nats per token; logits [length, batch, part], labels [batch, length] int64."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return vocab_parallel_cross_entropy(logits, labels.transpose(0, 1).contiguous()).mean()


def micro_batch(batch: Mapping[str, torch.Tensor]) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A batch of tokens, position_ids and labels by name, each [batch, length], as the pipeline takes it."""
    return (batch["tokens"], batch["position_ids"]), batch["labels"]


class PipelineGPT(PipelineModule):
    """One rank's stage of the model."""

    def __init__(self, specs: Sequence[LayerSpec], config: Any, tied: bool, topology: Any):
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed lists the layers there
            super().__init__(specs, topology=topology, loss_fn=mean_loss, partition_method=f"type:^{Layer.__name__}$")
        self.config = config
        parts = [part for part in self.modules() if isinstance(part, (Embedding, Layer, FinalNorm, Output))]
        self._gpt = (StageOfGPT(parts, config, tied),)  # in a tuple: no submodule, with other names

    @property
    def gpt(self) -> "StageOfGPT":
        return self._gpt[0]


class StageOfGPT(torch.nn.Module):
    """A stage's modules where a GPTModel has them, for reading and for CompleteP, not for a forward pass."""

    def __init__(self, parts: Sequence[torch.nn.Module], config: Any, tied: bool):
        super().__init__()
        self.config, self.share_embeddings_and_output_weights = config, tied
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.Sequential()  # under the numbers in the whole model, which need not begin with 0
        for part in parts:
            for name in ("embedding", "output_layer"):
                if hasattr(part, name):
                    setattr(self, name, getattr(part, name))
            if isinstance(part, Layer):
                self.decoder.layers.add_module(part.index, part.decoder["layers"][part.index])  # type: ignore[index]
            elif isinstance(part, FinalNorm):
                self.decoder.final_layernorm = part.decoder["final_layernorm"]


def build_pipeline(cfg: GPTConfig, vocab_size: int, config: Any, spec: Any) -> PipelineGPT:
    """This rank's stage, of ``num_layers / pipeline_parallel`` layers; every rank of the job calls it. ``config``,
    ``spec``: as for `gpt.build_gpt`, and so are the weights of a seed: a stage draws, and drops, those of the stages
    before it as well. Raises as `check_build`, and ConfigError for a norm on queries and keys with tensor parallelism.
    """
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
    from megatron.core import parallel_state

    check_build(cfg, vocab_size)
    if cfg.qk_norm and cfg.tensor_parallel > 1:
        why = f"qk_norm with tensor_parallel = {cfg.tensor_parallel}: DeepSpeed does not sum these norms' gradients"
        raise ConfigError(f"{why}; use tensor_parallel 1, or no qk_norm")
    # ranks in the order pipe, data, tensor, from the slowest to the fastest, as megatron's groups have them
    data = parallel_state.get_data_parallel_world_size()
    topology = PipeModelDataParallelTopology(cfg.pipeline_parallel, cfg.tensor_parallel, data)
    model = PipelineGPT(_specs(cfg, vocab_size, config, spec), config, cfg.tie_embeddings, topology)
    return in_one_dtype(model, config)  # type: ignore[no-any-return]


def _specs(cfg: GPTConfig, vocab_size: int, config: Any, spec: Any) -> list[LayerSpec]:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    rows = padded_vocab_size(vocab_size, cfg.tensor_parallel)
    rotary = None
    if cfg.position_embedding == "rope":  # one table of angles for all layers, as a GPTModel has it; no parameters
        settings: Any = {name: getattr(config, name) for name in ("rotary_interleaved", "use_cpu_initialization")}
        rotary = RotaryEmbedding(config.kv_channels, 1.0, **settings)
    tied = functools.partial(TiedLayerSpec, _TIED, tied_weight_attr=[_WORDS])
    end: Any = tied if cfg.tie_embeddings else LayerSpec
    layers = [LayerSpec(Layer, config, spec, index, rotary) for index in range(cfg.num_layers)]
    output = end(Output, config, rows, cfg.tie_embeddings)
    return _drawn_in_turn([end(Embedding, config, cfg, rows), *layers, LayerSpec(FinalNorm, config), output])


def _drawn_in_turn(specs: list[LayerSpec]) -> list[LayerSpec]:
    """The same specs; the first one that is built on a rank builds, and drops, all before it."""
    waiting = list(specs)

    def build(spec: LayerSpec, log: bool = False) -> Any:
        while any(spec is other for other in waiting):
            if (first := waiting.pop(0)) is not spec:
                type(first).build(first)
        return type(spec).build(spec, log)

    for spec in specs:
        spec.build = functools.partial(build, spec)
    return specs


def gpt_name(name: str) -> str:
    """The name in a GPTModel of a parameter or module of a `PipelineGPT`."""
    return _PREFIX.sub("", name, count=1)
