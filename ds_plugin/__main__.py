"""``python -m ds_plugin env``: what this installation consists of."""

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ds_plugin", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="versions, accelerator, optional packages, active patches")
    parser.parse_args(arguments)
    return show_environment()


def show_environment() -> int:
    """Print versions, accelerator, optional packages and patches: what a report of a defect should begin with."""
    from ds_plugin.run import env, startup

    startup.quiet()
    import megatron_patches

    rows = [(name, version) for name, version in env.versions().items()]
    rows.append(("accelerator", env.accelerator()))
    rows += [(name, version or "not found (optional)") for name, version in env.optional().items()]
    active = [f"{patch.name} ({patch.reason})" for patch in megatron_patches.active()]
    rows.append(("active patches", "; ".join(active) or "none"))
    for name, value in rows:
        print(f"{name:<20} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
