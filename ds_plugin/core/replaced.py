"""Change an attribute of an object so that it comes back exactly: what `Plugin.install` does to an engine."""

import contextlib
from collections.abc import Iterator
from typing import Any

_ABSENT = object()


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` in the block, and afterwards again what the object itself held: nothing at all where
    its class has the attribute, as methods are shadowed."""
    before = vars(owner).get(name, _ABSENT)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _ABSENT:
            vars(owner).pop(name, None)
        else:
            setattr(owner, name, before)
