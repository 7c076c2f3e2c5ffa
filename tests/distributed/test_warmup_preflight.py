"""Sequence length warmup's pass at the full length before the first step: what it finds; it leaves no trace."""

import logging
import weakref

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.activation_checkpointing import checkpointing

import ds_plugin
from ds_plugin.core.errors import ConfigError
from tests.distributed import plain
from tests.distributed.warmup import section, source
from tests.harness import slow


class Dropping(plain.TinyLM):
    """With dropout, a buffer that every forward pass changes and weights that only the full length trains."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.at_full_length = torch.nn.Linear(13, 13)

    def forward(self, input_ids, labels):
        self.calls += 1
        self.lengths = [*getattr(self, "lengths", []), input_ids.shape[1]]
        hidden = torch.nn.functional.dropout(self.embedding(input_ids), 0.2, self.training)
        x = hidden + self.positions[: input_ids.shape[1]]
        x = x + self.outer(torch.nn.functional.gelu(self.inner(self.norm(x))))
        if input_ids.shape[1] == plain.LENGTH:
            x = self.at_full_length(x)
        return torch.nn.functional.cross_entropy(self.head(x).float().flatten(0, 1), labels.flatten())


def _trained(zero, precision, preflight, mode, accumulation=1, offload=False):
    get_accelerator().is_fp16_supported = lambda: True  # it asks for fast kernels, which few CPUs have
    torch.manual_seed(7)
    changes = {"preflight": preflight, "mode": mode}
    config = plain.deepspeed_config(zero, precision, accumulation, **section(**changes))
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    engine = ds_plugin.initialize(model=Dropping(), config=config)[0]
    torch.manual_seed(8)
    if mode == "carry":
        batches = ds_plugin.get_plugin(engine).batches(source)
        engine.train()
        losses = []
        for _ in range(5):
            batch = next(batches)
            loss = engine(batch["input_ids"], batch["labels"] % plain.VOCAB)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    else:
        losses = plain.train(engine, 5)
    found = losses, engine.module.calls.item(), engine.module.lengths, torch.rand(3).tolist()
    scale = getattr(engine.optimizer, "loss_scale", None)
    return *found, scale, engine.skipped_steps, plain.evaluate(engine)  # at full length: all weights


@pytest.mark.parametrize(
    ("zero", "precision", "mode", "accumulation", "offload"),
    [
        slow(0, "fp32", "truncate", 2, False),
        (0, "fp16", "truncate", 1, False),
        slow(1, "bf16", "truncate", 1, False),
        slow(1, "fp32", "truncate", 2, True),
        (2, "fp32", "carry", 1, False),
        slow(2, "bf16", "truncate", 2, True),
        slow(3, "fp32", "truncate", 1, False),
        (3, "bf16", "truncate", 2, True),
    ],
)
def test_preflight_runs_the_longest_sample_and_leaves_no_trace(workers, zero, precision, mode, accumulation, offload):
    with_it, without = (
        workers(2).run(_trained, zero, precision, preflight, mode, accumulation, offload) for preflight in (True, False)
    )
    for found, expected in zip(with_it, without, strict=True):
        (losses, calls, lengths, *others), (_, _, expected_lengths, *_) = found, expected
        assert losses == expected[0] and others == list(expected[3:]) and calls == expected[1] == 5 * accumulation
        passes = 2 if accumulation > 1 or zero == 3 else 1  # over accumulated gradients, with parameters gathered ahead
        assert lengths == [plain.LENGTH] * passes + expected_lengths and plain.LENGTH not in expected_lengths


class Embedded(plain.TinyLM):
    """Its embeddings are computed by the loop, as with soft prompts."""

    def forward(self, inputs_embeds, labels):
        x = self.norm(inputs_embeds + self.positions[: inputs_embeds.shape[1]])
        return torch.nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def _embedded(preflight):
    torch.manual_seed(7)
    engine = ds_plugin.initialize(model=Embedded(), config=plain.deepspeed_config(2, **section(preflight=preflight)))[0]
    engine.train()
    losses = []
    for step in range(2):
        tokens, labels = plain.micro_batch(step)
        loss = engine(inputs_embeds=engine.module.embedding(tokens).tanh(), labels=labels)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def _features_as_wide_as_samples_on_rank_1():
    engine = plain.make(plain.deepspeed_config(**section()))
    engine.train()
    tokens, features = torch.zeros(plain.MICRO, 3).long(), torch.zeros(plain.MICRO, (5, 3)[dist.get_rank()])
    with pytest.raises(ConfigError) as caught:
        engine(input_ids=tokens, labels=tokens, features=features)
    return str(caught.value)


def test_what_one_rank_cannot_lengthen_for_the_preflight_is_said_on_all(workers):
    first, second = workers(2).run(_features_as_wide_as_samples_on_rank_1)
    assert first == second and "'features' of shape [2, 3]" in first and '"preflight": false' in first


def test_the_preflight_leaves_the_graph_of_embeddings_to_the_step(workers):
    assert workers(1).run(_embedded, True) == workers(1).run(_embedded, False)


class TooLarge(plain.TinyLM):
    def forward(self, input_ids, labels):
        if input_ids.shape[1] == plain.LENGTH:
            activation = self.embedding(input_ids)
            self.activation = weakref.ref(activation)
            raise torch.OutOfMemoryError("Tried to allocate 9 GiB")
        return super().forward(input_ids, labels)


def _out_of_memory():
    engine = ds_plugin.initialize(model=TooLarge(), config=plain.deepspeed_config(1, **section()))[0]
    try:
        plain.train(engine, 1)
    except torch.OutOfMemoryError as error:
        return error.__notes__, engine.module.activation() is None
    return None


def test_an_out_of_memory_of_the_preflight_says_so(workers):
    [(notes, freed)] = workers(1).run(_out_of_memory)
    assert freed  # though the error is still at hand
    assert f"a step at the full length of {plain.LENGTH} tokens, does not fit" in notes[0]
    assert "train_micro_batch_size_per_gpu" in notes[0]


class Checkpointing(plain.TinyLM):
    def forward(self, input_ids, labels):
        self.lengths = [*getattr(self, "lengths", []), input_ids.shape[1]]
        x = self.embedding(input_ids) + self.positions[: input_ids.shape[1]]
        x = torch.utils.checkpoint.checkpoint(lambda h: h + self.outer(self.inner(h)), x, use_reentrant=True)
        return torch.nn.functional.cross_entropy(self.head(x).float().flatten(0, 1), labels.flatten())


def _checkpointing(preflight):
    torch.manual_seed(7)
    config = plain.deepspeed_config(1, **section(preflight=preflight))
    engine = ds_plugin.initialize(model=Checkpointing(), config=config)[0]
    return plain.train(engine, 4), engine.module.lengths


class Streams(plain.TinyLM):
    """Drops out by a stream of DeepSpeed's own random states, as tensor-parallel layers do."""

    def forward(self, input_ids, labels):
        x = self.embedding(input_ids) + self.positions[: input_ids.shape[1]]
        with checkpointing.get_cuda_rng_tracker().fork("tensor parallel"):
            x = torch.nn.functional.dropout(x, 0.3)
        return torch.nn.functional.cross_entropy(self.head(x).float().flatten(0, 1), labels.flatten())


def _streams(preflight):
    checkpointing.get_cuda_rng_tracker().reset()
    checkpointing.get_cuda_rng_tracker().add("tensor parallel", 99)
    torch.manual_seed(7)
    config = plain.deepspeed_config(1, **section(preflight=preflight))
    return plain.train(ds_plugin.initialize(model=Streams(), config=config)[0], 3)


def test_the_preflight_leaves_deepspeed_s_random_streams_alone(workers):
    with_it, without = (workers(1).run(_streams, flag) for flag in (True, False))
    assert with_it == without


def test_the_preflight_with_a_reentrant_checkpoint_leaves_no_trace(workers):
    (with_it, lengths), (without, _) = (workers(1).run(_checkpointing, flag)[0] for flag in (True, False))
    assert with_it == without and lengths[0] == plain.LENGTH


def _longer_samples():
    engine = plain.make(plain.deepspeed_config(**section(end_length=12)))  # read 16, never train more than 12
    seen = []
    engine.module.embedding.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    plain.train(engine, 9)
    return seen, ds_plugin.get_plugin(engine).ledger.discarded, _shorter_samples()


def _shorter_samples():
    engine = plain.make(plain.deepspeed_config(**section()))
    seen = []
    engine.module.embedding.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    tokens, labels = (value[:, :3] for value in plain.micro_batch(0))
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("ds_plugin").addHandler(handler)
    engine.train()
    with torch.no_grad():
        engine(tokens, labels)
    engine(*(value[:1, :4] for value in plain.micro_batch(0)))  # the last sample of a data set: not a shorter one
    for _ in range(2):
        engine(tokens, labels)
    return seen, [line for line in said if "sequence length warmup" in line]


def test_the_preflight_is_at_the_longest_that_is_trained(workers):
    seen, discarded, shorter = workers(1).run(_longer_samples)[0]
    lengths, [said] = shorter
    assert lengths == [3, 16, 4, 3, 3]  # before the first pass that trains
    assert "holds 6 tokens where a step of length 4 has room for 8" in said
    assert seen[0] == 12 and max(seen) == 12 and discarded == sum(16 - n for n in seen[1:]) * plain.MICRO
