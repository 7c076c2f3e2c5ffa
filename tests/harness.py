"""Run test functions on several gloo ranks, and real scripts under the real launcher.

Importing torch, DeepSpeed and Megatron-core costs seconds per process. One fork server per pytest session imports them
once; every ``run`` then forks a fresh set of ranks from it (about 10 ms each). A rank is never used twice, and that is
what keeps one test from influencing the next: process groups, the cached globals of both frameworks, monkey patches,
environment variables and random states all go with the process. Nothing has to be reset, so nothing can be forgotten.

The three processes involved::

    pytest                     --(pickled messages)-->  fork server            --(fork)-->  rank 0 .. n-1
    Pool.run: limits, reports                           serve: forks, relays                gloo, the test function

This file is the pytest side, and the launcher for whole scripts; fork_server.py is the other two.
"""

import contextlib
import dataclasses
import importlib.util
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.fork_server import Job, Outcome, RankError

ROOT = Path(__file__).resolve().parent.parent


def benchmark(name: str) -> ModuleType:
    """A module of benchmarks/ or tests/gpu/, read anew, as the script would be: it is not installed, and imports those
    beside it."""
    folders = [ROOT / "benchmarks", ROOT / "tests" / "gpu"]
    sys.path += [str(folder) for folder in folders if str(folder) not in sys.path]
    path = next(folder / f"{name}.py" for folder in folders if (folder / f"{name}.py").is_file())
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def slow(*values: Any, **settings: Any) -> Any:
    """A case of a parametrized test that only ``-m slow`` runs: the others cover each value of every parameter."""
    return pytest.param(*values, marks=pytest.mark.slow, **settings)


# Every rank inherits these from the fork server. They are set before torch is imported, which is when most are read.
RANK_ENV = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",  # the same tests on a machine with GPUs; forking after CUDA starts would break it
    "TORCHDYNAMO_DISABLE": "1",  # a fresh process would compile every fused kernel of Megatron-core again
    "GLOO_SOCKET_IFNAME": "lo",  # the machine's own name need not resolve
}
SERVER_START_SECONDS = 120.0
# Once a rank has failed, how long the others may take to notice before they count as hanging.
GRACE_SECONDS = 15.0
LOG_TAIL_CHARS = 4000


class WorkerError(Exception):
    """At least one rank raised, died or hung; the message holds every rank's traceback, stack or exit code."""


class WorkerPools:
    """The session's fork server. ``pools(n).run(fn, ...)`` runs ``fn`` on ``n`` ranks."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._conn: Connection | None = None

    def __call__(self, ranks: int) -> "Pool":
        if ranks < 1:
            raise ValueError(f"ranks is {ranks}; write a positive number of processes")
        return Pool(self, ranks)

    def start(self) -> None:
        """Start the fork server unless it runs already. Returns at once: its imports go on in the background."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        ours, theirs = multiprocessing.Pipe(duplex=True)
        code = "import sys; sys.path.insert(0, sys.argv[1]); import tests.fork_server as s; s.serve(int(sys.argv[2]))"
        self._log = tempfile.NamedTemporaryFile(prefix="fork-server-", suffix=".log")
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(ROOT), str(theirs.fileno())],
            env={**os.environ, **RANK_ENV},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            # Its own session: Ctrl-C reaches pytest alone, which then ends the ranks in order.
            start_new_session=True,
        )
        theirs.close()
        self._conn = ours
        self._ready = False

    def connection(self) -> Connection:
        """The pipe to a server that has finished its imports."""
        self.start()
        assert self._conn is not None
        if not self._ready:
            if not self._conn.poll(SERVER_START_SECONDS):
                self.close()
                raise WorkerError(f"the fork server was not ready after {SERVER_START_SECONDS:.0f} s")
            try:
                error = self._conn.recv()
            except EOFError:
                error = "it died"
            if error is not None:
                log = _tail(Path(self._log.name))
                self.close()
                raise WorkerError(f"the fork server could not start: {error}\n--- it printed\n{log}")
            self._ready = True
        return self._conn

    def close(self) -> None:
        """End the server, which takes all ranks with it."""
        if self._conn is not None:
            self._conn.close()
        if self._process is not None:
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = self._conn = None


@dataclasses.dataclass
class Pool:
    """One world size of a ``WorkerPools``."""

    pools: WorkerPools
    ranks: int

    def run(
        self, fn: Callable[..., Any], *args: Any, timeout: float = 120, expect: str = "results", **kwargs: Any
    ) -> list[Any]:
        """Call ``fn(*args, **kwargs)`` on every rank of a fresh gloo world.

        ``fn`` and whatever it takes and returns must pickle: a module-level function, plain data, CPU tensors. Inside,
        ``torch.distributed`` and ``deepspeed.comm`` are initialised, RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_SIZE,
        MASTER_ADDR and MASTER_PORT are set, and the random seeds are the same on all ranks.

        Args:
            timeout: seconds after which every rank's stacks are collected and the ranks killed.
            expect: "results" returns what each rank returned; "errors" returns per rank its ``RankError``, or None
                where it returned normally. Death and hanging raise under both.

        Raises:
            WorkerError: a rank raised (with expect="results"), died, or did not finish in time.
        """
        __tracebackhide__ = True
        if expect not in ("results", "errors"):
            raise ValueError(f'expect is {expect!r}; write "results" or "errors"')
        try:
            payload = pickle.dumps((fn, args, kwargs))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(f"cannot send {fn!r} to the ranks, write it as a module-level function: {error}") from error
        conn = self.pools.connection()

        folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        try:
            return self._collect(conn, Job(payload, self.ranks, free_port(), timeout, str(folder)), expect)
        except BaseException as error:
            if not isinstance(error, WorkerError):
                self.pools.close()  # interrupted in mid-run (pytest-timeout, Ctrl-C): the next run starts a new server
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _collect(self, conn: Connection, job: Job, expect: str) -> list[Any]:
        __tracebackhide__ = True  # a failing test shows the ranks' report, not this method
        outcomes: dict[int, Outcome] = {}
        stopped: list[int] = []
        exits: dict[int, int] = {}
        first_failure = None
        conn.send(job)
        deadline = time.monotonic() + job.timeout
        while True:
            if not stopped and not conn.poll(max(0.0, deadline - time.monotonic())):
                stopped = [rank for rank in range(job.ranks) if rank not in outcomes and rank not in exits]
                conn.send(stopped)
            try:
                message = conn.recv()
            except (EOFError, OSError) as error:
                raise RuntimeError("the fork server died") from error
            if message is None:
                break
            rank, what = message
            if isinstance(what, bytes):
                outcomes[rank] = _unpickle(what)
            else:
                exits[rank] = what
            if first_failure is None and (rank not in outcomes or outcomes[rank].error is not None):
                first_failure = rank
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)

        failed = [rank for rank in range(job.ranks) if rank not in outcomes or outcomes[rank].error is not None]
        missing = [rank for rank in failed if rank not in outcomes]
        if not missing and (expect == "errors" or not failed):
            values = [outcomes[rank] for rank in range(job.ranks)]
            return [value.error for value in values] if expect == "errors" else [value.result for value in values]

        # The first to fail comes first: what the others report is often only that they lost it.
        failed.sort(key=lambda rank: rank != first_failure)
        headline = f"{len(failed)} of {job.ranks} ranks failed"
        hung = [rank for rank in stopped if rank in missing]
        if hung:
            first_alone = first_failure is not None and first_failure not in hung
            limit = f"{GRACE_SECONDS:g} s after the first failure" if first_alone else f"timeout {job.timeout:g} s"
            headline += f", of which {len(hung)} did not finish ({limit})"
        parts = [headline]
        for rank in failed:
            log = _tail(Path(job.folder, f"rank{rank}.log"))
            if rank in outcomes:
                parts.append(f"--- rank {rank} raised\n{outcomes[rank].traceback}")
            elif rank in hung:
                parts.append(f"--- rank {rank} hung; its stacks:\n{_tail(Path(job.folder, f'rank{rank}.stacks'))}")
            else:
                parts.append(f"--- rank {rank} died with exit code {exits.get(rank)}")
            if log:
                parts.append(f"--- rank {rank} printed\n{log}")
        raise WorkerError("\n".join(parts))


def free_port() -> int:
    """A TCP port on 127.0.0.1 that was free a moment ago.

    Below the ports that Linux gives to outgoing connections: gloo opens many, and would take one of those again before
    the process that it is for has started.
    """
    while True:
        port = random.SystemRandom().randrange(20000, 32768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _tail(path: Path) -> str:
    text = path.read_text(errors="replace").rstrip() if path.exists() else ""
    return text if len(text) <= LOG_TAIL_CHARS else f"[...]\n{text[-LOG_TAIL_CHARS:]}"


def _unpickle(data: bytes) -> Outcome:
    try:
        return pickle.loads(data)
    except Exception as error:
        what = RankError(type(error).__name__, f"the rank's result cannot be unpickled: {error}")
        return Outcome(error=what, traceback=traceback.format_exc())


@dataclasses.dataclass(frozen=True)
class Completed:
    """How a launched script ended. ``stdout`` holds the stderr of all ranks as well, in the order of writing."""

    returncode: int
    stdout: str
    seconds: float


class Launched:
    """A script under DeepSpeed's launcher, in its own process group; a context manager that leaves nothing running."""

    def __init__(self, script_args: Sequence[str | Path], ranks: int, env: dict[str, str] | None = None) -> None:
        self._output = tempfile.TemporaryFile()
        self._start = time.monotonic()
        self._process = subprocess.Popen(
            # The module, not the console script: that one's first line breaks where the interpreter's path has spaces.
            [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
            + ["--master_port", str(free_port()), *map(str, script_args)],
            env={**os.environ, **RANK_ENV, "PYTHONPATH": _python_path(), "PYTHONUNBUFFERED": "1", **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def output(self) -> str:
        """Everything printed so far."""
        size = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), size, 0).decode(errors="replace")

    def wait(self, timeout: float) -> Completed:
        """Wait for the launcher to end, then end what is left of its group.

        Raises:
            TimeoutError: it still ran after ``timeout`` seconds; the group is killed, the message ends with its output.
        """
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise TimeoutError(f"still running after {timeout:g} s; its output:\n{self.output}") from error
        seconds = time.monotonic() - self._start
        self.kill()
        return Completed(self._process.returncode, self.output, seconds)

    def wait_for(self, text: str, timeout: float) -> None:
        """Wait until ``text`` has been printed.

        Raises:
            TimeoutError: it was not printed in time, or the launcher ended without printing it.
        """
        self._wait_until(lambda: text in self.output, f"{text!r} was not printed", timeout)

    def wait_for_file(self, path: Path, text: str, timeout: float) -> None:
        """Wait until the file ``path`` exists and holds ``text``; raises as `wait_for` does."""
        self._wait_until(
            lambda: path.exists() and text in path.read_text(errors="replace"), f"{path} never held {text!r}", timeout
        )

    def _wait_until(self, condition: Callable[[], bool], otherwise: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if self._process.poll() is not None or time.monotonic() > deadline:
                if condition():
                    return
                self.kill()
                raise TimeoutError(f"{otherwise}; the output:\n{self.output}")
            time.sleep(0.05)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The launcher and all ranks stand still within the block."""
        os.killpg(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL to the launcher and all ranks. Harmless when they have ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._output.close()


def launch(
    script_args: Sequence[str | Path], ranks: int, timeout: float = 300, env: dict[str, str] | None = None
) -> Completed:
    """Run ``script_args`` (a script and its arguments) on ``ranks`` CPU processes under DeepSpeed's launcher."""
    with Launched(script_args, ranks, env) as launched:
        return launched.wait(timeout)


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
