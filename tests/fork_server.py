"""The fork server behind the ``workers`` fixture, and what happens in a rank. See harness.py for the whole picture.

Neither torch nor the frameworks are imported at the top: the pytest process imports this file too.
"""

import contextlib
import dataclasses
import faulthandler
import gc
import importlib
import multiprocessing
import os
import pickle
import pkgutil
import random
import reprlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

PRELOAD = ("torch", "torch.testing", "numpy", "pytest", "deepspeed", "deepspeed.pipe")
# Imported ahead as well, but a test that needs one of these reports its absence better than the server could.
PRELOAD_IF_POSSIBLE = (
    "megatron.core",
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "torch.profiler",
    "accelerate",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.training_args",  # not its trainer, which imports pyarrow: that starts a thread
)
# And every module of ours: each rank would import what it needs of them again, up to half of its time.
PRELOAD_WHOLE = ("ds_plugin", "megatron_patches", "launch_scripts.gpt")
SEED = 1234


class RankError(NamedTuple):
    """What one rank raised. Compares by value, so ``len(set(errors)) == 1`` says that all ranks failed alike."""

    type: str
    message: str


@dataclasses.dataclass(frozen=True)
class Job:
    """One call of ``Pool.run``, as the fork server and the ranks see it."""

    payload: bytes  # pickled (fn, args, kwargs); opened by the ranks, so a failing import is reported as theirs
    ranks: int
    master_port: int
    timeout: float
    folder: str  # of this run alone: the ranks' output and stacks, and the store they meet at


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one rank reports: a result, or an error with its traceback."""

    result: Any = None
    error: RankError | None = None
    traceback: str = ""


def serve(fd: int) -> None:
    """Import everything, then fork the ranks of one job after the other until pytest closes the pipe."""
    conn = Connection(fd)
    try:
        for name in PRELOAD:
            importlib.import_module(name)
        ours = [m.name for top in PRELOAD_WHOLE for m in pkgutil.walk_packages(_path_of(top), f"{top}.")]
        for name in [*PRELOAD_IF_POSSIBLE, *(name for name in ours if not name.endswith("__main__"))]:
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
    gc.freeze()
    conn.send(None)
    with contextlib.suppress(EOFError):
        while True:
            _serve_job(conn, conn.recv())


def _path_of(package: str) -> Any:
    return importlib.import_module(package).__path__


def _serve_job(conn: Connection, job: Job) -> None:
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


def _rank_main(job: Job, rank: int, pipe: Connection, foreign: Sequence[Connection]) -> None:
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
        outcome = pickle.dumps(Outcome(result=fn(*args, **kwargs)))
        for thread in threading.enumerate():  # the interpreter would wait for them; they seal checkpoints
            if thread.name == "seal":
                thread.join()
    except BaseException as error:
        what = RankError(type(error).__name__, str(error))
        outcome = pickle.dumps(Outcome(error=what, traceback=_format(error)))
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
        else:
            time.sleep(0.2)  # at once, but not before a peer has read the last message of a collective that succeeded
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(0)


def _initialize(job: Job, rank: int) -> None:
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
    # A test function that fails at once must not take this rank away while a peer is still connecting to it.
    torch.distributed.barrier()


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
