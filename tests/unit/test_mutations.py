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
