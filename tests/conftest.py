"""Fixtures shared by all tests."""

from collections.abc import Iterator

import pytest

from tests.harness import WorkerPools

_POOLS = WorkerPools()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let the fork server import while the first tests run, when any test will need it."""
    needs_ranks = any("workers" in getattr(item, "fixturenames", ()) for item in session.items)
    if needs_ranks and not session.config.option.collectonly:
        _POOLS.start()


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPools]:
    """``workers(n).run(fn, *args)`` calls ``fn`` on ``n`` gloo ranks and returns the results by rank."""
    yield _POOLS


def pytest_unconfigure() -> None:
    _POOLS.close()
