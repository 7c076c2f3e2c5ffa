"""``python -m ds_plugin``: tools around a run.

env                              what this installation consists of
to-universal FOLDER TARGET       convert a checkpoint to DeepSpeed's universal format, for another number of ranks
"""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m ds_plugin", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="versions, accelerator, optional packages, active patches")
    convert = commands.add_parser("to-universal", help="convert a checkpoint for another number of ranks")
    convert.add_argument("folder", type=Path, help="the tag folder, e.g. checkpoints/global_step100")
    convert.add_argument("target", type=Path, help="a new folder, e.g. checkpoints/global_step100_universal")
    convert.add_argument("--workers", type=int, default=1, help="processes of DeepSpeed's converter")
    args = parser.parse_args(arguments)
    return show_environment() if args.command == "env" else to_universal(args)


def to_universal(args: argparse.Namespace) -> int:
    """Convert, and say how to resume from the result."""
    from ds_plugin.errors import PluginError
    from ds_plugin.run import startup

    startup.quiet()
    from ds_plugin import checkpoint

    try:
        checkpoint.to_universal(args.folder, args.target, workers=args.workers)
    except PluginError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f'{args.target}: resume with "checkpoint": {{"load_universal": true}} in the JSON')
    return 0


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
