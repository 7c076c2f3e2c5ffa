"""What the plugin for Megatron-Bridge asks of a run's configuration, without Bridge."""

import functools
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from ds_plugin.config import PluginConfig
from ds_plugin.core.errors import ConfigError, PluginError
from megatron_patches import bridge
from megatron_patches.bridge.options import Options, check
from megatron_patches.bridge.plugin import Plugin
from megatron_patches.bridge.recipe import Recipe
from megatron_patches.training_loop import state
from megatron_patches.training_loop.options import set_to

WARMUP = {"enabled": True, "start_length": 8, "end_length": 32, "duration": {"steps": 4}}
SECTIONS = {
    "sequence_length_warmup": WARMUP,
    "completep": {"enabled": True, "base_width": 8, "base_depth": 1},
    "weight_averaging": {"enabled": True, "interval": 2},
}


def container(**changes):
    """A ConfigContainer's parts, as far as they are asked for; changes by dotted name."""
    parts = {name: SimpleNamespace() for name in "train optimizer ddp dist scheduler validation logger".split()}
    parts["model"] = SimpleNamespace(seq_length=32, context_parallel_size=1, init_model_with_meta_device=False)
    parts["checkpoint"] = SimpleNamespace(most_recent_k=-1, custom_manager_class=None, async_save=False)
    parts["dataset"] = SimpleNamespace(dataloader_type="single", seq_length=32)
    parts["optimizer"] = SimpleNamespace(optimizer="adam", optimizer_cuda_graph=False)
    cfg = SimpleNamespace(**parts, peft=None, inprocess_restart=None)
    for name, value in changes.items():
        *path, last = name.split(".")
        setattr(functools.reduce(getattr, path, cfg), last, value)
    return cfg


def load_weights_hf_to_megatron(model):
    return model


class LoRA:
    pass


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"dataset.dataloader_type": "batch"},
            "sequence_length_warmup: cfg.dataset.dataloader_type is 'batch': batches of",
        ),
        ({"dataset.enable_in_batch_packing": True}, "cfg.dataset.enable_in_batch_packing is True: packed samples"),
        ({"train.num_epochs": 2}, "cfg.train.num_epochs is 2"),
        ({"peft": LoRA()}, "cfg.peft is LoRA: adapters are trained"),
        ({"inprocess_restart": SimpleNamespace(enabled=True)}, "cfg.inprocess_restart.enabled is True"),
        ({"checkpoint.non_persistent_ckpt_type": "local"}, "cfg.checkpoint.non_persistent_ckpt_type is 'local'"),
        ({"dist.use_decentralized_pg": True}, "cfg.dist.use_decentralized_pg is True"),
        ({"optimizer.optimizer_cuda_graph": True}, "cfg.optimizer.optimizer_cuda_graph is True"),
        ({"checkpoint.pretrained_checkpoint": "x"}, "completep: cfg.checkpoint.pretrained_checkpoint is 'x'"),
        ({"model.init_model_with_meta_device": True}, "completep: cfg.model.init_model_with_meta_device is True"),
        (
            {"model._pre_wrap_hooks": [functools.partial(load_weights_hf_to_megatron)]},
            "completep: cfg.model has the hook load_weights_hf_to_megatron",
        ),
        ({"model.cuda_graph_impl": "local"}, "sequence_length_warmup: cfg.model.cuda_graph_impl local does not go"),
        ({"model.use_mup": True}, "completep: cfg.model.use_mup True does not go"),
        ({"ddp.use_megatron_fsdp": True}, "weight_averaging: cfg.ddp.use_megatron_fsdp True does not go"),
        ({"train.rampup_batch_size": [2, 2, 8]}, "sequence_length_warmup: cfg.train.rampup_batch_size [2, 2, 8]"),
    ],
)
def test_what_a_method_does_not_go_with_is_named_as_it_is_written(changes, said):
    sections = PluginConfig.from_dict(SECTIONS)
    check(sections, Options(container()))
    with pytest.raises(ConfigError) as raised:
        check(sections, Options(container(**changes)))
    assert said in str(raised.value)
    check(PluginConfig(), Options(container(**changes)))  # nothing is on


def test_a_setting_is_found_and_set_where_bridge_has_it():
    cfg = container(**{"train.micro_batch_size": 2, "model.transformer": SimpleNamespace(fp16=True)})
    options = Options(cfg)
    options.state = SimpleNamespace(train_state=SimpleNamespace(step=3, consumed_train_samples=24))
    assert (options.curr_iteration, options.consumed_train_samples, options.fp16) == (3, 24, True)
    assert options.save_retain_interval is None and not hasattr(options, "finetune")
    with set_to(options, seq_length=8, micro_batch_size=4, consumed_train_samples=8):
        assert (cfg.model.seq_length, cfg.dataset.seq_length, cfg.train.micro_batch_size) == (8, 32, 4)
        assert options.state.train_state.consumed_train_samples == 8
        options.state.train_state = SimpleNamespace(step=5, consumed_train_samples=40)  # Bridge replaces it
    assert (cfg.model.seq_length, cfg.train.micro_batch_size, options.consumed_train_samples) == (32, 2, 40)


EVENTS = {"on_train_start", "on_train_step_start", "on_train_step_end"}


def stand_in(monkeypatch, events=EVENTS, **lacking):
    """As much of Megatron-Bridge as is looked for, but for what is lacking: modules by their last names."""
    contents = {
        "megatron.bridge": {"__version__": "0.6.2"},
        "megatron.bridge.training": {},
        "megatron.bridge.data": {},
        "megatron.bridge.utils": {},
        "megatron.bridge.training.callbacks": {"VALID_EVENTS": events},
        "megatron.bridge.training.config": {"CheckpointConfig": SimpleNamespace(custom_manager_class=None)},
        "megatron.bridge.data.loaders": {"setup_data_iterators": print},
        "megatron.bridge.training.train": {"get_forward_backward_func": print},
        "megatron.bridge.training.eval": {"evaluate_and_print_results": print},
        "megatron.bridge.utils.instantiate_utils": {"register_allowed_target_prefix": lambda prefix: None},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update({key: value for key, value in values.items() if key != lacking.get(name.split(".")[-1])})
        monkeypatch.setitem(sys.modules, name, module)


def test_a_bridge_whose_parts_moved_is_refused_and_nothing_stays(monkeypatch):
    sections, cfg = PluginConfig.from_dict(SECTIONS), container()
    stand_in(monkeypatch, events=EVENTS - {"on_train_step_end"}, train="get_forward_backward_func")
    said = "0.6.2 has no on_train_step_end, megatron.bridge.training.train.get_forward_backward_func"
    with pytest.raises(PluginError, match=said):
        bridge.attach(cfg, sections)
    assert cfg.checkpoint.custom_manager_class is None
    stand_in(monkeypatch)
    plugin = bridge.attach(cfg, sections)
    try:
        assert plugin.on and cfg.checkpoint.custom_manager_class == "megatron_patches.bridge.checkpoints.Manager"
        with pytest.raises(PluginError, match="a plugin is attached already"):
            bridge.attach(container(), sections)
    finally:
        plugin.detach()
    with pytest.raises(ConfigError, match="custom_manager_class is 'mine.Manager'"):
        bridge.attach(container(**{"checkpoint.custom_manager_class": "mine.Manager"}), sections)


def test_another_attempt_after_a_run_that_failed(monkeypatch):
    """Before its model was built, or between the model and the optimizer."""
    stand_in(monkeypatch)
    provider = type("OptimizerConfigOverrideProvider", (), {})()
    cfg = container(**{"model.transformer_layer_spec": "theirs", "model.pre_wrap_hooks": []})
    cfg.optimizer_config_override_provider = provider
    for _ in range(2):
        plugin = bridge.attach(cfg, PluginConfig.from_dict({"completep": SECTIONS["completep"]}))
        plugin.recipe = Recipe(plugin.sections.completep, cfg)
        assert cfg.model.transformer_layer_spec != "theirs" and len(cfg.model.pre_wrap_hooks) == 1
        plugin.detach()
        assert (cfg.model.transformer_layer_spec, cfg.model.pre_wrap_hooks) == ("theirs", [])
        assert cfg.optimizer_config_override_provider is provider


def loading(root, **fields):
    given = {"load": None, "finetune": False, "ckpt_step": None, "pretrained_checkpoint": None, **fields}
    given |= {name: str(root / given[name]) for name in ("load", "pretrained_checkpoint") if given[name]}
    cfg = container(**{f"checkpoint.{name}": value for name, value in given.items()})
    return Plugin(PluginConfig.from_dict({"sequence_length_warmup": WARMUP}), lambda: Options(cfg), cfg=cfg)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"load": "iter_0000100"}, (100, False)),
        ({"load": "best"}, (100, False)),  # a link to it
        ({"load": "iter_0000100", "finetune": True}, (100, True)),
        ({"pretrained_checkpoint": "iter_0000100"}, (100, True)),
        ({"load": "nothing yet", "pretrained_checkpoint": "best"}, (100, True)),
        ({"load": "iter_0000200", "pretrained_checkpoint": "iter_0000100"}, (200, False)),
        ({"load": "nothing yet"}, None),
        ({}, None),
    ],
)
def test_an_iteration_s_own_folder_is_found(tmp_path, fields, expected):
    (tmp_path / "iter_0000100").mkdir()
    (tmp_path / "best").symlink_to(tmp_path / "iter_0000100")
    assert loading(tmp_path, **fields).to_load() == (expected and (tmp_path, *expected))


@pytest.mark.parametrize("name", ["best", "a copy"])
def test_a_run_that_goes_on_from_any_folder_looks_for_the_methods(tmp_path, monkeypatch, name):
    """Of a copy without our files the warmup knows at least that it is not the run's beginning."""
    (tmp_path / "iter_0000100").mkdir()
    (tmp_path / "best").symlink_to(tmp_path / "iter_0000100")
    (tmp_path / "a copy").mkdir()
    plugin, loaded = loading(tmp_path, load=name), []
    monkeypatch.setattr(state, "load", lambda loop, *at: loaded.append(at))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(plugin, "take_over", lambda ctx, scheduler: plugin.take([], None, scheduler))
    ctx = SimpleNamespace(state=None, model=[], optimizer=None, opt_param_scheduler=None)
    assert plugin.load(ctx, lambda ctx: (100, 0)) == (100, 0)
    assert loaded == [(tmp_path if name == "best" else tmp_path / name, 100)]


def test_without_a_section_nothing_is_attached():
    cfg = container()
    before = repr(cfg)
    assert not bridge.attach(cfg, PluginConfig()).on and repr(cfg) == before
