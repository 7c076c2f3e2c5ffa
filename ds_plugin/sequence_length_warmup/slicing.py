"""Cutting a batch to a length: which dimensions of each tensor are positions, and one cut along them.

Arguments are recognised by name, as the model's ``forward`` or a data set names them; tensors in nested tuples, which
have no names, by their shape. What is as long as the samples and not recognised is refused, never passed on uncut.
A batch has one *side*, or two in an encoder-decoder, whose sources and targets have lengths of their own. Each side is
cut to the step's length, or to its own where that is shorter: padding to the longest sample of a batch makes such."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ds_plugin.core.errors import ConfigError
from ds_plugin.sequence_length_warmup.nested import Leaf, describe, leaves, rebuilt
from ds_plugin.sequence_length_warmup.spoiled import refuse_counts, refuse_packed, refuse_restarts

#: the samples' tokens [batch, sequence], or embeddings [batch, sequence, hidden]; the first says how long they are
TOKEN_NAMES = ("input_ids", "tokens", "inputs_embeds", "inputs", "x", "ids", "idx")
#: [batch, sequence, ...] as well; of an encoder-decoder they are the decoder's
LABEL_NAMES = ("labels", "targets", "target", "y", "loss_mask", "shift_labels", "lm_labels")
#: [batch, sequence, ...], cut along with the tokens
COMPANION_NAMES = (
    "token_type_ids", "segment_ids", "task_type_ids", "mm_token_type_ids", "special_tokens_mask", "input_shape_ids",
    "input_pronunciation_ids", "langs", "bbox", "per_layer_inputs",
)  # fmt: skip
#: [..., sequence]; also [batch, sequence, 3], of multimodal rotary embeddings
POSITION_NAMES = ("position_ids", "positions", "input_pos", "pos", "cache_position")
#: padding masks [batch, sequence], or [..., sequence, sequence]
MASK_NAMES = ("attention_mask", "mask", "padding_mask", "input_mask", "global_attention_mask", "perm_mask")
#: what has no positions of these samples, whatever its shape
_WHOLE = {
    "encoder_outputs", "encoder_hidden_states", "pixel_values", "pixel_values_videos", "input_features", "input_values",
    "pixel_mask", "pixel_attention_mask", "input_features_mask", "image_sizes", "image_grid_thw", "video_grid_thw",
    "image_embeds", "past_key_values", "mems", "head_mask", "decoder_head_mask", "cross_attn_head_mask",
}  # fmt: skip
_ALONG = {*TOKEN_NAMES, *LABEL_NAMES, *COMPANION_NAMES}
_KNOWN = {*_ALONG, *POSITION_NAMES, *MASK_NAMES}
_DECODER, _ENCODER = "decoder_", "encoder_"  # before any of these names
_SHORTEN = (
    "truncate with initialize(..., shorten=function): (args, kwargs, length) -> (args, kwargs, tokens before and after)"
)
#: (args, kwargs, length) -> (args, kwargs, tokens before, tokens after): cuts one forward call's arguments
Shorten = Callable[[tuple[Any, ...], dict[str, Any], int], tuple[tuple[Any, ...], dict[str, Any], int, int]]


@dataclass(frozen=True)
class Side:
    """Samples of one length in tokens, before they are cut."""

    name: str
    rows: int
    positions: int

    def kept(self, offset: int, length: int) -> int:
        """How many of ``length`` positions from ``offset`` on there are."""
        return min(length, self.positions - offset)


@dataclass(frozen=True)
class Sides:
    """An encoder-decoder's two, of which one may not be among the arguments; another model's are the encoder's."""

    encoder: Side | None
    decoder: Side | None
    by_shape: bool = False  # no name was known

    @property
    def known(self) -> list[Side]:
        """Those that are there, one at least: the ledger counts the first one's tokens."""
        return [side for side in (self.encoder, self.decoder) if side is not None]

    def of(self, name: str) -> tuple[str, Side | None]:
        """The name without its prefix, and the side that it belongs to."""
        if name.startswith(_DECODER):
            return name.removeprefix(_DECODER), self.decoder
        if name.startswith(_ENCODER):  # without a decoder's side, the encoder's samples are not the ones that are cut
            return name.removeprefix(_ENCODER), self.encoder if self.decoder else None
        return name, (self.decoder or self.encoder) if name in LABEL_NAMES else self.encoder


def cut_batch(
    batch: Any,
    length: int,
    offset: int = 0,
    *,
    micro_batch: int | None = None,
    encoder_decoder: bool = False,
    full: int | None = None,
    exact: bool = False,
    settled: bool = False,
) -> tuple[Any, int, int]:
    """At most ``length`` positions from ``offset`` on of every sample, and how many tokens those had and have. What is
    cut is contiguous (losses call ``labels.view(-1)``, broadcasts send memory), the rest the same object. Position ids
    begin at 0 again.

    batch: arguments by name, or tensors in nested mappings, tuples and lists.
    micro_batch: samples of a micro-batch. There may be fewer, the last ones of a data set, or more, as with pairs of
        answers or batches of so many tokens; not a second dimension of that many. None: not known.
    encoder_decoder: labels are the decoder's, also without ``decoder_input_ids``.
    full: the positions that samples should have, by which tensors without a name are recognised.
    exact: samples of other than ``full`` positions, or more than ``micro_batch``, are refused.
    settled: earlier batches have shown which dimension is the batch.

    Raises ConfigError: there are no tokens, a tensor that cannot be cut, or what a cut would spoil."""
    found = leaves(batch)
    refuse_packed(found)
    sides = find_sides(found, micro_batch=micro_batch, encoder_decoder=encoder_decoder, full=full)
    main = sides.known[0]
    if micro_batch is not None and not settled:
        _refuse_other_layout(sides, micro_batch, exact=exact)
    if exact and main.positions != full:
        raise _not_full(full, f"{main.positions} tokens in each of its {main.rows} samples")
    if any(leaf.name in LABEL_NAMES and positions(leaf, sides) for leaf in found):  # not one label for each sample
        refuse_counts(found)
    cut = rebuilt(batch, (_cut(leaf, sides, offset, length) for leaf in found))
    return cut, main.rows * main.positions, main.rows * main.kept(offset, length)


def fold_batch(batch: Any, length: int, *, full: int, **samples: Any) -> tuple[Any, int, int]:
    """Every sample of ``full`` positions as ``full / length`` samples of their own, each a part of it, and how many
    tokens they have, before and after. First come all samples' first parts, then their second ones, and so on.

    Arguments and errors as those of `cut_batch`; ``length`` divides ``full``. What is one for all samples, such as a
    mask ``[1, 1, full, full]``, becomes one for each; what has no positions goes with each part."""
    samples = {**samples, "full": full, "exact": True}
    parts = [cut_batch(batch, length, start, **samples) for start in range(0, full, length)]
    if len(parts) == 1:
        return parts[0]
    found, read = leaves(batch), parts[0][1]
    split = [[leaf.value for leaf in leaves(part)] for part, _, _ in parts]
    joined = (_joined(leaf, values, read // full) for leaf, *values in zip(found, *split, strict=True))
    return rebuilt(batch, joined), read, sum(after for _, _, after in parts)


def _joined(leaf: Leaf, parts: list[Any], rows: int) -> Any:
    whole, first = leaf.value, parts[0]
    if not torch.is_tensor(whole) or whole.dim() == 0 or (leaf.name in POSITION_NAMES and whole.dim() == 1):
        return first  # the same for every part
    if first.shape != whole.shape and whole.shape[0] == 1:
        return torch.cat([part.expand(rows, *part.shape[1:]) for part in parts])
    second = leaf.name in POSITION_NAMES and whole.dim() == 3 and whole.shape[1] == rows > 1  # [3, batch, sequence]
    if whole.shape[0] == rows and not (second and first.shape[2] != whole.shape[2]):
        return torch.cat(parts)
    if first.shape != whole.shape:
        said = f"{leaf.where} has the shape {list(whole.shape)}, whose first dimension is not the {rows} samples"
        raise ConfigError(f'sequence_length_warmup.tokens_per_step: "constant" and {said}; leave one of the two out')
    return whole


def positions(leaf: Leaf, sides: Sides) -> dict[int, Side] | None:
    """The dimensions of a tensor that are positions, and of which side; None: one may be, and it is not known."""
    value = leaf.value
    if not torch.is_tensor(value) or not _WHOLE.isdisjoint(leaf.keys):
        return {}
    name, side = sides.of(leaf.name) if leaf.name is not None else (None, sides.known[0])
    if side is None and name in _KNOWN:
        return {}
    by_shape = leaf.name is None or sides.by_shape
    if side is not None and (found := _dimensions(value, name, side, by_shape=by_shape)):
        return dict.fromkeys(found, side)
    for other in sides.known:  # a first dimension as long as there are samples may be as long as they are
        rows_first = value.dim() > 0 and value.shape[0] == other.rows
        if other.positions in (value.shape[1:] if rows_first else value.shape):
            return None
    return {}


def find_sides(
    found: list[Leaf], *, micro_batch: int | None = None, encoder_decoder: bool = False, full: int | None = None
) -> Sides:
    """The sides of a batch with these leaves; arguments and errors as those of `cut_batch`."""
    tensors = [leaf for leaf in found if torch.is_tensor(leaf.value)]
    encoder = _side(tensors, TOKEN_NAMES)
    if any("encoder_outputs" in leaf.keys and leaf.value is not None for leaf in found):
        encoder = None  # the encoder has run, on whole samples
    decoder = _side(tensors, tuple(_DECODER + name for name in TOKEN_NAMES))
    if decoder is None and encoder_decoder:  # floats are the scores of classes
        decoder = _side([leaf for leaf in tensors if not leaf.value.is_floating_point()], LABEL_NAMES)
    if encoder is not None or decoder is not None:
        return Sides(encoder, decoder)
    if (side := _side_by_shape(tensors, micro_batch, full)) is not None:
        return Sides(side, None, by_shape=True)
    given = ", ".join(f"{leaf.where}: {describe(leaf.value)}" for leaf in found) or "none"
    if full is not None and tensors and all(leaf.name is None for leaf in tensors):
        raise _not_full(full, given)
    what = f"the model's forward has no recognisable token argument (it was given {given})"
    raise _refusal(f"{what}; name it one of {', '.join(TOKEN_NAMES)}, give integers [micro-batch, length] of one shape")


def argument_names(forward: Callable[..., Any]) -> list[str]:
    """The names of the arguments that ``forward`` takes by position, in order."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(forward).parameters.values() if p.kind in positional]


def named(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, all by name; `as_given` is the way back."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def as_given(
    names: list[str], values: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``values`` by name as the ``(args, kwargs)`` of a call like this one."""
    return tuple(values[name] for name in names[: len(args)]), {name: values[name] for name in kwargs}


def is_encoder_decoder(module: torch.nn.Module) -> bool:
    """Whether the labels of a model are its decoder's: it can be given decoder_input_ids, or its config says so."""
    config = getattr(module, "config", None)
    return f"{_DECODER}input_ids" in argument_names(module.forward) or bool(getattr(config, "is_encoder_decoder", 0))


class ByName:
    """The `Shorten` of a model whose ``forward`` names its arguments; the signature is read once."""

    #: forward passes that look at what is the same in all batches: which dimension is the batch, and on a GPU, which
    #: waits for it, whether position ids begin anew
    LOOKS = 8

    def __init__(self, forward: Callable[..., Any], *, fold: int | None = None, **samples: Any):
        """``fold``: samples have so many positions, and are folded. ``samples``: arguments of `cut_batch`,
        ``micro_batch`` and ``encoder_decoder``."""
        self.names, self._samples, self._looks = argument_names(forward), samples, 0
        self._cut_by: Any = cut_batch if fold is None else functools.partial(fold_batch, full=fold)

    def __call__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], length: int
    ) -> tuple[tuple[Any, ...], dict[str, Any], int, int]:
        if len(args) > len(self.names):
            said = f"forward takes its {len(args)} arguments by position (*args), so without names"
            raise _refusal(f"{said}; pass them by keyword")
        given, look = named(self.names, args, kwargs), self._looks < self.LOOKS
        cut, before, after = self._cut_by(given, length, settled=not look, **self._samples)
        refuse_restarts(leaves(given), POSITION_NAMES, look=look)
        self._looks += 1
        return *as_given(self.names, cut, args, kwargs), before, after


def refuse_unknown(leaf: Leaf, sides: Sides) -> None:
    """Raise the `ConfigError` for a leaf whose positions are not known."""
    side, shape = sides.known[0], list(leaf.value.shape)
    what = f"{leaf.where!r} of shape {shape} has a dimension as long as the samples in {side.name!r} ({side.positions})"
    known = f"known: {', '.join(sorted(_KNOWN))}; {_DECODER}..."
    raise _refusal(f"{what}, and whether that is positions is not known; rename it ({known})")


def _refusal(said: str) -> ConfigError:
    return ConfigError(f"sequence_length_warmup: {said}, or {_SHORTEN}")


def _side(tensors: list[Leaf], names: tuple[str, ...]) -> Side | None:
    """The side that the first of ``names`` with samples says."""
    candidates = [leaf for leaf in tensors if leaf.name in names and leaf.value.dim() >= 2]
    if not candidates:
        return None
    first = min(candidates, key=lambda leaf: names.index(leaf.name or ""))
    rows, count, *others = first.value.shape
    if len(others) > first.value.is_floating_point():  # embeddings have one more
        said = f"{first.where} has the shape {list(first.value.shape)}, and which dimension is positions is not known"
        remedy = "give [batch, sequence] (embeddings [batch, sequence, hidden])"
        raise _refusal(f"{said}, as with several codebooks; {remedy}")
    for leaf in candidates:
        if leaf.name == first.name and leaf.value.shape[1] != count:
            said = f"{first.where} has {count} positions and {leaf.where} {leaf.value.shape[1]}"
            raise _refusal(f"{said}; pad them to one length")
    return Side(first.where, rows, count)


def _side_by_shape(tensors: list[Leaf], micro_batch: int | None, full: int | None) -> Side | None:
    """Where no name is known: tensors without one by the length, then integers [micro-batch, length] of one shape."""
    fits = [leaf for leaf in tensors if leaf.value.dim() >= 2]
    if micro_batch is not None:
        fits = [leaf for leaf in fits if _is_batch(leaf.value.shape, micro_batch)]
    nameless = [leaf for leaf in fits if leaf.name is None and leaf.value.shape[1] == full != leaf.value.shape[0]]
    if nameless:  # position ids may have one row for all samples
        most = max(nameless, key=lambda leaf: leaf.value.shape[0])
        return Side(most.where, *most.value.shape[:2])
    alike = [leaf for leaf in fits if leaf.value.dim() == 2 and _is_integer(leaf.value) and leaf.value.shape[1] != 1]
    alike = [leaf for leaf in alike if leaf.name not in POSITION_NAMES and _WHOLE.isdisjoint(leaf.keys)]
    if micro_batch is None or len({leaf.value.shape for leaf in alike}) != 1:
        return None
    # labels and masks go along with tokens; without them they are of something else, such as sound or images
    return next((Side(leaf.where, *leaf.value.shape) for leaf in alike if leaf.name not in _KNOWN), None)


def _refuse_other_layout(sides: Sides, micro_batch: int, *, exact: bool) -> None:
    for side in sides.known:
        # pairs of answers are whole multiples, as many samples as fit are fewer than their tokens
        more = side.rows % micro_batch == 0 or side.rows <= side.positions
        fits = _is_batch((side.rows, side.positions), micro_batch)
        if not fits and (exact or side.positions == micro_batch or not more):
            said = f"{side.name} has the shape [{side.rows}, {side.positions}, ...]"
            remedy = "give [batch, sequence], write the micro-batch's size"
            raise _refusal(f"{said}, and train_micro_batch_size_per_gpu is {micro_batch}; {remedy}")


def _is_batch(shape: Sequence[int], micro_batch: int) -> bool:
    """Whether it is [batch, sequence, ...]; the last batch of a data set may be smaller."""
    return shape[0] == micro_batch or (shape[0] < micro_batch and shape[1] != micro_batch)


def _not_full(full: int | None, found: str) -> ConfigError:
    said = f"{full}, and a micro-batch was read with {found}"
    remedy = "read samples of exactly end_length tokens, or write that end_length"
    return ConfigError(f"sequence_length_warmup.end_length: {said}; {remedy}")


def _dimensions(value: torch.Tensor, name: str | None, side: Side, *, by_shape: bool) -> list[int]:
    """Those that are positions of ``side``; ``name`` is without prefix. None are where the place is not known."""
    shape, full = list(value.shape), side.positions
    last = len(shape) - 1
    if name in POSITION_NAMES:
        if shape and shape[-1] == full:
            return [last]
        return [1] if shape[:2] == [side.rows, full] and last == 2 else []
    padding = last == 1 and shape[1] == full and (shape[0] != full or side.rows == full)  # a row for each sample
    if name in MASK_NAMES and not padding:
        return [dimension for dimension in range(max(last - 1, 0), last + 1) if shape[dimension] == full]
    if name in MASK_NAMES or name in _ALONG:
        return [1] if last >= 1 and shape[1] == full else []
    if not by_shape:
        return []
    if name is not None:
        return [1] if _is_integer(value) and shape == [side.rows, full] else []
    if last == 2 and shape[1:] == [full, full] and value.is_floating_point():
        return []  # a mask, or embeddings as wide as the samples are long
    if shape[-2:] == [full, full] and (last >= 2 or side.rows != full):
        return [last - 1, last]
    return [1] if last >= 1 and shape[1] == full and shape[0] in (side.rows, 1) else []


def _cut(leaf: Leaf, sides: Sides, offset: int, length: int) -> Any:
    value, where = leaf.value, positions(leaf, sides)
    if where is None:
        if any(side.kept(offset, length) < side.positions for side in sides.known):
            refuse_unknown(leaf, sides)
        return value
    for dimension, side in where.items():
        if side.kept(offset, length) < side.positions:
            value = value.narrow(dimension, offset, side.kept(offset, length))
    if value is leaf.value:
        return value
    if offset and leaf.name in POSITION_NAMES:
        along = max(where)
        value = _rebased(value.movedim(along, -1)).movedim(-1, along)
    elif offset and leaf.name is None and value.dim() == 2 and _is_integer(value):
        # positions if in the whole samples every row counts from 0; told where they lie: nobody waits for the answer
        counts = (leaf.value == _count(leaf.value)).all()
        value = torch.where(counts, _count(value).to(value.dtype), value)
    return value.contiguous()


def _rebased(positions: torch.Tensor) -> torch.Tensor:
    """Position ids [..., length] counted from the span's first token on; where a document begins anew, they stay."""
    count = _count(positions)
    return torch.where(positions - positions[..., :1] == count, count.to(positions.dtype), positions)


def _count(like: torch.Tensor) -> torch.Tensor:
    """0, 1, 2, ... along the last dimension."""
    return torch.arange(like.shape[-1], device=like.device)


def _is_integer(value: torch.Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
