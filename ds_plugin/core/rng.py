"""This rank's random streams: Python, NumPy, PyTorch on CPU and GPU, megatron-core's tracker. In a checkpoint they are
safetensors, so that loading one runs no code from it: the states of Python and NumPy are JSON in a uint8 tensor."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ds_plugin.core.errors import CheckpointError
from ds_plugin.core.files import atomic_write

_TRACKER = "megatron."
_ANOTHER = "resume from another checkpoint"


def save(path: Path) -> None:
    """Write the state of every stream this rank draws from; the file is whole or absent."""
    atomic_write(path, lambda temporary: save_file(capture(), temporary))


def load(path: Path) -> None:
    """Put every stream back to where `save` found it. Raises CheckpointError, with no stream changed: file missing
    or damaged, or of a rank with other streams (a GPU or not, other names in megatron-core's tracker)."""
    try:
        streams = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"random streams: '{path}' cannot be read ({error}); {_ANOTHER}") from error
    restore(streams, str(path))


def capture() -> dict[str, torch.Tensor]:
    """The states of all streams, as flat CPU tensors of dtype uint8."""
    numpy_state: dict[str, Any] = dict(np.random.get_state(legacy=False))  # type: ignore[arg-type]
    numpy_state["state"] = {"key": numpy_state["state"]["key"].tolist(), "pos": int(numpy_state["state"]["pos"])}
    texts = {"python": random.getstate(), "numpy": numpy_state}
    streams = {name: torch.tensor(list(json.dumps(s).encode()), dtype=torch.uint8) for name, s in texts.items()}
    streams["torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        streams["cuda"] = torch.cuda.get_rng_state()
    for name, state in ({} if (tracker := _tracker()) is None else tracker.get_states()).items():
        streams[_TRACKER + name] = state.get_state() if isinstance(state, torch.Generator) else state
    # Clones: the tracker may hold one tensor under two names, which safetensors refuses to write.
    return {name: state.detach().cpu().contiguous().clone() for name, state in streams.items()}


def restore(streams: dict[str, torch.Tensor], source: str = "the given states") -> None:
    """Put back what `capture` returned. Raises CheckpointError as `load` does; ``source`` names them in its message."""
    if (here := sorted(capture())) != (there := sorted(streams)):
        what = f"'{source}' holds {there}, this rank has {here}"
        remedy = "resume on the same kind of machine with the same model-parallel set-up, after the model is built"
        raise CheckpointError(f"random streams: {what}; {remedy}")
    try:
        (version, internal, gauss), numpy_state = (json.loads(bytes(streams[n].tolist())) for n in ("python", "numpy"))
        python_state = (version, tuple(internal), gauss)
        random.Random().setstate(python_state)  # a damaged state fails here, before anything has changed
        numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
        np.random.RandomState().set_state(numpy_state)
        torch.Generator().set_state(streams["torch"])
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"random streams: '{source}' is damaged ({error}); {_ANOTHER}") from error
    if (tracker := _tracker()) is not None:
        tracked = dict(tracker.get_states())
        for name, state in tracked.items():
            saved = streams[_TRACKER + name]
            if isinstance(state, torch.Generator):  # CUDA graphs hold on to this very object
                state.set_state(saved)
            else:
                tracked[name] = saved.to(state.device).clone()
        tracker.set_states(tracked)
    if "cuda" in streams:
        torch.cuda.set_rng_state(streams["cuda"])
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    torch.set_rng_state(streams["torch"])


def _tracker() -> Any:
    """Megatron-core's CudaRNGStatesTracker if this process has set one up, else None: asking megatron-core for it would
    set one up, and fix its kind before the model had a chance to choose."""
    module: Any = sys.modules.get("megatron.core.tensor_parallel.random")
    known = getattr(module, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", False)
    tracker = module.get_cuda_rng_tracker() if known else None
    return tracker if tracker is not None and tracker.is_initialized() else None
