"""What `tests.megatron_versions` runs and writes, without a checkout."""

import sys

import pytest

from tests import megatron_versions


def test_a_line_is_added_below_the_others_of_its_table():
    script, bridge = megatron_versions.TITLE, megatron_versions.BRIDGE
    page = megatron_versions.added("# Versions\n\n| a |\n|---|\n| 1 |\n", script, ["today", "0.16.2"])
    assert page.startswith(f"# Versions\n\n| a |\n|---|\n| 1 |\n\n{script}\n")
    assert page.endswith("|---|---|---|---|---|---|---|\n| today | 0.16.2 |\n")
    assert megatron_versions.added(page, script, ["later"]) == page + "| later |\n"
    both = megatron_versions.added(page, bridge, ["0.6.2"])
    assert both.startswith(f"{page}\n{bridge}\n") and both.endswith("|---|\n| 0.6.2 |\n")
    again = megatron_versions.added(both, script, ["later"])
    assert again == both.replace("| today | 0.16.2 |\n", "| today | 0.16.2 |\n| later |\n")


@pytest.mark.slow
def test_a_checkouts_line_is_its_versions_and_pytests_last_words(tmp_path, capfd):
    package = tmp_path / "megatron" / "core" / "package_info.py"
    package.parent.mkdir(parents=True)
    package.write_text("MAJOR = 0\nMINOR = 99\nPATCH = 1\n")
    row, code = megatron_versions.tried(tmp_path, sys.executable, "nosuchtest")
    assert code == 5 and row[1] == "0.99.1" and row[3] == ".".join(map(str, sys.version_info[:3]))
    assert row[5] == "nosuchtest" and "deselected" in row[6]
