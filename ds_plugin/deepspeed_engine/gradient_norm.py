"""The gradient norm of a model whose multipliers are folded into its weights, on DeepSpeed: there a role with fold
factor c has gradients 1/c of those of the forward mode (`megatron_patches.completep`), so the norm over all of them
would be another, and clipping by it another training run."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ds_plugin.core.errors import ConfigError
from ds_plugin.deepspeed_engine import compat

Methods = Iterator[tuple[Any, str, Callable[..., Any]]]  # owner, name, and what stands in for it


def rescaled(engine: Any, factors: Sequence[float]) -> Methods:
    """What multiplies each param group's part of the gradient norm by its factor: the norm becomes the forward mode's,
    for clipping and `get_global_grad_norm`. ``factors``: one for each param group, in order.

    One multiplication of a scalar per group, in a pipeline per tensor: no collective, no sync. A norm that is not
    finite is a negative number to DeepSpeed, and stays one. Wrappers not known here report their own norm.

    Raises ConfigError: gradients would be clipped by another norm; in a pipeline on all stages alike. StateError: this
    DeepSpeed lacks a name that correcting it needs."""
    pipeline, clipping = compat.is_pipeline(engine), engine.gradient_clipping()
    folded = f'completep.residual: "folded" with gradient_clipping {clipping}'
    offloaded = engine.zero_cpu_offload() or engine.zero_nvme_offload_optimizer()
    if pipeline and clipping and (offloaded or engine.zero_optimization_stage() == 0):
        what = f"zero_optimization.{'offload_optimizer' if offloaded else 'stage 0'} in DeepSpeed's pipeline"
        raise ConfigError(f'{folded} does not go with {what}; write stage 1 without it, or "residual": "forward"')
    if all(factor == 1.0 for factor in factors):
        return iter(())
    methods = {"zero3": _zero3, "zero12": _zero12, "bf16": _bf16, "none": _fp32}.get(compat.wrapper_of(engine))
    if methods is None and clipping:
        what = f"is not supported under DeepSpeed's {type(engine.optimizer).__name__}, which clips by another norm"
        raise ConfigError(f'{folded} {what}; write zero_optimization.stage 1, or "residual": "forward"')
    return methods(engine, engine.optimizer, factors) if methods is not None else iter(())


def _own(owner: Any, name: str) -> Any:
    compat.need(owner, name)
    return getattr(owner, name)


def _zero12(engine: Any, optimizer: Any, factors: Sequence[float]) -> Methods:
    """Factors by the very lists the norms are taken of: one is empty on a rank that holds but a group's padding. In a
    pipeline gradients are weighed before they are added: groups of different factors meet there."""
    name = compat.ZERO12_NORM
    lists, direct = _own(optimizer, compat.ZERO12_NORM_PARAMS), _own(optimizer, name)
    of = {id(params): factor for params, factor in zip(lists, factors, strict=True)}
    if compat.is_pipeline(engine):
        yield optimizer, name, lambda found, params: direct([_weighed(g, of[id(params)]) for g in found], params)
    else:
        offloaded = _own(optimizer, compat.ZERO12_OFFLOAD_NORM)
        yield optimizer, name, lambda gradients, params: direct(gradients, params) * of[id(params)]
        yield optimizer, compat.ZERO12_OFFLOAD_NORM, lambda params: offloaded(params) * of[id(params)]


def _zero3(engine: Any, optimizer: Any, factors: Sequence[float]) -> Methods:
    group_of, own = _own(optimizer, compat.ZERO3_GROUP_OF_SUB_GROUP), _own(optimizer, compat.ZERO3_NORMS)
    yield optimizer, compat.ZERO3_NORMS, lambda: [norm * factors[group_of[i]] for i, norm in enumerate(own())]


def _bf16(engine: Any, optimizer: Any, factors: Sequence[float]) -> Methods:
    groups, own = _own(optimizer, compat.BF16_GRADIENTS), _own(optimizer, compat.BF16_NORM_GRADIENTS)
    factor_of = {id(g): factor for group, factor in zip(groups, factors, strict=True) for g in group}

    def gradients(for_clipping: bool = False) -> Any:
        if for_clipping:
            return own(for_clipping=True)
        dense, experts = own()
        return [_weighed(gradient, factor_of.get(id(gradient), 1.0)) for gradient in dense], experts

    yield optimizer, compat.BF16_NORM_GRADIENTS, gradients


def _fp32(engine: Any, optimizer: Any, factors: Sequence[float]) -> Methods:
    """Stage 0 in fp32: the gradients are the forward mode's while DeepSpeed clips them."""
    own, groups = _own(engine, compat.FP32_CLIP), optimizer.param_groups

    def clip() -> None:
        for power in (1, -1):
            for group, factor in zip(groups, factors, strict=True):
                gradients = [p.grad for p in group["params"] if p.grad is not None]
                if gradients and factor != 1.0:
                    torch._foreach_mul_(gradients, factor**power)
            if power == 1:
                own()

    yield engine, compat.FP32_CLIP, clip


def _weighed(gradient: torch.Tensor, factor: float) -> torch.Tensor:
    """A tensor's weighed norm stands in for it, as the norm of norms is the norm; padding has none."""
    if factor == 1.0 or getattr(gradient, compat.ZERO12_PADDING, False):
        return gradient
    return torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32) * factor
