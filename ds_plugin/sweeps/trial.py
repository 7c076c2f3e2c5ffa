"""One small training run under a recipe, in this process: what the sweeps are made of."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ds_plugin.completep import rules
from ds_plugin.completep.config import WITHOUT_EFFECT, CompletePConfig
from ds_plugin.completep.rules import Recipe
from ds_plugin.core.errors import ConfigError
from ds_plugin.core.settings_model import parse_section
from ds_plugin.sweeps.text import Text, modules

Batch = tuple[torch.Tensor, torch.Tensor]  # tokens and labels, [batch, length] int64


@dataclass(frozen=True)
class Base:
    """The base model of a sweep and what all of its runs share. Lengths are in tokens; ``head_dim``: Megatron's."""

    width: int = 64
    depth: int = 2
    head_dim: int = 16
    alpha: float = 1.0
    init_std: float | None = None  # the model's own
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float = 1.0
    batch: int = 8
    length: int = 64
    vocab: int = 256  # bytes
    section: dict[str, Any] = field(default_factory=dict)  # settings of ``completep`` that every run has


@dataclass(frozen=True)
class Shape:
    """Width, depth and recipe of one run; ``experts``: its `Mixture` where that is not the base's."""

    recipe: Recipe
    width: int
    depth: int
    experts: str = field(default="", kw_only=True)

    def __str__(self) -> str:
        others = f" experts {self.experts}" if self.experts else ""
        return f"{self.recipe} width {self.width} depth {self.depth}{others}"

    def same_as(self, base: Base) -> "Shape":
        """The plainest recipe that makes the same training run of these sizes, bit for bit.

        With the base's width and experts `mup` scales nothing, nor does `completep` at the base's depth beyond that.
        """
        if self.recipe == "completed_p" or base.section:  # the plainer one may refuse its settings, or not react
            return self
        ratios = rules.effective(self.recipe, rules.Ratios(self.width / base.width, self.depth / base.depth))
        scaled = ratios.m_N != 1 or (self.experts and self.recipe != "standard")
        plain: Recipe = "completep" if ratios.m_L != 1 else "mup" if scaled else "standard"
        return Shape(plain, self.width, self.depth, experts=self.experts)


@dataclass(frozen=True)
class Seeded(Shape):
    """What was found in a run of a shape from one seed on."""

    seed: int

    @property
    def shape(self) -> Shape:
        """Whose run it was."""
        return Shape(self.recipe, self.width, self.depth, experts=self.experts)


def section_of(shape: Shape, base: Base, base_head_dim: int | None, **more: Any) -> CompletePConfig:
    """The recipe of a run; ``more``: settings of the section. Raises ConfigError: the base model's sizes do not fit."""
    bases = {"base_width": base.width, "base_depth": base.depth, "alpha": base.alpha, "base_head_dim": base_head_dim}
    kept = {name: value for name, value in bases.items() if name not in WITHOUT_EFFECT[shape.recipe]}
    given = {"enabled": True, "recipe": shape.recipe, **kept, **more}
    if twice := sorted(given.keys() & base.section.keys()):
        raise ConfigError(f"--section: {twice[0]} is the sweep's own; leave it out, or use its option")
    return parse_section(CompletePConfig, "completep", {**given, **base.section})


class Trial(NamedTuple):
    """A fresh fp32 model. ``optimizer``: of the base learning rate; ``loss``: of a batch, in nats per token; ``clip``:
    clips its gradients; ``watched``: the modules of the coordinate check's `LAYERS`, whose outputs are ``scaled``."""

    model: torch.nn.Module
    optimizer: Callable[[float], Any]  # of torch, or several as one
    loss: Callable[[Batch], torch.Tensor]
    clip: Callable[[], object]
    watched: Sequence[torch.nn.Module]
    scaled: Sequence[float]


def text_batches(base: Base, seed: int, text: Text | None = None) -> Iterator[Batch]:
    """Endless (tokens, labels), [batch, length] int64, from random places of a text (None: `modules`)."""
    data = (text or modules()).read()
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(data) - base.length - 1, (base.batch,), generator=generator)
        window = torch.stack([data[s : s + base.length + 1] for s in starts.tolist()]).long()
        yield window[:, :-1], window[:, 1:]


def grouped(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, list[Any]]:
    """The values of each key; all stay in their order."""
    found: dict[Any, list[Any]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


def step(trial: Trial, optimizer: Any, batch: Batch) -> float:
    """One optimizer step; the batch's loss in nats per token before it."""
    loss = trial.loss(batch)
    optimizer.zero_grad()
    loss.backward()
    trial.clip()
    optimizer.step()
    return loss.item()
