"""The methods in a loop of Accelerate's: against the same engine made by hand, and resumed."""

import json

import pytest
import torch

import ds_plugin
from ds_plugin import huggingface
from ds_plugin.deepspeed_engine import attach
from tests.harness import slow
from tests.hugging_face import MICRO, SECTIONS, build, collate, let_through, samples

STEPS, ACCUMULATION = 6, 2
BATCHES = STEPS * ACCUMULATION


def config_of(stage):
    return {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 3e-3, "warmup_num_steps": 3}},
        **SECTIONS,
    }


def _loader():
    return torch.utils.data.DataLoader(samples(2 * BATCHES * MICRO), batch_size=MICRO, collate_fn=collate)


def _prepared(folder, stage):
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import DummyOptim, DummyScheduler

    let_through()
    path = folder / f"config_{torch.distributed.get_rank()}.json"
    path.write_text(json.dumps(config_of(stage)))
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=str(path)))
    model = build()
    optimizer = DummyOptim(model.parameters())
    return accelerator, accelerator.prepare(model, optimizer, _loader(), DummyScheduler(optimizer))


def _micro_step(accelerator, model, optimizer, batch):
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def _state(engine):
    plugin = attach.get_plugin(engine)
    with plugin.averaged_weights(), torch.no_grad():
        averaged = engine.module(**collate(samples(4, 9))).loss.item()
    return plugin.ledger, list(plugin.averager.steps), averaged


def _run(folder, stage):
    huggingface.enable()
    torch.manual_seed(0)
    accelerator, (model, optimizer, loader, _) = _prepared(folder, stage)
    whole, halves = [], BATCHES // 2
    for i, batch in enumerate(loader):
        if i == halves:
            accelerator.save_state(str(folder / "state"))
        if i < BATCHES:
            whole.append(_micro_step(accelerator, model, optimizer, batch))
    end = _state(model)

    accelerator, (model, optimizer, loader, _) = _prepared(folder, stage)
    accelerator.load_state(str(folder / "state"))
    resumed = []
    for batch in accelerator.skip_first_batches(loader, halves):
        if len(resumed) < BATCHES - halves:
            resumed.append(_micro_step(accelerator, model, optimizer, batch))
    again = _state(model)

    huggingface.disable()
    sections = {**SECTIONS, "sequence_length_warmup": {**SECTIONS["sequence_length_warmup"], "end_length": 32}}
    engine = ds_plugin.initialize(model=build(), config={**config_of(stage), **sections})[0]
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    by_hand = []
    for batch in list(_loader())[rank : BATCHES * world : world]:
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        by_hand.append(loss.item())
    return {"whole": whole, "end": end, "resumed": resumed, "again": again, "by_hand": by_hand, "hand": _state(engine)}


def _stages(folder, stages):
    found = {}
    for stage in stages:
        (folder / str(stage)).mkdir(exist_ok=True)
        found[stage] = _run(folder / str(stage), stage)
    return found


@pytest.fixture(scope="module")
def trained(workers, tmp_path_factory):
    found = {}

    def of(stage):
        if stage not in found:
            stages = [2] if stage == 2 else [1, 3]
            found.update(workers(2).run(_stages, tmp_path_factory.mktemp("accelerate"), stages, timeout=200)[0])
        return found[stage]

    return of


@pytest.mark.parametrize("stage", [2, slow(1), slow(3)])
def test_a_loop_is_bitwise_the_engine_made_by_hand_and_resumes(trained, stage):
    found = trained(stage)
    assert len(found["whole"]) == BATCHES and found["whole"] == found["by_hand"]
    assert found["end"] == found["hand"] and found["end"][1] == [2, 4, 6]
    assert found["resumed"] == found["whole"][BATCHES // 2 :]
    assert found["again"] == found["end"]
    assert found["end"][0].trained < found["end"][0].read
