"""A window kept as bf16 differences, the naive way: whole weights by name, every difference made from whole weights."""

import torch


def restored(snapshots):
    """Snapshots (oldest first) as they are read back: the newest as it is, older ones by differences to the newer."""
    found = [snapshots[-1]]
    for older, newer in zip(snapshots[-2::-1], snapshots[:0:-1], strict=True):
        kept = {name: (older[name] - newer[name]).bfloat16() for name in older}
        found.append({name: found[-1][name] + kept[name].float() for name in older})
    return found[::-1]


def snapshots(averager):
    """What a sliding window holds, oldest first: each older one is the newer one and a difference, if kept so."""
    *older, newest = averager.snapshots()
    found = [newest]
    for held in reversed(older):
        kept = any(part.dtype == torch.bfloat16 for part in held)
        found.append([a + b for a, b in zip(found[-1], held, strict=True)] if kept else held)
    return found[::-1]
