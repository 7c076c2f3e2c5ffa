"""The breakages of `tests.mutations` are of the code and the tests as they are. They are run by hand, not here."""

import ast
from pathlib import Path

import pytest

from tests import mutations

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", mutations.MUTATIONS)
def test_each_breaks_one_place_and_names_a_test(name):
    mutation = mutations.MUTATIONS[name]
    text = (ROOT / mutation.file).read_text("utf-8")
    assert text.count(mutation.old) == 1, f"{mutation.file} has {mutation.old!r} {text.count(mutation.old)} times"
    ast.parse(text.replace(mutation.old, mutation.new))  # red by what it does, not by its syntax
    file, _, test = mutation.test.partition("::")
    tests = ast.parse((ROOT / file).read_text("utf-8")).body
    names = [node.name for node in tests if isinstance(node, ast.FunctionDef)]
    assert test.partition("[")[0] in names, mutation.test


def test_no_test_they_name_is_slow(request):
    """Of the whole suite; of a few files that were asked for, those that belong to them."""
    collected = [item.nodeid for item in request.session.items]
    files = {nodeid.partition("::")[0] for nodeid in collected}
    whole = len(files) > 80 and not request.config.option.keyword
    named = [m.test for m in mutations.MUTATIONS.values() if whole or m.test in collected]
    assert [test for test in named if not any(n == test or n.startswith(f"{test}[") for n in collected)] == []
