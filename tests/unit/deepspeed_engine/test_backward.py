"""Which losses are noted, and what a refusal comes before, on a stand-in for the engine."""

import contextlib
import gc
import weakref

import pytest
import torch

from ds_plugin.core.errors import StateError
from ds_plugin.deepspeed_engine.backward import BackwardPasses


class Engine(torch.nn.Module):
    """What `BackwardPasses` asks of DeepSpeed's engine, which hooks its prologue to its outputs."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([2.0, 3.0]))
        self.begun = 0

    def forward(self, scale=1.0, shape=lambda loss, weight: loss):
        loss = scale * self.weight.sum()
        if loss.requires_grad:
            loss.register_hook(lambda gradient: self._backward_prologue())
        return shape(loss, self.weight)

    def backward(self, loss, retain_graph=False, scale_wrt_gas=True):
        loss.backward(retain_graph=retain_graph)

    def scale(self, loss):
        return loss * 8

    def _backward_prologue(self):
        self.begun += 1


@pytest.fixture
def watched():
    engine, noted = Engine(), []
    passes = BackwardPasses(engine, lambda what: None, lambda loss: noted.append(loss.item()))
    with contextlib.ExitStack() as undo:
        passes.install(undo)
        yield engine, noted, passes


def test_each_micro_batch_is_noted_once_and_unscaled(watched):
    engine, noted, passes = watched
    loss = engine(1.0)
    loss.backward(retain_graph=True)
    loss.backward()  # 5, once
    engine.backward(engine(2.0))  # 10
    engine.scale(engine(3.0)).backward()  # 15, not 120
    (engine(4.0) + engine(5.0)).backward()  # 20 and 25, in the order of autograd
    assert noted[:3] == [5.0, 10.0, 15.0] and sorted(noted[3:]) == [20.0, 25.0]
    assert engine.begun == 6 and passes.open


def test_a_loss_that_was_divided_by_its_micro_batches_is_noted_as_the_model_returned_it(watched):
    engine, noted, _ = watched
    for micro_batches in (4, 4, 1):  # in an epoch's last accumulation step, one
        engine.backward(engine(2.0) / micro_batches, scale_wrt_gas=False)
    engine.backward(engine(2.0) / 4, False, False)
    assert noted == [10.0] * 4
    loss = engine(1.0, lambda loss, weight: {"logits": weight * 3})["logits"].sum() / 5  # computed by the loop: 3
    engine.backward(loss, True, scale_wrt_gas=False)
    assert noted[4:] == [3.0]


def test_what_is_no_loss_is_not_noted(watched):
    engine, noted, passes = watched
    engine(1.0)
    with torch.no_grad():
        engine(2.0)
    assert engine.begun == 0 and not passes.open
    engine(1.0, lambda loss, weight: loss * torch.ones(2, 3)).sum().backward()
    engine(1.0, lambda loss, weight: {"aux_loss": loss})["aux_loss"].backward()
    engine(1.0, lambda loss, weight: (weight * loss, loss))[1].backward()
    engine(1.0, lambda loss, weight: ()), engine(1.0, lambda loss, weight: None)
    assert noted == [] and passes.open


def test_a_loss_goes_with_its_graph(watched):
    engine, _, _ = watched
    gc.disable()
    try:
        loss = engine(1.0)
        seen = weakref.ref(loss)
        del loss
        assert seen() is None
    finally:
        gc.enable()


def test_a_refusal_comes_before_any_gradient_and_all_is_given_back():
    engine = Engine()
    before = dict(vars(engine)), dict(engine._forward_hooks)

    def refuse(what):
        raise StateError(what)

    with contextlib.ExitStack() as undo:
        passes = BackwardPasses(engine, refuse, print)
        passes.install(undo)
        for backward in (lambda loss: loss.backward(), engine.backward):
            with pytest.raises(StateError, match="backward"):
                backward(engine(1.0))
        assert engine.weight.grad is None and engine.begun == 0 and not passes.open
    assert (dict(vars(engine)), dict(engine._forward_hooks)) == before


def test_an_engine_without_the_method_is_refused():
    with pytest.raises(StateError, match="_backward_prologue"):
        BackwardPasses(torch.nn.Module(), print, print)
