"""Where the fp32 master weights lie in a DeepSpeed checkpoint, read without running any code of it.

The ``*.pt`` files are zip archives of one pickle and plain bytes. The pickle is read with ``weights_only``, on the meta
device, and the few classes DeepSpeed puts into it are replaced by an inert stand-in, so that no code of a checkpoint,
nor of DeepSpeed, runs. The layouts are those of DeepSpeed's ``zero_to_fp32``.
"""

import math
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ds_plugin.errors import CheckpointError
from ds_plugin.weight_averaging.merge_inputs import DTYPE_NAMES, RESTORE, Piece, Source, Stored

#: what DeepSpeed's ZeRO files hold besides tensors and plain values; none of it is needed, so none of it is built
HARMLESS = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


def read_deepspeed(path: Path) -> Source:
    """A tag folder of ZeRO 1, 2 or 3 (or of stage 0 in fp32) without tensor or pipeline parallelism."""
    for unsupported, what in (("layer_*", "pipeline stages"), ("*expert_*", "experts"), ("*expp_rank_*", "experts")):
        if found := next(path.glob(unsupported), None):
            raise CheckpointError(f"{found} is a checkpoint of {what}, which merge cannot read; export its weights")
    optim = sorted(path.glob("*_optim_states.pt"))
    ranks: dict[int, Path] = {}
    for file in [*optim, *path.glob("*_model_states.pt")]:
        if "mp_rank_" in file.name and "mp_rank_00" not in file.name:
            raise CheckpointError(f"{file} is of a tensor-parallel run, which merge cannot read; export its weights")
        if match := _OPTIM.fullmatch(file.name):
            ranks[int(match[1])] = file
    if not optim:
        return _stage_0(path)
    optimizers = {rank: read_pickle(file).get("optimizer_state_dict") or {} for rank, file in sorted(ranks.items())}
    if not optimizers:
        raise CheckpointError(f"{optim[0]} is not named as DeepSpeed names its ZeRO files; {RESTORE}")
    some = next(iter(optimizers.values()))
    key = "fp32_flat_groups" if "fp32_flat_groups" in some else "single_partition_of_fp32_groups"
    counts = some.get("partition_count", len(ranks))
    counts = counts if isinstance(counts, list) else [counts]
    if len(set(counts)) > 1 or "ds_zero_partition_groups" in some:
        raise CheckpointError(f"{path}: groups are partitioned over {counts} ranks; merge cannot read experts")
    world = counts[0]
    for rank in range(world):
        if rank not in ranks:
            missing = next(iter(ranks.values())).name.replace(f"pp_rank_{next(iter(ranks))}_", f"pp_rank_{rank}_")
            raise CheckpointError(f"{path / missing} is missing, one of {world} ranks' shards; {RESTORE}")
        if key not in optimizers[rank]:
            raise CheckpointError(f"{ranks[rank]} lacks {key}, the fp32 master weights; {RESTORE}")
    if len(ranks) != world:
        raise CheckpointError(f"{path} holds {len(ranks)} ranks' shards and was saved by {world}; remove the others'")
    groups = [
        [_stored(ranks[r], f"{key}[{i}]", t) for i, t in enumerate(optimizers[r][key])] for r in range(world)
    ]  # by rank, then by group
    stage_3 = key == "fp32_flat_groups"
    model_path = path / ("zero_pp_rank_0_mp_rank_00_model_states.pt" if stage_3 else "mp_rank_00_model_states.pt")
    model = read_pickle(model_path)
    shapes = model.get("param_shapes")
    if not shapes:
        raise CheckpointError(f"{model_path} lacks param_shapes, the parameters' order in the partitions; {RESTORE}")
    try:
        if stage_3:
            tensors = _zero_3(shapes, groups, path)
            tensors |= _frozen_3(path, model, world)
        else:
            tensors = _zero_12(shapes, groups, some.get("param_alignment_paddings"), path)
    except (IndexError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{path}: its files do not fit together ({error!r}); {RESTORE}") from None
    tensors |= {k: tensors[v] for k, v in (model.get("shared_params") or {}).items() if v in tensors}
    module = model.get("module") or {}
    buffers = set(model.get("buffer_names") or ())
    for name, value in module.items():  # what the optimizer does not have: buffers, and under ZeRO 1/2 frozen weights
        if name not in tensors and isinstance(value, torch.Tensor) and (name in buffers or not stage_3):
            tensors[name] = _stored(model_path, name, value, latest=True)
    tensors = {name: tensors[name] for name in [*(n for n in module if n in tensors), *tensors]}
    files = [model_path, *(ranks[r] for r in range(world))]
    return Source(path, f"a checkpoint of ZeRO {'3' if stage_3 else '1/2'} on {world} ranks", tensors, files)


class _Inert:
    """Stands in for a class of DeepSpeed's: takes any arguments and keeps none of them."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_pickle(path: Path) -> dict[str, Any]:
    """A ``torch.save`` file with every tensor on the meta device; only plain values, tensors and `HARMLESS` classes.

    Raises:
        CheckpointError: the file is missing, truncated, or names any other class, which is then never imported.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; {RESTORE}")
    try:
        foreign = sorted(set(get_unsafe_globals_in_checkpoint(str(path))) - set(HARMLESS))
        if foreign:
            raise CheckpointError(
                f"{path} holds {', '.join(foreign)}, which is not loaded: a pickle can run any code; save the "
                "checkpoint without it (client_state takes plain values)"
            )
        with safe_globals([(_Inert, name) for name in HARMLESS]):
            found = torch.load(path, map_location="meta", weights_only=True)
    except (RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is truncated or damaged ({str(error).splitlines()[0]}); {RESTORE}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not a DeepSpeed state; {RESTORE}")
    return found


def _stored(path: Path, name: str, tensor: torch.Tensor, *, latest: bool = False) -> Stored:
    if tensor.dtype not in DTYPE_NAMES or not tensor.is_contiguous():
        raise CheckpointError(f"{path}: {name} is {tensor.dtype} with strides {tensor.stride()}; merge cannot read it")
    begin: int = tensor.untyped_storage()._checkpoint_offset  # type: ignore  # set by torch.load
    piece = Piece(path, begin + int(tensor.storage_offset()) * tensor.dtype.itemsize, tensor.numel())
    return Stored(tensor.dtype, tuple(tensor.shape), (piece,), latest)


def _stage_0(path: Path) -> Source:
    model_path = path / "mp_rank_00_model_states.pt"
    model = read_pickle(model_path)
    if model.get("param_shapes"):
        raise CheckpointError(f"{path} holds no *_optim_states.pt, the fp32 master weights of its ranks; {RESTORE}")
    buffers = set(model.get("buffer_names") or ())
    tensors = {
        name: _stored(model_path, name, value, latest=name in buffers or not value.is_floating_point())
        for name, value in (model.get("module") or {}).items()
        if isinstance(value, torch.Tensor)
    }
    for name, stored in tensors.items():
        if not stored.latest and stored.dtype.itemsize < 4:
            raise CheckpointError(
                f"{model_path}: {name} is {stored.dtype}, and stage 0 keeps its fp32 master elsewhere, without its "
                "name; use zero_optimization.stage 1"
            )
    return Source(path, "a checkpoint of stage 0", tensors, [model_path])


def _cut(pieces: Iterable[Piece], start: int, count: int) -> tuple[Piece, ...]:
    """``count`` fp32 elements from ``start`` on of pieces laid end to end."""
    found = []
    for piece in pieces:
        begin, end = max(start, 0), min(start + count, piece.count)
        if begin < end:
            found.append(Piece(piece.path, piece.offset + 4 * begin, end - begin))
        start -= piece.count
    return tuple(found)


def _zero_12(shapes: Any, groups: list[list[Stored]], paddings: Any, path: Path) -> dict[str, Stored]:
    """A group's parameters lie end to end (each with its padding) over the ranks' partitions."""
    tensors: dict[str, Stored] = {}
    for index, names in enumerate(shapes):
        pieces = [piece for rank in groups for piece in _fp32(rank[index], path)]
        offset, available = 0, sum(piece.count for piece in pieces)
        for position, (name, shape) in enumerate(names.items()):
            tensors[name] = _checked(name, shape, _cut(pieces, offset, math.prod(shape)), path)
            offset += math.prod(shape) + (paddings[index][position] if paddings else 0)
        align = 2 * len(groups)  # ZeRO 2 pads the end to a multiple of this; nothing says by how much
        if -(-offset // align) != -(-available // align):
            raise CheckpointError(f"{path}: group {index} holds {available} elements, its parameters {offset}")
    return tensors


def _zero_3(shapes: Any, groups: list[list[Stored]], path: Path) -> dict[str, Stored]:
    """Each parameter is divided over the ranks by itself; a rank's parts lie end to end over its sub-groups."""
    tensors: dict[str, Stored] = {}
    ranks = [[piece for stored in rank for piece in _fp32(stored, path)] for rank in groups]
    offset = 0
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        numel = math.prod(shape)
        part = -(-numel // len(ranks))
        real = [max(0, min(part, numel - part * rank)) for rank in range(len(ranks))]  # the last ranks' may be padding
        pieces = [p for rank, count in enumerate(real) for p in _cut(ranks[rank], offset, count)]
        tensors[name] = _checked(name, shape, tuple(pieces), path)
        offset += part
    available = sum(piece.count for piece in ranks[0])
    if offset != available:
        raise CheckpointError(f"{path}: a rank holds {available} elements, its parameters {offset}")
    return tensors


def _frozen_3(path: Path, model: dict[str, Any], world: int) -> dict[str, Stored]:
    shapes = model.get("frozen_param_shapes")
    if not shapes:
        return {}
    files = [path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(world)]
    fragments = [read_pickle(file)["frozen_param_fragments"] for file in files]
    tensors = {}
    for name, shape in shapes.items():
        parts = [_stored(file, name, fragment[name]) for file, fragment in zip(files, fragments, strict=True)]
        left, pieces = math.prod(shape), []
        for piece in (part.pieces[0] for part in parts):
            pieces.append(Piece(piece.path, piece.offset, min(piece.count, left)))
            left -= pieces[-1].count
        tensors[name] = Stored(parts[0].dtype, tuple(shape), tuple(pieces), latest=True)
    return tensors


def _fp32(stored: Stored, path: Path) -> tuple[Piece, ...]:
    if stored.dtype != torch.float32:
        raise CheckpointError(
            f"{path}: the optimizer's master weights are {stored.dtype}, not fp32; export them instead"
        )
    return stored.pieces


def _checked(name: str, shape: Any, pieces: tuple[Piece, ...], path: Path) -> Stored:
    if sum(piece.count for piece in pieces) != math.prod(shape):
        raise CheckpointError(f"{path}: the partitions end within parameter {name} of {list(shape)}; {RESTORE}")
    return Stored(torch.float32, tuple(shape), pieces)
