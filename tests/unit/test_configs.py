"""Every recipe in configs/ is planned for its machine, and the plan compared with numbers worked out by hand."""

from pathlib import Path

import pytest

from ds_plugin.plan import inputs, plan
from ds_plugin.plan.costs import RATES

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

# (file, ranks, vocabulary, device): {path in the plan: value}
RECIPES = {
    ("quickstart", 2, 256, "cpu"): {
        # what the published run trained and read: docs/results/quickstart/summary.json
        "tokens.trained": 1_333_248,
        "tokens.read": 400 * 16 * 256,
        "parameters.all": 2 * 256 * 128 + 256 * 128 + 4 * (12 * 128**2 + 13 * 128) + 2 * 128,
        "completep.roles.hidden.lr": 0.008 / 2,
        "completep.roles.hidden.eps": 1e-8 / 4,
        "averaging.first snapshot": 50,
        "averaging.snapshots": 36,  # 50, 60, ..., 400
        "lengths.1": {"length": 16, "from_step": 5, "from_token": 4 * 16 * 8 + 1},  # 8 + 248 t / 150 >= 16
    },
    ("gpt-tiny_all_megatron-2xcpu", 2, None, "cpu"): {
        # what Megatron-LM (core_r0.16.0) said of the run with this recipe
        "tokens.trained": 350_080,
        "tokens.read": 409_600,
        "parameters.all": 2 * 256 * 128 + 128 * 128 + 4 * (12 * 128**2 + 13 * 128) + 2 * 128,
        "completep.roles.hidden.lr": 0.004,
        "averaging.memory bytes": 6 * 4 * 875_264 // 2,
        "averaging.first snapshot": 40,
        "lr_peak_from_step": 33,
    },
    ("gpt_3d_8cpu", 8, 256, "cpu"): {
        "layout.data": 2,
        "batch.samples": 2 * 2 * 4,
        # the larger stage has two layers and the output: halves of the matrices, whole norms and row biases
        "parameters.of a rank": 2 * ((12 * 64**2 + 7 * 64) // 2 + 6 * 64) + 256 * 64 // 2 + 2 * 64,
        "completep.roles.hidden.lr": 0.008 / 2,
        "averaging.snapshots": 11,  # 20, 24, ..., 60
    },
    ("gpt3-125m_warmup-averaging_8xa100", 8, 50257, "gpu"): {
        "parameters.all": (50304 + 2048) * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768,
        "batch.samples": 8 * 256,  # 8 times the usual 256
        "lr": 40 * 6e-4,
        "completep": None,
        "lengths.1": {"length": 16, "from_step": 36, "from_token": 35 * 2048 * 8 + 1},  # 8 + 2040 t / 9000 >= 16
        "lengths.-1.from_step": 9000,
        "averaging.averaged steps": 120,
        "averaging.first snapshot": 1320,  # the first multiple of 24 from 1300 on
    },
    ("gpt3-125m_all_8xa100", 8, 50257, "gpu"): {
        "completep.table.0": "recipe completep, alpha 1: width 768 / 256 = m_N 3, depth 12 / 2 = m_L 6",
        "completep.roles.hidden.lr": 4 * 6e-4,
        "completep.roles.block_norm.lr": 12 * 6e-4,
        "completep.roles.hidden.weight_decay": 0.3,
        "completep.roles.hidden.eps": 1e-8 / 18,
        "completep.roles.hidden.init_std": 0.02 / 3**0.5,
        "completep.table.1": "residual branches x 0.166667, logits x 0.333333; q.k x 0.125",
    },
    ("gpt3-1.3b_all_64xa100", 64, 50257, "gpu"): {
        "parameters.all": (50304 + 1024) * 2048 + 24 * (12 * 2048**2 + 13 * 2048) + 2 * 2048,
        "batch.tokens": 4096 * 1024,
        "tokens.read": 58_772 * 4096 * 1024,  # the paper's 246e9 for 157.3e9 trained
        "completep.table.0": "recipe completep, alpha 1: width 2048 / 256 = m_N 8, depth 24 / 2 = m_L 12",
        "completep.roles.hidden.lr": 6e-4,
        "completep.roles.hidden.eps": 1e-8 / 96,
        "lengths.1": {"length": 72, "from_step": 375, "from_token": 374 * 4096 * 64 + 1},  # 64 + 960 t / 45000 >= 72
        "lengths.-1.from_step": 45_000,
        "lr_peak_from_step": 3012,
        "averaging.averaged steps": 500,
    },
    ("llama-7b_all_64xh100", 64, 32000, "gpu"): {
        "parameters.all": 6_738_415_616,  # Llama 2's
        "completep.table.0": "recipe completep, alpha 1: width 4096 / 256 = m_N 16, depth 32 / 2 = m_L 16",
        "completep.roles.hidden.lr": 3e-4,
        "completep.roles.embedding.lr": 16 * 3e-4,
        "completep.roles.hidden.eps": 1e-8 / 256,
        # of q.k: sqrt of the base's 64, over 128
        "completep.table.1": "residual branches x 0.0625, logits x 0.0625; q.k x 0.0625",
        "averaging.snapshot bytes": 6_738_415_616 * 4 // 64,
        "averaging.averaged steps": 400,
    },
    ("llama-7b_all_megatron-64xh100", 64, None, "gpu"): {
        "parameters.all": 6_738_415_616,
        "tokens.trained": 140_002_131_968,  # what the recipe for DeepSpeed comes to
        "layout.data": 16,
        # half of the matrices of 16 layers, and whole norms; the last stage has the output and its norm besides
        "parameters.of a rank": 16 * ((4 * 4096**2 + 3 * 4096 * 11008) // 2 + 2 * 4096) + 16000 * 4096 + 4096,
        "completep.roles.branch_out.lr": 3e-4 / 16,  # folded: by 1 / m_L
        "completep.roles.branch_out.init_std": 0.02 / 4 / 16,
        "completep.roles.unembedding.lr": 16 * 3e-4 / 16,
        "completep.table.1": "residual branches x 0.0625, logits x 0.0625, folded into the weights; q.k x 0.0625",
        "averaging.averaged steps": 400,
    },
}


def _at(found, path):
    for part in path.split("."):
        found = found[int(part)] if isinstance(found, list) else found[part]
    return found


@pytest.mark.parametrize(("recipe", "expected"), RECIPES.items(), ids=[name for name, *_ in RECIPES])
def test_recipe(recipe, expected):
    name, ranks, vocabulary, device = recipe
    job = inputs.read_job(CONFIGS / f"{name}.json", ranks, vocab_size=vocabulary)
    found = plan.make(job, RATES[device], pinned=device == "gpu")
    values = {path: _at(found, path) for path in expected}
    assert values == {p: pytest.approx(v, rel=1e-12) if isinstance(v, float) else v for p, v in expected.items()}
    averaging = found["averaging"]
    if device == "gpu":  # a percent of a few hundred steps is no window
        assert 0.008 < averaging["share of the run"] < 0.012
    assert averaging["first snapshot"] >= found["lr_peak_from_step"]
    assert found["lengths"][-1]["length"] == found["batch"]["tokens"] // found["batch"]["samples"]


def test_every_recipe_is_here_and_in_the_readme():
    names = sorted(path.stem for path in CONFIGS.glob("*.json"))
    assert names == sorted(name for name, *_ in RECIPES)
    readme = (CONFIGS / "README.md").read_text()
    for name, ranks, vocabulary, _ in RECIPES:
        assert f"[`{name}.json`]({name}.json)" in readme
        given = f"{name}.json --world-size {ranks}" + (f" --vocab-size {vocabulary}" if vocabulary else "")
        assert given in readme
