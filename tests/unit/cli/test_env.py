"""``ds-plugin env``."""

import contextlib
import io
from importlib.metadata import version

from ds_plugin.cli import env
from ds_plugin.cli.main import main


def _said():
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["env"]) == 0
    return said.getvalue()


def test_env_names_versions_accelerator_options_and_patches(workers):
    [said] = workers(1).run(_said)  # nothing is patched there
    rows = dict(line.split(maxsplit=1) for line in said.splitlines() if not line.startswith("active patches"))
    assert rows["deepspeed"] == version("deepspeed") and rows["torch"] == version("torch")
    assert rows["accelerator"].split()[0].rstrip(",") in ("cpu", "1", "2", "4", "8")
    assert {"apex", "transformer-engine", "tensorboard"} <= set(rows)
    assert said.splitlines()[-1].split() == ["active", "patches", "none"]


def test_active_patches_are_listed(capsys):
    from ds_plugin.core.patch import Patch

    patch = Patch("json.detect_encoding", lambda b: "utf-8", reason="a test's", prefixes=())
    patch.apply()
    try:
        assert main(["env"]) == 0
    finally:
        patch.revert()
    assert "json.detect_encoding (a test's)" in capsys.readouterr().out


def test_the_index_packages_apex_is_not_nvidias(monkeypatch):
    found = {"apex": object(), "apex.optimizers": None}
    monkeypatch.setattr(env.importlib.util, "find_spec", lambda name: found.get(name))
    assert env.optional()["apex"] is None
