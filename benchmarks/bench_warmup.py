"""What sequence length warmup costs a step: against DeepSpeed alone on samples of the same length.

    python benchmarks/bench_warmup.py [--out FILE.json]

Four engines train the same model: two of DeepSpeed's without the plugin on batches that are already short ("DeepSpeed",
and "DeepSpeed again", which says what the measurement is good for), one whose hook cuts full-length batches
("truncate"), one that reads through `plugin.batches` ("carry"). They take turns step by step, each time in an order of
its own, and a round is twenty steps of each, so that the instruments' report is in it. The figure is the median
over rounds of the time over DeepSpeed's of the same round, with the middle half of the rounds beside it. Time is CPU
time without a GPU, and wall time to the end of the step with one.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from itertools import repeat

import common
import deepspeed
import torch

import ds_plugin
from ds_plugin.deepspeed_engine import startup

VARIANTS = ("DeepSpeed", "DeepSpeed again", "truncate", "carry")
ROUND = 20  # steps; the instruments report once in so many


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a line per length and variant, write the JSON; exit code 1 when ``--check``'s bound is broken."""
    bound = "fail when the plugin costs more than 1 %%"
    # rounds: 3 more than a multiple of 4, so that whole samples are carried
    parser = common.parser(__doc__, bound, width=256, depth=4, batch=4, rounds=19)
    parser.add_argument("--lengths", default="32,64,128", help="lengths to measure; the last is half the full one")
    args = parser.parse_args(arguments)
    lengths = [int(length) for length in args.lengths.split(",")]
    common.start()
    steps = {name: build(name, args, lengths) for name in VARIANTS}
    found = {length: times(steps, args.rounds, length) for length in lengths}
    limits = [limit for n, rows in found.items() for limit in common.compared(f"length {n}, ", rows, VARIANTS[2:])]
    code = common.ended(args, limits, time=found)
    startup.leave()
    return code


def times(steps: dict[str, Callable[[int], None]], rounds: int, length: int) -> dict[str, common.Row]:
    """`common.times` of the steps at one length."""
    return common.times({name: partial(step, length) for name, step in steps.items()}, rounds, each=ROUND)


def build(variant: str, args: argparse.Namespace, lengths: list[int]) -> Callable[[int], None]:
    """One training step of a variant at a length, which the plugin's schedule must have reached by itself."""
    full = 2 * lengths[-1]
    model, *_ = common.small_gpt(args.width, args.depth, full)
    plain = common.deepspeed_json(args.batch)
    tokens = torch.randint(0, common.VOCAB, (args.batch, full + 1))
    whole = {
        "input_ids": tokens[:, :-1].contiguous(),
        "position_ids": torch.arange(full).expand(args.batch, -1).contiguous(),
        "labels": tokens[:, 1:].contiguous(),
    }
    if variant.startswith("DeepSpeed"):
        engine = deepspeed.initialize(model=model, config=plain)[0]

        def batch(length: int) -> dict[str, torch.Tensor]:
            return {name: value[:, :length] for name, value in whole.items()}
    else:
        each = ROUND * (args.rounds + 1)
        boundaries = [each * (n + 1) for n in range(len(lengths))]
        warmup = {
            "enabled": True, "start_length": lengths[0], "end_length": full, "schedule": "discrete",
            "lengths": [*lengths, full], "boundaries": boundaries, "duration": {"steps": boundaries[-1]},
            "mode": variant, "preflight": False, "report_interval": ROUND,
            **({"interleave": 1} if variant == "carry" else {}),
        }  # fmt: skip
        engine = ds_plugin.initialize(model=model, config={**plain, "sequence_length_warmup": warmup})[0]
        plugin = ds_plugin.get_plugin(engine)
        cut = plugin.batches(lambda n: repeat(whole)) if variant == "carry" else None

        def batch(length: int) -> dict[str, torch.Tensor]:
            assert plugin.length == length, (plugin.length, length)
            return next(cut) if cut is not None else whole

    engine.train()

    def step(length: int) -> None:
        given = {name: value.to(engine.device) for name, value in batch(length).items()}
        loss = engine(given["input_ids"], given["position_ids"], None, labels=given["labels"]).mean()
        engine.backward(loss)
        engine.step()

    return step


if __name__ == "__main__":
    sys.exit(main())
