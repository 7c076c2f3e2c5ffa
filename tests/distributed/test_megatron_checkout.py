"""The methods in Megatron-LM's own script, of the checkout at ``MEGATRON_LM_PATH``, on CPU processes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from ds_plugin.completep import rules
from ds_plugin.plan import inputs
from ds_plugin.sequence_length_warmup.carry import CarryOrder
from ds_plugin.weight_averaging.merge.merge import merge
from tests import harness
from tests.megatron_lm import logged, real
from tests.unit.weight_averaging.test_merge_torch_dist import read as read_tensors

CHECKOUT = os.environ.get("MEGATRON_LM_PATH")


def test_a_checkout_is_tested_or_its_absence_is_said():
    if CHECKOUT is None:
        pytest.skip(
            "MEGATRON_LM_PATH is not set: Megatron-LM's own script was not run, only the stand-in; set it to a "
            "checkout of core_r0.16.0 (Python 3.12 or newer: of main), and select the slow tests"
        )
    assert Path(CHECKOUT, "pretrain_gpt.py").is_file()


def finished(started):
    with started:
        done = started.wait(1500)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def trained_by_carry(lengths):
    """Tokens of a sample place, in all iterations: spans of up to three windows in turn."""
    order, total = CarryOrder(full=64, multiple_of=16, interleave=3), 0
    for length in lengths:
        total += (span := order.peek(length)).length
        order.advance(span)
    return total


def resumed_equals_the_uninterrupted(folder, trained, evaluations=8, learns=0.02):
    """Of runs of 24 iterations that save after twelve; one is killed then. From the third logged iteration on.

    ``learns``: by how much the loss falls at least."""
    whole, evaluated = logged(finished(trained("whole")))
    losses = [float(whole[step]["lm loss"]) for step in (1, 24)]
    assert losses[1] < losses[0] - learns and len(evaluated) == evaluations
    with trained("killed") as killed:
        killed.wait_for("iteration       13/", 1500)
    resumed, later = logged(finished(trained("killed", "--load", folder / "killed")))
    assert min(resumed) == 13 and later == evaluated[2:]
    for step in range(15, 25):
        assert resumed[step] == whole[step], step


UNTOUCHED = """
import sys
import warnings
from pathlib import Path
from megatron_patches.training_loop import script

if __name__ == "__main__":
    script.prepare_megatron(Path(sys.argv[1]))
    sys.argv = sys.argv[1:]
    script.execute(Path(sys.argv[0]))
"""

COUNTED = """
import functools
import json
import os
import sys
from pathlib import Path

import torch
from megatron_patches.training_loop import script

if __name__ == "__main__":
    here = Path(__file__)  # the script takes its place
    path, given, sections, _ = script.read_arguments(sys.argv[1:])
    script.prepare_megatron(path)
    script.install(sections)
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    forward, seen = GPTModel.forward, []

    @functools.wraps(forward)
    def counting(model, input_ids, *args, **kwargs):
        if model.training and model.pre_process and parallel_state.get_tensor_model_parallel_rank() == 0:
            seen.extend(input_ids.tolist())
        return forward(model, input_ids, *args, **kwargs)

    GPTModel.forward = counting
    sys.argv = [str(path), *given]
    script.execute(path)
    if seen:
        here.with_name(f"counted_{os.environ['RANK']}.json").write_text(json.dumps(seen))
"""

DROPOUT = " --attention-dropout 0.1 --hidden-dropout 0.1 "
MULTI_TOKEN = " --mtp-num-layers 1" if sys.version_info < (3, 12) else ""  # main's wants TransformerEngine
FLOWN = {  # layout by its number of ranks
    "8 3D": DROPOUT + "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 ",
    "4 virtual": "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 4 --num-layers 8 "
    "--num-layers-per-virtual-pipeline-stage 1 --no-overlap-p2p-communication ",
    "2 overlapped": "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --overlap-grad-reduce "
    "--overlap-param-gather --position-embedding-type rope" + MULTI_TOKEN + DROPOUT,
}

RECIPES = {"gpt-tiny_all_megatron-2xcpu": 2, "llama-7b_all_megatron-64xh100": 64}  # and their ranks
PARSED = """
import sys
from pathlib import Path
from ds_plugin.config import PluginConfig, load_json
from megatron_patches.training_loop import options, script

recipe = load_json(sys.argv[1])
script.prepare_megatron(Path(sys.argv[2]))
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args
from megatron_patches.completep import prepare

del sys.argv[1:3]
args = parse_args()
validate_args(args)
sections = PluginConfig.from_dict(recipe)
options.check_options(sections, args)
config, spec = core_transformer_config_from_args(args), get_gpt_layer_local_spec(normalization=args.normalization)
scaled, _ = prepare(config, spec, sections.completep.folded_by_default())
sizes = config.num_layers, config.hidden_size, config.kv_channels
print("PARSED", args.data_parallel_size, *sizes, scaled.softmax_scale)
"""

if CHECKOUT is not None:

    @pytest.mark.slow
    @pytest.mark.timeout(600)
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_the_checkout_takes_the_recipe(recipe):
        """Its own parser, checks and model config, at the recipe's ranks; the plan is of the same model and layout."""
        file, ranks = harness.ROOT / "configs" / f"{recipe}.json", RECIPES[recipe]
        job = inputs.read_job(file, ranks)
        place = {"WORLD_SIZE": str(ranks), "RANK": "0", "LOCAL_RANK": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        given = [*inputs.arguments(job.options), "--no-rope-fusion"]  # that wants TransformerEngine
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                PARSED,
                file,
                Path(CHECKOUT, "pretrain_gpt.py"),
                *given,
            ],
            env={**os.environ, **place},
            cwd=harness.ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found = next(line for line in done.stdout.splitlines() if line.startswith("PARSED")).split()[1:]
        model, section = job.model, job.methods.completep
        head = model.hidden_size // model.num_attention_heads
        scale = None if section.base_head_dim == head else rules.attention_scale(head, section.base_head_dim)
        expected = [job.layout.data, model.num_layers, model.hidden_size, head, scale]
        assert found == [str(value) for value in expected]

    @pytest.mark.slow
    @pytest.mark.timeout(7200)
    @pytest.mark.parametrize("layout", ["torch_dist", "torch"])
    def test_the_real_script_killed_and_resumed_equals_the_uninterrupted(tmp_path, layout):
        """TP2 x PP2 x DP2, all three methods, through four lengths; killed after the checkpoint at iteration 30."""
        warmup = {"enabled": True, "start_length": 16, "end_length": 64, "duration": {"steps": 40}, "multiple_of": 16}
        sections = {
            "sequence_length_warmup": {**warmup, "learning_rate": {"by": "tokens"}},
            "weight_averaging": {"enabled": True, "interval": 5, "window": 3},
            "completep": {"enabled": True, "base_width": 16, "base_depth": 2},
        }
        save = ["--ckpt-format", layout, "--save"]
        whole, evaluations = logged(finished(real(CHECKOUT, tmp_path, "whole", sections, *save, tmp_path / "whole")))
        lengths = [max(16, (16 + 48 * min(step, 40) // 40) // 16 * 16) for step in range(1, 61)]
        assert [int(whole[step]["sequence length"]) for step in range(1, 61)] == lengths and len(set(lengths)) == 4
        assert int(whole[60]["trained tokens"]) == 8 * sum(lengths)
        prefixes = [line.partition(" | lm loss")[0] for line in evaluations]
        assert prefixes[:4] == [
            "iteration 25", "iteration 25 | average of steps 15 to 25",
            "iteration 50", "iteration 50 | average of steps 40 to 50",
        ]  # fmt: skip

        with real(CHECKOUT, tmp_path, "killed", sections, *save, tmp_path / "killed") as killed:
            killed.wait_for("iteration       31/", 1500)
            before, _ = logged(killed.output)
        assert before[30] == whole[30] and 60 not in before
        tracker = tmp_path / "killed" / "latest_checkpointed_iteration.txt"
        assert tracker.read_text() == "30"
        again = [*save, tmp_path / "killed", "--load", tmp_path / "killed"]
        resumed, later = logged(finished(real(CHECKOUT, tmp_path, "killed", sections, *again)))
        assert min(resumed) == 31 and later == evaluations[2:]
        for step in range(31, 61):
            names = set(whole[step]) - ({"lm loss"} if step == 32 else set())  # there Megatron-LM logs a mean of two
            assert {n: resumed[step][n] for n in names} == {n: whole[step][n] for n in names}, step

    @pytest.mark.slow
    @pytest.mark.timeout(3600)
    def test_a_mixture_of_experts_killed_and_resumed(tmp_path):
        """Expert parallel 2 x data parallel, with a balancing bias and an auxiliary loss, all three methods."""
        warmup = {"enabled": True, "start_length": 16, "end_length": 64, "duration": {"steps": 16}, "multiple_of": 16}
        experts = {"base_num_moe_experts": 4, "base_moe_router_topk": 2}
        sections = {
            "sequence_length_warmup": warmup,
            "weight_averaging": {"enabled": True, "interval": 3, "window": 3},
            "completep": {"enabled": True, "base_width": 16, "base_depth": 2, **experts},
        }
        mixture = (
            "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --expert-model-parallel-size 2 "
            "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 1e-2 "
            "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --disable-bias-linear "
            "--train-iters 24 --lr-warmup-iters 2 --eval-interval 12 --save-interval 12 --save"
        ).split()

        def trained(folder, *more):
            return real(CHECKOUT, tmp_path, folder, sections, *mixture, tmp_path / folder, *more, ranks=2)

        resumed_equals_the_uninterrupted(tmp_path, trained)

    @pytest.mark.slow
    @pytest.mark.timeout(3600)
    @pytest.mark.parametrize("mode", ["carry", "mask"])
    def test_a_mode_trains_every_token_once_killed_and_resumed(tmp_path, mode):
        """TP2 x PP2 x DP2 with Llama's flags, all three methods, on a text in which no token comes twice."""
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        size = 16_000
        builder = IndexedDatasetBuilder(str(tmp_path / "corpus.bin"), dtype=numpy.uint16)
        builder.add_document(torch.arange(size, dtype=torch.int32), [size])
        builder.finalize(str(tmp_path / "corpus.idx"))
        (tmp_path / "counted.py").write_text(COUNTED)
        warmup = {"enabled": True, "start_length": 16, "end_length": 64, "duration": {"steps": 20}, "multiple_of": 16}
        apart = {"interleave": 3} if mode == "carry" else {}
        sections = {
            "sequence_length_warmup": {**warmup, "mode": mode, **apart, "preflight": False},
            "weight_averaging": {"enabled": True, "interval": 3, "window": 3},
            "completep": {"enabled": True, "base_width": 16, "base_depth": 2},
        }
        flags = (
            f"--vocab-size {size} --swiglu --normalization RMSNorm --position-embedding-type rope "
            "--disable-bias-linear --untie-embeddings-and-output-weights --group-query-attention --num-query-groups 2 "
            f"--split 100,0,0 --data-path {tmp_path / 'corpus'} --data-cache-path {tmp_path / 'cache'} "
            "--train-iters 24 --lr-warmup-iters 2 --eval-iters 0 --save-interval 12 --save"
        ).split()

        def trained(folder, *more):
            given = [*flags, tmp_path / folder, *more]
            given += ["--ds-plugin-config", tmp_path / f"{folder}.json"] if folder == "whole" else []
            program = {"program": "counted"} if folder == "whole" else {}
            return real(CHECKOUT, tmp_path, folder, sections, *given, without=["--mock-data"], **program)

        resumed_equals_the_uninterrupted(tmp_path, trained, evaluations=0, learns=-1)  # every token is new
        files = sorted(tmp_path.glob("counted_*.json"))
        seen = [token for file in files for sample in json.loads(file.read_text()) for token in sample]
        assert len(files) == 2  # of two data-parallel ranks, the first stage's first rank
        lengths = [max(16, (16 + 48 * min(step, 20) // 20) // 16 * 16) for step in range(1, 25)]
        assert len(seen) == len(set(seen)) == (8 * 64 * 24 if mode == "mask" else trained_by_carry(lengths) * 8)

    @pytest.mark.slow
    @pytest.mark.timeout(3600)
    @pytest.mark.parametrize("layer_wise", [False, True], ids=["whole", "layer-wise"])
    def test_muon_killed_and_resumed(tmp_path, layer_wise):
        """Muon trains the matrices, Adam the rest; with the average. Layer-wise each rank updates what is its own."""
        if importlib.util.find_spec("emerging_optimizers") is None:
            pytest.skip("emerging_optimizers, which Megatron's Muon is of, is not installed (Python 3.12)")
        sections = {
            "weight_averaging": {"enabled": True, "interval": 3, "window": 3},
            "completep": {"enabled": True, "base_width": 16, "base_depth": 2},
        }
        kind = "--optimizer dist_muon --bf16" if layer_wise else "--optimizer muon --ckpt-format torch"
        muon = (
            f"--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 {kind} --train-iters 24 "
            "--lr-warmup-iters 2 --eval-interval 12 --save-interval 12 --save"
        ).split()

        def trained(folder, *more):
            flags = [*muon, tmp_path / folder, *more]
            return real(CHECKOUT, tmp_path, folder, sections, *flags, ranks=2, without=["--use-distributed-optimizer"])

        resumed_equals_the_uninterrupted(tmp_path, trained)

    @pytest.mark.slow
    @pytest.mark.timeout(3600)
    def test_where_iterations_go_back_the_state_is_of_the_checkpoint_that_was_read(tmp_path):
        """--override-ckpt-iteration: the lengths and tokens go on, the window begins anew."""
        flag = "--override-ckpt-iteration"
        if flag not in Path(CHECKOUT, "megatron", "training", "arguments.py").read_text():
            pytest.skip(f"this checkout has no {flag}")
        warmup = {"enabled": True, "start_length": 16, "end_length": 64, "duration": {"steps": 16}, "multiple_of": 16}
        sections = {
            "sequence_length_warmup": warmup,
            "weight_averaging": {"enabled": True, "interval": 2, "window": 3},
        }
        few = ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1", "--train-iters", "12"]
        few += ["--eval-interval", "4", "--save-interval", "12", "--lr-warmup-iters", "2", "--save", tmp_path / "saved"]
        first, _ = logged(finished(real(CHECKOUT, tmp_path, "first", sections, *few, ranks=2)))
        back = [*few, "--load", tmp_path / "saved", flag, "6"]
        second, evaluations = logged(finished(real(CHECKOUT, tmp_path, "second", sections, *back, ranks=2)))
        assert sorted(second) == [7, 8, 9, 10, 11, 12]
        lengths = [int(line["sequence length"]) for line in (first[12], *(second[step] for step in sorted(second)))]
        assert lengths == [48, 48, 48, 48, 64, 64, 64]  # of the twelfth step to the eighteenth
        assert int(second[7]["trained tokens"]) == int(first[12]["trained tokens"]) + 8 * 48
        assert "average of steps 8 to 8" in evaluations[1]

    @pytest.mark.slow
    @pytest.mark.timeout(3600)
    def test_the_real_script_with_hooks_that_change_nothing_logs_what_it_logs_alone(tmp_path):
        (tmp_path / "untouched.py").write_text(UNTOUCHED)
        few = ["--train-iters", "8", "--eval-interval", "4", "--lr-warmup-iters", "2"]
        alone, evaluations = logged(finished(real(CHECKOUT, tmp_path, "alone", {}, *few, program="untouched")))
        still = {"enabled": True, "start_length": 64, "end_length": 64, "duration": {"steps": 5}}
        sections = {
            "sequence_length_warmup": {**still, "learning_rate": {"by": "tokens"}},
            "weight_averaging": {"enabled": True, "interval": 2, "start_step": 1000},
        }
        hooked, same_evaluations = logged(finished(real(CHECKOUT, tmp_path, "hooked", sections, *few)))
        off, off_evaluations = logged(finished(real(CHECKOUT, tmp_path, "off", {}, *few)))
        assert off == alone and off_evaluations == same_evaluations == evaluations and len(evaluations) == 4
        ours = ("sequence length", "trained tokens")
        assert {s: {n: v for n, v in line.items() if n not in ours} for s, line in hooked.items()} == alone
        assert sorted(alone) == list(range(1, 9))

    @pytest.mark.slow
    @pytest.mark.timeout(1800)
    @pytest.mark.parametrize("layout", FLOWN)
    def test_the_preflight_leaves_no_trace_in_the_log(tmp_path, layout):
        """Dropout draws on as without it, synchronization goes on, and what is summed up for the log is of the run."""
        flags = FLOWN[layout] + "--train-iters 3 --lr-warmup-iters 1 --eval-interval 3 --save-interval 100"
        warmup = {"enabled": True, "start_length": 16, "end_length": 64, "duration": {"steps": 3}, "multiple_of": 16}
        found = []
        for preflight in (True, False):
            sections = {"sequence_length_warmup": {**warmup, "preflight": preflight}}
            said = finished(real(CHECKOUT, tmp_path, "run", sections, *flags.split(), ranks=int(layout.split()[0])))
            assert said.count("sequence length warmup: preflight: an iteration at 64 tokens fits") == preflight
            found.append(logged(said))
        assert found[0] == found[1] and [len(lines) for lines in found[0]] == [3, 3]

    @pytest.mark.slow
    @pytest.mark.timeout(1800)
    def test_an_indexed_dataset_through_loader_processes_resumed(tmp_path):
        """Documents on disk in place of mock data, read by the loader's processes; resumed, the rest is the same."""
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        builder = IndexedDatasetBuilder(str(tmp_path / "corpus.bin"), dtype=numpy.uint16)
        for start in range(200):  # a line of successors each, so that there is something to learn
            tokens = torch.arange(start, start + 100 + start % 7) % 40
            builder.add_document(tokens.to(torch.int32), [len(tokens)])
        builder.finalize(str(tmp_path / "corpus.idx"))
        data = ["--data-path", tmp_path / "corpus", "--data-cache-path", tmp_path / "cache", "--num-workers", "2"]
        few = ["--train-iters", "20", "--lr-warmup-iters", "2", "--lr", "1e-2", "--eval-interval", "10"]
        save = ["--save-interval", "10", "--ckpt-format", "torch", "--save"]
        one = ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"]
        warmup = {"enabled": True, "start_length": 16, "end_length": 64, "duration": {"steps": 15}, "multiple_of": 16}
        sections = {
            "sequence_length_warmup": warmup,
            "weight_averaging": {"enabled": True, "interval": 2, "window": 3},
            "completep": {"enabled": True, "base_width": 16, "base_depth": 2},
        }

        def trained(name, *more):
            flags = [*data, *few, *one, *save, tmp_path / name, *more]
            return logged(finished(real(CHECKOUT, tmp_path, name, sections, *flags, ranks=2, without=["--mock-data"])))

        whole, evaluations = trained("whole")
        losses = [float(whole[step]["lm loss"]) for step in (1, 20)]
        assert losses[0] > 5 and losses[1] < 4 and len({whole[step]["sequence length"] for step in whole}) == 4
        tracker = tmp_path / "whole" / "latest_checkpointed_iteration.txt"
        tracker.write_text("10")
        resumed, later = trained("again", "--load", tmp_path / "whole")
        assert min(resumed) == 11 and len(evaluations) == 8 and later == evaluations[2:]
        del resumed[12]["lm loss"], whole[12]["lm loss"]  # there Megatron-LM logs a mean of two
        assert resumed == {step: whole[step] for step in range(11, 21)}

    @pytest.mark.slow
    @pytest.mark.timeout(3600)
    def test_the_average_beside_a_real_checkpoint_is_the_mean_of_checkpoints(tmp_path):
        """Saved at TP2 x PP2 x DP2; bit for bit the offline merge of the run's own; and trained on from at one rank."""
        sections = {"weight_averaging": {"enabled": True, "interval": 2, "window": 3, "save_average": True}}
        save = ["--ckpt-format", "torch_dist", "--save", tmp_path / "run", "--save-interval", "2"]
        few = ["--eval-interval", "100", "--lr-warmup-iters", "2", "--lr-decay-iters", "6"]
        finished(real(CHECKOUT, tmp_path, "run", sections, *save, *few, "--train-iters", "6"))
        averaged = tmp_path / "run" / "averaged"
        assert (averaged / "latest_checkpointed_iteration.txt").read_text() == "6"
        merge([tmp_path / "run" / f"iter_{n:07d}" for n in (2, 4, 6)], tmp_path / "merged")
        expected = read_tensors(tmp_path / "merged")
        found = read_tensors(averaged / "iter_0000006")
        names = [name for name in expected if "decoder" in name or "embedding" in name or "output_layer" in name]
        assert len(names) >= 10 and [name for name in names if not torch.equal(found[name], expected[name])] == []
        assert not any("optimizer" in name for name in found)
        one = ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1", "--global-batch-size", "2"]
        load = ["--load", averaged, "--train-iters", "6", "--ckpt-format", "torch_dist", *few, *one]
        started = finished(real(CHECKOUT, tmp_path, "again", {}, *load, "--finetune", ranks=1))
        assert min(logged(started)[0]) == 1 and "successfully loaded checkpoint" in started
        with real(CHECKOUT, tmp_path, "resumed", sections, *load, ranks=1) as resumed:
            done = resumed.wait(600)
        assert done.returncode != 0 and "no optimizer state; give --finetune" in done.stdout

    @pytest.mark.slow
    @pytest.mark.timeout(3600)
    def test_stock_code_runs_a_checkpoint_of_completep(tmp_path):
        """Folded, as it is where the JSON does not say: the script alone has the same losses on the same batches."""
        (tmp_path / "untouched.py").write_text(UNTOUCHED)
        few = ["--train-iters", "6", "--eval-interval", "6", "--lr-warmup-iters", "2", "--ckpt-format", "torch_dist"]
        losses = {}
        for residual in ({}, {"residual": "forward"}):
            folder = tmp_path / residual.get("residual", "not said")
            sections = {"completep": {"enabled": True, "base_width": 16, "base_depth": 2, **residual}}
            _, trained = logged(finished(real(CHECKOUT, tmp_path, "run", sections, *few, "--save", folder)))
            load = [*few, "--load", folder, "--finetune", "--skip-train"]
            _, alone = logged(finished(real(CHECKOUT, tmp_path, "alone", {}, *load, program="untouched")))
            assert trained[0].startswith("iteration 6 |") and alone[0].startswith("iteration 0 on validation set")
            losses[folder.name] = [line.rpartition(" ")[2] for line in (trained[0], alone[0])]
        assert losses["not said"][0] == losses["not said"][1] and losses["forward"][0] != losses["forward"][1]

    @pytest.mark.slow
    @pytest.mark.timeout(600)
    def test_the_launch_script_on_two_nodes(tmp_path):
        """Of one process each; a node without a number is told what is missing before anything starts."""
        place = {"NODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(harness.free_port()), "PROCESSES": "1"}
        environment = {**os.environ, **place, "MEGATRON": CHECKOUT, "DS_PLUGIN_PYTHON": sys.executable}
        few = ["--train-iters", "5", "--lr-warmup-iters", "2", "--eval-iters", "0"]
        command = ["bash", harness.ROOT / "launch_scripts" / "pretrain_megatron.sh", *few]

        def started(name, **more):
            with open(tmp_path / name, "w") as said:
                return subprocess.Popen(command, env={**environment, **more}, stdout=said, stderr=subprocess.STDOUT)

        nodes = [started(number, NODE_RANK=number) for number in "01"] + [started("nameless")]
        try:
            codes = [node.wait(500) for node in nodes]
        finally:
            for node in nodes:
                node.terminate()  # torchrun ends its processes
        first, second, nameless = [(tmp_path / name).read_text() for name in ("0", "1", "nameless")]
        assert codes == [0, 0, 1], first
        assert list(logged(second)[0]) == [1, 5] and "world size: 2, data-parallel size: 2" in first
        assert "give each node its number" in nameless
