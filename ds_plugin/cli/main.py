"""``ds-plugin``: what goes before, after and around a run.

run SCRIPT ...                     run a framework's own script with the methods of a JSON file
env                                what this installation consists of
plan --config FILE                 what a recipe comes to on so many ranks: lengths, tokens, rates, memory, time
rules --config FILE                what CompleteP gives each role of a model, against its base
coord-check                        how far training moves the activations of every width and depth
lr-transfer                        losses over learning rates, widths and depths: how far the optimum moves
tune-warmup --config FILE          find the warmup's start length and duration with short runs of a script
translate-config --config FILE     DeepSpeed's curriculum_learning as sequence_length_warmup: the new file
to-universal FOLDER TARGET         convert a checkpoint to DeepSpeed's universal format, for another number of ranks
merge CKPT... --out FOLDER         the weighted mean of checkpoints, as safetensors or torch_dist
"""

import argparse
import json
import os
import sys
from pathlib import Path

from ds_plugin.core.errors import ConfigError, PluginError

FRAMEWORKS = ("megatron",)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code: 2, with one message, for whatever the user can mend."""
    args = _parser().parse_args(arguments)
    try:
        return args.run(args)
    except PluginError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    from ds_plugin.cli import sweeps
    from ds_plugin.plan import plan
    from ds_plugin.tune import search
    from ds_plugin.weight_averaging.config import KINDS

    parser = argparse.ArgumentParser(
        prog="ds-plugin", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    runner = commands.add_parser("run", help="a framework's own script, with the methods in it")
    runner.add_argument("--framework", choices=FRAMEWORKS, help="whose script it is, where its imports do not tell")
    runner.add_argument("--config", metavar="FILE", help="the JSON with the methods' sections")
    runner.add_argument("script", metavar="SCRIPT.py")
    runner.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own")
    runner.set_defaults(run=run_script)
    shown = commands.add_parser("env", help="versions, accelerator, optional packages, active patches")
    shown.set_defaults(run=show_environment)
    planner = commands.add_parser("plan", help="what a recipe comes to, before the first step")
    plan.add_arguments(planner)
    planner.set_defaults(run=plan.command)
    sweeps.add_commands(commands)
    tuner = commands.add_parser("tune-warmup", help="find start length and duration with short runs")
    search.add_arguments(tuner)
    tuner.set_defaults(run=search.command)
    translator = commands.add_parser("translate-config", help="curriculum_learning as sequence_length_warmup")
    translator.add_argument("--config", type=Path, required=True, metavar="FILE", help="DeepSpeed's; not changed")
    translator.add_argument("--out", type=Path, metavar="FILE", help="write the new config here, not to stdout")
    translator.set_defaults(run=translate_config)
    convert = commands.add_parser("to-universal", help="convert a checkpoint for another number of ranks")
    convert.add_argument("folder", type=Path, help="the tag folder, e.g. checkpoints/global_step100")
    convert.add_argument("target", type=Path, help="a new folder, e.g. checkpoints/global_step100_universal")
    convert.add_argument("--workers", type=int, default=1, help="processes of DeepSpeed's converter")
    convert.set_defaults(run=to_universal)
    merging = commands.add_parser("merge", help="the weighted mean of checkpoints, as safetensors or torch_dist")
    merging.add_argument("checkpoints", nargs="+", metavar="CKPT", help="oldest first; of one kind")
    merging.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    merging.add_argument("--weights", default="mean", help=f"{', '.join(KINDS)}, or numbers such as 0.2,0.3,0.5")
    merging.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="threads")
    merging.add_argument("--dtype", help="fp32, bf16 or fp16; else that of the masters or the files read")
    merging.add_argument("--shard-gb", type=float, default=5.0, help="size of the shards made from DeepSpeed files")
    merging.set_defaults(run=merge_checkpoints)
    return parser


def run_script(args: argparse.Namespace) -> int:
    """Run a script of the framework that its own imports name."""
    framework = args.framework or framework_of(Path(args.script))
    given = [args.script, *args.arguments, *(["--ds-plugin-config", args.config] if args.config else [])]
    assert framework == "megatron"
    from megatron_patches.training_loop import script

    return script.run(given)


def framework_of(path: Path) -> str:
    """Whose script this is, by the packages it imports; it is not executed.

    Raises:
        ConfigError: it cannot be read, or imports no framework whose scripts run here.
    """
    import ast

    try:
        tree = ast.parse(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"run: {str(path)!r} cannot be read: {error.strerror}; give the script's path") from None
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"run: {str(path)!r} is not a Python script: {error}") from None
    named = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    named |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    packages = {name.partition(".")[0] for name in named}
    if "megatron" in packages:
        return "megatron"
    if "deepspeed" in packages or "ds_plugin" in packages:
        raise ConfigError(
            f"run: {str(path)!r} is a script of DeepSpeed, which needs one line: ds_plugin.initialize(...) in place of "
            "deepspeed.initialize(...); then start it with the deepspeed launcher"
        )
    raise ConfigError(
        f"run: {str(path)!r} imports no framework whose scripts run here; say --framework {' or '.join(FRAMEWORKS)}"
    )


def merge_checkpoints(args: argparse.Namespace) -> int:
    """See `ds_plugin.weight_averaging.merge`."""
    from ds_plugin.weight_averaging.merge.merge import command

    return command(args)


def to_universal(args: argparse.Namespace) -> int:
    """Convert, and say how to resume from the result."""
    from ds_plugin.deepspeed_engine import startup

    startup.quiet()
    from ds_plugin.deepspeed_engine import checkpoint

    checkpoint.to_universal(args.folder, args.target, workers=args.workers)
    print(f'{args.target}: resume with "checkpoint": {{"load_universal": true}} in the JSON')
    return 0


def translate_config(args: argparse.Namespace) -> int:
    """Print (or write) the config as it is read, and on stderr what changed and why."""
    from ds_plugin.config import PluginConfig, load_json
    from ds_plugin.core.files import write_text
    from ds_plugin.sequence_length_warmup.translate import translate

    config, notes = translate(load_json(args.config))
    PluginConfig.from_dict(config)  # what is printed is a config that works
    text = json.dumps(config, indent=2) + "\n"
    if args.out is None:
        print(text, end="")
    else:
        try:
            write_text(args.out, text)
        except OSError as error:
            raise ConfigError(f"--out {str(args.out)!r} cannot be written: {error.strerror}") from None
    for note in notes or ["nothing to translate"]:
        print(f"note: {note}", file=sys.stderr)
    return 0


def show_environment(args: argparse.Namespace) -> int:
    """Print versions, accelerator, optional packages and patches: what a report of a defect should begin with."""
    from ds_plugin.cli import env
    from ds_plugin.core.patch import active
    from ds_plugin.deepspeed_engine import startup

    startup.quiet()
    optional = {name: version or "not found (optional)" for name, version in env.optional().items()}
    patches = "; ".join(f"{patch.name} ({patch.reason})" for patch in active()) or "none"
    rows = {**env.versions(), "accelerator": env.accelerator(), **optional, "active patches": patches}
    for name, value in rows.items():
        print(f"{name:<20} {value}")
    return 0
