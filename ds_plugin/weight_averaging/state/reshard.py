"""A saved window on other ranks: `plan` says which elements of which file go where, `Resharded` reads just those."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ds_plugin.core.errors import CheckpointError
from ds_plugin.weight_averaging.state.fragments import Fragment

#: elements read at a time: 16 MiB of fp32
READ_ELEMENTS = 4 * 1024 * 1024

REMEDY = "restore the file, or resume from another checkpoint (--tag)"

Source = tuple[Path, Sequence[Fragment]]  # a saved file, and what lies where in its shards


@contextlib.contextmanager
def damage(path: Path) -> Iterator[None]:
    """Name the file in what goes wrong while it is read."""
    try:
        yield
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise CheckpointError(f"weight_averaging: {path} is damaged ({error}); {REMEDY}") from None


@dataclass(frozen=True)
class Piece:
    """``count`` elements, from ``start`` on in the flat shard ``source`` of a file, to ``offset`` in ``shard`` here."""

    path: Path
    source: int
    start: int
    shard: int
    offset: int
    count: int


def plan(targets: Sequence[Fragment], sources: Sequence[Source]) -> list[Piece]:
    """The pieces of ``sources`` that make up ``targets``, each of whose elements lies in exactly one source. Raises
    CheckpointError: a parameter has another shape, or an element of it lies in no source, or in two."""
    saved: dict[str, list[tuple[Fragment, Path]]] = defaultdict(list)
    for path, fragments in sources:
        for fragment in fragments:
            saved[fragment.name].append((fragment, path))
    for parts in saved.values():
        parts.sort(key=lambda part: part[0].start)
    return [piece for target in targets for piece in _pieces(target, saved.get(target.name, []), sources)]


def _pieces(target: Fragment, parts: Sequence[tuple[Fragment, Path]], sources: Sequence[Source]) -> Iterator[Piece]:
    """``parts``: all that is saved of the target's parameter, in the order of its elements."""
    at, end, previous = target.start, target.start + target.count, None
    for part, path in parts:
        if part.shape != target.shape:
            raise CheckpointError(
                f"weight_averaging: {path} holds parameter {target.name} as a part of {list(part.shape)}, this run has "
                f"{list(target.shape)}; resume with the model, tensor and pipeline parallelism it was saved with"
            )
        first, last = max(part.start, target.start), min(part.start + part.count, end)
        if first >= last:
            continue
        if first < at:
            raise CheckpointError(
                f"weight_averaging: elements {first} to {min(at, last)} of parameter {target.name} are in {path} and "
                f"in {previous} (as with MiCS); resume on the ranks and settings they were saved with"
            )
        if first > at:
            break
        there, here = part.offset + first - part.start, target.offset + first - target.start
        yield Piece(path, part.shard, there, target.shard, here, last - first)
        at, previous = last, path
    if at < end:
        files = f"{sources[0][0]} to {sources[-1][0].name}" if sources else "the files"
        raise CheckpointError(
            f"weight_averaging: element {at} of parameter {target.name} {list(target.shape)} is in none of {files}; "
            "resume with the model, tensor and pipeline parallelism it was saved with"
        )


class Resharded:
    """The saved tensors, ``<what>.<shard>``, as the shards of the rank that reads, by the `plan` of its fragments.
    ``files``: the ``safe_open`` of each path."""

    def __init__(self, pieces: Sequence[Piece], files: Mapping[Path, Any]):
        self._files = files
        self._pieces: dict[int, list[Piece]] = defaultdict(list)  # by shard
        for piece in pieces:
            self._pieces[piece.shard].append(piece)

    def read_(self, name: str, out: torch.Tensor) -> None:
        """Read a tensor into ``out``, which is contiguous; what no piece covers (padding) is zero. Raises
        CheckpointError: a file does not have it, or less of it, or of another dtype than ``out``."""
        what, _, shard = name.rpartition(".")
        flat, pieces = out.view(-1), self._pieces[int(shard)]
        if sum(piece.count for piece in pieces) < flat.numel():
            flat.zero_()
        for piece in pieces:
            with damage(piece.path):
                stored = f"{what}.{piece.source}"
                source = self._files[piece.path].get_slice(stored)
                for i, values in enumerate(flat[piece.offset :][: piece.count].split(READ_ELEMENTS)):
                    first = piece.start + i * READ_ELEMENTS
                    found = source[first : first + len(values)]
                    if (found.dtype, found.shape) != (values.dtype, values.shape):
                        raise ValueError(f"{stored} is not of the type or size the files say")
                    values.copy_(found)
