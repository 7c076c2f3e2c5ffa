"""What a Trainer's user may do besides: labels read outside the model, adapters, the best model, several Trainers; and
what is refused."""

import argparse
import json
import os
import sys
from types import SimpleNamespace

import deepspeed
import pytest
import torch

import ds_plugin
from ds_plugin import completep, huggingface
from ds_plugin.core import patch
from ds_plugin.core.errors import ConfigError, PluginError, StateError
from ds_plugin.deepspeed_engine import attach
from ds_plugin.huggingface import sections as methods
from tests.distributed.test_hugging_face import history
from tests.hugging_face import (
    ACCUMULATION,
    LENGTH,
    MICRO,
    SECTIONS,
    CollateByHand,
    build,
    collate,
    config_of,
    samples,
    trainer_of,
)


def unset_config():
    """Or a model that is built next is divided by ZeRO 3."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


QUIET = {"eval_strategy": "no", "max_steps": 4}


def _pair(folder, config=None, **arguments):
    """``(loss, gradient norm)`` of each step by hand, and by the section."""
    found = []
    for sections, collator in (({}, CollateByHand()), (SECTIONS, collate)):
        model = arguments.pop("models", None)
        one = trainer_of(folder / "run", config_of(2, **sections), collator, model=model, **{**QUIET, **arguments})
        one.train()
        found.append(history(one, "loss", "grad_norm"))
    return found


def _outside(folder):
    """Label smoothing pops the labels, and a loss function of the user's is given them."""
    huggingface.enable()
    smooth = _pair(folder, label_smoothing_factor=0.1)
    checkpointed = _pair(folder, gradient_checkpointing=True)
    return {"smooth": smooth, "checkpointed": checkpointed}


def test_labels_are_cut_where_a_loss_is_computed_outside_the_model(workers, tmp_path):
    found = workers(2).run(_outside, tmp_path)[0]
    for by_hand, ours in found.values():
        assert ours == by_hand and len(ours) == 4
    assert found["smooth"] != found["checkpointed"]


def _enabled_twice():
    """What is given after `enable` is called again, with and without a config; what a LightningModule is told."""
    given = {"weight_averaging": {"enabled": True, "interval": 1}}
    huggingface.enable(given)
    huggingface.enable()
    kept, said = methods.given == given, []
    sys.modules["lightning.pytorch"] = SimpleNamespace(LightningModule=torch.nn.Module)
    for other in ({"mode": "mask"}, {"mode": "carry"}, {"tokens_per_step": "constant"}):
        warmup = {"enabled": True, "start_length": 8, "end_length": 16, "duration": {"steps": 2}, **other}
        with pytest.raises(ConfigError) as refused:
            model, config = torch.nn.Linear(2, 2), {"train_batch_size": 1, "sequence_length_warmup": warmup}
            deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
        said.append(str(refused.value))
    del sys.modules["lightning.pytorch"]
    for given in ({"weight_averaging": {"enabled": False, "interval": 1}}, {"sequence_length_warmpu": warmup}):
        with pytest.raises(ConfigError) as refused:
            huggingface.enable(given)
        said.append(str(refused.value))
    huggingface.disable()
    return kept, methods.given, said


def test_a_second_enable_keeps_the_sections_and_lightning_cuts_alone(workers):
    [(kept, after, said)] = workers(1).run(_enabled_twice)
    assert kept and not after
    expected = 'mode: "mask"', 'mode: "carry"', 'tokens_per_step: "constant"', "other sections than", "did you mean"
    assert all(words in error for words, error in zip(expected, said, strict=True)), said


def _taken_back():
    """Whether the Trainer's functions are its own, and how often ours is in them, through what may go wrong."""
    import transformers

    own, found = transformers.Trainer.save_model, []

    def active():
        return [change.name.rpartition(".")[2] for change in patch.active()].count("save_model")

    huggingface.enable()
    ours, transformers.Trainer.save_model = transformers.Trainer.save_model, lambda *args: None  # another library's
    with pytest.raises(PluginError, match="save_model"):
        huggingface.disable()
    transformers.Trainer.save_model = ours  # which takes it back
    huggingface.disable()
    found.append((transformers.Trainer.save_model is own, active()))
    huggingface.enable()
    patch.revert()
    found.append((transformers.Trainer.save_model is own, active()))
    huggingface.enable()
    found.append((transformers.Trainer.save_model is own, active()))
    kept = deepspeed.initialize
    huggingface.disable()
    with patch.replaced(deepspeed, "initialize", lambda: "DeepSpeed's own"):
        assert kept() == "DeepSpeed's own"
    return [*found, (transformers.Trainer.save_model is own, active())]


def test_what_is_patched_is_taken_back_whatever_happens(workers):
    assert workers(1).run(_taken_back) == [[(True, 0), (True, 0), (False, 1), (True, 0)]]


def _two_models():
    """What "auto" becomes for each of two models under one `enable`, and whether it can be given again."""
    given = {"sequence_length_warmup": {"enabled": True, "end_length": "auto", "duration": {"share": 0.5}}}
    huggingface.enable(given)
    lengths = []
    for positions in (128, 512):
        model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=positions))
        found = methods.resolve(methods.with_given({}), model, None, 10)
        lengths.append(found["sequence_length_warmup"]["end_length"])
    huggingface.enable(given)
    huggingface.disable()
    return lengths


def test_each_model_has_a_length_of_its_own(workers):
    assert workers(1).run(_two_models) == [[128, 512]]


COMPLETEP = {"enabled": True, "base_width": 16, "base_depth": 1}


def _scaled(folder, stage, described):
    """Losses and the roles' rates of a Trainer's run and of an engine's by hand. ``described``: the optimizer stands in
    the JSON, and is not the Trainer's own AdamW."""
    config = {**config_of(stage, completep=COMPLETEP)}
    if not described:
        del config["optimizer"]
    huggingface.enable()
    given = {**QUIET, "lr_scheduler_type": "constant", "weight_decay": 0.1}
    run = trainer_of(folder / "run", config, model=build(), **given)
    run.train()
    rates = {group["role"]: group["lr"] for group in run.deepspeed.basic_optimizer.param_groups}

    huggingface.disable()
    unset_config()
    adam = {"lr": 3e-3, "weight_decay": 0.1, "torch_adam": True}
    sizes = {"train_micro_batch_size_per_gpu": MICRO, "gradient_accumulation_steps": ACCUMULATION}
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    by_hand = {**sizes, "gradient_clipping": 1.0, "zero_optimization": zero, "completep": COMPLETEP}
    torch.manual_seed(run.args.seed)
    model = build()
    torch.manual_seed(run.args.seed)
    completep.prepare_decoder(model, COMPLETEP)
    engine = ds_plugin.initialize(model=model, config={**by_hand, "optimizer": {"type": "AdamW", "params": adam}})[0]
    rank, ranks, losses = torch.distributed.get_rank(), torch.distributed.get_world_size(), []
    rows = samples()
    for step in range(4):
        first = [(step * ACCUMULATION + i) * ranks + rank for i in range(ACCUMULATION)]
        batches = [collate(rows[n * MICRO : (n + 1) * MICRO]) for n in first]
        count = torch.tensor(sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches))
        torch.distributed.all_reduce(count)
        parts = []
        for batch in batches:
            loss = engine(**batch, num_items_in_batch=count).loss * ranks
            parts.append(loss.item())
            engine.backward(loss, scale_wrt_gas=False)
            engine.step()
        mean = torch.tensor(sum(parts))
        torch.distributed.all_reduce(mean)
        losses.append((mean / ranks).item())
    own = {group["role"]: group["lr"] for group in engine.basic_optimizer.param_groups}
    return history(run, "loss"), losses, rates, own


def _scaled_both(folder):
    return _scaled(folder, 1, True), _scaled(folder, 3, False)


def test_a_decoder_is_scaled_as_it_is_prepared(workers, tmp_path):
    for trained, by_hand, rates, own in workers(2).run(_scaled_both, tmp_path)[0]:
        assert [loss for _, loss in trained] == pytest.approx(by_hand, abs=1e-6) and len(by_hand) == 4
        assert rates == own and rates["hidden"] == rates["embedding"] / 2


def _best(folder):
    """The best average's checkpoint is loaded at the end; two checkpoints are kept."""
    huggingface.enable()
    config = folder / "config.json"
    config.write_text(json.dumps(config_of(1, **SECTIONS)))
    run = trainer_of(
        folder / "run",
        str(config),
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        save_total_limit=2,
        max_steps=5,
        load_best_model_at_end=True,
        metric_for_best_model="eval_averaged_loss",
    )
    run.train()
    evals = history(run, "eval_loss", "eval_averaged_loss", of="eval_loss")
    other = trainer_of(folder / "other", config_of(1), **QUIET)  # a second one, without the methods
    other.train()
    again = run.evaluate()
    return {
        "evals": evals,
        "best": (run.state.best_global_step, run.state.best_metric),
        "kept": sorted(p.name for p in (folder / "run").iterdir()),
        "loaded": (again["eval_loss"], again["eval_averaged_loss"]),
        "other": "length" in other.state.log_history[0],
    }


def test_the_best_average_is_found_and_loaded(workers, tmp_path):
    found = workers(2).run(_best, tmp_path)[0]
    averaged = {step: loss for step, _, loss in found["evals"]}
    assert averaged[1] is None and len(averaged) == 5  # the first snapshot is of the second step
    best = min((loss, step) for step, loss in averaged.items() if loss is not None)
    assert found["best"] == best[::-1]
    assert f"checkpoint-{best[1]}" in found["kept"] and len(found["kept"]) <= 2
    raw = {step: loss for step, loss, _ in found["evals"]}
    assert found["loaded"] == (raw[best[1]], best[0])
    assert not found["other"]


def _adapter(folder):
    """LoRA: base frozen, a low rank on the attention."""
    import peft

    def model():
        settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, init_lora_weights=False)
        return peft.get_peft_model(build(), settings)

    huggingface.enable()
    by_hand, ours = [], []
    for sections, collator, found in (({}, CollateByHand(), by_hand), (SECTIONS, collate, ours)):
        run = trainer_of(folder / "run", config_of(3, **sections), collator, model=model(), **QUIET, save_steps=2)
        run.train()
        found.append(history(run, "loss", "grad_norm"))
    run.save_model(str(folder / "final"))
    evaluated = run.evaluate()["eval_averaged_loss"]
    unset_config()
    published = peft.PeftModel.from_pretrained(build(), folder / "final" / "averaged")
    loaded = trainer_of(folder / "loaded", config_of(3), model=published).evaluate()["eval_loss"]
    files = sorted(p.name for p in (folder / "final" / "averaged").iterdir())
    return {"by_hand": by_hand, "ours": ours, "evaluated": evaluated, "loaded": loaded, "files": files}


def test_an_adapter_is_averaged_and_published_as_one(workers, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed (pip install 'ds-plugin[hf]')")
    found = workers(2).run(_adapter, tmp_path)[0]
    assert found["ours"] == found["by_hand"]
    assert found["files"] == ["adapter_config.json", "adapter_model.safetensors"]
    assert found["loaded"] == pytest.approx(found["evaluated"], abs=1e-6)


def _refused(folder):
    """What is said, by case."""
    import transformers

    said = {}

    def case(name, act):
        try:
            act()
            said[name] = "nothing"
        except PluginError as error:
            said[name] = str(error)

    def train(sections, **arguments):
        trainer_of(folder / "run", config_of(1, **sections), **{**QUIET, **arguments}).train()

    warmup = {**SECTIONS["sequence_length_warmup"], "end_length": 32}
    late = trainer_of(folder / "late", config_of(1, sequence_length_warmup=warmup), **QUIET)

    class Late(transformers.TrainerCallback):
        """What an obvious callback does."""

        def on_train_begin(self, *args, **kwargs):
            huggingface.enable()

    late.add_callback(Late())
    huggingface.disable()
    case("late", late.train)
    case("carry", lambda: train({"sequence_length_warmup": {**warmup, "mode": "carry"}}))
    case("auto", lambda: train({"sequence_length_warmup": {**warmup, "start_length": "auto"}}))
    case("misspelt", lambda: train({"sequence_length_warmpu": warmup}))
    huggingface.enable({"sequence_length_warmup": warmup})
    case("twice", lambda: train(SECTIONS))
    huggingface.disable()
    huggingface.enable()
    train({}, save_strategy="steps", save_steps=2, max_steps=2)
    foreign = trainer_of(folder / "run", config_of(1, **SECTIONS), **QUIET)
    foreign.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    said["foreign"] = history(foreign, "length", "tokens_trained")
    huggingface.enable({"weight_averaging": SECTIONS["weight_averaging"]})
    del os.environ["ACCELERATE_USE_DEEPSPEED"]  # which a Trainer with DeepSpeed leaves
    case("no DeepSpeed", lambda: trainer_of(folder / "run", None, **QUIET))
    one = trainer_of(folder / "given", config_of(1), **QUIET)
    one.train()
    said["given"] = list(attach.get_plugin(one.deepspeed).averager.steps)
    shared = {**warmup, "duration": {"share": 0.5}}
    one = trainer_of(folder / "share", config_of(1, sequence_length_warmup=shared), **{**QUIET, "max_steps": -1})
    one.train()
    said["share"] = (one.state.max_steps, attach.get_plugin(one.deepspeed).warmup.config.duration.steps)
    return said


def test_what_is_refused_says_so(workers, tmp_path):
    said = workers(1).run(_refused, tmp_path)[0]
    assert "before the Trainer is made" in said["late"]
    assert 'mode: "carry" needs a loop' in said["carry"] and 'write "truncate"' in said["carry"]
    assert 'sequence_length_warmup.start_length: "auto" follows from nothing' in said["auto"]
    assert 'did you mean "sequence_length_warmup"' in said["misspelt"]
    assert "stands in the DeepSpeed JSON and in the one given to enable()" in said["twice"]
    assert said["given"] == [2, 4]
    whole, warmup = said["share"]  # of an epoch, which the Trainer puts into steps before the model is prepared
    assert warmup == round(whole / 2) > 1
    assert said["no DeepSpeed"].startswith("enable() was given weight_averaging, and this Trainer does not use")
    # of a checkpoint without the methods, the steps count as full-length ones
    full = 2 * MICRO * ACCUMULATION * LENGTH
    lengths, trained = [length for _, length, _ in said["foreign"]], [tokens for *_, tokens in said["foreign"]]
    assert lengths == [None, None, 24, 32] and trained[2] > full


def _own_call(folder):
    """What a script's own ``deepspeed.initialize`` gives its engine: groups by role, and the methods that run."""
    adam = {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1, "torch_adam": True}}
    config, scaled = {"train_batch_size": MICRO, "optimizer": adam}, {"completep": COMPLETEP}
    average = {"weight_averaging": SECTIONS["weight_averaging"]}
    for name, sections in (("plain", {}), ("scaled", scaled), ("average", average)):
        (folder / name).write_text(json.dumps({**config, **sections}))
    found = {}

    def case(name, given, *args, **kwargs):
        huggingface.disable()
        huggingface.enable(given)
        try:
            engine = deepspeed.initialize(*args, **kwargs)[0]
        except PluginError as error:
            found[name] = str(error)
            return
        try:
            averages = ds_plugin.get_plugin(engine).averager is not None
        except StateError:
            averages = False
        roles = [group["role"] for group in engine.basic_optimizer.param_groups if "role" in group]
        found[name] = (len(roles) > 1, averages)

    args = argparse.Namespace(deepspeed_config=str(folder / "scaled"), local_rank=0)
    case("args", average, args, build())
    found["args are as they were"] = args.deepspeed_config == str(folder / "scaled")
    case("by place", scaled, None, build(), None, None, None, None, None, None, None, None, str(folder / "average"))
    case("file", average, model=build(), config=folder / "plain")
    case("none", None, model=build(), config=str(folder / "plain"))
    case("twice", average, model=build(), config=str(folder / "average"))
    case("neither", average, model=build())
    model = build()
    case("dict", scaled, model=model, model_parameters=model.parameters(), config={**config, **average})
    case("reference", None, model=build(), config={**config, **average})
    return found


def test_a_scripts_own_call_gets_all_sections(workers, tmp_path):
    found = workers(1).run(_own_call, tmp_path)[0]
    assert found.pop("args are as they were")
    assert "weight_averaging: stands in the DeepSpeed JSON and in the one given to enable()" in found.pop("twice")
    assert "initialize() takes one DeepSpeed config" in found.pop("neither")
    both, average, neither = (True, True), (False, True), (False, False)
    assert [found.pop(name) for name in ("args", "by place", "dict")] == [both] * 3
    assert found == {"file": average, "none": neither, "reference": neither}


def _compiled(folder):
    """``(loss, gradient norm)`` of a run as it is, and of one whose model is compiled."""
    from torch import _dynamo

    huggingface.enable()
    found = []
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("TORCHDYNAMO_DISABLE", raising=False)
        for more in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
            one = trainer_of(folder / "run", config_of(2, **SECTIONS), **QUIET, **more)
            one.train()
            found.append(history(one, "loss", "grad_norm", "length"))
            seen = _dynamo.utils.counters["stats"]["unique_graphs"]
    return (*found, seen)


@pytest.mark.slow
def test_a_compiled_model_trains_alike(workers, tmp_path):
    plain, compiled, graphs = workers(1).run(_compiled, tmp_path)[0]
    assert compiled == plain and len(plain) == 4 and graphs > 0
    assert len({length for *_, length in plain}) > 1
