"""Where the snapshots lie: in pinned or plain CPU memory, or in files that are mapped into memory."""

import contextlib
import itertools
import math
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice

import torch

from ds_plugin.core.errors import ConfigError
from ds_plugin.weight_averaging.config import WeightAveragingConfig
from ds_plugin.weight_averaging.snapshots import memory
from ds_plugin.weight_averaging.snapshots.memory import Memory
from ds_plugin.weight_averaging.snapshots.stager import has_streams

Tensors = list[torch.Tensor]

_LARGE = 4 << 20  # bytes, at which a tensor is worth pages of its own


class Storage:
    """Buffers of this rank's shape, each a list of contiguous CPU tensors with the masters' shapes.

    `allocate` gives the modes' buffers, which lie where ``storage`` says. `spare` is the one that masters are copied
    to, and weights exchanged with: always in memory. Memory is pinned only where the masters are on an accelerator with
    streams: their copies would block the training otherwise.
    """

    def __init__(self, config: WeightAveragingConfig, masters: Sequence[torch.Tensor]):
        self._masters, self._path = masters, config.storage_path
        self._spare_in = "pinned" if any(has_streams(t.device.type) for t in masters) else "memory"
        self._kept_in = self._spare_in if config.storage == "pinned" else config.storage
        #: whether a mode's fp32 buffer and the spare one are of one kind, so that they can change places
        self.exchangeable = self._kept_in == self._spare_in
        self._pinned: Iterator[Tensors] = iter(())

    def reserve(self, dtypes: Sequence[torch.dtype], smaller: str) -> tuple[Memory, Memory | None]:
        """What one buffer of each of ``dtypes`` and the spare one take: CPU memory, and disk if there are files.

        Every rank calls it. `allocate` is called for each of ``dtypes`` next, and `spare` last. ``smaller``: the remedy
        to name if there is too little.

        Raises:
            ConfigError: on every rank alike, when there is too little on some node, or no such folder.
        """
        held: dict[str, list[torch.dtype]] = {"pinned": [], "memory": [], "files": []}
        held[self._kept_in] += dtypes
        held[self._spare_in].append(torch.float32)
        self._pinned = self._pin(held["pinned"])
        in_memory = memory.pinned(self._sizes(held["pinned"]))
        in_memory += sum(self._nbytes(dtype) for dtype in held["memory"])
        if self._kept_in != "files":
            return memory.reserve(in_memory, f'{smaller}, or "storage": "files"'), None
        assert self._path is not None
        in_files = sum(self._nbytes(dtype) for dtype in held["files"])
        files = memory.reserve_files(self._path, in_files, f'{smaller}, or a "storage_path" with more room')
        return memory.reserve(in_memory, "use more ranks under ZeRO, or fewer on a node"), files

    def spare(self) -> Tensors:
        return next(self._pinned) if self._spare_in == "pinned" else self._in_memory(torch.float32)

    def verdict(self) -> torch.Tensor:
        """Bytes for one number of any dtype that can arrive along with the `spare` buffer's contents."""
        return torch.empty(8, dtype=torch.uint8, device="cpu", pin_memory=self._spare_in == "pinned")

    def allocate(self, dtype: torch.dtype) -> Tensors:
        """A buffer, of undefined contents. Raises ConfigError if the disk has no room for it."""
        if self._kept_in == "files":
            return self._in_a_file(dtype)
        return next(self._pinned) if self._kept_in == "pinned" else self._in_memory(dtype)

    def _nbytes(self, dtype: torch.dtype) -> int:
        return dtype.itemsize * sum(t.numel() for t in self._masters)

    def _in_memory(self, dtype: torch.dtype) -> Tensors:
        return [_empty(t.shape, dtype) for t in self._masters]

    def _sizes(self, dtypes: Sequence[torch.dtype]) -> list[int]:
        return memory.pieces([t.numel() for t in self._masters], dtypes)

    def _pin(self, dtypes: Sequence[torch.dtype]) -> Iterator[Tensors]:
        """A buffer of each of ``dtypes``, their tensors several to an allocation where that wastes less."""
        tensors = self._pinned_tensors(dtypes)
        for _ in dtypes:
            yield list(islice(tensors, len(self._masters)))

    def _pinned_tensors(self, dtypes: Sequence[torch.dtype]) -> Iterator[torch.Tensor]:
        sizes = self._sizes(dtypes)
        left = zip(itertools.product(dtypes, self._masters), sizes, strict=True)
        for count in memory.batches(sizes):
            batch = list(islice(left, count))
            whole = torch.empty(sum(size for _, size in batch), dtype=torch.uint8, device="cpu", pin_memory=True)
            for ((dtype, master), _), part in zip(batch, whole.split([size for _, size in batch]), strict=True):
                yield part[: dtype.itemsize * master.numel()].view(dtype).view(master.shape)

    def _in_a_file(self, dtype: torch.dtype) -> Tensors:
        """One file, which has no name: its room returns when the tensors go, or the process, however it ends.

        Written to disk by the kernel as it sees fit; nothing waits for that, since nothing is read after a crash. The
        blocks are allocated here: a full disk would otherwise be a SIGBUS at some later write. (Filesystems that write
        every block anew - btrfs, ZFS - promise less.)
        """
        nbytes = self._nbytes(dtype)
        if nbytes == 0:
            return self._in_memory(dtype)
        try:
            with tempfile.TemporaryFile(dir=self._path) as file:
                os.posix_fallocate(file.fileno(), 0, nbytes)
                mapping = mmap.mmap(file.fileno(), nbytes)
        except OSError as error:
            raise ConfigError(
                f"weight_averaging.storage_path: no file of {memory.size(nbytes)} could be made in {self._path!r} "
                f"({error.strerror}); make room there, or write another folder"
            ) from None
        parts = torch.frombuffer(mapping, dtype=dtype).split([t.numel() for t in self._masters])
        return [part.view(t.shape) for part, t in zip(parts, self._masters, strict=True)]


def _empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor in CPU memory; a large one in huge pages where there are some, which are quicker to look up."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _LARGE:
        return torch.empty(shape, dtype=dtype, device="cpu")
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=dtype).view(shape)
