"""A plain torch language model of odd sizes, and one way to train it, shared by the tests of this folder."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

import ds_plugin
from ds_plugin.weight_averaging.snapshots import stager

VOCAB, LENGTH, MICRO = 31, 16, 2

WARMUP = {"enabled": True, "start_length": 4, "end_length": LENGTH, "duration": {"steps": 8}, "multiple_of": 4}
AVERAGING = {"enabled": True, "window": 3, "interval": 2}


class TinyLM(torch.nn.Module):
    """Embedding, positions, one residual MLP, head; no size divides by 2 or 3 ranks."""

    def __init__(self, width=13):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB, width)
        self.positions = torch.nn.Parameter(torch.randn(LENGTH, width) * 0.02)
        self.inner = torch.nn.Linear(width, 37)
        self.outer = torch.nn.Linear(37, width)
        self.norm = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, VOCAB, bias=False)

    def forward(self, input_ids, labels):
        x = self.embedding(input_ids) + self.positions[: input_ids.shape[1]]
        x = x + self.outer(F.gelu(self.inner(self.norm(x))))
        return F.cross_entropy(self.head(x).float().flatten(0, 1), labels.flatten())


class Experts(TinyLM):
    """Two experts of DeepSpeed's, one on each rank of two."""

    def __init__(self):
        from deepspeed.moe.layer import MoE

        super().__init__()
        self.moe = MoE(VOCAB, torch.nn.Linear(VOCAB, VOCAB), num_experts=2, ep_size=2, min_capacity=4)

    def forward(self, input_ids, labels):
        logits, auxiliary, _ = self.moe(self.head(self.embedding(input_ids)))
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()) + 0.01 * auxiliary


def deepspeed_config(zero=0, precision="fp32", accumulation=1, **sections):
    config = {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": zero},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1, "torch_adam": True}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 40, "warmup_num_steps": 3}},
        **sections,
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
    return config


def make(config, width=13, initialize=None, **kwargs):
    """An engine on the same initial weights whatever the layout."""
    torch.manual_seed(7)
    return (initialize or ds_plugin.initialize)(model=TinyLM(width), config=config, **kwargs)[0]


def with_experts(config, apart=True):
    """An engine on `Experts`, in param groups of their own as DeepSpeed asks for or in one with all else."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    torch.manual_seed(7)
    model = Experts()
    groups = split({"params": list(model.parameters()), "name": "all"}) if apart else model.parameters()
    config = {**config, "gradient_clipping": 0.0}
    return ds_plugin.initialize(model=model, model_parameters=groups, config=config)[0]


def micro_batch(index, rank=None):
    """The ``index``-th micro-batch of a rank: tokens and the tokens one later, [MICRO, LENGTH]."""
    rank = dist.get_rank() if rank is None else rank
    generator = torch.Generator().manual_seed(1000 * index + rank)
    tokens = torch.randint(0, VOCAB, (MICRO, LENGTH + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def train(engine, steps, after_step=None):
    """Train from the engine's step on; the losses of every micro-batch as floats."""
    losses = []
    accumulation = engine.gradient_accumulation_steps()
    engine.train()
    for _ in range(steps):
        index = engine.global_steps * accumulation
        for micro in range(accumulation):
            loss = engine(*micro_batch(index + micro))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        if after_step is not None:
            after_step(engine)
    return losses


class LateCopies:
    """Stands in for the averager's copies from a GPU, on masters in CPU memory: a snapshot is read as late as it may
    be, at the fence before the next step or when somebody waits for it. Without the fence it is another step's."""

    def __init__(self):
        self._job = None

    def begin(self, dst, src, then):
        self.drain()
        self._job = dst, src, then

    def wait_before_step(self):
        self.drain()

    def drain(self):
        job, self._job = self._job, None
        if job is not None:
            dst, src, then = job
            for target, source in zip(dst, src, strict=True):
                target.copy_(source)
            then()


def copy_late():
    """From now on the averagers of this process copy so."""
    stager.copies_from = lambda tensors: LateCopies()


def evaluate(engine):
    engine.eval()
    with torch.no_grad():
        loss = engine(*micro_batch(10**6)).item()
    engine.train()
    return loss


def collectives(function):
    """The collectives that `function` makes on this rank, whoever calls them and how: (name, elements of the input)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        function()
    found = [event for event in profile.events() if event.name.startswith("c10d::")]
    return [(event.name, sum(math.prod(shape) for shape in event.input_shapes if shape)) for event in found]
