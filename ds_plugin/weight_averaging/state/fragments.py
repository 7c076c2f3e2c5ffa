"""Which parameters' elements lie where in a rank's shards: what resharding and publishing need to know."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ds_plugin.core.errors import ConfigError, StateError

#: what torch puts into the names of what it wraps: torch.compile, activation checkpointing, FSDP
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def plain_name(name: str) -> str:
    """A tensor's name as it was before torch wrapped the model or parts of it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model within torch's data-parallel wrappers, which begin every name with ``module.``."""
    while isinstance(model, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
        model = model.module
    return model


def plain_names(model: torch.nn.Module) -> dict[int, str]:
    """A parameter's id -> its first name, plain. Raises ConfigError: two parameters have the same then."""
    found: dict[int, str] = {}
    owners: dict[str, str] = {}
    for name, parameter in unwrapped(model).named_parameters():
        plain = found[id(parameter)] = plain_name(name)
        if (other := owners.setdefault(plain, name)) != name:
            both = f"parameters {other} and {name} are both {plain} without the names of wrappers"
            raise ConfigError(f"weight_averaging: {both} ({', '.join(WRAPPERS)}); rename one of them")
    return found


@dataclass(frozen=True)
class Fragment:
    """Elements ``start`` to ``start + count`` of a parameter lie from ``offset`` on in `MasterShards.tensors` number
    ``shard``, both seen flat. ``shape``: the whole parameter's, on this tensor- and pipeline-parallel rank."""

    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    shard: int
    offset: int


def whole(names: Iterable[tuple[str, torch.Size, int, int]]) -> list[Fragment]:
    """From (name, shape, shard, offset)."""
    return [Fragment(n, tuple(shape), 0, shape.numel(), shard, offset) for n, shape, shard, offset in names]


def check(fragments: Sequence[Fragment], shards: Sequence[torch.Tensor]) -> None:
    """Raises StateError unless all fragments lie within their shards and parameters, and none overlap in a shard."""
    ends = [0] * len(shards)
    for f in sorted(fragments, key=lambda f: (f.shard, f.offset)):
        size = torch.Size(f.shape).numel()
        fits = 0 <= f.start and f.start + f.count <= size and f.offset + f.count <= shards[f.shard].numel()
        if not fits or f.offset < ends[f.shard]:
            what = f"{f} does not fit its shard of {shards[f.shard].numel()} elements, or overlaps another"
            raise StateError(f"weight_averaging: {what}: an unknown layout; use a tested version of the framework")
        ends[f.shard] = f.offset + f.count
