"""How training weights and their average change places, so that it can be taken back wherever it fails."""

from collections.abc import Iterator, Sequence

import torch

Tensors = Sequence[torch.Tensor]

EXCHANGE_ELEMENTS = 4 * 1024 * 1024  #: at a time: a swap needs no second copy of the masters


class Exchange:
    """Two lists of fp32 tensors of the same shapes that change their contents, bit for bit, a piece at a time. All it
    needs is allocated when it is made. `forth` and `back` may fail at any piece, as on a lost device, and be called
    again: in left -> scratch | right -> left | scratch -> right both contents are somewhere whole at any time."""

    def __init__(self, left: Tensors, right: Tensors, scratch: torch.Tensor | None = None):
        pairs = [piece for a, b in zip(left, right, strict=True) for piece in _cut(a, b)]
        if scratch is None:
            device = left[0].device if left else torch.device("cpu")
            scratch = torch.empty(max((a.numel() for a, _ in pairs), default=0), dtype=torch.float32, device=device)
        self.scratch = scratch
        self._pieces = [(a, b, scratch[: a.numel()].view(a.shape)) for a, b in pairs]
        # pieces that have changed places; the one under way; its copies that have ended: one value, for interrupts
        self._state = (0, 0, 0)

    def forth(self) -> None:
        self._to(len(self._pieces))

    def back(self) -> None:
        self._to(0)

    def _to(self, count: int) -> None:
        done, piece, begun = self._state
        if begun:  # a piece was under way: back as it was; what a copy that failed was to write is taken as lost
            left, right, kept = self._pieces[piece]
            if begun == 2:
                right.copy_(left)
                self._state = (done, piece, 1)
            left.copy_(kept)
            self._state = (done, 0, 0)
        while (done := self._state[0]) != count:
            piece, then = (done, done + 1) if done < count else (done - 1, done - 1)
            left, right, kept = self._pieces[piece]
            kept.copy_(left)
            self._state = (done, piece, 1)
            left.copy_(right)
            self._state = (done, piece, 2)
            right.copy_(kept)
            self._state = (then, 0, 0)


def _cut(left: torch.Tensor, right: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pieces side by side; whole, if one has strides: such parameters are rare and small."""
    if left.is_contiguous() and right.is_contiguous():
        left, right = left.view(-1), right.view(-1)
        yield from zip(left.split(EXCHANGE_ELEMENTS), right.split(EXCHANGE_ELEMENTS), strict=True)
    else:
        yield left, right


class KeptBuffers:
    """What modules hold beside their parameters (a BatchNorm's statistics), copied to CPU memory. A cache that another
    tensor has replaced stays so: the length it has grown to (of a dynamic RoPE) is the module's attribute."""

    def __init__(self, modules: Sequence[torch.nn.Module]):
        owners = {id(owner): owner for module in modules for owner in module.modules()}.values()
        self._kept = [
            (owner, name, buffer, buffer.detach().to("cpu", copy=True), name in owner._non_persistent_buffers_set)
            for owner in owners
            for name, buffer in owner.named_buffers(recurse=False)
            if not buffer.is_meta
        ]

    @torch.no_grad()
    def restore(self) -> None:
        for owner, name, buffer, kept, cache in self._kept:
            if getattr(owner, name, None) is not buffer:
                if cache:
                    continue
                owner._buffers[name] = buffer
            # what is not laid out in strides (a sparse matrix) is taken as changed
            both = [t.detach().to("cpu").contiguous() for t in (buffer, kept) if buffer.layout is torch.strided]
            if not both or not torch.equal(*(t.view(-1).view(torch.uint8) for t in both)):
                buffer.copy_(kept)
