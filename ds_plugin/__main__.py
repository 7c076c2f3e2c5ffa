"""``python -m ds_plugin`` is the command `ds-plugin`."""

import sys

from ds_plugin.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
