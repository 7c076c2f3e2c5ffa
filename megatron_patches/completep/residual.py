"""``residual + multiplier * dropout(x + bias)``: what ``self_attn_bda`` and ``mlp_bda`` become in the forward mode.

The multiplier rides on the addition's own kernel, and where megatron-core fuses (``bias_dropout_fusion``) the same
compiler fuses this. The sum has the residual's dtype, also with an fp32 residual stream under 16-bit layers, which
megatron-core 0.16's own function rounds down: at alpha = 1 a branch is a 1/L-th of the stream, and would be lost.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ds_plugin.core.errors import ConfigError

WithBias = tuple[torch.Tensor, torch.Tensor | None]
BiasDropoutAdd = Callable[[WithBias, torch.Tensor, float], torch.Tensor]
_OF_BRANCH = "of_branch"  # on a bias-dropout-add of ours, what it multiplies a branch by


def scaled_bias_dropout_add(of_branch: float, of_bias: float = 1.0) -> Callable[[bool, bool], BiasDropoutAdd]:
    """A layer spec's bias-dropout-add whose branch, or its bias alone, is multiplied before it is added, called as
    ``value(training, fused)((x, bias), residual, prob)``; the result has residual's shape and dtype."""

    def get_bias_dropout_add(training: bool, fused: bool) -> BiasDropoutAdd:
        function = _fused(training) if fused else (_train if training else _evaluate)
        return functools.partial(function, of_bias=of_bias, of_branch=of_branch)

    setattr(get_bias_dropout_add, _OF_BRANCH, of_branch)
    return get_bias_dropout_add


def scaled_add(add: Any, multiplier: float) -> Any:
    """What a layer spec's bias-dropout-add becomes; itself where there is no branch to add, None for an unknown one."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.transformer.identity_op import IdentityFuncOp

    add = getattr(add, "module", add)  # in a ModuleSpec of its own
    if add is IdentityFuncOp:
        return add
    ours = getattr(add, "__module__", None) == __name__
    return scaled_bias_dropout_add(multiplier) if ours or add is get_bias_dropout_add else None


def check_branches(layers: Sequence[Any], names: Sequence[str], multiplier: float) -> None:
    """Raises ConfigError for a built transformer layer whose bias-dropout-adds of these names multiply otherwise."""
    from megatron.core.transformer.identity_op import IdentityFuncOp

    for layer in layers:
        adds = [getattr(layer, name) for name in names]
        found = {getattr(add, _OF_BRANCH, 1.0) for add in adds if not isinstance(add, IdentityFuncOp)}
        if found - {multiplier}:
            what = f"a layer's residual branches are multiplied by {found}, and the section says {multiplier:g}"
            remedy = "build the model, and get_gpt_mtp_block_spec's block, from the layer spec that prepare() returned"
            raise ConfigError(f"completep: {what}; {remedy}")


def scale_before(layer: Any, multiplier: float) -> None:
    """Make a built transformer layer's MLP branch multiplied before its second matrix rather than after it. After it,
    unfused, the backward pass has one more product, a tensor of its own: in the last layer the step's peak. In layers
    below memory has been freed by then, and before the matrix there are four times as many elements."""
    from megatron.core.transformer.mlp import MLP

    if type(layer.mlp) is MLP:  # a fused one need not call its matrix as a module
        layer.mlp.linear_fc2.register_forward_pre_hook(functools.partial(scale_input, multiplier=multiplier))
        layer.mlp_bda = scaled_bias_dropout_add(1.0, of_bias=multiplier)


def scaled_before(layer: Any) -> float:
    """What a layer's MLP branch is multiplied by before its second matrix; 1 where it is not."""
    hooks = getattr(getattr(layer.mlp, "linear_fc2", None), "_forward_pre_hooks", {}).values()  # experts have no such
    return next((h.keywords["multiplier"] for h in hooks if getattr(h, "func", None) is scale_input), 1.0)


def scale_input(module: torch.nn.Module, args: tuple[Any, ...], *, multiplier: float) -> tuple[Any, ...]:
    """A forward pre-hook: the first argument times ``multiplier``, as before the output layer."""
    return (args[0] * multiplier, *args[1:])


def _add(
    x_with_bias: WithBias, residual: torch.Tensor, prob: float, training: bool, of_bias: float, of_branch: float
) -> torch.Tensor:
    x, bias = x_with_bias
    x = x.to(residual.dtype)
    if bias is not None:
        x = torch.add(x, bias, alpha=of_bias)
    x = torch.nn.functional.dropout(x, p=prob, training=training)
    return torch.add(residual, x, alpha=of_branch)


# two functions, since torch.compile keeps a limited number of variants of each
def _train(x: WithBias, residual: torch.Tensor, prob: float, of_bias: float, of_branch: float) -> torch.Tensor:
    return _add(x, residual, prob, True, of_bias, of_branch)


def _evaluate(x: WithBias, residual: torch.Tensor, prob: float, of_bias: float, of_branch: float) -> torch.Tensor:
    return _add(x, residual, prob, False, of_bias, of_branch)


@functools.cache
def _fused(training: bool) -> Callable[..., torch.Tensor]:
    from megatron.core.jit import jit_fuser

    return jit_fuser(_train if training else _evaluate)  # type: ignore[no-any-return]
