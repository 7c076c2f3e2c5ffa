"""The optimizer of the example script: the fastest AdamW that is installed, and the usual weight-decay groups."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch


def choose_optimizer(config: dict[str, Any]) -> tuple[dict[str, Any], Callable[..., Any] | None]:
    """Pick the implementation of the JSON's Adam or AdamW: apex's, DeepSpeed's fused one, or torch's.

    Returns the DeepSpeed config, and a function that builds the optimizer or None when DeepSpeed builds it. Other
    optimizer types, optimizer offload and an explicit ``torch_adam`` are left as they are.
    """
    section = config.get("optimizer") or {}
    params = dict(section.get("params") or {})
    zero = config.get("zero_optimization") or {}
    offloaded = (zero.get("offload_optimizer") or {}).get("device") in ("cpu", "nvme")
    if str(section.get("type", "")).lower() not in ("adam", "adamw") or offloaded or "torch_adam" in params:
        return config, None
    if torch.cuda.is_available():
        if importlib.util.find_spec("apex") is not None and importlib.util.find_spec("apex.optimizers") is not None:
            from apex.optimizers import FusedAdam

            decoupled = section["type"].lower() == "adamw" or params.pop("adam_w_mode", True)
            return config, lambda groups: FusedAdam(groups, adam_w_mode=decoupled, **params)
        from deepspeed.ops.op_builder import FusedAdamBuilder

        if FusedAdamBuilder().is_compatible(verbose=False):
            return config, None  # DeepSpeed's default
    return {**config, "optimizer": {**section, "params": {**params, "torch_adam": True}}}, None


def decay_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Two param groups: matrices with the JSON's weight decay; norms and biases (one-dimensional) without."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() > 1]},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
