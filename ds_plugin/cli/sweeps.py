"""The commands that look at CompleteP: what it sets, and whether it holds over widths, depths and learning rates."""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from ds_plugin.completep.rules import Recipe
from ds_plugin.core.errors import ConfigError
from ds_plugin.core.files import write_text

_RECIPES = get_args(Recipe)


def add_commands(commands: Any) -> None:
    """``rules``, ``coord-check`` and ``lr-transfer``."""
    rules = commands.add_parser("rules", help="the table of a model against its base, before any money is spent")
    rules.add_argument("--config", required=True, metavar="FILE", help='a JSON with "model", "completep", "optimizer"')
    rules.set_defaults(run=show_rules)
    check = commands.add_parser("coord-check", help="the coordinate check", formatter_class=_Defaults)
    check.add_argument("--widths", type=_numbers, default=(64, 128, 256), help="hidden sizes")
    check.add_argument("--depths", type=_numbers, default=(2, 4, 8, 16, 32), help="numbers of layers")
    check.add_argument("--recipes", type=_recipes, default=("completep", "mup", "standard"), help=", ".join(_RECIPES))
    check.add_argument("--seeds", type=int, default=3, help="runs of each shape")
    check.add_argument("--steps", type=int, default=10, help="optimizer steps of each run")
    check.add_argument("--lr", type=float, default=1e-3, help="the base model's learning rate, constant")
    check.add_argument("--out", type=Path, default=Path("coord_check"), help="folder for the CSV and the figure")
    sweep = commands.add_parser("lr-transfer", help="the learning-rate sweep", formatter_class=_Defaults)
    sweep.add_argument("--shapes", type=_shapes, default=((64, 2), (64, 8), (64, 32)), help="WIDTHxDEPTH,...")
    rates = tuple(range(-11, -4))
    sweep.add_argument("--exponents", type=_integers, default=rates, help="base rates 2^n, as --exponents=-9,-8")
    sweep.add_argument("--recipes", type=_recipes, default=("completep", "mup", "standard"), help=", ".join(_RECIPES))
    sweep.add_argument("--seeds", type=int, default=3, help="runs of each shape and rate")
    sweep.add_argument("--steps", type=int, default=300, help="optimizer steps of each run")
    sweep.add_argument("--batch", type=int, default=16, help="samples a step")
    sweep.add_argument("--length", type=int, default=128, help="tokens of a sample")
    sweep.add_argument("--data", default="stdlib", help="text: a file, a folder, a Megatron dataset's prefix")
    sweep.add_argument("--workers", type=int, default=1, help="processes that train at the same time")
    sweep.add_argument("--out", type=Path, default=Path("lr_transfer"), help="folder for the CSV and the figure")
    for command in (check, sweep):
        command.add_argument("--base-width", type=int, default=64)
        command.add_argument("--base-depth", type=int, default=2)
        command.add_argument("--head-dim", type=int, default=16, help="head size of every model; divides the widths")
        command.add_argument("--alpha", type=float, default=1.0, help="depth exponent of completep")
        command.add_argument("--init-std", type=float, default=0.02, help="the base model's, before it is scaled")
    check.set_defaults(run=coordinate_check)
    sweep.set_defaults(run=learning_rate_transfer)


def show_rules(args: argparse.Namespace) -> int:
    """Print each role's init std, learning rate, weight decay, eps and multipliers for the model of a JSON file."""
    from ds_plugin.plan.roles_table import rules_table

    print(rules_table(args.config))
    return 0


def coordinate_check(args: argparse.Namespace) -> int:
    """Sweep, write coord_check.csv and coord_check.png, print one line per recipe."""
    base, say = _start(args, args.widths)
    from ds_plugin.sweeps import coord_check
    from ds_plugin.sweeps.records import write_records
    from ds_plugin.sweeps.trial import Shape

    shapes = [Shape(r, w, d) for r in args.recipes for w in args.widths for d in args.depths]
    seeds = range(1, args.seeds + 1)
    rows = coord_check.sweep(shapes, base, seeds=seeds, steps=args.steps, lr=args.lr, progress=say)
    write_records(coord_check.Row, rows, args.out / "coord_check.csv")
    title = f"base {base.width} x {base.depth}, lr {args.lr:g}, {args.seeds} seeds"
    coord_check.draw(rows, args.out / "coord_check.png", title=title)
    for recipe in args.recipes:
        changes = [c for shape, c in coord_check.final_changes(rows).items() if shape.recipe == recipe]
        print(
            f"{recipe}: spread {coord_check.spread(rows, recipe):.3g}x "
            f"(last block moved {min(changes):.3g} to {max(changes):.3g} over {len(changes)} shapes)"
        )
    print(f"{args.out / 'coord_check.csv'} {args.out / 'coord_check.png'}")
    return 0


def learning_rate_transfer(args: argparse.Namespace) -> int:
    """Sweep, write lr_transfer.csv and lr_transfer.png, print the optimum of each shape and how far it moved.

    The CSV is written after every run; a second start with the same settings goes on with what is missing.
    """
    base, say = _start(args, [width for width, _ in args.shapes], batch=args.batch, length=args.length)
    from ds_plugin.sweeps import lr_transfer
    from ds_plugin.sweeps.records import read_records, write_records
    from ds_plugin.sweeps.text import find
    from ds_plugin.sweeps.trial import Shape

    found = find(args.data)
    base = dataclasses.replace(base, vocab=found.vocab)
    path = args.out / "lr_transfer.csv"
    described = {**dataclasses.asdict(base), "steps": args.steps, "text": found.source, "tokens": found.tokens}
    settings = json.dumps(described, indent=1)
    known = _known_settings(args.out / "lr_transfer.json", settings)
    runs = lr_transfer.sweep(
        [Shape(recipe, width, depth) for recipe in args.recipes for width, depth in args.shapes],
        base,
        rates=[2.0**n for n in args.exponents],
        seeds=range(1, args.seeds + 1),
        steps=args.steps,
        text=found,
        workers=args.workers,
        known=read_records(lr_transfer.Run, path) if known and path.exists() else [],
        progress=say,
        keep=lambda runs: write_records(lr_transfer.Run, runs, path),
    )
    title = f"base {base.width} x {base.depth}, {args.steps} steps of {base.batch} x {base.length}, {args.seeds} seeds"
    lr_transfer.draw(runs, args.out / "lr_transfer.png", title=title)
    print("\n".join(lr_transfer.summary(lr_transfer.transfer(runs, base))))
    print(f"{path} {args.out / 'lr_transfer.png'}")
    return 0


def _start(args: argparse.Namespace, widths: Sequence[int], **changes: Any) -> tuple[Any, Callable[[str], None]]:
    """Check the widths, start Megatron, make the output folder; the base model and a function that prints progress."""
    from ds_plugin.deepspeed_engine import startup

    startup.quiet()
    from ds_plugin.sweeps import trial

    for width in widths:
        if width % args.head_dim:
            raise ConfigError(f"width {width} is not divisible by --head-dim {args.head_dim}; write a multiple of it")
    shared = {"head_dim": args.head_dim, "alpha": args.alpha, "init_std": args.init_std, **changes}
    base = trial.Base(args.base_width, args.base_depth, **shared)
    trial.start_host()
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    return base, lambda text: print(f"{time.monotonic() - started:6.0f} s  {text}", flush=True)


def _known_settings(path: Path, settings: str) -> bool:
    """Whether an earlier sweep with these settings is in the folder; refuses one with others."""
    if not path.exists():
        write_text(path, settings)
        return False
    if path.read_text() != settings:
        raise ConfigError(f"--out: {path} is of a sweep with other settings; give another folder")
    return True


class _Defaults(argparse.ArgumentDefaultsHelpFormatter): ...


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list like 64,128,256") from None


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    try:
        pairs = [part.split("x") for part in text.split(",")]
        return tuple((int(width), int(depth)) for width, depth in pairs)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of WIDTHxDEPTH like 64x2,64x8") from None


def _numbers(text: str) -> tuple[int, ...]:
    found = _integers(text)
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} holds a number below 1")
    return found


def _recipes(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    for recipe in found:
        if recipe not in _RECIPES:
            raise argparse.ArgumentTypeError(f"{recipe!r} is no recipe; write some of {','.join(_RECIPES)}")
    return found
