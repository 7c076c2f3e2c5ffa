"""Run NVIDIA Megatron-Bridge's pre-training on a machine without a GPU, over gloo: for tests only.

`enable()` comes before the first import of `megatron.bridge`. It puts small stand-ins where Bridge imports packages
that are large, or need a GPU, and that a plain pre-training never needs; and it turns on `megatron_on_cpu`.
"""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from megatron_patches.training_loop import cpu


def enable() -> None:
    """Make `megatron.bridge` importable, and its `pretrain` run on the CPU, in this process; again is a no-op."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiled functions would ask the pretended GPU what it can
    for package, modules in _STAND_INS.items():
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            for name, contents in modules.items():
                _stand_in(name, contents, package)
    cpu.enable()


def _stand_in(name: str, contents: dict[str, Any], package: str) -> None:
    """Put a module of that name and those contents into `sys.modules`, and its packages as far up as ``package``."""
    if name in sys.modules:
        vars(sys.modules[name]).update(contents)
        return
    module = sys.modules[name] = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=True)  # others ask `find_spec` whether it is there
    module.__path__ = []
    vars(module).update(contents)
    above, _, last = name.rpartition(".")
    if name.startswith(f"{package}."):
        _stand_in(above, {}, package)
    if above in sys.modules:
        setattr(sys.modules[above], last, module)


def _nothing(*args: Any, **kwargs: Any) -> None: ...


def _classes(*names: str) -> dict[str, Any]:
    return {name: type(name, (), {}) for name in names}


# By package: the modules, with their contents, that Bridge imports at the heads of its own, or that of Bridge's which
# does so and can be done without. Functions that a plain run calls do nothing.
_STAND_INS: dict[str, dict[str, dict[str, Any]]] = {
    "modelopt": {
        "modelopt.torch.opt.plugins": dict.fromkeys(
            ("restore_modelopt_state", "save_modelopt_state", "save_sharded_modelopt_state"), _nothing
        ),
        "modelopt.torch.distill": _classes("DistillationModel"),
        "modelopt.torch.distill.plugins.megatron": {
            **_classes("DistillationConfig"),
            "get_tensor_shapes_adjust_fn_for_distillation": _nothing,
        },
        "modelopt.torch.quantization.utils": {"is_quantized": lambda module: False},  # asked by save_hf_pretrained
    },
    "megatron.energon": {
        "megatron.energon": {
            **_classes("Batch", "DefaultTaskEncoder", "Sample", "SkipSample", "WorkerConfig"),
            **dict.fromkeys(("get_savable_loader", "get_train_dataset"), _nothing),
        },
    },
    "datasets": {
        "datasets": dict.fromkeys(("concatenate_datasets", "load_dataset"), _nothing),
        "datasets.builder": {},
    },
    "nvidia_resiliency_ext": {"nvidia_resiliency_ext.inprocess": _classes("CallWrapper")},
    # megatron-core would take a stand-in for TransformerEngine itself for the real one
    "transformer_engine": {
        "megatron.bridge.peft.lora_layers": _classes(
            "LinearAdapter", "LoRALinear", "LoRATopKRouter", "TEFusedLoRALinear"
        )
    },
}
