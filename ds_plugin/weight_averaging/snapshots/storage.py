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
_REMEDY = 'write a smaller "window" or fewer "horizons", or use more ranks under ZeRO'


class Storage:
    """Buffers, each a list of contiguous CPU tensors with the masters' shapes: one of each of ``dtypes``, which lie
    where ``storage`` says, and the spare one in fp32, in memory, that masters are copied to and weights exchanged with.
    It is pinned only where the masters are on an accelerator with streams: copies would block the training else."""

    def __init__(self, config: WeightAveragingConfig, masters: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]):
        self._masters, self._path = masters, config.storage_path
        self._spare_in = "pinned" if any(has_streams(t.device.type) for t in masters) else "memory"
        kept_in = self._spare_in if config.storage == "pinned" else config.storage
        self._wanted = [*((kept_in, dtype) for dtype in dtypes), (self._spare_in, torch.float32)]
        #: whether an fp32 buffer and the spare one are of one kind, so that they can change places
        self.exchangeable = kept_in == self._spare_in

    def reserve(self) -> tuple[Memory, Memory | None]:
        """What the buffers take, of memory and of disk. Raises as `memory.reserve` does."""
        in_memory = memory.pinned(self._sizes(self._dtypes("pinned"))) + self._nbytes(*self._dtypes("memory"))
        if self._path is None:
            return memory.reserve(in_memory, f'{_REMEDY}, or "storage": "files"'), None
        in_files, more = self._nbytes(*self._dtypes("files")), f'{_REMEDY}, or a "storage_path" with more room'
        files = memory.reserve_files(self._path, in_files, more)
        return memory.reserve(in_memory, _REMEDY), files

    def allocate(self) -> tuple[list[Tensors], Tensors]:
        """The buffers and the spare one, of undefined contents. Raises ConfigError if the disk has no room for them."""
        pinned = self._pinned_tensors(self._dtypes("pinned"))

        def make(kind: str, dtype: torch.dtype) -> Tensors:
            if kind == "pinned":
                return list(islice(pinned, len(self._masters)))
            if kind == "files" and self._nbytes(dtype):
                return self._in_a_file(dtype)
            return [_empty(t.shape, dtype) for t in self._masters]

        *kept, spare = itertools.starmap(make, self._wanted)
        return kept, spare

    def verdict(self) -> torch.Tensor:
        """Bytes for one number of any dtype that can arrive along with the spare buffer's contents."""
        return torch.empty(8, dtype=torch.uint8, device="cpu", pin_memory=self._spare_in == "pinned")

    def _dtypes(self, kind: str) -> list[torch.dtype]:
        return [dtype for where, dtype in self._wanted if where == kind]

    def _nbytes(self, *dtypes: torch.dtype) -> int:
        return sum(dtype.itemsize for dtype in dtypes) * sum(t.numel() for t in self._masters)

    def _sizes(self, dtypes: Sequence[torch.dtype]) -> list[int]:
        return memory.pieces([t.numel() for t in self._masters], dtypes)

    def _pinned_tensors(self, dtypes: Sequence[torch.dtype]) -> Iterator[torch.Tensor]:
        """Those of a buffer of each dtype, several to an allocation where that wastes less."""
        left = itertools.product(dtypes, self._masters)
        for batch in memory.batches(self._sizes(dtypes)):
            whole = torch.empty(sum(batch), dtype=torch.uint8, device="cpu", pin_memory=True)
            for part, (dtype, master) in zip(whole.split(batch), islice(left, len(batch)), strict=True):
                yield part[: dtype.itemsize * master.numel()].view(dtype).view(master.shape)

    def _in_a_file(self, dtype: torch.dtype) -> Tensors:
        """One file, which has no name: its room returns when the tensors go, or the process, however it ends. The
        blocks are allocated here: a full disk would otherwise be a SIGBUS at a later write (as on btrfs and ZFS)."""
        nbytes = self._nbytes(dtype)
        try:
            with tempfile.TemporaryFile(dir=self._path) as file:
                os.posix_fallocate(file.fileno(), 0, nbytes)
                mapping = mmap.mmap(file.fileno(), nbytes)
        except OSError as error:
            what = f"no file of {memory.size(nbytes)} could be made in {self._path!r} ({error.strerror})"
            raise ConfigError(f"weight_averaging.storage_path: {what}; make room there, or write another") from None
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
