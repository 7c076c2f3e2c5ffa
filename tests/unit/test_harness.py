"""The harness itself: what other tests rely on when they fail, hang or die."""

import os
import time
from pathlib import Path

import deepspeed
import pytest
import torch

from tests.harness import Launched, WorkerError, WorkerPools, launch, slow


def _rank_and_sum(offset: int, scale: int = 1) -> tuple[int, float, float]:
    rank = torch.distributed.get_rank()
    values = torch.tensor([float(rank + offset)]) * scale
    torch.distributed.all_reduce(values)
    again = torch.tensor([1.0])
    deepspeed.comm.all_reduce(again)
    return rank, values.item(), again.item()


def test_results_come_by_rank(workers: WorkerPools) -> None:
    # ranks 0, 1, 2 with offset 10 and scale 2: 2 * (10 + 11 + 12) = 66
    assert workers(3).run(_rank_and_sum, 10, scale=2) == [(0, 66.0, 3.0), (1, 66.0, 3.0), (2, 66.0, 3.0)]


def test_one_rank_works(workers: WorkerPools) -> None:
    assert workers(1).run(_rank_and_sum, 5) == [(0, 5.0, 1.0)]


def _environment() -> dict[str, str]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "DS_ACCELERATOR", "OMP_NUM_THREADS", "MASTER_ADDR")
    assert torch.get_num_threads() == 1
    assert int(os.environ["MASTER_PORT"]) > 0
    return {name: os.environ[name] for name in names}


def test_environment_is_that_of_the_launcher(workers: WorkerPools) -> None:
    same = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    same["MASTER_ADDR"] = "127.0.0.1"
    assert workers(2).run(_environment) == [{"RANK": r, "LOCAL_RANK": r, **same} for r in ("0", "1")]


def _raise_on(rank: int) -> None:
    print(f"about to work on {torch.distributed.get_rank()}")
    if torch.distributed.get_rank() == rank:
        raise ValueError(f"no good on {rank}")
    torch.distributed.barrier()


def test_an_exception_is_reported_first_and_with_its_rank(workers: WorkerPools) -> None:
    start = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        workers(3).run(_raise_on, 1)
    assert time.monotonic() - start < 10  # the peers fail in their barrier; nobody waits for a timeout
    message = str(caught.value)
    assert "ValueError: no good on 1" in message
    assert message.index("--- rank 1 raised") < message.index("--- rank 0 raised") < message.index("--- rank 2 raised")
    assert "about to work on 1" in message[message.index("--- rank 1 printed") : message.index("--- rank 0 raised")]
    _still_usable(workers)


def _raise_everywhere(rank_without: int) -> None:
    if torch.distributed.get_rank() != rank_without:
        raise KeyError("the same everywhere")


def test_expected_errors_are_returned(workers: WorkerPools) -> None:
    errors = workers(3).run(_raise_everywhere, 2, expect="errors")
    assert errors == [("KeyError", "'the same everywhere'")] * 2 + [None]
    assert len(set(workers(3).run(_raise_everywhere, -1, expect="errors"))) == 1


def _hang_on(rank: int) -> None:
    if torch.distributed.get_rank() == rank:
        _a_function_that_never_returns()


def _a_function_that_never_returns() -> None:
    time.sleep(1000)


@pytest.mark.parametrize("expect", ["results", "errors"])
def test_a_hang_gives_stacks_in_time(workers: WorkerPools, expect: str) -> None:
    workers.connection()  # the time below is that of the run alone
    start = time.monotonic()
    with pytest.raises(WorkerError, match="1 of 2 ranks failed, of which 1 did not finish") as caught:
        workers(2).run(_hang_on, 1, timeout=2, expect=expect)
    assert time.monotonic() - start < 8
    assert "--- rank 1 hung" in str(caught.value)
    assert "_a_function_that_never_returns" in str(caught.value)
    assert "rank 0" not in str(caught.value)
    _still_usable(workers)


def _wait_in_a_collective_on(rank: int) -> None:
    if torch.distributed.get_rank() == rank:
        torch.distributed.barrier()


def test_a_rank_left_alone_in_a_collective_is_a_hang(workers: WorkerPools) -> None:
    with pytest.raises(WorkerError, match="_wait_in_a_collective_on"):
        workers(2).run(_wait_in_a_collective_on, 0, timeout=2)


def _raise_or_sleep() -> None:
    if torch.distributed.get_rank() == 0:
        raise ValueError("alone")
    time.sleep(1000)


def test_a_failure_the_others_do_not_notice(workers: WorkerPools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.harness.GRACE_SECONDS", 1.0)
    with pytest.raises(WorkerError, match="1 did not finish .1 s after the first failure") as caught:
        workers(2).run(_raise_or_sleep, expect="errors")
    assert "ValueError: alone" in str(caught.value)
    assert "_raise_or_sleep" in str(caught.value).split("--- rank 1 hung")[1]


def _die_on(rank: int) -> None:
    if torch.distributed.get_rank() == rank:
        os._exit(7)
    torch.distributed.barrier()


def test_a_death_is_reported_at_once(workers: WorkerPools) -> None:
    start = time.monotonic()
    with pytest.raises(WorkerError, match="--- rank 0 died with exit code 7"):
        workers(2).run(_die_on, 0, timeout=60, expect="errors")
    assert time.monotonic() - start < 10
    _still_usable(workers)


def _still_usable(workers: WorkerPools) -> None:
    assert workers(2).run(_rank_and_sum, 0) == [(0, 1.0, 2.0), (1, 1.0, 2.0)]


def _leave_traces() -> None:
    os.environ["LEFT_BEHIND"] = "1"
    deepspeed.utils.groups.mpu = "stale"
    torch.rand(10)
    torch.left_behind = True  # type: ignore[attr-defined]
    torch.distributed.new_group([0])


def _traces() -> tuple[object, ...]:
    seed_and_draw = (torch.initial_seed(), torch.rand(1).item())
    return os.environ.get("LEFT_BEHIND"), deepspeed.utils.groups.mpu, hasattr(torch, "left_behind"), *seed_and_draw


def test_nothing_is_carried_over(workers: WorkerPools) -> None:
    clean = workers(2).run(_traces)
    assert clean[0][:3] == (None, None, False)
    assert clean[0] == clean[1]
    workers(2).run(_leave_traces)
    assert workers(2).run(_traces) == clean


class _TensorParallelOnly:
    """What DeepSpeed asks of ``mpu``: adjacent ranks share a model, every second one shares its data."""

    def __init__(self, size: int) -> None:
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        for start in range(0, world, size):
            ranks = list(range(start, start + size))
            group = torch.distributed.new_group(ranks)
            if rank in ranks:
                self._model = group
        for offset in range(size):
            ranks = list(range(offset, world, size))
            group = torch.distributed.new_group(ranks)
            if rank in ranks:
                self._data = group

    def get_model_parallel_group(self) -> torch.distributed.ProcessGroup:
        return self._model

    def get_model_parallel_world_size(self) -> int:
        return self._model.size()

    def get_model_parallel_rank(self) -> int:
        return self._model.rank()

    def get_data_parallel_group(self) -> torch.distributed.ProcessGroup:
        return self._data

    def get_data_parallel_world_size(self) -> int:
        return self._data.size()

    def get_data_parallel_rank(self) -> int:
        return self._data.rank()


def _train(stage: int, tensor_parallel: int = 1) -> tuple[int, list[float]]:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
    }
    mpu = _TensorParallelOnly(tensor_parallel) if tensor_parallel > 1 else None
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=stage == 3):
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 1))
    engine, *_ = deepspeed.initialize(model=model, config=config, mpu=mpu)
    data_rank = engine.mpu.get_data_parallel_rank() if mpu else torch.distributed.get_rank()
    inputs = torch.randn(2, 8, generator=torch.Generator().manual_seed(data_rank)).bfloat16()
    losses = []
    for _ in range(3):
        loss = engine(inputs).float().pow(2).mean()
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(mean.item() / torch.distributed.get_world_size())
    return engine.dp_world_size, losses


@pytest.mark.parametrize("ranks", [slow(2), slow(3), 4])
def test_deepspeed_engines_follow_one_another(workers: WorkerPools, ranks: int) -> None:
    # Every layout follows one that leaves other groups, hooks and patched constructors behind.
    layouts = [(1, 1), (3, 1), (1, 2), (3, 1), (1, 1)] if ranks % 2 == 0 else [(1, 1), (3, 1), (1, 1)]
    runs: dict[tuple[int, int], list[float]] = {}
    for stage, tensor_parallel in layouts:
        results = workers(ranks).run(_train, stage, tensor_parallel=tensor_parallel)
        data_parallel, losses = results[0]
        assert results == [(ranks // tensor_parallel, losses)] * ranks
        assert losses[2] < losses[0]
        assert runs.setdefault((stage, tensor_parallel), losses) == losses


def _assert_wrong() -> None:
    expected, got = 4, 2 + 3
    assert got == expected


def test_an_assertion_shows_its_locals(workers: WorkerPools) -> None:
    with pytest.raises(WorkerError, match="got = 5"):
        workers(1).run(_assert_wrong)


def _not_picklable() -> object:
    return lambda: None


def test_what_cannot_be_sent_says_so(workers: WorkerPools) -> None:
    with pytest.raises(TypeError, match="module-level function"):
        workers(2).run(lambda: None)
    with pytest.raises(WorkerError, match="--- rank 0 raised"):
        workers(1).run(_not_picklable)
    with pytest.raises(ValueError, match="ranks is 0"):
        workers(0)
    with pytest.raises(ValueError, match="expect is 'result'"):
        workers(1).run(_assert_wrong, expect="result")


SCRIPT = """
import os, sys, time
line = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} {sys.argv[2:]}\\n"
os.write(1, line.encode())  # in one piece: the ranks' lines share a pipe
if "--sleep" in sys.argv: time.sleep(600)
sys.exit(3 if "--fail" in sys.argv and os.environ["RANK"] == "1" else 0)
"""


@pytest.fixture()
def script(tmp_path: Path) -> Path:
    path = tmp_path / "a script.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.slow  # test_bad_input.py starts a launcher whose ranks fail
def test_launch_returns_output_and_exit_code(script: Path) -> None:
    done = launch([script, "--fail"], ranks=2, timeout=60)
    assert done.returncode == 3
    # of the failing rank: the launcher ends the other one at once, maybe before it has printed
    assert "rank 1 of 2 ['--fail']" in done.stdout
    assert 0 < done.seconds < 60


@pytest.mark.slow  # test_interruption.py kills one
def test_launched_group_can_be_killed(script: Path) -> None:
    with Launched([script, "--sleep"], ranks=2) as launched:
        launched.wait_for("rank 0 of 2", timeout=60)
        launched.kill()
        assert launched.wait(timeout=5).returncode == -9
