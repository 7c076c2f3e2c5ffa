"""One record per change to a framework: what was replaced, by what, why, and how to put it back.

Frameworks copy names at import time (``from torch.cuda import _lazy_call``), so replacing the attribute where it was
defined is not enough: a patch rebinds every module-level name that holds the same function or class. Reverting does the
same in the other direction, which also catches modules imported while the patch was on.
"""

import importlib
import sys
from collections.abc import Callable
from importlib import metadata
from types import ModuleType
from typing import Any, NamedTuple

from ds_plugin.core.errors import PluginError, StateError

_ABSENT = object()
_DISTRIBUTIONS = {"megatron": "megatron-core"}


class Active(NamedTuple):
    """One applied change: the dotted symbol (or a short name) and why it was changed."""

    name: str
    reason: str


class Change:
    """A reversible change to this process, listed by `active()` while it is on."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.reason = reason

    @property
    def applied(self) -> bool:
        return self in _REGISTRY

    def apply(self) -> None:
        """Make the change; when it is already on, do nothing.

        Raises PluginError when the framework lacks the symbol.
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
            _REGISTRY.remove(self)

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
    """Replace one symbol of a framework, wherever it is bound.

    target: dotted path of a module attribute or of a class attribute (``"torch.cuda.synchronize"``,
        ``"megatron.core.x.Class.method"``). Modules on the way are imported.
    replacement: the new value, as it should lie in the module or class: wrap a static method in `staticmethod`. With
        `prefixes` it must be an object of the patch's own, since `revert` rebinds every name that holds it.
    reason: one phrase for `active()`.
    prefixes: packages searched for copies of a module-level function or class; () leaves copies alone.

    `original` is the framework's object while the patch is on, so that a replacement can call it.
    """

    def __init__(self, target: str, replacement: Any, *, reason: str, prefixes: tuple[str, ...] = ("megatron",)):
        super().__init__(target, reason)
        self.replacement, self.prefixes = replacement, prefixes
        self.original: Any = None
        self._owner: Any = None
        self._saved: Any = _ABSENT
        self._attribute = target.rpartition(".")[2]

    def _do(self) -> None:
        owner = _owner_of(self.name)
        self.original = _get(owner, self._attribute, self.name)
        self._owner = owner
        # What lies in the owner itself: a class may only inherit the symbol, and a static method must stay one.
        self._saved = vars(owner).get(self._attribute, _ABSENT)
        setattr(owner, self._attribute, self.replacement)
        self._rebind(self.original, self.replacement)

    def _undo(self) -> None:
        if vars(self._owner).get(self._attribute, _ABSENT) is not self.replacement:
            raise StateError(f"{self.name} was replaced again after this patch ({self.reason}); revert that one first")
        self._rebind(self.replacement, self.original)
        if self._saved is _ABSENT:
            delattr(self._owner, self._attribute)
        else:
            setattr(self._owner, self._attribute, self._saved)
        self._owner, self._saved, self.original = None, _ABSENT, None

    def _rebind(self, old: Any, new: Any) -> None:
        # Only functions and classes have an identity of their own; () or None is bound to thousands of unrelated names.
        if not (isinstance(self._owner, ModuleType) and callable(self.original)) or old is new:
            return
        packages = tuple(f"{prefix}." for prefix in self.prefixes)  # whole: "megatron" is not megatron_patches
        for module in [module for name, module in sys.modules.items() if f"{name}.".startswith(packages)]:
            names = getattr(module, "__dict__", {})
            for name in [name for name, value in names.items() if value is old]:
                names[name] = new


_REGISTRY: list[Change] = []


def active() -> list[Active]:
    """The changes that are on, oldest first."""
    return [Active(change.name, change.reason) for change in _REGISTRY]


def revert() -> None:
    """Undo every change, newest first, so that stacked patches of one symbol unwind in order."""
    for change in reversed(list(_REGISTRY)):
        change.revert()


def _owner_of(target: str) -> Any:
    parts = target.split(".")[:-1]
    for cut in range(len(parts), 0, -1):
        path = ".".join(parts[:cut])
        try:
            owner: Any = importlib.import_module(path)
        except ModuleNotFoundError as error:
            # Not a module but a class, or not there at all. Anything else is a broken import inside the framework.
            if error.name is None or not f"{path}.".startswith(f"{error.name}."):
                raise
            continue
        for name in parts[cut:]:
            owner = _get(owner, name, target)
        return owner
    raise _missing(target, f"no module named {target.split('.')[0]!r}")


def _get(owner: Any, name: str, target: str) -> Any:
    if not hasattr(owner, name):
        label = f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else owner.__name__
        raise _missing(target, f"{label} has no attribute {name!r}")
    return getattr(owner, name)


def _missing(target: str, detail: str) -> PluginError:
    package = target.split(".")[0]
    distribution = _DISTRIBUTIONS.get(package, package)
    try:
        found = f"{distribution} {metadata.version(distribution)}"
    except metadata.PackageNotFoundError:
        found = f"{distribution} (not installed)"
    return PluginError(f"cannot patch {target} in {found}: {detail}; use a version this plugin was tested with")
