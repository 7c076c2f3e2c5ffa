"""Seals: the size and SHA-256 of every file of a checkpoint, the framework's own included, to be compared on resume.

After a save the processes that share its folder divide its files among them; each hashes its share in a thread, while
training goes on, and writes ``ds_plugin_seal_00000.json`` and so on into the folder of our own files. A process that
is killed meanwhile leaves its share without a seal, which a resume says."""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ds_plugin.core.errors import CheckpointError, raise_on_all_ranks, warn
from ds_plugin.core.files import write_text

_NAME = "ds_plugin_seal_{:05d}.json"
_UNVERIFIED = "sealer.verify = False, --no-verify, --ds-plugin-no-verify, or bridge.attach(..., verify=False)"
_REMEDY = f"restore it, give another, or load it unverified ({_UNVERIFIED})"
_running: list[threading.Thread] = []  # of this process


class Sealer:
    """Seals one save after another, off the training's thread: number ``index`` of the ``of`` processes that see the
    same folders, which all make the same calls."""

    def __init__(self, index: int, of: int):
        self.index, self.of = index, of
        self.verify = True  #: whether `check` looks

    def open(self, folder: Path) -> None:
        """Before anything is written: what earlier saves into ``folder`` sealed, on however many, holds no longer."""
        self.wait()
        for seal in folder.glob("ds_plugin_seal_[0-9][0-9][0-9][0-9][0-9].json"):
            if int(seal.stem[-5:]) % self.of == self.index:
                seal.unlink(missing_ok=True)

    def close(self, folder: Path, parts: Iterable[Path], save_id: str) -> None:
        """After everything is written, by all: begin to seal ``parts``, files and whole folders, into ``folder``."""
        files = sorted({file for part in parts for file in ([part] if part.is_file() else part.rglob("*"))})
        # neither folders, seals, nor temporary files, which are hidden, as torch_dist's index is
        files = [f for f in files if f.name == ".metadata" or not f.name.startswith((".", "ds_plugin_seal_"))]
        files = [f for f in files if f.is_file()]
        arguments = (folder, files[self.index :: self.of], save_id, self.index, self.of)
        _running.append(threading.Thread(target=_seal, args=arguments, name="seal"))  # a process ends after it
        _running[-1].start()

    def wait(self) -> None:
        """Until this process has sealed what it saved."""
        while _running:
            _running.pop().join()

    def check(self, folder: Path) -> None:
        """`verify` a checkpoint together. Every rank calls it. Raises CheckpointError, on all alike."""
        self.wait()
        if self.verify:
            with raise_on_all_ranks():  # every rank has sealed what it saved
                pass
            with raise_on_all_ranks():
                for unseen in verify(folder, index=self.index, of=self.of):
                    warn("%s: not all of this checkpoint could be compared with what was saved", unseen)


def verify(folder: str | Path, *, index: int = 0, of: int = 1) -> list[str]:
    """Compare a checkpoint's files with the seals in ``folder``, or every ``of``-th of them from ``index`` on. Returns
    a line for each seal that is missing, since it was removed or the run ended before it was written.

    Raises CheckpointError: a file is missing, or a file or seal is damaged or of another save."""
    folder = Path(folder)
    seals = [_read(path) for path in sorted(folder.glob("ds_plugin_seal_*.json"))]
    if not seals:
        return [f"{folder} has no seals"]
    for seal in seals[1:]:
        if (seal["save_id"], seal["of"]) != (seals[0]["save_id"], seals[0]["of"]):
            raise CheckpointError(f"{folder}: its seals are of several saves; {_REMEDY}")
    files = sorted((name, *entry) for seal in seals for name, entry in seal["files"].items())
    for name, size, digest in files[index::of]:
        path = Path(os.path.normpath(folder / name))
        found = path.stat().st_size if path.is_file() else "missing"
        if found != size:
            raise CheckpointError(f"{path} was {size} bytes when it was saved and is {found} now; {_REMEDY}")
        if _digest(path) != digest:
            raise CheckpointError(f"{path} is not what was saved: its SHA-256 is another; {_REMEDY}")
    missing = set(range(seals[0]["of"])) - {seal["index"] for seal in seals}
    return [f"{folder / _NAME.format(i)} is missing" for i in sorted(missing)]


def _seal(folder: Path, files: list[Path], save_id: str, index: int, of: int) -> None:
    try:
        entries = {os.path.relpath(f, folder): [f.stat().st_size, _digest(f)] for f in files}
        seal: dict[str, Any] = {"save_id": save_id, "index": index, "of": of, "files": entries}
        write_text(folder / _NAME.format(index), json.dumps({**seal, "sha256": _own(seal)}, indent=1))
    except OSError as error:  # a full disk; or the checkpoint was removed meanwhile
        logging.getLogger("ds_plugin").warning("%s is not sealed (%s): a resume will not look at it", folder, error)


def _read(path: Path) -> dict[str, Any]:
    try:
        seal = dict(json.loads(path.read_text("utf-8")))
        if seal.pop("sha256") != _own(seal) or path.name != _NAME.format(seal["index"]):
            raise ValueError("it is not what was saved")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {_REMEDY}") from None
    return seal


def _own(seal: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(seal, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
