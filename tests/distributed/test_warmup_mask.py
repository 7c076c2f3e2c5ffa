"""Sequence length warmup that confines attention: fragments of a sample are samples of their own."""

import pytest
import torch

import ds_plugin
from megatron_patches import megatron_on_cpu
from megatron_patches.models import gpt
from tests.distributed import plain
from tests.distributed.warmup import section

SIZE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 32, "position_embedding": "rope"}


def _gpt(**changes):
    megatron_on_cpu.enable()
    cfg = gpt.GPTConfig.model_validate({**SIZE, **changes})
    gpt.initialize_parallel(cfg, 5)
    config = gpt.transformer_config(cfg, torch.float32)
    return gpt.build_gpt(cfg, 64, config, gpt.layer_spec(cfg))


def _masked():
    model = _gpt()
    warmup = {
        "enabled": True, "start_length": 8, "end_length": 32, "duration": {"steps": 4}, "mode": "mask",
        "schedule": "discrete", "lengths": [8, 16, 32], "boundaries": [2, 4],
    }  # fmt: skip
    config = {**plain.deepspeed_config(), "sequence_length_warmup": warmup}
    engine = ds_plugin.initialize(model=model, config=config)[0]
    plugin, checks = ds_plugin.get_plugin(engine), []
    engine.train()
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 64, (2, 33), generator=generator)
        tokens, labels = tokens[:, :-1], tokens[:, 1:]
        positions = torch.arange(32).expand(2, -1)
        length = plugin.length
        with torch.no_grad():  # rotary positions are relative: a fragment alone is a sample of its own
            rows = [part.reshape(-1, length) for part in (tokens, positions, labels)]
            alone = model(rows[0], rows[1], None, labels=rows[2]).reshape(2, 32)
        loss = engine(tokens, positions, None, labels=labels)
        checks.append((length, (loss - alone).abs().max().item()))
        engine.backward(loss.mean())
        engine.step()
    return checks, plugin.ledger.read, plugin.ledger.trained


def test_masked_fragments_are_samples_of_their_own(workers):
    checks, read, trained = workers(1).run(_masked)[0]
    assert [length for length, _ in checks] == [8, 8, 16, 16, 32]
    for length, difference in checks:
        assert difference < 1e-5, (length, difference)
    assert read == trained == 5 * 2 * 32


def _mask_refused(what):
    config = {**plain.deepspeed_config(), **section(mode="mask")}
    if what == "plain":
        plain.make(config)
    engine = ds_plugin.initialize(model=_gpt(), config={**config, **section(mode="mask", end_length=32)})[0]
    tokens = torch.zeros(2, 32).long()
    engine.train()
    engine(tokens, tokens, torch.zeros(1, 1, 32, 32).bool(), labels=tokens)


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("plain", ["mask", "TinyLM", "shorten"]),
        ("own mask", ["attention_mask of its own", "None"]),
    ],
)
def test_mask_mode_is_refused_where_it_would_not_confine(workers, what, parts):
    error = workers(1).run(_mask_refused, what, expect="errors")[0]
    assert error.type == "ConfigError" and all(part in error.message for part in parts), error
