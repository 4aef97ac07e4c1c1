"""In a real browser, colours and names of the maps say what the data has, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from tests.app.tabs.map_pages import LIGHT, VILE, Opened, Site, click, content, expect_selection, pixels, place

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_colours_by_class_by_overlap_and_by_who_is_right(visit: Opened) -> None:
    page = visit()
    options = [element.inner_text() for element in page.query_selector_all(".map-by option")]
    assert options == ["class", "neighbour overlap@10", "which side is right"]
    assert [element.inner_text().split("\n") for element in page.query_selector_all(".map-entry")] == [
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
    expect_selection(page, list(range(2, 64, 4)))


def test_of_many_classes_the_most_frequent_have_colours_and_the_others_can_be_selected(
    visit: Opened, site: Site
) -> None:
    labels = [*range(25), *(label for label in range(5, 25) for _ in range(3))]
    names = [*(f"kind {i}" for i in range(24)), VILE]
    site.maps["pca"] = content(len(labels), labels=labels, classes=names)
    page = visit()
    assert [element.inner_text().split("\n")[0] for element in page.query_selector_all(".map-entry")] == names[5:]
    options = [element.inner_text() for element in page.query_selector_all(".map-other option")]
    assert options == ["5 other classes…", *(f"kind {i} (1)" for i in range(5))]
    page.select_option(".map-other select", "3")
    expect_selection(page, [3])
    assert page.input_value(".map-other select") == "5 other classes…"
    page.click(".map-entry:last-of-type")
    expect_selection(page, [i for i, label in enumerate(labels) if label == 24])
    assert page.evaluate("window.vile") is None
    for dark in ("remove", "add"):
        page.evaluate(f"document.body.classList.{dark}('dark')")
        dots = page.evaluate(
            "[...document.querySelectorAll('.map-legend .map-dot')].map(dot => getComputedStyle(dot).backgroundColor)"
        )
        assert len(set(dots)) == 21


def test_names_are_text(visit: Opened, site: Site) -> None:
    site.maps["pca"] = content(4, keys=[VILE, "a/b/", "", "x" * 500], classes=[VILE, "1", "2", "3"])
    page = visit()
    page.evaluate("handle.select([0, 1, 2, 3])")
    expect_selection(page, [0, 1, 2, 3])
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
    assert [element.inner_text() for element in page.query_selector_all(".map-by option")] == ["neighbour overlap@10"]
    click(page, "teacher", 7)
    expect_selection(page, [7])
    assert page.inner_text(".map-card").split("\n") == ["image 007.png", "overlap 70.0\N{NO-BREAK SPACE}%"]

    site.maps["pca"] = content(labels=None, classes=None, right=None, overlap=None)
    bare = visit()
    assert not bare.is_visible(".map-by")
    assert bare.inner_text(".map-legend") == ""
    click(bare, "teacher", 7)
    expect_selection(bare, [7])
    assert np.abs(pixels(bare, "student", [7])[0] - LIGHT["shared"]).max() < 40


def test_colours_follow_the_page_into_the_dark(visit: Opened) -> None:
    page = visit()
    page.select_option(".map-by select", "right")
    page.evaluate("document.body.style.background = '#12171d'; document.body.classList.add('dark')")
    page.wait_for_function("document.querySelector('.map-plot').layout.xaxis.gridcolor === '#36404b'")
    assert np.abs(pixels(page, "student", [1, 2, 3]) - [(242, 149, 90), (90, 180, 236), (53, 199, 156)]).max() < 40
    page.select_option(".map-by select", "overlap")
    brightness = pixels(page, "teacher", [0, 5, 10]).sum(1)
    assert brightness[0] > brightness[1] > brightness[2]
