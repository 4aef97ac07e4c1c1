"""What tests of the service share: a bundle, its engine, and a client of a service in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from mvmr.serve import Engine
from tests.serve import serving
from tests.serve.inprocess import serve


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose exported file is tiny; a test that changes it takes a copy."""
    return serving.bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="session")
def engine(path: Path) -> Engine:
    return Engine.load(path, threads=1)


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    with serve(engine) as found:
        yield found
