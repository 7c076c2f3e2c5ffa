"""Every public name of ds_plugin and megatron_patches has a docstring that says more than its name."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("ds_plugin", "megatron_patches")
FRONTS = ("ds_plugin", "megatron_patches", "megatron_patches.completep")  # those with an __all__
FILLERS = {"a", "an", "and", "by", "in", "is", "it", "of", "on", "the", "this", "to"}


def words(text: str) -> set[str]:
    """In lower case; those of an identifier, too."""
    return set(re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", text).lower()))


def says_enough(name: str, docstring: str | None) -> bool:
    """Whether it has at least two words beyond the name's own."""
    return len(words(docstring or "") - words(name) - FILLERS) >= 2


def lacking(source: str) -> Iterator[str]:
    """The public classes and functions of a module's text whose docstrings say too little, or are not there."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            if not says_enough(node.name, ast.get_docstring(node)):
                yield node.name


@pytest.mark.parametrize("package", PACKAGES)
def test_public_classes_and_functions_say_what_they_are(package):
    files = sorted((ROOT / package).rglob("*.py"))
    found = [f"{path.relative_to(ROOT)}: {name}" for path in files for name in lacking(path.read_text("utf-8"))]
    assert len(files) > 20 and not found


@pytest.mark.parametrize("package", FRONTS)
def test_exported_names_say_what_they_are(package):
    """With the public methods of exported classes: what a user reads by ``help()``."""
    module, found = importlib.import_module(package), []
    for name in module.__all__:
        value = getattr(module, name)
        members = vars(value).items() if inspect.isclass(value) else ()
        methods = {f"{name}.{n}": m for n, m in members if inspect.isfunction(m) and not n.startswith("_")}
        described = {name: value} if callable(value) else {}
        found += [n for n, one in (described | methods).items() if not says_enough(n, one.__doc__)]
    assert module.__all__ and found == []


def test_a_docstring_that_repeats_the_name_is_found():
    source = """
class RunFolder:
    "The run folder."
def save_run():
    "Write it to disk."
def load():
    pass
"""
    assert list(lacking(source)) == ["RunFolder", "load"]
