"""``ds-plugin run SCRIPT.py ...``: a script of Hugging Face's world, as it is, with the methods in it.

Under a launcher, ``-m ds_plugin run`` stands before the script: ``torchrun --nproc-per-node 8 -m ds_plugin run train.py
...``, ``accelerate launch -m ds_plugin run train.py ...``, ``deepspeed --module ds_plugin run train.py ...``.
"""

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from ds_plugin.core.errors import ConfigError, PluginError, say
from ds_plugin.huggingface.hooks import enable


def run(script: str, arguments: Sequence[str], *, config: str | None = None, module: bool = False) -> int:
    """Run a script, or a module by its name, in this process's ``__main__``; the exit code. ``config``: of `enable`."""
    try:
        if not module and not Path(script).is_file():
            raise ConfigError(f"run: there is no script {script!r}; give a file, or -m and a module's name")
        enable(config)
    except PluginError as error:  # before there are process groups: every rank has found the same
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    sys.argv = [script, *arguments]
    try:
        if module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(script).resolve().parent))  # as Python does
            runpy.run_path(script, run_name="__main__")
    except PluginError as error:
        return say(error)
    return 0
