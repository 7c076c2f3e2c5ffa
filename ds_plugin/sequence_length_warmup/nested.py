"""Batches as they come: tensors in nested mappings, tuples and lists, each under the name of its innermost key."""

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch


class Leaf(NamedTuple):
    """What is no mapping, tuple or list in a batch."""

    name: str | None  # the innermost that it lies under; None under none
    keys: tuple[Any, ...]  # of mappings and sequences, from the outside in
    value: Any

    @property
    def where(self) -> str:
        """All keys, for messages."""
        return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in self.keys).removeprefix(".")


def leaves(batch: Any, name: str | None = None, keys: tuple[Any, ...] = ()) -> list[Leaf]:
    """All that lies in nested mappings, tuples and lists, in order. ``name``, ``keys``: what ``batch`` lies in."""
    if isinstance(batch, Mapping):
        parts = list(batch.items())
    elif isinstance(batch, (tuple, list)):
        parts = list(enumerate(batch))
    else:
        return [Leaf(name, keys, batch)]
    return [leaf for key, part in parts for leaf in leaves(part, key if isinstance(key, str) else name, (*keys, key))]


def rebuilt(part: Any, values: Iterator[Any]) -> Any:
    """``part`` with other leaves, in their order; a branch in which none has changed is the same object."""
    if isinstance(part, Mapping):
        found = {key: rebuilt(inner, values) for key, inner in part.items()}
        if all(found[key] is inner for key, inner in part.items()):
            return part
        if not isinstance(part, MutableMapping):
            return found
        whole = copy.copy(part)  # of its own kind: users read batch.input_ids
        for key, inner in found.items():
            whole[key] = inner
        return whole
    if isinstance(part, (tuple, list)):
        parts = [rebuilt(inner, values) for inner in part]
        if all(new is old for new, old in zip(parts, part, strict=True)):
            return part
        named = hasattr(part, "_fields")  # a named tuple takes its parts one by one
        return type(part)(*parts) if named else type(part)(parts)
    return next(values)


def describe(value: Any) -> str:
    """A value's kind, for messages; a tensor's shape."""
    return f"{value.dtype} {list(value.shape)}" if torch.is_tensor(value) else type(value).__name__
