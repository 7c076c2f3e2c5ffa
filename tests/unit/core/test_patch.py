"""Patch records, on a made-up host so that every kind of binding can be laid out by hand."""

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
def host():
    """fakehost.core defines things; fakehost.user and fakehost_other copied them at import time."""
    source = """
def function(): return "host"
empty = ()
class Base:
    def inherited(self): return "host"
    @staticmethod
    def static(): return "host"
class Class(Base):
    def method(self): return "host"
"""
    names = ["fakehost", "fakehost.core", "fakehost.user", "fakehost_other"]
    modules = {name: types.ModuleType(name) for name in names}
    exec(source, vars(modules["fakehost.core"]))
    for cls in ("Base", "Class"):
        vars(modules["fakehost.core"])[cls].__module__ = "fakehost.core"
    core = modules["fakehost.core"]
    for name in ("fakehost.user", "fakehost_other"):
        vars(modules[name]).update(copied=core.function, empty=core.empty, Copied=core.Class)
    modules["fakehost"].__path__ = []
    sys.modules.update(modules)
    before = {name: dict(vars(module)) for name, module in modules.items()}
    user, other = modules["fakehost.user"], modules["fakehost_other"]
    yield types.SimpleNamespace(core=core, user=user, other=other, before=before)
    megatron_patches.revert()
    for name in [name for name in sys.modules if name.split(".")[0] in ("fakehost", "fakehost_other")]:
        del sys.modules[name]


def assert_as_before(host):
    for name, names in host.before.items():
        assert vars(sys.modules[name]) == names


def patch(target, value=replacement, **kwargs):
    return Patch(target, value, reason="test", prefixes=kwargs.pop("prefixes", ("fakehost",)), **kwargs)


def test_every_binding_is_replaced_and_restored(host):
    change = patch("fakehost.core.function")
    change.apply()
    assert host.core.function is replacement
    assert host.user.copied is replacement
    assert host.other.copied() == "host", "fakehost_other only starts with the same letters"
    assert change.original() == "host"
    change.revert()
    assert_as_before(host)


def test_a_class_is_rebound_like_a_function(host):
    class Mine:
        pass

    patch("fakehost.core.Class", Mine).apply()
    assert host.core.Class is Mine
    assert host.user.Copied is Mine
    megatron_patches.revert()
    assert_as_before(host)


def test_apply_and_revert_twice_are_once(host):
    change = patch("fakehost.core.function")
    change.apply()
    change.apply()
    assert change.original() == "host", "a second apply must not take the replacement for the original"
    assert megatron_patches.active() == [Active("fakehost.core.function", "test")]
    change.revert()
    change.revert()
    assert megatron_patches.active() == []
    assert_as_before(host)


def test_a_module_imported_while_the_patch_is_on_is_restored_too(host):
    change = patch("fakehost.core.function")
    change.apply()
    late = types.ModuleType("fakehost.late")
    late.copied = host.core.function
    sys.modules["fakehost.late"] = late
    change.revert()
    assert late.copied() == "host"


def test_a_value_that_is_no_function_is_replaced_only_where_it_lies(host):
    """() is one object for the whole process: rebinding every name that holds it would corrupt the host."""
    patch("fakehost.core.empty", (1,)).apply()
    assert host.core.empty == (1,)
    assert host.user.empty == ()
    megatron_patches.revert()
    assert_as_before(host)


def test_methods_inherited_and_static(host):
    cls = host.core.Class
    names = set(vars(cls))
    changes = [
        patch("fakehost.core.Class.method"),
        patch("fakehost.core.Class.inherited"),
        patch("fakehost.core.Base.static", staticmethod(replacement)),
    ]
    for change in changes:
        change.apply()
    assert [cls().method(), cls().inherited(), cls.static()] == ["patched"] * 3
    megatron_patches.revert()
    assert [cls().method(), cls().inherited(), cls.static()] == ["host"] * 3
    assert isinstance(vars(host.core.Base)["static"], staticmethod)
    assert set(vars(cls)) == names, "inherited attributes must be gone, not just reset"


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("fakehost.core.missing", "'missing'"),
        ("fakehost.core.Class.missing", "'missing'"),
        ("fakehost.core.Missing.method", "'Missing'"),
        ("fakehost.nowhere.function", "'nowhere'"),
        ("nohost.function", "nohost"),
    ],
)
def test_a_missing_symbol_is_one_error_naming_it_and_the_host(host, target, names):
    with pytest.raises(PluginError) as caught:
        patch(target).apply()
    assert target in str(caught.value)
    assert names in str(caught.value)
    assert megatron_patches.active() == []
    assert_as_before(host)


def test_the_error_names_the_host_version():
    with pytest.raises(PluginError) as caught:
        patch("torch.cuda.no_such_function").apply()
    assert f"in torch {metadata.version('torch')}: " in str(caught.value)


def test_a_broken_import_inside_the_host_is_not_called_a_missing_symbol(tmp_path, monkeypatch):
    (tmp_path / "brokenhost.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        patch("brokenhost.function").apply()


def test_stacked_patches_unwind_in_order_and_refuse_another(host):
    first = patch("fakehost.core.function", lambda: 1)
    second = patch("fakehost.core.function", lambda: 2)
    first.apply()
    second.apply()
    assert second.original() == 1
    with pytest.raises(StateError, match="fakehost.core.function"):
        first.revert()
    assert host.core.function() == host.user.copied() == 2
    megatron_patches.revert()
    assert_as_before(host)


def test_a_switch_is_listed_and_reverted():
    calls = []
    switch = Change("a filter", lambda: calls.append("on"), lambda: calls.append("off"), reason="test")
    switch.apply()
    switch.apply()
    assert megatron_patches.active() == [Active("a filter", "test")]
    megatron_patches.revert()
    assert calls == ["on", "off"]


def test_importing_the_package_imports_no_host():
    code = "import sys, megatron_patches; print([m for m in ('megatron', 'deepspeed', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
