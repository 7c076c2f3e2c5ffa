"""Where the fp32 master weights lie in a DeepSpeed checkpoint, read without running any code of it.

The ``*.pt`` files are zip archives of one pickle and plain bytes. The pickle is read with ``weights_only``, on the meta
device, and the few classes DeepSpeed puts into it are replaced by an inert stand-in, so that no code of a checkpoint,
nor of DeepSpeed, runs. The layouts are those of DeepSpeed's ``zero_to_fp32``.

A run with tensor parallelism or pipeline stages has such files for each of its model-parallel ranks, ``mp_rank_XX``;
they number the tensor-parallel ranks of the first stage, then those of the second, and so on. Names are unique over
the stages (they begin with the layer's number in the whole model), not over tensor-parallel ranks.
"""

import math
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ds_plugin.core.errors import CheckpointError
from ds_plugin.weight_averaging.merge.inputs import (
    DEQUANTIZE,
    DTYPE_NAMES,
    RESTORE,
    Piece,
    Source,
    Stored,
    cut,
    without_wrappers,
)
from ds_plugin.weight_averaging.state.fragments import plain_name

#: what these files hold besides tensors and plain values; none of it is needed, so none of it is built
HARMLESS = (
    "_io.BytesIO",  # megatron-core's extra state
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_\d+_)?mp_rank_(\d+)_model_states\.pt")
_LAYER = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")
_MODEL_FILE = "mp_rank_{:02d}_model_states.pt"
_NAMED = ("module", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params")  # by the model's
_TIED = "tied_modules."  # before the names of what several stages hold


def read_deepspeed(path: Path) -> Source:
    """A tag folder of ZeRO 1, 2 or 3, or of stage 0 in fp32; with ZeRO 1 also one of pipeline stages.

    Each tensor-parallel rank has a folder of its own; the stages are together in it.

    Raises:
        CheckpointError: a file is missing, truncated, or holds foreign classes; experts; masters without names.
    """
    ranks, optim, layers = _files(path)
    shares = [_model_rank(path, rank, optim.get(rank, {}), bool(layers)) for rank in ranks]
    if len(shares) < max(share.ranks for share in shares):
        raise CheckpointError(f"{path / _MODEL_FILE.format(len(shares))} is missing; {RESTORE}")
    size = len(layers) or len(shares)
    source = Source(path, shares[0].layout, {}, [file for share in shares for file in share.files])
    if len(shares) > 1:
        source.layout += f", {size} tensor-parallel, {len(shares) // size} pipeline stages"
    for rank in range(size):
        folder = f"tp{rank}-of-{size}/" if size > 1 else ""
        tensors: dict[str, Stored] = {}
        for share in shares[rank::size]:
            again = [name for name in share.tensors if name in tensors and not name.startswith(_TIED)]
            if again or len(shares) % size:
                raise CheckpointError(
                    f"{path} holds {len(shares)} model-parallel ranks and the layers of {size} tensor-parallel ones, "
                    f"which do not fit together; {RESTORE}"
                )
            tensors = {**share.tensors, **tensors}  # of what is tied the first stage's: all have the same
        if layers:
            tensors |= _beside(path, rank, layers, tensors)
            source.files += layers[rank].values()
        source.folders[folder] = list(tensors)
        source.tensors |= {folder + name: stored for name, stored in tensors.items()}
    return source


def _files(path: Path) -> tuple[list[int], dict[int, dict[int, Path]], dict[int, dict[int, Path]]]:
    """The model-parallel ranks; of each the optimizers' files by data-parallel rank; of each tensor-parallel rank the
    layers' by their number."""
    ranks: set[int] = set()
    optim: dict[int, dict[int, Path]] = {}
    layers: dict[int, dict[int, Path]] = {}
    for file in sorted(path.glob("*_states.pt")):
        if "expert_" in file.name or "expp_rank_" in file.name:
            raise CheckpointError(f"{file} is a checkpoint of experts, which merge cannot read; export its weights")
        if match := _OPTIM.fullmatch(file.name):
            optim.setdefault(int(match[2]), {})[int(match[1])] = file
            ranks.add(int(match[2]))
        elif match := _MODEL.fullmatch(file.name):
            ranks.add(int(match[1]))
        elif match := _LAYER.fullmatch(file.name):
            layers.setdefault(int(match[2] or 0), {})[int(match[1])] = file
        elif re.search("[-_](optim|model)_states", file.name):
            raise CheckpointError(f"{file} is not named as DeepSpeed names its files; {RESTORE}")
    for found, name in ((ranks, _MODEL_FILE), (layers.keys(), "layer_*-model_{:02d}-model_states.pt")):
        if missing := sorted(set(range(max(found, default=0))) - set(found)):
            raise CheckpointError(f"{path / name.format(missing[0])} is missing; {RESTORE}")
    return sorted(ranks) or [0], optim, layers


@dataclass
class _Share(Source):
    """What one of ``ranks`` model-parallel ranks holds."""

    ranks: int = 1


def _model_rank(path: Path, rank: int, ranks: dict[int, Path], pipeline: bool) -> _Share:
    """One model-parallel rank's share, from the files of its data-parallel ``ranks``."""
    if not ranks:
        return _stage_0(path, rank, pipeline)
    optimizers = {r: read_pickle(file).get("optimizer_state_dict") or {} for r, file in sorted(ranks.items())}
    some = next(iter(optimizers.values()))
    key = "fp32_flat_groups" if "fp32_flat_groups" in some else "single_partition_of_fp32_groups"
    counts = some.get("partition_count", len(ranks))
    counts = counts if isinstance(counts, list) else [counts]
    if len(set(counts)) > 1 or "ds_zero_partition_groups" in some:
        raise CheckpointError(f"{path}: groups are partitioned over {counts} ranks; merge cannot read experts")
    world = counts[0]
    for r in range(world):
        if r not in ranks:
            missing = next(iter(ranks.values())).name.replace(f"pp_rank_{next(iter(ranks))}_", f"pp_rank_{r}_")
            raise CheckpointError(f"{path / missing} is missing, one of {world} ranks' shards; {RESTORE}")
        if key not in optimizers[r]:
            raise CheckpointError(f"{ranks[r]} lacks {key}, the fp32 master weights; {RESTORE}")
    if len(ranks) != world:
        raise CheckpointError(f"{path} holds {len(ranks)} ranks' shards and was saved by {world}; remove the others'")
    groups = [
        [stored_in(ranks[r], f"{key}[{i}]", t) for i, t in enumerate(optimizers[r][key])] for r in range(world)
    ]  # by rank, then by group
    stage_3 = key == "fp32_flat_groups"
    model_path = path / f"{'zero_pp_rank_0_' if stage_3 else ''}{_MODEL_FILE.format(rank)}"
    model = read_pickle(model_path)
    if model.get("module", {}) is None and not pipeline:
        raise CheckpointError(f"{path} lacks layer_*-model_states.pt, the layers of its pipeline stages; {RESTORE}")
    shapes = model.get("param_shapes")
    if not shapes:
        raise CheckpointError(f"{model_path} lacks param_shapes, the parameters' order in the partitions; {RESTORE}")
    try:
        if stage_3:
            tensors = _zero_3(shapes, groups, path)
            tensors |= _frozen_3(path, rank, model, world)
        else:
            tensors = _zero_12(shapes, groups, some.get("param_alignment_paddings"), path)
    except (IndexError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{path}: its files do not fit together ({error!r}); {RESTORE}") from None
    shared = {name: plain_name(of) for name, of in (model.get("shared_params") or {}).items()}
    tensors |= {name: tensors[of] for name, of in shared.items() if of in tensors}
    module = model.get("module") or {}
    buffers = set(map(plain_name, model.get("buffer_names") or ()))
    for name, value in module.items():  # what the optimizer does not have: buffers, and under ZeRO 1/2 frozen weights
        if name not in tensors and isinstance(value, torch.Tensor) and (name in buffers or not stage_3):
            tensors[name] = stored_in(model_path, name, value, latest=True, varies=name in buffers)
    tensors = {name: tensors[name] for name in [*(n for n in module if n in tensors), *tensors]}
    files = [model_path, *(ranks[r] for r in range(world))]
    layout = f"a checkpoint of ZeRO {'3' if stage_3 else '1/2'} on {world} ranks"
    return _Share(path, layout, tensors, files, ranks=model.get("mp_world_size", 1))


def _beside(path: Path, rank: int, layers: dict[int, dict[int, Path]], tensors: dict[str, Stored]) -> dict[str, Stored]:
    """The buffers and frozen weights of pipeline stages: what is in the layers' files and not among the masters."""
    needed = {number for files in layers.values() for number in files}
    needed |= {int(first) for first in (name.partition(".")[0] for name in tensors) if first.isdecimal()}
    for number in sorted(needed - layers[rank].keys()):
        raise CheckpointError(f"{path / f'layer_{number:02d}-model_{rank:02d}-model_states.pt'} is missing; {RESTORE}")
    tied = {name.removeprefix(_TIED).partition(".")[2] for name in tensors if name.startswith(_TIED)}
    found = {}
    for number, file in sorted(layers[rank].items()):
        content = {name: value for name, value in read_pickle(file).items() if isinstance(value, torch.Tensor)}
        held = without_wrappers(content, file)
        if held.keys() <= tied and not any(f"{number}.{name}" in tensors for name in held):
            continue  # a tied layer, which is in the optimizer under its key
        for name, value in held.items():
            if f"{number}.{name}" not in tensors:
                found[f"{number}.{name}"] = stored_in(file, name, value, latest=True)
    return found


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
    found = unpickled(str(path), str(path))
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not a DeepSpeed state; {RESTORE}")
    for name in _NAMED:
        held = found.get(name)
        if isinstance(held, list):  # a group each
            found[name] = [without_wrappers(g, f"{path}: {name}") if isinstance(g, dict) else g for g in held]
        elif isinstance(held, dict):
            found[name] = without_wrappers(held, f"{path}: {name}")
    return found


def unpickled(file: str | IO[bytes], name: str) -> Any:
    """What `torch.save` wrote, as `read_pickle`; ``name`` is what messages call it."""
    try:
        foreign = sorted(set(get_unsafe_globals_in_checkpoint(file)) - set(HARMLESS))
        if foreign:
            raise CheckpointError(
                f"{name} holds {', '.join(foreign)}, which is not loaded: a pickle can run any code; save the "
                "checkpoint without it (client_state takes plain values)"
            )
        if not isinstance(file, str):
            file.seek(0)
        with safe_globals([(_Inert, harmless) for harmless in HARMLESS]):
            return torch.load(file, map_location="meta", weights_only=True)
    except (RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{name} is truncated or damaged ({str(error).splitlines()[0]}); {RESTORE}") from None


def stored_in(
    path: Path, name: str, tensor: torch.Tensor, *, latest: bool = False, varies: bool = False, base: int = 0
) -> Stored:
    """Where a tensor of `unpickled` lies in ``path``, whose part from byte ``base`` on was read."""
    if tensor.dtype not in DTYPE_NAMES or not tensor.is_contiguous():
        raise CheckpointError(
            f"{path}: {name} is {tensor.dtype} with strides {tensor.stride()}, which merge cannot read; {DEQUANTIZE}"
        )
    begin: int = base + tensor.untyped_storage()._checkpoint_offset  # type: ignore  # set by torch.load
    piece = Piece(path, begin + int(tensor.storage_offset()) * tensor.dtype.itemsize, tensor.numel())
    return Stored(tensor.dtype, tuple(tensor.shape), (piece,), latest, varies or tensor.numel() == 1)


def _stage_0(path: Path, rank: int, pipeline: bool) -> _Share:
    model_path = path / _MODEL_FILE.format(rank)
    model = read_pickle(model_path)
    if model.get("param_shapes"):
        raise CheckpointError(f"{path} holds no *_optim_states.pt, the fp32 master weights of its ranks; {RESTORE}")
    if pipeline:
        raise CheckpointError(
            f"{path} is of pipeline stages without ZeRO, whose weights have no names of their own; use "
            "zero_optimization.stage 1"
        )
    buffers = set(map(plain_name, model.get("buffer_names") or ()))
    tensors = {
        name: stored_in(
            model_path, name, value, latest=name in buffers or not value.is_floating_point(), varies=name in buffers
        )
        for name, value in (model.get("module") or {}).items()
        if isinstance(value, torch.Tensor)
    }
    for name, stored in tensors.items():
        if not stored.latest and stored.dtype.itemsize < 4:
            raise CheckpointError(
                f"{model_path}: {name} is {stored.dtype}, and stage 0 keeps its fp32 master elsewhere, without its "
                "name; use zero_optimization.stage 1, or give the model's safetensors"
            )
    return _Share(path, "a checkpoint of stage 0", tensors, [model_path], ranks=model.get("mp_world_size", 1))


def _zero_12(shapes: Any, groups: list[list[Stored]], paddings: Any, path: Path) -> dict[str, Stored]:
    """A group's parameters lie end to end (each with its padding) over the ranks' partitions."""
    tensors: dict[str, Stored] = {}
    for index, names in enumerate(shapes):
        pieces = [piece for rank in groups for piece in _fp32(rank[index], path)]
        offset, available = 0, sum(piece.length for piece in pieces)
        for position, (name, shape) in enumerate(names.items()):
            tensors[name] = _checked(name, shape, tuple(cut(pieces, offset, math.prod(shape), 4)), path)
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
        pieces = [p for rank, count in enumerate(real) for p in cut(ranks[rank], offset, count, 4)]
        tensors[name] = _checked(name, shape, tuple(pieces), path)
        offset += part
    available = sum(piece.length for piece in ranks[0])
    if offset != available:
        raise CheckpointError(f"{path}: a rank holds {available} elements, its parameters {offset}")
    return tensors


def _frozen_3(path: Path, rank: int, model: dict[str, Any], world: int) -> dict[str, Stored]:
    shapes = model.get("frozen_param_shapes")
    if not shapes:
        return {}
    files = [path / f"zero_pp_rank_{r}_mp_rank_{rank:02d}_model_states.pt" for r in range(world)]
    fragments = [read_pickle(file)["frozen_param_fragments"] for file in files]
    tensors = {}
    for name, shape in shapes.items():
        parts = [stored_in(file, name, fragment[name]) for file, fragment in zip(files, fragments, strict=True)]
        left, pieces = math.prod(shape), []
        for piece in (part.pieces[0] for part in parts):
            pieces.append(Piece(piece.path, piece.offset, min(piece.length, left)))
            left -= pieces[-1].length
        tensors[name] = Stored(parts[0].dtype, tuple(shape), tuple(pieces), latest=True)
    return tensors


def _fp32(stored: Stored, path: Path) -> tuple[Piece, ...]:
    if stored.dtype != torch.float32:
        raise CheckpointError(
            f"{path}: the optimizer's master weights are {stored.dtype}, not fp32; export them instead"
        )
    return stored.pieces


def _checked(name: str, shape: Any, pieces: tuple[Piece, ...], path: Path) -> Stored:
    if sum(piece.length for piece in pieces) != math.prod(shape):
        raise CheckpointError(f"{path}: the partitions end within parameter {name} of {list(shape)}; {RESTORE}")
    return Stored(torch.float32, tuple(shape), pieces)
