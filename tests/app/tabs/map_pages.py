"""The two linked maps on a page of the test's own server, and what a visitor of it does and sees."""

from __future__ import annotations

import colorsys
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("playwright", reason="playwright is not installed")
plotly = pytest.importorskip("plotly", reason="plotly is not installed")

from playwright.sync_api import Browser, Page  # noqa: E402

from mvmr.app.tabs.maps import Map, map_json  # noqa: E402
from tests.app.apps import WAIT  # noqa: E402

STATIC = Path(__file__).parents[3] / "app" / "static"
PLOTLY = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
PLOTS = "[...document.querySelectorAll('.map-plot')]"
VILE = '<img src=x onerror="window.vile=1">&amp;\''
LIGHT = {"teacher": (200, 80, 10), "student": (0, 114, 178), "shared": (11, 138, 104)}
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,"><style>
:root { --ink: #1c2530; --muted: #5b6672; --grid: #dbe1e7; --student: #0072b2; --teacher: #c8500a; --shared: #0b8a68 }
.dark { --ink: #e6eaee; --muted: #a3adb8; --grid: #36404b; --student: #5ab4ec; --teacher: #f2955a; --shared: #35c79c }
body { margin: 0; padding: 12px; font-family: sans-serif }</style>
<div id="tab"><div id="map"></div></div>
<script type="module">
import { mount } from "./static/map.js";
window.selections = [];
window.start = (start) => {
  const options = { start, data: "map.json?engine=torch&k=10", thumbs: "thumb/", names: { teacher: "ViT-B-16" } };
  options.onselect = (ids) => selections.push(ids);
  window.handle = mount(document.getElementById("map"), options);
};
if (location.hash === "#hidden") document.getElementById("tab").style.display = "none";
start();
</script></html>"""


def points(count: int) -> np.ndarray:
    """Places on a grid, far enough apart to be hit one by one."""
    side = int(np.ceil(np.sqrt(count)))
    return np.stack([np.arange(count) % side, np.arange(count) // side], 1).astype(np.float32)


def content(count: int = 64, *, method: str = "pca", kinds: int = 4, **changes: object) -> dict[str, Any]:
    """What the app sends for a gallery whose student sees it upside down."""
    teacher = points(count)
    student = teacher[::-1].copy() if method == "pca" else teacher[:, ::-1].copy()

    gallery = SimpleNamespace(
        keys=[f"test/{i % kinds}/image {i:03d}.png" for i in range(count)],
        labels=np.arange(count) % kinds,
        classes=tuple(f"kind {i}" for i in range(kinds)),
    )
    variance = (31.25, 28.5) if method == "pca" else None
    layout = Map("pca" if method == "pca" else "umap", teacher, student, 0.25, variance)
    sent = map_json(layout, gallery, np.arange(count) % 11 * 10.0, np.arange(count) % 4, k=10)
    return sent | changes


@dataclass
class Site:
    """What the test's server sends, and what it was asked."""

    maps: dict[str, Any]  # method -> its JSON; (status, kind, text) for another answer
    url: str = ""
    requests: list[str] = field(default_factory=list)
    fails: bool = False  # it answers with an error, which a browser writes to its console

    def thumbs(self) -> list[int]:
        return [int(path.rpartition("/")[2]) for path in self.requests if path.startswith("/thumb/")]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Be quiet."""

    def do_GET(self) -> None:
        site: Site = self.server.site  # type: ignore[attr-defined]
        site.requests.append(self.path)
        path = urlsplit(self.path)
        name = path.path.rpartition("/")[2]
        status, kind, body = 200, "text/html; charset=utf-8", PAGE.encode()
        if name == "map.json":
            kind, query = "application/json", parse_qs(path.query)
            assert (query["engine"], query["k"]) == (["torch"], ["10"])
            answer = site.maps[query["method"][0]]
            if isinstance(answer, tuple):
                status, kind, text = answer
                site.fails |= status >= 400
                body = text.encode()
            else:
                body = json.dumps(answer).encode()
        elif path.path.startswith("/thumb/"):
            written = io.BytesIO()
            Image.new("RGB", (128, 128), (int(name) % 256, 90, 160)).save(written, "webp")
            kind, body = "image/webp", written.getvalue()
        elif name == "plotly.min.js":
            kind, body = "text/javascript", PLOTLY.read_bytes()
        elif path.path.startswith("/static/"):
            kind = "text/css" if name.endswith("css") else "text/javascript"
            body = (STATIC / name).read_bytes()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serve() -> Iterator[Site]:
    """A server of the page, with the map of a small gallery whose UMAP is being computed."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site = Site({"pca": content(), "umap": (202, "application/json", '{"state": "computing"}')})
    site.url = f"http://127.0.0.1:{server.server_port}/"
    server.site = site  # type: ignore[attr-defined]
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield site
    server.shutdown()
    server.server_close()
    thread.join()


Opened = Callable[..., Page]


@contextmanager
def visiting(browser: Browser, site: Site) -> Iterator[Opened]:
    """Open the page as a new visitor; at the end no visitor's console may hold an error or a warning."""
    contexts, wrong = [], []

    def open_page(
        path: str = "", *, width: int = 1100, height: int = 800, ready: bool = True, script: str = "", **more: Any
    ) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, **more)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.on("console", lambda line: wrong.append(line.text) if line.type in {"error", "warning"} else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        if script:
            page.add_init_script(script)
        page.goto(site.url + path)
        if ready:
            page.wait_for_selector("[data-ready=pca]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    # Reading pixels back, as a screenshot does, is slow, and Chromium says so.
    forgiven = ("GPU stall due to ReadPixels", *(["Failed to load resource"] if site.fails else []))
    assert [text for text in wrong if not any(words in text for words in forgiven)] == []


def place(page: Page, side: str, image: int) -> tuple[float, float]:
    """Where an image's point is on the screen, by the plot's own axes."""
    x, y = page.evaluate(
        """([side, image]) => {
            const plot = document.querySelectorAll('.map-plot')[side];
            plot.scrollIntoView({block: 'nearest'});
            const {xaxis, yaxis} = plot._fullLayout, {left, top} = plot.getBoundingClientRect();
            const {x, y} = plot.data[0];
            return [left + xaxis._offset + xaxis.l2p(x[image]), top + yaxis._offset + yaxis.l2p(y[image])];
        }""",
        [0 if side == "teacher" else 1, image],
    )
    return float(x), float(y)


def click(page: Page, side: str, image: int, **more: Any) -> None:
    x, y = place(page, side, image)
    page.mouse.move(x, y)
    page.mouse.click(x, y, **more)


def draw(page: Page, corners: list[tuple[float, float]]) -> None:
    page.mouse.move(*corners[0])
    page.mouse.down()
    for corner in corners[1:]:
        page.mouse.move(*corner, steps=4)
    page.mouse.up()


def expect_selection(page: Page, expected: list[int]) -> None:
    """Wait until these are selected, and see that both maps mark them."""
    text = ",".join(map(str, expected))
    page.wait_for_function("text => document.getElementById('map').dataset.selected === text", arg=text)
    numbers = page.evaluate(
        "[...document.querySelectorAll('.map-plot')].map(plot => plot.data[0].selectedpoints ?? null)"
    )
    assert numbers == [expected or None] * 2


def cards(page: Page) -> list[int]:
    return [int(card.get_attribute("data-image") or -1) for card in page.query_selector_all(".map-card")]


def pixels(page: Page, side: str, images: list[int]) -> np.ndarray:
    """Colours that are seen where the points of these images are: [N, 3]."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(300)
    positions = [place(page, side, image) for image in images]
    screenshot = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
    return np.array([screenshot[round(y), round(x)] for x, y in positions]).astype(int)


def saturation(colours: np.ndarray) -> list[float]:
    return [colorsys.rgb_to_hsv(*(colour / 255))[1] for colour in colours]
