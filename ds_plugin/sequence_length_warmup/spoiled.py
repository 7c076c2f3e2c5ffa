"""What a prefix would spoil without a trace: rows of packed documents, and counts of labels. They are refused."""

import re

import torch

from ds_plugin.core.errors import ConfigError
from ds_plugin.sequence_length_warmup.nested import Leaf, describe

_PACKED = re.compile(r"cu_seq|cu_doc|max_length_|max_seqlen|seq_idx$|packed_seq_params$")
#: not num_labels, which says how many classes there are
_COUNT = re.compile(
    r"(^|_)(num_items|(num|n|total)_(valid_|loss_|label_|target_)?(tokens|targets)|(total|(num|n)_(valid|loss))_labels"
    r"|(token|label|target|item)s?_count)"
)
_UNPACK = "give padded samples, one document a row (in Hugging Face without padding_free and packing), or leave it out"


def refuse_packed(found: list[Leaf]) -> None:
    """Raises ConfigError for the lengths of documents that a collator, or a model's own packing, gives with a row."""
    for leaf in found:
        if leaf.value is not None and _PACKED.match(leaf.name or ""):
            said = "describes documents that are packed into rows, which a prefix would cut"
            raise ConfigError(f"sequence_length_warmup: {leaf.where} ({describe(leaf.value)}) {said}; {_UNPACK}")


def refuse_restarts(found: list[Leaf], names: tuple[str, ...], *, look: bool) -> None:
    """Raises ConfigError for position ids, under one of ``names``, that begin anew within the one row there is, as of
    packed documents. What a padding mask hides is not looked at; a mask of another shape says itself what sees what.
    ``look``: positions on a GPU are read too, which waits for it."""
    mask = next((leaf.value for leaf in found if leaf.name == "attention_mask" and leaf.value is not None), None)
    for leaf in found:
        value = leaf.value
        if leaf.name not in names or not torch.is_tensor(value) or not (value.is_cpu or look):
            continue
        if not value.dim() or list(value.shape[:-1]) not in ([], [1]):
            continue
        if mask is not None and (not torch.is_tensor(mask) or list(mask.shape) != [1, value.shape[-1]]):
            continue
        # back at the first position or before it: parts of an image may share one in between
        begins = (value[..., 1:] <= value[..., :-1]) & (value[..., 1:] <= value[..., :1])
        if mask is not None:
            seen = mask.to(value.device) != 0
            begins = begins & seen[:, 1:] & seen[:, :-1]
        if bool(begins.any()):
            said = "begins anew within the one row of the batch: documents are packed into it, which a prefix would cut"
            raise ConfigError(f"sequence_length_warmup: {leaf.where} {list(value.shape)} {said}; {_UNPACK}")


def refuse_counts(found: list[Leaf]) -> None:
    """Raises ConfigError for a number of labels that was taken before they were cut: it is a sum over an accumulation
    step, and often over all ranks, which one forward pass cannot mend."""
    for leaf in found:
        number = isinstance(leaf.value, (torch.Tensor, int, float)) and not isinstance(leaf.value, bool)
        if number and _COUNT.search(leaf.name or ""):
            what = f"{leaf.where} ({describe(leaf.value)}) counts the labels of the uncut batches: the loss of a short"
            remedy = "let the model take each micro-batch's mean, in Hugging Face's Trainer by"
            said = f"{what} step, divided by it, would be too small; {remedy} trainer.model_accepts_loss_kwargs = False"
            raise ConfigError(f"sequence_length_warmup: {said}")
