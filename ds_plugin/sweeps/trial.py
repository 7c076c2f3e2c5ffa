"""One small training run of a megatron-core GPT under a recipe, in this process: what the sweeps are made of."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ds_plugin.completep import rules
from ds_plugin.completep.config import WITHOUT_EFFECT, CompletePConfig
from ds_plugin.completep.model import ratios_of
from ds_plugin.completep.param_groups import build_param_groups
from ds_plugin.completep.rules import Recipe
from ds_plugin.core.errors import ConfigError
from ds_plugin.core.settings_model import parse_section
from ds_plugin.sweeps.text import Text, modules
from megatron_patches import megatron_on_cpu
from megatron_patches.completep.layers import finish, prepare
from megatron_patches.models import gpt


@dataclass(frozen=True)
class Base:
    """The base model of a sweep and what all of its runs share. Lengths are in tokens."""

    width: int = 64
    depth: int = 2
    head_dim: int = 16
    alpha: float = 1.0
    init_std: float = 0.02
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float = 1.0
    batch: int = 8
    length: int = 64
    vocab: int = 256  # bytes


@dataclass(frozen=True)
class Shape:
    """Width, depth and recipe of one run."""

    recipe: Recipe
    width: int
    depth: int

    def same_as(self, base: Base) -> "Shape":
        """The plainest recipe that makes the same training run of this width and depth, bit for bit.

        At the base's width `mup` scales nothing, nor does `completep` at the base's depth beyond what `mup` does.
        """
        if self.recipe == "completed_p":
            return self
        ratios = rules.effective(self.recipe, rules.Ratios(self.width / base.width, self.depth / base.depth))
        plain: Recipe = "completep" if ratios.m_L != 1 else "mup" if ratios.m_N != 1 else "standard"
        return Shape(plain, self.width, self.depth)


@dataclass(frozen=True)
class Seeded(Shape):
    """What was found in a run of a shape from one seed on."""

    seed: int

    @property
    def shape(self) -> Shape:
        """Whose run it was."""
        return Shape(self.recipe, self.width, self.depth)


def start_host() -> None:
    """Make this process a world of one rank, on the GPU if there is one; does nothing when there is a world already."""
    if not torch.cuda.is_available():
        megatron_on_cpu.enable()
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def settings(shape: Shape, base: Base) -> tuple[CompletePConfig, gpt.GPTConfig]:
    """The recipe and the model. Raises ConfigError when they do not fit."""
    if shape.width % base.head_dim:
        raise ConfigError(f"width {shape.width} is not divisible by --head-dim {base.head_dim}; write a multiple of it")
    bases = {"base_width": base.width, "base_depth": base.depth, "base_head_dim": base.head_dim, "alpha": base.alpha}
    kept = {name: value for name, value in bases.items() if name not in WITHOUT_EFFECT[shape.recipe]}
    section = parse_section(CompletePConfig, "completep", {"enabled": True, "recipe": shape.recipe, **kept})
    sizes = {"num_attention_heads": shape.width // base.head_dim, "seq_length": base.length, "init_std": base.init_std}
    model = {"num_layers": shape.depth, "hidden_size": shape.width, **sizes}
    return section, parse_section(gpt.GPTConfig, "model", model)


def build(shape: Shape, base: Base, seed: int) -> tuple[torch.nn.Module, Callable[[float], torch.optim.AdamW]]:
    """A fresh fp32 model, and a function from the base learning rate to its AdamW. Raises as `settings`."""
    section, cfg = settings(shape, base)
    gpt.initialize_parallel(cfg, seed)
    config, spec = prepare(gpt.transformer_config(cfg, torch.float32), gpt.layer_spec(cfg), section)
    model = gpt.build_gpt(cfg, base.vocab, config, spec)
    roles = finish(model, section)

    def adamw(lr: float) -> torch.optim.AdamW:
        adam: dict[str, Any] = {"lr": lr, "betas": base.betas}
        given = {**adam, "weight_decay": base.weight_decay, "eps": base.eps}
        groups = build_param_groups(model, roles, ratios_of(config, section), section, **given)
        return torch.optim.AdamW(groups, **adam)

    return model, adamw


def text_batches(base: Base, seed: int, text: Text | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (tokens, labels), [batch, length] int64, from random places of a text (None: `modules`)."""
    data = (text or modules()).read()
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(data) - base.length - 1, (base.batch,), generator=generator)
        window = torch.stack([data[s : s + base.length + 1] for s in starts.tolist()]).long()
        yield window[:, :-1], window[:, 1:]


def step(model: Any, optimizer: torch.optim.Optimizer, batch: tuple[torch.Tensor, torch.Tensor], clip: float) -> float:
    """One optimizer step; the batch's loss in nats per token before it."""
    loss = loss_of(model, batch)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.item()


def loss_of(model: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean loss of one batch."""
    device = next(model.parameters()).device
    tokens, labels = (t.to(device) for t in batch)
    positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    return model(tokens, positions, None, labels=labels).mean()
