"""What the hooks cost a step of Hugging Face's Trainer, at full length.

    python benchmarks/bench_hugging_face.py [--out FILE.json]

Four variants of one run take turns: the Trainer alone, twice ("plain again" says what the measurement is good for),
with the hooks and no section ("off"), and with a warmup that has reached its full length and an average whose first
snapshot does not come ("on"). A round is one ``train()`` of each, in an order of its own; what is timed is from the end
of its second step to the end of its last, so that batches, hooks and logs are in it and engines are not. The figures
are medians over rounds of the time over that of the same round. Time is CPU time without a GPU.
"""

import argparse
import gc
import random
import sys
import tempfile
from typing import Any

import common
import torch
import transformers

from ds_plugin import huggingface
from ds_plugin.deepspeed_engine import startup

VARIANTS = ("plain", "plain again", "off", "on")


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a line per comparison; exit code 1 when ``--check``'s bound is broken."""
    bound = "fail when the hooks cost more than 1 %%"
    parser = common.parser(__doc__, bound, width=256, depth=4, length=128, batch=4, rounds=40)
    parser.add_argument("--steps", type=int, default=8, help="of a round; default: 8")
    args = parser.parse_args(arguments)
    common.start()
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds + 1):
            for name in random.Random(number).sample(VARIANTS, len(VARIANTS)):
                seconds[name].append(_train(name, args, folder))
    spent = {name: found[1:] for name, found in seconds.items()}
    pairs = {"plain again over plain": ("plain again", "plain"), "off over plain": ("off", "plain")}
    pairs["on over off"] = ("on", "off")
    rows = {said: common.over(spent[a], spent[b]) for said, (a, b) in pairs.items()}
    for said, row in rows.items():
        print(f"{said}: {common.said(row)}", flush=True)
    limits = [(said, rows[said]["ratio"], 1.01) for said in list(pairs)[1:]]
    code = common.ended(args, limits, time=rows)
    startup.leave()
    return code


class _Clock(transformers.TrainerCallback):
    """Times at the ends of steps."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(common.clock())


def _train(variant: str, args: argparse.Namespace, folder: str) -> float:
    """Seconds of the steps of one run."""
    (huggingface.disable if variant.startswith("plain") else huggingface.enable)()
    lengths = {"start_length": args.length, "end_length": args.length, "duration": {"steps": 1}}
    sections = {
        "sequence_length_warmup": {"enabled": True, **lengths},
        "weight_averaging": {"enabled": True, "interval": 1, "start_step": 10**6},
    }
    config = {
        "train_micro_batch_size_per_gpu": args.batch,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": not torch.cuda.is_available()}},
        **(sections if variant == "on" else {}),
    }
    torch.manual_seed(0)
    shape = {"hidden_size": args.width, "intermediate_size": 3 * args.width, "num_hidden_layers": args.depth}
    shape |= {"num_attention_heads": 4, "vocab_size": common.VOCAB, "max_position_embeddings": args.length}
    rows = torch.randint(common.VOCAB, (args.steps * args.batch, args.length))
    given: dict[str, Any] = {"max_steps": args.steps, "logging_steps": 5, "save_strategy": "no", "report_to": []}
    given |= {"per_device_train_batch_size": args.batch, "learning_rate": 1e-4, "disable_tqdm": True}
    arguments = transformers.TrainingArguments(folder, deepspeed=config, **given)
    trainer = transformers.Trainer(
        model=transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)),
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[clock := _Clock()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    engine: Any = trainer.deepspeed
    engine.destroy()
    del trainer, engine
    gc.collect()  # or the engines of all rounds stay in memory
    return clock.ends[-1] - clock.ends[1]


if __name__ == "__main__":
    sys.exit(main())
