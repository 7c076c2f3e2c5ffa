"""What `tests.megatron_versions` runs and writes, without a checkout."""

import sys

import pytest

from tests import megatron_versions


def test_a_line_is_added_below_the_others():
    page = megatron_versions.added("# Versions\n\n| a |\n|---|\n| 1 |\n", ["today", "0.16.2"])
    assert page.startswith("# Versions\n\n| a |\n|---|\n| 1 |\n\n## Megatron-LM's own script\n")
    assert page.endswith("|---|---|---|---|---|---|---|\n| today | 0.16.2 |\n")
    assert megatron_versions.added(page, ["later"]) == page + "| later |\n"


@pytest.mark.slow
def test_a_checkouts_line_is_its_versions_and_pytests_last_words(tmp_path, capfd):
    package = tmp_path / "megatron" / "core" / "package_info.py"
    package.parent.mkdir(parents=True)
    package.write_text("MAJOR = 0\nMINOR = 99\nPATCH = 1\n")
    row, code = megatron_versions.tried(tmp_path, sys.executable, "nosuchtest")
    assert code == 5 and row[1] == "0.99.1" and row[3] == ".".join(map(str, sys.version_info[:3]))
    assert row[5] == "nosuchtest" and "deselected" in row[6]
