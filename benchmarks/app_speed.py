"""Claim: the app shows its first page within ten seconds, and a query costs half a second beyond the encoders' time.

`python benchmarks/app_speed.py BUNDLE` starts `mvmr app` on a gallery whose embeddings are there, opens it in Chromium,
and uploads photographs, each taken from the upload to the last neighbour shown. What the encoders take for one image is
measured by the app itself, which says it beside each answer.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import measure
import numpy as np
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from serve_speed import PHOTOGRAPHS
from skimage import data as photographs

CHROMIUM = "/usr/bin/chromium"
_FLAGS = ["--no-sandbox", "--disable-quic", "--disable-background-networking", "--disable-component-update"]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--images", default=2000, show_default=True, help="Of the gallery.")
@click.option("--rounds", default=5, show_default=True, help="Starts of the app, and queries to each.")
@click.option("--out", type=click.Path(path_type=Path), default=measure.RESULTS, help="Folder of the JSON.")
def main(bundle: Path, images: int, rounds: int, out: Path) -> None:
    """Time the start of the app and its answers."""
    console = measure.output()
    first, whole, beyond = [], [], []
    wait = measure.CoreWait()
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        gallery = make_gallery(Path(name), images)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        with app(bundle, gallery):
            pass  # embeds the gallery, which is not what is measured
        for _ in range(rounds):
            began = time.perf_counter()
            with app(bundle, gallery) as url:
                page = browser.new_page()
                page.goto(url)
                page.wait_for_selector("#strip .pick img")
                page.wait_for_selector("#picture input[type=file]", state="attached")
                first.append(time.perf_counter() - began)
                ask(page, 0)  # waits for the weights, which are loaded behind the first page
                for number in range(1, rounds + 1):
                    seconds, own = ask(page, number)
                    whole.append(seconds)
                    beyond.append(seconds - own)
                page.close()
        browser.close()
    found: dict[str, Any] = {
        "images": images,
        "first_page_s": measure.Spread.of(first),
        "query_s": measure.Spread.of(whole),
        "query_beyond_the_encoders_s": measure.Spread.of(beyond),
        "machine": measure.machine("cpu"),
        "core_wait": wait.share(),
    }
    for key in ("first_page_s", "query_s", "query_beyond_the_encoders_s"):
        console.print(f"{key:<32} {found[key]}")
    measure.save("app", found, out, console)


@contextmanager
def app(bundle: Path, gallery: Path) -> Iterator[str]:
    """`mvmr app` in a process of its own; its address."""
    command = [sys.executable, "-m", "mvmr", "app", str(bundle), "--gallery", str(gallery), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"the app is at (\S+)", line):
            yield found[1]
            break
    else:
        raise RuntimeError("the app did not start")
    process.terminate()
    process.communicate()


def ask(page: Page, number: int) -> tuple[float, float]:
    """Upload a photograph: seconds to the answer, and of them those that teacher and student took."""
    base = Image.fromarray(getattr(photographs, PHOTOGRAPHS[number % len(PHOTOGRAPHS)])())
    content = io.BytesIO()
    base.resize((600 + number, 400)).save(content, "JPEG", quality=90)
    began = time.perf_counter()
    page.set_input_files(
        "#picture input[type=file]", {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": content.getvalue()}
    )
    page.get_by_text(f"{600 + number} x 400 pixels").wait_for(timeout=120_000)
    seconds = time.perf_counter() - began
    told = page.locator("#result .costs").inner_text()
    return seconds, sum(float(each) for each in re.findall(r"([\d.]+) ms for this image", told)) / 1000


def make_gallery(folder: Path, count: int) -> Path:
    """Pieces of scikit-image's photographs, all different, 128 pixels a side."""
    random = np.random.default_rng(0)
    bases = [getattr(photographs, name)() for name in PHOTOGRAPHS]
    for number in range(count):
        base = bases[number % len(bases)]
        top, left = (int(random.integers(side - 128)) for side in base.shape[:2])
        Image.fromarray(base[top : top + 128, left : left + 128]).save(folder / f"{number:05}.png")
    return folder


if __name__ == "__main__":
    main()
