"""Which files make up a corpus, in which order, what of them is text, and how it is cut into documents."""

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ds_plugin.core.errors import DataError
from launch_scripts.gpt.records import is_saved_dataset, kind_of, read_records

STDLIB = "stdlib"
_STDLIB_SUFFIXES = (".py", ".txt", ".rst", ".html")
_STDLIB_LEAVES_OUT = {"site-packages", "dist-packages", "__pycache__", "_bundled"}
LARGEST_DOCUMENT = 1 << 20
_SMALLEST_PIECE = 1 << 10
_ENOUGH_DOCUMENTS = 200


@dataclass(frozen=True)
class TextFile:
    """One file of a source: `name` is its path relative to the source, `size` is in bytes.

    `kind`: None for plain text, else what `read_records` reads it by; a folder of "saved" records counts as one file.
    """

    path: Path
    name: str
    size: int
    modified_ns: int
    kind: str | None = None


@dataclass(frozen=True)
class Source:
    """The files of a source, in the order they are read in; and how many others lie there, see `find_text_files`."""

    files: list[TextFile]
    beside: int = 0


def find_text_files(source: str, text_key: str = "text") -> Source:
    """List the files of a source, in the order of a hash of their relative names.

    The validation part is the last share of the documents as they are stored. In the order of names that would be one
    corner of the source (the last folders, one language, one date); in this order it is a fair sample, the same on
    every machine.

    `source` is a file, a folder (searched recursively; names that begin with a dot are left out and links to folders
    are not followed), or "stdlib": the source text of the Python standard library on this machine, about 30 MB, which
    needs no download. Write "./stdlib" for a folder of that name. A file is plain text or holds records (see
    `records.py`); where some do, the others beside them are descriptions, licences and the like, and left out.

    Raises DataError when the path does not exist or cannot be searched, or the folder holds no files.
    """
    if source == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        paths = [path for path in _walk(root, _STDLIB_LEAVES_OUT) if path.suffix in _STDLIB_SUFFIXES]
        return Source(_sorted(_text_file(path, root, None) for path in paths))
    root = Path(source)
    if root.is_file():
        root, paths = root.parent, [root]
    elif root.is_dir():
        paths = [root] if is_saved_dataset(root) else list(_walk(root, set()))
    else:
        raise DataError(
            f"data: {source!r} does not exist; give a text file, a folder of text files, .jsonl, .jsonl.gz or .parquet "
            f"files, the prefix of a Megatron dataset (PREFIX.bin with PREFIX.idx), or {STDLIB!r}"
        )
    if not paths:
        raise DataError(f"data: the folder {source!r} holds no files; give a folder with at least one text file")
    kinds = {path: "saved" if path.is_dir() else kind_of(path, text_key) for path in paths}
    records = [path for path in paths if kinds[path] is not None]
    chosen = records or paths
    return Source(_sorted(_text_file(path, root, kinds[path]) for path in chosen), len(paths) - len(chosen))


def _sorted(files: Iterable[TextFile]) -> list[TextFile]:
    return sorted(files, key=lambda file: hashlib.blake2b(os.fsencode(file.name)).digest())


def _text_file(path: Path, root: Path, kind: str | None) -> TextFile:
    parts = [path] if path.is_file() else [part for part in path.iterdir() if part.is_file()]
    statuses = [part.stat() for part in parts]
    size, modified = sum(s.st_size for s in statuses), max(s.st_mtime_ns for s in statuses)
    return TextFile(path, path.relative_to(root).as_posix(), size, modified, kind)


def _walk(root: Path, leave_out: set[str]) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        raise DataError(f"data: {error.filename!r} cannot be searched ({error}); make it readable, or move it away")

    for folder, names, file_names in os.walk(root, onerror=unreadable):
        if folder != str(root) and not leave_out and is_saved_dataset(Path(folder)):
            names.clear()
            yield Path(folder)
            continue
        names[:] = [name for name in names if name not in leave_out and not name.startswith(".")]
        for name in file_names:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():  # a dangling link is not a file
                yield path


def contents(file: TextFile, text_key: str) -> Iterator[bytes | None]:
    """The texts of a file: its content, or those of its records, None for one without. Raises DataError."""
    if file.kind is not None:
        yield from read_records(file.path, file.kind, text_key)
        return
    try:
        yield file.path.read_bytes()  # the whole file in memory
    except OSError as error:
        what = f"{str(file.path)!r} cannot be read ({error})"
        raise DataError(f"data: {what}; make it readable, or move it away") from error


def unfit(content: bytes | None) -> str | None:
    """Why a text cannot be trained on, as the end of a sentence; None: it can.

    NUL is excluded because it is the end-of-document token of the byte vocabulary.
    """
    if content is None:
        return "have no text"
    if not content:
        return "are empty"
    if b"\0" in content:
        return "hold a NUL byte"
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return "are not UTF-8"
    return None


def document_limit(files: list[TextFile]) -> int:
    """Largest document in bytes: a file up to this size is one document, a longer one is cut.

    The train/validation split is made by whole documents, so one long file (or a few) is cut into about 200 pieces;
    otherwise 2 percent of one document would round to nothing.
    """
    if len(files) >= _ENOUGH_DOCUMENTS:
        return LARGEST_DOCUMENT
    total = sum(file.size for file in files)
    return min(LARGEST_DOCUMENT, max(_SMALLEST_PIECE, total // _ENOUGH_DOCUMENTS))


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
