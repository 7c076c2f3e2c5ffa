"""What the plugin costs an iteration of Megatron-LM's own script: all methods on against the script alone.

    python benchmarks/bench_megatron.py --megatron CHECKOUT [--out FILE.json] [--check]

Jobs of ``CHECKOUT/pretrain_gpt.py`` (tensor x pipeline x data parallel, distributed optimizer, CPU, gloo) that train
the same model on samples of the same length are started together: two without anything wrapped ("alone", and "alone
again", which says what the measurement is good for), one with sequence length warmup, CompleteP and averaging ("all
methods"). They take turns iteration by iteration, in an order that rotates, and only one computes at a time: each rank
is held where its training loop calls ``train_step``, outside the plugin's wrappers, and the jobs whose turn it is not
are stopped. An iteration is what lies between two such calls, so that reading, counting and logging are in it. A round
is as many iterations of each job as there are between two snapshots and two logged lines, so that one of each is in
it; in the first, which is left out, the warmup reaches the full length. The figure is the median over the other rounds
of the time over that of "alone" in the same round, with the middle half of the rounds beside it.

Time is CPU time of the ranks' main threads, all ranks together: there the model and the plugin compute. "process" is
that of all their threads. It is not what is bounded, because gloo wakes a thread of each process group 100 times a
second, also in ranks that wait: that grows with the time on the clock, which other programs on the machine prolong.
"""

import argparse
import contextlib
import datetime
import importlib
import json
import os
import platform
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ds_plugin.atomic import atomic_write

ROUND = 10  # iterations; also between two snapshots, and between two logged lines
BOUND = 1.01
LENGTH = 256
CLOCKS: dict[str, Callable[[], float]] = {"main thread": time.thread_time, "process": time.process_time}
METHODS = {
    "sequence_length_warmup": {
        "enabled": True, "start_length": LENGTH // 2, "end_length": LENGTH, "duration": {"steps": ROUND},
        "learning_rate": {"by": "tokens"},
    },
    "completep": {"enabled": True, "base_width": 64, "base_depth": 2},
    "weight_averaging": {"enabled": True, "interval": ROUND, "window": 5},
}  # fmt: skip
JOBS: dict[str, dict[str, Any]] = {"alone": {}, "alone again": {}, "all methods": METHODS}
_SOCKET = "turns"
_PROGRAM = """
if __name__ == "__main__":  # a module of its own: Megatron-LM's script is executed in this one, over its names
    import sys
    from benchmarks import bench_megatron
    bench_megatron.rank(sys.argv[1:])
"""
_PACKAGES = ("torch", "deepspeed", "megatron-core")
_SECONDS = 600.0  # that a job may take to start, or for an iteration

Spent = dict[str, float]  # seconds by clock
Row = dict[str, float]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a line per job and clock, write the JSON; exit code 1 when ``--check``'s bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron", type=Path, required=True, metavar="CHECKOUT", help="of Megatron-LM")
    parser.add_argument("--ranks", type=int, default=8, help="processes of a job: 1, 2, or a multiple of 4")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=4, help="of 2 samples, in each pipeline and iteration")
    parser.add_argument("--out", type=Path, help="write the figures here")
    parser.add_argument("--check", action="store_true", help="fail when the plugin costs more than 1 %%")
    args = parser.parse_args(arguments)
    if not (args.megatron / "pretrain_gpt.py").is_file():
        parser.error(f"--megatron: {args.megatron} has no pretrain_gpt.py; give a checkout of Megatron-LM")
    if args.ranks not in (1, 2) and (args.ranks < 4 or args.ranks % 4):
        parser.error(
            f"--ranks: {args.ranks} does not divide into tensor x pipeline 2 x 2; write 1, 2 or a multiple of 4"
        )
    if args.rounds < 2:
        parser.error(f"--rounds: {args.rounds} round(s) have no quartiles; write 2 or more")
    load = os.getloadavg()[0]  # of other programs: it is taken before the jobs start
    with tempfile.TemporaryDirectory(prefix="bench-megatron-") as folder, started(args, Path(folder)) as (jobs, core):
        print(f"{len(jobs)} jobs of {args.ranks} ranks wait for their turns", flush=True)
        spent = take_turns(jobs, (args.rounds + 1) * ROUND)
    found = {clock: over_alone(spent, clock) for clock in CLOCKS}
    seconds = {clock: statistics.median(s[clock] for s in spent["alone"][ROUND:]) / args.ranks for clock in CLOCKS}
    for clock, rows in found.items():
        print(f"{clock}: {seconds[clock]:.3f} s an iteration and rank alone")
        for name, row in rows.items():
            print(f"{clock}: {name}: {row['ratio']:.4f} (middle half {row['low']:.4f} to {row['high']:.4f})")
    if args.out is not None:
        described = {
            "date": datetime.date.today().isoformat(),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in _PACKAGES},
                "Megatron-LM's core": core,
            },
            "device": f"{os.cpu_count()} CPU cores, one thread a process",
            "load_average": load,
            "settings": {k: v for k, v in vars(args).items() if k not in ("out", "check", "megatron")},
            "methods": METHODS,
            "seconds": seconds,
            "found": found,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(args.out, lambda path: path.write_text(json.dumps(described, indent=1) + "\n"))
    return 1 if args.check and not found["main thread"]["all methods"]["ratio"] <= BOUND else 0


# -- the ranks ---------------------------------------------------------------------------------------------------------


def rank(arguments: list[str]) -> None:
    """Run a script with the sections of the last argument, a JSON file, each of its training steps held for its turn.

    The file's name is the job's, and beside it lies the socket over which the turns are given. With a file that enables
    nothing, nothing is wrapped but for the turns.
    """
    from megatron_patches import active
    from megatron_patches.pretrain import script

    path, given, sections = script.read_arguments(arguments)
    script.prepare_host(path)
    script.install(sections)
    file = Path(arguments[-1])
    training = importlib.import_module(script.TRAINING)
    hello = {
        "job": file.stem,
        "pid": os.getpid(),
        "core": importlib.import_module("megatron.core").__version__,
        "wrapped": sum(change.name.startswith(script.TRAINING) for change in active()),
    }
    train_step: Callable[..., Any] = training.train_step
    held = Held(file.with_name(_SOCKET), hello)

    def in_turn(*args: Any, **kwargs: Any) -> Any:
        held.wait()
        return train_step(*args, **kwargs)

    vars(training)["train_step"] = in_turn
    sys.argv = [str(path), *given]
    script.execute(path)


class Held:
    """One rank, held between two iterations until its job's turn comes."""

    def __init__(self, address: Path, hello: Mapping[str, Any]):
        """``hello``: what is said at the first `wait`, instead of the seconds since the last."""
        self._address, self._hello = address, hello
        self._turns: Connection | None = None
        self._since: Spent = {}

    def wait(self) -> None:
        """Say what was spent since the last turn began, and return when the next one does. EOFError: there is none."""
        now = {name: clock() for name, clock in CLOCKS.items()}
        if self._turns is None:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(self._address))
                self._turns = Connection(client.detach())
            self._turns.send(self._hello)
        else:
            self._turns.send({name: now[name] - since for name, since in self._since.items()})
        self._turns.recv()
        self._since = {name: clock() for name, clock in CLOCKS.items()}


# -- the turns ---------------------------------------------------------------------------------------------------------


class Job:
    """The ranks of a job, all of which wait for their turn."""

    def __init__(self) -> None:
        self.pids: list[int] = []
        self._ranks: list[Connection] = []

    def join(self, pid: int, connection: Connection) -> None:
        """Take in a rank that waits for the first turn, and stop it."""
        self.pids.append(pid)
        self._ranks.append(connection)
        os.kill(pid, signal.SIGSTOP)  # its threads wake up while they wait, which would disturb the other jobs

    def turn(self) -> Spent:
        """One iteration, of this job alone: what its ranks spent, together.

        Raises:
            TimeoutError: it takes too long. EOFError: a rank has ended.
        """
        for pid in self.pids:
            os.kill(pid, signal.SIGCONT)
        for connection in self._ranks:
            connection.send(None)
        spent = [_received(connection) for connection in self._ranks]
        for pid in self.pids:
            os.kill(pid, signal.SIGSTOP)
        return {clock: sum(one[clock] for one in spent) for clock in spent[0]}


def _received(connection: Connection) -> dict[str, Any]:
    if not connection.poll(_SECONDS):
        raise TimeoutError(f"an iteration has taken {_SECONDS:g} s")
    found: dict[str, Any] = connection.recv()
    return found


@contextlib.contextmanager
def started(args: argparse.Namespace, folder: Path) -> Iterator[tuple[dict[str, Job], str]]:
    """The jobs, each before its first iteration, and the version of the checkout's core; they are killed on leaving.

    Raises:
        TimeoutError: a job has not come so far; with its output.
    """
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests are not installed
    from tests.megatron_lm import real

    (folder / "timed.py").write_text(_PROGRAM)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(str(folder / _SOCKET), family=socket.AF_UNIX, backlog=128))
        server.settimeout(_SECONDS)
        launched = {}
        for name, sections in JOBS.items():
            file = folder / f"{name}.json"
            given: list[str | Path] = [*flags(args), "--ds-plugin-config", file]
            job = real(args.megatron, folder, name, sections, *given, program="timed", ranks=args.ranks)
            launched[name] = stack.enter_context(job)
        for process in launched.values():
            process.wait_for("before the start of training step", _SECONDS)
        jobs = {name: Job() for name in JOBS}
        for _ in range(len(JOBS) * args.ranks):
            connection = Connection(server.accept()[0].detach())
            hello = _received(connection)
            assert (hello["wrapped"] > 0) == bool(JOBS[hello["job"]]), hello
            jobs[hello["job"]].join(hello["pid"], connection)
        try:
            yield jobs, hello["core"]
        except (EOFError, ConnectionError):
            for name, process in launched.items():
                print(f"--- {name}\n{process.output[-4000:]}", file=sys.stderr)
            raise


def flags(args: argparse.Namespace) -> list[str]:
    """Megatron-LM's, beyond and in place of those that `tests.megatron_lm` gives: layout, model and intervals."""
    tensor, pipeline = min(2, args.ranks), 2 if args.ranks >= 4 else 1
    given = {
        "tensor-model-parallel-size": tensor,
        "pipeline-model-parallel-size": pipeline,
        "num-layers": args.depth,
        "hidden-size": args.width,
        "num-attention-heads": args.width // 64,
        "seq-length": LENGTH,
        "max-position-embeddings": LENGTH,
        "micro-batch-size": 2,
        "global-batch-size": 2 * args.micro_batches * (args.ranks // (tensor * pipeline)),
        "train-iters": (args.rounds + 1) * ROUND + 1,  # the last is begun only
        "log-interval": ROUND,
        "eval-interval": 10**9,
        "eval-iters": 0,
    }
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def take_turns(jobs: Mapping[str, Any], iterations: int) -> dict[str, list[Spent]]:
    """By job: what each of its iterations took. Who begins rotates."""
    names = list(jobs)
    spent: dict[str, list[Spent]] = {name: [] for name in names}
    for number in range(iterations):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            spent[name].append(jobs[name].turn())
    return spent


def over_alone(spent: Mapping[str, Sequence[Spent]], clock: str) -> dict[str, Row]:
    """By job but for the first: median and quartiles over the rounds of its time over the first's. Not the first round.

    "best" is its smallest time over the first's smallest, which other programs disturb least.
    ``spent``: by job, the iterations of whole rounds.
    """
    alone, *others = (
        [sum(s[clock] for s in found[start : start + ROUND]) for start in range(ROUND, len(found), ROUND)]
        for found in spent.values()
    )
    rows = {}
    for name, rounds in zip(list(spent)[1:], others, strict=True):
        ratios = [one / base for one, base in zip(rounds, alone, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        rows[name] = {"ratio": middle, "low": low, "high": high, "best": min(rounds) / min(alone)}
    return rows


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no job is left behind, stopped
    sys.exit(main())
