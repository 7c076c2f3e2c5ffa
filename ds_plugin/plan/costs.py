"""What a model and the methods take from a rank, as pure arithmetic: parameters, bytes, seconds."""

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


def parameters(model: GPTConfig, padded_vocab: int, layout: Layout) -> int:
    """Of megatron-core's GPTModel, on a rank of the pipeline stage that holds the most; with ``Layout(1)``: all.
    Matrices and the biases of their columns are divided over the tensor-parallel ranks, norms, positions and the biases
    of rows are on each. A tied word embedding is on both end stages."""
    h, f = model.hidden_size, model.ffn_size
    head = h // model.num_attention_heads
    columns = h + 2 * model.query_groups * head + (2 * f if model.activation == "swiglu" else f)
    norm = 2 if model.normalization == "LayerNorm" else 1
    divided = h * columns + (h + f) * h + (columns if model.bias else 0)
    whole = 2 * norm * h + (2 * norm * head if model.qk_norm else 0) + (2 * h if model.bias else 0)
    layers = model.num_layers // layout.pipeline * (divided // layout.tensor + whole)
    words = padded_vocab * h // layout.tensor
    first = words + (model.seq_length * h if model.position_embedding == "learned" else 0)
    if layout.pipeline > 1:
        return layers + max(first, words + norm * h)
    return layers + first + norm * h + (0 if model.tie_embeddings else words)


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
