"""The ``ds-plugin`` command."""
