"""The one way small files are read: one error that names the file, what is wrong in it, and the remedy; and what a
folder of ours says of itself."""

import json
import math
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from ds_plugin.core.errors import CheckpointError, ConfigError, PluginError
from ds_plugin.core.settings_model import Ranks

RESTORE = "restore it"
_DEEPEST = 100  # configurations nest about ten deep; Python's own limit would end what copies or writes them
_LONGEST = 4096  # characters of a text, as of a path
_TAG_BYTES = 240  # a folder's name has 255 at most, and a framework may put something in front
MANIFEST = "ds_plugin.json"  # beside DeepSpeed's own files, in a checkpoint's tag folder


@with_config(ConfigDict(extra="allow"))
class Manifest(TypedDict, total=False):
    """Which of the keys are there depends on the framework, and on what was saved."""

    format: Any
    save_id: str
    global_steps: int
    iteration: int
    world_size: Ranks
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    sections: dict[str, dict[str, Any]]
    model: dict[str, list[int]]
    state: dict[str, dict[str, Any] | list[Any]]
    lengths: dict[str, Any] | None
    spikes: dict[str, Any] | None


def read_json(
    path: Path, model: Any = None, *, error: type[PluginError] = CheckpointError, remedy: str = RESTORE
) -> Any:
    """What a small JSON file holds: an object of JSON types, or what ``model`` makes of it: a type that pydantic takes,
    or a mapping of the keys that must be there to the types of their values.

    Raises ``error``, with the file, what is wrong in it and ``remedy``: it cannot be read, is not JSON in UTF-8,
    repeats a key or nests too deep, or a value is not of the model's type."""
    return parse_json(_read(path, error, remedy), path, model, error=error, remedy=remedy)


def parse_json(
    data: bytes, path: Path, model: Any = None, *, error: type[PluginError] = CheckpointError, remedy: str = RESTORE
) -> Any:
    """As `read_json`, of bytes that were read from ``path``."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_distinct)
        wrong = trouble(value) if isinstance(value, dict) else f"a {type(value).__name__} in place of a JSON object"
        if wrong is None:
            if model is None or isinstance(model, Mapping):  # other keys are kept
                model = with_config(ConfigDict(extra="allow"))(TypedDict("Object", dict(model or {})))  # type: ignore
            text = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")  # file names may be no UTF-8
            return pydantic.TypeAdapter(model).validate_json(text, strict=True)
    except RecursionError:
        wrong = "nested too deep"
    except pydantic.ValidationError as invalid:
        first = invalid.errors()[0]
        at = "".join(f"{part}: " for part in first["loc"])
        wrong = f"{at}{first['msg'][0].lower()}{first['msg'][1:]}, got {reprlib.repr(first['input'])}"
    except ValueError as broken:  # UnicodeDecodeError and JSONDecodeError are such
        wrong = f"not JSON: {broken}"
    raise error(f"{path} is {'wrong' if error is ConfigError else 'damaged'} ({wrong}); {remedy}")


def read_tag(path: Path, *, error: type[PluginError] = CheckpointError, remedy: str = RESTORE) -> str:
    """The name that a tracker such as DeepSpeed's ``latest`` holds, of a folder below its own; or raises ``error``."""
    data = _read(path, error, remedy).strip()
    tag = data[:_TAG_BYTES].decode("utf-8", errors="replace")
    below = Path(tag).parts and not Path(tag).is_absolute() and ".." not in Path(tag).parts
    if not below or not tag.isprintable() or "\N{REPLACEMENT CHARACTER}" in tag or len(data) > _TAG_BYTES:
        raise error(f"{path} names no checkpoint, it holds {reprlib.repr(tag)}; {remedy}")
    return tag


def trouble(value: Any, *, settings: bool = False) -> str | None:
    """What is wrong with JSON-like values, and where: they nest too deep, or (``settings``) one is not finite,
    an integer beyond 64 bits, a text with a NUL, or under a key that is no text. None: nothing."""
    for at, found, depth in nested(value):
        if depth > _DEEPEST:
            return f"{at[:40]}...: nested more than {_DEEPEST} deep"
        if settings and (wrong := _no_setting(found)):
            return f"{at}: {wrong}"
    return None


def nested(value: Any) -> Iterator[tuple[str, Any, int]]:
    """JSON-like ``value`` and every one within it, each with its dotted path and how deep it lies."""
    waiting = [("", value, 0)]
    while waiting:
        yield (last := waiting.pop())
        at, found, depth = last
        items: Iterable[tuple[Any, Any]] = found.items() if isinstance(found, Mapping) else ()
        items = enumerate(found) if isinstance(found, (list, tuple)) else items
        waiting += [(f"{at}.{key}" if at else str(key), item, depth + 1) for key, item in items]


def object_at(config: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """The object under nested keys; an empty one where there is none (what else is there, its owner refuses)."""
    found: Any = config
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, dict) else {}


def _no_setting(value: Any) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value!r} is not a finite number"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str) and ("\0" in value or len(value) > _LONGEST):
        return f"a text of {len(value)} characters, or with a NUL"
    if isinstance(value, Mapping) and (keys := [k for k in value if not isinstance(k, str) or len(k) > _LONGEST]):
        return f"the key {reprlib.repr(keys[0])} is no text, or too long"
    return None


def _read(path: Path, error: type[PluginError], remedy: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as failed:  # ValueError: a name with a NUL
        raise error(f"{path} cannot be read ({getattr(failed, 'strerror', None) or failed}); {remedy}") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if repeated := sorted(key for key, times in Counter(key for key, _ in pairs).items() if times > 1):
        raise ValueError(f"it repeats the key(s) {', '.join(repeated)}; keep one of each")
    return dict(pairs)
