"""Six ways to damage a file of a checkpoint."""

import shutil
from collections.abc import Callable
from pathlib import Path


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _halve(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def damages(other_step: Path, other_rank: Path | None) -> dict[str, Callable[[Path], object]]:
    """By name. ``other_step``: the same file of another save; ``other_rank``: another rank's of this one, if any."""
    found: dict[str, Callable[[Path], object]] = {
        "flipped": _flip,
        "halved": _halve,
        "empty": lambda path: path.write_bytes(b""),
        "deleted": Path.unlink,
        "of another step": lambda path: shutil.copy(other_step, path),
    }
    if other_rank is not None:
        found["of another rank"] = lambda path: shutil.copy(other_rank, path)
    return found
