"""A small GPT for DeepSpeed's PipelineEngine, built of megatron-core's layers and cut along PIPE x DATA x TENSOR.

Every layout trains the same model on the same batches: weights are drawn for each parameter as a whole and then cut,
and a step takes the same BATCH micro-batches however many data-parallel ranks share them.
"""

import dataclasses
import zlib

import torch

from megatron_patches import megatron_on_cpu
from megatron_patches.models import gpt
from tests.distributed import plain

VOCAB, LENGTH, MICRO = 64, 16, plain.MICRO
BATCH = 4  # micro-batches a step, over all data-parallel ranks and the accumulation
# A clip that the norm exceeds, and an eps of the gradients' order: without it Adam would forget a wrong clip.
LR, CLIP, EPS = 0.01, 1.0, 1e-2
SIZE = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": LENGTH}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the three axes of parallelism."""

    pipe: int = 1
    data: int = 1
    tensor: int = 1

    @property
    def ranks(self):
        return self.pipe * self.data * self.tensor

    @property
    def accumulation(self):
        """Micro-batches a step that each pipeline takes: its gradient accumulation steps."""
        return BATCH // self.data


# -- the model -------------------------------------------------------------------------------------------------------


# Classes, because DeepSpeed builds a layer on the ranks of its stage only; each takes what the one before it returns.
class Embedding(torch.nn.Module):
    """(tokens, positions) [batch, length] -> [length, batch, width]."""

    def __init__(self, config):
        from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding

        super().__init__()
        self.embedding = LanguageModelEmbedding(config, VOCAB, LENGTH)

    def forward(self, inputs):
        return self.embedding(*inputs)


class Layer(torch.nn.Module):
    """[length, batch, width] -> the same; the causal mask is made from the scores' own size."""

    def __init__(self, config, spec, number):
        from megatron.core.transformer.spec_utils import build_module

        super().__init__()
        self.layer = build_module(spec, config=config, layer_number=number)

    def forward(self, stream):
        return self.layer(stream, attention_mask=None)[0]


class Head(torch.nn.Module):
    """[length, batch, width] -> logits [length, batch, this rank's part of the vocabulary]."""

    def __init__(self, config):
        from megatron.core.tensor_parallel import ColumnParallelLinear

        super().__init__()
        self.norm = torch.nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.output = ColumnParallelLinear(
            config.hidden_size, VOCAB, config=config, init_method=config.init_method, bias=False
        )

    def forward(self, stream):
        return self.output(self.norm(stream))[0]


def loss_of(logits, labels):
    """Mean over all tokens of the cross entropy; logits [length, batch, part], labels [batch, length]."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return vocab_parallel_cross_entropy(logits, labels.t().contiguous()).mean()


def build(layout, dtype=torch.float32, size=None, **settings):
    """This rank's stage as a PipelineModule, in a world of `layout.ranks`.

    size: changes to SIZE (no biases or another width, say); settings: PipelineModule's own.
    """
    from deepspeed.pipe import LayerSpec, PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
    from megatron.core import parallel_state

    megatron_on_cpu.enable()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(layout.tensor, layout.pipe)
    cfg = gpt.GPTConfig.model_validate({**SIZE, **(size or {}), "tensor_parallel": layout.tensor})
    gpt.initialize_parallel(cfg, 1234)
    # Its pipeline size stays 1: megatron would add this stage's offset to the layer numbers, which are global here.
    config = gpt.transformer_config(cfg, dtype)
    model = PipelineModule(
        [
            LayerSpec(Embedding, config),
            *(LayerSpec(Layer, config, gpt.layer_spec(cfg), number) for number in range(1, cfg.num_layers + 1)),
            LayerSpec(Head, config),
        ],
        # Rank order pipe, data, tensor, from the slowest to the fastest: megatron's default order too.
        topology=PipeModelDataParallelTopology(num_pp=layout.pipe, num_mp=layout.tensor, num_dp=layout.data),
        loss_fn=loss_of,
        partition_method="uniform",
        **settings,
    )
    draw_weights(model)
    return model.to(dtype)


def draw_weights(model):
    """Overwrite each parameter with this rank's part of a whole one, drawn from its name alone.

    A PipelineModule names its layers by their index in the whole model, so names are the same in every layout.
    """
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            cut = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
            shape = [size * ranks if dim == cut else size for dim, size in enumerate(parameter.shape)]
            whole = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            if "norm" in name and name.endswith("weight"):
                whole += 1
            parameter.copy_(whole if cut is None else whole.chunk(ranks, cut)[rank])


def deepspeed_config(layout, zero=0, precision="fp32", **sections):
    optimizer = {"lr": LR, "weight_decay": 0.1, "eps": EPS, "torch_adam": True}
    # Other schedulers start at 0: one step that changes nothing.
    warmup = {"warmup_min_lr": LR / 4, "warmup_max_lr": LR, "warmup_num_steps": 3, "warmup_type": "linear"}
    config = {
        "gradient_clipping": CLIP,
        "optimizer": {"type": "AdamW", "params": optimizer},
        "scheduler": {"type": "WarmupLR", "params": warmup},
    }
    return plain.deepspeed_config(zero, precision, layout.accumulation, **{**config, **sections})


def make(layout, initialize, zero=0, precision="fp32", sections=None, **settings):
    """An engine by `initialize`, deepspeed's or ds_plugin's; `sections` join the JSON, `settings` go to `build`."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = build(layout, dtype, **settings)
    return initialize(model=model, config=deepspeed_config(layout, zero, precision, **(sections or {})))[0]


def weights(engine):
    """This rank's parameters by name: (the dimension that tensor parallelism cuts or None, the value)."""
    return {
        name: (p.partition_dim if getattr(p, "tensor_model_parallel", False) else None, p.detach().clone())
        for name, p in engine.module.named_parameters()
    }


def whole_weights(layout, by_rank):
    """Every rank's `weights` put together by name; replicas that are not bitwise equal fail."""
    found = {}
    for first in range(0, layout.ranks, layout.tensor):
        group = by_rank[first : first + layout.tensor]
        for name, (cut, value) in group[0].items():
            parts = [rank[name][1] for rank in group]
            if cut is None:
                assert all(torch.equal(part, value) for part in parts), f"{name} drifted across tensor-parallel ranks"
            else:
                value = torch.cat(parts, cut)
            assert torch.equal(found.setdefault(name, value), value), f"{name} drifted across data-parallel ranks"
    return found


# -- its data --------------------------------------------------------------------------------------------------------


def micro_batch(index, rank=0, ranks=1):
    """The `index`-th micro-batch of data-parallel rank `rank`: ((tokens, positions), labels), each [MICRO, LENGTH].

    Whatever `ranks` is, the ranks' first n micro-batches together are the first n * ranks of one rank.
    """
    generator = torch.Generator().manual_seed(1000 + index * ranks + rank)
    # An eighth of the vocabulary, so that there is something to learn.
    tokens = torch.randint(0, VOCAB // 8, (MICRO, LENGTH + 1), generator=generator)
    positions = torch.arange(LENGTH).expand(MICRO, -1)
    return (tokens[:, :-1], positions), tokens[:, 1:]


def shorten(batch, length):
    """The first `length` tokens of a micro-batch."""
    (tokens, positions), labels = batch
    return (tokens[:, :length], positions[:, :length]), labels[:, :length]


def batches(engine, first=0, length=LENGTH):
    """An endless iterator over this rank's micro-batches from the `first`-th on; None on middle stages."""
    if not (engine.is_first_stage() or engine.is_last_stage()):
        return None
    rank, ranks = engine.grid.get_data_parallel_rank(), engine.grid.get_data_parallel_world_size()

    def generate(index):
        while True:
            yield shorten(micro_batch(index, rank, ranks), length)
            index += 1

    return generate(first)


def train(engine, steps, after_step=None):
    """Train from the engine's step on, at full length; the losses of every step as floats, the same on all ranks."""
    data, losses = batches(engine, engine.global_steps * engine.gradient_accumulation_steps()), []
    for _ in range(steps):
        losses.append(engine.train_batch(data).item())
        if after_step is not None:
            after_step(engine)
    return losses


def evaluate(engine):
    """The loss of one fixed step's worth of full-length micro-batches.

    Stages keep their buffers' shapes: call `engine.reset_activation_shape()` around it where training is shorter.
    """
    return engine.eval_batch(batches(engine, 10**6 // BATCH * engine.gradient_accumulation_steps())).item()
