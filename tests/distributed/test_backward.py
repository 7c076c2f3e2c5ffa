"""``loss.backward()`` beside ``engine.backward(loss)``: the same guards, the same losses noted, the same training."""

import pytest
import torch

import ds_plugin
from ds_plugin.core.errors import StateError
from tests.distributed import plain

WARMUP = {**plain.WARMUP, "pacing": "adaptive", "report_interval": 1, "preflight": False}
RESTART = {"loss_ratio": 1.05, "patience": 2}
SECTIONS = {
    "sequence_length_warmup": WARMUP,
    "weight_averaging": {**plain.AVERAGING, "interval": 1, "restart": RESTART},
}


class Output(dict):
    """As Hugging Face's: a mapping whose entries are attributes too."""

    loss = property(lambda self: self["loss"])


class Returns(plain.TinyLM):
    """The tiny model with another way to hand out its loss; ``aux_loss`` is a part of it, as a router's is."""

    def __init__(self, kind, width=13):
        super().__init__(width)
        self.kind = kind

    def forward(self, input_ids, labels):
        loss = super().forward(input_ids, labels)
        aux = loss * 2
        loss = loss + 0 * aux
        return {
            "loss": loss,
            "one of [1]": loss.reshape(1),
            "mapping": Output(aux_loss=aux, loss=loss),
            "tuple": (loss, aux, input_ids),
            "elsewhere": {"values": loss, "aux_loss": aux},
        }[self.kind]


def make(zero, kind="loss", accumulation=2, **changes):
    torch.manual_seed(7)
    config = {**plain.deepspeed_config(zero, accumulation=accumulation, **SECTIONS), **changes}
    return ds_plugin.initialize(model=Returns(kind), config=config)[0]


def loss_in(output):
    if isinstance(output, dict):
        return output["loss"] if "loss" in output else output["values"]
    return output[0] if isinstance(output, tuple) else output


def engines_own(engine, loss):
    engine.backward(loss)


def native(engine, loss):
    loss.sum().backward()


def scaled(engine, loss):
    engine.scale(loss).backward()


def train(engine, backward, steps=3):
    """Losses and everything the instruments know after every step."""
    plugin, found = ds_plugin.get_plugin(engine), []
    engine.train()
    for _ in range(steps):
        for micro in range(2):
            loss = loss_in(engine(*plain.micro_batch(2 * engine.global_steps + micro)))
            backward(engine, loss)
            engine.step()
            found.append(loss.item())
        engine.eval()
        engine(*plain.micro_batch(10**6))  # with gradients: no loss of the training
        engine.train()
        found.append((plugin.length, plugin.ledger.trained, plugin.averager.steps[:]))
    return found, plugin.warmup.monitor.state(), plugin.spikes.state()


WAYS = {
    "the model's output": ("loss", native),
    "of shape [1]": ("one of [1]", native),
    "in a mapping": ("mapping", native),
    "in a tuple": ("tuple", native),
    "scaled": ("elsewhere", scaled),
}


def _every_way(zero, names):
    expected = train(make(zero), engines_own)
    return expected, {name: train(make(zero, WAYS[name][0]), WAYS[name][1]) for name in names}


@pytest.mark.parametrize(("zero", "names"), [(1, list(WAYS)), (3, ["the model's output"])])
def test_losses_are_noted_as_engine_backward_notes_them(workers, zero, names):
    for expected, found in workers(1 if zero == 1 else 2).run(_every_way, zero, names):
        assert len(expected[2]["monitor"]["ratios"]) < RESTART["patience"] and expected[1]["loss_ratio"]
        assert found == dict.fromkeys(names, expected)


def _guards(zero):
    """What is refused, and whether training then goes on as where it was not tried."""
    said, runs = [], []
    for tried in (False, True):
        engine = make(zero)
        plugin = ds_plugin.get_plugin(engine)
        train(engine, native, 2)
        for micro in range(2):
            loss = engine(*plain.micro_batch(micro))
            if tried and micro == 0:  # its forward pass is from before the block
                with plugin.averaged_weights():
                    for backward in (engines_own, native):
                        with pytest.raises(StateError) as error:
                            backward(engine, loss)
                        said.append(str(error.value))
                    with pytest.raises(StateError):
                        native(engine, engine(*plain.micro_batch(1)))
                    assert all(p.grad is None or not p.grad.any() for p in engine.module.parameters())
                loss = engine(*plain.micro_batch(micro))
            native(engine, loss)
            if tried and micro == 0:
                with pytest.raises(StateError) as error, plugin.averaged_weights():
                    pass
                said.append(str(error.value))
            engine.step()
        engine.eval()
        runs.append([engine(*plain.micro_batch(10**6)).item(), plugin.averager.steps[:]])
        with plugin.averaged_weights():
            runs[-1].append(engine(*plain.micro_batch(10**6)).item())
    return said, runs


@pytest.mark.parametrize("zero", [1, 3])
def test_the_guards_see_it(workers, zero):
    for said, (untried, tried) in workers(2).run(_guards, zero):
        assert "engine.backward() while" in said[0] and "forward pass again" in said[1], said
        assert "within an accumulation step" in said[2]
        assert untried == tried and untried[0] != untried[2]


def _not_told(sections):
    torch.manual_seed(7)
    engine = ds_plugin.initialize(model=Returns("elsewhere"), config=plain.deepspeed_config(1, **sections))[0]
    engine.train()
    native(engine, engine(*plain.micro_batch(0))["values"])
    engine.step()


ASKED = [("sequence_length_warmup", '"adaptive"'), ("weight_averaging", "restart")]


@pytest.mark.parametrize(("section", "name"), ASKED)
def test_a_loss_that_nobody_tells_is_asked_for(workers, section, name):
    [error] = workers(1).run(_not_told, {section: SECTIONS[section]}, expect="errors")
    assert error.type == "StateError" and name in error.message, error
    assert "call engine.backward(loss), or loss.backward() on the" in error.message
