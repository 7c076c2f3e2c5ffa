"""The carry mode's order: which tokens of which samples a step trains, so that every token read is trained once.

What a step reads, its *window*, is as many full-length samples as a plain step has. A window is trained in several
steps, each taking the same next span of all its samples, never across a sample's end; what is left is carried. Several
windows are open at a time and take turns, so that consecutive steps do not see the same samples. The order follows from
the lengths asked for alone."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TokenSpan:
    """What one optimizer step trains: tokens ``offset`` to ``offset + length`` of all samples of window ``window``."""

    window: int
    offset: int
    length: int


def shifts_labels(model: torch.nn.Module) -> bool:
    """Whether a model is given its tokens as labels and shifts them itself, as transformers' causal models do: told by
    the class's name, as transformers itself chooses a model's loss; also within wrappers."""
    return any(type(module).__name__.endswith(("ForCausalLM", "LMHeadModel")) for module in model.modules())


class CarryOrder:
    """Hands out spans. ``peek`` is pure; ``advance`` makes its result the past."""

    def __init__(self, *, full: int, multiple_of: int, interleave: int):
        """``full``: length of a sample in tokens; ``interleave``: how many windows may be open at a time."""
        self.full, self.multiple_of, self.interleave = full, multiple_of, interleave
        self.load_state(None)

    def peek(self, length: int) -> TokenSpan:
        """The span of the step that comes next when the schedule asks for ``length``; it is never longer. What is left
        of a window is divided evenly: a last span of a few tokens would be a noisy step. Once the full length is
        reached, what is open is trained before anything new is read."""
        new = not self.open or (len(self.open) < self.interleave and length < self.full)
        window, offset = (self.windows_read, 0) if new else self.open[0]
        left = self.full - offset
        even = -(-left // -(-left // length))
        return TokenSpan(window, offset, min(-(-even // self.multiple_of) * self.multiple_of, left))

    def advance(self, span: TokenSpan) -> None:
        """Book the span that `peek` returned, after it has been trained."""
        if span.offset == 0:
            self.windows_read += 1
        else:
            self.open.popleft()
            self.cuts += 1
        if (end := span.offset + span.length) < self.full:
            self.open.append((span.window, end))

    @property
    def carried(self) -> int:
        """Tokens read and not yet trained, of one sample of each open window."""
        return sum(self.full - offset for _, offset in self.open)

    def state(self) -> dict[str, Any]:
        """JSON types only: windows read, spans that began within their samples, and what is open, the next in turn
        first, as (window, tokens trained of each sample)."""
        return {"windows_read": self.windows_read, "cuts": self.cuts, "open": [list(entry) for entry in self.open]}

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Take over a saved state; None starts afresh."""
        state = state or {"windows_read": 0, "cuts": 0, "open": ()}
        self.windows_read, self.cuts = int(state["windows_read"]), int(state["cuts"])
        self.open = deque((window, offset) for window, offset in state["open"])
