"""Patch records, on a made-up framework so that every kind of binding can be laid out by hand."""

import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest

import megatron_patches
from ds_plugin.core.errors import PluginError, StateError
from ds_plugin.core.patch import Active, Change, Patch

ROOT = Path(__file__).resolve().parents[3]


def replacement(*_):
    return "patched"


@pytest.fixture
def framework():
    """fakework.core defines things; fakework.user and fakework_other copied them at import time."""
    source = """
def function(): return "theirs"
empty = ()
class Base:
    def inherited(self): return "theirs"
    @staticmethod
    def static(): return "theirs"
class Class(Base):
    def method(self): return "theirs"
"""
    names = ["fakework", "fakework.core", "fakework.user", "fakework_other"]
    modules = {name: types.ModuleType(name) for name in names}
    exec(source, vars(modules["fakework.core"]))
    for cls in ("Base", "Class"):
        vars(modules["fakework.core"])[cls].__module__ = "fakework.core"
    core = modules["fakework.core"]
    for name in ("fakework.user", "fakework_other"):
        vars(modules[name]).update(copied=core.function, empty=core.empty, Copied=core.Class)
    modules["fakework"].__path__ = []
    sys.modules.update(modules)
    before = {name: dict(vars(module)) for name, module in modules.items()}
    user, other = modules["fakework.user"], modules["fakework_other"]
    yield types.SimpleNamespace(core=core, user=user, other=other, before=before)
    megatron_patches.revert()
    for name in [name for name in sys.modules if name.split(".")[0] in ("fakework", "fakework_other")]:
        del sys.modules[name]


def assert_as_before(framework):
    for name, names in framework.before.items():
        assert vars(sys.modules[name]) == names


def patch(target, value=replacement, **kwargs):
    return Patch(target, value, reason="test", prefixes=kwargs.pop("prefixes", ("fakework",)), **kwargs)


def test_every_binding_is_replaced_and_restored(framework):
    change = patch("fakework.core.function")
    change.apply()
    assert framework.core.function is replacement
    assert framework.user.copied is replacement
    assert framework.other.copied() == "theirs", "fakework_other only starts with the same letters"
    assert change.original() == "theirs"
    change.revert()
    assert_as_before(framework)


def test_a_class_is_rebound_like_a_function(framework):
    class Mine:
        pass

    patch("fakework.core.Class", Mine).apply()
    assert framework.core.Class is Mine
    assert framework.user.Copied is Mine
    megatron_patches.revert()
    assert_as_before(framework)


def test_apply_and_revert_twice_are_once(framework):
    change = patch("fakework.core.function")
    change.apply()
    change.apply()
    assert change.original() == "theirs", "a second apply must not take the replacement for the original"
    assert megatron_patches.active() == [Active("fakework.core.function", "test")]
    change.revert()
    change.revert()
    assert megatron_patches.active() == []
    assert_as_before(framework)


def test_a_module_imported_while_the_patch_is_on_is_restored_too(framework):
    change = patch("fakework.core.function")
    change.apply()
    late = types.ModuleType("fakework.late")
    late.copied = framework.core.function
    sys.modules["fakework.late"] = late
    change.revert()
    assert late.copied() == "theirs"


def test_a_value_that_is_no_function_is_replaced_only_where_it_lies(framework):
    """() is one object for the whole process: rebinding every name that holds it would corrupt the framework."""
    patch("fakework.core.empty", (1,)).apply()
    assert framework.core.empty == (1,)
    assert framework.user.empty == ()
    megatron_patches.revert()
    assert_as_before(framework)


def test_methods_inherited_and_static(framework):
    cls = framework.core.Class
    names = set(vars(cls))
    changes = [
        patch("fakework.core.Class.method"),
        patch("fakework.core.Class.inherited"),
        patch("fakework.core.Base.static", staticmethod(replacement)),
    ]
    for change in changes:
        change.apply()
    assert [cls().method(), cls().inherited(), cls.static()] == ["patched"] * 3
    megatron_patches.revert()
    assert [cls().method(), cls().inherited(), cls.static()] == ["theirs"] * 3
    assert isinstance(vars(framework.core.Base)["static"], staticmethod)
    assert set(vars(cls)) == names, "inherited attributes must be gone, not just reset"


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("fakework.core.missing", "'missing'"),
        ("fakework.core.Class.missing", "'missing'"),
        ("fakework.core.Missing.method", "'Missing'"),
        ("fakework.nowhere.function", "'nowhere'"),
        ("no_framework.function", "no_framework"),
    ],
)
def test_a_missing_symbol_is_one_error_naming_it_and_the_framework(framework, target, names):
    with pytest.raises(PluginError) as caught:
        patch(target).apply()
    assert target in str(caught.value)
    assert names in str(caught.value)
    assert megatron_patches.active() == []
    assert_as_before(framework)


def test_the_error_names_the_frameworks_version():
    with pytest.raises(PluginError) as caught:
        patch("torch.cuda.no_such_function").apply()
    assert f"in torch {metadata.version('torch')}: " in str(caught.value)


def test_a_broken_import_inside_a_framework_is_not_called_a_missing_symbol(tmp_path, monkeypatch):
    (tmp_path / "broken_framework.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        patch("broken_framework.function").apply()


def test_stacked_patches_unwind_in_order_and_refuse_another(framework):
    first = patch("fakework.core.function", lambda: 1)
    second = patch("fakework.core.function", lambda: 2)
    first.apply()
    second.apply()
    assert second.original() == 1
    with pytest.raises(StateError, match="fakework.core.function"):
        first.revert()
    assert framework.core.function() == framework.user.copied() == 2
    megatron_patches.revert()
    assert_as_before(framework)


def test_a_switch_is_listed_and_reverted():
    calls = []
    switch = Change("a filter", lambda: calls.append("on"), lambda: calls.append("off"), reason="test")
    switch.apply()
    switch.apply()
    assert megatron_patches.active() == [Active("a filter", "test")]
    megatron_patches.revert()
    assert calls == ["on", "off"]


def test_importing_the_package_imports_no_framework():
    code = "import sys, megatron_patches; print([m for m in ('megatron', 'deepspeed', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
