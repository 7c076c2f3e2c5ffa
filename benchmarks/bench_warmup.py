"""What sequence length warmup costs a step: against the host alone on samples of the same length.

    python benchmarks/bench_warmup.py [--out FILE.json]

Four DeepSpeed engines train the same model: two without the plugin on batches that are already short ("host", and
"host again", which says what the measurement is good for), one whose hook cuts full-length batches ("truncate"), one
that reads through `plugin.batches` ("carry"). They take turns step by step, in an order that rotates, and a round is
twenty steps of each, so that the instruments' report every twenty steps is in it. The figure is the median over rounds
of the time over the host's of the same round, with the middle half of the rounds beside it. Time is the process's CPU
time without a GPU, and from CUDA events with one.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch

import ds_plugin
from ds_plugin.core.files import atomic_write
from ds_plugin.deepspeed_engine import startup
from ds_plugin.sweeps import trial
from megatron_patches.models import gpt

VARIANTS = ("host", "host again", "truncate", "carry")
ROUND = 20  # steps; the instruments report once in so many
_VOCAB = 256


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a line per length and variant, write the JSON; exit code 1 when ``--check``'s bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--lengths", default="32,64,128", help="lengths to measure; the last is half the full one")
    parser.add_argument("--batch", type=int, default=4, help="samples a step")
    parser.add_argument("--rounds", type=int, default=19, help="3 more than a multiple of 4: whole samples are carried")
    parser.add_argument("--out", type=Path, help="write the figures here")
    parser.add_argument("--check", action="store_true", help="fail when the plugin costs more than 1 %%")
    args = parser.parse_args(arguments)
    lengths = [int(length) for length in args.lengths.split(",")]
    torch.set_num_threads(1)
    startup.quiet()
    startup.skip_inference_kernel()
    os.environ.setdefault("LOCAL_RANK", "0")
    trial.start_host()
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")
    steps = {name: build(name, args, lengths) for name in VARIANTS}
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for length in lengths:
        found[str(length)] = times(steps, args.rounds, length)
        for name in VARIANTS[1:]:
            ratio, low, high = found[str(length)][name]
            print(f"length {length}, {name}: {ratio:.4f} of the host alone (middle half {low:.4f} to {high:.4f})")
    if args.out is not None:
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "check")}
        described = {"settings": settings, "torch": torch.__version__, "device": _device().type, "time": found}
        atomic_write(args.out, lambda temporary: temporary.write_text(json.dumps(described, indent=1) + "\n") and None)
    slow = [found[str(length)][name][0] > 1.01 for length in lengths for name in ("truncate", "carry")]
    startup.leave()
    return 1 if args.check and any(slow) else 0


def build(variant: str, args: argparse.Namespace, lengths: list[int]) -> Callable[[int], None]:
    """One training step of a variant at a length, which the plugin's schedule must have reached by itself."""
    full = 2 * lengths[-1]
    cfg = gpt.GPTConfig.model_validate(
        {
            "num_layers": args.depth,
            "hidden_size": args.width,
            "num_attention_heads": args.width // 32,
            "seq_length": full,
        }
    )
    gpt.initialize_parallel(cfg, 1234)
    model = gpt.build_gpt(cfg, _VOCAB, gpt.transformer_config(cfg, torch.float32), gpt.layer_spec(cfg))
    host: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": args.batch,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    tokens = torch.randint(0, _VOCAB, (args.batch, full + 1))
    whole = {
        "input_ids": tokens[:, :-1].contiguous(),
        "position_ids": torch.arange(full).expand(args.batch, -1).contiguous(),
        "labels": tokens[:, 1:].contiguous(),
    }
    if variant.startswith("host"):
        engine = deepspeed.initialize(model=model, config=host)[0]

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
        engine = ds_plugin.initialize(model=model, config={**host, "sequence_length_warmup": warmup})[0]
        plugin = ds_plugin.get_plugin(engine)
        cut = plugin.batches(lambda n: _forever(whole)) if variant == "carry" else None

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


def times(steps: dict[str, Callable[[int], None]], rounds: int, length: int) -> dict[str, tuple[float, float, float]]:
    """By variant: median and quartiles over the rounds of their time over the host's. One round more warms up."""
    names = list(steps)
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        spent = dict.fromkeys(names, 0.0)
        for turn in range(ROUND):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                spent[name] += _seconds(steps[name], length)
        for name in names if number else []:
            ratios[name].append(spent[name] / spent["host"])
    quartiles = {name: statistics.quantiles(found, n=4) for name, found in ratios.items()}
    return {name: (middle, low, high) for name, (low, middle, high) in quartiles.items()}


def _seconds(step: Callable[[int], None], length: int) -> float:
    if torch.cuda.is_available():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step(length)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    started = time.process_time()
    step(length)
    return time.process_time() - started


def _forever(batch: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        yield batch


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    sys.exit(main())
