"""The CPU memory and disk that averaging takes, worked out and compared with what there is before any is allocated."""

import os
import shutil
import socket
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import psutil
import torch

from ds_plugin.core.errors import ConfigError, gathered, raise_on_all_ranks

_ALIGNED = 64  # bytes: a line of the cache, where a tensor of any dtype can begin in an allocation
_TOGETHER = 256  # tensors in one allocation, at most: to try all splits of n takes n^2 / 2 steps


class Memory(NamedTuple):
    """Bytes that this rank takes, and all ``ranks`` of its node; what the node had available."""

    rank: int
    node: int
    available: int
    ranks: int
    what: str  # "CPU memory", or "files in" a folder

    def __str__(self) -> str:
        on_node = f", {size(self.node)} for the {self.ranks} ranks of this node" if self.ranks > 1 else ""
        return f"{size(self.rank)} of {self.what} on this rank{on_node} ({size(self.available)} available)"


def rounded(nbytes: int) -> int:
    """What torch takes to pin so many bytes in one allocation: the next power of two."""
    return 1 << (nbytes - 1).bit_length() if nbytes else 0


def pieces(counts: Sequence[int], dtypes: Sequence[torch.dtype]) -> list[int]:
    """Bytes of the tensors, of ``counts`` elements, of a buffer for each dtype, each up to where the next can begin."""
    return [-(-dtype.itemsize * count // _ALIGNED) * _ALIGNED for dtype in dtypes for count in counts]


def batches(sizes: Sequence[int]) -> list[list[int]]:
    """Which tensors of ``sizes`` bytes, in their order, to pin in each allocation, so that least is rounded up: six
    equal ones just above a power of two take 2 times their size one by one, 1.33 times in one allocation."""
    ends = [0, *accumulate(sizes)]
    fewest, starts = [0], [0]  # of the first n tensors: the bytes they take, and where their last allocation begins
    for end in range(1, len(ends)):
        tried = range(max(0, end - _TOGETHER), end)
        taken, start = min((fewest[start] + rounded(ends[end] - ends[start]), start) for start in tried)
        fewest.append(taken)
        starts.append(start)
    found, end = [], len(sizes)
    while end:
        found.append(list(sizes[starts[end] : end]))
        end = starts[end]
    return found[::-1]


def pinned(sizes: Sequence[int]) -> int:
    """Bytes that buffers of these sizes take in page-locked memory, whose blocks are rounded up."""
    return sum(rounded(sum(batch)) for batch in batches(sizes))


def reserve(rank_bytes: int, remedy: str) -> Memory:
    """Compare what all ranks of each node need with the memory it has (a container's own limit is not seen). Every rank
    calls it, before it allocates. Raises ConfigError, on every rank alike: some node has too little."""
    return _compared(rank_bytes, psutil.virtual_memory().available, "CPU memory", remedy)


def reserve_files(folder: str, rank_bytes: int, remedy: str) -> Memory:
    """`reserve` for files in ``folder``, which every node has; one that nodes share is counted for each alone."""
    with raise_on_all_ranks():
        if not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
            what = f"{folder!r} is not a folder that can be written to on {socket.gethostname()}"
            raise ConfigError(f"weight_averaging.storage_path: {what}; make it, or write another one")
        free = shutil.disk_usage(folder).free
    return _compared(rank_bytes, free, f"files in {folder}", remedy)


def size(count: int) -> str:
    """So many bytes in words: MB or GB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _compared(rank_bytes: int, available: int, what: str, remedy: str) -> Memory:
    mine = (socket.gethostname(), rank_bytes, available)
    reports, nodes = gathered(mine), {}
    for name in dict.fromkeys(name for name, _, _ in reports):
        taken, free = zip(*(numbers for node, *numbers in reports if node == name), strict=True)
        nodes[name] = found = Memory(rank_bytes, sum(taken), min(free), len(taken), what)
        if found.node > found.available:
            needed = f"need {size(found.node)} of {what}, {size(found.available)} are available"
            raise ConfigError(f"weight_averaging: the {found.ranks} rank(s) on {name} {needed}; {remedy}")
    return nodes[mine[0]]
