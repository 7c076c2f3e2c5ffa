"""The commands that look at CompleteP: what it sets, and whether it holds over widths, depths and learning rates."""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from ds_plugin.completep.rules import Recipe
from ds_plugin.core.arguments import above, checked, count, new_folder, positive, several
from ds_plugin.core.errors import ConfigError
from ds_plugin.core.files import write_text
from ds_plugin.sweeps.mixtures import Mixture, ratio_of

_RECIPES = get_args(Recipe)
_MIXTURE = "RATIO: hidden size of one over the width, else 4 / ACTIVE, whose active weights are a dense MLP's"
_EXPONENT = checked(int, lambda n: -100 <= n <= 20, "a whole number from -100 to 20")
_RECIPE = checked(str, lambda name: name in _RECIPES, f"one of {', '.join(_RECIPES)}")
_EXPERTS = checked(Mixture.of, bool, "EXPERTS:ACTIVE or EXPERTS:ACTIVE:RATIO like 8:2 or 8:2:4")
_LATENT = checked(
    lambda text: tuple(int(part) for part in text.split(":")),
    lambda ranks: len(ranks) == 2 and 0 <= min(ranks) <= max(ranks) <= 2**16 and ranks[1] > 0,
    "Q:KV like 24:32, or without a rank of queries 0:32",
)
_SECTION = checked(json.loads, lambda found: isinstance(found, dict), "a JSON object, settings of completep")
_RATIO = checked(ratio_of, bool, "a number above 0 like 2 or 4/3")


def _shape(text: str) -> tuple[int, int, Mixture | None]:
    sizes, _, mixture = text.partition(":")
    width, depth = (int(part) for part in sizes.split("x"))
    return width, depth, Mixture.of(mixture) if mixture else None


_SHAPE = checked(_shape, lambda of: min(of[:2]) > 0, "WIDTHxDEPTH like 64x8, or with experts of its own 64x8:16:2")


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """``rules``, ``coord-check`` and ``lr-transfer``; ``command``: of name, function, what it does and settings."""
    rules = command("rules", show_rules, "the table of a model against its base, before any money is spent")
    rules.add_argument("--config", required=True, metavar="FILE", help='a JSON with "model", "completep", "optimizer"')
    shown: dict[str, Any] = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    check = command("coord-check", coordinate_check, "how far training moves activations at every shape", **shown)
    sweep = command("lr-transfer", learning_rate_transfer, "how far the best learning rate moves with shapes", **shown)
    add = check.add_argument
    add("--widths", type=several(count), default=(64, 128, 256), help="hidden sizes")
    add("--depths", type=several(count), default=(2, 4, 8, 16, 32), help="numbers of layers")
    add("--steps", type=count, default=10, help="optimizer steps of each run")
    add("--lr", type=positive, default=1e-3, help="the base model's learning rate, constant")
    what = "mixtures EXPERTS:ACTIVE[:RATIO],... in place of the MLPs of Megatron's GPT, each at every width and depth; "
    add("--experts", type=several(_EXPERTS), default=(), help=f"{what}the first is the base's. {_MIXTURE}")
    add("--at-most", type=above(1), help="exit code 1 where the first recipe's last blocks spread more, as 1.6")
    add("--out", type=new_folder, default=Path("coord_check"), help="folder for the CSV and the figure")
    add = sweep.add_argument
    what = "WIDTHxDEPTH,... or with other experts than the base's WIDTHxDEPTH:EXPERTS:ACTIVE[:RATIO]"
    add("--shapes", type=several(_SHAPE), default="64x2,64x8,64x32", help=what)
    what = "the base's mixture EXPERTS:ACTIVE[:RATIO] in place of the MLPs of Megatron's GPT"
    add("--experts", type=_EXPERTS, help=f"{what}. {_MIXTURE}")
    rates = tuple(range(-11, -4))
    add("--exponents", type=several(_EXPONENT), default=rates, help="base rates 2^n, as --exponents=-9,-8")
    add("--steps", type=count, default=300, help="optimizer steps of each run")
    add("--batch", type=count, default=16, help="samples a step")
    add("--length", type=count, default=128, help="tokens of a sample")
    add("--data", default="stdlib", help="text: a file, a folder, a Megatron dataset's prefix")
    add("--workers", type=count, default=1, help="processes that train at the same time")
    add("--out", type=new_folder, default=Path("lr_transfer"), help="folder for the CSV and the figure")
    for each in (check, sweep):
        model = each.add_mutually_exclusive_group()
        what = "a model of transformers, its config.json or the folder of it, in place of megatron-core's GPT"
        model.add_argument("--hf", metavar="CONFIG", help=what)
        what = "package.module:function of (width, depth) that returns a decoder"
        model.add_argument("--builder", metavar="FUNCTION", help=what)
        add = each.add_argument
        add("--recipes", type=several(_RECIPE), default=("completep", "mup", "standard"), help=", ".join(_RECIPES))
        add("--seeds", type=count, default=3, help="runs of each shape and rate")
        add("--base-width", type=count, default=64, help="hidden size of the base model")
        add("--base-depth", type=count, default=2, help="number of layers of the base model")
        add("--head-dim", type=count, default=16, help="head size of Megatron's GPT; divides the widths")
        add("--alpha", type=positive, default=1.0, help="depth exponent of completep")
        add("--init-std", type=positive, help="the base model's, before it is scaled; by default the model's own")
        add("--section", type=_SECTION, default={}, help='settings for every run, as {"output_multiplier": 2}')
        add("--shared", type=_RATIO, help="hidden size of experts that every token goes through, over the width")
        add("--moe", choices=("fixed_sparsity", "mue"), help="the rule for experts that are not the base's")
        add("--latent", type=_LATENT, help="ranks Q:KV of latent attention in Megatron's GPT; Q 0: queries have none")
        add("--optimizer", choices=("adamw", "muon"), default="adamw", help="muon: of the matrices inside blocks")


def show_rules(args: argparse.Namespace) -> int:
    """Print each role's init std, learning rate, weight decay, eps and multipliers for the model of a JSON file."""
    from ds_plugin.plan.roles_table import rules_table

    print(rules_table(args.config))
    return 0


def coordinate_check(args: argparse.Namespace) -> int:
    """Sweep, write coord_check.csv after every run and coord_check.png at the end, print a line per recipe; 1 where
    the first's spread is above ``--at-most``. A second start with the same settings goes on with what is missing."""
    mixtures, depths, widths = args.experts or (None,), args.depths, args.widths
    sizes = [(width, depth, mixture) for mixture in mixtures for depth in depths for width in widths]
    builder, shapes, base = _start(args, mixtures[0], sizes)
    from ds_plugin.sweeps import coord_check

    path, settings = args.out / "coord_check.csv", {"steps": args.steps, "lr": args.lr}
    rows, keep = _records(coord_check.Row, path, builder, base, settings)
    there = {(row.shape, row.seed) for row in rows}
    jobs = [(shape, seed) for shape in shapes for seed in range(1, args.seeds + 1) if (shape, seed) not in there]
    for number, (shape, seed) in enumerate(jobs, start=1):
        rows += coord_check.measure(builder, shape, base, seed=seed, steps=args.steps, lr=args.lr)
        moved = next(row for row in reversed(rows) if row.layer == coord_check.LAST_BLOCK).change
        keep(rows, f"[{number}/{len(jobs)}] {shape} seed {seed}: last block moved {moved:.4g}")
    title = f"base {base.width} x {base.depth}, lr {args.lr:g}, {args.seeds} seeds"
    coord_check.draw(rows, path.with_suffix(".png"), title=title)
    first = coord_check.spread(rows, args.recipes[0])
    for recipe in args.recipes:
        changes, found = coord_check.changes(rows, recipe).values(), coord_check.spread(rows, recipe)
        said = f"last block moved {min(changes):.3g} to {max(changes):.3g} over {len(changes)} shapes"
        beside = "" if recipe == args.recipes[0] else f", {found / first:.3g} times {args.recipes[0]}'s"
        print(f"{recipe}: spread {found:.3g}x{beside} ({said})")
    print(f"{path} {path.with_suffix('.png')}")
    if args.at_most is not None and first > args.at_most:
        print(f"{args.recipes[0]}: the last block's spread {first:.3g}x is above --at-most {args.at_most:g}")
        return 1
    return 0


def learning_rate_transfer(args: argparse.Namespace) -> int:
    """Sweep, write lr_transfer.csv after every run and lr_transfer.png, print the optimum of each shape and how far it
    moved. A second start with the same settings goes on with what is missing."""
    from ds_plugin.sweeps.text import find

    found = find(args.data, args.length + 2)  # two places to begin at
    given = {"batch": args.batch, "length": args.length, "vocab": found.vocab}
    builder, shapes, base = _start(args, args.experts, args.shapes, **given)
    from ds_plugin.sweeps import lr_transfer

    path = args.out / "lr_transfer.csv"
    settings = {"steps": args.steps, "text": found.source, "tokens": found.tokens}
    known, keep = _records(lr_transfer.Run, path, builder, base, settings)
    plan: dict[str, Any] = {"rates": [2.0**n for n in args.exponents], "seeds": range(1, args.seeds + 1)}
    plan |= {"steps": args.steps, "text": found, "workers": args.workers}
    runs = lr_transfer.sweep(builder, shapes, base, **plan, known=known, keep=keep)
    title = f"base {base.width} x {base.depth}, {args.steps} steps of {base.batch} x {base.length}, {args.seeds} seeds"
    lr_transfer.draw(runs, path.with_suffix(".png"), title=title)
    print("\n".join(lr_transfer.summary(lr_transfer.transfer(runs, base))))
    print(f"{path} {path.with_suffix('.png')}")
    return 0


def _start(args: argparse.Namespace, mixture: Mixture | None, sizes: Any, **changes: Any) -> tuple[Any, list[Any], Any]:
    """The builder, started, the shapes, each of which can be, and the base model, whose experts are ``mixture``."""
    from ds_plugin.sweeps import trial

    given = {name: getattr(args, name) for name in ("head_dim", "alpha", "init_std", "section")} | changes
    base, builder = trial.Base(args.base_width, args.base_depth, **given), _builder(args, mixture)
    named = [(width, depth, "" if own in (None, mixture) else str(own)) for width, depth, own in sizes]
    if mixture is None and any(experts for *_, experts in named):
        raise ConfigError("--shapes: one has experts; give the base's, as --experts 8:2")
    shapes = [trial.Shape(recipe, w, d, experts=experts) for recipe in args.recipes for w, d, experts in named]
    for shape in shapes:
        builder.check(shape, base)
    builder.start()
    return builder, shapes, base


def _builder(args: argparse.Namespace, mixture: Mixture | None) -> Any:
    from ds_plugin.sweeps import builders

    of_megatron = {"experts": mixture} | {n: getattr(args, n) for n in ("shared", "moe", "latent", "optimizer")}
    given = [f"--{name}" for name, value in of_megatron.items() if value != getattr(builders.Megatron, name)]
    if given and (args.hf is not None or args.builder is not None):
        raise ConfigError(f"{given[0]}: of Megatron's GPT alone; leave it out, or --hf and --builder")
    if mixture is None and (lone := [name for name in given if name in ("--shared", "--moe")]):
        raise ConfigError(f"{lone[0]}: there are no experts; give them, as --experts 8:2, or leave it out")
    if args.hf is not None:
        return builders.HuggingFace(args.hf)
    return builders.Megatron(**of_megatron) if args.builder is None else builders.Function(args.builder)


def _records(kind: Any, path: Path, builder: Any, base: Any, settings: dict[str, Any]) -> tuple[list[Any], Any]:
    """Makes the folder; the records of an earlier sweep with these settings in it, refusing one with others, and a
    function that writes all records and prints a line of progress."""
    from ds_plugin.sweeps.records import read_records, write_records

    kept, started = path.with_suffix(".json"), time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    of_base = {name: value for name, value in dataclasses.asdict(base).items() if name != "section" or value}
    text = json.dumps({**builder.described(), **of_base, **settings}, indent=1, default=str)
    if (known := kept.exists()) and kept.read_text() != text:
        raise ConfigError(f"--out: {kept} is of a sweep with other settings; give another folder")
    write_text(kept, text)

    def keep(records: list[Any], said: str) -> None:
        write_records(kind, records, path)
        print(f"{time.monotonic() - started:6.0f} s  {said}", flush=True)

    return read_records(kind, path) if known and path.exists() else [], keep
