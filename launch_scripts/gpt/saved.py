"""Which run a checkpoint is of: its run.json, and the tags that there are."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_plugin.core.errors import CheckpointError

FORMAT = 2  # of run.json
_REAL = (int, float)
_NUMBERS: dict[str, tuple[type, ...]] = {"step": (int,), "steps": (int,), "seconds": _REAL, "flops": _REAL}


def read_saved(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's run.json. Raises CheckpointError: it is damaged, or of a run with another `identity`."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        found = saved["format"]
        if found == FORMAT:
            lacks = [name for name in identity if name not in saved]
            lacks += [name for name, kind in _NUMBERS.items() if not isinstance(saved.get(name), kind)]
            if lacks or not isinstance(saved["metrics"]["rows"], int) or "first" not in saved["metrics"]:
                raise KeyError(", ".join(lacks) or "metrics")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"resume: '{path}' cannot be read ({error!r}); give another --tag") from None
    if found != FORMAT:
        raise CheckpointError(
            f"resume: '{path}' has format {found!r}, this version reads {FORMAT}; "
            "resume with the version it is from, or start a new run with another --name"
        )
    for key, value in identity.items():
        if saved[key] != value:
            raise CheckpointError(
                f"resume: '{path.parent}' was trained with {key} {saved[key]!r}, this run has {value!r}; give the "
                f"same {key}, or start a new run with another --name"
            )
    return dict(saved)


def latest_tag(root: Path) -> str:
    """The tag in checkpoints/latest."""
    try:
        return (root / "latest").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        what = f"'{root / 'latest'}' cannot be read ({error})"
        raise CheckpointError(f"resume: {what}; give --tag one of {tags(root)}") from None


def tags(root: Path) -> str:
    """The checkpoints that there are, for a message."""
    return ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())) or "none: the folder is empty"
