"""Files that are either whole or absent, whatever interrupts the writing."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` for the block to write; put it in place when the block succeeds.

    After a crash `path` holds its old content or all of the new one; if the block raises, the old. Several of these in
    one `with` statement are put in place from the last to the first: name the one that marks the set as complete first.

    The temporary name is hidden, ends in the same suffix (some writers choose a format by it) and carries the process
    id, so that two processes that write the same file do not meet."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """`atomic_path`, filled by `write`."""
    with atomic_path(path) as temporary:
        write(temporary)


def write_text(path: Path, text: str) -> None:
    """Replace a small text file."""
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Replace a small JSON file that people read too."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def replace_folder(staging: Path, final: Path) -> None:
    """Rename the folder `staging` to `final`. Whenever this is killed, a whole folder is there, old or new: no rename
    replaces a folder that holds something, so the old one steps aside first, as `<name>.previous`."""
    previous = final.with_name(f"{final.name}.previous")
    if final.exists() and any(final.iterdir()):
        shutil.rmtree(previous, ignore_errors=True)  # of a kill after both renames
        os.rename(final, previous)
    os.rename(staging, final)
    sync_folder(final.parent)
    shutil.rmtree(previous, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` last through a power cut (a file's own fsync covers its content only)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
