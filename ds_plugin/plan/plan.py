"""What a recipe comes to, before any money is spent: ``ds-plugin plan --config FILE --world-size N``. Builds the real
config objects, but no model and no process."""

import argparse
import math
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ds_plugin.core.arguments import count, new_file, positive
from ds_plugin.core.errors import ConfigError
from ds_plugin.core.files import write_json

if TYPE_CHECKING:  # importing them takes seconds, which --help should not
    from ds_plugin.plan.costs import Rates
    from ds_plugin.plan.inputs import Job


def make(job: "Job", rates: "Rates", *, pinned: bool = True) -> dict[str, Any]:
    """The plan in JSON types; bytes, seconds, tokens over all ranks. ``pinned``: the ranks train on GPUs."""
    from ds_plugin.plan import costs
    from ds_plugin.plan.roles_table import applied, table

    model, layout, params = job.model, job.layout, job.deepspeed["optimizer"].get("params", {})
    zero = job.deepspeed.get("zero_optimization") or {}
    offloaded = (zero.get("offload_optimizer") or {}).get("device") == "cpu"
    held = costs.parameters(model, job.padded_vocab, layout)
    masters = -(-held // (layout.data * layout.context)) if zero.get("stage", 0) else held
    whole, tokens = costs.parameters(model, job.padded_vocab, costs.Layout(1)), job.batch * model.seq_length
    found: dict[str, Any] = {
        "recipe": f"{job.source}, {'Megatron-LM' if job.options else 'DeepSpeed'}",
        "layout": {**asdict(layout), "data": layout.data},
        "parameters": {"all": whole, "of a rank": held, "fp32 masters": masters},
        "batch": {"samples": job.batch, "tokens": tokens, "micro-batch": job.micro_batch},
        **_lengths(job),
        "lr": params.get("lr"),
        "completep": None,
        "averaging": None,
        "seconds": {"full-length step": costs.step_seconds(rates, model, job.padded_vocab, tokens, layout.ranks)},
        "assumed per second": asdict(rates),
    }
    if (completep := job.methods.completep) is not None:
        optimizer, scheduler = job.deepspeed["optimizer"], job.deepspeed.get("scheduler") or {}
        lines = list(table(model, completep, optimizer, scheduler, job.padded_vocab))
        found["completep"] = {"table": lines, "roles": applied(model, completep, params, job.padded_vocab)}
    if (averaging := job.methods.weight_averaging) is not None:
        found["averaging"] = _averaging(job, averaging, masters, pinned and not offloaded, found["lr_peak_from_step"])
        snapshot = 4 * masters / rates.link  # nothing of it is counted as hidden behind the computation
        added = {"averaging adds": snapshot / averaging.interval}
        found["seconds"] |= {"snapshot": snapshot, "swap": 2 * snapshot, **added}
    return found


def _lengths(job: "Job") -> dict[str, Any]:
    """The lengths by step, the tokens they come to, and the step from which the learning rate is at its peak."""
    from ds_plugin.sequence_length_warmup.plan import Plan, walk

    full, section = job.batch * job.model.seq_length, job.methods.sequence_length_warmup
    now, whole = Plan(0, 0, 0), Plan(job.steps, job.steps * full, job.steps * full, job.model.seq_length)
    rise = ((job.deepspeed.get("scheduler") or {}).get("params") or {}).get("warmup_num_steps")
    rise = rise if isinstance(rise, (int, float)) and rise > 0 else math.inf
    by_tokens = section is not None and section.learning_rate.by == "tokens"
    lengths, peak = [], None
    for then in [whole] if job.scheduler is None else walk(job.scheduler, job.batch, steps=job.steps):
        if then.length != now.length:
            lengths.append({"length": then.length, "from_step": now.steps + 1, "from_token": now.trained + 1})
        if peak is None and (then.trained / full if by_tokens else then.steps) >= rise:
            a_step = (then.trained - now.trained) // (then.steps - now.steps)
            peak = now.steps + math.ceil((rise * full - now.trained) / a_step) if by_tokens else math.ceil(rise)
        now = then
    left = "carried" if section is not None and section.mode == "carry" else "discarded"
    run = {"steps": job.steps, "trained": now.trained, "read": now.read, "discarded": 0, "carried": 0}
    return {"tokens": {**run, left: now.read - now.trained}, "lengths": lengths, "lr_peak_from_step": peak}


def _averaging(job: "Job", config: Any, masters: int, pinned: bool, peak: int | None) -> dict[str, Any]:
    from ds_plugin.plan import costs

    in_memory, in_files = costs.averaging(config, masters, pinned=pinned)
    first = -(-max(1, config.start_step) // config.interval) * config.interval
    reach = config.interval * (config.window if config.mode != "ema" else max(config.horizons or [0]))
    found: dict[str, Any] = {
        "snapshot bytes": 4 * masters,
        "memory bytes": in_memory,
        "bytes before pinning": costs.averaging(config, masters, pinned=False)[0],
        "node memory bytes": in_memory * min(job.layout.ranks, job.layout.per_node),
        "file bytes": in_files,
        "first snapshot": first,
        "snapshots": max(0, (job.steps - first) // config.interval + 1),
        "averaged steps": reach,
        "share of the run": reach / job.steps,
    }
    if not found["snapshots"]:
        found["note"] = "the run ends before the first snapshot"
    elif peak is not None and first < peak:
        found["note"] = f"the first snapshot is taken before the learning rate is at its peak, at step {peak}"
    return found


def text(found: dict[str, Any]) -> str:
    """The plan for people."""
    lines = []
    for name, value in found.items():
        rows = value["table"] if isinstance(value, dict) and "table" in value else value  # CompleteP's is for people
        said = "".join(f"\n    {_said(name, row)}" for row in rows) if isinstance(rows, list) else _said(name, value)
        lines.append(f"{name.replace('_', ' '):<20}{said}")
    return "\n".join(lines)


def _said(name: str, value: Any) -> str:
    from ds_plugin.weight_averaging.snapshots.memory import size

    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_said(key, item)}" for key, item in value.items())
    if "bytes" in name:
        return size(value)
    if value is None:
        return "off"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else str(value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``ds-plugin plan``."""
    add = parser.add_argument
    add("--config", "--deepspeed_config", dest="config", required=True, metavar="FILE", help="a recipe, as in configs/")
    add("--world-size", type=count, required=True, metavar="N", help="ranks, all nodes together")
    add("--ranks-per-node", type=count, default=8, metavar="N", help="that share a node's memory (default 8)")
    add("--vocab-size", type=count, metavar="N", help="of a recipe for DeepSpeed: 256 for bytes")
    add("--device", choices=("gpu", "cpu"), default="gpu", help="what the ranks train on (default gpu)")
    add("--link", type=positive, help="of the device: bytes/s to CPU memory")
    add("--flops", type=positive, help="of the device: operations/s, as achieved")
    add("--json", type=new_file, metavar="FILE", help="write the plan here, too")
    add("--arguments", action="store_true", help="print a Megatron-LM recipe's command line instead")


def command(args: argparse.Namespace) -> int:
    """Print the plan. Raises ConfigError when it cannot be made."""
    from ds_plugin.plan import costs, inputs

    job = inputs.read_job(args.config, args.world_size, per_node=args.ranks_per_node, vocab_size=args.vocab_size)
    if args.arguments:
        if not job.options:
            raise ConfigError(f'--arguments: {args.config} has no "megatron" section; it is a recipe for DeepSpeed')
        print(" ".join(inputs.arguments(job.options)))
        return 0
    given = {name: value for name in ("link", "flops") if (value := getattr(args, name)) is not None}
    found = make(job, replace(costs.RATES[args.device], **given), pinned=args.device == "gpu")
    if args.json is not None:
        write_json(args.json, found)
    print(text(found))
    return 0
