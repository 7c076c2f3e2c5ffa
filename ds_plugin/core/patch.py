"""One record per change to the host: what was replaced, by what, why, and how to put it back.

Host code copies names at import time (``from torch.cuda import _lazy_call``), so replacing the attribute where it was
defined is not enough: a patch rebinds every module-level name that holds the same function or class. Reverting does the
same in the other direction, which also catches modules imported while the patch was on.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

_ABSENT = object()
_DISTRIBUTIONS = {"megatron": "megatron-core"}


class Active(NamedTuple):
    """One applied change: the dotted host symbol (or a short name) and why it was changed."""

    name: str
    reason: str


class Change:
    """A reversible change to the host process, listed by `active()` while it is on."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.reason = reason

    @property
    def applied(self) -> bool:
        return any(change is self for change in _REGISTRY)

    def apply(self) -> None:
        """Make the change; when it is already on, do nothing.

        Raises PluginError when the host lacks the symbol.
        """
        if not self.applied:
            self._do()
            _REGISTRY.append(self)

    def revert(self) -> None:
        """Undo the change exactly; when it is not on, do nothing.

        Raises StateError when something else replaced the same symbol afterwards and must be undone first.
        """
        if self.applied:
            self._undo()
            _REGISTRY[:] = [change for change in _REGISTRY if change is not self]

    def _do(self) -> None:
        raise NotImplementedError

    def _undo(self) -> None:
        raise NotImplementedError


class Switch(Change):
    """A change that is no attribute (a log filter, a torch function mode), as a pair of functions."""

    def __init__(self, name: str, on: Callable[[], None], off: Callable[[], None], *, reason: str) -> None:
        super().__init__(name, reason)
        self._do = on  # type: ignore[method-assign]
        self._undo = off  # type: ignore[method-assign]


class Patch(Change):
    """Replace one host symbol, wherever it is bound.

    target: dotted path of a module attribute or of a class attribute (``"torch.cuda.synchronize"``,
        ``"megatron.core.x.Class.method"``). Modules on the way are imported.
    replacement: the new value, as it should lie in the module or class: wrap a static method in `staticmethod`. With
        `prefixes` it must be an object of the patch's own, since `revert` rebinds every name that holds it.
    reason: one phrase for `active()`.
    prefixes: packages searched for copies of a module-level function or class; () leaves copies alone.
    create: allow a symbol that the host lacks; `revert` deletes it again.

    `original` is the host's object while the patch is on, so that a replacement can call it.
    """

    def __init__(
        self,
        target: str,
        replacement: Any,
        *,
        reason: str,
        prefixes: tuple[str, ...] = ("megatron",),
        create: bool = False,
    ) -> None:
        super().__init__(target, reason)
        self.replacement = replacement
        self.prefixes = prefixes
        self.create = create
        self.original: Any = None
        self._owner: Any = None
        self._attribute = target.rpartition(".")[2]
        self._saved: Any = _ABSENT

    def _do(self) -> None:
        owner = _resolve_owner(self.name)
        found = getattr(owner, self._attribute, _ABSENT)
        if found is _ABSENT and not self.create:
            raise _missing(self.name, f"{_label(owner)} has no attribute {self._attribute!r}")
        self._owner = owner
        # What lies in the owner itself: a class may only inherit the symbol, and a static method must stay one.
        self._saved = vars(owner).get(self._attribute, _ABSENT)
        self.original = None if found is _ABSENT else found
        setattr(owner, self._attribute, self.replacement)
        if self._has_copies(found):
            _rebind(found, self.replacement, self.prefixes)

    def _undo(self) -> None:
        if vars(self._owner).get(self._attribute, _ABSENT) is not self.replacement:
            from ds_plugin.core.errors import StateError

            raise StateError(f"{self.name} was replaced again after this patch ({self.reason}); revert that one first")
        if self._has_copies(self.original):
            _rebind(self.replacement, self.original, self.prefixes)
        if self._saved is _ABSENT:
            delattr(self._owner, self._attribute)
        else:
            setattr(self._owner, self._attribute, self._saved)
        self._owner, self._saved, self.original = None, _ABSENT, None

    def _has_copies(self, value: Any) -> bool:
        # Only functions and classes have an identity of their own; () or None is bound to thousands of unrelated names.
        return isinstance(self._owner, ModuleType) and callable(value) and value is not self.replacement


_REGISTRY: list[Change] = []


def active() -> list[Active]:
    """The changes that are on, oldest first."""
    return [Active(change.name, change.reason) for change in _REGISTRY]


def revert() -> None:
    """Undo every change, newest first, so that stacked patches of one symbol unwind in order."""
    for change in reversed(list(_REGISTRY)):
        change.revert()


def _resolve_owner(target: str) -> Any:
    parts = target.split(".")[:-1]
    for cut in range(len(parts), 0, -1):
        path = ".".join(parts[:cut])
        try:
            owner: Any = importlib.import_module(path)
        except ModuleNotFoundError as error:
            # Not a module but a class, or not there at all. Anything else is a broken import inside the host.
            if error.name is None or not (path == error.name or path.startswith(error.name + ".")):
                raise
            continue
        for name in parts[cut:]:
            if not hasattr(owner, name):
                raise _missing(target, f"{_label(owner)} has no attribute {name!r}")
            owner = getattr(owner, name)
        return owner
    raise _missing(target, f"no module named {parts[0] if parts else target!r}")


def _rebind(old: Any, new: Any, prefixes: tuple[str, ...]) -> None:
    for namespace in _namespaces(prefixes):
        for name in [name for name, value in namespace.items() if value is old]:
            namespace[name] = new


def _namespaces(prefixes: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for name, module in list(sys.modules.items()):
        # Whole components only: "megatron" must not match this package, megatron_patches.
        if any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes):
            namespace = getattr(module, "__dict__", None)
            if isinstance(namespace, dict):
                yield namespace


def _label(owner: Any) -> str:
    return f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else owner.__name__


def _missing(target: str, detail: str) -> Exception:
    # Imported late so that reading the registry costs nothing.
    from importlib import metadata

    from ds_plugin.core.errors import PluginError

    distribution = _DISTRIBUTIONS.get(target.split(".")[0], target.split(".")[0])
    try:
        host = f"{distribution} {metadata.version(distribution)}"
    except metadata.PackageNotFoundError:
        host = f"{distribution} (not installed)"
    return PluginError(f"cannot patch {target} in {host}: {detail}; use a host version this plugin was tested with")
