"""What the benchmarks share that train small models from scratch: a model, its data, an evaluation, sweeps, tables.

One rank in one process, on the CPU; `common.start` makes the process such a one.
"""

import argparse
import datetime
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from statistics import mean
from typing import Any

import common
import torch

import ds_plugin
from ds_plugin.cli import env
from ds_plugin.core.errors import DataError
from ds_plugin.core.files import write_text
from ds_plugin.sequence_length_warmup.config import SequenceLengthWarmupConfig
from ds_plugin.sequence_length_warmup.plan import plan
from ds_plugin.sequence_length_warmup.schedule import LengthSchedule
from ds_plugin.sweeps import processes
from ds_plugin.sweeps.records import read_records, write_records
from launch_scripts.gpt import corpus, data
from launch_scripts.gpt.optimizer import choose_optimizer, decay_groups
from megatron_patches.models import gpt

_EVALUATED_AT_ONCE = 16
TRAIN = ("python", "torch", "deepspeed", "megatron-core")  # whose versions runs that are compared have in common
# glibc gives large blocks back to the kernel at once, which was up to a third of a full-length step's time and next to
# nothing of a short one's: left alone, it would flatter the warmup.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


@dataclass(frozen=True, kw_only=True)
class Small:
    """The model, and the text it learns. ``length`` is in tokens, ``eval_samples`` a multiple of 16."""

    layers: int = 4
    width: int = 96
    heads: int = 2
    length: int = 256
    init_std: float = 0.02
    eval_samples: int
    data: str = corpus.STDLIB


def json_of(batch: int, lr: float, scheduler: dict[str, Any]) -> dict[str, Any]:
    """A run's JSON without any method: ``batch`` samples a step, AdamW at the peak rate ``lr``."""
    return {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": batch,
        "gradient_clipping": 1.0,
        "steps_per_print": 1_000_000,
        "zero_optimization": {"stage": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": lr, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
        "scheduler": scheduler,
    }


def cosine(steps: int, warmup: int) -> dict[str, Any]:
    """The scheduler of `json_of` that warms up and decays to a tenth."""
    warmed = {"warmup_num_steps": warmup, "warmup_type": "linear"}
    return {"type": "WarmupCosineLR", "params": {**warmed, "total_num_steps": steps, "cos_min_ratio": 0.1}}


def slow_rate(section: dict[str, Any], batch: int, tokens: int) -> int:
    """Steps in which a run with the length's warmup of ``section`` has trained so many tokens: as many as its learning
    rate warms up over, where it goes by tokens."""
    of_length = LengthSchedule(SequenceLengthWarmupConfig.model_validate(section))
    return plan(of_length, batch, tokens=tokens).steps


def build(config: dict[str, Any], small: Small, seed: int, cache: Path) -> tuple[Any, corpus.Corpus]:
    """The engine that trains by the JSON ``config``, and the text; ``cache`` keeps prepared data."""
    text = corpus.prepare(small.data, tokenizer=None, cache_dir=cache)
    section = ds_plugin.split_config(config)[1].completep
    model, *_ = common.small_gpt(
        small.width, small.layers, small.length, head=small.width // small.heads, vocab=text.vocab_size, seed=seed,
        section=section, init_std=small.init_std,
    )  # fmt: skip
    rest, optimizer = choose_optimizer(config)
    groups = decay_groups(model) if section is None else None  # CompleteP makes its own
    engine, *_ = ds_plugin.initialize(
        model=model, config=rest, optimizer=optimizer, model_parameters=groups, mpu=gpt.DeepSpeedMPU()
    )
    return engine, text


class Samples:
    """``count`` training samples in the order of ``seed``, and evaluation batches that are the same for every run."""

    def __init__(self, small: Small, text: corpus.Corpus, cache: Path, *, count: int, seed: int):
        prepare = partial(data.build_datasets, text, sequence_length=small.length, cache_dir=cache)
        self._training, _ = prepare(train_samples=count, valid_samples=small.eval_samples, seed=seed)
        _, validation = prepare(train_samples=count, valid_samples=small.eval_samples, seed=1234)
        assert validation is not None
        read = data.batches(validation, start_sample=0, micro_batch=_EVALUATED_AT_ONCE, dp_rank=0, dp_size=1)
        self.evaluation = list(islice(read, small.eval_samples // _EVALUATED_AT_ONCE))

    def batches(self, size: int, first: int = 0) -> Iterator[Any]:
        """Training batches of ``size`` samples, from the one numbered ``first`` on."""
        return data.batches(self._training, start_sample=first * size, micro_batch=size, dp_rank=0, dp_size=1)


def loss_of(engine: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean loss over the batch, in nats per token."""
    return engine(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]).mean()


@torch.no_grad()
def evaluate(engine: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    """Mean loss over the batches. The engine trains on."""
    engine.eval()
    found = mean(loss_of(engine, batch).item() for batch in batches)
    engine.train()
    return found


Curve = Sequence[tuple[float, float]]


def parser(doc: str | None, **numbers: int) -> argparse.ArgumentParser:
    """Of a benchmark that sweeps; ``numbers`` as `common.parser` takes them."""
    made = common.parser(doc, **numbers)
    made.add_argument("--out", type=Path, required=True, help="folder for the tables and the figure")
    made.add_argument("--cache", type=Path, required=True, help="folder of prepared data")
    return made


def numbers(kind: type) -> Any:
    """Of an option: numbers with commas between."""
    return lambda text: [kind(part) for part in text.split(",")]


@dataclass(frozen=True, order=True)
class Setting:
    """What tells one run from another: a sweep derives one of its own, and from that its rows, with more fields."""

    @property
    def setting(self) -> Any:
        """Which run a row is of: what its class's first ancestor with fields holds."""
        kind = [base for base in type(self).__mro__ if issubclass(base, Setting)][-2]
        return kind(*astuple(self)[: len(fields(kind))])


class Sweep:
    """The runs in a folder; trains those that are missing.

    ``files``: kinds of rows and their files; a run is there when it has a row of the last kind. ``train``: from a
    setting to its rows of all kinds. ``workers``: so many processes; 0: this one. ``settings``: what all runs share; a
    folder of others, or of other versions of what trains, raises DataError.
    """

    def __init__(
        self, out: Path, files: Mapping[type, str], train: Callable[[Any], list[Any]], workers: int = 0, *,
        settings: Mapping[str, Any],
    ):  # fmt: skip
        self.out, self.files, self.train_one, self.workers = out, files, train, workers
        out.mkdir(parents=True, exist_ok=True)
        self._agree(settings)
        *_, (self._last, last) = files.items()
        there = (out / last).is_file()
        self.rows: dict[type, list[Any]] = {
            kind: read_records(kind, out / name) if there else [] for kind, name in files.items()
        }

    def _agree(self, settings: Mapping[str, Any]) -> None:
        versions = env.versions()
        here = {"settings": json.loads(json.dumps(settings)), "versions": {name: versions.get(name) for name in TRAIN}}
        path = self.out / "sweep.json"
        there = json.loads(path.read_text()) if path.exists() else {} if any(self.out.glob("*.csv")) else here
        for kind, values in here.items():
            for name, value in values.items():
                if (found := there.get(kind, {}).get(name)) != value:
                    what = f"{self.out}: its runs are of {name} {found!r}, these would be of {value!r}"
                    raise DataError(f"{what}; give another --out")
        if not path.exists():
            write_text(path, json.dumps({"date": datetime.date.today().isoformat(), **here}, indent=1) + "\n")

    def train(self, settings: Iterable[Any]) -> None:
        """Train the settings that are missing, in the order given; one line of progress for each."""
        known = {row.setting for row in self.rows[self._last]}
        missing = [setting for setting in dict.fromkeys(settings) if setting not in known]
        ended = ((setting, self.train_one(setting)) for setting in missing)
        if missing and self.workers:
            ended = processes.results(self.train_one, missing, self.workers, common.start)  # type: ignore[assignment]
        for number, (setting, rows) in enumerate(ended, start=1):
            self.keep(rows)
            print(f"[{number}/{len(missing)}] {setting}: {rows[-1]}", flush=True)

    def widen(
        self, rates: Iterable[float], of: Callable[[float], Iterable[Any]], best: Callable[[], Iterable[float]]
    ) -> None:
        """Train the settings ``of`` each rate; then of a rate 2x beyond an edge, as long as a ``best`` one is there."""
        wider, trained = set(rates), set[float]()
        while wider > trained:
            self.train(setting for rate in sorted(wider - trained) for setting in of(rate))
            trained, found = wider, set(best())
            wider = trained | {edge * by for edge, by in ((min(trained), 0.5), (max(trained), 2.0)) if edge in found}

    def keep(self, rows: Sequence[Any]) -> None:
        """Add a run's rows to the files. What an interrupted call has left of it goes."""
        for kind, name in self.files.items():
            others = [row for row in self.rows[kind] if row.setting != rows[0].setting]
            mine = [row for row in rows if type(row) is kind]
            self.rows[kind] = sorted([*others, *mine], key=astuple)
            write_records(kind, self.rows[kind], self.out / name)


def table(heads: Sequence[str], rows: Iterable[Any], key: Callable[[Any], Any], cells: Callable[..., Any]) -> list[str]:
    """Markdown: for each key of the rows a line of ``cells(key, those rows)``."""
    return common.markdown(heads, [cells(of, found) for of, found in grouped(rows, key)])


def grouped(rows: Iterable[Any], key: Callable[[Any], Any]) -> list[tuple[Any, list[Any]]]:
    """The rows by key, in the keys' order; those of a key stay in their own."""
    return [(found, list(of_it)) for found, of_it in groupby(sorted(rows, key=key), key)]


def show(axis: Any, name: str, curves: Sequence[Curve], colour: str, **style: Any) -> None:
    """Draw the seeds' ``curves`` as one, named at its end: their mean where all have a point, and their range."""
    by_place = grouped([point for curve in curves for point in curve], lambda point: point[0])
    places = {at: [loss for _, loss in points] for at, points in by_place if len(points) == len(curves)}
    at, losses = list(places), list(places.values())
    means = [mean(of) for of in losses]
    axis.plot(at, means, **{"color": colour, "linewidth": 1.8, **style})
    axis.fill_between(at, list(map(min, losses)), list(map(max, losses)), color=colour, alpha=0.15, linewidth=0)
    axis.annotate(f" {name}", (at[-1], means[-1]), color=colour, fontsize=9, va="center", annotation_clip=False)


def reached(curve: Curve, target: float) -> float:
    """Where a curve of (where, loss) first is at ``target``, linear between its points; infinite if it never is."""
    previous: tuple[float, float] | None = None
    for at, loss in curve:
        if loss <= target:
            if previous is None:
                return at
            share = (previous[1] - target) / (previous[1] - loss)
            return previous[0] + share * (at - previous[0])
        previous = (at, loss)
    return math.inf


def spread(values: Sequence[float], how: str) -> str:
    """Mean and range of those that are finite, and how many are not."""
    there = [value for value in values if math.isfinite(value)]
    if not there:
        return "never"
    missed = f", {len(values) - len(there)} never" if len(there) < len(values) else ""
    return f"{mean(there):{how}} ({min(there):{how}} to {max(there):{how}}{missed})"
