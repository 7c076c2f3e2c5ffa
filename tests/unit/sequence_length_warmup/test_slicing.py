"""Cutting batches by name and by shape; what is refused instead."""

import collections

import pytest
import torch

from ds_plugin.core.errors import ConfigError
from ds_plugin.sequence_length_warmup.schedule import layout_multiple
from ds_plugin.sequence_length_warmup.slicing import ByName, cut_batch, fold_batch

TOKENS = torch.arange(3 * 8).reshape(3, 8)
SQUARE = torch.arange(64).reshape(8, 8)
IDS = torch.arange(8)


def shapes(batch):
    return {name: tuple(value.shape) for name, value in batch.items() if torch.is_tensor(value)}


def test_everything_with_a_sequence_is_cut_to_the_same_prefix():
    arguments = {
        "input_ids": TOKENS,
        "position_ids": IDS.expand(1, 8),
        "attention_mask": torch.ones(3, 8),
        "labels": TOKENS + 1,
        "loss_mask": torch.ones(3, 8),
        "class_id": torch.tensor([1, 2, 3]),
        "scale": 2.0,
        "decoder_input": None,
    }
    cut, before, after = cut_batch(arguments, 5)
    assert (before, after) == (24, 15)
    assert torch.equal(cut["input_ids"], torch.tensor([[0, 1, 2, 3, 4], [8, 9, 10, 11, 12], [16, 17, 18, 19, 20]]))
    assert torch.equal(cut["labels"], cut["input_ids"] + 1)
    assert shapes(cut) == {
        "input_ids": (3, 5), "position_ids": (1, 5), "attention_mask": (3, 5), "labels": (3, 5), "loss_mask": (3, 5),
        "class_id": (3,),
    }  # fmt: skip
    assert cut["class_id"] is arguments["class_id"] and cut["scale"] == 2.0 and cut["decoder_input"] is None
    assert arguments["input_ids"].shape == (3, 8)
    cut["labels"].view(-1)  # as losses do
    assert all(value.is_contiguous() for value in cut.values() if torch.is_tensor(value))


# name, shape (of 3 samples of 8, or of 8 samples of 8), shape after the cut to 5
PLACES = [
    ("attention_mask", (1, 1, 8, 8), (1, 1, 5, 5)),
    ("attention_mask", (3, 1, 8, 8), (3, 1, 5, 5)),
    ("attention_mask", (3, 8, 8), (3, 5, 5)),
    ("attention_mask", (8, 8), (5, 5)),
    ("attention_mask", (3, 1, 1, 8), (3, 1, 1, 5)),
    ("attention_mask", (1, 8), (1, 5)),
    ("position_ids", (8,), (5,)),
    ("position_ids", (3, 3, 8), (3, 3, 5)),
    ("position_ids", (3, 8, 3), (3, 5, 3)),
    ("cache_position", (8,), (5,)),
    ("inputs_embeds", (3, 8, 8), (3, 5, 8)),
    ("bbox", (3, 8, 4), (3, 5, 4)),
    ("labels", (3,), (3,)),
    ("labels", (3, 4), (3, 4)),
    ("pixel_values", (3, 3, 8, 8), (3, 3, 8, 8)),
    ("past_key_values", (3, 2, 4, 8), (3, 2, 4, 8)),  # of heads as wide as the samples are long
    ("head_mask", (2, 8), (2, 8)),
    ("encoder_hidden_states", (3, 8, 16), (3, 8, 16)),
    ("encoder_attention_mask", (3, 8), (3, 8)),  # of the samples behind encoder_hidden_states
]
SQUARE_PLACES = [
    ("attention_mask", (8, 8), (8, 5)),  # a padding mask, one row for each sample
    ("position_ids", (8,), (5,)),
    ("position_ids", (3, 8, 8), (3, 8, 5)),
    ("labels", (8, 8), (8, 5)),
    ("labels", (8,), (8,)),  # one class for each sample
    ("class_id", (8,), (8,)),
    ("labels", (8, 1), (8, 1)),  # as many samples as tokens in each, by chance
    ("image_sizes", (8, 2), (8, 2)),
]


@pytest.mark.parametrize(
    ("tokens", "name", "shape", "expected"),
    [(TOKENS, *case) for case in PLACES] + [(SQUARE, *case) for case in SQUARE_PLACES],
)
def test_each_name_has_its_positions(tokens, name, shape, expected):
    value = torch.arange(torch.Size(shape).numel()).reshape(shape)
    value = value.float() if name.endswith("embeds") else value
    cut, *_ = cut_batch({"input_ids": tokens, name: value}, 5, micro_batch=len(tokens))
    assert torch.equal(cut[name], value[tuple(slice(size) for size in expected)])
    assert cut["input_ids"].shape == (len(tokens), 5)


def test_full_length_changes_nothing():
    strange = torch.zeros(8, 2)  # nothing is cut, so that it need not be known
    cut, before, after = cut_batch({"tokens": TOKENS.T.contiguous().T, "strange": strange}, 8)
    assert torch.equal(cut["tokens"], TOKENS) and before == after == 24 and cut["strange"] is strange


def test_samples_shorter_than_the_step_are_taken_as_they_are():
    cut, before, after = cut_batch({"input_ids": TOKENS[:, :4], "attention_mask": torch.ones(3, 4)}, 5, micro_batch=3)
    assert shapes(cut) == {"input_ids": (3, 4), "attention_mask": (3, 4)} and before == after == 12


def test_there_may_be_other_samples_than_the_micro_batch():
    pairs = torch.arange(48).reshape(6, 8)  # of answers, one better than the other, as reward models read them
    cut, before, after = cut_batch({"input_ids": pairs, "attention_mask": pairs}, 5, micro_batch=3)
    assert shapes(cut) == {"input_ids": (6, 5), "attention_mask": (6, 5)} and (before, after) == (48, 30)
    with pytest.raises(ConfigError, match="train_micro_batch_size_per_gpu is 3"):  # carried tokens are counted in them
        cut_batch({"input_ids": pairs}, 5, micro_batch=3, full=8, exact=True)
    # the last samples of a data set, padded to as many tokens as there are samples otherwise
    shorten = ByName(lambda input_ids: None, micro_batch=8)
    with pytest.raises(ConfigError, match="train_micro_batch_size_per_gpu is 8"):
        shorten((TOKENS,), {}, 5)
    for _ in range(ByName.LOOKS):
        shorten((SQUARE,), {}, 5)
    assert shorten((TOKENS,), {}, 5)[2:] == (24, 15)


def test_both_sides_of_an_encoder_decoder_are_cut_each_to_its_own():
    targets = torch.arange(3 * 4).reshape(3, 4)
    arguments = {
        "input_ids": TOKENS, "attention_mask": torch.ones(3, 8), "labels": targets,
        "decoder_attention_mask": torch.ones(3, 4), "decoder_input_ids": targets,
    }  # fmt: skip
    for length, source, target in ((6, 6, 4), (3, 3, 3), (9, 8, 4)):
        cut, before, after = cut_batch(arguments, length)
        assert shapes(cut) == {
            "input_ids": (3, source), "attention_mask": (3, source), "labels": (3, target),
            "decoder_attention_mask": (3, target), "decoder_input_ids": (3, target),
        }  # fmt: skip
        assert (before, after) == (24, 3 * source)
    # labels alone are the decoder's where the model says so; scores of classes never are
    both = {"input_ids": TOKENS, "labels": targets}
    assert cut_batch(both, 3, encoder_decoder=True)[0]["labels"].shape == (3, 3)
    assert cut_batch(both, 3)[0]["labels"].shape == (3, 4)
    scores = {"input_ids": TOKENS, "labels": targets.float()}
    assert cut_batch(scores, 3, encoder_decoder=True)[0]["labels"].shape == (3, 4)
    # with what the encoder has made of whole samples, the decoder's side is cut alone
    ready = {"encoder_outputs": (torch.zeros(3, 8, 2),), "attention_mask": torch.ones(3, 8), "labels": TOKENS}
    cut, before, after = cut_batch(ready, 3, encoder_decoder=True)
    assert cut["encoder_outputs"] is ready["encoder_outputs"] and (before, after) == (24, 9)
    assert shapes(cut) == {"attention_mask": (3, 8), "labels": (3, 3)}


def test_integers_of_one_shape_are_tokens_under_any_name():
    batch = {"text": TOKENS, "next_text": TOKENS + 1, "attention_mask": torch.ones(3, 8), "kind": torch.zeros(3)}
    cut, before, after = cut_batch(batch, 5, micro_batch=3)
    assert cut["next_text"].tolist() == (TOKENS[:, :5] + 1).tolist() and cut["text"].is_contiguous()
    assert cut["attention_mask"].shape == (3, 5) and cut["kind"] is batch["kind"] and (before, after) == (24, 15)
    last = {"text": TOKENS[:2], "next_text": TOKENS[:2]}  # of a data set
    assert cut_batch(last, 5, micro_batch=3)[2] == 10


def test_a_nested_batch_keeps_its_kinds():
    Pair = collections.namedtuple("Pair", ["inputs", "labels"])
    inner = collections.UserDict(input_ids=TOKENS, attention_mask=torch.ones(3, 8))
    names = ["a", "b", "c"]
    cut, *_ = cut_batch({"batch": inner, "names": names, "labels": Pair({"k": None}, [TOKENS])}, 5)
    assert type(cut["batch"]) is collections.UserDict and cut["batch"]["input_ids"].shape == (3, 5)
    assert cut["names"] is names and type(cut["labels"]) is Pair and cut["labels"].labels[0].shape == (3, 5)
    assert inner["input_ids"] is TOKENS


PACKED = ["cu_seq_lens_q", "cu_seqlens", "cu_doc_len", "max_length_q", "max_seqlen_k", "max_seqlens", "seq_idx"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"pixels": TOKENS}, ["no recognisable token argument", "pixels: torch.int64 [3, 8]", "input_ids", "shorten="]),
        ({"input_ids": torch.arange(8)}, ["no recognisable token argument", "[8]"]),
        ({"input_ids": TOKENS, "packed_seq_params": object()}, ["packed_seq_params", "one document a row"]),
        ({"input_ids": TOKENS, "extra": TOKENS}, ["'extra'", "[3, 8]", "'input_ids' (8)", "shorten="]),
        ({"input_ids": SQUARE[:3], "bias": torch.ones(3, 8)}, ["'bias'", "[3, 8]"]),
        ({"input_ids": TOKENS, "bias": torch.ones(2, 8, 8)}, ["'bias'", "[2, 8, 8]"]),
        ({"input_ids": TOKENS, "rotary": (torch.ones(8, 4),)}, ["'rotary[0]'", "[8, 4]"]),
        ({"input_ids": TOKENS, "labels": torch.ones(8, 3)}, ["'labels'", "[8, 3]"]),
        ({"input_ids": TOKENS, "labels": torch.ones(8)}, ["'labels'", "[8]"]),
        ({"input_ids": TOKENS, "decoder_input": torch.ones(8, 3, 4)}, ["'decoder_input'", "[8, 3, 4]"]),
        ({"input_ids": TOKENS.T}, ["input_ids", "[8, 3, ...]", "train_micro_batch_size_per_gpu is 3"]),
        ({"input_ids": torch.zeros(10, 8).long()}, ["input_ids", "[10, 8, ...]", "per_gpu is 3"]),
        ({"input_ids": torch.zeros(3, 4, 8).long()}, ["[3, 4, 8]", "codebooks"]),
        ({"text": TOKENS, "other": TOKENS[:, :4]}, ["no recognisable token argument", "of one shape"]),
        # labels and masks alone are of what is no text: a transcript, frames of sound
        ({"input_values": torch.ones(3, 90), "labels": TOKENS}, ["no recognisable token argument", "labels"]),
        ({"input_values": torch.ones(3, 8), "attention_mask": TOKENS}, ["no recognisable token argument"]),
        ({"text": TOKENS, "weights": torch.ones(3, 8)}, ["'weights'", "[3, 8]", "'text'"]),
        ({"a": {"input_ids": TOKENS}, "b": {"input_ids": TOKENS[:, :4]}}, ["a.input_ids has 8", "b.input_ids 4"]),
        *[({"input_ids": TOKENS, name: torch.zeros(2)}, [name, "packed", "one document a row"]) for name in PACKED],
        ({"input_ids": TOKENS, "max_length_q": 20}, ["max_length_q (int)"]),
        *[
            ({"input_ids": TOKENS, "labels": TOKENS, name: count}, [name, "model_accepts_loss_kwargs = False"])
            for name in ("num_items_in_batch", "global_num_tokens", "token_count")
            for count in (torch.tensor(48), 48)
        ],
    ],
)
def test_what_cannot_be_cut_safely_is_refused(arguments, parts):
    known = {} if {"pixels"} & set(arguments) else {"micro_batch": 3}
    with pytest.raises(ConfigError) as caught:
        cut_batch(arguments, 5, **known)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_what_only_sounds_alike_is_not_refused():
    settings = {
        "num_logits_to_keep": 0, "max_length": 8, "num_hashes": 2, "seq_idx": None, "num_items_in_batch": None,
        "num_labels": 3, "return_num_tokens": True,
    }  # fmt: skip
    cut, *_ = cut_batch({"input_ids": TOKENS, "labels": TOKENS, **settings}, 5)
    assert {name: cut[name] for name in settings} == settings
    # one label for each sample, or for each class: as many after the cut as before
    for labels in (torch.arange(3), torch.zeros(3, 4)):
        cut, *_ = cut_batch({"input_ids": TOKENS, "labels": labels, "num_items_in_batch": torch.tensor(3)}, 5)
        assert cut["labels"] is labels


def test_positional_arguments_get_their_names_from_forward():
    def forward(x, y, flag=False):
        raise AssertionError("only its signature is read")

    args, kwargs, before, after = ByName(forward)((TOKENS, TOKENS + 1), {"flag": True}, 2)
    assert [tuple(a.shape) for a in args] == [(3, 2), (3, 2)] and kwargs == {"flag": True}
    assert (before, after) == (24, 6)


def test_nameless_arguments_are_refused():
    with pytest.raises(ConfigError, match=r"\*args"):
        ByName(lambda *args: None)((TOKENS,), {}, 2)


def test_documents_in_one_row_are_refused():
    def cut(positions, tokens=TOKENS[:1], **more):
        return ByName(lambda input_ids: None)((), {"input_ids": tokens, "position_ids": positions, **more}, 4)

    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    for positions in (packed, packed[0]):
        with pytest.raises(ConfigError, match="position_ids .* begins anew within the one row"):
            cut(positions)
    cut(IDS[None]), cut(IDS), cut(torch.tensor([[0, 1, 2, 2, 2, 2, 3, 4]]))  # parts of an image share a position
    cut(packed.expand(2, -1), TOKENS[:2])  # rows of one length, as in pretraining: each has a prefix
    cut(packed, attention_mask=torch.ones(1, 1, 8, 8))  # the batch says itself what sees what
    for mask in (torch.ones(1, 8), torch.tensor([[1, 1, 1, 2, 2, 2, 2, 2]])):  # or the number of each document
        with pytest.raises(ConfigError, match="begins anew"):
            cut(packed, attention_mask=mask)
    cut(torch.tensor([[1, 1, 1, 0, 1, 2, 3, 4]]), attention_mask=torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]))  # padding
    cut(torch.zeros(3, 1, 8).long())  # of images, in multimodal rotary embeddings


class _Config:
    tensor_model_parallel_size = 4
    sequence_parallel = False


@pytest.mark.parametrize(("sequence_parallel", "expected"), [(False, 1), (True, 4)])
def test_layout_multiple(sequence_parallel, expected):
    module = torch.nn.Module()
    assert layout_multiple(module) == 1
    module.config = _Config()
    module.config.sequence_parallel = sequence_parallel
    assert layout_multiple(module) == expected


def test_samples_are_folded_into_more_and_shorter_ones():
    """[2, 8] as [4, 4]: first parts of all samples, then second ones; no token is lost, none comes twice."""
    tokens = torch.arange(16).view(2, 8)
    hidden = torch.ones(8, 8, dtype=torch.bool).triu(1)
    documents = torch.stack([hidden, hidden | (torch.arange(8)[:, None] > 5) & (torch.arange(8) < 6)])[:, None]
    batch = {
        "input_ids": tokens, "labels": tokens + 1, "position_ids": torch.arange(8)[None],
        "cache_position": torch.arange(8), "attention_mask": documents, "mask": hidden[None, None],
        "weight": torch.tensor([1.0, 2.0]), "scale": 3.0,
    }  # fmt: skip
    found, before, after = fold_batch(batch, 4, full=8)
    assert (before, after) == (16, 16)
    assert found["input_ids"].tolist() == [[0, 1, 2, 3], [8, 9, 10, 11], [4, 5, 6, 7], [12, 13, 14, 15]]
    assert torch.equal(found["labels"], found["input_ids"] + 1)
    assert found["position_ids"].tolist() == [[0, 1, 2, 3]] * 4 and found["cache_position"].tolist() == [0, 1, 2, 3]
    assert [torch.equal(mask[0], hidden[:4, :4]) for mask in found["attention_mask"]] == [True, True, True, False]
    assert torch.equal(found["attention_mask"][3, 0], documents[1, 0, 4:, 4:])
    assert found["mask"].shape == (4, 1, 4, 4) and torch.equal(found["mask"][3, 0], hidden[:4, :4])
    assert found["weight"].tolist() == [1.0, 2.0, 1.0, 2.0] and found["scale"] == 3.0
    assert all(value.is_contiguous() for value in found.values() if torch.is_tensor(value))
    assert fold_batch(batch, 8, full=8)[0]["input_ids"] is tokens
    nested = ((tokens, torch.arange(8).expand(2, -1)), tokens + 1)
    (ids, positions), labels = fold_batch(nested, 2, full=8, micro_batch=2)[0]
    assert ids.shape == labels.shape == (8, 2) and positions.tolist() == [[0, 1]] * 8
    assert ids[:2].tolist() == [[0, 1], [8, 9]]
    with pytest.raises(ConfigError, match="8, and a micro-batch was read with 6 tokens in each of its 2 samples"):
        fold_batch({"input_ids": tokens[:, :6]}, 4, full=8)


@pytest.mark.parametrize("rows", [2, 3])
def test_positions_of_images_are_not_folded(rows):
    """Multimodal rotary embeddings' [3, rows, length]: joined along the first dimension they would be of other samples,
    left as they are of another length."""
    tokens = torch.arange(rows * 8).view(rows, 8)
    positions = torch.arange(8).expand(3, rows, 8)
    with pytest.raises(ConfigError, match=r"position_ids has the shape \[3, \d, 8\].* not the \d samples"):
        fold_batch({"input_ids": tokens, "position_ids": positions}, 4, full=8, micro_batch=rows)
    features = {"input_ids": tokens, "features": torch.ones(5, 7)}  # no sequence: as it is
    assert fold_batch(features, 4, full=8, micro_batch=rows)[0]["features"] is features["features"]
