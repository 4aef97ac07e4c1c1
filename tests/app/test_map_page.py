"""The two linked maps in a real browser: what a visitor clicks, draws and reads, over a server of the test's own."""

from __future__ import annotations

import colorsys
import io
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
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
from tests.app.apps import chromium  # noqa: E402

pytestmark = [pytest.mark.browser, pytest.mark.slow]

STATIC = Path(__file__).parents[2] / "app" / "static"
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
window.told = [];
window.start = (start) => {
  const options = { start, data: "map.json?engine=torch&k=10", thumbs: "thumb/", names: { teacher: "ViT-B-16" } };
  options.onselect = (ids) => told.push(ids);
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
    drawn = Map("pca" if method == "pca" else "umap", teacher, student, 0.25, variance)
    sent = map_json(drawn, gallery, np.arange(count) % 11 * 10.0, np.arange(count) % 4, k=10)
    return sent | changes


@dataclass
class Site:
    """What the test's server sends, and what it was asked."""

    maps: dict[str, Any]  # method -> its JSON; (status, kind, text) for another answer
    url: str = ""
    asked: list[str] = field(default_factory=list)
    fails: bool = False  # it answers with an error, which a browser writes to its console

    def thumbs(self) -> list[int]:
        return [int(path.rpartition("/")[2]) for path in self.asked if path.startswith("/thumb/")]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Be quiet."""

    def do_GET(self) -> None:
        site: Site = self.server.site  # type: ignore[attr-defined]
        site.asked.append(self.path)
        path = urlsplit(self.path)
        name = path.path.rpartition("/")[2]
        status, kind, body = 200, "text/html; charset=utf-8", PAGE.encode()
        if name == "map.json":
            kind, asked = "application/json", parse_qs(path.query)
            assert (asked["engine"], asked["k"]) == (["torch"], ["10"])
            answer = site.maps[asked["method"][0]]
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


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def site() -> Iterator[Site]:
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


@pytest.fixture
def visit(browser: Browser, site: Site) -> Iterator[Opened]:
    """Open the page as a new visitor; at the end no visitor's console may hold an error or a warning."""
    contexts, wrong = [], []

    def opened(
        path: str = "", *, width: int = 1100, height: int = 800, ready: bool = True, script: str = "", **more: Any
    ) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, **more)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda said: wrong.append(said.text) if said.type in {"error", "warning"} else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        if script:
            page.add_init_script(script)
        page.goto(site.url + path)
        if ready:
            page.wait_for_selector("[data-ready=pca]")
        return page

    yield opened
    for context in contexts:
        context.close()
    # Reading pixels back, as a screenshot does, is slow, and Chromium says so.
    forgiven = ("GPU stall due to ReadPixels", *(["Failed to load resource"] if site.fails else []))
    assert [text for text in wrong if not any(each in text for each in forgiven)] == []


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


def selected(page: Page, expected: list[int]) -> None:
    """Wait until these are selected, and see that both maps mark them."""
    text = ",".join(map(str, expected))
    page.wait_for_function("text => document.getElementById('map').dataset.selected === text", arg=text)
    marked = page.evaluate(
        "[...document.querySelectorAll('.map-plot')].map(each => each.data[0].selectedpoints ?? null)"
    )
    assert marked == [expected or None] * 2


def cards(page: Page) -> list[int]:
    return [int(each.get_attribute("data-image") or -1) for each in page.query_selector_all(".map-card")]


def pixels(page: Page, side: str, images: list[int]) -> np.ndarray:
    """Colours that are seen where the points of these images are: [N, 3]."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(300)
    places = [place(page, side, image) for image in images]
    seen = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
    return np.array([seen[round(y), round(x)] for x, y in places]).astype(int)


def saturation(colours: np.ndarray) -> list[float]:
    return [colorsys.rgb_to_hsv(*(colour / 255))[1] for colour in colours]


@pytest.mark.parametrize(("side", "other"), [("teacher", "student"), ("student", "teacher")])
def test_a_click_selects_the_same_image_in_the_other_map(visit: Opened, site: Site, side: str, other: str) -> None:
    page = visit()
    before = saturation(pixels(page, other, [27, 3, 60]))
    click(page, side, 27)
    selected(page, [27])
    assert cards(page) == [27]
    card = page.inner_text(".map-card")
    assert "image 027.png" in card
    assert "kind 3" in card
    assert "overlap 50.0\N{NO-BREAK SPACE}%" in card
    assert "both right" in card
    assert page.get_attribute(".map-card", "title") == "test/3/image 027.png"
    assert "1 of 64 images" in page.inner_text(".map-count")
    page.wait_for_function("document.querySelector('.map-card img').naturalWidth === 128")
    assert set(site.thumbs()) == {27}
    after = saturation(pixels(page, other, [27, 3, 60]))
    assert min(before) > 0.3
    assert after[0] > 0.3  # the very point, elsewhere than the one clicked, while the others fade
    assert max(after[1:]) < 0.3
    assert page.evaluate("told") == [[27]]


def test_a_click_with_shift_adds(visit: Opened) -> None:
    page = visit()
    click(page, "teacher", 40)
    selected(page, [40])
    page.keyboard.down("Shift")
    click(page, "student", 9)
    page.keyboard.up("Shift")
    selected(page, [9, 40])
    page.wait_for_timeout(600)  # two clicks at once in one map are a double click
    click(page, "student", 10)
    selected(page, [10])


def test_a_lasso_selects_what_it_surrounds(visit: Opened) -> None:
    page = visit()
    for side, inside in (("teacher", [9, 10, 17, 18]), ("student", [20, 21, 28, 29])):
        at = np.array([place(page, side, image) for image in inside])
        middle, reach = at.mean(0), np.ptp(at, axis=0).max() * 0.9
        turn = np.linspace(0, 2 * np.pi, 9)
        draw(page, [(middle[0] + reach * np.cos(each), middle[1] + reach * np.sin(each)) for each in turn])
        selected(page, inside)
        assert set(cards(page)) == set(inside)
        assert page.query_selector_all(".map-plot .selectionlayer path") == []  # the line is gone, the selection stays
    assert page.evaluate("told") == [[9, 10, 17, 18], [20, 21, 28, 29]]


def test_a_box_selects_what_it_holds_and_an_empty_one_clears(visit: Opened) -> None:
    page = visit()
    tools = page.query_selector_all(".map-side:nth-child(2) .modebar-btn")
    assert [each.get_attribute("data-title") for each in tools] == [
        "Lasso Select", "Box Select", "Pan", "Zoom", "Reset axes",
    ]  # fmt: skip
    tools[1].click()
    inside = [18, 19, 20, 26, 27, 28]
    at = np.array([place(page, "student", image) for image in inside])
    low, high = at.min(0) - 8, at.max(0) + 8
    draw(page, [(low[0], low[1]), (high[0], high[1])])
    selected(page, inside)
    between = np.array([place(page, "student", image) for image in (18, 27)]).mean(0)
    draw(page, [(between[0] - 8, between[1] - 8), (between[0] + 8, between[1] + 8)])
    selected(page, [])
    assert page.evaluate(f"{PLOTS}.map(each => each.layout.dragmode)") == ["select"] * 2


@pytest.mark.parametrize("how", ["Escape", "button", "double click"])
def test_a_selection_is_cleared(visit: Opened, how: str) -> None:
    page = visit()
    assert not page.is_visible(".map-clear")
    click(page, "teacher", 5)
    selected(page, [5])
    if how == "Escape":
        page.keyboard.press("Escape")
    elif how == "button":
        page.click(".map-clear")
    else:
        page.wait_for_timeout(600)  # else the first click of the double one is the second of the click before
        x, y = (np.array(place(page, "student", 0)) + place(page, "student", 9)) / 2
        page.mouse.dblclick(x, y)
    selected(page, [])
    assert cards(page) == []
    assert "Click a point" in page.inner_text(".map-count")
    assert not page.is_visible(".map-clear")
    assert page.evaluate("told.at(-1)") == []


def test_many_are_shown_by_the_lowest_overlap_and_the_rest_is_counted(visit: Opened, site: Site) -> None:
    site.maps["pca"] = content(300)
    page = visit()
    page.evaluate("handle.select([...Array(300).keys(), 4, -1, 300, 2.5, 'x'])")
    selected(page, list(range(300)))
    shown = cards(page)
    assert shown == sorted(range(300), key=lambda image: (image % 11, image))[:60]
    assert "and 240 more" in page.inner_text(".map-more")
    mean = np.mean(np.arange(300) % 11 * 10)
    assert f"300 of 300 images · overlap@10 {mean:.1f}\N{NO-BREAK SPACE}%" in page.inner_text(".map-count")
    assert "teacher right on 50.0\N{NO-BREAK SPACE}%" in page.inner_text(".map-count")


def test_colours_by_class_by_overlap_and_by_who_is_right(visit: Opened) -> None:
    page = visit()
    options = [each.inner_text() for each in page.query_selector_all(".map-by option")]
    assert options == ["class", "neighbour overlap@10", "which side is right"]
    assert [each.inner_text().split("\n") for each in page.query_selector_all(".map-entry")] == [
        [f"kind {i}", "16"] for i in range(4)
    ]
    assert len(np.unique(pixels(page, "teacher", [0, 1, 2, 3]), axis=0)) == 4
    same = pixels(page, "student", [1, 5, 9])
    assert np.ptp(same, axis=0).max() < 60  # the rim of a dot is paler than its middle

    page.select_option(".map-by select", "right")
    legend = page.inner_text(".map-legend")
    assert legend.split("\n") == [
        part for name in ("both right", "teacher only", "student only", "neither right")
        for part in (name, "25.0\N{NO-BREAK SPACE}%")
    ]  # fmt: skip
    for side in ("teacher", "student"):
        expected = [LIGHT[who] for who in ("teacher", "student", "shared")]
        assert np.abs(pixels(page, side, [1, 2, 3]) - expected).max() < 40

    page.select_option(".map-by select", "overlap")
    assert "0 %" in page.inner_text(".map-legend")
    assert "of an image's 10 nearest neighbours are the same for both" in page.inner_text(".map-legend")
    brightness = pixels(page, "student", [0, 5, 10]).sum(1)
    assert brightness[0] < brightness[1] < brightness[2]  # disagreement stands out on a light ground


def test_an_entry_of_the_legend_selects_its_images(visit: Opened) -> None:
    page = visit()
    page.click(".map-entry:has-text('kind 2')")
    selected(page, list(range(2, 64, 4)))


def test_of_many_classes_the_most_frequent_have_colours_and_the_others_can_be_selected(
    visit: Opened, site: Site
) -> None:
    labels = [*range(25), *(label for label in range(5, 25) for _ in range(3))]
    names = [*(f"kind {i}" for i in range(24)), VILE]
    site.maps["pca"] = content(len(labels), labels=labels, classes=names)
    page = visit()
    assert [each.inner_text().split("\n")[0] for each in page.query_selector_all(".map-entry")] == names[5:]
    options = [each.inner_text() for each in page.query_selector_all(".map-other option")]
    assert options == ["5 other classes…", *(f"kind {i} (1)" for i in range(5))]
    page.select_option(".map-other select", "3")
    selected(page, [3])
    assert page.input_value(".map-other select") == "5 other classes…"
    page.click(".map-entry:last-of-type")
    selected(page, [i for i, label in enumerate(labels) if label == 24])
    assert page.evaluate("window.vile") is None
    for dark in ("remove", "add"):
        page.evaluate(f"document.body.classList.{dark}('dark')")
        dots = page.evaluate(
            "[...document.querySelectorAll('.map-legend .map-dot')].map(each => getComputedStyle(each).backgroundColor)"
        )
        assert len(set(dots)) == 21


def test_names_are_text(visit: Opened, site: Site) -> None:
    site.maps["pca"] = content(4, keys=[VILE, "a/b/", "", "x" * 500], classes=[VILE, "1", "2", "3"])
    page = visit()
    page.evaluate("handle.select([0, 1, 2, 3])")
    selected(page, [0, 1, 2, 3])
    assert VILE in page.inner_text(".map-card >> nth=0")
    x, y = place(page, "teacher", 0)
    page.mouse.move(x + 1, y)
    page.wait_for_selector(".map-tip:visible")
    assert VILE in page.inner_text(".map-tip")
    assert page.evaluate("window.vile") is None
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_only_what_the_data_has_is_offered(visit: Opened, site: Site) -> None:
    site.maps["pca"] = content(labels=None, classes=None, right=None)
    page = visit()
    assert [each.inner_text() for each in page.query_selector_all(".map-by option")] == ["neighbour overlap@10"]
    click(page, "teacher", 7)
    selected(page, [7])
    assert page.inner_text(".map-card").split("\n") == ["image 007.png", "overlap 70.0\N{NO-BREAK SPACE}%"]

    site.maps["pca"] = content(labels=None, classes=None, right=None, overlap=None)
    bare = visit()
    assert not bare.is_visible(".map-by")
    assert bare.inner_text(".map-legend") == ""
    click(bare, "teacher", 7)
    selected(bare, [7])
    assert np.abs(pixels(bare, "student", [7])[0] - LIGHT["shared"]).max() < 40


def test_umap_can_be_chosen_when_it_is_ready(visit: Opened, site: Site) -> None:
    page = visit()
    radio = page.locator(".map-method input[value=umap]")
    page.wait_for_function("document.querySelector('.map-wait:not(:empty)')?.textContent.startsWith('being computed')")
    assert radio.is_disabled()
    click(page, "teacher", 30)
    selected(page, [30])
    site.maps["umap"] = content(method="umap")
    page.wait_for_function("!document.querySelector('.map-method input[value=umap]').disabled")
    assert page.inner_text(".map-wait >> nth=1") == ""
    assert "31.3\N{NO-BREAK SPACE}% of its variance" in page.inner_text(".map-side >> nth=0")
    page.click(".map-method label:has-text('UMAP')")
    page.wait_for_selector("[data-ready=umap]")
    selected(page, [30])
    assert page.evaluate("document.querySelectorAll('.map-plot')[1].data[0].x") == site.maps["umap"]["student"][0]
    assert "variance" not in page.inner_text(".map-pair")
    click(page, "student", 12)
    selected(page, [12])
    page.click(".map-method label:has-text('PCA')")
    page.wait_for_selector("[data-ready=pca]")
    assert page.evaluate("document.querySelectorAll('.map-plot')[1].data[0].x") == site.maps["pca"]["student"][0]
    asked = Counter(path for path in site.asked if "umap" in path)
    page.wait_for_timeout(1500)
    assert Counter(path for path in site.asked if "umap" in path) == asked  # it is not asked for again


def test_a_umap_that_cannot_be_had_says_why(visit: Opened, site: Site) -> None:
    site.maps["umap"] = (202, "application/json", '{"message": "three quarters done"}')
    page = visit()
    page.wait_for_selector(".map-wait:has-text('three quarters done')")
    site.maps["umap"] = (404, "text/plain; charset=utf-8", "disk full: free some space")
    page.wait_for_selector('.map-wait:has-text("can\'t be had: disk full: free some space")')
    assert page.locator(".map-method input[value=umap]").is_disabled()
    click(page, "teacher", 1)
    selected(page, [1])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((404, "text/plain", "there is no teacher: give --teacher"), "there is no teacher: give --teacher"),
        ((500, "text/html", "<h1>oh</h1>"), "the app answered HTTP 500"),
        ((503, "application/json", '{"message": "come back"}'), "come back"),
    ],
)
def test_a_map_that_cannot_be_had_says_why(visit: Opened, site: Site, answer: tuple[int, str, str], said: str) -> None:
    site.maps["pca"] = answer
    page = visit(ready=False)
    page.wait_for_selector(f".map-message:has-text({json.dumps(said)})")
    assert not page.is_visible(".map-pair")
    assert not page.is_visible(".map-selection")
    page.keyboard.press("Escape")
    page.evaluate("handle.clear()")
    site.maps["pca"] = content()
    page.evaluate("start()")
    page.wait_for_selector("[data-ready=pca]")
    assert not page.is_visible(".map-message")


def test_an_app_that_has_ended_is_said(visit: Opened, site: Site) -> None:
    page = visit(script="window.fetch = () => Promise.reject(new TypeError('gone'));", ready=False)
    page.wait_for_selector(".map-message:has-text('the app does not answer')")


def test_two_visitors_do_not_see_each_other(visit: Opened, site: Site) -> None:
    one, two = visit(), visit()
    click(one, "teacher", 11)
    selected(one, [11])
    one.wait_for_function("document.querySelector('.map-card img').complete")
    before = [path for path in site.asked if not path.startswith("/map.json")]
    click(two, "teacher", 50)
    selected(two, [50])
    two.wait_for_function("document.querySelector('.map-card img').complete")
    selected(one, [11])
    after = [path for path in site.asked if not path.startswith("/map.json")]
    assert set(after[len(before) :]) == {"/thumb/50"}  # of a selection, the server hears of thumbnails alone


def test_beside_one_another_on_a_laptop_and_stacked_on_a_phone(visit: Opened) -> None:
    laptop = visit()
    boxes = [each.bounding_box() for each in laptop.query_selector_all(".map-plot")]
    assert boxes[0] is not None
    assert boxes[1] is not None
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[1]["x"] >= boxes[0]["x"] + boxes[0]["width"]
    phone = visit(width=390, height=844, has_touch=True, is_mobile=True, device_scale_factor=2)
    boxes = [each.bounding_box() for each in phone.query_selector_all(".map-plot")]
    assert boxes[0] is not None
    assert boxes[1] is not None
    assert boxes[0]["x"] == boxes[1]["x"]
    assert boxes[1]["y"] >= boxes[0]["y"] + boxes[0]["height"]
    assert boxes[0]["width"] > 350
    assert "Tap a point" in phone.inner_text(".map-count")
    phone.evaluate("handle.select([...Array(64).keys()])")
    assert phone.evaluate("document.documentElement.scrollWidth") == 390
    for side, image in (("teacher", 12), ("student", 33)):
        phone.touchscreen.tap(*place(phone, side, image))
        selected(phone, [image])
    assert phone.evaluate(f"{PLOTS}.map(each => each.layout.dragmode)") == [False] * 2


@pytest.mark.parametrize("width", [390, 700, 1100, 1600])
def test_a_place_is_the_same_place_in_both_and_all_points_are_inside(visit: Opened, width: int) -> None:
    page = visit(width=width)
    frames = page.evaluate(
        PLOTS
        + """.map(each => {
            const {xaxis, yaxis} = each._fullLayout;
            return [...xaxis.range, ...yaxis.range, xaxis._length, yaxis._length];
        })"""
    )
    np.testing.assert_allclose(frames[0], frames[1], rtol=1e-9)
    left, right, low, high, across, up = frames[0]
    assert left < 0 < 7 < right
    assert low < 0 < 7 < high
    assert (right - left) / across == pytest.approx((high - low) / up, rel=1e-6)


def test_zoom_in_one_is_zoom_in_both(visit: Opened) -> None:
    page = visit()
    page.click(".map-side:nth-child(1) [data-title=Zoom]")
    x, y = place(page, "teacher", 0)
    far_x, far_y = place(page, "teacher", 27)
    draw(page, [(x + 15, y - 15), (far_x + 15, far_y - 15)])
    ranges = f"{PLOTS}.map(each => [...each.layout.xaxis.range, ...each.layout.yaxis.range])"
    page.wait_for_function(f"{ranges}.every(each => each[1] - each[0] < 7)")
    page.wait_for_timeout(300)
    first, second = page.evaluate(ranges)
    np.testing.assert_allclose(first, second, atol=1e-6)
    page.evaluate("handle.select([3, 36])")
    selected(page, [3, 36])
    np.testing.assert_allclose(page.evaluate(ranges), [first, first], atol=1e-6)  # a selection leaves the view alone
    page.click(".map-side:nth-child(2) [data-title='Reset axes']")
    page.wait_for_function(f"{ranges}.every(each => each[1] - each[0] > 7)")
    selected(page, [3, 36])


def test_pointing_at_an_image_rings_it_in_both(visit: Opened) -> None:
    page = visit()
    page.mouse.move(*place(page, "student", 21))
    page.wait_for_selector(".map-tip:visible")
    assert "image 021.png" in page.inner_text(".map-tip")
    assert "overlap 100.0" in page.inner_text(".map-tip")
    for number, side in enumerate(("teacher", "student")):
        ring = page.query_selector_all(".map-ring")[number]
        box = ring.bounding_box()
        assert box is not None
        middle = [box["x"] + box["width"] / 2, box["y"] + box["height"] / 2]
        assert middle == pytest.approx(place(page, side, 21), abs=1.5)
    assert len(page.query_selector_all(".map-ring.map-on")) == 2
    page.mouse.move(2, 2)
    page.wait_for_selector(".map-tip", state="hidden")
    assert page.query_selector_all(".map-ring.map-on") == []
    page.evaluate("handle.select([8, 9])")
    page.hover(".map-card[data-image='9']")
    assert len(page.query_selector_all(".map-ring.map-on")) == 2
    assert not page.is_visible(".map-tip")


def test_colours_follow_the_page_into_the_dark(visit: Opened) -> None:
    page = visit()
    page.select_option(".map-by select", "right")
    page.evaluate("document.body.style.background = '#12171d'; document.body.classList.add('dark')")
    page.wait_for_function("document.querySelector('.map-plot').layout.xaxis.gridcolor === '#36404b'")
    assert np.abs(pixels(page, "student", [1, 2, 3]) - [(242, 149, 90), (90, 180, 236), (53, 199, 156)]).max() < 40
    page.select_option(".map-by select", "overlap")
    brightness = pixels(page, "teacher", [0, 5, 10]).sum(1)
    assert brightness[0] > brightness[1] > brightness[2]


def test_a_map_in_a_tab_that_is_not_shown_is_drawn_when_it_is(visit: Opened, site: Site) -> None:
    page = visit("#hidden", ready=False)
    page.wait_for_function("window.handle")
    page.wait_for_timeout(800)
    assert page.get_attribute("#map", "data-ready") is None
    assert not [path for path in site.asked if "map.json" in path]  # nor is anything computed for it
    page.evaluate("document.getElementById('tab').style.display = ''")
    page.wait_for_selector("[data-ready=pca]")
    click(page, "student", 44)
    selected(page, [44])
    page.evaluate("document.getElementById('tab').style.display = 'none'")
    page.keyboard.press("Escape")  # of a page that shows other things
    page.set_viewport_size({"width": 800, "height": 700})
    page.evaluate("document.getElementById('tab').style.display = ''")
    selected(page, [44])
    page.wait_for_function(f"{PLOTS}.every(each => each._fullLayout.width === each.clientWidth)")


def test_a_second_mount_takes_the_place_of_the_first_and_destroy_leaves_nothing(visit: Opened, site: Site) -> None:
    page = visit()
    click(page, "teacher", 2)
    selected(page, [2])
    page.evaluate("start()")
    assert page.get_attribute("#map", "data-selected") == ""
    page.wait_for_selector("[data-ready=pca]")
    assert len(page.query_selector_all(".map-plot")) == 2
    click(page, "student", 3)
    selected(page, [3])
    page.evaluate("handle.destroy()")
    assert page.inner_html("#map") == ""
    assert page.evaluate("document.getElementById('map').dataset.selected") is None
    page.wait_for_timeout(300)
    asked = len(site.asked)
    page.evaluate("document.body.classList.add('dark')")
    page.keyboard.press("Escape")
    page.wait_for_timeout(2500)
    assert len(site.asked) == asked  # nobody waits for the UMAP any more
    assert page.evaluate("told") == [[2], [3]]


def test_a_map_of_another_engine_goes_on_where_this_one_was(visit: Opened, site: Site) -> None:
    site.maps["umap"] = content(method="umap")
    page = visit()
    page.select_option(".map-by select", "right")
    page.evaluate("handle.select([6, 30])")
    page.wait_for_function("!document.querySelector('.map-method input[value=umap]').disabled")
    page.click(".map-method label:has-text('UMAP')")
    page.wait_for_selector("[data-ready=umap]")
    page.evaluate("start(handle.state())")
    page.wait_for_selector("[data-ready=umap]")
    selected(page, [6, 30])
    assert sorted(cards(page)) == [6, 30]
    assert page.input_value(".map-by select") == "right"
    assert "both right" in page.inner_text(".map-legend")
    site.maps["pca"] = site.maps["umap"] = content(20, right=None)  # a smaller gallery, without what was chosen
    page.evaluate("start(handle.state())")
    page.wait_for_selector("[data-ready]")
    page.wait_for_function("document.querySelectorAll('.map-card').length === 1")
    selected(page, [6])
    assert page.input_value(".map-by select") == "class"


def test_without_webgl_the_maps_are_drawn_all_the_same(visit: Opened) -> None:
    page = visit(
        script="""const get = HTMLCanvasElement.prototype.getContext;
        HTMLCanvasElement.prototype.getContext = function (kind, ...more) {
            return kind.includes('webgl') ? null : get.call(this, kind, ...more);
        };"""
    )
    assert page.query_selector_all(".map-plot canvas") == []
    assert len(page.query_selector_all(".map-plot .point")) == 128
    click(page, "teacher", 18)
    selected(page, [18])


def test_twenty_thousand_images(visit: Opened, site: Site) -> None:
    site.maps["pca"] = content(20_000, kinds=100)
    page = visit()
    assert page.evaluate("document.querySelector('.map-plot').data[0].type") == "scattergl"
    click(page, "teacher", 10_010)
    selected(page, [10_010])
    low, high = (np.array(place(page, "student", image)) for image in (19_990, 6_000))
    low, high = np.minimum(low, high) - 1, np.maximum(low, high) + 1
    page.click(".map-side:nth-child(2) [data-title='Box Select']")
    draw(page, [(low[0], low[1]), (high[0], high[1])])
    page.wait_for_function("document.getElementById('map').dataset.selected.split(',').length > 1000")
    student = np.array(site.maps["pca"]["student"])
    corners = np.sort(student[:, [19_990, 6_000]], axis=1)
    inside = ((student >= corners[:, :1]) & (student <= corners[:, 1:])).all(0)
    chosen = set(map(int, (page.get_attribute("#map", "data-selected") or "").split(",")))
    assert set(np.flatnonzero(inside).tolist()) <= chosen
    assert len(chosen) < 1.05 * inside.sum()
    assert len(cards(page)) == 60
