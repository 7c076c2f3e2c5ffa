"""Where the fp32 master weights lie in a DeepSpeed checkpoint. The layouts are those of DeepSpeed's ``zero_to_fp32``.

Each model-parallel rank has files, ``mp_rank_XX``: the tensor-parallel ranks of the first pipeline stage, then those of
the second, and so on. Names begin with the layer's number in the whole model: only tensor-parallel ranks share them.
"""

import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from ds_plugin.weight_averaging.merge.inputs import RESTORE, Piece, Stored, cut, load, place, refuse, without_wrappers
from ds_plugin.weight_averaging.merge.safetensors_folders import Source
from ds_plugin.weight_averaging.state.fragments import plain_name
from ds_plugin.weight_averaging.state.reshard import damage

_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_\d+_)?mp_rank_(\d+)_model_states\.pt")
_LAYER = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")
_MODEL_FILE = "mp_rank_{:02d}_model_states.pt"
_LAYER_FILE = "layer_{}-model_{:02d}-model_states.pt"
_NAMED = ("module", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params")  # by the model's
_STAGE_12 = "single_partition_of_fp32_groups"
_TIED = "tied_modules."  # before the names of what several stages hold

Files = defaultdict[int, dict[int, Path]]
Tensors = dict[str, Stored]


def read_deepspeed(path: Path) -> Source:
    """A tag folder of ZeRO 1, 2 or 3, or of stage 0 in fp32; with ZeRO 1 also one of pipeline stages."""
    ranks, optim, layers = _files(path)
    with damage(path, RESTORE):
        shares = [_model_rank(path, rank, ranks, optim[rank], bool(layers)) for rank in range(ranks)]
    size = len(layers) or ranks
    source = Source(path, shares[0][0], dtype=torch.float32)
    if ranks > 1:
        source.layout += f", {size} tensor-parallel, {ranks // size} pipeline stages"
    for rank in range(size):
        folder = f"tp{rank}-of-{size}/" if size > 1 else ""
        tensors: Tensors = {}
        for _, share in shares[rank::size]:
            twice = any(not name.startswith(_TIED) for name in share.keys() & tensors.keys())
            what = f"{path} holds {ranks} model-parallel ranks and the layers of {size} tensor-parallel ones"
            refuse(twice or ranks % size, f"{what}, which do not fit together")
            tensors = {**share, **tensors}  # of what is tied the first stage's: all have the same
        if layers:
            tensors |= _beside(path, rank, layers, tensors)
        source.folders[folder] = list(tensors)
        source.tensors |= {folder + name: stored for name, stored in tensors.items()}
    return source


def _files(path: Path) -> tuple[int, Files, Files]:
    """How many model-parallel ranks; the optimizers' files of each; the layers' files of each tensor-parallel rank."""
    ranks: set[int] = set()
    optim: Files = defaultdict(dict)
    layers: Files = defaultdict(dict)
    for file in sorted(path.glob("*_states.pt")):
        experts = "expert_" in file.name or "expp_rank_" in file.name
        refuse(experts, f"{file} is a checkpoint of experts, which merge cannot read", "export its weights")
        if match := _OPTIM.fullmatch(file.name):
            optim[int(match[2])][int(match[1])] = file
            ranks.add(int(match[2]))
        elif match := _MODEL.fullmatch(file.name):
            ranks.add(int(match[1]))
        elif match := _LAYER.fullmatch(file.name):
            layers[int(match[2] or 0)][int(match[1])] = file
        else:
            strange = re.search("[-_](optim|model)_states", file.name)
            refuse(strange, f"{file} is not named as DeepSpeed names its files")
    for rank in range(max(ranks, default=0)):
        refuse(rank not in ranks, f"{path / _MODEL_FILE.format(rank)} is missing")
    for rank in range(max(layers, default=0)):
        refuse(rank not in layers, f"{path / _LAYER_FILE.format('*', rank)} is missing")
    return len(ranks) or 1, optim, layers


def _model_rank(path: Path, rank: int, ranks: int, optim: dict[int, Path], pipeline: bool) -> tuple[str, Tensors]:
    """How one of ``ranks`` model-parallel ranks was saved, and what it holds. ``optim`` is empty under stage 0."""
    optimizers = {r: _load(file).get("optimizer_state_dict") or {} for r, file in sorted(optim.items())}
    first = next(iter(optimizers.values()), {})
    stage_3 = "fp32_flat_groups" in first
    partitions = _partitions(path, optim, optimizers, "fp32_flat_groups" if stage_3 else _STAGE_12)
    file = path / f"{'zero_pp_rank_0_' if stage_3 else ''}{_MODEL_FILE.format(rank)}"
    model = _load(file)
    shapes, module = model.get("param_shapes"), model.get("module") or {}
    refuse(model.get("mp_world_size", 1) > ranks, f"{path / _MODEL_FILE.format(ranks)} is missing")
    if partitions:
        lost = not pipeline and model.get("module", {}) is None
        refuse(lost, f"{path} lacks layer_*-model_states.pt, the layers of its pipeline stages")
    else:
        refuse(shapes, f"{path} holds no *_optim_states.pt, the fp32 master weights of its ranks")
        refuse(pipeline, f"{path} is of pipeline stages without ZeRO", "use zero_optimization.stage 1")
    tensors: Tensors = {}
    if stage_3:
        tensors = _masters(path, shapes, partitions, True) | _frozen_3(path, rank, model, len(partitions))
    elif partitions:
        tensors = _masters(path, shapes, partitions, False, first.get("param_alignment_paddings"))
    shared = {name: plain_name(of) for name, of in (model.get("shared_params") or {}).items()}
    tensors |= {name: tensors[of] for name, of in shared.items() if of in tensors}
    buffers = set(map(plain_name, model.get("buffer_names") or ()))
    for name, value in module.items():  # what the optimizer does not have: buffers, and under ZeRO 1/2 frozen weights
        if name in tensors or not isinstance(value, torch.Tensor) or (stage_3 and name not in buffers):
            continue
        latest = bool(partitions) or name in buffers
        low = not latest and value.is_floating_point() and value.itemsize < 4
        what = f"{file}: {name} is {value.dtype}, and stage 0 keeps its fp32 master without its name"
        refuse(low, what, "use zero_optimization.stage 1, or give the model's safetensors")
        tensors[name] = _stored(file, name, value, latest, name in buffers)
    tensors = {name: tensors[name] for name in [*(n for n in module if n in tensors), *tensors]}
    stage = f"ZeRO {'3' if stage_3 else '1/2'} on {len(partitions)} ranks" if partitions else "stage 0"
    return f"a checkpoint of {stage}", tensors


def _stored(file: Path, name: str, tensor: torch.Tensor, latest: bool = True, varies: bool = False) -> Stored:
    return Stored(tensor.dtype, tensor.shape, [place(file, name, tensor)], latest, varies)


def _partitions(path: Path, files: dict[int, Path], optimizers: dict[int, Any], key: str) -> list[list[Piece]]:
    """Each data-parallel rank's part of each group; none without ``files``."""
    some: dict[str, Any] = next(iter(optimizers.values()), {})
    counts = some.get("partition_count", len(files))
    count, *others = set(counts) if isinstance(counts, list) else {counts}
    experts = others or "ds_zero_partition_groups" in some
    refuse(experts, f"{path}: groups are partitioned over {counts} ranks", "merge cannot read experts")
    for r in range(count):
        name = re.sub(r"pp_rank_\d+", f"pp_rank_{r}", next(iter(files.values())).name)
        refuse(r not in files, f"{path / name} is missing, one of {count} ranks' shards")
        low = {tensor.dtype for tensor in optimizers[r][key]} - {torch.float32}
        refuse(low, f"{path / name}: the optimizer's master weights are {low}, not fp32", "export them instead")
    refuse(len(files) != count, f"{path} has {len(files)} ranks' shards, {count} saved it", "remove the others'")
    return [[place(files[r], key, tensor) for tensor in optimizers[r][key]] for r in range(count)]


def _masters(path: Path, shapes: Any, partitions: list[list[Piece]], stage_3: bool, paddings: Any = None) -> Tensors:
    """Under ZeRO 1 and 2 a group's parameters lie end to end (each with its padding) over the ranks' partitions; under
    ZeRO 3 each is divided over the ranks by itself, and a rank's parts lie end to end over its sub-groups."""
    tensors: Tensors = {}
    groups = [{name: shape for group in shapes for name, shape in group.items()}] if stage_3 else shapes
    for index, names in enumerate(groups):
        lanes = partitions if stage_3 else [[rank[index] for rank in partitions]]
        offset, available = 0, sum(piece.length for piece in lanes[0])
        for position, (name, shape) in enumerate(names.items()):
            numel = math.prod(shape)
            part = -(-numel // len(lanes))
            pieces = cut((piece for lane in lanes for piece in cut(lane, offset, part)), 0, numel)
            short = sum(piece.length for piece in pieces) != numel
            refuse(short, f"{path}: the partitions end within parameter {name} of {list(shape)}")
            tensors[name] = Stored(torch.float32, shape, pieces)
            offset += part + (paddings[index][position] if paddings else 0)
        align = 1 if stage_3 else 2 * len(partitions)  # ZeRO 2 pads the end to a multiple; nothing says by how much
        wrong = -(-offset // align) != -(-available // align)
        refuse(wrong, f"{path}: group {index} holds {available} elements, its parameters {offset}")
    return tensors


def _frozen_3(path: Path, rank: int, model: dict[str, Any], world: int) -> Tensors:
    shapes, tensors = model.get("frozen_param_shapes") or {}, {}
    files = [path / f"zero_pp_rank_{r}_mp_rank_{rank:02d}_model_states.pt" for r in range(world if shapes else 0)]
    fragments = [(file, _load(file)["frozen_param_fragments"]) for file in files]
    for name, shape in shapes.items():
        dtype = fragments[0][1][name].dtype
        pieces = [place(file, name, held[name]) for file, held in fragments]
        tensors[name] = Stored(dtype, shape, cut(pieces, 0, math.prod(shape), dtype.itemsize), latest=True)
    return tensors


def _beside(path: Path, rank: int, layers: Files, tensors: Tensors) -> Tensors:
    """The buffers and frozen weights of pipeline stages: what is in the layers' files and not among the masters."""
    needed = {number for files in layers.values() for number in files}
    needed |= {int(first) for first in (name.partition(".")[0] for name in tensors) if first.isdecimal()}
    tied = {name.removeprefix(_TIED).partition(".")[2] for name in tensors if name.startswith(_TIED)}
    found: Tensors = {}
    for number in sorted(needed):
        refuse(number not in layers[rank], f"{path / _LAYER_FILE.format(f'{number:02d}', rank)} is missing")
        file = layers[rank][number]
        held = {name: value for name, value in _load(file).items() if isinstance(value, torch.Tensor)}
        held = without_wrappers(held, file)
        new = {f"{number}.{name}": (name, value) for name, value in held.items()}
        if not held.keys() <= tied or new.keys() & tensors.keys():  # else a tied layer, in the optimizer under its key
            found |= {name: _stored(file, *value) for name, value in new.items() if name not in tensors}
    return found


def _load(path: Path) -> dict[str, Any]:
    """What a file holds, by `load`; its tensors by the names of the model before it was wrapped."""
    found = load(path)
    refuse(not isinstance(found, dict), f"{path} holds a {type(found).__name__}, not a DeepSpeed state")
    for name in _NAMED:
        held = found.get(name)
        if isinstance(held, list):  # a group each
            found[name] = [without_wrappers(g, f"{path}: {name}") if isinstance(g, dict) else g for g in held]
        elif isinstance(held, dict):
            found[name] = without_wrappers(held, f"{path}: {name}")
    return found
