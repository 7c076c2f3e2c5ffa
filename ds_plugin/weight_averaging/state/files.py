"""What averaging holds, on disk: one safetensors file per rank, in the framework's checkpoint. Never a pickle.

A file holds the mode's buffers as flat tensors, ``<what>.<shard>``; its metadata says which parameters' elements they
are, and the rank's coordinate in the model. On the layout it was saved with a rank reads its own file; on another one
it reads from all files of its coordinate the pieces it needs (`reshard`).

The metadata carries its own SHA-256, tested by every rank that reads from the file, and one for each tensor, tested in
full by one rank for each file, also when all ranks read only pieces. All ranks call `load` within `raise_on_all_ranks`,
so that what one of them finds ends all.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

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

FORMAT = "3"

#: the settings of each mode that cannot change
_FIXED = {"sliding": ("deltas",), "block": ("window",), "ema": ("horizons",)}


def shard_name(rank: int) -> str:
    """File name of one rank's share; must not end as DeepSpeed's own files do, which its tools glob for."""
    return f"weight_averaging_rank_{rank:05d}.safetensors"


def save(
    folder: Path,
    averager: WeightAverager,
    *,
    rank: int,
    world_size: int,
    save_id: str,
    coordinate: Sequence[int] = (0, 0),
) -> None:
    """Write this rank's share into the checkpoint folder, atomically.

    Args:
        save_id: marks the files of one save.
        coordinate: tensor-parallel rank and pipeline stage: ranks of one coordinate share out (or replicate) the same
            weights, others hold other weights under the same names.

    Raises:
        StateError: the framework lays out its shards in a way that is not known, or in another than at first.
    """
    laid_out = averager.shards.fragments()
    fragments.check(laid_out, averager.masters())
    tensors = {name: tensor.view(-1) for name, tensor in averager.mode.tensors().items()}
    config = averager.config
    metadata = {
        "format": FORMAT,
        "rank": str(rank),
        "world_size": str(world_size),
        "save_id": save_id,
        "mode": config.mode,
        "fixed": json.dumps({key: getattr(config, key) for key in _FIXED[config.mode]}),
        "state": json.dumps(averager.mode.state()),
        "coordinate": json.dumps(list(coordinate)),
        "layout": averager.shards.layout,
        "fragments": json.dumps([astuple(fragment) for fragment in laid_out]),
        "sha256": json.dumps({name: _digest(tensor, tensor.numel()) for name, tensor in tensors.items()}),
    }
    metadata["metadata_sha256"] = _seal(metadata)
    atomic_write(folder / shard_name(rank), lambda path: save_file(tensors, path, metadata=metadata))


def load(
    folder: Path,
    averager: WeightAverager,
    *,
    rank: int,
    world_size: int,
    save_id: str,
    coordinate: Sequence[int] = (0, 0),
    saved_ranks: int | None = None,
) -> None:
    """Read this rank's share back, on the ranks and the layout it was saved with or on others.

    It goes straight into the averager's buffers, a piece at a time. Tensor and pipeline parallelism must be the save's.

    Args:
        save_id: that of the save to load.
        saved_ranks: how many ranks saved; this run's ``world_size`` if not given.

    Raises:
        CheckpointError: a file is missing, unreadable, altered, or belongs to another rank, save or mode; or the files
            do not hold each of this rank's elements exactly once.
    """
    saved_ranks = world_size if saved_ranks is None else saved_ranks
    with contextlib.ExitStack() as stack:

        @functools.cache
        def share(saved_rank: int) -> _Share:
            path = folder / shard_name(saved_rank)
            if not path.is_file():
                raise CheckpointError(
                    f"weight_averaging: {path} is missing, the averaging window of rank {saved_rank}; {REMEDY}"
                )
            with damage(path):
                file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
                return _Share(path, file, rank=saved_rank, world_size=saved_ranks, save_id=save_id)

        laid_out = averager.shards.fragments()
        fragments.check(laid_out, averager.masters())
        if world_size == saved_ranks and share(rank).holds(coordinate, laid_out):
            mine = tested = [share(rank)]
        else:
            files = [share(saved_rank) for saved_rank in range(saved_ranks)]
            mine, tested = _of_coordinate(files, coordinate), files[rank::world_size]
        first = mine[0]
        compare(first.saved, averager.config, first.path)
        for file in tested:
            file.verify()
        if first.found["layout"] == "replicated":  # each of them holds everything; not all ranks need read the same
            mine = [mine[rank % len(mine)]]
        pieces = plan(laid_out, [(file.path, file.fragments) for file in mine])
        dtypes = {what: dtype for file in mine for what, dtype in file.dtypes().items()}
        try:
            averager.mode.load(first.state, Resharded(pieces, {file.path: file.file for file in mine}, dtypes))
        except KeyError as error:
            raise CheckpointError(f"weight_averaging: {first.path} is damaged (it has no {error}); {REMEDY}") from None


def compare(saved: Mapping[str, Any], config: WeightAveragingConfig, path: Path) -> None:
    """Compare a saved section (or as much of it as a rank's file has; none if averaging was off) with this run's.

    A sliding window may change its size; a sum of 5 snapshots cannot become one of 3, nor bf16 differences whole ones.

    Raises:
        CheckpointError: the mode differs, or what cannot change within it.
    """
    for key in ("mode", *_FIXED[config.mode]) if saved else ():
        if (was := saved[key]) != getattr(config, key):
            raise CheckpointError(
                f"{path}: saved with weight_averaging.{key} {was!r}, this run has {getattr(config, key)!r}; "
                f"write {json.dumps(was)}, or resume the weights alone (load_module_only)"
            )


class _Share:
    """One rank's file, open; ``expected``: what it must say of itself."""

    def __init__(self, path: Path, file: Any, **expected: Any):
        found = file.metadata() or {}
        if found.get("format") != FORMAT:
            raise CheckpointError(
                f"weight_averaging: {path} has format {found.get('format')!r}, this version reads {FORMAT!r}; use the "
                "version it is from"
            )
        for key, value in expected.items():
            if found.get(key) != str(value):
                raise CheckpointError(
                    f"weight_averaging: {path} has {key} {found.get(key)!r} where this run expects {str(value)!r}: it "
                    f"belongs to another rank, layout or save; {REMEDY}"
                )
        if found["metadata_sha256"] != _seal(found):
            raise ValueError("its metadata is not what was saved")
        self.path, self.file, self.found = path, file, found
        self.state = json.loads(found["state"])
        self.saved = {"mode": found["mode"], **json.loads(found["fixed"])}
        self.coordinate = json.loads(found["coordinate"])

    @functools.cached_property
    def fragments(self) -> list[Fragment]:
        return [Fragment(name, tuple(shape), *numbers) for name, shape, *numbers in json.loads(self.found["fragments"])]

    def holds(self, coordinate: Sequence[int], laid_out: Sequence[Fragment]) -> bool:
        """Whether a rank with this layout needs this file alone."""
        return self.coordinate == list(coordinate) and self.fragments == laid_out

    def verify(self) -> None:
        """Read all of the file, a piece at a time, and compare it with the hashes it was saved with."""
        with damage(self.path):
            hashes = json.loads(self.found["sha256"])
            found = {name: self.file.get_slice(name) for name in self.file.keys()}
            wrong = hashes.keys() ^ found.keys()
            wrong = wrong or {n for n, stored in found.items() if _digest(stored, *stored.get_shape()) != hashes[n]}
            if wrong:
                raise ValueError(f"its contents are not those that were saved: {min(wrong)}")

    def dtypes(self) -> dict[str, torch.dtype]:
        """Of each ``<what>`` that is held."""
        with damage(self.path):
            return {name.rpartition(".")[0]: self.file.get_slice(name)[0:0].dtype for name in self.file.keys()}


def _of_coordinate(files: Sequence[_Share], coordinate: Sequence[int]) -> list[_Share]:
    """Those that ranks of this coordinate saved; they hold the same snapshots."""
    found = [file for file in files if file.coordinate == list(coordinate)]
    if not found:
        known = sorted({tuple(file.coordinate) for file in files})
        raise CheckpointError(
            f"weight_averaging: {files[0].path.parent} holds no window of tensor-parallel rank and pipeline stage "
            f"{list(coordinate)}, only {', '.join(map(str, map(list, known)))}; resume with the tensor and pipeline "
            "parallelism it was saved with"
        )
    for file in found:
        if (file.saved, file.state) != (found[0].saved, found[0].state):
            raise CheckpointError(
                f"weight_averaging: {file.path} and {found[0].path} hold other snapshots ({file.found['state']} and "
                f"{found[0].found['state']}); {REMEDY}"
            )
    return found


def _seal(metadata: Mapping[str, str]) -> str:
    """SHA-256 of all the metadata but itself."""
    text = json.dumps({key: value for key, value in metadata.items() if key != "metadata_sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(flat: Any, count: int) -> str:
    """SHA-256 of ``count`` elements of a flat tensor, in memory or in a file, and of their dtype."""
    digest = hashlib.sha256()
    for start in range(0, count, READ_ELEMENTS):
        values = flat[start : min(start + READ_ELEMENTS, count)]
        digest.update(str(values.dtype).encode())
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()
