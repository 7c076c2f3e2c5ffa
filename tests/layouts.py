"""What runs where: each method in each layout of each framework, killed in mid-run, resumed, and compared. One command:

    python -m tests.layouts [--megatron CHECKOUT] [--out docs/results/layouts.md]

A cell is three runs of the framework's training script on CPU processes: one that trains through, one whose ranks get
SIGKILL after its checkpoint, and its resumption. Every figure that the script writes for the steps after the checkpoint
must be the uninterrupted run's, as must the average that it exports. The fp32 losses of DeepSpeed's layouts must also
be those of the first layout, to 1e-5. A cell that does not hold says so, and the exit code is 1. Cells are kept in
--work as they are done: started again, the command goes on.

Megatron-LM's script is started by the launcher, launch_scripts/pretrain_gpt.py on ranks that were forked; under the
launcher, test_interruption.py and test_pretrain_3d.py kill and resume it.
"""

import argparse
import datetime
import functools
import importlib.util
import json
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ds_plugin.core.files import atomic_write
from launch_scripts.gpt.folder import read_metrics
from tests.distributed.test_pretrain import run_script
from tests.harness import Launched, WorkerError, WorkerPools
from tests.megatron_lm import logged, real

STEPS, SAVED, KILLED = 12, 6, 8
FULL = 32
TOLERANCE = 1e-5  # of losses between layouts: sums of some thousand fp32 products in another order, after 12 steps
SECTIONS: dict[str, dict[str, Any]] = {
    "sequence_length_warmup": {
        "enabled": True, "start_length": 8, "end_length": FULL, "duration": {"steps": 10}, "multiple_of": 8,
    },
    "completep": {"enabled": True, "base_width": 16, "base_depth": 2, "base_head_dim": 8},
    "weight_averaging": {"enabled": True, "window": 3, "interval": 2},
}  # fmt: skip
CARRY = {"mode": "carry", "interleave": 2, "learning_rate": {"by": "tokens"}}


def chosen(*names: str, **changes: dict[str, Any]) -> dict[str, Any]:
    """These sections, with changes."""
    return {name: SECTIONS[name] | changes.get(name, {}) for name in names}


METHODS = {
    "warmup, truncate": chosen("sequence_length_warmup"),
    "warmup, carry": chosen("sequence_length_warmup", sequence_length_warmup=CARRY),
    "warmup, constant tokens": chosen("sequence_length_warmup", sequence_length_warmup={"tokens_per_step": "constant"}),
    "warmup, mask": chosen("sequence_length_warmup", sequence_length_warmup={"mode": "mask"}),
    "CompleteP, forward": chosen("completep", completep={"residual": "forward"}),
    "CompleteP, folded": chosen("completep", completep={"residual": "folded"}),
    "averaging": chosen("weight_averaging"),
    "all three": chosen(*SECTIONS),
}


@dataclass(frozen=True)
class Layout:
    """How a model is shared out, and which methods are run in it (all, if not said)."""

    name: str
    ranks: int
    settings: dict[str, Any] = field(default_factory=dict)
    methods: tuple[str, ...] = tuple(METHODS)
    fp32: bool = True


ONLY, MASK = ("all three",), "warmup, mask"
DEEPSPEED = (
    *(Layout(f"ZeRO {stage}, DP 2", 2, {"zero": stage}) for stage in (1, 0, 2, 3)),
    Layout("ZeRO 2, DP 2, optimizer in CPU memory", 2, {"zero": 2, "offload": True}),
    Layout("ZeRO 3, DP 2, bf16", 2, {"zero": 3, "bf16": True}, ONLY, fp32=False),
    Layout("ZeRO 1, TP 2 x DP 2", 4, {"tensor": 2}),
    Layout("ZeRO 1, PP 2 x DP 2", 4, {"pipe": 2}, tuple(name for name in METHODS if name != MASK)),
    Layout("ZeRO 1, PP 2 x DP 2, bf16", 4, {"pipe": 2, "bf16": True}, ONLY, fp32=False),
    Layout("ZeRO 1, PP 2 x TP 2 x DP 2", 8, {"pipe": 2, "tensor": 2}, ONLY),
)
VIRTUAL = "--num-layers 8 --num-layers-per-virtual-pipeline-stage 1 --no-overlap-p2p-communication"
EXPERTS = "--num-experts 4 --expert-model-parallel-size 2 --disable-bias-linear --moe-token-dispatcher-type alltoall"
OF_EXPERTS = {"base_num_moe_experts": 4, "base_moe_router_topk": 2}
MEGATRON = (
    Layout("DP 2, distributed optimizer", 2, {"tensor": 1, "pipe": 1}),
    Layout("TP 2", 2, {"tensor": 2, "pipe": 1}),
    Layout("TP 2, sequence parallel", 2, {"tensor": 2, "pipe": 1, "flags": "--sequence-parallel"}),
    Layout("PP 2", 2, {"tensor": 1, "pipe": 2}),
    Layout("PP 4 x 2 virtual stages, 8 layers", 4, {"tensor": 1, "pipe": 4, "flags": VIRTUAL}),
    Layout("EP 2 x DP 2, 4 experts", 2, {"tensor": 1, "pipe": 1, "flags": EXPERTS, "completep": OF_EXPERTS}),
    Layout("TP 2 x PP 2 x DP 2, distributed optimizer", 8, {"tensor": 2, "pipe": 2}, ONLY),
)


#: a folder for its runs, the layout, the JSON's sections -> the losses of the steps
Cell = Callable[[Path, Layout, dict[str, Any]], list[float]]


def main(arguments: list[str] | None = None) -> int:
    """Run the cells that are not kept yet, print each as it ends, write the table; 1 when one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron", type=Path, metavar="CHECKOUT", help="of Megatron-LM: run its script too")
    parser.add_argument("--only", action="append", default=[], help="cells whose names hold this; again: and this")
    parser.add_argument("--work", type=Path, default=Path("runs/layouts"), help="runs, and cells that are done")
    parser.add_argument("--out", type=Path, help="write the table here; a framework that was not run keeps its part")
    args = parser.parse_args(arguments)
    pools = WorkerPools()
    frameworks: dict[str, tuple[tuple[Layout, ...], Cell]] = {
        "DeepSpeed": (DEEPSPEED, functools.partial(deepspeed_cell, pools=pools))
    }
    if args.megatron is not None:
        frameworks[f"Megatron-LM {branch(args.megatron)}"] = (MEGATRON, megatron_cell(args.megatron))
    args.work.mkdir(parents=True, exist_ok=True)
    failed = 0
    for framework, (layouts, run) in frameworks.items():
        cells: dict[str, dict[str, Any]] = {}
        for layout in layouts:
            for method in layout.methods:
                cell = f"{framework} / {layout.name} / {method}"
                if all(text in cell for text in args.only):
                    cells[cell] = kept(args.work, cell, layout, method, run)
                    failed += not cells[cell]["held"]
                    print(f"{cell}: {cells[cell]['said']} ({cells[cell]['seconds']:.0f} s)", flush=True)
        if args.out is not None and cells:
            write(args.out, framework, table(framework, layouts, cells))
    pools.close()
    return 1 if failed else 0


def kept(work: Path, cell: str, layout: Layout, method: str, run: Cell) -> dict[str, Any]:
    """The cell's result, from its file or by running it."""
    folder, file = work / filed(cell), work / f"{filed(cell)}.json"
    if file.exists():
        return json.loads(file.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    started = time.monotonic()
    try:
        losses = run(folder, layout, METHODS[method])
        found: dict[str, Any] = {"held": True, "losses": losses, "said": f"equal; last loss {losses[-1]:.6f}"}
        first = work / f"{filed(f'DeepSpeed / {DEEPSPEED[0].name} / {method}')}.json"
        if layout in DEEPSPEED and layout.fp32 and first.exists():
            expected = json.loads(first.read_text())["losses"]
            found["difference"] = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
            found["said"] += f", {found['difference']:.1e} from {DEEPSPEED[0].name}"
            found["held"] = found["difference"] <= TOLERANCE
    except (AssertionError, TimeoutError, WorkerError) as error:
        found = {"held": False, "said": f"FAILED: {error}"}
    found |= {"seconds": time.monotonic() - started, "date": datetime.date.today().isoformat()}
    if found["held"]:
        atomic_write(file, lambda path: path.write_text(json.dumps(found)) and None)
        shutil.rmtree(folder)
    return found


def filed(cell: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in cell)


# -- the frameworks ----------------------------------------------------------------------------------------------------


def deepspeed_cell(folder: Path, layout: Layout, sections: dict[str, Any], pools: WorkerPools) -> list[float]:
    """The losses of launch_scripts/pretrain_gpt.py, or an AssertionError that says what differs."""
    text = folder / "text"
    text.mkdir()
    source = Path(importlib.util.find_spec("argparse").origin)  # type: ignore[union-attr, arg-type]
    (text / source.name).write_text(source.read_text())
    config = deepspeed_config(layout) | sections
    pool = pools(layout.ranks)
    pool.run(run_script, str(folder), "whole", config, timeout=600)
    try:
        pool.run(run_and_die, str(folder), "cut", config, timeout=600)
        raise AssertionError(f"no rank was killed after step {KILLED}")
    except WorkerError as error:
        assert f"{layout.ranks} of {layout.ranks} ranks failed" in str(error) and "exit code -9" in str(error), error
    pool.run(run_script, str(folder), "cut", config, "--resume", timeout=600)
    whole, cut = (read_metrics(folder / "runs" / name / "metrics.csv") for name in ("whole", "cut"))
    for column in whole.keys() - {"tokens_per_second"}:
        assert cut[column] == whole[column], f"{column} after resuming is {cut[column]}, {whole[column]} without"
    assert whole["step"] == list(range(1, STEPS + 1)), whole["step"]
    if "weight_averaging" in sections:
        one, other = (load_file(folder / "runs" / name / "averaged.safetensors") for name in ("whole", "cut"))
        differ = [name for name in one.keys() | other.keys() if not (one[name] == other[name]).all()]
        assert not differ, f"averages differ after resuming: {differ[0]} and {len(differ) - 1} more"
    return whole["train_loss"]


def run_and_die(folder: str, name: str, config: dict[str, Any]) -> None:
    """The script on these ranks, until its metrics hold the step after which all get SIGKILL."""
    metrics = Path(folder, "runs", name, "metrics.csv")

    def watch() -> None:
        while not (metrics.exists() and f"\n{KILLED}," in metrics.read_text()):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    run_script(folder, name, config)


def deepspeed_config(layout: Layout) -> dict[str, Any]:
    """A model of four layers, a global batch of eight samples in every layout."""
    given = {"zero": 1, "tensor": 1, "pipe": 1, "bf16": False, "offload": False} | layout.settings
    offload: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}} if given["offload"] else {}
    # DeepSpeed's own Adam for it resumes to the last bit but one, without any method as well
    torch_adam = {"torch_adam": True} if offload else {}
    data = layout.ranks // (given["tensor"] * given["pipe"])
    return {
        "model": {
            "num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": FULL,
            "tensor_parallel": given["tensor"], "pipeline_parallel": given["pipe"],
        },
        "training": {
            "steps": STEPS, "eval_interval": 6, "eval_samples": 8, "save_interval": SAVED, "log_interval": 1,
        },
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4 // data,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "bf16": {"enabled": given["bf16"]},
        "zero_optimization": {"stage": given["zero"], **offload},
        **({"zero_force_ds_cpu_optimizer": False} if offload else {}),
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "betas": [0.9, 0.95], "weight_decay": 0.1} | torch_adam},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 4}},
    }  # fmt: skip


def megatron_cell(checkout: Path) -> Cell:
    """A cell of Megatron-LM's script in this checkout."""
    flags = f"--train-iters {STEPS} --save-interval {SAVED} --eval-interval 6 --eval-iters 1 --seq-length {FULL}"
    few = [*flags.split(), "--max-position-embeddings", str(FULL), "--lr-warmup-iters", "2"]

    def run(folder: Path, layout: Layout, sections: dict[str, Any]) -> list[float]:
        sizes = [f"--tensor-model-parallel-size={layout.settings['tensor']}"]
        sizes += [f"--pipeline-model-parallel-size={layout.settings['pipe']}"]
        sizes += layout.settings.get("flags", "").split()

        if "completep" in sections:
            sections = sections | {"completep": sections["completep"] | layout.settings.get("completep", {})}

        def start(name: str, *more: str | Path) -> Launched:
            save = ["--save", folder / name]
            return real(checkout, folder, name, sections, *few, *sizes, *save, *more, ranks=layout.ranks)

        whole, evaluations = output_of(start("whole"))
        with start("cut") as killed:
            killed.wait_for(f"iteration {KILLED:8d}/", 900)
        assert (folder / "cut" / "latest_checkpointed_iteration.txt").read_text() == str(SAVED)
        resumed, later = output_of(start("cut", "--load", folder / "cut"))
        assert sorted(whole) == list(range(1, STEPS + 1)), sorted(whole)
        assert min(resumed) == SAVED + 1 and later == evaluations[len(evaluations) - len(later) :], (evaluations, later)
        for step in range(SAVED + 1, STEPS + 1):
            other = {"lm loss"} if step == SAVED + 2 else set()  # there Megatron-LM logs a mean of two steps
            names = set(whole[step]) - other
            for name in names:
                found, expected = resumed[step].get(name), whole[step][name]
                assert found == expected, f"{name} of iteration {step} is {found} after resuming, {expected} without"
        return [float(whole[step]["lm loss"]) for step in sorted(whole)]

    return run


def output_of(started: Launched) -> Any:
    with started:
        done = started.wait(1500)
    assert done.returncode == 0, done.stdout[-2000:]
    return logged(done.stdout)


def branch(checkout: Path) -> str:
    """The checkout's version of megatron-core."""
    found: dict[str, Any] = {}
    text = (checkout / "megatron" / "core" / "package_info.py").read_text()
    for line in text.splitlines():
        name, _, value = line.partition(" = ")
        if name in ("MAJOR", "MINOR", "PATCH"):
            found[name] = value.strip()
    return ".".join(found.values())


# -- the table ---------------------------------------------------------------------------------------------------------


def table(framework: str, layouts: tuple[Layout, ...], cells: dict[str, dict[str, Any]]) -> str:
    packages = ("torch", "deepspeed") if framework == "DeepSpeed" else ("torch",)
    names = ", ".join(f"{name} {version(name)}" for name in packages)
    dates = sorted({cell["date"] for cell in cells.values()})
    lines = [
        f"## {framework}",
        "",
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, Python {platform.python_version()}, {names}, CPU.",
        "",
        f"| layout | {' | '.join(METHODS)} |",
        f"|---|{'---|' * len(METHODS)}",
    ]
    for layout in layouts:
        row = []
        for method in METHODS:
            cell = cells.get(f"{framework} / {layout.name} / {method}")
            if cell is None:
                refused = framework == "DeepSpeed" and method == MASK and "pipe" in layout.settings
                row.append("refused" if refused else "")
            elif not cell["held"]:
                row.append("**fails**")
            else:
                apart = cell.get("difference")
                row.append("resumed" if apart is None else f"resumed, {apart:.0e}" if apart else "resumed, equal")
        lines.append(f"| {layout.name} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def write(out: Path, framework: str, part: str) -> None:
    """Put a framework's table into the file, in place of its former one."""
    parts = out.read_text().split("\n## ") if out.exists() else [HEAD]
    rest = [p for p in parts[1:] if not p.startswith(framework + "\n")]
    joined = [HEAD.rstrip("\n"), *sorted([*(p.rstrip("\n") for p in rest), part.removeprefix("## ").rstrip("\n")])]
    text = "\n\n## ".join(joined) + "\n"
    atomic_write(out, lambda path: path.write_text(text) and None)


HEAD = f"""# What runs where

    python -m tests.layouts --out docs/results/layouts.md
    python -m tests.layouts --megatron ~/Megatron-LM --out docs/results/layouts.md

Every cell is a run of the framework's script (for DeepSpeed launch_scripts/pretrain_gpt.py): {STEPS} steps through,
then the same killed with SIGKILL after step {KILLED} and resumed from its checkpoint at step {SAVED}. "Resumed": every
figure logged after it is the uninterrupted run's - losses, evaluations raw and averaged, learning rates, lengths,
tokens, norms - and with DeepSpeed the exported average is, bit for bit. The number is the largest difference of a
step's fp32 loss from the first row's ("equal": none), which must not exceed {TOLERANCE:g}. "All three" is truncated
warmup, CompleteP as the framework has it by itself (DeepSpeed forward, Megatron-LM folded) and the sliding average. An
empty cell was not run.

Not run, and why: DeepSpeed's sequence parallelism (Ulysses) is called by a model's own attention, and the script's has
none; a script that splits its samples does it after `batches()` has cut them. Context parallelism is there in
TransformerEngine's attention alone, which needs a GPU; that its ranks get the cut sample is a test
(test_training_loop.py). PyTorch's and Megatron's FSDP keep the weights another way: refused by name with averaging and
CompleteP.
"""


if __name__ == "__main__":
    from tests import layouts

    sys.exit(layouts.main())  # not __main__'s: the ranks look functions up by their module
