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
    if not isinstance(part, (Mapping, tuple, list)):
        return next(values)
    parts = list(part.values()) if isinstance(part, Mapping) else part
    found = [rebuilt(inner, values) for inner in parts]
    if all(new is old for new, old in zip(found, parts, strict=True)):
        return part
    if not isinstance(part, Mapping):
        return type(part)(*found) if hasattr(part, "_fields") else type(part)(found)  # a named tuple's, one by one
    # a copy, for its own kind: users read batch.input_ids
    whole: Any = copy.copy(part) if isinstance(part, MutableMapping) else {}
    for key, value in zip(part, found, strict=True):
        whole[key] = value
    return whole


def describe(value: Any) -> str:
    """A value's kind, for messages; a tensor's shape."""
    return f"{value.dtype} {list(value.shape)}" if torch.is_tensor(value) else type(value).__name__
