"""What every test gets: a cache folder of its own, and a reason where a GPU is missing."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: two processes with all the cores each go at a crawl
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # who takes more threads all the same doesn't spin meanwhile


@pytest.fixture(scope="session", autouse=True)
def _session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep fixtures that live longer than one test out of the user's cache, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MVMR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def _threads_of_its_own() -> Iterator[None]:
    """Give torch's threads back as they were: those that numba or a benchmark took would slow the tests after them."""
    threads = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else 0
    yield
    if threads:
        sys.modules["torch"].set_num_threads(threads)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own, empty cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MVMR_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def few_patches() -> Iterator[None]:
    """A quarter of `sample:patches`, for tests in which its size is no matter."""
    from mvmr.data import samples

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "PER_CLASS", {"train": 20, "test": 20})
        yield


@pytest.fixture
def dcor(one_thread: None) -> ModuleType:
    """The `dcor` package, an oracle. Imported late: it compiles for seconds, and gives torch all threads."""
    import dcor

    return dcor  # type: ignore[no-any-return]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For nets so small that a second thread costs more than it brings."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that write many files: no machine loses its power here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores, as many tests wait for a process or a socket; four at most: each imports torch."""
    return min(4, len(os.sched_getaffinity(0)) + 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)  # first, lest one process is left with them at the end
    marked = [item for item in items if item.get_closest_marker("gpu")]  # keywords hold the checkout's folder, too
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
