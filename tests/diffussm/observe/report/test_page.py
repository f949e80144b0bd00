"""The page in a real browser: no error, no network, every control works, in both themes and on a phone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from diffussm.observe.report.gather import gather
from diffussm.observe.report.page import for_script, render, state
from tests.diffussm.observe.report import stories

PHONE_PX = (390, 800)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    path = folder / "report.html"
    path.write_text(render(gather(stories.run(folder), "a-run")))
    return path


@pytest.fixture
def opened(page: Path, browser: Any) -> Any:
    browser.get_log("browser")  # empties what an earlier page left
    browser.set_window_size(1100, 900)
    browser.get(page.as_uri())
    return browser


def errors(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def find(browser: Any, css: str) -> Any:
    return browser.find_element(By.CSS_SELECTOR, css)


def test_every_chart_is_drawn_without_an_error_or_a_request(opened: Any) -> None:
    names = {place.get_attribute("data-chart") for place in opened.find_elements(By.CSS_SELECTOR, "[data-chart]")}
    assert names == {"loss", "score", "throughput", "goodput", "timeline", "grad_norm", "lr"}
    assert len(opened.find_elements(By.CSS_SELECTOR, "[data-chart] svg.main-svg")) >= len(names)
    assert len(opened.find_elements(By.CSS_SELECTOR, "#chart-goodput .barlayer .point")) == 7
    fetched = opened.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []
    assert errors(opened) == []


def test_words_of_the_run_cannot_become_a_program(opened: Any) -> None:
    assert opened.execute_script("return window.broken") is None
    assert stories.HOSTILE in opened.execute_script("return document.body.textContent")


def test_the_slider_changes_the_picture_and_plays(opened: Any) -> None:
    last = find(opened, "#grid").get_attribute("src")
    opened.execute_script(
        "const s = document.getElementById('slider'); s.value = 0; s.dispatchEvent(new Event('input'))"
    )
    first = find(opened, "#grid").get_attribute("src")
    assert first != last
    assert find(opened, "#slider-images").text == "2,000 images"
    find(opened, "#play").click()
    WebDriverWait(opened, 5).until(lambda b: find(b, "#grid").get_attribute("src") != first)
    find(opened, "#play").click()
    assert errors(opened) == []


def test_the_theme_switches_and_charts_follow(opened: Any) -> None:
    def look() -> tuple[str, str]:
        line = find(opened, "#chart-lr .scatterlayer path.js-line")
        return opened.execute_script("return getComputedStyle(document.body).backgroundColor"), line.get_attribute(
            "style"
        )

    before = look()
    find(opened, "#theme").click()
    WebDriverWait(opened, 5).until(lambda _: look()[0] != before[0] and look()[1] != before[1])
    find(opened, "#theme").click()
    WebDriverWait(opened, 5).until(lambda _: look() == before)


def test_config_shows_what_differs_and_on_request_everything(opened: Any) -> None:
    def visible() -> list[str]:
        rows = opened.find_elements(By.CSS_SELECTOR, "#config tbody tr")
        return [row.find_element(By.TAG_NAME, "code").text for row in rows if row.is_displayed()]

    assert "train.lr" in visible()
    assert "train.beta1" not in visible()
    find(opened, "#all-keys").click()
    assert "train.beta1" in visible()


def test_hovering_a_curve_names_its_values(opened: Any) -> None:
    chart = find(opened, "#chart-loss .draglayer .nsewdrag")
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(opened).move_to_element(chart).perform()
    WebDriverWait(opened, 5).until(lambda b: "smoothed" in find(b, "#chart-loss .hoverlayer").text)


def test_a_phone_scrolls_only_downwards(opened: Any) -> None:
    opened.set_window_size(*PHONE_PX)
    WebDriverWait(opened, 5).until(
        lambda b: b.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    )


def test_the_page_asks_for_nothing_from_outside(page: Path) -> None:
    text = page.read_text()
    own = text[: text.index("<script type")]  # plotly's own script names addresses that it never asks for here
    assert re.findall(r"(?:src|href)=\"(?!data:)", own) == []


def test_json_in_a_script_cannot_end_it() -> None:
    assert "</script>" not in for_script({"a": "</script>"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        for_script(float("nan"))


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path, browser: Any) -> None:
    store = stories.run(tmp_path)
    for key in list(store.keys("")):
        if key != "events.jsonl":
            store.delete(key)
    story = gather(store, "a-run")
    assert state(story) == "underway or interrupted"
    path = tmp_path / "page.html"
    path.write_text(render(story))
    browser.get_log("browser")
    browser.get(path.as_uri())
    assert find(browser, "h1").text == "a-run"
    assert errors(browser) == []
