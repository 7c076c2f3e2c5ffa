"""Shorten a batch: the first ``length`` tokens of every sample, for every argument that has a sequence dimension.

Arguments are recognised by name, as the model's ``forward`` declares them; a tensor under a name not listed here is
left alone unless it has the batch's token shape, in which case the caller is asked to say what it is (`ConfigError`).
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ds_plugin.errors import ConfigError

#: arguments that hold the samples' tokens, [batch, sequence] (or [batch, sequence, hidden] for embeddings)
TOKEN_NAMES = ("input_ids", "tokens", "inputs_embeds", "inputs", "x", "ids")
#: arguments cut along with the tokens, [batch, sequence, ...]
COMPANION_NAMES = ("labels", "targets", "target", "y", "position_ids", "loss_mask", "token_type_ids", "segment_ids")
#: [batch, sequence] or [..., sequence, sequence]
MASK_NAMES = ("attention_mask", "mask")
POSITIONS = "position_ids"

#: (args, kwargs, length) -> (args, kwargs, tokens before, tokens after): cuts one forward call's arguments. A user
#: gives one as ``shorten=`` for a model whose arguments are not recognised below.
Shorten = Callable[[tuple[Any, ...], dict[str, Any], int], tuple[tuple[Any, ...], dict[str, Any], int, int]]


def shorten_arguments(arguments: Mapping[str, Any], length: int, offset: int = 0) -> tuple[dict[str, Any], int, int]:
    """Cut named arguments to ``length`` positions from ``offset`` on; position ids begin at 0 again.

    Returns:
        the cut arguments (views: no copy, contiguous only along the batch) and the number of tokens before and after.

    Raises:
        ConfigError: no token argument is recognised, the samples are shorter than ``length``, or an unlisted argument
            looks like it holds tokens.
    """
    if arguments.get("packed_seq_params") is not None:
        raise ConfigError(
            "sequence_length_warmup: packed_seq_params describes documents of the full length, which a prefix would "
            "cut; train without packed sequences"
        )
    names = [name for name in TOKEN_NAMES if torch.is_tensor(arguments.get(name)) and arguments[name].dim() >= 2]
    if not names:
        given = ", ".join(f"{k}: {_describe(v)}" for k, v in arguments.items()) or "none"
        raise ConfigError(
            f"sequence_length_warmup: the model's forward has no recognisable token argument (it was given {given}); "
            f"the names looked for are {', '.join(TOKEN_NAMES)}. give initialize(..., shorten=function), which takes "
            "(args, kwargs, length) and returns (args, kwargs, tokens before, tokens after)"
        )
    batch, full = arguments[names[0]].shape[:2]
    if full < offset + length:
        raise ConfigError(
            f"sequence_length_warmup.end_length: the step asks for {offset + length} tokens but {names[0]} holds "
            f"samples of {full}; write an end_length of at most {full}, or read longer samples"
        )
    cut: dict[str, Any] = {}
    for name, value in arguments.items():
        if not torch.is_tensor(value) or value.dim() < 2:
            cut[name] = value
        elif name in MASK_NAMES:
            cut[name] = _cut_mask(value, batch, full, length, offset)
        elif name in TOKEN_NAMES or name in COMPANION_NAMES:
            # [batch or 1, sequence, ...]; anything else under these names (class labels, say) has no sequence to cut
            cut[name] = value[:, offset : offset + length] if value.shape[1] == full else value
            if name == POSITIONS and offset and value.shape[1] == full:
                cut[name] = restarted(cut[name])
        elif tuple(value.shape[:2]) == (batch, full):
            raise ConfigError(
                f"sequence_length_warmup: the model's argument {name!r} has the tokens' shape {list(value.shape)} but "
                f"is not known, so it cannot be cut in step with {names[0]!r}; rename it (known: "
                f"{', '.join(TOKEN_NAMES + COMPANION_NAMES + MASK_NAMES)}) or give initialize(..., shorten=function)"
            )
        else:
            cut[name] = value
    return cut, batch * full, batch * length


def argument_names(forward: Callable[..., Any]) -> list[str]:
    """The names of the arguments that ``forward`` takes by position, in order."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(forward).parameters.values() if p.kind in positional]


def by_name(forward: Callable[..., Any]) -> Shorten:
    """The `Shorten` of a model whose ``forward`` names its arguments; the signature is read once."""
    names = argument_names(forward)

    def shorten(
        args: tuple[Any, ...], kwargs: dict[str, Any], length: int
    ) -> tuple[tuple[Any, ...], dict[str, Any], int, int]:
        if len(args) > len(names):
            raise ConfigError(
                f"sequence_length_warmup: forward takes its {len(args)} arguments by position (*args), so they have no "
                "names to recognise; pass them by keyword or give initialize(..., shorten=function)"
            )
        cut, before, after = shorten_arguments({**dict(zip(names, args, strict=False)), **kwargs}, length)
        return tuple(cut.pop(name) for name in names[: len(args)]), cut, before, after

    return shorten


def restarted(positions: torch.Tensor) -> torch.Tensor:
    """Position ids [batch, length] of a stretch from within a sample, counted from the stretch's first token.

    Where a document begins within the stretch, and its positions at 0 with it, they stay.
    """
    count = torch.arange(positions.shape[1], device=positions.device)
    return torch.where(positions - positions[:, :1] == count, count, positions)


def _cut_mask(mask: torch.Tensor, batch: int, full: int, length: int, offset: int) -> torch.Tensor:
    """[batch, sequence] padding masks lose their last positions; [..., sequence, sequence] ones are cut both ways."""
    if mask.dim() == 2 and mask.shape == (batch, full):
        if batch == full:
            raise ConfigError(
                f"sequence_length_warmup: an attention mask of shape {list(mask.shape)} with {batch} samples of {full} "
                "tokens is either one row per sample or one row per query; give it as [1, 1, sequence, sequence] or "
                "another batch"
            )
        return mask[:, offset : offset + length]
    for dim in (-1, -2):
        if mask.shape[dim] == full:
            mask = mask.narrow(dim, offset, length)
    return mask


def _describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if torch.is_tensor(value) else type(value).__name__
