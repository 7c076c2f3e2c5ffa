"""Training runs in processes of their own, several at a time."""

import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def results(
    train: Callable[[Job], Result], jobs: Iterable[Job], workers: int, start: Callable[[], object]
) -> Iterator[tuple[Job, Result]]:
    """``(job, train(job))`` of each job as it ends. Every one of the ``workers`` processes calls ``start()`` first.

    The processes are fresh ones: a world of ranks does not survive a fork. When the caller is killed, they end.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (start,)) as pool:
        pending = {pool.submit(train, job): job for job in jobs}
        try:
            for future in concurrent.futures.as_completed(pending):
                yield pending[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(start: Callable[[], object]) -> None:
    def leave_with(parent: Any) -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    start()
