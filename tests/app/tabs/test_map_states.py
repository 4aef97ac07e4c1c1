"""In a real browser, maps that are computed, missing, hidden, mounted again or without WebGL are told of or go on."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tests.app.tabs.map_pages import PLOTS, Opened, Site, cards, click, content, expect_selection

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_umap_can_be_chosen_when_it_is_ready(visit: Opened, site: Site) -> None:
    page = visit()
    radio = page.locator(".map-method input[value=umap]")
    page.wait_for_function("document.querySelector('.map-wait:not(:empty)')?.textContent.startsWith('being computed')")
    assert radio.is_disabled()
    click(page, "teacher", 30)
    expect_selection(page, [30])
    site.maps["umap"] = content(method="umap")
    page.wait_for_function("!document.querySelector('.map-method input[value=umap]').disabled")
    assert page.inner_text(".map-wait >> nth=1") == ""
    assert "31.3\N{NO-BREAK SPACE}% of its variance" in page.inner_text(".map-side >> nth=0")
    page.click(".map-method label:has-text('UMAP')")
    page.wait_for_selector("[data-ready=umap]")
    expect_selection(page, [30])
    assert page.evaluate("document.querySelectorAll('.map-plot')[1].data[0].x") == site.maps["umap"]["student"][0]
    assert "variance" not in page.inner_text(".map-pair")
    click(page, "student", 12)
    expect_selection(page, [12])
    page.click(".map-method label:has-text('PCA')")
    page.wait_for_selector("[data-ready=pca]")
    assert page.evaluate("document.querySelectorAll('.map-plot')[1].data[0].x") == site.maps["pca"]["student"][0]
    requests = Counter(path for path in site.requests if "umap" in path)
    page.wait_for_timeout(1500)
    assert Counter(path for path in site.requests if "umap" in path) == requests  # it is not asked for again


def test_a_umap_that_cannot_be_had_says_why(visit: Opened, site: Site) -> None:
    site.maps["umap"] = (202, "application/json", '{"message": "three quarters done"}')
    page = visit()
    page.wait_for_selector(".map-wait:has-text('three quarters done')")
    site.maps["umap"] = (404, "text/plain; charset=utf-8", "disk full: free some space")
    page.wait_for_selector('.map-wait:has-text("can\'t be had: disk full: free some space")')
    assert page.locator(".map-method input[value=umap]").is_disabled()
    click(page, "teacher", 1)
    expect_selection(page, [1])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, "text/plain", "there is no teacher: give --teacher"), "there is no teacher: give --teacher"),
        ((500, "text/html", "<h1>oh</h1>"), "the app answered HTTP 500"),
        ((503, "application/json", '{"message": "come back"}'), "come back"),
    ],
)
def test_a_map_that_cannot_be_had_says_why(
    visit: Opened, site: Site, answer: tuple[int, str, str], message: str
) -> None:
    site.maps["pca"] = answer
    page = visit(ready=False)
    page.wait_for_selector(f".map-message:has-text({json.dumps(message)})")
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


def test_a_map_in_a_tab_that_is_not_shown_is_drawn_when_it_is(visit: Opened, site: Site) -> None:
    page = visit("#hidden", ready=False)
    page.wait_for_function("window.handle")
    page.wait_for_timeout(800)
    assert page.get_attribute("#map", "data-ready") is None
    assert not [path for path in site.requests if "map.json" in path]  # nor is anything computed for it
    page.evaluate("document.getElementById('tab').style.display = ''")
    page.wait_for_selector("[data-ready=pca]")
    click(page, "student", 44)
    expect_selection(page, [44])
    page.evaluate("document.getElementById('tab').style.display = 'none'")
    page.keyboard.press("Escape")  # of a page that shows other things
    page.set_viewport_size({"width": 800, "height": 700})
    page.evaluate("document.getElementById('tab').style.display = ''")
    expect_selection(page, [44])
    page.wait_for_function(f"{PLOTS}.every(plot => plot._fullLayout.width === plot.clientWidth)")


def test_a_second_mount_takes_the_place_of_the_first_and_destroy_leaves_nothing(visit: Opened, site: Site) -> None:
    page = visit()
    click(page, "teacher", 2)
    expect_selection(page, [2])
    page.evaluate("start()")
    assert page.get_attribute("#map", "data-selected") == ""
    page.wait_for_selector("[data-ready=pca]")
    assert len(page.query_selector_all(".map-plot")) == 2
    click(page, "student", 3)
    expect_selection(page, [3])
    page.evaluate("handle.destroy()")
    assert page.inner_html("#map") == ""
    assert page.evaluate("document.getElementById('map').dataset.selected") is None
    page.wait_for_timeout(300)
    requests = len(site.requests)
    page.evaluate("document.body.classList.add('dark')")
    page.keyboard.press("Escape")
    page.wait_for_timeout(2500)
    assert len(site.requests) == requests  # nobody waits for the UMAP any more
    assert page.evaluate("selections") == [[2], [3]]


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
    expect_selection(page, [6, 30])
    assert sorted(cards(page)) == [6, 30]
    assert page.input_value(".map-by select") == "right"
    assert "both right" in page.inner_text(".map-legend")
    site.maps["pca"] = site.maps["umap"] = content(20, right=None)  # a smaller gallery, without what was chosen
    page.evaluate("start(handle.state())")
    page.wait_for_selector("[data-ready]")
    page.wait_for_function("document.querySelectorAll('.map-card').length === 1")
    expect_selection(page, [6])
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
    expect_selection(page, [18])
