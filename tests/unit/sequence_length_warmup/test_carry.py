"""The carry mode's order: every token of every window once, even spanes, nothing after a sample's end."""

import json

import pytest
import torch

from ds_plugin.sequence_length_warmup.carry import CarryOrder, TokenSpan, shifts_labels


def order(interleave=1, full=64, multiple_of=8):
    return CarryOrder(full=full, multiple_of=multiple_of, interleave=interleave)


def run(order, lengths):
    found = []
    for length in lengths:
        span = order.peek(length)
        assert order.peek(length) == span  # asking does not change the answer
        order.advance(span)
        found.append((span.window, span.offset, span.length))
    return found


def test_one_window_at_a_time():
    # 64 in spanes of at most 16; then of at most 24: three even ones, 64/3 = 21.3 -> 24, 40/2 = 20 -> 24, 16;
    # then of at most 56: two of 32
    assert run(order(), [16] * 4 + [24] * 3 + [56] * 2 + [64]) == [
        (0, 0, 16), (0, 16, 16), (0, 32, 16), (0, 48, 16),
        (1, 0, 24), (1, 24, 24), (1, 48, 16),
        (2, 0, 32), (2, 32, 32),
        (3, 0, 64),
    ]  # fmt: skip


def test_windows_take_turns_and_are_drained_at_full_length():
    # three open: 0, 1, 2 are begun before 0 is gone on with; at full length what is open comes before anything new
    assert run(order(interleave=3), [16] * 5 + [32, 64, 64, 64, 64]) == [
        (0, 0, 16), (1, 0, 16), (2, 0, 16), (0, 16, 16), (1, 16, 16),
        (2, 16, 24),  # 48 left in at most 32: two of 24
        (0, 32, 32), (1, 32, 32), (2, 40, 24), (3, 0, 64),
    ]  # fmt: skip


@pytest.mark.parametrize("interleave", [1, 2, 8])
@pytest.mark.parametrize(("full", "multiple"), [(64, 8), (48, 16), (24, 1), (56, 8)])
def test_every_token_once(interleave, full, multiple):
    carry = order(interleave, full, multiple)
    lengths = [min(full, multiple * (1 + step // 7)) for step in range(300)]
    seen = {}
    for length in lengths:
        span = carry.peek(length)
        assert 0 < span.length <= max(length, full if length == full else 0)
        assert span.length % multiple == 0
        for token in range(span.offset, span.offset + span.length):
            assert (span.window, token) not in seen
            seen[span.window, token] = True
        carry.advance(span)
        assert len(carry.open) <= interleave
        assert len(seen) + carry.carried == carry.windows_read * full
    assert not carry.open  # the warmup is over
    assert set(seen) == {(window, token) for window in range(carry.windows_read) for token in range(full)}


def test_cuts_are_counted():
    found = order(interleave=3)
    run(found, [16] * 5 + [32, 64, 64, 64, 64])  # as above: 0 is cut at 16 and 32, 1 likewise, 2 at 16 and 40
    assert found.cuts == 6
    resumed = order(interleave=3)
    resumed.load_state(json.loads(json.dumps(found.state())))
    assert resumed.cuts == 6
    resumed.load_state(None)
    assert resumed.cuts == 0


def test_models_that_shift_their_labels_are_known_by_their_class():
    class LlamaForCausalLM(torch.nn.Module):
        pass

    class GPT2LMHeadModel(torch.nn.Module):
        pass

    class BertForMaskedLM(torch.nn.Module):
        pass

    found = [shifts_labels(kind()) for kind in (LlamaForCausalLM, GPT2LMHeadModel, BertForMaskedLM, torch.nn.Module)]
    assert found == [True, True, False, False]
    assert shifts_labels(torch.nn.Sequential(torch.nn.Sequential(LlamaForCausalLM())))  # wrapped


def test_state_resumes_the_order():
    first, lengths = order(interleave=4), [8, 8, 16, 24, 24, 32, 40, 64, 64]
    run(first, lengths)
    state = json.loads(json.dumps(first.state()))
    second = order(interleave=4)
    second.load_state(state)
    assert run(second, [48] * 9 + [64] * 5) == run(first, [48] * 9 + [64] * 5)
    second.load_state(None)
    assert second.peek(8) == TokenSpan(0, 0, 8) and second.carried == 0
