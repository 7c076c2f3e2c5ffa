"""Averaging on megatron-core's own optimizers against the full-gather reference: equal bit for bit.

Small odd shapes for every kind of optimizer, then a GPT under tensor, pipeline and data parallelism with Megatron's own
schedules, whose published average is read back at other sizes.
"""

import sys
import types
from functools import partial
from multiprocessing.managers import BaseManager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from ds_plugin.core.errors import CheckpointError, ConfigError, StateError
from ds_plugin.core.loss_statistics import adam_variance
from ds_plugin.weight_averaging.averager import WeightAverager
from ds_plugin.weight_averaging.config import WeightAveragingConfig
from ds_plugin.weight_averaging.state.fragments import check
from megatron_patches import megatron_on_cpu
from megatron_patches.models import gpt
from megatron_patches.training_loop.readings import LoopReadings
from megatron_patches.weight_averaging.masters import find_megatron_shards
from megatron_patches.weight_averaging.publish import publish_torch_dist
from tests import muon_stand_in
from tests.distributed import megatron_training as schedules
from tests.harness import slow
from tests.reference import averaging as reference

STEPS = 6
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
SECTION = WeightAveragingConfig.model_validate({"enabled": True, "interval": 1, "window": 3})


class Odd(torch.nn.Module):
    """143 + 13 elements in the training precision and 13 in another (as a rule fp32), in the bias's parameter group.

    Buckets are padded to 128 elements a rank, so two ranks cut the weight, and of three the last has only padding of
    the bf16 ones and nothing of the fp32 ones.
    """

    def __init__(self, dtype, scale_dtype=torch.float32, expert=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(13, 11).to(dtype))
        self.bias = torch.nn.Parameter(torch.randn(13).to(dtype))
        self.scale = torch.nn.Parameter(torch.randn(13).to(scale_dtype))
        if expert:  # another one on every expert-parallel rank
            self.expert = torch.nn.Parameter((torch.randn(17, 13) + dist.get_rank() % 2).to(dtype))
            self.expert.allreduce = False
        self.register_buffer("passes", torch.zeros(2))

    def forward(self, x):
        self.passes += 1
        y = torch.nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias) * self.scale
        return y.to(self.weight.dtype) @ self.expert.T if hasattr(self, "expert") else y


class FusedAdam(torch.optim.Optimizer):
    """Stands in for Transformer Engine's optimizer of this name, which needs a GPU: as much as megatron-core asks of it
    with use_precision_aware_optimizer. Gradients in ``decoupled_grad``, masters in the state, parameters written by
    its own step; the master it makes for an fp32 parameter is never used."""

    def __init__(
        self, params, lr, weight_decay, betas, eps, adam_w_mode=True, master_weights=False, use_decoupled_grad=False,
        master_weight_dtype=torch.float32, exp_avg_dtype=torch.float32, exp_avg_sq_dtype=torch.float32,
        store_param_remainders=False, capturable=False,
    ):  # fmt: skip
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})
        assert master_weights and use_decoupled_grad and adam_w_mode
        self.store_param_remainders = store_param_remainders

    def initialize_state(self, param, store_param_remainders):
        assert not store_param_remainders
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[param][name] = torch.zeros_like(param, dtype=torch.float32)
        self.state[param]["master_param"] = param.detach().clone().float()

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if not self.state[p]:
                    self.initialize_state(p, False)
                state, gradient = self.state[p], p.decoupled_grad.float()
                state["exp_avg"].lerp_(gradient, 0.1)
                state["exp_avg_sq"].lerp_(gradient * gradient, 0.05)
                weight = p if p.dtype is torch.float32 else state["master_param"]
                weight.sub_(group["lr"] * state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-6))
                p.copy_(weight)


def with_fused_adam():
    """As if Transformer Engine were installed: megatron-core makes no precision-aware optimizer without it."""
    import megatron.core.optimizer as package
    from megatron.core import utils
    from megatron.core.optimizer import distrib_optimizer
    from packaging.version import Version

    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers")
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    sys.modules[names[-1]].FusedAdam = package.Adam = distrib_optimizer.Adam = FusedAdam
    package.USING_PYTORCH_OPTIMIZER = False
    utils._te_version = Version("2.1.0")


KINDS = {
    # kind: (use_distributed_optimizer, DistributedDataParallelConfig, OptimizerConfig, model chunks)
    "whole": (False, {}, {}, 1),
    "distributed": (True, {}, {}, 1),
    "overlapped": (True, {"overlap_param_gather": True, "overlap_grad_reduce": True, "bucket_size": 40}, {}, 1),
    "two chunks": (True, {}, {}, 2),
    "layer-wise": (False, {}, {"optimizer": "dist_muon", "muon_fp32_matmul_prec": "highest"}, 1),
    "precision-aware": (True, {}, {"use_precision_aware_optimizer": True, "store_param_remainders": False}, 1),
}


def make(kind, dtype, *, expert=False, **changes):
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig

    megatron_on_cpu.enable()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(expert_model_parallel_size=2 if expert else 1)
    if kind == "precision-aware":
        with_fused_adam()
    build = get_megatron_optimizer
    if kind == "layer-wise":
        muon_stand_in.install()
        from megatron.core.optimizer.muon import get_megatron_muon_optimizer

        build = partial(get_megatron_muon_optimizer, layer_wise_distributed_optimizer=True)
    sharded, ddp_changes, optimizer_changes, count = KINDS[kind]
    torch.manual_seed(7)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=sharded, **ddp_changes)
    scale_dtype = dtype if kind in ("overlapped", "layer-wise") else torch.float32
    chunks = [DistributedDataParallel(config, ddp_config, Odd(dtype, scale_dtype, expert)) for _ in range(count)]
    values = {"lr": 0.05, "use_distributed_optimizer": sharded, "bf16": dtype is torch.bfloat16, "params_dtype": dtype}
    for chunk in chunks if kind == "layer-wise" else []:
        chunk.config.num_query_groups = 1
    optimizer = build(OptimizerConfig(**{**values, **optimizer_changes, **changes}), chunks)
    return chunks, optimizer


def loss_of(chunks, step):
    x = torch.randn(4, 11, generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))
    return sum(chunk(x).float().pow(2).mean() for chunk in chunks)


def train_step(chunks, optimizer, step):
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    loss = loss_of(chunks, step)
    loss.backward()
    for chunk in chunks:
        chunk.finish_grad_sync()
    applied, *_ = optimizer.step()
    assert applied
    return loss.item()


def sync(chunks, optimizer):
    """Megatron's own parameter refresh after a step, where there is one."""
    if hasattr(optimizer, "allgather_params"):
        optimizer.allgather_params()
    for chunk in chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            chunk.start_param_sync(force_sync=True)


class Wire(TorchDispatchMode):
    """Writes down every collective: its name, and the number of elements of its tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [a for a in torch.utils._pytree.tree_leaves(args) if isinstance(a, torch.Tensor)]
            self.calls.append((str(func), sum(t.numel() for t in tensors)))
        return func(*args, **(kwargs or {}))


def different(found, expected):
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def optimizer_state(optimizer):
    members = getattr(optimizer, "chained_optimizers", [optimizer])
    entries = [e for member in members if member.optimizer for e in member.optimizer.state.values()]
    return {(i, k): torch.as_tensor(v).clone() for i, entry in enumerate(entries) for k, v in entry.items()}


def by_fragments(shards, full_masters):
    """The masters put together from all ranks' fragments; each element is in one of them (or, alike, in all)."""
    tensors, found = shards.tensors(), shards.fragments()
    check(found, tensors)
    assert sum(f.count for f in found) == sum(t.numel() for t in tensors)
    ranks = [None] * dist.get_world_size()
    mine = [(f, tensors[f.shard].reshape(-1)[f.offset : f.offset + f.count].clone()) for f in found]
    dist.all_gather_object(ranks, mine)
    whole = {name: torch.full(master.shape, float("nan")) for name, master in full_masters.items()}
    covered = dict.fromkeys(whole, 0)
    for f, values in [part for rank in (ranks[:1] if shards.layout == "replicated" else ranks) for part in rank]:
        name = f.name
        if name.startswith("expert_rank"):
            owner, _, name = name.partition(".")
            if owner != f"expert_rank{dist.get_rank() % 2}":
                continue
        assert f.shape == tuple(whole[name].shape)
        whole[name].view(-1)[f.start : f.start + f.count] = values
        covered[name] += f.count
    assert covered == {name: master.numel() for name, master in whole.items()}
    return whole


def compare_with_gathered(kind, precision, expert=False):
    from tests.reference import megatron_averaging as gathered

    dtype = PRECISIONS[precision]
    chunks, optimizer = make(kind, dtype, expert=expert)
    plain = [train_step(chunks, optimizer, step) for step in range(STEPS)]
    sync(chunks, optimizer)
    plain_end = gathered.full_parameters(chunks)

    chunks, optimizer = make(kind, dtype, expert=expert)
    shards = find_megatron_shards(optimizer, chunks)
    averager = WeightAverager(SECTION, shards)
    losses, snapshots = [], []
    for step in range(1, STEPS):
        losses.append(train_step(chunks, optimizer, step - 1))
        with Wire() as wire:
            averager.snapshot(step, finite=True)
        assert wire.calls == []
        sync(chunks, optimizer)  # an overlapping run has not gathered yet
        snapshots.append(gathered.full_masters(optimizer, chunks))
    with Wire() as ordinary:
        sync(chunks, optimizer)
    mean = reference.mean(snapshots[-3:])
    parameters, masters = gathered.full_parameters(chunks), snapshots[-1]
    expected = {name: value.to(parameters[name].dtype) for name, value in mean.items()}
    state, rng = optimizer_state(optimizer), torch.get_rng_state()
    with torch.no_grad():
        raw = loss_of(chunks, 50).item()
        for chunk in chunks if kind == "overlapped" else []:  # the weights of before are still on their way
            chunk.start_param_sync()
            handles = [group.param_gather_handle for group in chunk.bucket_groups]
            assert len(handles) > 1 and None not in handles
        passes = [chunk.module.passes.tolist() for chunk in chunks]
        with Wire() as both_ways, averager.averaged_weights():
            inside = list(both_ways.calls)
            during = gathered.full_parameters(chunks)
            averaged = loss_of(chunks, 50).item()
            evaluated = [chunk.module.passes.tolist() for chunk in chunks]
        restored = passes == [chunk.module.passes.tolist() for chunk in chunks] != evaluated
        again = loss_of(chunks, 50).item()
    found = {
        "during": different(during, expected),
        "moved": different(during, parameters),
        "after": different(gathered.full_parameters(chunks), parameters)
        + different(gathered.full_masters(optimizer, chunks), masters)
        + different(optimizer_state(optimizer), state),
        "rng": torch.equal(torch.get_rng_state(), rng),
        "buffers": restored,
        "laid out": different(by_fragments(shards, masters), masters),
        "refreshes": (inside, both_ways.calls, ordinary.calls),
        "losses": raw == again != averaged,
        "steps": list(averager.steps),
        "local": sum(t.numel() for t in shards.tensors()),
        "layouts": [part.layout for part in shards.parts],
    }
    losses.append(train_step(chunks, optimizer, STEPS - 1))
    sync(chunks, optimizer)
    found["trained on"] = losses == plain and different(gathered.full_parameters(chunks), plain_end) == []
    found["variances"] = elements_with_variance(optimizer, chunks)
    return found


def elements_with_variance(optimizer, chunks):
    """Those that Adam trains, as the l1 norm over variances of 1 counts them on all ranks, and as they are."""
    readings = LoopReadings(optimizer, lambda: STEPS)
    for variance, _ in readings.adam_variances():
        variance.fill_(1)
    total = (adam_variance(readings) or [torch.zeros((), dtype=torch.float64)])[0]
    dist.all_reduce(total)
    muon = hasattr(optimizer, "allgather_params")  # trains the matrices
    named = [(name, p) for chunk in chunks for name, p in chunk.named_parameters() if not (muon and p.dim() == 2)]
    return total.item(), sum(p.numel() * (2 if "expert" in name else 1) for name, p in named)


def compare_all(kinds):
    return {(kind, precision): compare_with_gathered(kind, precision) for kind, precision in kinds}


CASES = {
    1: [("distributed", "bf16"), ("distributed", "fp32"), ("precision-aware", "bf16")],
    2: [(kind, precision) for kind in KINDS for precision in PRECISIONS],  # the stand-in for FusedAdam comes last
    3: [("distributed", "bf16"), ("distributed", "fp32"), ("overlapped", "bf16"), ("layer-wise", "bf16"),
        ("precision-aware", "bf16")],
}  # fmt: skip
if not muon_stand_in.available():  # later versions' Muon needs the package emerging_optimizers
    CASES = {ranks: [case for case in cases if case[0] != "layer-wise"] for ranks, cases in CASES.items()}
elif muon_stand_in.later():
    CASES[2].remove(("layer-wise", "fp32"))


def check_found(found, case):
    kind, _ = case
    assert found["during"] == [] and found["moved"], case
    assert found["after"] == [] and found["rng"] and found["buffers"] and found["laid out"] == [], case
    inside, both_ways, ordinary = found["refreshes"]
    agreed = [call for call in both_ways if call[0] == "c10d.allgather_.default"]  # ranks tell how it went, a few bytes
    assert [call for call in inside if call not in agreed] == ordinary, case
    assert [call for call in both_ways if call not in agreed] == 2 * ordinary, case
    assert both_ways[len(inside) :] == ordinary and sum(size for _, size in agreed) < 200, case  # none on the way out
    assert (len(ordinary) > 0) == (kind != "whole"), case  # the counter counts
    assert found["losses"] and found["trained on"], case
    assert found["steps"] == [3, 4, 5], case
    counted, elements = found["variances"]
    assert counted == elements > 0, case
    assert found["layouts"] == {"whole": ["replicated"], "layer-wise": ["sharded"] * 2}.get(kind, ["sharded"]), case


@pytest.mark.parametrize("ranks", CASES)
def test_equals_the_mean_of_gathered_snapshots(workers, ranks):
    results = workers(ranks).run(compare_all, CASES[ranks])
    for rank in results:
        for case, found in rank.items():
            check_found(found, case)
    locals_of = {case: [rank[case]["local"] for rank in results] for case in CASES[ranks]}
    if ranks == 3:  # odd and empty shards, as the model was made for
        assert locals_of["distributed", "bf16"] == [13 + 13 + 64, 143 - 64, 0]
    if ranks == 2:
        assert locals_of["whole", "bf16"] == [169, 169] and sum(locals_of["two chunks", "bf16"]) == 2 * 169


def test_expert_parallel_chains(workers):
    """Four ranks, two expert-parallel: the experts' masters are sharded over two of them, the others' over all."""
    for found in workers(4).run(compare_with_gathered, "distributed", "bf16", expert=True):
        assert found["layouts"] == ["sharded", "sharded"]
        check_found({**found, "layouts": ["sharded"]}, ("distributed", "bf16"))


def whole_experts():
    chunks, optimizer = make("whole", torch.bfloat16, expert=True)
    train_step(chunks, optimizer, 0)
    return elements_with_variance(optimizer, chunks)


def test_whole_experts_lie_on_fewer_ranks(workers):
    for counted, elements in workers(4).run(whole_experts):
        assert counted == elements > 0


# -- a GPT under TP2 x PP2 x DP2 -------------------------------------------------------------------------------------
SIZE = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": schedules.LENGTH}


def build_gpt(tensor_parallel, pipeline_parallel, seed=1234):
    """This rank's stage of a bf16 model, and its wrappers."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import Float16Module

    megatron_on_cpu.enable()
    cfg = gpt.GPTConfig.model_validate({**SIZE, "tensor_parallel": tensor_parallel})
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_parallel, pipeline_parallel)
    gpt.initialize_parallel(cfg, seed)
    config = gpt.transformer_config(cfg, torch.bfloat16)
    config.pipeline_model_parallel_size, config.pipeline_dtype = pipeline_parallel, torch.bfloat16
    model = GPTModel(
        config, gpt.layer_spec(cfg), schedules.VOCAB, schedules.LENGTH, share_embeddings_and_output_weights=False,
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
    )  # fmt: skip
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True)
    return DistributedDataParallel(config, ddp_config, Float16Module(config, model))


def train_and_publish(folder, pipeline_parallel):
    """Five steps with an average published after the fourth; and five without."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from tests.reference import megatron_averaging as gathered

    scheduler = types.SimpleNamespace(step=lambda increment: None)

    def start():
        ddp = build_gpt(2, pipeline_parallel)
        config = OptimizerConfig(
            lr=0.01, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True, adam_eps=1e-4
        )
        return ddp, get_megatron_optimizer(config, [ddp])

    ddp, optimizer = start()
    plain = [schedules.train_step(ddp, optimizer, scheduler, step) for step in range(5)]
    plain_end = gathered.full_parameters([ddp])

    ddp, optimizer = start()
    shards = find_megatron_shards(optimizer, [ddp])
    averager = WeightAverager(SECTION, shards)
    found, snapshots = [], []
    for step in range(1, 5):
        found.append(schedules.train_step(ddp, optimizer, scheduler, step - 1))
        averager.snapshot(step, finite=True)
        snapshots.append(gathered.full_masters(optimizer, [ddp]))
    reassembled = different(by_rank_fragments(shards), snapshots[-1])
    before, state, rng = gathered.full_parameters([ddp]), optimizer_state(optimizer), torch.get_rng_state()
    started, start_manager = [], BaseManager.start  # it would import the main script again
    BaseManager.start = lambda manager: (started.append(manager), start_manager(manager))
    publish_torch_dist(folder, averager, [ddp])
    left = different(gathered.full_parameters([ddp]), before) + different(optimizer_state(optimizer), state)
    found.append(schedules.train_step(ddp, optimizer, scheduler, 4))
    model = ddp.module.module
    expected = {n: m.to(before[n].dtype) for n, m in reference.mean(snapshots[-3:]).items()}
    parts = {n: p.partition_dim for n, p in model.named_parameters() if getattr(p, "tensor_model_parallel", False)}
    return {
        "as without": found == plain and different(gathered.full_parameters([ddp]), plain_end) == [],
        "left": left,
        "rng": torch.equal(torch.get_rng_state(), rng),
        "moved": len(different(expected, before)) > len(before) / 2,  # not the norms, whose steps bf16 rounds away
        "managers": (len(started), filesystem_async._results_queue),
        "rank": (
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_data_parallel_rank(),
        ),
        "mean": {with_global_layer(n, model): value for n, value in expected.items()},
        "cut": {with_global_layer(n, model): dim for n, dim in parts.items()},
        "reassembled": reassembled,
    }


def by_rank_fragments(shards):
    """The masters put together from the fragments of this rank's data-parallel group."""
    from megatron.core import parallel_state

    group, tensors = parallel_state.get_data_parallel_group(), shards.tensors()
    ranks = [None] * dist.get_world_size(group)
    mine = [(f, tensors[f.shard][f.offset : f.offset + f.count].clone()) for f in shards.fragments()]
    dist.all_gather_object(ranks, mine, group)
    whole = {}
    for f, values in (part for rank in ranks for part in rank):
        master = whole.setdefault(f.name, torch.full(f.shape, float("nan")))
        master.view(-1)[f.start : f.start + f.count] = values
    return whole


def with_global_layer(name, model):
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) + model.decoder.layers[0].layer_number - 1)
    return ".".join(parts)


def read_back(folder, tensor_parallel):
    """The published weights in a freshly drawn model of other sizes: this rank's part, and what else was saved."""
    from megatron.core import dist_checkpointing

    model = build_gpt(tensor_parallel, 1, seed=99).module.module
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, folder)
    model.load_state_dict(state.pop("model"))
    return {name: p.detach().clone() for name, p in model.named_parameters()}, state


@pytest.mark.parametrize("stages", [1, slow(2)])
def test_a_published_average_is_the_gathered_mean_at_any_size(workers, tmp_path, stages):
    """Of tensor and data parallelism 2, and so many pipeline stages."""
    folder = tmp_path / "average"
    ranks = workers(4 * stages).run(train_and_publish, str(folder), stages)
    whole, cut = {}, {}
    for rank in ranks:
        assert rank["as without"] and rank["left"] == [] and rank["rng"] and rank["moved"]
        assert rank["managers"] == (0, None)
        assert rank["reassembled"] == []
        cut |= rank["cut"]
    by_rank = {rank["rank"]: rank["mean"] for rank in ranks}
    assert len(by_rank) == 4 * stages
    for stage in range(stages):
        assert all(torch.equal(by_rank[stage, t, 0][n], m) for t in (0, 1) for n, m in by_rank[stage, t, 1].items())
        for name, part in by_rank[stage, 0, 0].items():
            whole[name] = torch.cat([part, by_rank[stage, 1, 0][name]], cut[name]) if name in cut else part
    assert [path.name for path in tmp_path.iterdir()] == ["average"]

    [(weights, rest)] = workers(1).run(read_back, str(folder), 1)
    assert different(weights, whole) == [] and len(weights) > 40
    assert rest["weight_averaging"] == {"mode": "sliding", "steps": [2, 3, 4], "horizon": None}
    assert rest["iteration"] == 4 and rest["checkpoint_version"] == 3.0
    halves = [weights for weights, _ in workers(2).run(read_back, str(folder), 2)]
    joined = {n: torch.cat([h[n] for h in halves], cut[n]) if n in cut else halves[0][n] for n in whole}
    assert different(joined, whole) == []


# -- refusals --------------------------------------------------------------------------------------------------------
def message_of(error, call, *args):
    """The whole message of the error that the call must raise."""
    try:
        call(*args)
    except error as raised:
        assert type(raised) is error
        return str(raised)
    raise AssertionError(f"{call.__name__} raised nothing")


def refused_optimizers():
    """One thing after the other that averaging cannot do, and what it says."""
    from megatron.core.optimizer import ChainedOptimizer
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    def refused(chunks, optimizer, error=ConfigError):
        return message_of(error, find_megatron_shards, optimizer, chunks)

    said = {}
    chunks, optimizer = make("distributed", torch.bfloat16)
    [member] = optimizer.chained_optimizers
    said["LayerWise is not supported"] = refused(chunks, type("LayerWise", (ChainedOptimizer,), {})([member]))
    said["is not supported; use one of FP32Optimizer"] = refused(chunks, torch.optim.SGD(chunks[0].parameters()))
    said["that is in none of the model chunks"] = refused([make("whole", torch.bfloat16)[0][0]], member)
    whole = make("whole", torch.bfloat16)[1].chained_optimizers
    chain = object.__new__(ChainedOptimizer)
    chain.chained_optimizers = [member, *whole]
    said["and one that is not"] = refused(chunks, chain)
    inner, member.optimizer = member.optimizer, object.__new__(HybridDeviceOptimizer)
    said["--optimizer-cpu-offload"] = refused(chunks, optimizer)
    member.optimizer = inner
    config = chunks[0].ddp_config
    config.use_megatron_fsdp = True
    said["use_megatron_fsdp"] = refused(chunks, optimizer)
    config.use_megatron_fsdp, config.num_distributed_optimizer_instances = False, 1 + dist.get_rank()
    said["num_distributed_optimizer_instances is 2"] = refused(chunks, optimizer)  # on one rank, and so on both
    config.num_distributed_optimizer_instances = 1
    runs = member.__dict__.pop("shard_fp32_groups")
    said["DistributedOptimizer has no attribute 'shard_fp32_groups'"] = refused(chunks, optimizer, StateError)
    member.shard_fp32_groups = runs
    whole_tensors = torch.nn.Linear(2, 2)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole_tensors.weight = torch.nn.Parameter(distribute_tensor(whole_tensors.weight.detach(), mesh))
    said["parameter 'weight' is a DTensor"] = refused([whole_tensors], optimizer)
    chunks, optimizer = make("precision-aware", torch.bfloat16, main_params_dtype=torch.float16)
    said["main_params_dtype is torch.float16"] = refused(chunks, optimizer)
    chunks, optimizer = make("precision-aware", torch.bfloat16, store_param_remainders=True)
    said["store_param_remainders"] = refused(chunks, optimizer)
    return said


def test_what_is_not_supported_is_refused_by_name_on_every_rank(workers):
    first, second = workers(2).run(refused_optimizers)
    assert len(first) == 11
    assert [words for words, message in first.items() if words not in message] == []
    assert first == second


def refused_publishing(folder):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    folder = Path(folder)
    chunks, optimizer = make("distributed", torch.float32)
    averager = WeightAverager(SECTION, find_megatron_shards(optimizer, chunks))
    said = [message_of(StateError, publish_torch_dist, folder / "early", averager, chunks)]
    for step in range(2):
        train_step(chunks, optimizer, step)
        averager.snapshot(step + 1, finite=True)
    before = [p.detach().clone() for p in chunks[0].parameters()]
    dist.barrier()
    (folder / "there").mkdir(exist_ok=True)
    (folder / ".failed.partial").mkdir(exist_ok=True)  # as an interrupted attempt leaves it
    dist.barrier()
    said.append(message_of(CheckpointError, publish_torch_dist, folder / "there", averager, chunks))
    others = make("distributed", torch.float32)[0]
    said.append(message_of(StateError, publish_torch_dist, folder / "others", averager, others))
    Odd.sharded_state_dict = lambda self: {}

    def full_disk(state, target):
        Path(target, f"part{dist.get_rank()}").write_text("half")
        raise OSError("no space left")

    dist_checkpointing.save = full_disk
    said.append(message_of(CheckpointError, publish_torch_dist, folder / "failed", averager, chunks))
    dist.barrier()
    assert filesystem_async._results_queue is None and not averager.swapped
    assert all(torch.equal(p, old) for p, old in zip(chunks[0].parameters(), before, strict=True))
    return said, sorted(path.name for path in folder.iterdir())


def test_publishing_is_whole_or_absent(workers, tmp_path):
    first, second = workers(2).run(refused_publishing, str(tmp_path))
    words = ("no snapshot", "there exists", "not that of these model chunks", "no space left")
    assert all(word in message for word, message in zip(words, first[0], strict=True)), first[0]
    assert first == second and first[1] == ["there"]
