"""Where the snapshots lie: in pinned or plain host memory, or in files that are mapped into memory."""

import mmap
import os
import tempfile
from collections.abc import Sequence

import torch

from ds_plugin.errors import ConfigError
from ds_plugin.weight_averaging import memory
from ds_plugin.weight_averaging.config import WeightAveragingConfig
from ds_plugin.weight_averaging.memory import Memory

Tensors = list[torch.Tensor]


class Storage:
    """Buffers of this rank's shape, each a list of contiguous host tensors with the masters' shapes.

    `allocate` gives the modes' buffers, which lie where ``storage`` says. `spare` is the one that masters are copied
    to, and weights exchanged with: always in memory. Pinned is only what masters on a GPU need pinned, or their copies
    would block the host; offloaded masters need nothing so.
    """

    def __init__(self, config: WeightAveragingConfig, masters: Sequence[torch.Tensor]):
        self._masters = masters
        self._kind, self._path = config.storage, config.storage_path
        self._pin = any(t.device.type == "cuda" for t in masters)
        #: whether a mode's fp32 buffer and the spare one are of one kind, so that they can change places
        self.exchangeable = self._kind == "pinned" or (self._kind == "memory" and not self._pin)

    def reserve(self, dtypes: Sequence[torch.dtype], smaller: str) -> tuple[Memory, Memory | None]:
        """What one buffer of each of ``dtypes`` and the spare one take: host memory, and disk if there are files.

        Every rank calls it. ``smaller``: the remedy to name if there is too little.

        Raises:
            ConfigError: on every rank alike, when there is too little on some node, or no such folder.
        """
        pinned = self._pin and self._kind == "pinned"
        spare = memory.needed(self._masters, 1, pinned=self._pin)
        held = sum(memory.needed(self._masters, 1, pinned=pinned, dtype=dtype) for dtype in dtypes)
        if self._kind != "files":
            return memory.reserve(spare + held, f'{smaller}, or "storage": "files"'), None
        assert self._path is not None
        files = memory.reserve_files(self._path, held, f'{smaller}, or a "storage_path" with more room')
        return memory.reserve(spare, "use more ranks under ZeRO, or fewer on a node"), files

    def spare(self) -> Tensors:
        """An fp32 buffer in memory."""
        return self._in_memory(torch.float32, self._pin)

    def flag(self) -> torch.Tensor:
        """One boolean that can arrive along with the `spare` buffer's contents."""
        return torch.empty(1, dtype=torch.bool, device="cpu", pin_memory=self._pin)

    def allocate(self, dtype: torch.dtype) -> Tensors:
        """A buffer of the kind asked for; its contents are undefined.

        Raises:
            ConfigError: the disk has no room for it.
        """
        if self._kind == "files":
            return self._in_a_file(dtype)
        return self._in_memory(dtype, self._pin and self._kind == "pinned")

    def _in_memory(self, dtype: torch.dtype, pin: bool) -> Tensors:
        return [torch.empty(t.shape, dtype=dtype, device="cpu", pin_memory=pin) for t in self._masters]

    def _in_a_file(self, dtype: torch.dtype) -> Tensors:
        """One file, which has no name: its room returns when the tensors go, or the process, however it ends.

        Written to disk by the kernel as it sees fit; nothing waits for that, since nothing is read after a crash. The
        blocks are allocated here: a full disk would otherwise be a SIGBUS at some later write. (Filesystems that write
        every block anew - btrfs, ZFS - promise less.)
        """
        counts = [t.numel() for t in self._masters]
        nbytes = dtype.itemsize * sum(counts)
        if nbytes == 0:
            return self._in_memory(dtype, False)
        try:
            with tempfile.TemporaryFile(dir=self._path) as file:
                os.posix_fallocate(file.fileno(), 0, nbytes)
                mapping = mmap.mmap(file.fileno(), nbytes)
        except OSError as error:
            raise ConfigError(
                f"weight_averaging.storage_path: no file of {memory.size(nbytes)} could be made in {self._path!r} "
                f"({error.strerror}); make room there, or write another folder"
            ) from None
        buffer, start = [], 0
        for tensor, count in zip(self._masters, counts, strict=True):
            empty = torch.empty(0, dtype=dtype, device="cpu")
            flat = torch.frombuffer(mapping, dtype=dtype, count=count, offset=start) if count else empty
            buffer.append(flat.view(tensor.shape))
            start += dtype.itemsize * count
        return buffer
