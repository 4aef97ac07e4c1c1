"""In a real browser, what is selected or pointed at in one map is so in the other: clicks, lassos, zoom, fingers."""

from __future__ import annotations

import numpy as np
import pytest

from tests.app.tabs.map_pages import (
    PLOTS,
    Opened,
    Site,
    cards,
    click,
    content,
    draw,
    expect_selection,
    pixels,
    place,
    saturation,
)

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.mark.parametrize(("side", "opposite"), [("teacher", "student"), ("student", "teacher")])
def test_a_click_selects_the_same_image_in_the_other_map(visit: Opened, site: Site, side: str, opposite: str) -> None:
    page = visit()
    before = saturation(pixels(page, opposite, [27, 3, 60]))
    click(page, side, 27)
    expect_selection(page, [27])
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
    after = saturation(pixels(page, opposite, [27, 3, 60]))
    assert min(before) > 0.3
    assert after[0] > 0.3  # the very point, elsewhere than the one clicked, while the others fade
    assert max(after[1:]) < 0.3
    assert page.evaluate("selections") == [[27]]


def test_a_click_with_shift_adds(visit: Opened) -> None:
    page = visit()
    click(page, "teacher", 40)
    expect_selection(page, [40])
    page.keyboard.down("Shift")
    click(page, "student", 9)
    page.keyboard.up("Shift")
    expect_selection(page, [9, 40])
    page.wait_for_timeout(600)  # two clicks at once in one map are a double click
    click(page, "student", 10)
    expect_selection(page, [10])


def test_a_lasso_selects_what_it_surrounds(visit: Opened) -> None:
    page = visit()
    for side, inside in (("teacher", [9, 10, 17, 18]), ("student", [20, 21, 28, 29])):
        at = np.array([place(page, side, image) for image in inside])
        middle, reach = at.mean(0), np.ptp(at, axis=0).max() * 0.9
        turn = np.linspace(0, 2 * np.pi, 9)
        draw(page, [(middle[0] + reach * np.cos(angle), middle[1] + reach * np.sin(angle)) for angle in turn])
        expect_selection(page, inside)
        assert set(cards(page)) == set(inside)
        assert page.query_selector_all(".map-plot .selectionlayer path") == []  # the line is gone, the selection stays
    assert page.evaluate("selections") == [[9, 10, 17, 18], [20, 21, 28, 29]]


def test_a_box_selects_what_it_holds_and_an_empty_one_clears(visit: Opened) -> None:
    page = visit()
    tools = page.query_selector_all(".map-side:nth-child(2) .modebar-btn")
    assert [tool.get_attribute("data-title") for tool in tools] == [
        "Lasso Select", "Box Select", "Pan", "Zoom", "Reset axes",
    ]  # fmt: skip
    tools[1].click()
    inside = [18, 19, 20, 26, 27, 28]
    at = np.array([place(page, "student", image) for image in inside])
    low, high = at.min(0) - 8, at.max(0) + 8
    draw(page, [(low[0], low[1]), (high[0], high[1])])
    expect_selection(page, inside)
    between = np.array([place(page, "student", image) for image in (18, 27)]).mean(0)
    draw(page, [(between[0] - 8, between[1] - 8), (between[0] + 8, between[1] + 8)])
    expect_selection(page, [])
    assert page.evaluate(f"{PLOTS}.map(plot => plot.layout.dragmode)") == ["select"] * 2


@pytest.mark.parametrize("how", ["Escape", "button", "double click"])
def test_a_selection_is_cleared(visit: Opened, how: str) -> None:
    page = visit()
    assert not page.is_visible(".map-clear")
    click(page, "teacher", 5)
    expect_selection(page, [5])
    if how == "Escape":
        page.keyboard.press("Escape")
    elif how == "button":
        page.click(".map-clear")
    else:
        page.wait_for_timeout(600)  # else the first click of the double one is the second of the click before
        x, y = (np.array(place(page, "student", 0)) + place(page, "student", 9)) / 2
        page.mouse.dblclick(x, y)
    expect_selection(page, [])
    assert cards(page) == []
    assert "Click a point" in page.inner_text(".map-count")
    assert not page.is_visible(".map-clear")
    assert page.evaluate("selections.at(-1)") == []


def test_many_are_shown_by_the_lowest_overlap_and_the_rest_is_counted(visit: Opened, site: Site) -> None:
    site.maps["pca"] = content(300)
    page = visit()
    page.evaluate("handle.select([...Array(300).keys(), 4, -1, 300, 2.5, 'x'])")
    expect_selection(page, list(range(300)))
    numbers = cards(page)
    assert numbers == sorted(range(300), key=lambda image: (image % 11, image))[:60]
    assert "and 240 more" in page.inner_text(".map-more")
    mean = np.mean(np.arange(300) % 11 * 10)
    assert f"300 of 300 images · overlap@10 {mean:.1f}\N{NO-BREAK SPACE}%" in page.inner_text(".map-count")
    assert "teacher right on 50.0\N{NO-BREAK SPACE}%" in page.inner_text(".map-count")


def test_two_visitors_do_not_see_each_other(visit: Opened, site: Site) -> None:
    first, second = visit(), visit()
    click(first, "teacher", 11)
    expect_selection(first, [11])
    first.wait_for_function("document.querySelector('.map-card img').complete")
    before = [path for path in site.requests if not path.startswith("/map.json")]
    click(second, "teacher", 50)
    expect_selection(second, [50])
    second.wait_for_function("document.querySelector('.map-card img').complete")
    expect_selection(first, [11])
    after = [path for path in site.requests if not path.startswith("/map.json")]
    assert set(after[len(before) :]) == {"/thumb/50"}  # of a selection, the server hears of thumbnails alone


def test_beside_one_another_on_a_laptop_and_stacked_on_a_phone(visit: Opened) -> None:
    laptop = visit()
    boxes = [plot.bounding_box() for plot in laptop.query_selector_all(".map-plot")]
    assert boxes[0] is not None
    assert boxes[1] is not None
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[1]["x"] >= boxes[0]["x"] + boxes[0]["width"]
    phone = visit(width=390, height=844, has_touch=True, is_mobile=True, device_scale_factor=2)
    boxes = [plot.bounding_box() for plot in phone.query_selector_all(".map-plot")]
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
        expect_selection(phone, [image])
    assert phone.evaluate(f"{PLOTS}.map(plot => plot.layout.dragmode)") == [False] * 2


@pytest.mark.parametrize("width", [390, 700, 1100, 1600])
def test_a_place_is_the_same_place_in_both_and_all_points_are_inside(visit: Opened, width: int) -> None:
    page = visit(width=width)
    frames = page.evaluate(
        PLOTS
        + """.map(plot => {
            const {xaxis, yaxis} = plot._fullLayout;
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
    ranges = f"{PLOTS}.map(plot => [...plot.layout.xaxis.range, ...plot.layout.yaxis.range])"
    page.wait_for_function(f"{ranges}.every(range => range[1] - range[0] < 7)")
    page.wait_for_timeout(300)
    first, second = page.evaluate(ranges)
    np.testing.assert_allclose(first, second, atol=1e-6)
    page.evaluate("handle.select([3, 36])")
    expect_selection(page, [3, 36])
    np.testing.assert_allclose(page.evaluate(ranges), [first, first], atol=1e-6)  # a selection leaves the view alone
    page.click(".map-side:nth-child(2) [data-title='Reset axes']")
    page.wait_for_function(f"{ranges}.every(range => range[1] - range[0] > 7)")
    expect_selection(page, [3, 36])


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


def test_twenty_thousand_images(visit: Opened, site: Site) -> None:
    site.maps["pca"] = content(20_000, kinds=100)
    page = visit()
    assert page.evaluate("document.querySelector('.map-plot').data[0].type") == "scattergl"
    click(page, "teacher", 10_010)
    expect_selection(page, [10_010])
    low, high = (np.array(place(page, "student", image)) for image in (19_990, 6_000))
    low, high = np.minimum(low, high) - 1, np.maximum(low, high) + 1
    page.click(".map-side:nth-child(2) [data-title='Box Select']")
    draw(page, [(low[0], low[1]), (high[0], high[1])])
    page.wait_for_function("document.getElementById('map').dataset.selected.split(',').length > 1000")
    student = np.array(site.maps["pca"]["student"])
    corners = np.sort(student[:, [19_990, 6_000]], axis=1)
    inside = ((student >= corners[:, :1]) & (student <= corners[:, 1:])).all(0)
    selection = set(map(int, (page.get_attribute("#map", "data-selected") or "").split(",")))
    assert set(np.flatnonzero(inside).tolist()) <= selection
    assert len(selection) < 1.05 * inside.sum()
    assert len(cards(page)) == 60
