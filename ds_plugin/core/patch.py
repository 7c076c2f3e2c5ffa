"""One record per change to a framework: what was replaced, by what, why, and how to put it back.

Frameworks copy names at import time (``from torch.cuda import _lazy_call``), so a patch rebinds every module-level name
that holds the same function or class. So does reverting, also in modules imported while the patch was on."""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from types import ModuleType
from typing import Any, NamedTuple

from ds_plugin.core.errors import PluginError, StateError

_ABSENT = object()
_DISTRIBUTIONS = {"megatron": "megatron-core"}
_REGISTRY: list["Change"] = []


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


class Active(NamedTuple):
    """One applied change: the dotted symbol (or a short name) and why it was changed."""

    name: str
    reason: str


class Change:
    """A reversible change to this process, as a pair of functions: a log filter, say. `active()` lists what is on."""

    def __init__(self, name: str, on: Callable[[], None], off: Callable[[], None], *, reason: str) -> None:
        self.name, self.reason, self._on, self._off = name, reason, on, off

    @property
    def applied(self) -> bool:
        return self in _REGISTRY

    def apply(self) -> None:
        """Make the change, unless it is on. Raises PluginError when the framework lacks the symbol."""
        if not self.applied:
            self._on()
            _REGISTRY.append(self)

    def revert(self) -> None:
        """Undo the change exactly, if it is on. Raises StateError when something else replaced the same symbol
        afterwards and must be undone first."""
        if self.applied:
            self._off()
            _REGISTRY.remove(self)


class Patch(Change):
    """Replace one symbol of a framework, wherever it is bound.

    target: dotted path of a module's or a class's attribute (``"megatron.core.x.Class.method"``).
    replacement: the new value, as it should lie in the module or class: wrap a static method in `staticmethod`. With
        `prefixes` it must be an object of the patch's own, since `revert` rebinds every name that holds it.
    prefixes: packages searched for copies of a module-level function or class; () leaves copies alone.

    `original` is the framework's object while the patch is on, so that a replacement can call it."""

    def __init__(self, target: str, replacement: Any, *, reason: str, prefixes: tuple[str, ...] = ("megatron",)):
        super().__init__(target, self._replace, self._restore, reason=reason)
        self.replacement, self.prefixes = replacement, prefixes
        self.original: Any = None
        self._path, _, self._attribute = target.rpartition(".")

    def _replace(self) -> None:
        owner = _owner_of(self._path, self.name)
        self.original = _get(owner, self._attribute, self.name)
        # What lies in the owner itself: a class may only inherit the symbol, and a static method must stay one.
        self._owner, self._saved = owner, vars(owner).get(self._attribute, _ABSENT)
        setattr(owner, self._attribute, self.replacement)
        self._rebind(self.original, self.replacement)

    def _restore(self) -> None:
        if vars(self._owner).get(self._attribute, _ABSENT) is not self.replacement:
            raise StateError(f"{self.name} was replaced again after this patch ({self.reason}); revert that one first")
        self._rebind(self.replacement, self.original)
        if self._saved is _ABSENT:
            delattr(self._owner, self._attribute)
        else:
            setattr(self._owner, self._attribute, self._saved)
        self.original = None

    def _rebind(self, old: Any, new: Any) -> None:
        # Only functions and classes have an identity of their own; () or None is bound to thousands of unrelated names.
        if not (isinstance(self._owner, ModuleType) and callable(self.original)) or old is new:
            return
        packages = tuple(f"{prefix}." for prefix in self.prefixes)  # whole: "megatron" is not megatron_patches
        for module in [module for name, module in sys.modules.items() if f"{name}.".startswith(packages)]:
            names = getattr(module, "__dict__", {})
            for name in [name for name, value in names.items() if value is old]:
                names[name] = new


def active() -> list[Active]:
    """The changes that are on, oldest first."""
    return [Active(change.name, change.reason) for change in _REGISTRY]


def revert(keep: int = 0) -> None:
    """Undo all changes but the ``keep`` oldest, newest first, so that stacked patches of one symbol unwind in order."""
    for change in reversed(_REGISTRY[keep:]):
        change.revert()


def _owner_of(path: str, target: str) -> Any:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        # Not a module but a class, or not there at all. Anything else is a broken import inside the framework.
        if not f"{path}.".startswith(f"{error.name}."):
            raise
    parent, _, name = path.rpartition(".")
    if not parent:
        raise _missing(target, f"no module named {path!r}")
    return _get(_owner_of(parent, target), name, target)


def _get(owner: Any, name: str, target: str) -> Any:
    if not hasattr(owner, name):
        raise _missing(target, f"{getattr(owner, '__qualname__', owner.__name__)} has no attribute {name!r}")
    return getattr(owner, name)


def _missing(target: str, detail: str) -> PluginError:
    package = target.split(".")[0]
    distribution = _DISTRIBUTIONS.get(package, package)
    found = next((there.version for there in metadata.distributions(name=distribution)), "(not installed)")
    what = f"cannot patch {target} in {distribution} {found}"
    return PluginError(f"{what}: {detail}; use a version this plugin was tested with")
