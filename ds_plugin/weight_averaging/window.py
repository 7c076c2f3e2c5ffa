"""The arithmetic of averaging, in place, on lists of tensors. Nothing here knows a host."""

from collections.abc import Sequence

import torch

Tensors = Sequence[torch.Tensor]


def mean_(out: Tensors, snapshots: Sequence[Tensors]) -> None:
    """Write the mean of ``snapshots`` (oldest first, all fp32 of ``out``'s shapes) into ``out``.

    The order is fixed - add oldest to newest, then divide once - so that every sharding of the same weights gives the
    same bits, and equals ``sum(snapshots) / len(snapshots)`` on gathered weights.
    """
    for index, target in enumerate(out):
        target.copy_(snapshots[0][index])
        for snapshot in snapshots[1:]:
            target.add_(snapshot[index])
        target.div_(len(snapshots))


def exchange_(left: Tensors, right: Tensors, scratch: torch.Tensor) -> None:
    """Exchange the contents of ``left`` and ``right`` bit for bit, a piece of ``scratch``'s size at a time.

    ``scratch`` is a flat fp32 tensor; it bounds the extra memory whatever the size of the tensors.
    """
    for a, b in zip(left, right, strict=True):
        if not (a.is_contiguous() and b.is_contiguous()):  # flattening would copy; such parameters are rare and small
            kept = a.clone()
            a.copy_(b)
            b.copy_(kept)
            continue
        flat_a, flat_b = a.view(-1), b.view(-1)
        for start in range(0, flat_a.numel(), scratch.numel()):
            end = min(start + scratch.numel(), flat_a.numel())
            piece = scratch[: end - start]
            piece.copy_(flat_a[start:end])
            flat_a[start:end].copy_(flat_b[start:end])
            flat_b[start:end].copy_(piece)
