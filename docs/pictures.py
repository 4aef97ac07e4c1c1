"""Make the pictures of the app and of a report again: `python docs/pictures.py`, after `make quickstart`."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import skimage.data
from PIL import Image
from playwright.sync_api import Browser, Page, expect

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.app.apps import DATA, chromium, running, visit  # noqa: E402

BUNDLE = "runs/quickstart/student"
CLASS = "coffee"
expect.set_options(timeout=120_000)


def main() -> None:
    with chromium() as browser:
        take_report(browser)
        with running(BUNDLE, cwd=ROOT) as app:
            with visit(browser, app.url, width=1280, height=820) as seen:
                take_disagreements(seen.page)
                take_neighbours(seen.page)
            with visit(browser, app.url, width=1280, height=1250) as seen:
                take_map(seen.page)


def take_report(browser: Browser) -> None:
    subprocess.run([sys.executable, "-m", "mvmr", "report", BUNDLE, "--data", DATA], cwd=ROOT, check=True)
    page = browser.new_page(viewport={"width": 1150, "height": 1590}, device_scale_factor=0.78)
    page.goto((ROOT / f"{BUNDLE}-report" / "index.html").as_uri())
    save(page, "report")
    page.close()


def take_disagreements(page: Page) -> None:
    page.get_by_role("tab", name="Disagreements").click()
    page.get_by_role("button", name="Fit linear probes of both sides").click()
    expect(page.get_by_text("by linear probes of both")).to_be_visible()
    page.mouse.move(0, 0)
    save(page, "app-disagreements")


def take_neighbours(page: Page) -> None:
    photograph = io.BytesIO()
    Image.fromarray(skimage.data.coffee()).save(photograph, "PNG")
    page.get_by_role("tab", name="Neighbours").click()
    given = {"name": "coffee.png", "mimeType": "image/png", "buffer": photograph.getvalue()}
    page.set_input_files("#picture input[type=file]", given)
    expect(page.locator("#result .card")).to_have_count(20)
    save(page, "app-neighbours")


def take_map(page: Page) -> None:
    page.get_by_role("tab", name="Map").click()
    umap = page.locator("#map input[value=umap]")
    expect(umap).to_be_enabled(timeout=300_000)
    umap.check(force=True)
    expect(page.locator("#map .map")).to_have_attribute("data-ready", "umap")
    page.locator("#map").get_by_text(CLASS).first.click()
    page.mouse.move(0, 0)
    save(page, "app-map")


def save(page: Page, name: str) -> None:
    page.wait_for_timeout(2000)  # pictures fade in
    with Image.open(io.BytesIO(page.screenshot())) as shot:
        shot.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(ROOT / "docs" / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
