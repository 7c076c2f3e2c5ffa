"""The GPT of `gpt` cut into the stages of DeepSpeed's pipeline, parameter for parameter the same model.

    cfg = GPTConfig(..., tensor_parallel=2, pipeline_parallel=2)
    initialize_parallel(cfg, seed)
    config, spec = transformer_config(cfg, dtype), layer_spec(cfg)      # CompleteP's prepare() as for build_gpt
    model = build_pipeline(cfg, vocab_size, config, spec)               # ... and its finish(model, section)
    engine, *_ = deepspeed.initialize(model=model, ...)                 # no mpu: the module brings its own

    loss = engine.train_batch(map(micro_batch, batches))

A parameter's name is the GPTModel's behind the prefix DeepSpeed numbers its layers with; `gpt_name` takes it off. Its
first value is the GPTModel's too: see `build_pipeline`.
"""

import contextlib
import functools
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch.nn import ModuleDict

from ds_plugin.core.errors import ConfigError
from megatron_patches.models.gpt import GPTConfig, check_build, padded_vocab_size

_TIED = "embedding"  # DeepSpeed's key for the layers that share the word embedding
_WORDS = "embedding.word_embeddings.weight"
_PREFIX = re.compile(rf"\d+\.|tied_modules\.{_TIED}\.")

# -- the layers, each of which takes what the one before it returns; inside, modules have their place in a GPTModel ----


class Embedding(torch.nn.Module):
    """(tokens, positions), each [batch, length] int64 -> the residual stream [length, batch, width]."""

    def __init__(self, config: Any, cfg: GPTConfig, rows: int):
        from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding

        super().__init__()
        kind: Any = "learned_absolute" if cfg.position_embedding == "learned" else "rope"
        self.embedding = LanguageModelEmbedding(config, rows, cfg.seq_length, kind)

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        stream: torch.Tensor = self.embedding(*inputs)
        return stream


class Layer(torch.nn.Module):
    """[length, batch, width] -> the same; the causal mask is made from the scores' own size.

    ``index``: from 0 in the whole model; ``rotary``: length -> the angles' table, None with learned positions.
    """

    def __init__(self, config: Any, spec: Any, index: int, rotary: torch.nn.Module | None):
        from megatron.core.transformer.spec_utils import build_module

        super().__init__()
        self.index, self.rotary = str(index), rotary
        layer = build_module(spec, config=config, layer_number=index + 1)
        self.decoder = ModuleDict({"layers": ModuleDict({self.index: layer})})

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        layer: Any = self.decoder["layers"][self.index]  # type: ignore[index]
        angles = None if self.rotary is None else self.rotary(stream.shape[0])
        out: torch.Tensor = layer(stream, attention_mask=None, rotary_pos_emb=angles)[0]
        return out


class FinalNorm(torch.nn.Module):
    """[length, batch, width] -> the same."""

    def __init__(self, config: Any):
        from megatron.core.transformer.transformer_block import LayerNormImpl  # the one a GPTModel would have

        super().__init__()
        norm = LayerNormImpl(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self.decoder = ModuleDict({"final_layernorm": norm})

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.decoder["final_layernorm"](stream)
        return out


class Output(torch.nn.Module):
    """[length, batch, width] -> logits [length, batch, this rank's part of the vocabulary].

    ``tied``: by a copy of the word embedding, which DeepSpeed keeps equal to the first stage's: it sets it at the start
    and adds the gradients of the two at every step.
    """

    def __init__(self, config: Any, rows: int, tied: bool):
        from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding

        super().__init__()
        if tied:
            words = VocabParallelEmbedding(rows, config.hidden_size, init_method=config.init_method, config=config)
            self.embedding = ModuleDict({"word_embeddings": words})
        self.output_layer = ColumnParallelLinear(
            config.hidden_size,
            rows,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_weight_param_allocation=tied,
        )
        self.tied = tied

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        weight: Any = self.embedding["word_embeddings"].weight if self.tied else None
        logits: torch.Tensor = self.output_layer(stream, weight=weight)[0]
        return logits


def mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats per token; logits [length, batch, part], labels [batch, length] int64."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    loss: torch.Tensor = vocab_parallel_cross_entropy(logits, labels.transpose(0, 1).contiguous()).mean()
    return loss


def micro_batch(batch: Mapping[str, torch.Tensor]) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A batch of tokens, position_ids and labels by name, each [batch, length], as the pipeline takes it."""
    return (batch["tokens"], batch["position_ids"]), batch["labels"]


# -- the model -------------------------------------------------------------------------------------------------------


class PipelineGPT(PipelineModule):
    """One rank's stage of the model. Made by `build_pipeline`."""

    def __init__(self, specs: Sequence[LayerSpec], config: Any, tied: bool, topology: Any):
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed lists the layers there
            super().__init__(specs, topology=topology, loss_fn=mean_loss, partition_method=f"type:^{Layer.__name__}$")
        self.config = config
        parts = [part for part in self.modules() if isinstance(part, (Embedding, Layer, FinalNorm, Output))]
        self._gpt = (StageOfGPT(parts, config, tied),)  # in a tuple: not to be found as a submodule under other names

    @property
    def gpt(self) -> "StageOfGPT":
        """This stage under the names of a GPTModel; the same modules and parameters."""
        return self._gpt[0]


class StageOfGPT(torch.nn.Module):
    """A stage's modules as a GPTModel has them: embedding, decoder.layers, decoder.final_layernorm, output_layer.

    What a stage does not have is absent. For reading and for CompleteP, not for a forward pass.
    """

    def __init__(self, parts: Sequence[torch.nn.Module], config: Any, tied: bool):
        super().__init__()
        self.config, self.share_embeddings_and_output_weights = config, tied
        self.decoder = torch.nn.Module()
        self.decoder.layers = _Layers()
        for part in parts:
            for name in ("embedding", "output_layer"):
                if hasattr(part, name):
                    setattr(self, name, getattr(part, name))
            if isinstance(part, Layer):
                self.decoder.layers.add_module(part.index, part.decoder["layers"][part.index])  # type: ignore[index]
            elif isinstance(part, FinalNorm):
                self.decoder.final_layernorm = part.decoder["final_layernorm"]


class _Layers(torch.nn.Module):
    """Modules under the numbers they have in the whole model, which need not begin with 0 as in a ModuleList."""

    def __iter__(self) -> Iterator[torch.nn.Module]:
        return self.children()


def build_pipeline(cfg: GPTConfig, vocab_size: int, config: Any, spec: Any) -> PipelineGPT:
    """This rank's stage, of ``num_layers / pipeline_parallel`` layers, with parameters of ``config.params_dtype``.

    The first stage also has the embeddings, the last one the final norm and the output layer. ``config``, ``spec``: as
    for `gpt.build_gpt`. Every rank of the job calls it.

    Weights are those that `gpt.build_gpt` would draw from the same seed: the layers are drawn in its order, and a
    stage draws those of the stages before it as well, dropping one after the other. So they do not depend on the number
    of stages; what else they depend on, `gpt.transformer_config` says.

    Raises:
        StateError: the process groups do not fit ``cfg``.
        ConfigError: a vocabulary below 1, or a norm on queries and keys with tensor parallelism.
    """
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
    from megatron.core import parallel_state

    check_build(cfg, vocab_size)
    if cfg.qk_norm and cfg.tensor_parallel > 1:
        raise ConfigError(
            f"qk_norm with tensor_parallel = {cfg.tensor_parallel}: each rank sees the gradients of its own heads "
            "only, and DeepSpeed does not sum them, so the norms on queries and keys would drift apart; use "
            "tensor_parallel 1, or no qk_norm"
        )
    model = PipelineGPT(
        _specs(cfg, padded_vocab_size(vocab_size, cfg.tensor_parallel), config, spec),
        config,
        cfg.tie_embeddings,
        # ranks in the order pipe, data, tensor, from the slowest to the fastest, as megatron's groups have them
        PipeModelDataParallelTopology(
            num_pp=cfg.pipeline_parallel,
            num_mp=cfg.tensor_parallel,
            num_dp=parallel_state.get_data_parallel_world_size(),
        ),
    )
    for parameter in model.parameters():
        # torch's norms and position embeddings are float32 whatever params_dtype says.
        parameter.data = parameter.data.to(config.params_dtype)
    return model


def _specs(cfg: GPTConfig, rows: int, config: Any, spec: Any) -> list[LayerSpec]:
    rotary = _rotary(config) if cfg.position_embedding == "rope" else None
    tied = functools.partial(TiedLayerSpec, _TIED, tied_weight_attr=[_WORDS])
    end: Any = tied if cfg.tie_embeddings else LayerSpec
    return _drawn_in_turn(
        [
            end(Embedding, config, cfg, rows),
            *(LayerSpec(Layer, config, spec, index, rotary) for index in range(cfg.num_layers)),
            LayerSpec(FinalNorm, config),
            end(Output, config, rows, cfg.tie_embeddings),
        ]
    )


def _rotary(config: Any) -> torch.nn.Module:
    """One table of angles for all layers, as a GPTModel has it; it holds no parameters."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    table: torch.nn.Module = RotaryEmbedding(
        config.kv_channels,
        1.0,
        rotary_interleaved=config.rotary_interleaved,
        use_cpu_initialization=config.use_cpu_initialization,
    )
    return table


def _drawn_in_turn(specs: list[LayerSpec]) -> list[LayerSpec]:
    """The same specs; the first one that is built on a rank builds, and drops, all before it.

    Random numbers are then taken as if one rank built the whole model.
    """
    waiting = list(specs)

    def build(spec: LayerSpec, log: bool = False) -> torch.nn.Module:
        while any(spec is other for other in waiting):
            if waiting[0] is not spec:
                type(waiting[0]).build(waiting[0])
            waiting.pop(0)
        made: torch.nn.Module = type(spec).build(spec, log)
        return made

    for spec in specs:
        spec.build = functools.partial(build, spec)
    return specs


# -- names -----------------------------------------------------------------------------------------------------------


def gpt_name(name: str) -> str:
    """The name in a GPTModel of a parameter or module of a `PipelineGPT`."""
    return _PREFIX.sub("", name, count=1) if _PREFIX.match(name) else name
