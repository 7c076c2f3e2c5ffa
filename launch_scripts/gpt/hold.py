"""A folder that one process holds, and what killed ones have left in it."""

import contextlib
import fcntl
import logging
import os
import re
import shutil
import socket
import sys
import time
from pathlib import Path

from ds_plugin.core.errors import StateError

LOCK = ".lock"
#: of `core.files.atomic_path`, and hidden folders named like them
_TEMPORARY = re.compile(r"\..+\.([0-9a-f]+)\.tmp(\.\w+)?")
_held: set[tuple[int, int]] = set()  # the lock files of this process, by device and inode


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


def sweep_temporaries(folder: Path, *, idle_seconds: float = 0.0) -> list[str]:
    """Remove what `core.files.atomic_path` and its like have left in `folder` in processes that were killed; returns
    the names. Only where nobody else writes, or with `idle_seconds`: then what was touched since, or is a living
    process's, stays.
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
