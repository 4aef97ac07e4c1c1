"""What tests of bundles share: a bundle."""

from pathlib import Path

import pytest

from mvmr.bundles import bundle
from tests.bundles.written import finished


@pytest.fixture
def made(tmp_path: Path) -> bundle.Bundle:
    return bundle.load(finished(tmp_path / "b"))
