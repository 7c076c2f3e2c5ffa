"""``python -m ds_plugin``: tools around a run.

env                              what this installation consists of
to-universal FOLDER TARGET       convert a checkpoint to DeepSpeed's universal format, for another number of ranks
translate-config OLD.json        DeepSpeed's curriculum_learning as sequence_length_warmup: the new file
tune-warmup --config FILE        find the warmup's start length and duration with short runs of a script
merge CKPT... --out FOLDER       the weighted mean of checkpoints, as safetensors or torch_dist
plan --config FILE               what a recipe comes to on so many ranks: lengths, tokens, rates, memory, time
"""

import argparse
import json
import os
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    from ds_plugin.plan import plan
    from ds_plugin.tune import search
    from ds_plugin.weight_averaging.config import KINDS

    parser = argparse.ArgumentParser(
        prog="python -m ds_plugin", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="versions, accelerator, optional packages, active patches")
    convert = commands.add_parser("to-universal", help="convert a checkpoint for another number of ranks")
    convert.add_argument("folder", type=Path, help="the tag folder, e.g. checkpoints/global_step100")
    convert.add_argument("target", type=Path, help="a new folder, e.g. checkpoints/global_step100_universal")
    convert.add_argument("--workers", type=int, default=1, help="processes of DeepSpeed's converter")
    translator = commands.add_parser("translate-config", help="curriculum_learning as sequence_length_warmup")
    translator.add_argument("config", type=Path, metavar="OLD.json", help="a DeepSpeed config; it is not changed")
    translator.add_argument("--out", type=Path, metavar="FILE", help="write the new config here, not to stdout")
    search.add_arguments(commands.add_parser("tune-warmup", help="find start length and duration with short runs"))
    merging = commands.add_parser("merge", help="the weighted mean of checkpoints, as safetensors or torch_dist")
    merging.add_argument("checkpoints", nargs="+", metavar="CKPT", help="oldest first; of one kind")
    merging.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new, or of an interrupted merge")
    merging.add_argument("--weights", default="mean", help=f"{', '.join(KINDS)}, or numbers such as 0.2,0.3,0.5")
    merging.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="shards made at a time")
    merging.add_argument("--dtype", help="fp32, bf16 or fp16; else that of the masters or the files read")
    merging.add_argument("--shard-gb", type=float, default=5.0, help="size of the shards made from DeepSpeed files")
    plan.add_arguments(commands.add_parser("plan", help="what a recipe comes to, before the first step"))
    args = parser.parse_args(arguments)
    if args.command == "plan":
        return plan.command(args)
    if args.command == "tune-warmup":
        return search.command(args)
    if args.command == "merge":
        from ds_plugin.weight_averaging import merge

        return merge.command(args)
    if args.command == "env":
        return show_environment()
    return to_universal(args) if args.command == "to-universal" else translate_config(args)


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


def translate_config(args: argparse.Namespace) -> int:
    """Print (or write) the config as it is read, and on stderr what changed and why."""
    from ds_plugin.atomic import atomic_write
    from ds_plugin.config import PluginConfig, load_json
    from ds_plugin.errors import ConfigError
    from ds_plugin.sequence_length_warmup.translate import translate

    try:
        config, notes = translate(load_json(args.config))
        PluginConfig.from_dict(config)  # what is printed is a config that works
        text = json.dumps(config, indent=2) + "\n"
        if args.out is not None:
            atomic_write(args.out, lambda path: path.write_text(text, encoding="utf-8"))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: --out {str(args.out)!r} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    if args.out is None:
        print(text, end="")
    for note in notes or ["nothing to translate"]:
        print(f"note: {note}", file=sys.stderr)
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
