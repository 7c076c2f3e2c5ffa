"""``python -m megatron_patches``: what CompleteP sets, and whether it holds.

rules --config FILE     the table of a model against its base, before any money is spent
coord-check             how far training moves the activations of every width and depth: CSV, figure, spread per recipe
"""

import argparse
import sys
import time
from pathlib import Path
from typing import get_args

from ds_plugin.errors import PluginError
from megatron_patches.completep.rules import Recipe

_RECIPES = get_args(Recipe)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_patches", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    rules = commands.add_parser("rules", help="print the table of a model against its base")
    rules.add_argument("--config", required=True, help='a JSON with "model", "completep" and "optimizer"')
    check = commands.add_parser("coord-check", help="the coordinate check", formatter_class=_Defaults)
    check.add_argument("--widths", type=_numbers, default=(64, 128, 256), help="hidden sizes")
    check.add_argument("--depths", type=_numbers, default=(2, 4, 8, 16, 32), help="numbers of layers")
    check.add_argument("--recipes", type=_recipes, default=("completep", "mup", "standard"), help=", ".join(_RECIPES))
    check.add_argument("--seeds", type=int, default=3, help="runs of each shape")
    check.add_argument("--steps", type=int, default=10, help="optimizer steps of each run")
    check.add_argument("--lr", type=float, default=1e-3, help="the base model's learning rate, constant")
    check.add_argument("--base-width", type=int, default=64)
    check.add_argument("--base-depth", type=int, default=2)
    check.add_argument("--head-dim", type=int, default=16, help="head size of every model; divides the widths")
    check.add_argument("--alpha", type=float, default=1.0, help="depth exponent of completep")
    check.add_argument("--out", type=Path, default=Path("coord_check"), help="folder for the CSV and the figure")
    args = parser.parse_args(arguments)
    try:
        return show_rules(args.config) if args.command == "rules" else coordinate_check(args)
    except PluginError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def show_rules(config: str) -> int:
    """Print each role's init std, learning rate, weight decay, eps and multipliers for the model of a JSON file."""
    from megatron_patches.completep.table import rules_table

    print(rules_table(config))
    return 0


def coordinate_check(args: argparse.Namespace) -> int:
    """Sweep, write coord_check.csv and coord_check.png, print one line per recipe."""
    from ds_plugin.errors import ConfigError
    from ds_plugin.run import startup

    startup.quiet()
    from megatron_patches.completep import coord_check, trial

    for width in args.widths:
        if width % args.head_dim:
            raise ConfigError(
                f"--widths: {width} is not divisible by --head-dim {args.head_dim}; write a multiple of it"
            )
    trial.start_host()
    base = trial.Base(width=args.base_width, depth=args.base_depth, head_dim=args.head_dim, alpha=args.alpha)
    shapes = [trial.Shape(r, w, d) for r in args.recipes for w in args.widths for d in args.depths]
    started = time.monotonic()
    rows = coord_check.sweep(
        shapes,
        base,
        seeds=range(1, args.seeds + 1),
        steps=args.steps,
        lr=args.lr,
        progress=lambda text: print(f"{time.monotonic() - started:6.0f} s  {text}", flush=True),
    )
    args.out.mkdir(parents=True, exist_ok=True)
    coord_check.write_csv(rows, args.out / "coord_check.csv")
    title = f"base {base.width} x {base.depth}, lr {args.lr:g}, {args.seeds} seeds"
    coord_check.draw(rows, args.out / "coord_check.png", title=title)
    for recipe in args.recipes:
        changes = [c for shape, c in coord_check.final_changes(rows).items() if shape.recipe == recipe]
        print(
            f"{recipe}: spread {coord_check.spread(rows, recipe):.3g}x (last block moved {min(changes):.3g} to "
            f"{max(changes):.3g} over {len(changes)} shapes)"
        )
    print(f"{args.out / 'coord_check.csv'} {args.out / 'coord_check.png'}")
    return 0


class _Defaults(argparse.ArgumentDefaultsHelpFormatter): ...


def _numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list like 64,128,256") from None
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} holds a number below 1")
    return found


def _recipes(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    for recipe in found:
        if recipe not in _RECIPES:
            raise argparse.ArgumentTypeError(f"{recipe!r} is no recipe; write some of {','.join(_RECIPES)}")
    return found


if __name__ == "__main__":
    sys.exit(main())
