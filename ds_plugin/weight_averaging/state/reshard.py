"""A saved window on other ranks: `plan` says which elements of which file go where, `Resharded` reads just those."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds_plugin.core.errors import CheckpointError, PluginError
from ds_plugin.weight_averaging.state.fragments import Fragment

READ_ELEMENTS = 4 * 1024 * 1024  #: read at a time: 16 MiB of fp32
REMEDY = "restore the file, or resume from another checkpoint (--tag)"
_SAME_MODEL = "resume with the model, tensor and pipeline parallelism it was saved with"

Source = tuple[Path, Sequence[Fragment]]  # a saved file, and what lies where in its shards


@contextlib.contextmanager
def damage(what: object, remedy: str = REMEDY) -> Iterator[None]:
    """Say of errors in what was read that ``what`` is damaged, or that a file is missing."""
    try:
        yield
    except PluginError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename} is missing; {remedy}") from None
    except Exception as error:  # Python's, torch's, safetensors' and pickle's: whatever the bytes led to
        said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise CheckpointError(f"{what} is truncated or damaged ({said}); {remedy}") from None


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
    """The pieces of ``sources`` that make up ``targets``. Raises CheckpointError: a parameter has another shape, or an
    element of it lies in no source, or in two."""
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
            what = f"{path} holds parameter {target.name} as a part of {list(part.shape)}, not {list(target.shape)}"
            raise CheckpointError(f"weight_averaging: {what}; {_SAME_MODEL}")
        first, last = max(part.start, target.start), min(part.start + part.count, end)
        if first >= last:
            continue
        if first < at:
            what = f"elements {first} to {min(at, last)} of parameter {target.name} are in {path} and in {previous}"
            raise CheckpointError(f"weight_averaging: {what} (as with MiCS); resume with the save's ranks and settings")
        if first > at:
            break
        there, here = part.offset + first - part.start, target.offset + first - target.start
        yield Piece(path, part.shard, there, target.shard, here, last - first)
        at, previous = last, path
    if at < end:
        files = f"{sources[0][0]} to {sources[-1][0].name}" if sources else "the files"
        what = f"element {at} of parameter {target.name} {list(target.shape)} is in none of {files}"
        raise CheckpointError(f"weight_averaging: {what}; {_SAME_MODEL}")


class Resharded:
    """The saved tensors, ``<what>.<shard>``, as the shards of the rank that reads. ``files``: ``safe_open`` of each."""

    def __init__(self, pieces: Sequence[Piece], files: Mapping[Path, Any]):
        self._files = files
        self._pieces: dict[int, list[Piece]] = defaultdict(list)  # by shard
        for piece in pieces:
            self._pieces[piece.shard].append(piece)

    def read_(self, name: str, out: torch.Tensor) -> None:
        """Read a tensor into ``out``, which is contiguous; what no piece covers (padding) is zero."""
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
