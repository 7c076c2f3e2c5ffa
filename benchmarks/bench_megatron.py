"""What the plugin costs an iteration of Megatron-LM's own script: all methods on, against off, in the same processes.

    python benchmarks/bench_megatron.py --megatron CHECKOUT [--out FILE.json] [--check]

One job of ``CHECKOUT/pretrain_gpt.py`` (tensor x pipeline x data parallel, distributed optimizer, CPU, gloo) trains
with all three. In every other iteration what they have put there is taken out of the way: the wrappers of the loop's
functions, of the data, the optimizer and the scheduler, the residual additions and hooks of the model, the norm that
clips, and the param groups, which are merged into Megatron's two. Two jobs side by side would not do: identical ones
differ by more than the bound. The first round, in which the warmup reaches the full length, is left out.

An iteration is what lies between two calls of the loop's ``train_step``, so that reading, counting and logging are in
it. A round is twenty: on, off, off, on, and so on, with one snapshot, one logged line with the methods and one without.
The figure is the median over rounds of the time with over that without; "off against off", every second of a round's
iterations without over the others, says what the measurement is good for. Time is CPU time of the ranks' main threads,
all ranks together; gloo's own wake up 100 times a second, also in ranks that wait.
"""

import argparse
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common

from ds_plugin.completep.config import CompletePConfig
from ds_plugin.core.files import atomic_write

ROUND = 20  # iterations; also between two snapshots
BOUND = 1.01
LENGTH = 256
METHODS: dict[str, dict[str, Any]] = {
    "sequence_length_warmup": {
        "enabled": True, "start_length": LENGTH // 2, "end_length": LENGTH, "duration": {"steps": ROUND - 1},
        "learning_rate": {"by": "tokens"},
    },
    "completep": {"enabled": True, "base_width": 64, "base_depth": 2},
    "weight_averaging": {"enabled": True, "interval": ROUND, "window": 5},
}  # fmt: skip
_PROGRAM = """
if __name__ == "__main__":  # a module of its own: Megatron-LM's script is executed in this one, over its names
    import sys
    sys.path.append({folder!r})
    import bench_megatron
    bench_megatron.rank(sys.argv[1:])
"""
_SECONDS = 3600.0


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a line for each figure, write the JSON; exit code 1 when ``--check``'s bound is broken."""
    # rounds: 40 take 20 min on 2 cores; fewer do not settle 1 %
    bound = "fail when the plugin costs more than 1 %%"
    parser = common.parser(__doc__, bound, width=256, depth=4, rounds=40)
    parser.add_argument("--megatron", type=Path, required=True, metavar="CHECKOUT", help="of Megatron-LM")
    parser.add_argument("--ranks", type=int, default=8, help="processes of a job: 1, 2, or a multiple of 4")
    parser.add_argument("--micro-batches", type=int, default=4, help="of 2 samples, in each pipeline and iteration")
    parser.add_argument("--methods", default=",".join(METHODS), help="that are put on and off; default: all")
    parser.add_argument("--residual", choices=("forward", "folded"), help="CompleteP's mode; default: the script's")
    args = parser.parse_args(arguments)
    if not (args.megatron / "pretrain_gpt.py").is_file():
        parser.error(f"--megatron: {args.megatron} has no pretrain_gpt.py; give a checkout of Megatron-LM")
    if args.ranks not in (1, 2) and (args.ranks < 4 or args.ranks % 4):
        parser.error(
            f"--ranks: {args.ranks} does not divide into tensor x pipeline 2 x 2; write 1, 2 or a multiple of 4"
        )
    if unknown := set(args.methods.split(",")) - set(METHODS):
        parser.error(f"--methods: {', '.join(unknown)}; give some of {','.join(METHODS)}")
    if args.rounds < 2:
        parser.error(f"--rounds: {args.rounds} round(s) have no quartiles; write 2 or more")
    load = os.getloadavg()[0]  # of other programs: it is taken before the job starts
    with tempfile.TemporaryDirectory(prefix="bench-megatron-") as folder:
        spent, core = measured(args, Path(folder))
    found = ratios(spent)
    alone = statistics.median(s for i, s in enumerate(spent[ROUND:]) if not is_on(i + 1)) / args.ranks
    print(f"{alone:.3f} s an iteration and rank without")
    for name, row in found.items():
        print(f"{name}: {common.said(row)}")
    limits = [("on against off", found["on against off"]["ratio"], BOUND)]
    described = {"load_average": load, "checkout": core, "methods": methods(args), "seconds": alone}
    return common.ended(args, limits, **described, found=found)


def methods(args: argparse.Namespace) -> dict[str, Any]:
    """The sections of those that are asked for."""
    said = {} if args.residual is None else {"residual": args.residual}
    section = CompletePConfig.model_validate({**METHODS["completep"], **said}).folded_by_default()
    sections = {**METHODS, "completep": {**METHODS["completep"], "residual": section.residual}}
    return {name: sections[name] for name in args.methods.split(",")}


def is_on(iteration: int) -> bool:
    """Whether the methods are on in an iteration, counted from 1: on, off, off, on; in the last of a round they are."""
    return iteration % 4 in (1, 0)


def measured(args: argparse.Namespace, folder: Path) -> tuple[list[float], str]:
    """Seconds of each iteration, all ranks together, and the version of the checkout's core."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests are not installed
    from tests.megatron_lm import real

    (folder / "timed.py").write_text(_PROGRAM.format(folder=str(Path(__file__).parent)))
    given: list[str | Path] = [*flags(args), "--ds-plugin-config", folder / "all.json"]
    with real(args.megatron, folder, "all", methods(args), *given, program="timed", ranks=args.ranks) as job:
        done = job.wait(_SECONDS)
    ranks = [json.loads(file.read_text()) for file in folder.glob("rank*.json")]
    if done.returncode != 0 or len(ranks) != args.ranks:
        raise RuntimeError(f"the job ended with {done.returncode}; its output:\n{done.stdout[-4000:]}")
    return [sum(seconds) for seconds in zip(*(rank["seconds"] for rank in ranks), strict=True)], ranks[0]["core"]


def flags(args: argparse.Namespace) -> list[str]:
    """Megatron-LM's, beyond and in place of those that `tests.megatron_lm` gives: layout, model and intervals."""
    tensor, pipeline = min(2, args.ranks), 2 if args.ranks >= 4 else 1
    batch = 2 * args.micro_batches * (args.ranks // (tensor * pipeline))
    iterations = (args.rounds + 1) * ROUND + 1  # the last only ends the one before it
    return f"""
        --tensor-model-parallel-size {tensor} --pipeline-model-parallel-size {pipeline} --num-layers {args.depth}
        --hidden-size {args.width} --num-attention-heads {args.width // 64} --seq-length {LENGTH}
        --max-position-embeddings {LENGTH} --micro-batch-size 2 --global-batch-size {batch} --train-iters {iterations}
        --log-interval {ROUND // 2} --eval-interval {10**9} --eval-iters 0
    """.split()


def ratios(spent: Sequence[float]) -> dict[str, common.Row]:
    """Medians and quartiles over the rounds but the first. ``spent``: seconds of each iteration of whole rounds."""
    on_off, off_off = [], []
    for start in range(ROUND, len(spent), ROUND):
        one = list(enumerate(spent[start : start + ROUND], start=1))
        on, off = ([s for i, s in one if is_on(i) == wanted] for wanted in (True, False))
        on_off.append(sum(on) / sum(off))
        off_off.append(sum(off[1::2]) / sum(off[::2]))
    return {"off against off": common.quartiles(off_off), "on against off": common.quartiles(on_off)}


def rank(arguments: list[str]) -> None:
    """Run a script with the sections of the last argument, a JSON file, its methods in turns on and off.

    Beside the file goes what this rank's iterations took, when the last is reached.
    """
    from megatron_patches.training_loop import script

    path, given, sections, _ = script.read_arguments(arguments)
    script.prepare_megatron(path)
    script.install(sections)
    training = importlib.import_module(script.TRAINING)
    out = Path(arguments[-1]).with_name(f"rank{os.environ['RANK']}.json")
    iterations = int([value for name, value in zip(given, given[1:], strict=False) if name == "--train-iters"][-1])
    switches = Switches()
    train_step: Callable[..., Any] = training.train_step
    setup: Callable[..., Any] = training.setup_model_and_optimizer
    seconds: list[float] = []
    began = 0.0

    def set_up(*args: Any, **kwargs: Any) -> Any:
        model, optimizer, scheduler = setup(*args, **kwargs)
        switches.of_loop(training)
        switches.of_model(model)
        switches.of_optimizer(optimizer, scheduler)
        return model, optimizer, scheduler

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal began
        if began:
            seconds.append(time.thread_time() - began)
        number = len(seconds) + 1
        if number == iterations:
            core = importlib.import_module("megatron.core").__version__
            atomic_write(out, lambda file: file.write_text(json.dumps({"seconds": seconds, "core": core})) and None)
        switches.turn(number <= ROUND or is_on(number))  # the first round has the warmup in it
        began = time.thread_time()
        return (train_step if switches.on else switches.plain_step)(*args, **kwargs)

    vars(training)["train_step"], vars(training)["setup_model_and_optimizer"] = timed, set_up
    sys.argv = [str(path), *given]
    script.execute(path)


class Switches:
    """What the methods have put into a job, and what Megatron-LM has in its places."""

    def __init__(self) -> None:
        self.on = True
        self.plain_step: Callable[..., Any] = _not_yet
        self._places: list[tuple[dict[Any, Any], Any, Any, Any]] = []  # a namespace, a name, with and without methods

    def turn(self, on: bool) -> None:
        """Put in everything, or take it out."""
        if on != self.on:
            self.on = on
            for namespace, name, ours, plain in self._places:
                namespace[name] = ours if on else plain

    def of_loop(self, training: Any) -> None:
        """The wrapped functions that are called in an iteration, and the cutting of batches."""
        from ds_plugin.core import patch
        from megatron_patches.training_loop.batches import Cut

        for change in patch._REGISTRY:
            place, _, name = change.name.rpartition(".")
            if place == training.__name__ and name == "train_step":
                self.plain_step = change.original  # type: ignore[attr-defined]
            elif place == training.__name__ and name != "setup_model_and_optimizer":
                self._add(vars(training), name, change.original)  # type: ignore[attr-defined]
        cut = Cut.__next__
        its_class: Any = Cut
        its_class.__next__ = lambda batches: cut(batches) if self.on else next(batches._source)

    def of_model(self, chunks: Sequence[Any]) -> None:
        """Residual additions and the hooks that scale what enters a matrix."""
        from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

        from megatron_patches.completep.residual import scale_input

        for module in (module for chunk in chunks for module in chunk.modules()):
            for name in ("self_attn_bda", "mlp_bda"):
                if name in vars(module):
                    self._add(vars(module), name, get_bias_dropout_add)
            hooks = module._forward_pre_hooks
            others = {key: hook for key, hook in hooks.items() if getattr(hook, "func", None) is not scale_input}
            if len(others) < len(hooks):
                self._add(vars(module), "_forward_pre_hooks", type(hooks)(others))

    def of_optimizer(self, optimizer: Any, scheduler: Any) -> None:
        """The wait for a snapshot's copy, the count by tokens, the norm of gradients, and torch's param groups."""
        singles = getattr(optimizer, "chained_optimizers", [optimizer])
        for owner in {id(each): each for each in (optimizer, scheduler, *singles)}.values():
            for name in list(vars(owner)):
                if callable(method := getattr(type(owner), name, None)):  # in an instance, over the class's
                    self._add(vars(owner), name, method.__get__(owner))
        for single in singles:
            groups = single.optimizer.param_groups
            logged = next((group for group in groups if group.get("default_config")), groups[0])
            merged = [
                {
                    **logged,
                    "params": [p for group in groups if (group["wd_mult"] > 0) == decayed for p in group["params"]],
                }
                for decayed in (True, False)
            ]
            self._add(vars(single.optimizer), "param_groups", [group for group in merged if group["params"]])

    def _add(self, namespace: dict[Any, Any], name: str, plain: Any) -> None:
        self._places.append((namespace, name, namespace[name], plain))


def _not_yet(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("no training step before the optimizer is set up")


if __name__ == "__main__":
    sys.exit(main())
