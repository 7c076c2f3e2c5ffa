"""The host memory and disk that averaging takes, worked out and compared with what there is before any is allocated."""

import os
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist

from ds_plugin.errors import ConfigError, together


@dataclass(frozen=True)
class Memory:
    """Bytes on this rank, and on its node all ranks together; what the node had available."""

    rank: int
    node: int
    available: int
    ranks: int  # of this node
    what: str  # "host memory", or "files in" a folder

    def __str__(self) -> str:
        on_node = f", {size(self.node)} for the {self.ranks} ranks of this node" if self.ranks > 1 else ""
        return f"{size(self.rank)} of {self.what} on this rank{on_node} ({size(self.available)} available)"


def needed(masters: Sequence[torch.Tensor], copies: int, *, pinned: bool, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of ``copies`` copies of the masters. torch rounds a pinned allocation up to a power of two."""
    sizes = [dtype.itemsize * t.numel() for t in masters]
    return copies * sum(1 << (size - 1).bit_length() if pinned and size else size for size in sizes)


def reserve(rank_bytes: int, remedy: str) -> Memory:
    """Compare what all ranks of each node need with the memory the node has. Every rank calls it, before it allocates.

    A container's own limit is not seen, only the machine's memory.

    Raises:
        ConfigError: on every rank alike, when some node has too little.
    """
    return _compared(rank_bytes, psutil.virtual_memory().available, "host memory", remedy)


def reserve_files(folder: str, rank_bytes: int, remedy: str) -> Memory:
    """`reserve` for files in ``folder``, which every node has; a folder that nodes share is counted for each alone.

    Raises:
        ConfigError: on every rank alike, when the folder cannot be written to, or some node has too little disk there.
    """
    with together():
        if not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
            raise ConfigError(
                f"weight_averaging.storage_path: {folder!r} is not a folder that can be written to on "
                f"{socket.gethostname()}; make it, or write another one"
            )
        free = shutil.disk_usage(folder).free
    return _compared(rank_bytes, free, f"files in {folder}", remedy)


def size(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _compared(rank_bytes: int, available: int, what: str, remedy: str) -> Memory:
    mine = (socket.gethostname(), rank_bytes, available)
    reports = [mine]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        reports = [mine] * dist.get_world_size()
        dist.all_gather_object(reports, mine)
    nodes: dict[str, list[tuple[str, int, int]]] = {}
    for report in reports:
        nodes.setdefault(report[0], []).append(report)
    for name, ranks in nodes.items():
        node, available = sum(r[1] for r in ranks), min(r[2] for r in ranks)
        if node > available:
            raise ConfigError(
                f"weight_averaging: the {len(ranks)} rank(s) on {name} need {size(node)} of {what}, "
                f"{size(available)} are available; {remedy}"
            )
    here = nodes[mine[0]]
    return Memory(rank_bytes, sum(r[1] for r in here), min(r[2] for r in here), len(here), what)
