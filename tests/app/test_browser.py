"""The app in a real browser, on a bundle as the quickstart makes it."""

from __future__ import annotations

import csv
import io
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from mvmr.distillation.report.report import report
from tests.app.apps import DATA, WAIT, Running, Visit, make_quickstart, running, visit, wait_until
from tests.app.pictures import encoded, giant, odd_images, photograph
from tests.app.several import make_student
from tests.serve import serving

pytestmark = [pytest.mark.browser, pytest.mark.slow]
expect.set_options(timeout=WAIT)
SHOTS = Path(__file__).parents[2] / "build" / "screenshots"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_quickstart(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture(scope="module")
def app(bundle: Path) -> Iterator[Running]:
    with running(str(bundle)) as started:
        yield started


@pytest.fixture
def visitor(app: Running, browser: Browser) -> Iterator[Visit]:
    with visit(browser, app.url) as seen:
        yield seen


def give(page: Page, content: bytes, name: str = "photo.png") -> None:
    page.set_input_files("#picture input[type=file]", {"name": name, "mimeType": "image/png", "buffer": content})


def cards(page: Page, side: str) -> list[int]:
    found = page.locator(f"#result .side.{side} .card")
    return [int(each.get_attribute("data-row") or -1) for each in found.all()]


def shot(page: Page, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png")


def open_tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def test_says_what_is_loaded_and_asks_nobody_else(visitor: Visit) -> None:
    title = visitor.page.locator(".mvmr-title")
    expect(title.locator("h1")).to_have_text(re.compile("student beside teacher"))
    expect(title).to_contain_text("680 images of sample:patches, 17 classes")
    expect(title).to_contain_text("resnet18_025, 128 features")
    visitor.page.get_by_text("more ways to run the student").click()
    expect(title).to_contain_text("--fp16")
    assert visitor.hosts == {"127.0.0.1"}
    shot(visitor.page, "first")


def test_an_upload_gives_two_rows_whose_shared_images_agree_with_the_figure(visitor: Visit) -> None:
    page = visitor.page
    give(page, encoded(photograph(), "JPEG"), "coffee.jpg")
    expect(page.locator("#result .card")).to_have_count(20)
    teacher, student = cards(page, "teacher"), cards(page, "student")
    shared = set(teacher) & set(student)
    expect(page.locator("#result .figure")).to_contain_text(f"{len(shared)} of 10 neighbours shared")
    colours: dict[int, set[str]] = {}
    for each in page.locator("#result .card.shared").all():
        colours.setdefault(int(each.get_attribute("data-row") or -1), set()).add(each.get_attribute("style") or "")
    assert set(colours) == shared
    assert all(len(of_both) == 1 for of_both in colours.values())
    assert len({next(iter(each)) for each in colours.values()}) == len(shared)
    expect(page.locator("#result")).to_contain_text("600 x 400 pixels")
    shot(page, "neighbours")


def test_a_gallery_image_is_no_neighbour_of_itself_and_k_and_engine_may_change(visitor: Visit) -> None:
    page = visitor.page
    pick = page.locator("#strip .pick").nth(3)
    row = int(pick.get_attribute("data-row") or -1)
    pick.click()
    expect(page.locator("#result .card")).to_have_count(20)
    assert row not in cards(page, "teacher") + cards(page, "student")
    page.locator("#k input[type=number]").fill("4")
    page.locator("#k input[type=number]").press("Enter")
    expect(page.locator("#result .card")).to_have_count(8)
    page.locator("#engine input").click()
    page.get_by_role("option", name="ONNX int8").click()
    expect(page.locator("#result .side.student h3")).to_have_text("Student: ONNX int8")
    expect(page.locator("#result .costs")).to_contain_text("MB on disk")
    nearest = page.locator("#result .side.student .card").first
    key = nearest.get_attribute("title") or ""
    nearest.click()  # a neighbour becomes the question
    expect(page.locator("#result .query")).to_contain_text(key)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param(b"this is no image", "not an image", id="text"),
        pytest.param(encoded(Image.new("RGB", (64, 64)), "JPEG")[:300], "damaged", id="cut off"),
        pytest.param(giant(), "more pixels than the 50 million", id="30,000 x 30,000"),
        pytest.param(b"\x89PNG\r\n\x1a\n", "damaged", id="header alone"),
    ],
)
def test_a_bad_upload_is_told_and_the_app_goes_on(visitor: Visit, content: bytes, told: str) -> None:
    page = visitor.page
    give(page, content)
    expect(page.locator("#result .problem")).to_contain_text(told)
    give(page, encoded(photograph()), "good.png")
    expect(page.locator("#result .card")).to_have_count(20)
    # an image that the browser can't show is Gradio's preview's concern, until the answer comes
    visitor.errors[:] = [each for each in visitor.errors if "blob:" not in each]


@pytest.mark.parametrize("kind", odd_images())
def test_an_odd_image_is_answered_with_a_note_on_what_was_done(visitor: Visit, kind: str) -> None:
    content, note = odd_images()[kind]
    give(visitor.page, content, "odd.png")
    expect(visitor.page.locator("#result .card")).to_have_count(20)
    expect(visitor.page.locator("#result .query")).to_contain_text(note)


def test_a_click_on_one_map_selects_the_image_on_the_other(visitor: Visit) -> None:
    page = visitor.page
    open_tab(page, "Map")
    place = page.locator("#map .map")
    expect(place).to_have_attribute("data-ready", "pca")
    number = page.evaluate(
        """() => {
          const plot = document.querySelector('#map .js-plotly-plot');
          plot.emit('plotly_click', {points: [{pointNumber: 7, curveNumber: 0}], event: {}});
        }"""
    )
    assert number is None
    expect(place).to_have_attribute("data-selected", "7")
    chosen = page.evaluate(
        "() => [...document.querySelectorAll('#map .js-plotly-plot')].map(plot => plot.data.map(t => t.selectedpoints))"
    )
    assert len(chosen) == 2
    assert chosen[0] == chosen[1]
    assert any(7 in (each or []) for each in chosen[1])
    shot(page, "map")


def test_two_visitors_do_not_see_each_other(app: Running, browser: Browser) -> None:
    with visit(browser, app.url) as one, visit(browser, app.url) as two:
        rows = {}
        for seen, number in ((one, 2), (two, 9)):
            pick = seen.page.locator("#strip .pick").nth(number)
            rows[number] = pick.get_attribute("title") or ""
            pick.click()
            expect(seen.page.locator("#result .card")).to_have_count(20)
        for seen, number in ((one, 2), (two, 9)):
            expect(seen.page.locator("#result .query")).to_contain_text(rows[number])
        open_tab(one.page, "Map")
        open_tab(two.page, "Map")
        for seen in (one, two):
            expect(seen.page.locator("#map .map")).to_have_attribute("data-ready", "pca")
        one.page.evaluate(
            "() => document.querySelector('#map .js-plotly-plot')"
            ".emit('plotly_click', {points: [{pointNumber: 3, curveNumber: 0}], event: {}})"
        )
        expect(one.page.locator("#map .map")).to_have_attribute("data-selected", "3")
        assert not two.page.locator("#map .map").get_attribute("data-selected")


def test_disagreements_and_figures_are_those_of_the_report(
    app: Running, bundle: Path, visitor: Visit, tmp_path: Path
) -> None:
    """On the same images, to the last digit; CKA to the twelfth: two processes may sum in another order."""
    expected = report(bundle, DATA, out=tmp_path / "report", permutations=1)
    page = visitor.page
    open_tab(page, "Disagreements")
    page.click("#fit")
    expect(page.locator("#disagreements")).to_contain_text("linear probes of both", timeout=2 * WAIT)
    with page.expect_download() as begun:
        page.get_by_role("link", name="classes").click()
    rows = list(csv.DictReader(io.StringIO(Path(begun.value.path()).read_text(encoding="utf-8"))))
    overlaps = {each["name"]: each for each in expected["neighbours"]["classes"]}
    probes = {each["name"]: each for each in expected["probe"]["classes"]}
    assert {row["class"] for row in rows} == set(overlaps)
    for row in rows:
        wanted, probed = overlaps[row["class"]], probes[row["class"]]
        assert [float(row[f"overlap@10{end} (%)"]) for end in ("", ", low", ", high")] == [
            wanted["mean"], wanted["low"], wanted["high"]
        ]  # fmt: skip
        assert float(row["teacher's accuracy (%)"]) == probed["teacher"]
        assert float(row["student's accuracy (%)"]) == probed["student"]
        assert float(row["difference (points)"]) == probed["difference"]
    images = httpx2.get(f"{app.url}/disagreements/images.csv?engine=torch&k=10").text
    values = [float(row["overlap@10 (%)"]) for row in csv.DictReader(io.StringIO(images))]
    assert len(values) == 680
    assert np.mean(values) == pytest.approx(expected["neighbours"]["overlap"]["mean"], abs=1e-9)
    expect(page.locator("#disagreements .summary")).to_contain_text(
        f"{expected['neighbours']['overlap']['mean']:.1f} %"
    )
    shot(page, "disagreements")

    open_tab(page, "Map")  # probes add a colour to the map
    page.reload()
    page.wait_for_selector("#strip .pick")
    open_tab(page, "Map")
    expect(page.locator("#map .map")).to_have_attribute("data-ready", "pca")
    assert "right" in page.locator("#map select").first.inner_text()

    open_tab(page, "Figures")
    page.click("#measure")
    cells = page.locator("#figures td[data-value]")
    expect(page.locator("#figures tbody")).to_contain_text("images/s", timeout=2 * WAIT)
    assert cells.count() > 20
    cell = next(
        each
        for each in expected["dependence"]["cells"]
        if each["row"] == "student.layer4" and each["column"] == "teacher"
    )
    table = list(csv.DictReader(io.StringIO(httpx2.get(f"{app.url}/figures.csv").text)))
    torch_row = next(row for row in table if row["engine"] == "torch float32")
    assert float(torch_row["dCor to the teacher, unbiased"]) == cell["dcor"]
    assert float(torch_row["CKA to the teacher, linear"]) == pytest.approx(cell["cka"], rel=1e-12)
    shot(page, "figures")


def test_an_image_is_classified_by_head_and_by_names(visitor: Visit) -> None:
    page = visitor.page
    open_tab(page, "Classify")
    page.click("#classify")
    expect(page.locator("#classes")).to_contain_text("Choose an image")
    open_tab(page, "Neighbours")
    give(page, encoded(photograph()))
    expect(page.locator("#result .card")).to_have_count(20)
    open_tab(page, "Classify")
    page.locator("#names textarea").fill("coffee, cat")
    page.click("#classify")
    expect(page.locator("#classes .bars.student li")).to_have_count(5)
    expect(page.locator("#classes .bars.teacher li")).to_have_count(2)
    shares = [float(each.inner_text().split()[0]) for each in page.locator("#classes .bars.teacher .value").all()]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    page.locator("#names textarea").fill("alone")
    page.click("#classify")
    expect(page.locator("#classes")).to_contain_text("two class names or more")
    shot(page, "classify")


def test_nothing_that_is_uploaded_stays_on_the_disk(bundle: Path, browser: Browser, tmp_path: Path) -> None:
    with running(str(bundle), TMPDIR=str(tmp_path)) as app, visit(browser, app.url) as seen:
        content = encoded(photograph())
        give(seen.page, content, "secret.png")
        expect(seen.page.locator("#result .card")).to_have_count(20)

        def kept() -> list[Path]:
            return [each for each in tmp_path.rglob("*") if each.is_file() and each.stat().st_size == len(content)]

        wait_until(lambda: not kept(), seconds=30)
    assert list(tmp_path.glob("mvmr-app-*")) == []


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file={bundle}/bundle.json", "gradio_api/file=/etc/passwd", "file={bundle}/bundle.json", "thumb/0",
        "thumb/nonsense/0", "map.json?engine=torch&k=0", "map.json?engine=torch&k=999", "map.json?engine=teacher",
        "thumb/..%2F..%2Fetc%2Fpasswd", "mvmr/..%2Fui.py", "mvmr/%2e%2e/ui.py", "map.json?engine=nonsense",
        "disagreements/nonsense.csv?engine=torch", "docs", "openapi.json",
    ],
)  # fmt: skip
def test_no_path_outside_the_gallery_is_served(app: Running, bundle: Path, path: str) -> None:
    answer = httpx2.get(f"{app.url}/{path.format(bundle=bundle)}")
    assert 400 <= answer.status_code < 500, answer.text[:200]
    assert b"root:" not in answer.content
    assert b"space_id" not in answer.content


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}], ids=["bare", "as Gradio's"])
def test_a_path_of_a_strangers_choice_is_neither_read_nor_removed(
    app: Running, tmp_path: Path, meta: dict[str, Any]
) -> None:
    victim = tmp_path / "victim.png"
    victim.write_bytes(encoded(Image.new("RGB", (48, 47), "red")))
    event = {"data": [{"path": str(victim), **meta}, None, "torch", 5], "fn_index": 0, "session_hash": f"s{len(meta)}"}
    httpx2.post(f"{app.url}/gradio_api/queue/join", json=event)
    said = ""
    with httpx2.stream("GET", f"{app.url}/gradio_api/queue/data?session_hash=s{len(meta)}", timeout=60) as answers:
        for line in answers.iter_lines():
            said += line
            if "process_completed" in line:
                break
    assert "process_completed" in said
    assert "48 x 47" not in said
    time.sleep(7)  # longer than an upload is kept for the browser
    assert victim.exists()


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_it_without_scrolling_sideways(app: Running, browser: Browser, dark: bool) -> None:
    with visit(browser, app.url, width=390, height=844, dark=dark) as seen:
        page = seen.page
        page.locator("#strip .pick").first.click()
        expect(page.locator("#result .card")).to_have_count(20)
        for tab in ("Neighbours", "Map", "Disagreements", "Classify", "Figures"):
            menu = page.get_by_role("tab", name=tab)
            if not menu.is_visible():  # Gradio puts those without room behind a button
                page.locator(".overflow-menu button").first.click()
                menu = page.locator(".overflow-dropdown button", has_text=tab)
            menu.click()
            wide = page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wide <= 1, tab
            shot(page, f"phone-{'dark' if dark else 'light'}-{tab.lower()}")


def test_without_a_teacher_the_student_is_shown_and_the_page_says_why(
    bundle: Path, browser: Browser, tmp_path: Path
) -> None:
    with running(str(bundle), "--teacher", str(tmp_path / "gone")) as app, visit(browser, app.url) as seen:
        page = seen.page
        expect(page.locator(".mvmr-title .problem")).to_contain_text("gone")
        page.locator("#strip .pick").first.click()
        expect(page.locator("#result .side.student .card")).to_have_count(10)
        expect(page.locator("#result .side.teacher")).to_have_count(0)
        open_tab(page, "Disagreements")
        expect(page.locator("#disagreements .problem")).to_contain_text("gone")


def test_a_gallery_smaller_than_k_shows_what_there_is(bundle: Path, browser: Browser, tmp_path: Path) -> None:
    folder, count = tmp_path / "few", 2
    folder.mkdir()
    for number in range(count):
        photograph().rotate(30 * number).save(folder / f"{number}.jpg")
    with running(str(bundle), "--gallery", str(folder)) as app, visit(browser, app.url) as seen:
        page = seen.page
        expect(page.locator(".mvmr-title")).to_contain_text(f"{count} images of")
        expect(page.locator(".mvmr-title")).to_contain_text(f"no more than k = {count - 1}; give more images")
        give(page, encoded(photograph()))
        expect(page.locator("#result .side.student .card")).to_have_count(count - 1)
        open_tab(page, "Disagreements")
        expect(page.locator("#disagreements .summary")).to_contain_text(f"{count - 1} nearest neighbours")


def test_a_service_takes_the_students_place(bundle: Path, browser: Browser, tmp_path: Path) -> None:
    with (
        serving.running(bundle, tmp_path, "--precision", "int8") as service,
        running("--service", service.url, "--gallery", DATA, "--teacher", str(bundle.parent / "teacher")) as app,
        visit(browser, app.url) as seen,
    ):
        page = seen.page
        expect(page.locator(".mvmr-title")).to_contain_text("service at")
        give(page, encoded(photograph()))
        expect(page.locator("#result .card")).to_have_count(20)
        open_tab(page, "Classify")
        page.click("#classify")
        expect(page.locator("#classes .bars.student li")).to_have_count(5)


def test_a_link_leads_to_the_page_of_the_other_teacher(browser: Browser, tmp_path: Path) -> None:
    with running(str(make_student(tmp_path))) as app, visit(browser, app.url) as seen:
        page = seen.page
        expect(page.locator(".mvmr-title nav [aria-current=page]")).to_have_text("clip")
        page.get_by_role("link", name="dino").click()
        page.wait_for_url("**/teacher/dino/")
        expect(page.locator(".mvmr-title nav [aria-current=page]")).to_have_text("dino")
        page.locator("#strip .pick").first.click()
        expect(page.locator("#result .card")).to_have_count(20)
        expect(page.locator("#result .side.teacher h3")).to_contain_text("Teacher: dino")
        shot(page, "several")
        open_tab(page, "Map")
        expect(page.locator("#map .map")).to_have_attribute("data-ready", "pca")
        page.get_by_role("link", name="clip").click()
        page.wait_for_url(f"{app.url}/")
