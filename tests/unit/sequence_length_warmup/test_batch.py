"""Shortening by argument name."""

import pytest
import torch

from ds_plugin.errors import ConfigError
from ds_plugin.sequence_length_warmup.batch import by_name, shorten_arguments
from ds_plugin.sequence_length_warmup.scheduler import layout_multiple

TOKENS = torch.arange(3 * 8).reshape(3, 8)


def test_everything_with_a_sequence_is_cut_to_the_same_prefix():
    arguments = {
        "input_ids": TOKENS,
        "position_ids": torch.arange(8).expand(1, 8),
        "attention_mask": torch.ones(3, 8),
        "labels": TOKENS + 1,
        "loss_mask": torch.ones(3, 8),
        "class_id": torch.tensor([1, 2, 3]),
        "scale": 2.0,
        "decoder_input": None,
    }
    cut, before, after = shorten_arguments(arguments, 5)
    assert (before, after) == (24, 15)
    assert torch.equal(cut["input_ids"], torch.tensor([[0, 1, 2, 3, 4], [8, 9, 10, 11, 12], [16, 17, 18, 19, 20]]))
    assert torch.equal(cut["labels"], cut["input_ids"] + 1)
    assert {name: tuple(cut[name].shape) for name in ("position_ids", "attention_mask", "loss_mask")} == {
        "position_ids": (1, 5),
        "attention_mask": (3, 5),
        "loss_mask": (3, 5),
    }
    assert cut["class_id"] is arguments["class_id"] and cut["scale"] == 2.0 and cut["decoder_input"] is None
    assert arguments["input_ids"].shape == (3, 8)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1, 1, 8, 8), (1, 1, 5, 5)), ((3, 1, 8, 8), (3, 1, 5, 5)), ((8, 8), (5, 5)), ((3, 1, 1, 8), (3, 1, 1, 5))],
)
def test_masks_are_cut_both_ways(shape, expected):
    cut, *_ = shorten_arguments({"input_ids": TOKENS, "attention_mask": torch.ones(shape)}, 5)
    assert tuple(cut["attention_mask"].shape) == expected


def test_full_length_changes_nothing():
    cut, before, after = shorten_arguments({"tokens": TOKENS}, 8)
    assert torch.equal(cut["tokens"], TOKENS) and before == after == 24


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"pixels": TOKENS}, ["no recognisable token argument", "pixels: torch.int64 [3, 8]", "input_ids", "shorten="]),
        ({"input_ids": torch.arange(8)}, ["no recognisable token argument", "[8]"]),
        ({"input_ids": TOKENS[:, :4]}, ["end_length", "5", "samples of 4", "at most 4"]),
        ({"input_ids": TOKENS, "packed_seq_params": object()}, ["packed_seq_params", "without packed sequences"]),
        ({"input_ids": TOKENS, "extra": TOKENS}, ["'extra'", "[3, 8]", "shorten="]),
        (
            {"input_ids": torch.ones(8, 8), "attention_mask": torch.ones(8, 8)},
            ["attention mask", "[8, 8]", "[1, 1, sequence, sequence]"],
        ),
    ],
)
def test_what_cannot_be_cut_safely_is_refused(arguments, parts):
    with pytest.raises(ConfigError) as caught:
        shorten_arguments(arguments, 5)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_positional_arguments_get_their_names_from_forward():
    def forward(x, y, flag=False):
        raise AssertionError("only its signature is read")

    args, kwargs, before, after = by_name(forward)((TOKENS, TOKENS + 1), {"flag": True}, 2)
    assert [tuple(a.shape) for a in args] == [(3, 2), (3, 2)] and kwargs == {"flag": True}
    assert (before, after) == (24, 6)


def test_nameless_arguments_are_refused():
    with pytest.raises(ConfigError, match=r"\*args"):
        by_name(lambda *args: None)((TOKENS,), {}, 2)


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
