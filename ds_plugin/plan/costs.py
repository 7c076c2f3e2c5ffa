"""What a model and the methods take from a rank, as pure arithmetic: parameters, bytes, seconds."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ds_plugin.weight_averaging import modes
from ds_plugin.weight_averaging.config import WeightAveragingConfig
from ds_plugin.weight_averaging.snapshots import memory
from megatron_patches.models.gpt import GPTConfig


@dataclass(frozen=True)
class Layout:
    """How many ranks there are, and what they divide among themselves."""

    ranks: int
    per_node: int = 8
    tensor: int = 1
    pipeline: int = 1
    context: int = 1

    @property
    def data(self) -> int:
        """Ranks that train different samples."""
        return self.ranks // (self.tensor * self.pipeline * self.context)


@dataclass(frozen=True)
class Rates:
    """Of one rank: bytes per second to CPU memory, and operations per second as training achieves them."""

    link: float
    flops: float


#: a GPU's are assumed: PCIe 4.0 x16, 40 % of an H100's bf16 operations. The CPU's were measured, to two digits:
#: benchmarks/scaling.py --measure, docs/results/scaling/measured.json
RATES = {"gpu": Rates(link=25e9, flops=400e12), "cpu": Rates(link=7.3e9, flops=20e9)}


def tensors(model: GPTConfig, vocab: int) -> Iterator[tuple[str, int, int, bool]]:
    """Of megatron-core's GPTModel, whole: a parameter's name, its size, how many there are of it, and whether
    tensor-parallel ranks divide it: matrices and the biases of their columns."""
    h, head, layer = model.hidden_size, model.kv_channels, "decoder.layers.0."
    up = model.ffn_size * (2 if model.activation == "swiglu" else 1)
    for name, fan_in, fan_out, by_columns in (
        ("self_attention.linear_qkv", h, h + 2 * model.query_groups * head, True),
        ("self_attention.linear_proj", h, h, False),
        ("mlp.linear_fc1", h, up, True),
        ("mlp.linear_fc2", model.ffn_size, h, False),
    ):
        yield f"{layer}{name}.weight", fan_in * fan_out, model.num_layers, True
        if model.bias:
            yield f"{layer}{name}.bias", fan_out, model.num_layers, by_columns
    norms = {f"{layer}input_layernorm": h, f"{layer}pre_mlp_layernorm": h, "decoder.final_layernorm": h}
    norms |= {f"{layer}self_attention.{x}_layernorm": head for x in "qk" if model.qk_norm}
    for (name, size), kind in itertools.product(norms.items(), ("weight", "bias")):
        if kind == "weight" or model.normalization == "LayerNorm":
            yield f"{name}.{kind}", size, model.num_layers if name.startswith(layer) else 1, False
    yield "embedding.word_embeddings.weight", vocab * h, 1, True
    if model.position_embedding == "learned":
        yield "embedding.position_embeddings.weight", model.seq_length * h, 1, False
    if not model.tie_embeddings:
        yield "output_layer.weight", vocab * h, 1, True


def parameters(model: GPTConfig, padded_vocab: int, layout: Layout) -> int:
    """Of `tensors`, on a rank of the pipeline stage that holds the most; with ``Layout(1)``: all. A tied word embedding
    is on both end stages."""
    held = {"embedding": 0, "decoder.layers": 0, "last": 0}
    for name, size, number, is_divided in tensors(model, padded_vocab):
        where = next((part for part in held if name.startswith(part)), "last")
        held[where] += (size // layout.tensor if is_divided else size) * number
    if layout.pipeline == 1:
        return sum(held.values())
    copied = padded_vocab * model.hidden_size // layout.tensor if model.tie_embeddings else 0
    return held["decoder.layers"] // layout.pipeline + max(held["embedding"], held["last"] + copied)


def averaging(config: WeightAveragingConfig, masters: int, *, pinned: bool) -> tuple[int, int]:
    """Bytes that averaging takes on a rank with so many fp32 master elements: in CPU memory, and in files. ``pinned``:
    the masters are on a GPU, and torch rounds what it pins up to a power of two; at most: a run packs smaller pieces,
    the copies of its param groups."""
    kept, spare = modes.buffers(config), [torch.float32]  # the average is computed into the spare one
    together, other = ([*kept, *spare], []) if config.storage == "pinned" else (spare, kept)
    in_memory = masters * sum(dtype.itemsize for dtype in together)
    if pinned:
        in_memory = memory.pinned(memory.pieces([masters], together))
    apart = masters * sum(dtype.itemsize for dtype in other)
    return (in_memory, apart) if config.storage == "files" else (in_memory + apart, 0)


def step_seconds(rates: Rates, model: GPTConfig, padded_vocab: int, tokens: int, ranks: int) -> float:
    """6 x parameters x tokens operations (arXiv 2001.08361), without attention and embeddings that are looked up."""
    looked_up = 0 if model.tie_embeddings else padded_vocab
    looked_up += model.seq_length if model.position_embedding == "learned" else 0
    multiplying = parameters(model, padded_vocab, Layout(1)) - looked_up * model.hidden_size
    return 6 * multiplying * tokens / (ranks * rates.flops)
