"""``python -m megatron_patches SCRIPT.py ... --ds-plugin-config FILE``: see `megatron_patches.training_loop.script`."""

import sys

from megatron_patches.training_loop import script

if __name__ == "__main__":
    if len(sys.argv) < 2 or not sys.argv[1].endswith(".py"):
        sys.exit("usage: python -m megatron_patches SCRIPT.py ... --ds-plugin-config FILE (other commands: ds-plugin)")
    sys.exit(script.run(sys.argv[1:]))
