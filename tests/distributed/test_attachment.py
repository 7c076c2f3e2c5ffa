"""How the methods come onto an engine: what a refusal leaves behind (nothing), in which order, and on what."""

import contextlib
import gc
import logging
import resource
import signal
import threading
from types import SimpleNamespace

import deepspeed
import psutil
import pytest
import torch
import torch.distributed as dist

import ds_plugin
from ds_plugin.core.errors import ConfigError, PluginError
from tests.distributed import pipelined, plain
from tests.distributed import test_completep_deepspeed as roles
from tests.distributed.pipelined import Layout

WARMUP = {**plain.WARMUP, "preflight": False}
BOTH = {"sequence_length_warmup": WARMUP, "weight_averaging": {**plain.AVERAGING, "interval": 1}}


def both(warmup=None, averaging=None, **more):
    """Both methods with changed settings; the first would be on the engine before the second refuses."""
    sections = {
        "sequence_length_warmup": {**WARMUP, **(warmup or {})},
        "weight_averaging": {**BOTH["weight_averaging"], **(averaging or {})},
    }
    return {**sections, **more}


def broken_schedule(share, start, end):
    return 1 / 0


# -- what an engine is, down to the identity of everything it holds ---------------------------------------------------


def held(engine):
    """Attributes, hooks, settings and replaced methods of the engine, its module and its optimizers."""
    found = {"class": type(engine), "threads": threading.active_count()}
    owners = {"engine": engine, "optimizer": engine.optimizer, "basic": engine.basic_optimizer}
    owners |= {f"module {name}": module for name, module in engine.module.named_modules()}
    for owner, thing in owners.items():
        for name, value in getattr(thing, "__dict__", {}).items():
            found[owner, name] = value
            if isinstance(value, dict):
                found |= {(owner, name, key): inner for key, inner in value.items()}
            elif isinstance(value, list):
                found |= {(owner, name, at): inner for at, inner in enumerate(value)}
    for name, parameter in engine.module.named_parameters():
        found["parameter", name] = tuple((parameter._backward_hooks or {}).values())
    for at, group in enumerate(getattr(engine.basic_optimizer, "param_groups", ())):
        found |= {("group", at, key): value for key, value in group.items()}
    return found


def changed(before, after):
    return [key for key in before | after if before.get(key, held) is not after.get(key, held)]


def mapped(folder):
    with open("/proc/self/maps") as file:
        return sum(f"{folder}/" in line for line in file)


@contextlib.contextmanager
def small_files(rank):
    """On one rank the disk has no room: its files may not grow, while the others allocate theirs."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if dist.get_rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@contextlib.contextmanager
def pretending(owner, name, value):
    """A setting that cannot be had on CPU ranks."""
    before = vars(owner).get(name, held)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if before is held else setattr(owner, name, before)


@contextlib.contextmanager
def without_a_name(engine):
    """A DeepSpeed that lacks what `install` comes to last: an error when most of it is done."""
    kind = type(engine)
    engine.__class__ = type("Lacking", (kind,), {"load_checkpoint": property(lambda self: 1 / 0)})
    try:
        yield
    finally:
        engine.__class__ = kind


def refusals(engine, folder):
    """name: (sections, a context in which they are refused, what the error says)"""
    none, optimizer = contextlib.nullcontext(), engine.optimizer
    files = {"storage": "files", "storage_path": folder}
    rank = dist.get_rank()
    return {
        "no such folder": (both(averaging={**files, "storage_path": "/no/such"}), none, "storage_path"),
        "a full disk on one rank": (both(averaging=files), small_files(rank=1), "could be made"),
        "no memory": (both(), pretending(psutil, "virtual_memory", lambda: SimpleNamespace(available=1)), "window"),
        "nvme": (both(), pretending(engine, "zero_nvme_offload_optimizer", lambda: True), "'nvme'"),
        "zenflow": (both(), pretending(engine, "zenflow", True), "zenflow"),
        "no norm": (both(), pretending(optimizer, "compute_grad_norm", False), "compute_grad_norm"),
        "no optimizer": (both(), pretending(engine, "optimizer", None), "no optimizer"),
        "AutoTP": (both(averaging={"save_average": True}), pretending(engine, "autotp_size", lambda: 2), "autotp"),
        "mask": (both({"mode": "mask"}), none, "mask"),
        "no scheduler": (
            both({"learning_rate": {"by": "tokens"}}),
            pretending(engine, "lr_scheduler", None),
            "there is no scheduler",
        ),
        "not divisible": (
            both({"multiple_of": 1, "end_length": 15}),
            pretending(engine.module, "config", SimpleNamespace(**PARALLEL)),
            "15 is not divisible",
        ),
        "no such schedule": (both({"schedule": "no.such:function"}), none, "no.such"),
        "a schedule that raises": (both({"schedule": f"{__name__}:broken_schedule"}), none, "broken_schedule"),
        "ranks disagree": (both({"start_length": 4 + 4 * rank}), none, "ranks disagree"),
        "completep": (both(completep={"enabled": True, "base_width": 8, "base_depth": 1}), none, "completep"),
        "curriculum": (both(), pretending(engine, "curriculum_learning_enabled", lambda: True), "both set the length"),
        "half-way": (both({"learning_rate": {"by": "tokens"}}, files), without_a_name(engine), "division"),
    }


#: what a megatron-core model says of its layout
PARALLEL = {"tensor_model_parallel_size": 2, "context_parallel_size": 1, "sequence_parallel": True}


def _refused(folder):
    """What each refusal changed, what it said, and the training of the attach that follows them all."""
    engine = plain.make(plain.deepspeed_config(1), initialize=deepspeed.initialize)
    found = {}
    for name, (sections, context, part) in refusals(engine, folder).items():
        gc.collect()
        with context:
            before, error = held(engine), None
            try:
                ds_plugin.attach(engine, sections)
            except (PluginError, ZeroDivisionError) as caught:
                error = caught  # held on to: its traceback must not keep files and threads
            found[name] = changed(before, held(engine)), mapped(folder), error is not None and part in str(error), error
        found[name] = (*found[name][:3], str(found[name][3]))
    plugin = ds_plugin.attach(engine, BOTH)
    lengths = [plugin.length]
    losses = plain.train(engine, 4, lambda engine: lengths.append(plugin.length))
    fresh = plain.make(plain.deepspeed_config(1), initialize=deepspeed.initialize)
    ds_plugin.attach(fresh, BOTH)
    return found, lengths, losses == plain.train(fresh, 4)


def test_a_refused_attach_leaves_nothing(workers, tmp_path):
    for found, lengths, same in workers(2).run(_refused, str(tmp_path)):
        for name, (changes, files, said, message) in found.items():
            assert said, (name, message)
            assert changes == [] and files == 0, name
        assert lengths == [4, 4, 8, 8, 8] and same


def _refused_in_a_pipeline():
    engine = pipelined.make(Layout(), deepspeed.initialize, zero=1)
    found = {}
    for name, sections, kwargs in (
        ("mask", both({"mode": "mask", "end_length": pipelined.LENGTH}), {}),
        ("shorten", both(), {"shorten": lambda *_: None}),
        ("storage", both(averaging={"storage": "files", "storage_path": "/no/such"}), {}),
    ):
        before = held(engine)
        with pytest.raises(PluginError, match=name):
            ds_plugin.attach(engine, sections, **kwargs)
        found[name] = changed(before, held(engine))
    before = held(engine)
    with without_a_name(engine), pytest.raises(ZeroDivisionError):
        ds_plugin.attach(engine, BOTH)
    found["half-way"] = changed(before, held(engine))
    ds_plugin.attach(engine, BOTH)
    on = changed(before, held(engine))
    ds_plugin.detach(engine)
    return found, on, changed(before, held(engine))


def test_a_refused_attach_leaves_nothing_in_a_pipeline(workers):
    for found, on, off in workers(1).run(_refused_in_a_pipeline):
        assert found == {"mask": [], "shorten": [], "storage": [], "half-way": []}
        assert ("engine", "batch_fn") in on and ("engine", "train_batch") in on and off == []


def _refused_when_built():
    """`initialize` is refused by what only the engine can tell; the model and the optimizer are used again."""
    left_out = ("optimizer", "scheduler")
    config = {key: value for key, value in plain.deepspeed_config(1, **BOTH).items() if key not in left_out}
    tokens = {**config, "sequence_length_warmup": {**WARMUP, "learning_rate": {"by": "tokens"}}}
    losses = []
    for refused in (False, True):
        torch.manual_seed(7)
        model = plain.TinyLM()
        decayed = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() == 1]
        optimizer = torch.optim.AdamW([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], lr=0.01)
        if refused:
            groups = [(group, dict(group), list(group["params"])) for group in optimizer.param_groups]
            with pytest.raises(PluginError, match="there is no scheduler"):
                ds_plugin.initialize(model=model, optimizer=optimizer, config=tokens)
            for (group, settings, params), now in zip(groups, optimizer.param_groups, strict=True):
                assert now is group and now.keys() == settings.keys()
                assert all(a is b for a, b in zip(now["params"], params, strict=True))
                assert all(now[key] == settings[key] for key in settings if key != "params")
            assert not optimizer.state
            assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
        engine = ds_plugin.initialize(model=model, optimizer=optimizer, config=config)[0]
        losses.append(plain.train(engine, 4))
    return losses


def test_a_refused_initialize_leaves_model_and_optimizer(workers):
    for fresh, after in workers(2).run(_refused_when_built):
        assert fresh == after


def _refused_with_groups_of_roles():
    """CompleteP replaces the groups of an optimizer that is built already, before averaging is refused."""
    nowhere = {**plain.AVERAGING, "storage": "files", "storage_path": "/no/such"}
    completep, model = roles.small(), roles.model_of(roles.small())
    config = {key: value for key, value in roles.deepspeed_config(completep).items() if key != "optimizer"}
    optimizer = roles.BUILT["no decay on some"](model)
    groups = list(optimizer.param_groups)
    contents = [dict(group) for group in groups]
    with pytest.raises(PluginError, match="storage_path"):
        roles.engine_of(completep, {**config, "weight_averaging": nowhere}, model, optimizer=optimizer)
    back = all(a is b for a, b in zip(groups, optimizer.param_groups, strict=True)) and contents == groups
    again = roles.engine_of(completep, config, model, optimizer=optimizer)
    fresh = roles.model_of(roles.small())
    other = roles.engine_of(completep, config, fresh, optimizer=roles.BUILT["no decay on some"](fresh))
    return back, [group["role"] for group in optimizer.param_groups], roles.train(again, 2) == roles.train(other, 2)


def test_a_refused_initialize_gives_back_the_groups_that_completep_replaced(workers):
    assert workers(1).run(_refused_with_groups_of_roles) == [(True, list(roles.ROWS), True)]


# -- an engine that has loaded a checkpoint before the methods come onto it --------------------------------------------


class Said(logging.Handler):
    """What the plugin has logged since."""

    def __init__(self):
        super().__init__()
        self.texts = []
        logging.getLogger("ds_plugin").addHandler(self)

    def emit(self, record):
        self.texts.append(record.getMessage())


def make(kind):
    if kind == "pipeline":
        return pipelined.make(Layout(pipe=2), deepspeed.initialize, zero=1), pipelined
    return plain.make(plain.deepspeed_config(kind), initialize=deepspeed.initialize), plain


def going_on(engine, module, plugin):
    """Losses, lengths, tokens and averaged steps of the next steps."""
    rows = []
    losses = module.train(engine, 3, lambda engine: rows.append((plugin.length, plugin.ledger.trained)))
    averages = [tensor.tolist() for tensor in plugin.averager.read()]
    return losses, rows, list(plugin.averager.steps), averages


def _saved(kind, folder):
    engine, module = make(kind)
    ds_plugin.attach(engine, BOTH)
    module.train(engine, 3)
    engine.save_checkpoint(folder)
    engine.save_checkpoint(folder, tag="mine")


def _resumed(kind, folder):
    """Load after attach, attach after load, and what is refused."""
    said = Said()
    expected, module = make(kind)
    first = ds_plugin.attach(expected, BOTH)
    expected.load_checkpoint(folder)
    engine, _ = make(kind)
    engine.load_checkpoint(folder)
    before, refused = held(engine), []
    for given in (
        {"resume_from": f"{folder}/nowhere"},
        {"resume_from": folder, "tag": "other"},
        {"tag": "mine"},
    ):
        with pytest.raises(PluginError) as error:
            ds_plugin.attach(engine, BOTH, **given)
        refused.append(str(error.value))
    unchanged = changed(before, held(engine))
    fresh, _ = make(kind)
    with pytest.raises(PluginError) as error:
        ds_plugin.attach(fresh, BOTH, resume_from=folder)
    refused.append(str(error.value))
    second = ds_plugin.attach(engine, BOTH, resume_from=folder, tag="mine")
    quiet = list(said.texts)
    same = going_on(expected, module, first) == going_on(engine, module, second)
    fresh.load_checkpoint(folder)
    forgetful = ds_plugin.attach(fresh, BOTH)
    steps, batch = 3, fresh.train_batch_size() * plain.LENGTH
    counted = forgetful.ledger.trained == steps * batch and not forgetful.has_average
    return refused, unchanged, quiet, same, said.texts, counted


@pytest.mark.parametrize("kind", [0, 3, "pipeline"])
def test_attached_after_the_load_is_attached_before_it(workers, tmp_path, kind):
    workers(2).run(_saved, kind, str(tmp_path))
    for rank, (refused, unchanged, quiet, same, said, counted) in enumerate(
        workers(2).run(_resumed, kind, str(tmp_path))
    ):
        nowhere, other, alone, fresh = refused
        assert "names no latest checkpoint" in nowhere and "no checkpoint in" in other and "resume_from=" in alone
        assert "saved at step 3" in fresh and "at step 0" in fresh
        assert unchanged == [] and same and counted
        assert quiet == [] and len(said) == (1 if rank == 0 else 0)
        assert all("3 steps" in text and "full length" in text and "resume_from=FOLDER" in text for text in said)


# -- what initialize and attach are called on, and by whom -------------------------------------------------------------


def _in_place_of_deepspeeds():
    theirs = deepspeed.initialize
    expected = plain.train(plain.make(plain.deepspeed_config(1, **BOTH)), 3)
    deepspeed.initialize = ds_plugin.initialize
    found = plain.train(plain.make(plain.deepspeed_config(1, **BOTH), initialize=deepspeed.initialize), 3)
    off = plain.train(plain.make(plain.deepspeed_config(1), initialize=deepspeed.initialize), 3)
    deepspeed.initialize = theirs
    return found == expected, off == plain.train(plain.make(plain.deepspeed_config(1), initialize=theirs), 3)


def test_it_takes_the_place_of_deepspeeds_initialize(workers):
    assert workers(2).run(_in_place_of_deepspeeds) == [(True, True)] * 2


def _on_what_is_no_engine():
    model = plain.TinyLM()
    engine, optimizer, *rest = deepspeed.initialize(model=model, config=plain.deepspeed_config(1))
    messages = {}
    for name, thing in {
        "None": None,
        "module": model,
        "optimizer": torch.optim.SGD(model.parameters()),
        "wrapper": SimpleNamespace(engine=engine),
        "tuple": (engine, optimizer, *rest),
    }.items():
        for call in (lambda thing: ds_plugin.attach(thing, BOTH), ds_plugin.get_plugin, ds_plugin.detach):
            with pytest.raises(ConfigError) as error:
                call(thing)
            messages.setdefault(name, []).append(str(error.value))
    return messages


def test_what_is_no_engine_is_named(workers):
    kinds = {
        "None": "builtins.NoneType",
        "module": "plain.TinyLM",
        "optimizer": "torch.optim.sgd.SGD",
        "wrapper": "types.SimpleNamespace (its .engine is one)",
        "tuple": "builtins.tuple (the first of the tuple is one)",
    }
    [messages] = workers(1).run(_on_what_is_no_engine)
    for name, kind in kinds.items():
        assert len(messages[name]) == 3 and all(kind in message for message in messages[name]), messages[name]
