"""What the methods take from a rank, as pure arithmetic: parameters, bytes held, bytes moved, seconds.

`python -m ds_plugin plan` and `benchmarks/scaling.py` print what this module works out. Nothing here knows a process.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ds_plugin.weight_averaging import memory, modes
from ds_plugin.weight_averaging.config import WeightAveragingConfig
from megatron_patches.completep.rules import Role
from megatron_patches.gpt import GPTConfig

FP32 = 4  # bytes
#: what each rank sends for a report of the stability instruments every 20 steps: 20 losses, their squares, two counts
#: for each and 6 numbers, of which 2 are Adam's variance
REPORT_BYTES = 8 * (4 * 20 + 6)


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

    @property
    def on_node(self) -> int:
        """Ranks of one node."""
        return min(self.ranks, self.per_node)


@dataclass(frozen=True)
class Rates:
    """Per rank. ``measured`` says where they are from."""

    snapshot: float  # seconds per byte of fp32 masters that go to the host memory
    looked_at: float  # the same, where a snapshot must look for what is not finite (fp32 without ZeRO)
    report: float  # seconds per byte of Adam's second moment that the stability instruments read
    report_base: float  # seconds of a report whatever is read and whoever takes part: its collective is queued
    report_rank: float  # seconds of a report for each rank of the job, whose numbers every rank reads
    multiply: float  # seconds per byte of an activation that is multiplied (read and written)
    averaging_step: float  # seconds of bookkeeping in every step
    warmup_step: float
    flops: float  # operations per second, as training achieves them
    measured: str


#: benchmarks/scaling_measure.py measured it: docs/results/scaling/measured.json, to two digits
CPU = Rates(
    snapshot=6.2e-11,
    looked_at=9.3e-11,
    report=2.2e-10,
    report_base=0.00019,
    report_rank=3.8e-08,
    multiply=6e-11,
    averaging_step=2.1e-06,
    warmup_step=4.4e-05,
    flops=18000000000.0,
    measured="measured on 2 CPU cores, one thread (docs/results/scaling)",
)


def gpu(link: float = 25e9, bandwidth: float = 2e12, flops: float = 400e12) -> Rates:
    """A GPU's, assumed: ``link`` to the host (PCIe 4.0 x16), ``bandwidth`` of its own memory, bytes per second.

    What the host's processor does in every step is taken from `CPU`. A snapshot is not looked at by the training
    thread; a report reads, a multiplication reads and writes.
    """
    return Rates(
        snapshot=1 / link,
        looked_at=1 / link,
        report=1 / bandwidth,
        report_base=CPU.report_base,
        report_rank=CPU.report_rank,
        multiply=2 / bandwidth,
        averaging_step=CPU.averaging_step,
        warmup_step=CPU.warmup_step,
        flops=flops,
        measured=f"assumed, not measured: {link:.3g} B/s to the host, {bandwidth:.3g} B/s on the device, {flops:.3g} "
        "operations/s; the time on the host's processor is measured",
    )


# -- parameters ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Parameters of one role and place: ``elements`` in the whole model, or in one layer of it."""

    role: Role
    elements: int
    divided: bool  # over the tensor-parallel ranks; else each has all of them
    place: str  # block: in every layer; first, last: in the first or last pipeline stage


def parts(model: GPTConfig, padded_vocab: int, *, folded: bool = False) -> list[Part]:
    """Every parameter of megatron-core's GPTModel. ``folded``: what ends a residual branch has a role of its own."""
    h, f = model.hidden_size, model.ffn_size
    head = h // model.num_attention_heads
    qkv = h + 2 * model.query_groups * head
    gated = 2 * f if model.activation == "swiglu" else f
    norm = 2 if model.normalization == "LayerNorm" else 1
    out, out_bias = (Role.BRANCH_OUT, Role.BRANCH_OUT_BIAS) if folded else (Role.HIDDEN, Role.BLOCK_BIAS)
    found = [
        Part(Role.EMBEDDING, padded_vocab * h, True, "first"),
        Part(Role.HIDDEN, h * (qkv + gated), True, "block"),
        Part(out, (h + f) * h, True, "block"),
        Part(Role.BLOCK_NORM, 2 * norm * h, False, "block"),
    ]
    if model.position_embedding == "learned":
        found.append(Part(Role.EMBEDDING, model.seq_length * h, False, "first"))
    if model.qk_norm:
        found.append(Part(Role.QK_NORM, 2 * norm * head, False, "block"))
    if model.bias:
        found.append(Part(Role.BLOCK_BIAS, qkv + gated, True, "block"))
        found.append(Part(out_bias, 2 * h, False, "block"))
    last_norm = Role.LOGIT_NORM if folded and model.tie_embeddings else Role.FINAL_NORM
    found.append(Part(last_norm, norm * h, False, "last"))
    if not model.tie_embeddings:
        found.append(Part(Role.UNEMBEDDING, padded_vocab * h, True, "last"))
    return found


def parameters(found: list[Part], layers: int) -> dict[Role, int]:
    """By role, of the whole model."""
    total: dict[Role, int] = {}
    for part in found:
        total[part.role] = total.get(part.role, 0) + part.elements * (layers if part.place == "block" else 1)
    return total


def multiplying(found: list[Part], model: GPTConfig) -> int:
    """Parameters of the whole model that multiply: all but embeddings that are looked up only."""
    counts = parameters(found, model.num_layers)
    word = next(part.elements for part in found if part.role is Role.EMBEDDING and part.divided)
    return sum(counts.values()) - counts[Role.EMBEDDING] + (word if model.tie_embeddings else 0)


def local_parameters(found: list[Part], layers: int, layout: Layout, *, tied: bool) -> dict[Role, int]:
    """By role, on a rank of the pipeline stage that holds the most. A tied word embedding is on both end stages."""
    stages = []
    for place in ("first", "last") if layout.pipeline > 1 else ("",):
        held: dict[Role, int] = {}
        for part in found:
            word = tied and part.role is Role.EMBEDDING and part.divided
            if part.place not in ("block", place) and place and not word:
                continue
            count = part.elements * (layers // layout.pipeline if part.place == "block" else 1)
            held[part.role] = held.get(part.role, 0) + (count // layout.tensor if part.divided else count)
        stages.append(held)
    return max(stages, key=lambda held: sum(held.values()))


# -- averaging -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Averaging:
    """Of one rank, in bytes. ``held`` and ``files`` with what pinning rounds up, ``exact`` without."""

    snapshot: int
    exact: int
    held: int
    files: int


def averaging(config: WeightAveragingConfig, masters: Mapping[str, int], *, pinned: bool) -> Averaging:
    """``masters``: fp32 elements of this rank by optimizer group, each one flat tensor. ``pinned``: they are on a GPU.

    torch rounds a pinned allocation up to a power of two; several tensors lie in one where that wastes less (`memory`).
    """
    masters_bytes = {dtype: dtype.itemsize * sum(masters.values()) for dtype in (torch.float32, torch.bfloat16)}
    spare, kept = [torch.float32], modes.buffers(config)
    as_spare = [*kept, *spare] if config.storage == "pinned" else spare
    other = 0 if config.storage == "pinned" else sum(masters_bytes[dtype] for dtype in kept)
    if pinned:
        held = memory.pinned(memory.pieces(list(masters.values()), as_spare))
    else:
        held = sum(masters_bytes[dtype] for dtype in as_spare)
    in_files = config.storage == "files"
    return Averaging(
        snapshot=masters_bytes[torch.float32],
        exact=sum(masters_bytes[dtype] for dtype in [*kept, *spare]),
        held=held if in_files else held + other,
        files=other if in_files else 0,
    )


def shares(local: Mapping[Role, int], partitions: int, *, by_role: bool) -> dict[str, int]:
    """Elements of this rank's fp32 masters by optimizer group: one for each role under CompleteP, else two.

    ``partitions``: data-parallel ranks that divide them (1 without ZeRO). Rounded up; hosts pad a little more.
    """
    groups: dict[str, int] = {}
    for role, count in local.items():
        matrices = role in (Role.EMBEDDING, Role.HIDDEN, Role.BRANCH_OUT, Role.UNEMBEDDING)
        name = role.value if by_role else ("decayed" if matrices else "not decayed")
        groups[name] = groups.get(name, 0) + count
    return {name: -(-count // partitions) for name, count in groups.items()}


# -- time ------------------------------------------------------------------------------------------------------------


def averaging_seconds(rates: Rates, snapshot: int, interval: int, *, looked_at: bool = False) -> float:
    """Of a step, on average: nothing of a snapshot is counted as hidden behind the computation."""
    return rates.averaging_step + snapshot * (rates.looked_at if looked_at else rates.snapshot) / interval


def warmup_seconds(rates: Rates, second_moment: int | None, interval: int, ranks: int) -> float:
    """Of a step, on average. ``second_moment``: bytes on this rank, read once in ``interval`` steps (0: it is not asked
    for); None: no reports.

    The time that a report's collective is under way is not in it, what the ranks do before and after it is.
    """
    if second_moment is None:
        return rates.warmup_step
    return rates.warmup_step + (second_moment * rates.report + rates.report_base + ranks * rates.report_rank) / interval


def multiplied_bytes(model: GPTConfig, tokens: int, layout: Layout, width: int) -> int:
    """Bytes of activations that CompleteP's forward mode multiplies in a step of ``tokens`` tokens on this rank.

    The branches' multipliers ride on the residual additions of the forward pass; the backward pass multiplies the
    gradient of each of the two branches of a layer once. The last layer's MLP and the output layer have theirs on what
    enters a matrix, forward and backward. ``width``: bytes of an element.
    """
    branches = 2 * (model.num_layers // layout.pipeline) - 1
    return ((branches + 2) * model.hidden_size + 2 * model.ffn_size // layout.tensor) * tokens * width


def step_seconds(rates: Rates, matrices: int, tokens: int, ranks: int) -> float:
    """6 x parameters x tokens operations (Kaplan et al., arXiv 2001.08361), attention itself left out."""
    return 6 * matrices * tokens / (ranks * rates.flops)
