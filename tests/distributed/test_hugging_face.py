"""The methods in Hugging Face's Trainer: against a Trainer that is given the same batches, cut by hand."""

import math

import pytest

from ds_plugin import huggingface
from ds_plugin.deepspeed_engine import attach
from tests.harness import slow
from tests.hugging_face import (
    LENGTHS,
    MODELS,
    SECTIONS,
    STEPS,
    CollateByHand,
    config_of,
    trainer_of,
)


def history(trainer, *names, of="loss"):
    """``(step, values)`` of each training log (or evaluation, of="eval_loss")."""
    return [(log["step"], *(log.get(name) for name in names)) for log in trainer.state.log_history if of in log]


def _trained(folder, stage, kind):
    """Everything of one stage and model, in one process."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    huggingface.disable()
    short = {"max_steps": 3, "eval_strategy": "no"}
    plain = trainer_of(folder / "plain", config_of(stage), kind=kind, **short)
    plain.train()
    by_hand = trainer_of(folder / "by_hand", config_of(stage), CollateByHand(), kind=kind)
    by_hand.train()

    huggingface.enable()
    off = trainer_of(folder / "off", config_of(stage), kind=kind, **short)
    off.train()
    saves = {"save_strategy": "steps", "save_steps": 5}
    whole = trainer_of(folder / "run", config_of(stage, **SECTIONS), kind=kind, **saves)
    whole.train()
    runs = whole.state.log_history.copy()
    whole.save_model(str(folder / "final"))
    evaluated = whole.evaluate()
    whole.state.log_history = runs
    plugin = attach.get_plugin(whole.deepspeed)
    kept = {"ledger": plugin.ledger, "snapshots": list(plugin.averager.steps), "length": plugin.trained_length}

    resumed = trainer_of(folder / "run", config_of(stage, **SECTIONS), kind=kind)
    resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-5"))
    plugin = attach.get_plugin(resumed.deepspeed)
    again = {"ledger": plugin.ledger, "snapshots": list(plugin.averager.steps), "length": plugin.trained_length}
    unset_hf_deepspeed_config()  # or ZeRO 3 would divide what is loaded
    published = AutoModelForCausalLM.from_pretrained(folder / "final" / "averaged", dtype="auto")
    # the sections are there, and nothing is trained: they are left out
    loaded = trainer_of(folder / "loaded", config_of(3, **SECTIONS), model=published).evaluate()["eval_loss"]
    numbers = ("loss", "grad_norm", "learning_rate")
    extra = ("length", "tokens_trained", "tokens_read", "loss_ratio")
    evals = ("eval_loss", "eval_averaged_loss")
    return {
        "plain": history(plain, *numbers),
        "off": history(off, *numbers),
        "by_hand": history(by_hand, *numbers),
        "whole": history(whole, *numbers),
        "extra": history(whole, *extra),
        "resumed": history(resumed, *numbers, *extra),
        "uninterrupted": history(whole, *numbers, *extra),
        "evals": history(whole, *evals, of="eval_loss"),
        "evals_plain": history(by_hand, "eval_loss", of="eval_loss"),
        "evals_resumed": history(resumed, *evals, of="eval_loss"),
        "evaluated": [evaluated[name] for name in evals],
        "loaded": loaded,
        "kept": kept,
        "again": again,
    }


def _all(folder, cases):
    return {case: _trained(folder / f"{case[0]}_{case[1]}", *case) for case in cases}


CASES = [(1, MODELS[0]), (3, MODELS[0])]
SLOW = [(2, MODELS[0]), (0, MODELS[0]), *((stage, MODELS[1]) for stage in (1, 2, 3))]


@pytest.fixture(scope="module")
def trained(workers, tmp_path_factory):
    """By stage and model; made when the first test asks for them."""
    found = {}

    def of(case):
        if case not in found:
            wanted = CASES if case in CASES else SLOW
            ranks = workers(2).run(_all, tmp_path_factory.mktemp("trained"), wanted, timeout=300)
            found.update(ranks[0])
        return found[case]

    return of


every_case = pytest.mark.parametrize("case", [*CASES, *(slow(case) for case in SLOW)], ids=str)


@every_case
def test_without_sections_a_run_is_bitwise_the_plain_trainers(trained, case):
    found = trained(case)
    assert len(found["off"]) == 3
    assert found["off"] == found["plain"]


@every_case
def test_short_steps_are_those_of_batches_cut_by_hand(trained, case):
    """Loss and gradient norm, bitwise: labels are counted after the cut."""
    found = trained(case)
    assert found["whole"] == found["by_hand"] and found["whole"][0] != found["plain"][0]
    assert [length for _, length, *_ in found["extra"]] == LENGTHS
    assert found["evals_plain"] == [(step, loss) for step, loss, _ in found["evals"]]


@every_case
def test_a_resumed_run_repeats_losses_evaluations_ledger_and_window(trained, case):
    found = trained(case)
    assert found["resumed"] == found["uninterrupted"] and len(found["resumed"]) == STEPS
    assert found["evals_resumed"] == found["evals"] and len(found["evals"]) >= 2
    assert found["again"] == found["kept"]
    assert found["kept"]["snapshots"] == [4, 6, 8]
    assert found["kept"]["ledger"].read > found["kept"]["ledger"].trained > 0


@every_case
def test_the_average_is_evaluated_and_published(trained, case):
    found = trained(case)
    raw, averaged = found["evaluated"]
    assert raw != averaged
    assert found["loaded"] == pytest.approx(averaged, abs=1e-6)


@every_case
def test_the_loss_ratio_counts_a_short_accumulation_step_as_any_other(trained, case):
    """The epoch's last step has one micro-batch, whose loss is the whole of the step's."""
    ratios = [ratio for *_, ratio in trained(case)["extra"] if ratio is not None]
    assert ratios and all(0.9 < ratio < 1.1 for ratio in ratios)


@pytest.mark.parametrize(
    ("kind", "stages"), [(MODELS[0], (1, 3)), slow(MODELS[0], (0, 1, 2, 3)), slow(MODELS[1], (1, 2, 3))]
)
def test_stages_agree(trained, kind, stages):
    first, *others = [trained((stage, kind))["whole"] for stage in stages]
    assert others
    for other in others:
        for (_, loss, *_), (_, its, *_) in zip(first, other, strict=True):
            assert math.isclose(loss, its, abs_tol=1e-6)
