"""A saved window on other ranks: which elements of which rank's file go where, and reading just those.

A file holds flat shards and says which parameters' elements they are (`fragments`), and so do the shards of the rank
that reads. `plan` brings the two together; `Resharded` reads by the plan, never more than a piece at a time.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ds_plugin.core.errors import CheckpointError
from ds_plugin.weight_averaging.modes import Saved
from ds_plugin.weight_averaging.state.fragments import Fragment

#: elements read at a time: 16 MiB of fp32
READ_ELEMENTS = 4 * 1024 * 1024

REMEDY = "restore the file, or resume from another checkpoint (--tag)"


@contextlib.contextmanager
def damage(path: Path) -> Iterator[None]:
    """What goes wrong while ``path`` is read, as a `CheckpointError` that names it."""
    try:
        yield
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise CheckpointError(f"weight_averaging: {path} is damaged ({error}); {REMEDY}") from None


@dataclass(frozen=True)
class Source:
    """One saved file and what lies where in its shards."""

    path: Path
    fragments: Sequence[Fragment]


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
    """The pieces of ``sources`` that make up ``targets``, each of whose elements lies in exactly one source.

    Sources that hold the same elements (replicas) are the caller's to choose one of.

    Raises:
        CheckpointError: a parameter has another shape, or an element of it lies in no source, or in two.
    """
    saved: dict[str, list[tuple[Fragment, Path]]] = {}
    for source in sources:
        for fragment in source.fragments:
            saved.setdefault(fragment.name, []).append((fragment, source.path))
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
                f"in {previous}: weights that lie on several ranks beside sharded ones (as with MiCS) can be resumed "
                "only on the ranks and settings they were saved with"
            )
        if first > at:
            break
        yield Piece(
            path,
            part.shard,
            part.offset + first - part.start,
            target.shard,
            target.offset + first - target.start,
            last - first,
        )
        at, previous = last, path
    if at < end:
        files = f"{sources[0].path} to {sources[-1].path.name}" if sources else "the files"
        raise CheckpointError(
            f"weight_averaging: element {at} of parameter {target.name} {list(target.shape)} is in none of {files}; "
            "resume with the model, tensor and pipeline parallelism it was saved with"
        )


class Resharded(Saved):
    """The saved tensors, ``<what>.<shard>``, as the shards of the rank that reads.

    Their dtypes are the files'; what no piece covers (padding) is zero.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        shapes: Sequence[torch.Size],
        dtypes: Mapping[str, torch.dtype],
        opened: Callable[[Path], Any],
    ):
        """
        Args:
            pieces: `plan` of this rank's fragments.
            shapes: those of this rank's shards.
            dtypes: of each ``<what>`` in the files.
            opened: gives a file's ``safe_open``.
        """
        self._pieces = [[p for p in pieces if p.shard == shard] for shard in range(len(shapes))]
        self._shapes, self._dtypes, self._opened = shapes, dtypes, opened

    def shape(self, name: str) -> torch.Size:
        what, shard = self._split(name)
        for piece in self._pieces[shard]:
            with damage(piece.path):
                source = self._source(what, piece)
                if source[0:0].dtype != self._dtypes[what] or source.get_shape()[0] < piece.start + piece.count:
                    raise ValueError(f"{what}.{piece.source} is not of the type or size the files say")
        return self._shapes[shard]

    def read_(self, name: str, out: torch.Tensor) -> None:
        what, shard = self._split(name)
        flat, pieces = out.view(-1), self._pieces[shard]
        if sum(piece.count for piece in pieces) < flat.numel():
            flat.zero_()
        for piece in pieces:
            with damage(piece.path):
                source = self._source(what, piece)
                for done in range(0, piece.count, READ_ELEMENTS):
                    count = min(READ_ELEMENTS, piece.count - done)
                    values = source[piece.start + done : piece.start + done + count]
                    flat[piece.offset + done : piece.offset + done + count] = values

    def _split(self, name: str) -> tuple[str, int]:
        what, _, shard = name.rpartition(".")
        if what not in self._dtypes or not 0 <= int(shard) < len(self._shapes):
            raise KeyError(name)
        return what, int(shard)

    def _source(self, what: str, piece: Piece) -> Any:
        return self._opened(piece.path).get_slice(f"{what}.{piece.source}")
