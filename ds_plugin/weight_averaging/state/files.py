"""What averaging holds, on disk: one safetensors file per rank, in the framework's checkpoint. Never a pickle.

A file holds the mode's buffers as flat tensors, ``<what>.<shard>``, a `Header`, and the SHA-256 of each: a checkpoint's
seals (`core.seals`) are written later, and never where a run is killed before. On the layout it was saved with a rank
reads its own file; on another one it reads from all files of its coordinate the pieces it needs (`reshard`). Each
file's tensors are tested by one of the ranks, which call `load` within `raise_on_all_ranks`: what one finds ends all.
"""

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ds_plugin.core.errors import CheckpointError
from ds_plugin.core.files import atomic_write
from ds_plugin.weight_averaging.averager import WeightAverager
from ds_plugin.weight_averaging.config import WeightAveragingConfig
from ds_plugin.weight_averaging.state import fragments
from ds_plugin.weight_averaging.state.fragments import Fragment
from ds_plugin.weight_averaging.state.reshard import READ_ELEMENTS, REMEDY, Resharded, damage, plan

FORMAT = "5"
Place = Sequence[int]  # tensor-parallel rank and pipeline stage
#: the settings of each mode that cannot change
_FIXED = {"sliding": ("deltas",), "block": ("window",), "ema": ("horizons",)}


class Header(NamedTuple):
    """What a file says of itself, as JSON."""

    rank: int
    world_size: int
    save_id: str
    coordinate: Place
    settings: dict[str, Any]  # the mode, and those that cannot change
    state: dict[str, Any]  # the mode's
    layout: str
    fragments: list[Any]  # each the values of a `Fragment`: which parameters' elements the shards are
    sha256: str  # of the tensors


def shard_name(rank: int) -> str:
    """File name of one rank's share; must not end as DeepSpeed's own files do, which its tools glob for."""
    return f"weight_averaging_rank_{rank:05d}.safetensors"


def save(
    folder: Path, averager: WeightAverager, *, rank: int, world_size: int, save_id: str, coordinate: Place = (0, 0)
) -> None:
    """Write this rank's share into the checkpoint folder, atomically. ``save_id`` marks the files of one save; ranks of
    another ``coordinate`` hold other weights under the same names. Raises StateError: the shards' layout is strange."""
    laid_out, mode, config = averager.shards.fragments(), averager.mode, averager.config
    fragments.check(laid_out, averager.masters())
    tensors = {name: tensor.view(-1) for name, tensor in mode.tensors().items()}
    settings = {key: getattr(config, key) for key in ("mode", *_FIXED[config.mode])}
    where = [astuple(fragment) for fragment in laid_out]
    place, held = (rank, world_size, save_id, coordinate), (settings, mode.state(), averager.shards.layout)
    header = json.dumps(Header(*place, *held, where, _digest(tensors))._asdict())
    metadata = {"format": FORMAT, "header": header, "header_sha256": _seal(header)}
    atomic_write(folder / shard_name(rank), lambda path: save_file(tensors, path, metadata=metadata))


def load(
    folder: Path, averager: WeightAverager, *, rank: int, world_size: int, save_id: str, coordinate: Place = (0, 0),
    saved_ranks: int | None = None,
) -> None:  # fmt: skip
    """Read this rank's share into the averager's buffers, on the ranks and the layout it was saved with or on others;
    tensor and pipeline parallelism must be the save's. Raises CheckpointError: a file is missing, unreadable, altered,
    or belongs to another rank, save or mode; or not each of this rank's elements is held exactly once. If it comes
    while the buffers are filled, no snapshot is held."""
    saved_ranks = world_size if saved_ranks is None else saved_ranks
    share = functools.cache(lambda saved: _Share(folder, rank=saved, world_size=saved_ranks, save_id=save_id))
    laid_out = averager.shards.fragments()
    fragments.check(laid_out, averager.masters())
    own = share(rank) if world_size == saved_ranks else None
    if own is not None and own.header.coordinate == list(coordinate) and own.fragments == laid_out:
        mine = tested = [own]
    else:
        files = [share(saved) for saved in range(saved_ranks)]
        mine, tested = _of_coordinate(files, coordinate), files[rank::world_size]
    header = mine[0].header
    compare(header.settings, averager.config, mine[0].path)
    for file in tested:
        file.verify()
    if header.layout == "replicated":  # each of them holds everything; not all ranks need read the same
        mine = [mine[rank % len(mine)]]
    pieces = plan(laid_out, [(file.path, file.fragments) for file in mine])
    averager.mode.load(header.state, Resharded(pieces, {file.path: file.file for file in mine}).read_)


def compare(saved: Mapping[str, Any], config: WeightAveragingConfig, path: Path) -> None:
    """Raises CheckpointError: a saved section (none if averaging was off) has another mode than this run's, or differs
    in what cannot change in it (a sum of 5 snapshots is none of 3)."""
    for key in ("mode", *_FIXED[config.mode]) if saved else ():
        if (was := saved[key]) != getattr(config, key):
            raise CheckpointError(
                f"{path}: saved with weight_averaging.{key} {was!r}, this run has {getattr(config, key)!r}; "
                f"write {json.dumps(was)}, or resume the weights alone (load_module_only)"
            )


class _Share:
    """One rank's file, open; ``expected``: what it must say of itself."""

    def __init__(self, folder: Path, *, rank: int, **expected: Any):
        self.path = path = folder / shard_name(rank)
        if not path.is_file():
            raise CheckpointError(f"weight_averaging: {path} is missing, the window of rank {rank}; {REMEDY}")
        with damage(path):
            self.file = safe_open(path, framework="pt", device="cpu")
            found = self.file.metadata() or {}
            if (was := found.get("format")) != FORMAT:
                raise CheckpointError(f"{path} has format {was!r}, this version reads {FORMAT!r}; use its own version")
            if found["header_sha256"] != _seal(found["header"]):
                raise ValueError("its metadata is not what was saved")
            self.header = Header(**json.loads(found["header"]))
            self.fragments = [Fragment(name, tuple(shape), *where) for name, shape, *where in self.header.fragments]
        for key, value in {"rank": rank, **expected}.items():
            if (was := getattr(self.header, key)) != value:
                what = f"{path} has {key} {was!r} where this run expects {value!r}: it belongs to another rank or save"
                raise CheckpointError(f"weight_averaging: {what}; {REMEDY}")

    def verify(self) -> None:
        """Read all of the file, a piece at a time, and compare it with the hash it was saved with."""
        with damage(self.path):
            if _digest({name: self.file.get_slice(name) for name in self.file.keys()}) != self.header.sha256:
                raise ValueError("its contents are not those that were saved")


def _of_coordinate(files: Sequence[_Share], coordinate: Place) -> list[_Share]:
    """Those that ranks of this coordinate saved, of the same snapshots."""
    found = [file for file in files if file.header.coordinate == list(coordinate)]
    if not found:
        known = ", ".join(map(str, sorted({tuple(file.header.coordinate) for file in files})))
        what = f"{files[0].path.parent} holds no window of tensor-parallel rank and pipeline stage {tuple(coordinate)}"
        raise CheckpointError(f"weight_averaging: {what}, only {known}; resume with the save's parallelism")
    for file in found:
        held, first = ((each.header.settings, each.header.state) for each in (file, found[0]))
        if held != first:
            raise CheckpointError(f"weight_averaging: {file.path} holds {held}, {found[0].path} {first}; {REMEDY}")
    return found


def _seal(header: str) -> str:
    return hashlib.sha256(header.encode()).hexdigest()


def _digest(tensors: Mapping[str, Any]) -> str:
    """SHA-256 of flat tensors, in memory or in a file."""
    digest = hashlib.sha256()
    for name, flat in sorted(tensors.items()):
        count = flat.numel() if isinstance(flat, torch.Tensor) else math.prod(flat.get_shape())
        digest.update(f"{name} {count}".encode())
        for start in range(0, count, READ_ELEMENTS):
            values = flat[start : min(start + READ_ELEMENTS, count)]
            digest.update(str(values.dtype).encode())
            digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()
