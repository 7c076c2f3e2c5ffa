"""What a recipe comes to, before any money is spent. ``python -m ds_plugin plan --config FILE --world-size N``.

Builds the real config objects, but no model and no process: lengths and tokens step by step, what CompleteP gives each
role, what averaging takes, and the seconds of a step that the methods are expected to take.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_plugin.errors import ConfigError, PluginError

if TYPE_CHECKING:  # importing it takes seconds, which --help should not
    from ds_plugin.run.plan_inputs import Job


def make(
    job: "Job", *, device: str = "gpu", link: float = 25e9, bandwidth: float = 2e12, flops: float = 400e12
) -> dict[str, Any]:
    """The plan in JSON types; bytes, seconds, tokens over all ranks.

    ``device``: what the ranks train on, "gpu" or "cpu". The rates, as `plan_costs.gpu` takes them, are a GPU's; those
    of a CPU were measured.
    """
    from ds_plugin.run import plan_costs as costs

    run = job.settings
    model, completep = run.model, run.plugin.completep
    folded = completep is not None and completep.residual == "folded"
    found = costs.parts(model, job.padded_vocab, folded=folded)
    whole = costs.parameters(found, model.num_layers)
    local = costs.local_parameters(found, model.num_layers, job.layout, tied=model.tie_embeddings)
    masters = costs.shares(local, job.partitions, by_role=completep is not None)
    offloaded = ((run.host.get("zero_optimization") or {}).get("offload_optimizer") or {}).get("device") == "cpu"
    rates = costs.CPU if device == "cpu" else costs.gpu(link, bandwidth, flops)
    if offloaded:  # the masters are in the host's memory already
        rates = replace(rates, snapshot=costs.CPU.snapshot, looked_at=costs.CPU.looked_at)
    steps = run.training.steps
    schedule = _schedule(job, steps)
    return {
        "recipe": job.source,
        "host": "Megatron-LM" if job.options else "DeepSpeed",
        "layout": {**asdict(job.layout), "data": job.layout.data, "share the masters": job.partitions},
        "parameters": {
            "all": sum(whole.values()),
            **{role.value: count for role, count in whole.items()},
            "on the fullest rank": sum(local.values()),
            "fp32 masters of a rank": sum(masters.values()),
        },
        "batch": {
            "samples": job.batch,
            "tokens": job.batch * model.seq_length,
            "micro_batch": job.micro_batch,
            "micro_batches": job.accumulation,
        },
        "run": schedule["run"],
        "lengths": schedule["lengths"],
        "lr": (run.host["optimizer"].get("params") or {}).get("lr"),
        "lr_warmup_ends": schedule["lr_warmup_ends"],
        "completep": _completep(run) if completep is not None else None,
        "weight_averaging": _averaging(job, masters, pinned=device == "gpu" and not offloaded, schedule=schedule),
        "seconds": _seconds(job, rates, masters, costs.multiplying(found, model)),
    }


# -- lengths and tokens ----------------------------------------------------------------------------------------------


def walk(job: "Job", steps: int) -> Iterator[tuple[int, int, int]]:
    """(scheduled length, tokens trained so far, tokens read so far) after each step; adaptive pacing never holds."""
    from ds_plugin.sequence_length_warmup.carry import CarryOrder

    full, batch, scheduler = job.settings.model.seq_length, job.batch, job.scheduler
    trained = read = 0
    if scheduler is None:
        for step in range(1, steps + 1):
            yield full, step * batch * full, step * batch * full
        return
    config = scheduler.config
    order = CarryOrder(full=full, multiple_of=scheduler.multiple_of, interleave=config.windows)
    for step in range(steps):
        length = scheduler.length_at((step if config.duration.unit == "steps" else trained) + 1)
        if config.mode == "carry":
            stretch = order.next(length)
            order.take(stretch)
            trained, read = trained + batch * stretch.length, read + (batch * full if stretch.offset == 0 else 0)
        else:
            trained, read = trained + batch * (length if config.mode == "truncate" else full), read + batch * full
        yield length, trained, read


def _schedule(job: "Job", steps: int) -> dict[str, Any]:
    config = job.settings.plugin.sequence_length_warmup
    full = job.batch * job.settings.model.seq_length
    rise = ((job.settings.host.get("scheduler") or {}).get("params") or {}).get("warmup_num_steps")
    rise = rise if isinstance(rise, (int, float)) and rise > 0 else None
    by_tokens = config is not None and config.learning_rate.by == "tokens"
    lengths: list[dict[str, int]] = []
    trained = read = 0
    risen: int | None = None
    for step, (length, after, taken) in enumerate(walk(job, steps), start=1):
        if not lengths or lengths[-1]["length"] != length:
            lengths.append({"length": length, "from_step": step, "from_token": trained + 1})
        trained, read = after, taken
        if rise is not None and risen is None and (trained / full if by_tokens else step) >= rise:
            risen = step
    carried = read - trained if config is not None and config.mode == "carry" else 0
    return {
        "run": {
            "steps": steps,
            "tokens_trained": trained,
            "tokens_read": read,
            "tokens_discarded": read - trained - carried,
            "tokens_carried": carried,
        },
        "lengths": lengths,
        "lr_warmup_ends": risen,
    }


# -- CompleteP -------------------------------------------------------------------------------------------------------


def _as_config(run: Any) -> dict[str, Any]:
    """What `rules_table` reads."""
    keys = ("optimizer", "scheduler")
    return {
        "model": run.model.model_dump(),
        "completep": run.plugin.completep.model_dump(),
        **{key: run.host[key] for key in keys if key in run.host},
    }


def _completep(run: Any) -> dict[str, Any]:
    from megatron_patches.completep import rules
    from megatron_patches.completep.table import minimum_ratio, rules_table

    section, model = run.plugin.completep, run.model
    ratios = section.ratios(model.hidden_size, model.num_layers)
    params = run.host["optimizer"].get("params") or {}
    text = rules_table(_as_config(run))  # which also says what is missing
    rows = {}
    for role in rules.Role:
        if not any(line.startswith(f"{role.value} ") for line in text.splitlines()):
            continue
        m = section.multipliers(role, ratios)
        rows[role.value] = {
            "init_std": model.init_std * m.init_std,
            "lr": params["lr"] * m.lr,
            "weight_decay": params.get("weight_decay", 0.0) * m.weight_decay,
            "eps": params.get("eps", 1e-8) * m.eps,
        }
    head = model.hidden_size // model.num_attention_heads
    return {
        "m_N": ratios.m_N,
        "m_L": ratios.m_L,
        "min_lr_ratio": minimum_ratio(run.host.get("scheduler") or {}),
        "residual_branches": rules.residual_multiplier(ratios, section.recipe),
        "logits": rules.logit_multiplier(ratios, section.recipe, tied=model.tie_embeddings),
        "attention": rules.attention_scale(head, section.base_head_dim or head, section.recipe),
        "roles": rows,
        "table": text.splitlines(),
    }


# -- averaging and time ----------------------------------------------------------------------------------------------


def _averaging(job: "Job", masters: dict[str, int], *, pinned: bool, schedule: dict[str, Any]) -> dict[str, Any] | None:
    from ds_plugin.run import plan_costs as costs

    config, steps = job.settings.plugin.weight_averaging, schedule["run"]["steps"]
    if config is None:
        return None
    taken = costs.averaging(config, masters, pinned=pinned)
    first = -(-max(1, config.start_step) // config.interval) * config.interval
    count = max(0, (steps - first) // config.interval + 1)
    reach = config.window * config.interval if config.mode != "ema" else max(config.horizons or [0]) * config.interval
    return {
        "snapshot_bytes": taken.snapshot,
        "host_bytes": taken.held,
        "host_bytes_before_rounding": taken.exact,
        "file_bytes": taken.files,
        "node_host_bytes": taken.held * job.layout.on_node,
        "node_file_bytes": taken.files * job.layout.on_node,
        "first_snapshot": first if count else None,
        "last_snapshot": first + (count - 1) * config.interval if count else None,
        "interval": config.interval,
        "snapshots": count,
        "averaged_steps": reach,
        "averaged_share_of_the_run": reach / steps if steps else None,
    }


def _seconds(job: "Job", rates: Any, masters: dict[str, int], multiplying: int) -> dict[str, Any]:
    """Of a step at full length, on average; what each method adds."""
    from ds_plugin.run import plan_costs as costs

    run, layout = job.settings, job.layout
    held = costs.FP32 * sum(masters.values())
    width = 4 if run.dtype.itemsize == 4 else 2
    averaging, warmup, completep = (
        run.plugin.weight_averaging,
        run.plugin.sequence_length_warmup,
        run.plugin.completep,
    )
    looked_at = width == 4 and (run.host.get("zero_optimization") or {}).get("stage", 0) == 0 and not job.options
    tokens = job.micro_batch * job.accumulation * run.model.seq_length // layout.context
    step = costs.step_seconds(rates, multiplying, job.batch * run.model.seq_length, layout.ranks)
    found = {
        "weight_averaging": costs.averaging_seconds(rates, held, averaging.interval, looked_at=looked_at)
        if averaging
        else 0.0,
        "sequence_length_warmup": costs.warmup_seconds(
            # Megatron-LM's loop has no such report
            rates,
            None if job.options else held if warmup.reads_variance else 0,
            warmup.report_interval,
            layout.ranks,
        )
        if warmup
        else 0.0,
        "completep": costs.multiplied_bytes(run.model, tokens, layout, width) * rates.multiply
        if completep and completep.residual == "forward"
        else 0.0,
    }
    return {
        **found,
        "all": sum(found.values()),
        "step": step,
        "share": sum(found.values()) / step,
        "rates": asdict(rates),
    }


# -- text ------------------------------------------------------------------------------------------------------------


def text(found: dict[str, Any]) -> str:
    """The plan for people."""
    from ds_plugin.weight_averaging.cost import size

    layout, batch, run, counts = found["layout"], found["batch"], found["run"], found["parameters"]
    sizes = ", ".join(f"{name} {layout[name]}" for name in ("tensor", "pipeline", "context", "data"))
    lines = [
        f"{found['recipe']} on {layout['ranks']} ranks of {found['host']}, {layout['per_node']} a node: {sizes}",
        f"model       {counts['all']:,} parameters; {counts['fp32 masters of a rank']:,} fp32 masters on a rank",
        f"batch       {batch['samples']:,} samples, {batch['tokens']:,} tokens: {layout['data']} x "
        f"{batch['micro_batch']} x {batch['micro_batches']} micro-batch(es)",
        f"run         {run['steps']:,} steps; {run['tokens_read']:,} tokens read, {run['tokens_trained']:,} trained, "
        f"{run['tokens_discarded']:,} discarded, {run['tokens_carried']:,} carried at the end",
    ]
    if found["lr_warmup_ends"] is not None:
        lines.append(f"lr          at its peak from step {found['lr_warmup_ends']:,} on")
    lines += ["", "length  from step  from token (trained, all ranks)"]
    lines += [f"{row['length']:>6}  {row['from_step']:>9,}  {row['from_token']:>20,}" for row in found["lengths"]]
    off = [f"CompleteP   off: learning rate {found['lr']} for every parameter"]
    lines += ["", *(off if found["completep"] is None else found["completep"]["table"]), ""]
    averaging = found["weight_averaging"]
    if averaging is None:
        lines.append("averaging   off")
    else:
        files = f" and {size(averaging['file_bytes'])} of files" if averaging["file_bytes"] else ""
        rounded = ""
        if averaging["host_bytes"] + averaging["file_bytes"] != averaging["host_bytes_before_rounding"]:
            rounded = f" ({size(averaging['host_bytes_before_rounding'])} before pinning rounds up)"
        lines += [
            f"averaging   {size(averaging['host_bytes'])} of host memory{files} on a rank{rounded}, "
            f"{size(averaging['node_host_bytes'])} on a node",
            f"            {size(averaging['snapshot_bytes'])} copied for a snapshot",
            _when(averaging, found["lr_warmup_ends"]),
        ]
    seconds = found["seconds"]
    lines += ["", f"expected seconds of a full-length step ({seconds['rates']['measured']}):"]
    for name in ("weight_averaging", "sequence_length_warmup", "completep", "all"):
        lines.append(f"  {name:<23} {seconds[name]:.3g}")
    lines.append(
        f"  the step itself         {seconds['step']:.3g}, of which the methods are {100 * seconds['share']:.2g} %"
    )
    return "\n".join(lines)


def _when(averaging: dict[str, Any], risen: int | None) -> str:
    if not averaging["snapshots"]:
        return "            no snapshot in this run: it ends before the first"
    said = (
        f"            {averaging['snapshots']:,} snapshots, from step {averaging['first_snapshot']:,} every "
        f"{averaging['interval']:,} to step {averaging['last_snapshot']:,}; an average is of "
        f"{averaging['averaged_steps']:,} steps, {100 * averaging['averaged_share_of_the_run']:.2g} % of the run"
    )
    if risen is not None and averaging["first_snapshot"] < risen:
        said += f"\n            note: the first is taken before the learning rate is at its peak, at step {risen:,}"
    return said


# -- the command -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``python -m ds_plugin plan``."""
    add = parser.add_argument
    add("--config", "--deepspeed_config", dest="config", required=True, metavar="FILE", help="a recipe, as in configs/")
    add("--world-size", type=int, required=True, metavar="N", help="ranks, all nodes together")
    add("--ranks-per-node", type=int, default=8, metavar="N")
    add("--vocab-size", type=int, metavar="N", help="where the recipe's tokenizer is not at hand")
    add("--device", choices=("gpu", "cpu"), default="gpu", help="what the ranks train on (default gpu)")
    add("--link", type=float, default=25e9, help="bytes per second between a GPU and its host (default 25e9)")
    add("--bandwidth", type=float, default=2e12, help="bytes per second of a GPU's own memory (default 2e12)")
    add("--flops", type=float, default=400e12, help="operations per second of a GPU, as achieved (default 400e12)")
    add("--json", type=Path, metavar="FILE", help="write the plan here, too")
    add("--arguments", action="store_true", help="print a Megatron-LM recipe's command line instead")


def command(args: argparse.Namespace) -> int:
    """Print the plan; 2 with one message when it cannot be made."""
    from ds_plugin.run import startup

    startup.quiet()
    from ds_plugin.atomic import atomic_write
    from ds_plugin.run import plan_inputs

    try:
        for name in ("link", "bandwidth", "flops"):
            if not getattr(args, name) > 0:
                raise ConfigError(f"--{name}: {getattr(args, name)} is not a rate; write a number above 0")
        job = plan_inputs.read_job(
            args.config, args.world_size, per_node=args.ranks_per_node, vocab_size=args.vocab_size
        )
        if args.arguments:
            if not job.options:
                raise ConfigError(f'--arguments: {args.config} has no "megatron" section; it is a recipe for DeepSpeed')
            print(" ".join(plan_inputs.arguments(job.options)))
            return 0
        found = make(job, device=args.device, link=args.link, bandwidth=args.bandwidth, flops=args.flops)
        if args.json is not None:
            written = json.dumps(found, indent=1) + "\n"
            atomic_write(args.json, lambda path: path.write_text(written, encoding="utf-8"))
    except PluginError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: --json {str(args.json)!r} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    print(text(found))
    return 0
