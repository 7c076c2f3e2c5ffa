"""Wrong settings by the hundred: each is refused by a `ConfigError`, or is one of those that may be accepted.

What may be accepted is a list (`ACCEPTED`), so that a value that nobody looks at any more fails here. No case may take
two seconds of the processor, or memory beyond what is there already.
"""

import contextlib
import copy
import json
import math
import random
import resource
import signal
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import ds_plugin
from ds_plugin.core.errors import ConfigError
from ds_plugin.deepspeed_engine import json_check
from ds_plugin.deepspeed_engine.json_check import KNOWN
from ds_plugin.plan import inputs, plan
from ds_plugin.plan.costs import RATES

ROOT = Path(__file__).parents[2]
#: file -> ranks, vocabulary; the first three are short and planned in full
RECIPES = {
    "quickstart": (2, 256),
    "gpt-tiny_all_megatron-2xcpu": (2, None),
    "gpt_3d_8cpu": (8, 256),
    "gpt3-125m_all_8xa100": (8, 50257),
    "gpt3-125m_warmup-averaging_8xa100": (8, 50257),
    "gpt3-1.3b_all_64xa100": (64, 50257),
    "llama-7b_all_64xh100": (64, 32000),
    "llama-7b_all_megatron-64xh100": (64, None),
}
SECONDS = 2.0
ROOM = 2 << 30  # bytes of address space that a case may take

SECTIONS = {
    "train_micro_batch_size_per_gpu": 2,
    "train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "steps_per_print": 10**9,
    "zero_optimization": {"stage": 1},
    "optimizer": {
        "type": "AdamW", "params": {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
    },
    "scheduler": {
        "type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 5, "warmup_type": "linear"},
    },
    "sequence_length_warmup": {
        "enabled": True, "start_length": 8, "end_length": 32, "schedule": "root", "root_degree": 2,
        "duration": {"steps": 9}, "multiple_of": 8, "max_distinct_lengths": 3, "report_interval": 5,
        "pacing": "adaptive", "adaptive": {"loss_ratio": 1.2, "variance_max": 0.1}, "learning_rate": {"by": "steps"},
    },
    "weight_averaging": {
        "enabled": True, "interval": 4, "window": 3, "start_step": 5, "weights": [1.0, 2.0, 3.0],
        "restart": {"loss_ratio": 1.5, "patience": 4, "moments": "reset"},
    },
    "completep": {"enabled": False, "base_width": 64, "base_depth": 2, "base_head_dim": 32, "alpha": 1.0},
}  # fmt: skip

VALUES = [
    None, True, False, 0, 1, -1, 7, 2**31, 2**62, 2**64, -(10**400), 0.5, -0.5, 1e-308, 1e308, math.nan, math.inf,
    -math.inf, "", "x", "1", "auto", "a\0b", "../..", "json:dumps", "a" * 10_000, [], [1], [[]], [-1, 2**31], {},
    {"a": 1}, [None] * 10_000,
]  # fmt: skip


class Mutation(NamedTuple):
    """One change of a config. ``path``: its keys."""

    path: tuple[Any, ...]
    kind: str
    before: Any
    after: Any

    def __str__(self):
        return f"{'.'.join(map(str, self.path))} {self.kind}: {self.before!r:.60} -> {self.after!r:.60}"


def places(value, above=()):
    """The path of everything in a config but itself."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*above, key)
        yield from places(item, (*above, key))


def mutate(config, rng):
    """A changed copy, and what was changed."""
    config = copy.deepcopy(config)
    path = rng.choice(list(places(config)))
    parent = config
    for key in path[:-1]:
        parent = parent[key]
    key, before = path[-1], parent[path[-1]]
    kinds = ["value"] * 6 + ["wrapped", "boxed", "deep", "removed"]
    kinds += ["negated", "scaled"] * 2 if type(before) in (int, float) else []
    kinds += ["misspelt", "capitals"] if isinstance(key, str) else []
    kind = rng.choice(kinds)
    if kind == "removed":
        return config, Mutation(path, kind, parent.pop(key), None)
    if kind in ("misspelt", "capitals"):
        at = rng.randrange(len(key))
        other = key.upper() if kind == "capitals" else key[:at] + key[at + 1 :]
        parent[other] = parent.pop(key)
        return config, Mutation(path, kind, key, other)
    deep = before
    for _ in range(rng.choice((101, 3_000)) if kind == "deep" else 0):
        deep = [deep]
    after = {
        "value": rng.choice(VALUES),
        "wrapped": [before],
        "boxed": {"value": before},
        "deep": deep,
        "negated": -before if type(before) in (int, float) else None,
        "scaled": before * rng.choice((1_000, 10**6)) if type(before) in (int, float) else None,
    }[kind]
    parent[key] = after
    return config, Mutation(path, kind, None if kind == "deep" else before, None if kind == "deep" else after)


def is_number(value):
    return type(value) in (int, float)


#: settings that need not be there
OPTIONAL = {
    "enabled", "start_length", "multiple_of", "mode", "schedule", "learning_rate", "by", "max_distinct_lengths",
    "report_interval", "adaptive", "pacing", "loss_ratio", "variance_max", "root_degree", "preflight", "variance",
    "alpha", "base_head_dim", "recipe", "residual", "window", "start_step", "restart", "patience", "moments", "weights",
    "deltas", "storage", "save_average", "sequence_length_warmup", "completep", "weight_averaging", "scheduler",
    "optimizer", "ffn_hidden_size", "position_embedding", "normalization", "activation", "bias",
    "tie_embeddings", "dropout",
    "init_std", "tensor_parallel", "pipeline_parallel", "qk_norm", "num_query_groups", "tokens", "params", "torch_adam",
    "gradient_accumulation_steps", "train_batch_size", "gradient_clipping", "steps_per_print", "zero_optimization",
    "stage", "bf16", "betas", "eps", "weight_decay", "lr", "warmup_max_lr", "warmup_num_steps", "warmup_type",
    "warmup_min_lr", "cos_min_ratio", "warmup_min_ratio", "overlap_comm", "contiguous_gradients",
    "activation_checkpointing", "partition_activations", "train_micro_batch_size_per_gpu", "total_num_steps",
}  # fmt: skip
#: settings that may be null
NULLABLE = OPTIONAL & {
    "adaptive", "variance_max", "max_distinct_lengths", "root_degree", "base_head_dim", "restart", "ffn_hidden_size",
    "num_query_groups", "tokens", "gradient_accumulation_steps", "train_batch_size", "steps_per_print", "bf16",
    "warmup_max_lr", "train_micro_batch_size_per_gpu", "zero_optimization",
}  # fmt: skip
#: reason -> whether it is one for a mutation to be accepted
ACCEPTED = {
    "a number that the field may have": lambda m: is_number(m.before) and is_number(m.after) and 0 <= m.after <= 1e15,
    "Accelerate's is infinite": lambda m: m.path[-1] == "steps_per_print" and is_number(m.after),
    "DeepSpeed counts them itself": lambda m: m.path[-1] == "total_num_steps" and is_number(m.after) and m.after >= 1,
    "a rate for each param group": lambda m: m.path[-1] == "warmup_max_lr" and m.kind == "wrapped",
    "nothing given, all has a default": lambda m: m.after == {} and m.path[-1] in ("learning_rate", "params"),
    "another flag": lambda m: isinstance(m.before, bool) and isinstance(m.after, bool) and m.kind == "value",
    "it has a default": lambda m: m.kind == "removed" and m.path[-1] in OPTIONAL,
    "null is its default": lambda m: m.kind == "value" and m.after is None and m.path[-1] in NULLABLE,
    "a warning names the nearest key": lambda m: m.kind == "misspelt" and m.path[:-1] == () and m.path[0] in KNOWN,
    "the script's own": lambda m: m.path[0] == "training" and m.path[-1] not in ("training", "steps", "tokens"),
    "Megatron-LM's parser has the last word": lambda m: m.path[0] == "megatron" and len(m.path) > 1,
}


@contextlib.contextmanager
def limits():
    """The process's memory, and for each case of `judged` its time."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, hard))
    before = signal.signal(signal.SIGPROF, _too_long)  # of the processor's time; SIGALRM is pytest-timeout's
    try:
        yield
    finally:
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class Hang(BaseException):
    """Nothing that is being tried catches it."""


def _too_long(*_):
    raise Hang


def judged(call, *args):
    """'accepted', 'refused', or what went wrong."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        call(*args)
    except ConfigError as error:
        return "refused" if str(error) and len(str(error)) < 100_000 else "refused without a word"
    except SystemExit as error:
        return "refused" if error.code == 2 else f"exit {error.code}"
    except (Exception, Hang) as error:
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "accepted"


def wrong(found):
    """Of (mutation, verdict): what is neither refused nor may be accepted."""
    bad = [f"{m}: {verdict}" for m, verdict in found if verdict not in ("accepted", "refused")]
    accepted = [m for m, verdict in found if verdict == "accepted"]
    bad += [f"{m}: accepted, for no reason in the list" for m in accepted if not any(r(m) for r in ACCEPTED.values())]
    print(Counter(verdict for _, verdict in found))
    print(Counter(next((why for why, rule in ACCEPTED.items() if rule(m)), "none") for m in accepted))
    return sorted(bad)


def planned(source, ranks, vocabulary):
    job = inputs.read_job(source, ranks, vocab_size=vocabulary)
    if job.layout.ranks == 2 or job.model.hidden_size <= 128:  # others walk over tens of thousands of steps
        plan.text(plan.make(job, RATES["gpu"]))


COUNTS = [1, pytest.param(10, marks=pytest.mark.slow)]


@pytest.mark.parametrize("times", COUNTS)
def test_recipes_through_the_reader_of_plan(times, tmp_path, record_property):
    rng, found, path = random.Random(18), [], tmp_path / "recipe.json"
    recipes = {name: json.loads((ROOT / "configs" / f"{name}.json").read_text()) for name in RECIPES}
    for name in list(RECIPES)[:2]:  # what is imported takes its time
        planned(recipes[name], *RECIPES[name])
    with limits():
        for i in range(500 * times):
            name = list(RECIPES)[i // 4 % len(RECIPES) if i % 4 == 3 else i % 3]
            config, mutation = mutate(recipes[name], rng)
            source = config
            if i % 2 and mutation.kind != "deep":  # Python's own writer gives up on those
                path.write_text(json.dumps(config))
                source = path
            found.append((mutation, judged(planned, source, *RECIPES[name])))
    assert not (bad := wrong(found)), "\n".join(bad)
    accepted = sum(verdict == "accepted" for _, verdict in found)
    assert 0.1 < accepted / len(found) < 0.5
    record_property("tried", len(found))
    record_property("allowed", accepted)


PUT_IN = (b"\xff", b"\0", b"[" * 100_000, b"9" * 5_000, b"NaN", b"1e999", b'"', b"\\ud800")


@pytest.mark.parametrize("times", COUNTS)
def test_recipes_as_damaged_text(times, tmp_path, record_property):
    """Bytes that are cut, flipped, doubled or put in: refused, or still the JSON that somebody may have meant."""
    rng, path, found = random.Random(81), tmp_path / "recipe.json", Counter()
    texts = [(ROOT / "configs" / f"{name}.json").read_bytes() for name in RECIPES]
    planned(ROOT / "configs" / "quickstart.json", *RECIPES["quickstart"])
    with limits():
        for i in range(100 * times):
            text = bytearray(texts[i % len(texts)])
            at = rng.randrange(len(text))
            if i % 4 == 0:
                del text[at:]
            elif i % 4 == 1:
                text[at] ^= 1 << rng.randrange(8)
            elif i % 4 == 2:
                text[at:at] = text[at : at + rng.randrange(1, 200)]
            else:
                text[at:at] = rng.choice(PUT_IN)
            path.write_bytes(text)
            found[judged(planned, path, *list(RECIPES.values())[i % len(texts)])] += 1
    assert found.keys() <= {"accepted", "refused"} and found["refused"] > 50 * times, found
    record_property("tried", found.total())
    record_property("allowed", found["accepted"])


def _initialized(config):
    """As a script does it: an engine of one process, and off again. Any Adam is torch's: no kernel is compiled."""
    optimizer = config.get("optimizer")
    if isinstance(optimizer, dict) and isinstance(params := optimizer.get("params", {}), dict):
        config = {**config, "optimizer": {**optimizer, "params": {**params, "torch_adam": True}}}
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
    engine = ds_plugin.initialize(model=model, config=config)[0]
    ds_plugin.detach(engine)
    engine.destroy()


def _sections_on_a_rank(count):
    rng, found = random.Random(17), []
    _initialized(SECTIONS)
    with limits():
        for i in range(count):
            config, mutation = mutate(SECTIONS, rng)
            verdict = judged(json_check.split_config, config)
            found.append((mutation, verdict))
            if verdict == "accepted":
                found.append((mutation, judged(_initialized, config)))
            elif i % 10 == 0:  # what the reader refuses, initialize refuses, too
                found.append((mutation, judged(_initialized, config).replace("accepted", "built all the same")))
    return wrong(found), len(found), sum(verdict == "accepted" for _, verdict in found)


@pytest.mark.parametrize("times", COUNTS)
def test_sections_through_split_config_and_initialize(times, workers, record_property):
    bad, tried, accepted = workers(1).run(_sections_on_a_rank, 200 * times)[0]
    assert not bad, "\n".join(bad)
    assert 0.1 < accepted / tried < 0.6
    record_property("tried", tried)
    record_property("allowed", accepted)
