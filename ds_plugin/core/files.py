"""Files that are either whole or absent, whatever interrupts the writing; a folder held by one process."""

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ds_plugin.core.errors import StateError

LOCK = ".lock"
_TEMPORARY = re.compile(r"\..+\.([0-9a-f]+)\.tmp(\.\w+)?")  # `atomic_path`'s, and hidden folders named like them
_held: set[tuple[int, int]] = set()  # the lock files of this process, by device and inode


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


def sweep_temporaries(folder: Path, *, idle_seconds: float = 0.0) -> list[str]:
    """Remove what `atomic_path` and its like have left in `folder` in processes that were killed; returns the names.
    Only where nobody else writes, or with `idle_seconds`: then what was touched since, or is a living process's, stays.
    """
    swept = []
    for path in Path(folder).iterdir():
        if (match := _TEMPORARY.fullmatch(path.name)) is None:
            continue
        with contextlib.suppress(OSError):  # another start may be at it, too
            lives = match[1].isdecimal() and Path("/proc", match[1]).exists()
            if idle_seconds and (lives or time.time() - path.stat().st_mtime < idle_seconds):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
            swept.append(path.name)
    return sorted(swept)


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


def hold_folder(folder: Path) -> None:
    """Keep the existing `folder` for this process until it ends, however it ends. A second call in it changes nothing.

    It is an flock on ``folder/.lock``, which says who holds it. The file stays: deleted, it would let two processes
    lock two files of the same name. Where the file system has no locks nothing is held, and the log says so. Raises
    StateError: another process holds it; OSError: the folder is not there or cannot be written."""
    path = Path(folder) / LOCK
    while True:
        if path.exists() and _identity(path.stat()) in _held:  # not opened again: over NFS, closing it would unlock it
            return
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 400, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            what = f"'{folder}' is in use by {holder}"
            raise StateError(f"{what}; wait until that has ended, or use another folder") from None
        except OSError as error:
            os.close(descriptor)
            said = "'%s' cannot be locked (%s): a second run in this folder would not be noticed"
            logging.getLogger("ds_plugin").warning(said, path, error)
            return
        if path.exists() and _identity(path.stat()) == _identity(os.fstat(descriptor)):
            break
        os.close(descriptor)  # the folder was moved away meanwhile
    _held.add(_identity(os.fstat(descriptor)))  # and the descriptor stays open
    with contextlib.suppress(OSError):  # the lock holds without its text
        os.ftruncate(descriptor, 0)
        who = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        os.pwrite(descriptor, f"{who} ({' '.join(sys.argv)[:200]})".encode(errors="replace"), 0)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
