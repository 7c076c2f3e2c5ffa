"""Cutting a span out of a micro-batch, by name and nested; the mask of fragments; lengthening for the preflight."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from ds_plugin.core.errors import ConfigError
from ds_plugin.deepspeed_engine.preflight import lengthened
from ds_plugin.sequence_length_warmup.batches import Batches, WholeBatches
from ds_plugin.sequence_length_warmup.carry import TokenSpan
from ds_plugin.sequence_length_warmup.mask import check_model, fragment_mask
from ds_plugin.sequence_length_warmup.nested import leaves, rebuilt
from ds_plugin.sequence_length_warmup.slicing import cut_batch

TOKENS = torch.arange(100, 112).view(2, 6)
LABELS = TOKENS + 1
POSITIONS = torch.arange(6).expand(2, -1)


def test_a_span_of_named_arguments():
    mask = torch.arange(36).view(1, 1, 6, 6)
    batch = {"tokens": TOKENS, "labels": LABELS, "position_ids": POSITIONS, "attention_mask": mask, "scale": 2}
    cut, before, after = cut_batch(batch, 3, 2, full=6, exact=True)
    assert (before, after) == (12, 6)
    assert cut["tokens"].tolist() == [[102, 103, 104], [108, 109, 110]]
    assert cut["labels"].tolist() == [[103, 104, 105], [109, 110, 111]]
    assert cut["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert cut["attention_mask"].tolist() == [[[[14, 15, 16], [20, 21, 22], [26, 27, 28]]]]
    assert cut["scale"] == 2


def test_positions_that_restart_with_a_document_stay():
    positions = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 0, 1, 2, 3]])
    cut, *_ = cut_batch({"tokens": TOKENS, "position_ids": positions}, 4, 1)
    assert cut["position_ids"].tolist() == [[0, 1, 2, 0], [0, 0, 1, 2]]
    for axes in (positions.expand(3, -1, -1), positions[..., None].expand(-1, -1, 3)):  # multimodal ones
        several, *_ = cut_batch({"tokens": TOKENS, "position_ids": axes}, 4, 1)
        one = several["position_ids"][0] if axes.shape[0] == 3 else several["position_ids"][..., 2]
        assert one.tolist() == cut["position_ids"].tolist() and several["position_ids"].is_contiguous()


def test_a_span_of_a_pipelines_micro_batch():
    weights = torch.ones(2, 6)
    batch = ((POSITIONS[:1], TOKENS, POSITIONS, torch.ones(2, 1, 6, 6)), [LABELS, weights, torch.tensor([1, 2])])
    cut, before, after = cut_batch(batch, 2, 4, full=6, exact=True, micro_batch=2)
    (shared, tokens, positions, mask), (labels, weights, classes) = cut
    assert shared.tolist() == [[0, 1]] and classes.tolist() == [1, 2] and (before, after) == (12, 4)
    assert tokens.tolist() == [[104, 105], [110, 111]] and labels.tolist() == [[105, 106], [111, 112]]
    assert positions.tolist() == [[0, 1], [0, 1]]  # they count from 0 in every row: positions
    assert mask.shape == (2, 1, 2, 2) and weights.shape == (2, 2)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_what_is_no_positions_stays_and_ids_keep_their_dtype(dtype):
    """Two tensors differ in one entry from positions; of int8 there are more than it can count."""
    tokens, ids = torch.zeros(2, 300).long(), (torch.arange(300) % 128).to(dtype).expand(2, -1)
    other = torch.arange(300).to(torch.int64).repeat(2, 1)
    other[1, 299] = 0
    positions = torch.arange(300).expand(2, -1) if dtype == torch.int64 else ids
    cut, *_ = cut_batch((tokens, positions, other), 2, 7, full=300, exact=True, micro_batch=2)
    assert cut[1].tolist() == ([[0, 1]] * 2 if dtype == torch.int64 else [[7, 8]] * 2) and cut[1].dtype == dtype
    assert cut[2].tolist() == [[7, 8], [7, 8]]
    named, *_ = cut_batch({"tokens": tokens, "position_ids": ids}, 2, 7)
    assert named["position_ids"].tolist() == [[0, 1]] * 2 and named["position_ids"].dtype == dtype


NAMED = {"tokens": TOKENS, "labels": LABELS, "position_ids": POSITIONS}
NESTED = ((TOKENS, POSITIONS, POSITIONS[:1]), (LABELS, LABELS != 0))


@pytest.mark.parametrize("batch", [NAMED, NESTED], ids=["named", "a pipeline's"])
def test_the_training_thread_reads_no_tensor_of_a_batch(batch):
    """On an accelerator it would wait there. These have a shape and no contents: every way of reading one raises."""
    empty = rebuilt(batch, iter([leaf.value.to("meta") for leaf in leaves(batch)]))
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool((leaves(empty)[0].value == 0).all())
    engine = SimpleNamespace(global_steps=0, gradient_accumulation_steps=lambda: 1)
    stub = SimpleNamespace(
        engine=engine, loads=0, carries=True, open_windows=[],
        span=TokenSpan(0, 0, 2), count=lambda *counted: None,
    )  # fmt: skip
    stub.cut_samples = lambda batch, exact: cut_batch(
        batch, stub.span.length, stub.span.offset, full=6, exact=exact, micro_batch=2
    )
    read = Batches(stub, lambda n: itertools.repeat(empty))
    for step, offset in enumerate((0, 2, 4)):
        engine.global_steps, stub.span = step, TokenSpan(step, offset, 2)
        found = leaves(next(read))
        assert {leaf.value.shape[1] for leaf in found} == {2} and all(leaf.value.is_meta for leaf in found)


@pytest.mark.parametrize(("to", "first"), [(4, 4), (5, 5), (1, 1)])
def test_whole_batches_go_back_with_a_checkpoint(to, first):
    """One step back, and none within an open accumulation step, look like going on: loads are counted."""
    engine = SimpleNamespace(global_steps=0, gradient_accumulation_steps=lambda: 1)
    loads = 0
    read = WholeBatches(engine, itertools.count, lambda: loads)
    for step in range(5):
        engine.global_steps = step
        assert next(read) == step
    engine.global_steps = 5  # a micro-batch ahead
    assert next(read) == 5
    engine.global_steps, loads = to, 1
    assert [next(read), next(read)] == [first, first + 1]


def test_samples_of_another_length_are_refused():
    with pytest.raises(ConfigError, match="end_length: 8.*with 6"):
        cut_batch({"tokens": TOKENS}, 4, full=8, exact=True)
    with pytest.raises(ConfigError, match=r"end_length: 8.*\[2, 6\]"):
        cut_batch((TOKENS, LABELS), 4, full=8, exact=True)


@pytest.mark.parametrize(
    ("shape", "floating"), [((6, 2), False), ((6,), False), ((3, 2, 6), False), ((2, 6, 6), True), ((2, 1, 1, 6), True)]
)
def test_what_has_no_name_and_no_known_place_is_refused(shape, floating):
    other = torch.zeros(shape) if floating else torch.zeros(shape).long()
    with pytest.raises(ConfigError, match=r"\[1\]\[0\]' of shape.*'\[0\]' \(6\)"):
        cut_batch((TOKENS, [other]), 4, full=6, exact=True, micro_batch=2)


def test_a_model_is_refused_a_mask_without_megatron_core_too(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match='"mask" and how a Linear, no megatron-core GPT, takes a mask is not known'):
        check_model(torch.nn.Linear(2, 2))


def test_fragments_see_themselves_and_what_came_before():
    # five tokens in fragments of two, the last one shorter; 1: masked out
    assert fragment_mask(5, 2)[0, 0].int().tolist() == [
        [0, 1, 1, 1, 1],
        [0, 0, 1, 1, 1],
        [1, 1, 0, 1, 1],
        [1, 1, 0, 0, 1],
        [1, 1, 1, 1, 0],
    ]


def test_lengthened_arguments_have_the_full_shape():
    short = {"tokens": TOKENS[:, :4], "attention_mask": torch.ones(2, 1, 4, 4), "labels": LABELS[:, :4], "k": None}
    grown = lengthened(short, 6, micro_batch=2)
    assert {name: list(value.shape) for name, value in grown.items() if value is not None} == {
        "tokens": [2, 6], "attention_mask": [2, 1, 6, 6], "labels": [2, 6],
    }  # fmt: skip
    assert grown["tokens"][0].tolist() == [100, 101, 102, 103, 100, 101]
    with pytest.raises(ConfigError, match="'bias' of shape"):
        lengthened({**short, "bias": torch.ones(4, 4)}, 6)
    pair = lengthened({"input_ids": TOKENS[:, :4], "labels": LABELS[:, :3]}, 6, encoder_decoder=True)
    assert pair["input_ids"].shape == (2, 6) and pair["labels"].shape == (2, 3)
