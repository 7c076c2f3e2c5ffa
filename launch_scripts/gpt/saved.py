"""Which run a checkpoint is of: its run.json, and the tags that there are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from ds_plugin.core.errors import CheckpointError
from ds_plugin.core.json_files import read_json, read_tag

FORMAT = 2  # of run.json


class _Rows(TypedDict):
    """What metrics.csv held."""

    rows: int
    first: Any


_WANTED = {"step": int, "steps": int, "seconds": float, "flops": float, "metrics": _Rows}


def read_saved(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's run.json. Raises CheckpointError: it is damaged, or of a run with another `identity`."""
    remedy = f"give another --tag, one of {tags(path.parent.parent)}"
    saved: dict[str, Any] = read_json(path, {"format": int}, remedy=remedy)
    found = saved["format"]
    if found != FORMAT:
        raise CheckpointError(
            f"resume: '{path}' has format {found!r}, this version reads {FORMAT}; "
            "resume with the version it is from, or start a new run with another --name"
        )
    read_json(path, {**dict.fromkeys(identity, Any), **_WANTED}, remedy=remedy)
    for key, value in identity.items():
        if saved[key] != value:
            raise CheckpointError(
                f"resume: '{path.parent}' was trained with {key} {saved[key]!r}, this run has {value!r}; give the "
                f"same {key}, or start a new run with another --name"
            )
    return saved


def latest_tag(root: Path) -> str:
    """The tag in checkpoints/latest."""
    return read_tag(root / "latest", remedy=f"give --tag one of {tags(root)}")


def tags(root: Path) -> str:
    """The checkpoints that there are, for a message."""
    return ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())) or "none: the folder is empty"
