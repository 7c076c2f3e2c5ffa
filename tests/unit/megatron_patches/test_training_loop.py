"""What the hooks of Megatron-LM's loop are made of, without the loop."""

import dataclasses
import inspect
import json
import re
import sys
import weakref
from types import ModuleType, SimpleNamespace

import pytest
import torch

import megatron_patches
from ds_plugin.config import PluginConfig
from ds_plugin.core.errors import CheckpointError, ConfigError, DataError, PluginError, StateError
from ds_plugin.sequence_length_warmup.config import SequenceLengthWarmupConfig
from megatron_patches.training_loop import script, state
from megatron_patches.training_loop.batches import Cut, Replay, cut
from megatron_patches.training_loop.lengths import Lengths
from megatron_patches.training_loop.loop import Loop
from megatron_patches.training_loop.options import check_options, iterations_of, layout_multiple
from megatron_patches.training_loop.preflight import leaving_no_trace

WARMUP = {"enabled": True, "start_length": 8, "end_length": 32, "duration": {"steps": 4}}


def batch(number, length=6):
    row = torch.arange(length).expand(2, -1)
    mask = torch.ones(length, length, dtype=torch.bool).triu(1).expand(2, 1, -1, -1)
    entries = {"tokens": row + 100 * number, "position_ids": row, "attention_mask": mask.clone()}
    return {**entries, "dataset_id": torch.tensor([0, 1]), "note": "kept"}


def test_a_cut_batch_is_the_first_positions_contiguous():
    found = cut(batch(1), 4)
    assert found["tokens"].tolist() == [[100, 101, 102, 103]] * 2 and found["tokens"].is_contiguous()
    assert torch.equal(found["attention_mask"][0, 0], torch.ones(4, 4, dtype=torch.bool).triu(1))
    assert found["attention_mask"].shape == (2, 1, 4, 4) and found["attention_mask"].is_contiguous()
    assert found["dataset_id"].tolist() == [0, 1] and found["note"] == "kept"
    for wrong, words in (
        ({"cu_seqlens": torch.zeros(1, 3)}, "'cu_seqlens' of shape"),
        ({"tokens": torch.zeros(2, 3)}, "tokens has 3 positions, 4"),
        ([1, 2], "list objects"),
    ):
        with pytest.raises(DataError, match=words):
            cut(wrong, 4)


def test_what_experts_summed_up_for_the_log_is_forgotten(monkeypatch):
    """By the model's own config: Megatron-LM and Bridge call the setting differently."""
    from megatron.core import rerun_state_machine
    from megatron.core.transformer.moe import moe_utils

    cleared, machine = [], SimpleNamespace(validate_result=None)
    monkeypatch.setattr(moe_utils, "clear_aux_losses_tracker", lambda: cleared.append(1))
    monkeypatch.setattr(rerun_state_machine, "get_rerun_state_machine", lambda: machine)
    for experts in (None, 8):
        options = SimpleNamespace(seq_length=8)
        with leaving_no_trace(options, {"seq_length": 32}, SimpleNamespace(timers=None, num_moe_experts=experts)):
            assert options.seq_length == 32
        assert cleared == [1] * bool(experts)


def test_a_length_is_set_in_the_container_too_and_a_loop_that_reads_elsewhere_is_found():
    args = SimpleNamespace(seq_length=32, micro_batch_size=2, global_batch_size=8)
    loop = Loop(PluginConfig.from_dict({"sequence_length_warmup": {**WARMUP, "preflight": False}}), lambda: args)
    section = loop.sections.sequence_length_warmup
    loop.lengths = Lengths(section, full=32, layout_multiple=1, batch=8)
    model, train = SimpleNamespace(seq_length=32), SimpleNamespace(micro_batch_size=3)
    loop.container = SimpleNamespace(model=model, train=train)
    with loop.step():
        assert args.seq_length == model.seq_length == 8 and loop.passes(lambda **given: given, {})(seq_length=8)
        with pytest.raises(PluginError, match="gives its passes seq_length 32, and 8 was set"):
            loop.passes(lambda **given: given, {})(seq_length=32)
        with loop.at(micro_batch_size=4):  # the container says another: it is not what the arguments say
            assert (args.micro_batch_size, train.micro_batch_size) == (4, 3)
    assert args.seq_length == model.seq_length == 32 and args.micro_batch_size == 2


def test_what_context_parallelism_splits_is_cut_before(monkeypatch):
    """Megatron-core's own split: its ranks together have the prefix, twice as many equal parts as there are ranks."""
    from megatron.core import utils

    options = SimpleNamespace(tensor_model_parallel_size=1, sequence_parallel=False, context_parallel_size=2)
    config = SequenceLengthWarmupConfig(**{**WARMUP, "multiple_of": 2})
    lengths = Lengths(config, full=32, layout_multiple=layout_multiple(options), batch=8)
    assert lengths.schedule.multiple_of == 4
    whole = {"tokens": torch.arange(64).view(2, 32), "attention_mask": None}
    known = inspect.signature(utils.get_batch_on_this_cp_rank).parameters
    how = {name: False for name in known if name == "is_hybrid_cp"}  # 0.19 asks for it, and torch for the ranks
    for owner, name in ((utils, "get_pg_size"), (torch.distributed, "get_world_size")):
        monkeypatch.setattr(owner, name, lambda group: 2)
    parts = []
    for rank in range(2):
        for owner, name in ((utils, "get_pg_rank"), (torch.distributed, "get_rank")):
            monkeypatch.setattr(owner, name, lambda group, rank=rank: rank)
        given = cut(whole, lengths.length)
        parts.append(utils.get_batch_on_this_cp_rank(given, cp_group=object(), **how)["tokens"])
    (a, d), (b, c) = (part.chunk(2, dim=1) for part in parts)  # the first and the last part, the two in between
    assert torch.equal(torch.cat([a, b, c, d], dim=1), whole["tokens"][:, : lengths.length])


def test_the_batch_that_was_looked_at_is_not_lost():
    length = 3
    source = Cut(iter([batch(1), batch(2)]), lambda: length)
    source.check_first(6)
    assert next(source)["tokens"][0].tolist() == [100, 101, 102]
    length = 2
    assert next(source)["tokens"][0].tolist() == [200, 201]
    Cut(iter([]), lambda: 3).check_first(6)  # the run has reached its end
    with pytest.raises(DataError, match="6 positions, 7"):
        Cut(iter([batch(1)]), lambda: 3).check_first(7)


def test_recorded_batches_come_again_and_the_source_goes_on():
    source = Replay(batch(n) for n in range(9))

    def numbers(count):
        return [next(source)["tokens"][0, 0].item() // 100 for _ in range(count)]

    assert numbers(2) == [0, 1]
    source.record()
    assert numbers(2) == [2, 3]
    source.replay()
    first, second = next(source), next(source)  # what they have in common is kept once
    assert first["attention_mask"] is second["attention_mask"] and first["tokens"] is not second["tokens"]
    kept = [weakref.ref(batch["tokens"]) for batch in (first, second)]
    del first, second
    source.replay()
    assert numbers(2) == [2, 3]
    source.replay()
    assert numbers(1) == [2]
    assert all(tensor() is not None for tensor in kept)
    source.forget()
    assert numbers(2) == [4, 5] and all(tensor() is None for tensor in kept)


def test_what_the_loop_writes_into_a_batch_does_not_come_again():
    """From core 0.18 on it puts the device's tensors there, and context parallelism's part of each."""
    source = Replay(batch(n) for n in range(9))

    def read():
        found = next(source)
        tokens, found["tokens"], found["labels"] = found["tokens"], found["tokens"][:, :1], None
        return tokens.shape[1]

    source.record()
    whole = [read(), read()]
    for _ in range(2):
        source.replay()
        assert [read(), read()] == whole and whole[0] > 1


def lengths(**changes):
    config = SequenceLengthWarmupConfig.model_validate({**WARMUP, **changes})
    return Lengths(config, full=32, layout_multiple=1, batch=10)


def test_lengths_and_tokens_follow_the_iterations():
    by_steps = lengths()
    seen = []
    for applied in (True, False, True, True, True):
        seen.append((by_steps.length, by_steps.trained))
        by_steps.booked(10, applied)
    # 8 + 24 * step / 4, floored to eights; the second iteration was not applied, yet it counts as one
    assert seen == [(8, 0), (16, 80), (24, 80), (32, 320), (32, 640)]
    assert "5 iterations from the first on train 1120 tokens of 1600 read" in by_steps.describe(iterations=5)


def test_a_run_by_samples_has_iterations():
    assert iterations_of(SimpleNamespace(train_iters=7, train_samples=None, global_batch_size=4)) == 7
    assert iterations_of(SimpleNamespace(train_iters=None, train_samples=30, global_batch_size=4)) == 7


def test_the_learning_rate_moves_by_whole_samples_and_loses_none():
    by_tokens = lengths()
    moved = []
    for _ in range(5):  # lengths 8, 16, 24, 32, 32
        moved.append(by_tokens.increment(3))
        by_tokens.booked(3, True)
    assert moved == [0, 2, 2, 3, 3]  # of 24, 72, 144, 240 and 336 tokens, in samples of 32
    assert sum(moved) == by_tokens.trained // 32


def test_a_state_is_of_one_schedule():
    first = lengths()
    first.booked(10, True)
    saved = json.loads(json.dumps(first.state()))
    second = lengths()
    second.load_state(saved, iteration=1, samples=10)
    assert second.state() == first.state()
    with pytest.raises(CheckpointError, match="trained with multiple_of 8, this run has 16"):
        Lengths(second.config, full=32, layout_multiple=16, batch=10).load_state(saved, iteration=1, samples=10)
    second.load_state(None, iteration=5, samples=50)
    assert (second.iterations, second.trained) == (5, 1600)


def test_layouts_cut_samples_into_equal_parts():
    for tensor, sequence, context, parts in ((4, False, 1, 1), (4, True, 1, 4), (1, False, 3, 6), (2, True, 3, 6)):
        options = SimpleNamespace(
            tensor_model_parallel_size=tensor, sequence_parallel=sequence, context_parallel_size=context
        )
        assert layout_multiple(options) == parts


def test_an_option_that_is_off_or_unknown_to_a_version_is_no_conflict():
    averaging = {"enabled": True, "interval": 2}
    recipe = {"enabled": True, "base_width": 8, "base_depth": 2}
    sections = PluginConfig.from_dict(
        {"sequence_length_warmup": WARMUP, "weight_averaging": averaging, "completep": recipe}
    )
    check_options(sections, SimpleNamespace())
    check_options(
        sections, SimpleNamespace(cuda_graph_impl="none", rampup_batch_size=None, sft=False, num_experts=None)
    )
    check_options(sections, SimpleNamespace(optimizer="adam", softmax_type="learnable", lr_warmup_init=0.0))
    for option, value, method in (
        ("enable_hyper_connections", True, "completep"),
        ("optimizer", "sgd", "completep"),
        ("lr_warmup_init", 1e-5, "completep"),
        ("use_torch_fsdp2", True, "completep"),
        ("hybrid_layer_pattern", "M*M-", "completep"),
        ("hybrid_attention_ratio", 0.5, "completep"),
        ("logits_load_dir", "teacher", "sequence_length_warmup"),
        ("dataloader_inter_document_masking", True, "sequence_length_warmup"),
        ("freeze_all_layers", True, "weight_averaging"),
    ):
        alone = dataclasses.replace(PluginConfig(), **{method: getattr(sections, method)})
        words = re.escape(f"{method}: --{option.replace('_', '-')} {value} does not go together")
        with pytest.raises(ConfigError, match=words):
            check_options(alone, SimpleNamespace(**{option: value}))


def test_the_command_line_is_the_scripts_own_but_for_one_flag(tmp_path):
    program, methods = tmp_path / "train.py", tmp_path / "methods.json"
    program.write_text("")
    methods.write_text(json.dumps({"sequence_length_warmup": WARMUP}))
    for flag in (["--ds-plugin-config", str(methods)], [f"--ds-plugin-config={methods}"]):
        given = [str(program), "--lr", "1", *flag, "--seq-length", "32"]
        found, rest, sections, verify = script.read_arguments(given)
        assert found == program and rest == ["--lr", "1", "--seq-length", "32"] and verify
        assert script.read_arguments([*given, "--ds-plugin-no-verify"])[1:] == (rest, sections, False)
        assert sections.sequence_length_warmup is not None and sections.weight_averaging is None
    for wrong, words in (
        ([str(tmp_path / "no.py")], "does not exist"),
        ([str(program)], "given 0 time"),
        ([str(program), "--ds-plugin-config"], "given 1 time"),
        ([str(program), *flag, *flag], "given 2 time"),
    ):
        with pytest.raises(ConfigError, match=words):
            script.read_arguments(wrong)


def test_what_is_wrong_is_said_in_one_line(tmp_path, capsys):
    assert script.run([str(tmp_path / "no.py")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_file_can_be_given_to_apply(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.training", None)  # which newer wheels of megatron-core have
    methods = tmp_path / "methods.json"
    methods.write_text("{}")
    megatron_patches.apply(methods)
    assert not [change for change in megatron_patches.active() if "megatron.training" in change.name]
    with pytest.raises(ConfigError, match="cannot be read"):
        megatron_patches.apply(str(tmp_path / "none.json"))
    methods.write_text(json.dumps({"sequence_length_warmup": WARMUP}))
    with pytest.raises(ConfigError, match="give the script of a Megatron-LM checkout"):
        megatron_patches.apply(methods)


@pytest.fixture
def training(monkeypatch):
    """A module of the loop's names, whose set-up ends at once."""

    def named(name):  # each its own, as names of one function would be wrapped together
        def stop(*_):
            raise LookupError(name)

        return stop

    module = ModuleType(script.TRAINING)
    options = SimpleNamespace(seq_length=32, tensor_model_parallel_size=1, sequence_parallel=False)
    options.context_parallel_size, options.train_iters, options.global_batch_size = 1, 10, 4
    vars(module).update({name: named(name) for name in script.WRAPPED}, get_args=lambda: options)
    for name in ("megatron.training", script.TRAINING):
        monkeypatch.setitem(sys.modules, name, module)
    yield module
    megatron_patches.revert()


def test_a_loop_that_is_not_megatron_lms_takes_no_step(training, monkeypatch):
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    sections = PluginConfig.from_dict({"sequence_length_warmup": WARMUP})
    megatron_patches.apply(sections)
    with pytest.raises(StateError, match=r"SGD steps, but .*setup_model_and_optimizer.*apply\(section\)"):
        optimizer.step()
    assert weight.item() == 1
    megatron_patches.revert()
    optimizer.step()
    assert weight.item() == 0
    megatron_patches.apply(sections)
    with pytest.raises(LookupError, match="setup_model_and_optimizer"):
        training.setup_model_and_optimizer()
    optimizer.step()
    assert weight.item() == -1
    megatron_patches.revert()
    for name in script.OTHER_LOOPS:
        with monkeypatch.context() as imported, pytest.raises(ConfigError, match=f"{name}.*trains by itself"):
            imported.setitem(sys.modules, name, ModuleType(name))
            megatron_patches.apply(sections)
    assert megatron_patches.active() == []


def test_state_of_checkpoints_that_megatron_has_removed_goes_too(tmp_path):
    for iteration in (10, 20, 30):
        state.folder_of(tmp_path, iteration).mkdir(parents=True)
    (tmp_path / "iter_0000020").mkdir()
    state.forget_retired(tmp_path, 30)
    assert sorted(p.name for p in (tmp_path / "ds_plugin").iterdir()) == ["iter_0000020", "iter_0000030"]
