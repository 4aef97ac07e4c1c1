"""What tests of the app share: bundles, the browser, and the page of the two linked maps with its visitors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # else a test without a browser would import playwright, too
    from playwright.sync_api import Browser

    from mvmr.bundles.bundle import Bundle
    from tests.app.tabs.map_pages import Opened, Site


@pytest.fixture(scope="module")
def onnx_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With heads and a float32 ONNX, but weights that are none."""
    from mvmr.bundles import bundle as bundles
    from tests.serve import serving

    return bundles.load(serving.bundle(tmp_path_factory.mktemp("served")))


@pytest.fixture(scope="module")
def plain_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A resnet18 at 16 px, and nothing exported."""
    from tests.distill.test_report import a_bundle

    return a_bundle(tmp_path_factory.mktemp("runs") / "student")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from tests.app.apps import chromium

    with chromium() as started:
        yield started


@pytest.fixture
def site() -> Iterator[Site]:
    from tests.app.tabs.map_pages import serve

    with serve() as running_site:
        yield running_site


@pytest.fixture
def visit(browser: Browser, site: Site) -> Iterator[Opened]:
    from tests.app.tabs.map_pages import visiting

    with visiting(browser, site) as opened:
        yield opened
