"""Which text files make up a corpus, in which order, and how they are cut into documents."""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ds_plugin.core.errors import DataError

STDLIB = "stdlib"
_STDLIB_SUFFIXES = (".py", ".txt", ".rst", ".html")
_STDLIB_LEAVES_OUT = {"site-packages", "dist-packages", "__pycache__", "_bundled"}
_LARGEST_DOCUMENT = 1 << 20
_SMALLEST_PIECE = 1 << 10
_ENOUGH_DOCUMENTS = 200


@dataclass(frozen=True)
class TextFile:
    """One file of a source: `name` is its path relative to the source, `size` is in bytes."""

    path: Path
    name: str
    size: int
    modified_ns: int


def find_text_files(source: str) -> list[TextFile]:
    """List the files of a source, in the order of a hash of their relative names.

    The validation part is the last share of the documents as they are stored. In the order of names that would be one
    corner of the source (the last folders, one language, one date); in this order it is a fair sample, the same on
    every machine.

    `source` is a text file, a folder (searched recursively; names that begin with a dot are left out and links to
    folders are not followed), or "stdlib": the source text of the Python standard library on this machine, about
    30 MB, which needs no download. Write "./stdlib" for a folder of that name.

    Raises DataError when the path does not exist or the folder holds no files.
    """
    if source == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        paths = [path for path in _walk(root, _STDLIB_LEAVES_OUT) if path.suffix in _STDLIB_SUFFIXES]
    else:
        root = Path(source)
        if root.is_file():
            root, paths = root.parent, [root]
        elif root.is_dir():
            paths = list(_walk(root, set()))
        else:
            raise DataError(
                f"data: {source!r} does not exist; give a text file, a folder of text files, the prefix of a Megatron "
                f"dataset (PREFIX.bin with PREFIX.idx), or {STDLIB!r}"
            )
    files = []
    for path in paths:
        status = path.stat()
        files.append(TextFile(path, path.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns))
    if not files:
        raise DataError(f"data: the folder {source!r} holds no files; give a folder with at least one text file")
    return sorted(files, key=lambda file: hashlib.blake2b(file.name.encode()).digest())


def _walk(root: Path, leave_out: set[str]) -> Iterator[Path]:
    for folder, names, file_names in os.walk(root):
        names[:] = [name for name in names if name not in leave_out and not name.startswith(".")]
        for name in file_names:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():  # a dangling link is not a file
                yield path


def read_text(path: Path) -> bytes | None:
    """Return the file's bytes, or None when it is empty, holds a NUL, or is not UTF-8.

    NUL is excluded because it is the end-of-document token of the byte vocabulary. Holds the whole file in memory.
    """
    content = path.read_bytes()
    if not content or b"\0" in content:
        return None
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return content


def document_limit(files: list[TextFile]) -> int:
    """Largest document in bytes: a file up to this size is one document, a longer one is cut.

    The train/validation split is made by whole documents, so one long file (or a few) is cut into about 200 pieces;
    otherwise 2 percent of one document would round to nothing.
    """
    if len(files) >= _ENOUGH_DOCUMENTS:
        return _LARGEST_DOCUMENT
    total = sum(file.size for file in files)
    return min(_LARGEST_DOCUMENT, max(_SMALLEST_PIECE, total // _ENOUGH_DOCUMENTS))


def cut(content: bytes, limit: int) -> list[bytes]:
    """Cut UTF-8 text into pieces of at most `limit` bytes (4 or more) that join to it again.

    A piece ends at the last line end in reach, else at the last whole character.
    """
    pieces = []
    start = 0
    while len(content) - start > limit:
        end = content.rfind(b"\n", start, start + limit) + 1
        if end <= start:
            end = start + limit
            while content[end] & 0xC0 == 0x80:  # 10xxxxxx continues a character: do not cut before it
                end -= 1
        pieces.append(content[start:end])
        start = end
    pieces.append(content[start:])
    return pieces
