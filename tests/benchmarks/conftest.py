"""What every test of a benchmark gets."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    """A benchmark silences logging for its whole process, which here is the tests' own."""
    yield
    logging.disable(logging.NOTSET)
