"""The scaled bias-dropout-add: what a layer spec's ``self_attn_bda`` and ``mlp_bda`` become in the forward mode.

    residual + multiplier * dropout(x + bias)

The multiplier rides on the addition's own kernel, and where the host fuses (``bias_dropout_fusion``) the same compiler
fuses this. Unfused, the backward pass has one multiplication more. The sum has the residual's dtype, also with an fp32
residual stream under 16-bit layers (``fp32_residual_connection``), which megatron-core 0.16's own function rounds down:
at alpha = 1 a branch is a 1/L-th of the stream, and 16 bits would lose it.
"""

import functools
from collections.abc import Callable

import torch

BiasDropoutAdd = Callable[[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor, float], torch.Tensor]


def scaled_bias_dropout_add(multiplier: float) -> Callable[[bool, bool], BiasDropoutAdd]:
    """A value for a layer spec's bias-dropout-add whose branch is multiplied before it is added.

    The host calls it as ``value(training, fused)((x, bias), residual, prob)`` with x and residual [sequence, batch,
    hidden], bias [hidden] or None; the result has residual's shape and dtype.
    """

    def get_bias_dropout_add(training: bool, fused: bool) -> BiasDropoutAdd:
        function = _fused(training) if fused else (_train if training else _evaluate)
        return functools.partial(function, multiplier=multiplier)

    return get_bias_dropout_add


def _add(
    x_with_bias: tuple[torch.Tensor, torch.Tensor | None],
    residual: torch.Tensor,
    prob: float,
    training: bool,
    multiplier: float,
) -> torch.Tensor:
    x, bias = x_with_bias
    if x.dtype != residual.dtype:
        x = x.to(residual.dtype)
    if bias is not None:
        x = x + bias
    x = torch.nn.functional.dropout(x, p=prob, training=training)
    return torch.add(residual, x, alpha=multiplier)


def _train(
    x_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, prob: float, multiplier: float
) -> torch.Tensor:
    return _add(x_with_bias, residual, prob, True, multiplier)


def _evaluate(
    x_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, prob: float, multiplier: float
) -> torch.Tensor:
    return _add(x_with_bias, residual, prob, False, multiplier)


@functools.cache
def _fused(training: bool) -> Callable[..., torch.Tensor]:
    """Compiled once in a process, by the compiler that the host uses for its own."""
    from megatron.core.jit import jit_fuser

    compiled: Callable[..., torch.Tensor] = jit_fuser(_train if training else _evaluate)
    return compiled
