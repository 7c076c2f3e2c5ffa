"""The coordinate check on a small grid: CompleteP passes a bound that the other recipes fail."""

import contextlib
import io
import json
import math
import re
from fractions import Fraction

import pytest
import torch

from ds_plugin.cli.main import main
from ds_plugin.completep.model import applied_section, describe
from ds_plugin.plan.roles_table import minimum_ratio, rules_table
from ds_plugin.sweeps import coord_check
from ds_plugin.sweeps.builders import Megatron
from ds_plugin.sweeps.coord_check import LAST_BLOCK, Row
from ds_plugin.sweeps.mixtures import Mixture
from ds_plugin.sweeps.records import read_records
from ds_plugin.sweeps.trial import Base, Shape
from tests.harness import slow

RECIPES = ("completep", "mup", "standard")


def _command(out, depths, steps):
    arguments = ["coord-check", "--widths", "64,128", "--depths", depths, "--steps", steps, "--seeds", "1"]
    return main([*arguments, "--out", out])


@pytest.mark.parametrize(
    ("depths", "steps", "bounds"),
    [("2,8", 4, (2, 3, 6)), slow("2,8,16", 10, (2, 4, 8))],
    ids=["8 layers", "16 layers"],
)
def test_small_grid(workers, tmp_path, depths, steps, bounds):
    assert workers(1).run(_command, str(tmp_path / "out"), depths, str(steps), timeout=240) == [0]
    rows = read_records(Row, tmp_path / "out" / "coord_check.csv")
    assert len({(r.recipe, r.width, r.depth) for r in rows}) == 3 * 2 * len(depths.split(","))
    assert {r.step for r in rows} == set(range(1, steps + 1))
    spreads = {recipe: coord_check.spread(rows, recipe) for recipe in RECIPES}
    flat, deep, wide = bounds
    assert spreads["completep"] < flat < deep < spreads["mup"] and wide < spreads["standard"], spreads
    # at the base shape every recipe is the same training run
    base = {r.recipe: r.change for r in rows if (r.width, r.depth, r.step, r.layer) == (64, 2, steps, LAST_BLOCK)}
    assert len(set(base.values())) == 1 and set(base) == set(RECIPES)
    assert (tmp_path / "out" / "coord_check.png").stat().st_size > 20_000


#: an expert's hidden size x 1.5, and experts x 1.5 with as many active
EXPERTS = ["coord-check", "--experts", "4:2,6:2:3", "--base-width", "32", "--recipes", "completep,standard"]


def _of_experts(out):
    small = ["--widths", "32,64", "--depths", "2,8", "--steps", "2", "--seeds", "1", "--out", out]
    errors, printed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(printed):
        codes = [main([*EXPERTS, *small, *moe]) for moe in ([], ["--moe", "fixed_sparsity"])]
        codes.append(main([*EXPERTS, *small, "--moe", "mue", "--at-most", "1.8"]))
    return codes, errors.getvalue().splitlines(), printed.getvalue().splitlines()


def _rates_of_experts():
    """By role, at a base rate of 1; of the model the sizes, the coefficient of a loss that balances, the ratios."""
    builder = Megatron(Mixture.of("4:2"), shared=Fraction(1, 2), moe="mue")
    builder.start()
    built = builder.build(Shape("completep", 64, 4, experts="6:3:3"), Base(width=32, depth=2, length=8), 1)
    config = built.model.config
    sizes = (config.num_moe_experts, config.moe_router_topk, config.moe_ffn_hidden_size)
    shared = config.moe_shared_expert_intermediate_size
    rates = {group["role"]: group["lr"] for group in built.optimizer(1.0).param_groups}
    return rates, (*sizes, shared), config.moe_aux_loss_coeff, describe(built.model, applied_section(config))


def test_a_shape_with_experts_of_its_own_has_its_rates(workers):
    """Width x 2; an expert's hidden size 3 x 64 / (2 x 32) = 3, the shared one's 2."""
    [(rates, sizes, balancing, said)] = workers(1).run(_rates_of_experts)
    assert sizes == (6, 3, 192, 32) and balancing == 0.0
    ratios = "m_N 2, m_L 2, expert_ffn 3; experts by mue, weights of the mean form: m_E 1.5, m_K 1.5"
    assert said == f"CompleteP: recipe completep, alpha 1, {ratios}; residual branches x 0.5"
    matrices = {"hidden": 1 / 2, "router": 1 / 2, "expert_up": 1 / 2, "shared_up": 1 / 2, "shared_down": 1 / 2}
    vectors = {"embedding": 1.0, "block_norm": 1.0, "final_norm": 1.0, "unembedding": 1.0}
    assert rates == {**matrices, "expert_down": 1 / 3, **vectors}


def test_a_small_grid_of_experts(workers, tmp_path):
    [(codes, refused, printed)] = workers(1).run(_of_experts, str(tmp_path / "out"))
    assert codes == [2, 2, 0], (refused, printed)
    share = "2 of 4 experts in the base, 2 of 6 here: another active share"
    assert len(refused) == 2 and all(share in line for line in refused)
    rows = read_records(Row, tmp_path / "out" / "coord_check.csv")
    assert {(r.recipe, r.experts) for r in rows} == {(recipe, e) for recipe in RECIPES[::2] for e in ("", "6:2:3")}
    flat, steep = (coord_check.spread(rows, recipe) for recipe in RECIPES[::2])
    assert flat < 1.8 < 7 < steep, (flat, steep)
    assert printed[-2].startswith(f"standard: spread {steep:.3g}x, {steep / flat:.3g} times completep's (last block")
    base = {r.recipe: r.change for r in rows if (r.width, r.depth, r.experts, r.step) == (32, 2, "", 2)}
    assert len(set(base.values())) == 1 and set(base) == set(RECIPES[::2])


#: latent attention, and Muon: the command's arguments, the bound, and how many times the spread is standard's
KINDS = {"latent": (["--latent", "24:16"], 1.8, 4), "muon": (["--optimizer", "muon"], 1.6, 3)}
REFUSED = {
    "no rule for Muon covers it": ["--latent", "0:16", "--optimizer", "muon"],
    "no rule for Muon": ["--optimizer", "muon", "--recipes", "completed_p"],
    "--optimizer: of Megatron's GPT alone": ["--optimizer", "muon", "--hf", "config.json"],
    "--latent: of Megatron's GPT alone": ["--latent", "24:16", "--builder", "module:function"],
    "--out: ": ["--latent", "24:8"],  # another rank than what is in the folder
}


def _of_kinds(out):
    """Exit codes and rows of both; of each refusal its line, in the folder of latent attention's."""
    small = ["coord-check", "--recipes", "completep,standard", "--base-width", "32", "--widths", "32,64"]
    small += ["--depths", "2,8", "--steps", "2", "--seeds", "1"]
    codes = [main([*small, *kind, "--out", f"{out}/{name}"]) for name, (kind, *_) in KINDS.items()]
    refused = []
    for given in REFUSED.values():
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            codes.append(main([*small, *given, "--out", f"{out}/latent"]))
        refused.append(errors.getvalue())
    return codes, refused


def _groups_of_kinds():
    """Each optimizer's matrices inside blocks at a base rate of 1: its name, their number, rate and weight decay; how
    far Muon moves one at a rate of 1."""
    found = []
    generator = torch.Generator().manual_seed(1)
    for builder in (Megatron(latent=(0, 16)), Megatron(optimizer="muon")):
        builder.start()
        built = builder.build(Shape("completep", 64, 4), Base(width=32, depth=2, length=8), 1)
        parts = getattr(optimizer := built.optimizer(1.0), "parts", (optimizer,))
        groups = [(part, group) for part in parts for group in part.param_groups]
        assert [id(group) for _, group in groups] == [id(group) for group in optimizer.param_groups]
        ours = {id(p) for p in built.model.decoder.layers.parameters() if p.dim() > 1}
        for part, group in groups:
            if ours.issuperset(map(id, group["params"])):
                found.append((type(part).__name__, len(group["params"]), group["lr"], group["weight_decay"]))
    one = built.model.decoder.layers[0].mlp.linear_fc1.weight
    one.grad, kept = torch.randn(one.shape, generator=generator), one.detach() * (1 - 0.1)
    optimizer.step()
    return found, (one - kept).square().mean().sqrt().item() / 2**-0.5


def test_matrices_of_latent_attention_and_of_muon_have_their_rates(workers):
    """Width x 2 at a constant rank: what starts from the latent vector stays. Muon's scale grows by sqrt(2): 0.2 times
    the root of the larger side, with which entries move by 0.2, as Adam's do; the orthogonalization is a rough one."""
    adamw = [("AdamW", 16, 1 / 2, 0.2), ("AdamW", 4, 1 / 2, 0.2), ("AdamW", 4, 1.0, 0.1)]
    expected = [*adamw, ("Muon", 16, pytest.approx(2**-0.5), pytest.approx(0.1 * 2**0.5))]
    assert workers(1).run(_groups_of_kinds) == [(expected, pytest.approx(0.2, rel=0.15))]


def test_small_grids_of_latent_attention_and_muon(workers, tmp_path):
    [(codes, refused)] = workers(1).run(_of_kinds, str(tmp_path))
    assert codes == [0, 0, *[2] * len(REFUSED)], refused
    assert all(what in line and line.count("\n") == 1 for what, line in zip(REFUSED, refused, strict=True)), refused
    for name, (_, bound, times) in KINDS.items():
        rows = read_records(Row, tmp_path / name / "coord_check.csv")
        flat, steep = (coord_check.spread(rows, recipe) for recipe in RECIPES[::2])
        assert flat < bound and steep > times * flat, (name, flat, steep)
        base = {r.recipe: r.change for r in rows if (r.width, r.depth, r.step) == (32, 2, 2)}
        assert len(set(base.values())) == 1 and set(base) == set(RECIPES[::2])


def test_spread_is_of_the_means_over_seeds_at_the_last_step():
    def row(depth, seed, step, change, layer=LAST_BLOCK):
        return Row("mup", 64, depth, seed, step, layer, change)

    rows = [row(2, 1, 1, 9.0), row(2, 1, 2, 1.0), row(2, 2, 2, 3.0), row(4, 1, 2, 5.0), row(4, 2, 2, 7.0)]
    rows += [row(2, 1, 2, 100.0, "logits"), Row("standard", 64, 2, 1, 2, LAST_BLOCK, 50.0)]
    assert coord_check.spread(rows, "mup") == 6.0 / 2.0
    for change in (math.nan, math.inf, 0.0):
        for moved in ([0.1, change, 0.12], [0.1, 0.12, change], [change, 0.1, 0.12]):
            rows = [row(depth, 1, 2, value) for depth, value in zip((2, 4, 8), moved, strict=True)]
            assert coord_check.spread(rows, "mup") == math.inf, moved


CONFIG = {
    "model": {"num_layers": 8, "hidden_size": 256, "num_attention_heads": 4, "seq_length": 32},
    "completep": {"enabled": True, "base_width": 64, "base_depth": 2, "base_head_dim": 16},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.008, "weight_decay": 0.1, "eps": 1e-8}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 100, "cos_min_ratio": 0.1}},
}


def _rows(config):
    lines = rules_table(config).splitlines()
    assert lines[-1].startswith("(x n): the base model's value times n")
    cells = [re.split(r"  +", line) for line in lines[3:-1]]
    return lines, {row[0]: row[6:] for row in cells}


def _sizes(config):
    """Tensors, parameters, m_in and m_out by role."""
    return {row[0]: row[2:6] for row in (re.split(r"  +", line) for line in rules_table(config).splitlines()[3:-1])}


def test_rules_table():
    """m_N = 4, m_L = 4, alpha 1; head size 64 against 16: sqrt(16) / 64."""
    lines, rows = _rows(CONFIG)
    assert "m_N 4" in lines[0] and "m_L 4" in lines[0]
    assert lines[1] == "residual branches x 0.25, logits x 0.25; q.k x 0.0625"
    # std 0.02 / 2, lr 0.008 / 4, eps 1e-8 / 16
    assert rows["hidden"] == ["0.01 (x 0.5)", "0.002 (x 0.25)", "0.0002", "0.4 (x 4)", "6.25e-10 (x 0.0625)"]
    assert rows["embedding"] == ["0.02", "0.008", "0.0008", "0.1", "1e-08"]
    assert rows["block_bias"] == ["0", "0.008", "0.0008", "0", "6.25e-10 (x 0.0625)"]
    assert set(rows) == {"embedding", "hidden", "block_norm", "block_bias", "final_norm", "unembedding"}


def test_rules_table_counts_and_gives_what_is_out_of_proportion_its_own_row():
    """FFN 2048 / 128 = 16 beside m_N 4: up has fan-in 4 and fan-out 16, down the other way round."""
    assert _sizes(CONFIG)["hidden"] == ["32", f"{8 * 12 * 256**2:,}", "4", "4"]
    assert _sizes(CONFIG)["embedding"] == ["2", "8,192 + 256 V", "-", "-"]  # 32 positions
    assert _sizes(CONFIG)["unembedding"] == ["1", "256 V", "-", "-"]
    assert _sizes(CONFIG)["block_bias"] == ["32", f"{8 * (3 + 1 + 4 + 1) * 256:,}", "-", "-"]
    base = {**CONFIG["completep"], "base_ffn_hidden_size": 128, "base_num_heads": 4}  # heads of 16 in the base, 64 here
    config = {**CONFIG, "model": {**CONFIG["model"], "ffn_hidden_size": 2048}, "completep": base}
    counted, rows = _sizes(config), _rows(config)[1]
    assert counted["hidden"] == ["16", f"{8 * 4 * 256**2:,}", "4", "4"]
    assert counted["mlp_up"] == ["8", f"{8 * 256 * 2048:,}", "4", "16"]
    assert counted["mlp_down"] == ["8", f"{8 * 256 * 2048:,}", "16", "4"]
    # std 0.02 / 2, lr 0.008 / 4, decay 0.1 x 4, eps 1e-8 / (sqrt(4 x 16) x 4)
    assert rows["mlp_up"] == ["0.01 (x 0.5)", "0.002 (x 0.25)", "0.0002", "0.4 (x 4)", "3.125e-10 (x 0.03125)"]
    # std 0.02 / 4, lr 0.008 / 16, decay 0.1 x 16, eps 1e-8 / (sqrt(4 x 4) x 4)
    assert rows["mlp_down"] == ["0.005 (x 0.25)", "0.0005 (x 0.0625)", "5e-05", "1.6 (x 16)", "6.25e-10 (x 0.0625)"]
    own = {"lr_multipliers": {"qkv": 0.5}, "embedding_multiplier": 3.0}
    lines, rows = _rows({**CONFIG, "completep": {**CONFIG["completep"], **own}})
    assert rows["qkv"][1] == "0.001 (x 0.125)" and rows["hidden"][1] == "0.002 (x 0.25)"
    assert ", embeddings x 3" in lines[1]


def test_rules_table_without_biases_and_tied():
    tied = {**CONFIG, "model": {**CONFIG["model"], "bias": False, "tie_embeddings": True}}
    assert set(_rows(tied)[1]) == {"embedding", "hidden", "block_norm", "final_norm"}
    folded = {**tied, "completep": {**CONFIG["completep"], "residual": "folded"}}
    lines, rows = _rows(folded)
    assert ", folded into the weights" in lines[1]
    assert set(rows) == {"embedding", "hidden", "branch_out", "block_norm", "logit_norm"}
    # std 0.02 / 2 / 4, lr 0.008 / 4 / 4, decay 0.1 * 4 * 4, eps 1e-8 / 16 * 4
    assert rows["branch_out"] == ["0.0025 (x 0.125)", "0.0005 (x 0.0625)", "5e-05", "1.6 (x 16)", "2.5e-09 (x 0.25)"]
    assert rows["logit_norm"][0] == "0.25 / 0"


def test_rules_table_of_completed_p_has_the_betas():
    ratios = {"recipe": "completed_p", "batch_ratio": 2.0, "token_ratio": 8.0}
    lines = rules_table({**CONFIG, "completep": {**CONFIG["completep"], **ratios}}).splitlines()
    assert lines[-1] == "betas 0.975, 0.99975 for every role: 1 - beta (x 0.25)"


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({}, 1.0),
        ({"type": "WarmupLR"}, 1.0),
        ({"type": "WarmupCosineLR"}, 1e-4),
        ({"type": "WarmupDecayLR", "params": {"warmup_max_lr": 0.01}}, 0.0),
        ({"type": "StepLR"}, None),
    ],
)
def test_minimum_ratio(scheduler, expected):
    assert minimum_ratio(scheduler) == expected


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"completep": {**CONFIG["completep"], "enabled": False}}, "completep: not enabled"),
        ({"optimizer": {}}, "optimizer.params.lr"),
        ({"optimizer": {"type": "Muon", "params": {"lr": 0.01}}}, "the optimizer is Muon: the table has AdamW's rules"),
        ({"optimizer": []}, "optimizer"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": None}}}, "optimizer.params.lr"),
        ({"model": {**CONFIG["model"], "hidden_size": 255}}, "hidden_size = 255"),
        ({"completep": {**CONFIG["completep"], "base_num_query_groups": 2}}, "shared by 2 heads in the base and by 1"),
        ({"completep": {**CONFIG["completep"], "base_num_moe_experts": 8}}, "the model has no experts; remove it"),
        ({"model": None}, "model: missing; write"),
        ({"model": None, "megatron": {"num-layers": 4}}, "ds-plugin plan --config FILE"),
    ],
)
def test_rules_command_refuses_in_one_line(tmp_path, capsys, changes, part):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({name: value for name, value in {**CONFIG, **changes}.items() if value is not None}))
    assert main(["rules", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1


def test_widths_that_the_heads_do_not_divide(capsys):
    assert main(["coord-check", "--widths", "60", "--head-dim", "16"]) == 2
    assert "60 is not divisible by --head-dim 16" in capsys.readouterr().err
