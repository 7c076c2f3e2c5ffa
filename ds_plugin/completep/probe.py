"""What a decoder does with its first layer, seen in one forward pass over a few tokens.

Names and the order of definition do not say where a residual branch ends (``post_attention_layernorm`` comes before
the MLP in Llama and after attention in Gemma 2). The stream does: a pre-norm layer's output is its input plus the
outputs of the modules that end its branches. Of all subsets of its modules, those are the one that adds up to it.
"""

import contextlib
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ds_plugin.core.errors import ConfigError

_TOKENS, _MOST_PARTS = 8, 16
_ATTENTION = "_attn_implementation"  # of a transformers config: looked up in every forward pass
_OFF = 0.05  # of what a layer adds to its stream, the part that may be unexplained: rounding in 16 bits is below it


class Seen(NamedTuple):
    """``ends``: names, inside the first layer, of the modules that end a residual branch; ``before``: modules with
    parameters that ran before it; ``embedding_factor``: what rows of the embedding are multiplied by on their way."""

    ends: frozenset[str]
    before: frozenset[nn.Module]
    embedding_factor: float


class _Done(BaseException):
    """The first layer has run: the others need not."""


@torch.no_grad()
def first_layer(model: nn.Module, layer: nn.Module, embedding: nn.Module) -> Seen:
    """Run ``model(tokens)`` up to the end of its first layer, without dropout; nothing changes on it. Raises
    ConfigError: it cannot be run so, or what the layer adds to its input is no sum of its modules' outputs."""
    weight: Any = embedding.weight
    tokens = torch.arange(_TOKENS, device=weight.device)[None] % len(weight)
    outputs: dict[nn.Module, torch.Tensor] = {}
    stream: dict[str, torch.Tensor] = {}

    def enter(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        stream["in"] = _flat(next(filter(_is_float, (*args, *kwargs.values()))))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stream["out"] = _flat(output[0] if isinstance(output, tuple) else output)
        raise _Done

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if _is_float(output):
            outputs[module] = _flat(output)

    with contextlib.ExitStack() as undo:
        undo.enter_context(layer.register_forward_pre_hook(enter, with_kwargs=True))
        undo.enter_context(layer.register_forward_hook(leave))
        for module in model.modules():
            if next(module.children(), None) is None and next(module.parameters(), None) is not None:
                undo.enter_context(module.register_forward_hook(keep))
            undo.callback(setattr, module, "training", module.training)
        model.eval()
        config: Any = model.config
        attention = getattr(config, _ATTENTION, "eager")
        if weight.device.type == "cpu" and attention not in (None, "eager", "sdpa"):
            # others may want a GPU, to which a Trainer's model comes when its engine is built
            undo.callback(setattr, config, _ATTENTION, attention)
            setattr(config, _ATTENTION, "eager")
        try:
            model(tokens)
        except _Done:
            pass
        except Exception as error:
            raise ConfigError(f"completep: the model, run on {_TOKENS} tokens to see its layers: {error}") from error
    if "out" not in stream:
        raise ConfigError("completep: model(tokens) does not run the first of its layers")
    names = {module: name for name, module in layer.named_modules()}
    inside = {names[module]: outputs.pop(module) for module in [*outputs] if module in names}
    others = [output for module, output in outputs.items() if module is not embedding]
    factor = _embedding_factor(stream["in"], _flat(weight[tokens]), others)
    return Seen(frozenset(_ends(stream, inside)), frozenset(outputs), factor)


def _ends(stream: Mapping[str, torch.Tensor], inside: Mapping[str, torch.Tensor]) -> list[str]:
    grown = stream["out"] - stream["in"]
    parts = {name: part for name, part in inside.items() if part.numel() == grown.numel()}
    if silent := [name for name, part in parts.items() if part.norm() == 0]:
        what = f"{silent[0]} of a layer gives zeros, and it cannot be told whether it is added to the stream"
        raise ConfigError(f"completep: {what}; draw its weights at random first, the method does so anew")
    if not 0 < len(parts) <= _MOST_PARTS:
        raise ConfigError(f"completep: {len(parts)} modules of a layer have outputs of the stream's size, not 1 to 16")
    # every subset, not least squares: a norm after a matrix is almost the matrix's multiple where inputs are small
    subsets = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(parts))), dtype=grown.dtype)
    columns = torch.stack(list(parts.values()), dim=1)
    distances = (subsets @ (columns.T @ columns) * subsets).sum(1) - 2 * subsets @ (columns.T @ grown)
    best = subsets[distances.argmin()]
    if (grown - columns @ best).norm() > _OFF * grown.norm():
        raise ConfigError(
            "completep: a layer's output is not its input plus outputs of its modules, each times 1, as in a pre-norm "
            "decoder (post-norm layers, experts, hyper-connections and residual multipliers are not covered)"
        )
    return [name for name, chosen in zip(parts, best.tolist(), strict=True) if chosen]


def _embedding_factor(stream: torch.Tensor, rows: torch.Tensor, others: Iterable[torch.Tensor]) -> float:
    """The rows' coefficient in the least-squares fit of the stream by rows and others' outputs; 1 without a fit."""
    if rows.numel() != stream.numel():
        return 1.0
    matrix = torch.stack([rows, *(part for part in others if part.numel() == stream.numel())], dim=1)
    return float(torch.linalg.lstsq(matrix, stream[:, None], driver="gelsd").solution[0].item())


def _flat(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to("cpu", torch.float64, copy=True).flatten()  # modules may write over it


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def whole(parameters: Iterable[nn.Parameter], *, write: bool = False) -> contextlib.AbstractContextManager[Any]:
    """Those that ``deepspeed.zero.Init`` has divided among the ranks are whole in the block, on every rank; ``write``:
    what is written on them is kept."""
    divided = [p for p in parameters if hasattr(p, "ds_id")]
    if not divided:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(divided, modifier_rank=0 if write else None)
