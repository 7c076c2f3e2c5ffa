"""Backward passes through a DeepSpeed engine, however they are started: each is seen, and its loss noted.

``engine.backward(loss)`` and, since DeepSpeed 0.19 under ZeRO, ``loss.backward()`` both begin in one private method,
which a hook on the engine's outputs calls before any gradient of the module. It is told no loss: that comes with
``engine.backward(loss)`` and ``engine.scale(loss)``, or is the one that the model returned. With
``scale_wrt_gas=False`` a loss is its micro-batch's part of the step's, and counts times their number; where that is not
known, the model's own does. (The outputs of ``engine.module(...)`` have no hooks: their loss is seen in
``engine.backward`` alone.)"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ds_plugin.core.patch import replaced
from ds_plugin.deepspeed_engine import compat


class BackwardPasses:
    """Of one engine whose step is forward, backward and step of the user's loop."""

    def __init__(self, engine: Any, refuse: Callable[[str], None], record: Callable[[Any], None] | None):
        """``refuse(what)`` raises when no gradient may change now; ``record(loss)`` notes a micro-batch's loss, which
        stays on the device; None: nobody asks for losses. Raises StateError: this DeepSpeed lacks a name."""
        compat.need(engine, compat.BACKWARD_PROLOGUE, compat.SCALE)
        self.engine, self._refuse, self._record = engine, refuse, record
        self.open = False  # a micro-batch has been accumulated that no step has used yet
        self._told = False  # the loss, by engine.backward() or engine.scale() since the last forward pass
        self.micro_batches: int | None = None  # of the step that is open, where the training loop says so
        self._passed = False  # a backward pass went through a loss that the model returned

    def install(self, undo: contextlib.ExitStack) -> None:
        """Stand in for the engine's methods; ``undo`` gives them back."""
        ours = {"backward": self.backward, compat.SCALE: self.scale, compat.BACKWARD_PROLOGUE: self._begin}
        self._backward, self._scale, self._prologue = (getattr(self.engine, name) for name in ours)
        for name, method in ours.items():
            undo.enter_context(replaced(self.engine, name, method))
        if self._record is not None:
            undo.callback(self.engine.register_forward_hook(self._after_forward).remove)

    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> Any:
        """As the engine's."""
        self._refuse("engine.backward()")
        whole = args[1] if len(args) > 1 else kwargs.get("scale_wrt_gas", True)
        if whole:
            self._tell(loss)
        elif self.micro_batches is not None:
            self._tell(loss.detach() * self.micro_batches)
        self.open, self._passed = True, False
        result = self._backward(loss, *args, **kwargs)
        if not whole and self.micro_batches is None and not self._passed:
            self._tell(loss)  # the model's own was not among it: better than none
        return result

    def scale(self, loss: Any) -> Any:
        """As the engine's: what fp16 calls for before ``loss.backward()``."""
        scaled = self._scale(loss)
        self._tell(loss)
        return scaled

    def _tell(self, loss: Any) -> None:
        self._told = True
        if self._record is not None:
            self._record(loss)

    def _begin(self) -> None:
        self._refuse("a backward pass (run its forward pass again)")
        self._prologue()
        self.open = True

    def _after_forward(self, engine: Any, args: Any, output: Any) -> None:
        self._told = False
        if (loss := loss_of(output)) is None:
            return
        untold = [loss.detach()]  # without the graph, which the hook would keep alive

        def note(gradient: torch.Tensor) -> None:
            self._passed = True
            if untold and not self._told and self._record is not None:
                self._record(untold[0])
            untold.clear()

        loss.register_hook(note)


def loss_of(output: Any) -> torch.Tensor | None:
    """The loss among what a model returns: the output itself, its ``loss``, or its first part, if that is one number
    with a gradient. None: it cannot be told."""
    if isinstance(output, Mapping):
        output = output.get("loss")
    elif isinstance(output, (tuple, list)):
        output = output[0] if output else None
    return output if torch.is_tensor(output) and output.numel() == 1 and output.grad_fn is not None else None
