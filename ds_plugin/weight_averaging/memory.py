"""The host memory that averaging takes, worked out and compared with what there is before any of it is allocated."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist

from ds_plugin.errors import ConfigError


@dataclass(frozen=True)
class Memory:
    """Bytes on this rank, and on its node all ranks together; what the node had available."""

    rank: int
    node: int
    available: int
    ranks: int  # of this node

    def __str__(self) -> str:
        on_node = f", {_size(self.node)} for the {self.ranks} ranks of this node" if self.ranks > 1 else ""
        return f"{_size(self.rank)} of host memory on this rank{on_node} ({_size(self.available)} available)"


def needed(masters: Sequence[torch.Tensor], copies: int, *, pinned: bool) -> int:
    """Bytes of ``copies`` fp32 copies of the masters. torch rounds a pinned allocation up to a power of two."""
    sizes = [4 * t.numel() for t in masters]
    return copies * sum(1 << (size - 1).bit_length() if pinned and size else size for size in sizes)


def reserve(rank_bytes: int, remedy: str) -> Memory:
    """Compare what all ranks of each node need with what the node has. Every rank calls it, before it allocates.

    A container's own limit is not seen, only the machine's memory.

    Raises:
        ConfigError: on every rank alike, when some node has too little.
    """
    mine = (socket.gethostname(), rank_bytes, psutil.virtual_memory().available)
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
                f"weight_averaging: the {len(ranks)} rank(s) on {name} need {_size(node)} of host memory, "
                f"{_size(available)} are available; {remedy}"
            )
    here = nodes[mine[0]]
    return Memory(rank_bytes, sum(r[1] for r in here), min(r[2] for r in here), len(here))


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
