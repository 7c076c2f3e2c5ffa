"""The benchmark on Megatron-LM's script without the script: its turns among processes that only count, its figures."""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import socket
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch.distributed as dist

from ds_plugin.config import PluginConfig
from megatron_patches.pretrain.lengths import Lengths

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_megatron.py"
JOBS = ["first", "second"]


def _benchmark():
    spec = importlib.util.spec_from_file_location("bench_megatron", BENCHMARK)
    module = sys.modules["bench_megatron"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def play(folder):
    """Rank 0 gives the turns; 1 and 2 are the first job, 3 and 4 the second.

    An iteration takes each as many ticks as its rank says; while one waits for its turn, 1000 go by.
    """
    bench, rank, folder = _benchmark(), dist.get_rank(), Path(folder)
    if rank == 0:
        return give_turns(bench, folder)
    readings, worked = 0, 0

    def ticks():
        nonlocal readings
        readings += 1
        return 1000 * (readings // 2) + worked

    bench.CLOCKS = {"ticks": ticks}
    dist.barrier()  # the socket is there
    held = bench.Held(folder / "turns", {"job": JOBS[(rank - 1) // 2], "pid": os.getpid()})
    spans = []
    with contextlib.suppress(EOFError):
        while True:
            held.wait()
            began = time.monotonic()
            time.sleep(0.01 * rank)
            worked += rank
            spans.append((began, time.monotonic()))
    return spans


def give_turns(bench, folder):
    jobs = {name: bench.Job() for name in JOBS}
    with socket.create_server(str(folder / "turns"), family=socket.AF_UNIX) as server:
        dist.barrier()
        for _ in range(4):
            connection = Connection(server.accept()[0].detach())
            hello = connection.recv()
            jobs[hello["job"]].join(hello["pid"], connection)
    spent = bench.take_turns(jobs, 3)
    pids = [pid for job in jobs.values() for pid in job.pids]
    deadline = time.monotonic() + 30
    while any(state(pid) != "T" for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    stopped = [state(pid) for pid in pids]
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    return spent, stopped  # and the connections end with this process


def state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_one_job_computes_at_a_time_and_waiting_is_not_counted(workers, tmp_path):
    (spent, stopped), *spans = workers(5).run(play, str(tmp_path))
    assert spent == {"first": [{"ticks": 1 + 2}] * 3, "second": [{"ticks": 3 + 4}] * 3}
    assert stopped == ["T"] * 4
    turns = [("first", 0), ("second", 0), ("second", 1), ("first", 1), ("first", 2), ("second", 2)]
    both = {"first": spans[:2], "second": spans[2:]}
    ends = 0.0
    for name, number in turns:
        assert min(rank[number][0] for rank in both[name]) > ends
        ends = max(rank[number][1] for rank in both[name])
    assert [len(rank) for rank in spans] == [3] * 4


def test_ratios_are_of_the_same_round():
    """Rounds of 2; sums 2, 4, 4 of the first, 2, 6, 12 of the second: 1, 1.5, 3; the first round is left out."""
    bench = _benchmark()
    bench.ROUND = 2
    seconds = {"alone": [9, 9, 1, 1, 3, 1, 2, 2], "all methods": [1, 1, 2, 0, 3, 3, 4, 8]}
    spent = {name: [{"ticks": float(s)} for s in found] for name, found in seconds.items()}
    assert bench.over_alone(spent, "ticks") == {"all methods": {"ratio": 1.5, "low": 1.25, "high": 2.25, "best": 1.0}}


@pytest.mark.parametrize(("seconds", "code"), [(1.009, 0), (1.011, 1), (float("nan"), 1)])
def test_figures_and_the_bound(tmp_path, monkeypatch, seconds, code):
    class Fixed:
        def __init__(self, main):
            self.turn = lambda: {"main thread": main, "process": 2 * main}

    @contextlib.contextmanager
    def started(args, folder):
        yield {"alone": Fixed(1.0), "alone again": Fixed(1.5), "all methods": Fixed(seconds)}, "0.16"

    bench, out = _benchmark(), tmp_path / "found.json"
    monkeypatch.setattr(bench, "started", started)
    (tmp_path / "pretrain_gpt.py").touch()
    arguments = ["--megatron", str(tmp_path), "--rounds", "2", "--out", str(out)]
    assert [bench.main(arguments), bench.main([*arguments, "--check"])] == [0, code]
    described = json.loads(out.read_text())
    assert described["versions"]["Megatron-LM's core"] == "0.16"
    assert described["seconds"] == {"main thread": 1 / 8, "process": 2 / 8}
    assert described["found"]["process"]["alone again"] == {"ratio": 1.5, "low": 1.5, "high": 1.5, "best": 1.5}
    assert described["found"]["main thread"]["all methods"]["ratio"] == pytest.approx(seconds, nan_ok=True)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--megatron=.", "has no pretrain_gpt.py; give a checkout"),
        ("--ranks=6", "6 does not divide"),
        ("--ranks=-4", "-4 does not divide"),
        ("--rounds=1", "1 round(s) have no quartiles"),
    ],
)
def test_wrong_arguments(tmp_path, capsys, option, said):
    (tmp_path / "pretrain_gpt.py").touch()
    with pytest.raises(SystemExit):
        _benchmark().main([f"--megatron={tmp_path}", option])
    assert said in capsys.readouterr().err


def test_the_warmup_is_over_and_the_methods_are_on_when_the_first_round_is():
    bench = _benchmark()
    sections = PluginConfig.from_dict(bench.METHODS)
    assert None not in (sections.sequence_length_warmup, sections.completep, sections.weight_averaging)
    lengths = Lengths(sections.sequence_length_warmup, full=bench.LENGTH, layout_multiple=1)
    seen = []
    for _ in range(bench.ROUND + 1):
        seen.append(lengths.length)
        lengths.booked(1, lengths.length, True)
    assert seen[0] < seen[-2] <= seen[-1] == bench.LENGTH
    assert sections.weight_averaging.interval == bench.ROUND
    assert list(bench.JOBS.values()) == [{}, {}, bench.METHODS]


@pytest.mark.parametrize(("ranks", "layout"), [(1, ["1", "1", "4"]), (2, ["2", "1", "4"]), (8, ["2", "2", "8"])])
def test_layout(ranks, layout):
    bench = _benchmark()
    given = bench.flags(argparse.Namespace(ranks=ranks, rounds=2, width=128, depth=2, micro_batches=2))
    found = dict(zip(given[::2], given[1::2], strict=True))
    names = ["--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--global-batch-size"]
    assert [found[name] for name in names] == layout
    assert found["--seq-length"] == str(bench.LENGTH) and int(found["--train-iters"]) > 3 * bench.ROUND
