"""A pipeline's names and param groups, worked out by hand; what of an earlier run counts as one without a pipeline."""

import pytest

from ds_plugin.deepspeed_engine.completep import divided
from megatron_patches.models.pipeline_gpt import gpt_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0.embedding.position_embeddings.weight", "embedding.position_embeddings.weight"),
        ("12.decoder.layers.11.mlp.linear_fc1.bias", "decoder.layers.11.mlp.linear_fc1.bias"),
        ("tied_modules.embedding.embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("decoder.layers.0.mlp.linear_fc2.weight", "decoder.layers.0.mlp.linear_fc2.weight"),
        ("__metadata__", "__metadata__"),
    ],
)
def test_names_lose_what_the_pipeline_puts_before_them(name, expected):
    assert gpt_name(name) == expected


def test_the_largest_groups_are_halved_until_there_are_enough():
    groups = [{"role": "a", "params": [1], "lr": 1.0}, {"role": "b", "params": [2, 3, 4, 5, 6], "lr": 0.5}]
    assert divided(groups, 2) == groups
    assert divided(groups, 4) == [
        {"role": "a", "params": [1], "lr": 1.0},
        {"role": "b", "params": [2, 3], "lr": 0.5},
        {"role": "b", "params": [4], "lr": 0.5},
        {"role": "b", "params": [5, 6], "lr": 0.5},
    ]
    assert len(groups) == 2 and groups[1]["params"] == [2, 3, 4, 5, 6]
