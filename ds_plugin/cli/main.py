"""``ds-plugin``: what goes before, after and around a run."""

import argparse
import ast
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_plugin.core.arguments import Parser, count, new_file, positive
from ds_plugin.core.errors import ConfigError, PluginError

#: whose scripts run here -> by which imports they are known
FRAMEWORKS = {
    "megatron-bridge": {"megatron.bridge"},
    "megatron": {"megatron"},
    "huggingface": {"transformers", "accelerate", "trl", "lightning", "pytorch_lightning", "axolotl", "llamafactory"},
}


#: packages that commands need -> our extra that has them
EXTRAS = {"deepspeed": "deepspeed", "megatron": "megatron", "transformers": "hf", "matplotlib": "plot"}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code: 2, with one message, for whatever the user can mend."""
    from ds_plugin.deepspeed_engine import startup

    command = "run"
    try:
        args = command_line().parse_args(arguments)
        if (command := args.command) != "run":  # whose warnings are the script's, and all errors but ours
            startup.quiet()
        return args.run(args)
    except (PluginError, OSError) as error:
        if command == "run" and not isinstance(error, PluginError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if command == "run" or (extra := EXTRAS.get(str(error.name).partition(".")[0])) is None:
            raise
        print(f'error: {command} needs {error.name}, which is not installed: "ds-plugin[{extra}]"', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if command == "run":
            raise
        said = "what is finished is kept; tune-warmup and lr-transfer go on from there with the same command"
        print(f"interrupted: {said}, a merge starts over", file=sys.stderr)
        return 130


def command_line() -> Parser:
    """Every command and its arguments."""
    from ds_plugin.cli import sweeps
    from ds_plugin.plan import plan
    from ds_plugin.tune import search
    from ds_plugin.weight_averaging.config import KINDS

    parser = Parser(prog="ds-plugin", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], what: str, **settings: Any) -> Parser:
        added = commands.add_parser(name, help=what, **settings)
        added.set_defaults(run=run)
        return added

    add = command("run", run_script, "a framework's own script, with the methods in it").add_argument
    add("--framework", choices=FRAMEWORKS, help="whose script it is, where its imports do not tell")
    add("--config", metavar="FILE", help="the JSON with the methods' sections")
    add("-m", "--module", action="store_true", help="SCRIPT is a module's name, such as axolotl.cli.train")
    add("script", metavar="SCRIPT.py", help="under torchrun: torchrun ... -m ds_plugin run SCRIPT.py")
    add("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own")
    command("env", show_environment, "versions, accelerator, optional packages, active patches")
    plan.add_arguments(command("plan", plan.command, "what a recipe comes to on so many ranks, before the first step"))
    sweeps.add_commands(command)
    search.add_arguments(command("tune-warmup", search.command, "find start length and duration with short runs"))
    add = command("translate-config", translate_config, "curriculum_learning as sequence_length_warmup").add_argument
    add("--config", type=Path, required=True, metavar="FILE", help="DeepSpeed's; not changed")
    add("--out", type=new_file, metavar="FILE", help="write the new config here, not to stdout")
    add = command("to-universal", to_universal, "convert a checkpoint for another number of ranks").add_argument
    add("folder", type=Path, help="the tag folder, e.g. checkpoints/global_step100")
    add("target", type=Path, help="a new folder, e.g. checkpoints/global_step100_universal")
    add("--workers", type=count, default=1, help="processes of DeepSpeed's converter")
    add = command("verify", verify, "compare a checkpoint's files with what was saved").add_argument
    add("folder", type=Path, help="the tag folder; of Megatron-LM's, SAVE/ds_plugin/iter_0000100")
    what = "the weighted mean of checkpoints, as safetensors or torch_dist"
    add = command("merge", merge_checkpoints, what).add_argument
    add("checkpoints", nargs="+", metavar="CKPT", help="oldest first; of one kind")
    add("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    add("--weights", default="mean", help=f"{', '.join(KINDS)}, or numbers such as 0.2,0.3,0.5")
    add("--workers", type=count, default=min(4, os.cpu_count() or 1), help="threads")
    add("--dtype", help="fp32, bf16 or fp16; else that of the masters or the files read")
    add("--shard-gb", type=positive, default=5.0, help="size of the shards made from DeepSpeed files")
    return parser


def run_script(args: argparse.Namespace) -> int:
    """Run a script of the framework that its own imports name."""
    framework = args.framework or ("huggingface" if args.module else framework_of(Path(args.script)))
    if framework == "huggingface":
        from ds_plugin.huggingface import script as of_huggingface

        return of_huggingface.run(args.script, args.arguments, config=args.config, module=args.module)
    if args.module:
        raise ConfigError(f"run: -m {args.script}: Megatron's are scripts; give the file")
    if framework == "megatron-bridge":
        from megatron_patches.bridge import script
    else:
        from megatron_patches.training_loop import script  # type: ignore[no-redef]

    return script.run([args.script, *args.arguments, *(["--ds-plugin-config", args.config] if args.config else [])])


def framework_of(path: Path) -> str:
    """Whose script this is, by the packages it imports; it is not executed. Raises ConfigError: it cannot be read, or
    imports no framework whose scripts run here."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"run: {str(path)!r} cannot be read as a Python script: {error}") from None
    named = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            named |= {f"{node.module}.{alias.name}" for alias in node.names}
    for framework, own in FRAMEWORKS.items():
        if any(f"{name}.".startswith(f"{package}.") for name in named for package in own):
            return framework
    packages = {name.partition(".")[0] for name in named}
    said = f"imports no framework whose scripts run here; say --framework {' or '.join(FRAMEWORKS)}"
    if "deepspeed" in packages or "ds_plugin" in packages:
        line = "ds_plugin.initialize(...) in place of deepspeed.initialize(...); then start it with deepspeed"
        said = f"is a script of DeepSpeed, which needs one line: {line}"
    raise ConfigError(f"run: {str(path)!r} {said}")


def merge_checkpoints(args: argparse.Namespace) -> int:
    """See `ds_plugin.weight_averaging.merge`."""
    from ds_plugin.weight_averaging.merge.merge import merge

    given = {"weights": args.weights, "workers": args.workers, "dtype": args.dtype}
    given |= {"shard_bytes": int(args.shard_gb * 1e9), "note": lambda text: print(text, flush=True)}
    merge(args.checkpoints, args.out, **given)
    print(f"{args.out}: the mean of {len(args.checkpoints)} checkpoints")
    return 0


def verify(args: argparse.Namespace) -> int:
    """Name the first file that is not what was saved, or what could not be looked at."""
    from ds_plugin.core import seals

    unseen = seals.verify(args.folder)
    print("\n".join(unseen or [f"{args.folder}: every file is as it was saved"]))
    return 1 if unseen else 0


def to_universal(args: argparse.Namespace) -> int:
    """Convert, and say how to resume from the result."""
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
        write_text(args.out, text)
    print("\n".join(f"note: {note}" for note in notes or ["nothing to translate"]), file=sys.stderr)
    return 0


def show_environment(args: argparse.Namespace) -> int:
    """Print versions, accelerator, optional packages and patches: what a report of a defect should begin with."""
    from ds_plugin.cli import env
    from ds_plugin.core.patch import active

    optional = {name: version or "not found (optional)" for name, version in env.optional().items()}
    patches = "; ".join(f"{patch.name} ({patch.reason})" for patch in active()) or "none"
    rows = {**env.versions(), "accelerator": env.accelerator(), **optional, "active patches": patches}
    print("\n".join(f"{name:<20} {value}" for name, value in rows.items()))
    return 0
