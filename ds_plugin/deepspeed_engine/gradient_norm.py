"""The gradient norm of a model whose multipliers are folded into its weights, on DeepSpeed.

There a role with fold factor c has gradients 1/c of those of the forward mode (`megatron_patches.completep`), so the
norm over all of them would be another, and clipping by it another training run.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ds_plugin.core.errors import ConfigError
from ds_plugin.core.replaced import replaced
from ds_plugin.deepspeed_engine import compat


class RescaledGradNorm:
    """Multiplies each param group's part of the gradient norm by its factor: the norm becomes the forward mode's.

    Clipping and `get_global_grad_norm` use it. One multiplication of a scalar per group: no collective, no sync. A norm
    that is not finite is a negative number to the host, and stays one. Wrappers not known here report their own norm,
    and are refused where they would clip by it.
    """

    def __init__(self, engine: Any, factors: Sequence[float]):
        """``factors``: one for each param group, in order. Nothing changes before `install`.

        Raises:
            ConfigError: gradients are clipped in an optimizer wrapper whose norm cannot be corrected.
            StateError: this DeepSpeed lacks a name that correcting it needs.
        """
        from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        self.engine = engine
        self._shadows: list[tuple[Any, str, Callable[..., Any]]] = []  # owner, method, and what wraps it
        wrapper = engine.optimizer
        if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
            self._scale_zero3(wrapper, factors)
        elif isinstance(wrapper, DeepSpeedZeroOptimizer):
            self._scale_zero12(wrapper, factors)
        elif isinstance(wrapper, BF16_Optimizer):
            self._scale_bf16(wrapper, factors)
        elif wrapper is self.engine.basic_optimizer:
            self._scale_fp32(factors)
        elif self.engine.gradient_clipping():
            raise ConfigError(
                f'completep.residual: "folded" with gradient_clipping {self.engine.gradient_clipping()} is not '
                f"supported under DeepSpeed's {type(wrapper).__name__}, which would clip by another norm; write "
                'zero_optimization.stage 1, or "residual": "forward"'
            )

    def install(self, undo: contextlib.ExitStack) -> None:
        """Shadow the methods; ``undo`` gives the engine its own norm back."""
        for owner, name, wrap in self._shadows:
            undo.enter_context(replaced(owner, name, wrap(getattr(owner, name))))

    def _shadow(self, owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        compat.need(owner, name)
        self._shadows.append((owner, name, wrap))

    def _scale_zero12(self, wrapper: Any, factors: Sequence[float]) -> None:
        compat.need(wrapper, compat.ZERO12_NORM_PARAMS)
        # told by the lists themselves: one is empty on a rank that holds nothing but the group's padding
        lists = getattr(wrapper, compat.ZERO12_NORM_PARAMS)
        factor_of = {id(params): factor for params, factor in zip(lists, factors, strict=True)}

        def wrap_direct(host_norm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            return lambda gradients, params: host_norm(gradients, params) * factor_of[id(params)]

        def wrap_offloaded(host_norm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            return lambda params: host_norm(params) * factor_of[id(params)]

        self._shadow(wrapper, compat.ZERO12_NORM, wrap_direct)
        self._shadow(wrapper, compat.ZERO12_OFFLOAD_NORM, wrap_offloaded)

    def _scale_zero3(self, wrapper: Any, factors: Sequence[float]) -> None:
        compat.need(wrapper, compat.ZERO3_GROUP_OF_SUB_GROUP)
        group_of = getattr(wrapper, compat.ZERO3_GROUP_OF_SUB_GROUP)

        def wrap(host_norms: Callable[[], list[torch.Tensor]]) -> Callable[[], list[torch.Tensor]]:
            return lambda: [norm * factors[group_of[i]] for i, norm in enumerate(host_norms())]

        self._shadow(wrapper, compat.ZERO3_NORMS, wrap)

    def _scale_bf16(self, wrapper: Any, factors: Sequence[float]) -> None:
        compat.need(wrapper, compat.BF16_GRADIENTS)
        factor_of = {
            id(gradient): factor
            for gradients, factor in zip(getattr(wrapper, compat.BF16_GRADIENTS), factors, strict=True)
            for gradient in gradients
            if factor != 1.0
        }

        def wrap(host_gradients: Callable[..., Any]) -> Callable[..., Any]:
            def gradients(for_clipping: bool = False) -> Any:
                found = host_gradients(for_clipping=for_clipping)
                if for_clipping:
                    return found
                dense, experts = found  # a tensor's weighed norm stands in for it: the norm of norms is the norm
                return [_norm(g) * factor_of[id(g)] if id(g) in factor_of else g for g in dense], experts

            return gradients

        self._shadow(wrapper, compat.BF16_NORM_GRADIENTS, wrap)

    def _scale_fp32(self, factors: Sequence[float]) -> None:
        """Stage 0 in fp32: the gradients are the forward mode's while the host clips them."""
        groups = self.engine.basic_optimizer.param_groups
        folded = [(group["params"], factor) for group, factor in zip(groups, factors, strict=True) if factor != 1]

        def scale(power: int) -> None:
            for params, factor in folded:
                gradients = [p.grad for p in params if p.grad is not None]
                if gradients:
                    torch._foreach_mul_(gradients, factor**power)

        def wrap(host_clip: Callable[[], Any]) -> Callable[[], Any]:
            def clip() -> None:
                scale(1)
                host_clip()
                scale(-1)

            return clip

        self._shadow(self.engine, compat.FP32_CLIP, wrap)


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)
