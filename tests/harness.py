"""Run test functions on several gloo ranks, and real scripts under the real launcher.

Importing torch, DeepSpeed and Megatron-core costs seconds per process. One fork server per pytest session imports them
once; every ``run`` then forks a fresh set of ranks from it (about 10 ms each). A rank is never used twice, and that is
what keeps one test from influencing the next: process groups, the cached globals of both hosts, monkey patches,
environment variables and random states all go with the process. Nothing has to be reset, so nothing can be forgotten.

The three processes involved::

    pytest  --(pickled messages)-->  fork server  --(fork)-->  rank 0 .. n-1
    Pool.run: deadlines, report      _serve: forks, relays     _rank_main: gloo, the test function
"""

import contextlib
import dataclasses
import faulthandler
import importlib
import multiprocessing
import os
import pickle
import random
import reprlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# Every rank inherits these from the fork server. They are set before torch is imported, which is when most are read.
RANK_ENV = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",  # the same tests on a machine with GPUs; forking after CUDA starts would break it
    "TORCHDYNAMO_DISABLE": "1",  # a fresh process would compile every fused kernel of Megatron-core again
    "GLOO_SOCKET_IFNAME": "lo",  # the host's own name need not resolve
}
PRELOAD = ("torch", "torch.testing", "numpy", "pytest", "deepspeed", "deepspeed.pipe")
# Imported ahead as well, but a test that needs one of these reports its absence better than the server could.
PRELOAD_IF_POSSIBLE = (
    "megatron.core",
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "ds_plugin",
    "megatron_patches",
)
SEED = 1234
SERVER_START_SECONDS = 120.0
# Once a rank has failed, how long the others may take to notice before they count as hanging.
GRACE_SECONDS = 15.0
LOG_TAIL_CHARS = 4000


class RankError(NamedTuple):
    """What one rank raised. Compares by value, so ``len(set(errors)) == 1`` says that all ranks failed alike."""

    type: str
    message: str


class WorkerError(Exception):
    """At least one rank raised, died or hung; the message holds every rank's traceback, stack or exit code."""


# --------------------------------------------------------------------------------------------- in the pytest process


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
        code = "import sys; sys.path.insert(0, sys.argv[1]); from tests.harness import _serve; _serve(int(sys.argv[2]))"
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
            return self._collect(conn, _Job(payload, self.ranks, free_port(), timeout, str(folder)), expect)
        except BaseException as error:
            if not isinstance(error, WorkerError):
                self.pools.close()  # interrupted in mid-run (pytest-timeout, Ctrl-C): the next run starts a new server
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _collect(self, conn: Connection, job: "_Job", expect: str) -> list[Any]:
        __tracebackhide__ = True  # a failing test shows the ranks' report, not this method
        outcomes: dict[int, _Outcome] = {}
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
    """A TCP port on 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _tail(path: Path) -> str:
    text = path.read_text(errors="replace").rstrip() if path.exists() else ""
    return text if len(text) <= LOG_TAIL_CHARS else f"[...]\n{text[-LOG_TAIL_CHARS:]}"


def _unpickle(data: bytes) -> "_Outcome":
    try:
        return pickle.loads(data)
    except Exception as error:
        what = RankError(type(error).__name__, f"the rank's result cannot be unpickled: {error}")
        return _Outcome(error=what, traceback=traceback.format_exc())


# ------------------------------------------------------------------------------------------------- messages


@dataclasses.dataclass(frozen=True)
class _Job:
    payload: bytes  # pickled (fn, args, kwargs); opened by the ranks, so a failing import is reported as theirs
    ranks: int
    master_port: int
    timeout: float
    folder: str  # of this run alone: the ranks' output and stacks, and the store they meet at


@dataclasses.dataclass(frozen=True)
class _Outcome:
    result: Any = None
    error: RankError | None = None
    traceback: str = ""


# ------------------------------------------------------------------------------------------------- in the fork server


def _serve(fd: int) -> None:
    """Import everything, then fork the ranks of one job after the other until pytest closes the pipe."""
    conn = Connection(fd)
    try:
        for name in PRELOAD:
            importlib.import_module(name)
        for name in PRELOAD_IF_POSSIBLE:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        sys.modules["torch"].set_num_threads(1)
        # DeepSpeed would compile this C++ extension in the first rank of all (30 s, needs a compiler) and then use it
        # for inference only.
        sys.modules["deepspeed"].ops.__compatible_ops__["deepspeed_shm_comm"] = False
        threads = len(os.listdir("/proc/self/task"))
        if threads != 1:  # a forked child would inherit that thread's locks, held for ever
            raise RuntimeError(f"an import started {threads - 1} threads; forking is not safe")
    except BaseException:
        conn.send(traceback.format_exc())
        raise
    # Objects made so far are never collected in a rank, so their pages stay shared.
    importlib.import_module("gc").freeze()
    conn.send(None)
    with contextlib.suppress(EOFError):
        while True:
            _serve_job(conn, conn.recv())


def _serve_job(conn: Connection, job: _Job) -> None:
    """Fork the ranks and relay (rank, result bytes) and (rank, exit code); None at the end."""
    context = multiprocessing.get_context("fork")
    processes: dict[int, Any] = {}
    pipes: dict[int, Connection] = {}
    for rank in range(job.ranks):
        pipes[rank], theirs = context.Pipe(duplex=True)
        processes[rank] = context.Process(target=_rank_main, args=(job, rank, theirs, [conn, *pipes.values()]))
        processes[rank].start()
        theirs.close()

    running, unreported = set(processes), set(processes)
    try:
        while running:
            for ready in wait([conn, *(pipes[r] for r in unreported), *(processes[r].sentinel for r in running)]):
                if ready is conn:
                    _stop(processes, conn.recv())
                    continue
                rank = next(r for r in processes if ready is pipes[r] or ready is processes[r].sentinel)
                # A rank that ends has perhaps reported just before; the report must be passed on first.
                if rank in unreported and pipes[rank].poll():
                    with contextlib.suppress(EOFError, OSError):
                        conn.send((rank, pipes[rank].recv_bytes()))
                    unreported.discard(rank)
                    if not unreported:
                        _release(pipes)
                if rank in running and ready is processes[rank].sentinel:
                    processes[rank].join()
                    running.discard(rank)
                    unreported.discard(rank)
                    conn.send((rank, processes[rank].exitcode))
                    if not unreported:
                        _release(pipes)
    finally:
        # Also whatever the ranks started themselves (data loader workers, checkpoint writers).
        for process in processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for pipe in pipes.values():
            pipe.close()
    conn.send(None)


def _release(pipes: dict[int, Connection]) -> None:
    """Let the ranks end: all have reported, none needs another one's sockets any more."""
    for pipe in pipes.values():
        with contextlib.suppress(OSError):
            pipe.send_bytes(b"")


def _stop(processes: dict[int, Any], hanging: Sequence[int]) -> None:
    """Write the stacks of the hanging ranks to their files, then kill every rank."""
    alive = [process for process in processes.values() if process.is_alive()]
    for rank in hanging:
        if processes[rank].is_alive():
            os.kill(processes[rank].pid, signal.SIGUSR1)
    time.sleep(0.5)  # the dump is written by the rank's signal handler; there is nothing to wait on
    for process in alive:
        process.kill()


# ------------------------------------------------------------------------------------------------- in a rank


def _rank_main(job: _Job, rank: int, pipe: Connection, foreign: Sequence[Connection]) -> None:
    """Call the test function in a fresh gloo world, report, and end the process without running exit handlers."""
    os.setpgid(0, 0)
    for connection in foreign:
        connection.close()
    with open(Path(job.folder, f"rank{rank}.log"), "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    # C code that never returns to the interpreter still lets this handler run.
    faulthandler.register(signal.SIGUSR1, file=open(Path(job.folder, f"rank{rank}.stacks"), "w"), all_threads=True)
    faulthandler.enable()

    try:
        _initialize(job, rank)
        fn, args, kwargs = pickle.loads(job.payload)
        outcome = pickle.dumps(_Outcome(result=fn(*args, **kwargs)))
    except BaseException as error:
        what = RankError(type(error).__name__, str(error))
        outcome = pickle.dumps(_Outcome(error=what, traceback=_format(error)))
        ok = False
    else:
        ok = True
    with contextlib.suppress(BrokenPipeError):
        pipe.send_bytes(outcome)
        if ok:
            # A peer may still be reading what this rank sent last. After a failure, on the other hand, ending at once
            # is what tells the peers: their collectives fail when the sockets close.
            with contextlib.suppress(EOFError):
                pipe.recv_bytes()
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(0)


def _initialize(job: _Job, rank: int) -> None:
    import deepspeed
    import numpy
    import torch

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(job.ranks),
        LOCAL_SIZE=str(job.ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(job.master_port),
    )
    random.seed(SEED)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)
    # Longer than the job's own limit: its stack dump says more than gloo's timeout.
    patience = timedelta(seconds=job.timeout + 60)
    # A file, not a port: nothing to race for, and a busy network stack can hold a first connection back for seconds.
    store = torch.distributed.FileStore(str(Path(job.folder, "store")), job.ranks)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=job.ranks, timeout=patience)
    deepspeed.init_distributed("gloo", timeout=patience, verbose=False)


def _format(error: BaseException) -> str:
    """The traceback; for an assertion also the locals beside it, since pytest does not rewrite asserts in a rank."""
    text = "".join(traceback.format_exception(error))
    if isinstance(error, AssertionError) and error.__traceback__ is not None:
        last = error.__traceback__
        while last.tb_next is not None:
            last = last.tb_next
        brief = reprlib.Repr()
        brief.maxother = brief.maxstring = 200
        values = [f"  {name} = {brief.repr(value)}" for name, value in last.tb_frame.f_locals.items()]
        text += "\n".join(["locals at the assertion:", *values, ""])
    return text


# ------------------------------------------------------------------------------------------------- the real launcher


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
        deadline = time.monotonic() + timeout
        while text not in self.output:
            if self._process.poll() is not None or time.monotonic() > deadline:
                if text in self.output:
                    return
                self.kill()
                raise TimeoutError(f"{text!r} was not printed; the output:\n{self.output}")
            time.sleep(0.05)

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
