"""What tests of bundles share: a bundle."""

from pathlib import Path

import pytest

from mvmr.bundles import bundle
from tests.bundles.written import write_stub


@pytest.fixture
def sample(tmp_path: Path) -> bundle.Bundle:
    return bundle.load(write_stub(tmp_path / "b"))
