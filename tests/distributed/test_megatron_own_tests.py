"""Megatron-LM's own tests with the patches off, reverted and idle: the comparison, and (slow) those of a checkout."""

import json
import os

import pytest

from tests import megatron_own_tests
from tests.megatron_own_tests import differences, summary

PASSED = {"outcome": "passed", "error": "", "refused": False, "called": []}
FAILED = {**PASSED, "outcome": "failed", "error": "ValueError: 1"}
REFUSED = {**PASSED, "outcome": "failed", "error": "ConfigError: completep", "refused": True, "called": ["prepare"]}
CHECKOUT = os.environ.get("MEGATRON_LM_PATH")


@pytest.mark.parametrize(
    "alone, other, lines",
    [
        (PASSED, PASSED, []),
        (FAILED, FAILED, []),
        (PASSED, FAILED, ["f::t: alone passed, here failed ValueError: 1"]),
        (FAILED, {**FAILED, "error": "ValueError: 2"}, ["f::t: alone failed ValueError: 1, here failed ValueError: 2"]),
        (PASSED, None, ["f::t: alone passed, here not run"]),
        (None, PASSED, ["f::t: alone not run, here passed"]),
        (PASSED, {**PASSED, "called": ["prepare"]}, ["f::t: called prepare"]),
        (PASSED, REFUSED, ["f::t: alone passed, here failed ConfigError: completep", "f::t: called prepare"]),
    ],
)
def test_every_other_end_of_a_test_is_a_difference(alone, other, lines):
    results = [{} if test is None else {"f::t": test} for test in (alone, other)]
    assert differences(*results) == lines
    while_on = [] if other is REFUSED else [line for line in lines if "called" not in line]
    assert differences(*results, refusals=True, calls=True) == while_on


def test_a_file_that_cannot_be_imported_and_a_skipped_test_have_not_run():
    counts = summary({"f": {**PASSED, "outcome": "error"}, "g::t": {**PASSED, "outcome": "skipped"}, "g::u": REFUSED})
    assert {name: n for name, n in counts.items() if n} == {
        "ran": 1, "failed": 1, "skipped": 1, "refused": 1, "called a wrapper": 1, "unreadable": 1,
    }  # fmt: skip


if CHECKOUT is not None:

    @pytest.mark.slow
    @pytest.mark.timeout(7200)
    def test_the_checkouts_own_tests_end_the_same_with_the_patches_off(tmp_path, capfd):
        code = megatron_own_tests.main(["--megatron", CHECKOUT, "--out", str(tmp_path / "results.json")])
        assert code == 0, capfd.readouterr().out[-4000:]
        counts = json.loads((tmp_path / "results.json").read_text())["counts"]
        assert counts["off"] == counts["reverted"] == counts["alone"]
        assert counts["on"]["called one and passed"] > 0
