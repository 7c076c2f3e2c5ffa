"""Tensors stored in rectangles: whether the rectangles cover a tensor, and where the elements of another one lie."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from ds_plugin.weight_averaging.merge.inputs import Piece, Stored

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor, from ``offsets`` on; its elements lie in row-major order in one piece."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    piece: Piece


@dataclass(frozen=True)
class Window(Stored):
    """A rectangle of a tensor that is stored in rectangles of another cut: a piece per row and chunk, made when asked.

    The trailing dimensions that nothing cuts are one with the last dimension before them, so that rows are long.
    """

    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    chunks: tuple[Chunk, ...] = ()

    def span(self, start: int, count: int) -> Iterator[Piece]:
        """As `Stored.span`; the chunks must cover the rectangle."""
        itemsize, row = self.dtype.itemsize, self.sizes[-1]
        while count > 0:
            number, column = divmod(start, row)
            place = _unravel(number, self.sizes[:-1], self.offsets[:-1])
            begin = self.offsets[-1] + column
            end = min(begin + count, self.offsets[-1] + row)
            for chunk in self.chunks:
                low, high = max(begin, chunk.offsets[-1]), min(end, chunk.offsets[-1] + chunk.sizes[-1])
                inner = [a - b for a, b in zip(place, chunk.offsets, strict=False)]
                if low < high and all(0 <= i < size for i, size in zip(inner, chunk.sizes, strict=False)):
                    first = 0
                    for i, size in zip([*inner, low - chunk.offsets[-1]], chunk.sizes, strict=True):
                        first = first * size + i
                    yield Piece(chunk.piece.path, chunk.piece.offset + itemsize * first, high - low)
            start, count = start + end - begin, count - (end - begin)


def window(stored: Stored, chunks: Sequence[Chunk], wanted: Chunk) -> Stored:
    """The rectangle ``wanted`` of a tensor that is ``stored`` in ``chunks``, which cover it."""
    for chunk in chunks:
        if (chunk.offsets, chunk.sizes) == (wanted.offsets, wanted.sizes):
            return Stored(stored.dtype, chunk.sizes, (chunk.piece,), stored.latest, stored.varies)
    frame, *folded = _fold([wanted, *(chunk for chunk in chunks if _overlap(chunk, wanted))])
    in_order = tuple(sorted(folded, key=lambda chunk: chunk.offsets[-1]))
    return Window(stored.dtype, wanted.sizes, (), stored.latest, stored.varies, frame.offsets, frame.sizes, in_order)


def covers_once(shape: tuple[int, ...], boxes: Sequence[Box]) -> bool:
    """Whether rectangles cover a tensor without gap or overlap.

    A sum of boxes is known by its corners, each counted with the sign of how many of its coordinates are upper ends;
    so the boxes' corners must cancel but for the tensor's own. That is linear in the number of boxes.
    """
    if any(len(offsets) != len(shape) or len(sizes) != len(shape) for offsets, sizes in boxes):
        return False
    corners = _corners((0,) * len(shape), shape)
    for box in boxes:
        corners.subtract(_corners(*box))
    return not any(corners.values())


def _corners(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Counter[tuple[int, ...]]:
    found: Counter[tuple[int, ...]] = Counter()
    for ends in product((0, 1), repeat=len(sizes)):
        found[tuple(o + end * s for o, s, end in zip(offsets, sizes, ends, strict=True))] += (-1) ** sum(ends)
    return found


def _overlap(one: Chunk, other: Chunk) -> bool:
    pairs = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(a < c + d and c < a + b for a, b, c, d in pairs)


def _fold(chunks: list[Chunk]) -> list[Chunk]:
    """Make the last dimension one with that before it as long as all chunks have the same part of it."""
    while len(chunks[0].sizes) > 1 and len({(chunk.offsets[-1], chunk.sizes[-1]) for chunk in chunks}) == 1:
        last = chunks[0].sizes[-1]
        chunks = [
            Chunk((*c.offsets[:-2], c.offsets[-2] * last), (*c.sizes[:-2], c.sizes[-2] * last), c.piece) for c in chunks
        ]
    return chunks


def _unravel(number: int, sizes: tuple[int, ...], offsets: tuple[int, ...]) -> list[int]:
    place = []
    for size, offset in zip(reversed(sizes), reversed(offsets), strict=True):
        number, inner = divmod(number, size)
        place.append(offset + inner)
    return place[::-1]
