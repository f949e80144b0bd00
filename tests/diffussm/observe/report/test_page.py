"""The page in a real browser: no error, no network, every control works, in both themes and on a phone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from diffussm.checkpoint.store import Store
from diffussm.config import Config, dump, load, preset
from diffussm.observe.report.gather import gather
from diffussm.observe.report.page import for_script, render, rows, state, tiles
from tests.diffussm.observe.report import stories

CONFIGS = Path(__file__).parents[4] / "configs"
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


def test_what_differs_is_told_by_value_from_the_defaults_or_from_the_file_the_config_began_from(tmp_path: Path) -> None:
    story = gather(stories.run(tmp_path), "a-run")
    changed = {"name", "storage", "data.latents", "train.images", "train.lr"}
    assert differing(story.config, {}) == changed  # and not cluster.hang_s: 600.0 in the file is 600

    recipe = CONFIGS / "imagenet-256.yaml"
    found = preset(recipe)
    assert found is not None
    assert found[0] == str(recipe)
    began = yaml.safe_load(dump(found[1]))
    assert differing(began, began) == set()
    mine = yaml.safe_load(dump(load(recipe, ["train.lr=2e-4", "data.flip=false", "sample.ema=none"])))
    assert differing(mine, began) == {"train.lr", "data.flip", "sample.ema"}


def differing(config: Mapping[str, Any], preset: Mapping[str, Any]) -> set[str]:
    return {row.key for row in rows(config, preset) if row.differs}


def test_the_page_names_the_file_that_the_config_began_from(tmp_path: Path) -> None:
    store = stories.run(tmp_path)
    store.write(
        "preset.yaml", yaml.safe_dump({"file": "configs/mine.yaml", "config": {"train": {"lr": 0.25}}}).encode()
    )
    text = render(gather(store, "a-run"))
    assert "those that differ from configs/mine.yaml" in text
    assert re.search(r'<tr class="same" hidden><td><code>train.lr', text)


def test_environments_and_names_of_secrets_stay_out(tmp_path: Path) -> None:
    store = stories.run(tmp_path)
    cfg = load_from(store)
    cfg.slurm.environment, cfg.kubernetes.env_from_secrets = ["HF_TOKEN=canary-42"], ["canary-43"]
    store.write("config.yaml", dump(cfg).encode())
    store.write("preset.yaml", yaml.safe_dump({"file": "x.yaml", "config": yaml.safe_load(dump(cfg))}).encode())
    text = render(gather(store, "a-run"))
    assert "train.lr" in text
    assert "canary" not in text


def load_from(store: Store) -> Config:
    return load(Path(str(store.url).removeprefix("file://")))


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


PREEMPTED: list[dict[str, Any]] = [  # what journals have of docs/examples/preempted-slurm-job.log, first start
    {"event": "started", "images": 0, "world_size": 2},
    {"event": "asked to leave", "reason": "SIGUSR1 to the driver"},
    {"event": "saved", "images": 928, "tier": "storage"},
    {"event": "left", "images": 928, "cause": "preemption", "reason": "SIGUSR1 to the driver: saved at 928 images"},
    {"event": "evidence", "folder": "attempts/1/postmortem"},
    {"event": "failure", "cause": "preemption", "decision": "stop", "reason": "rank 0: SIGUSR1 to the driver"},
]


def told(events: list[dict[str, Any]], attempt: int = 1) -> list[dict[str, Any]]:
    return [{"time": 1.0 + number, "attempt": attempt} | event for number, event in enumerate(events)]


def test_a_preemption_is_no_fault_and_the_page_says_so(tmp_path: Path) -> None:
    story = gather(stories.run(tmp_path), "a-run")

    def said(events: list[dict[str, Any]]) -> tuple[str, str]:
        shown = replace(story, events=events)
        return state(shown), tiles(shown)[-1][2]

    first = told(PREEMPTED)
    assert said(first) == ("preempted", "0 faults")
    assert said(first[:4]) == ("preempted", "0 faults")  # the driver was lost first
    again = told([{"event": "resumed", "images": 928}], attempt=2)
    assert said([*first, *again]) == ("underway or interrupted", "0 faults")
    regroup = [{"event": "left", "cause": "regroup"}, {"event": "failure", "cause": "regroup", "decision": "grow"}]
    assert said([*first, *told(regroup, 2)]) == ("underway or interrupted", "0 faults")
    wrong = [{"event": "stopped", "reason": "loss is not finite"}, {"event": "evidence"}]
    wrong.append({"event": "failure", "cause": "non-finite", "decision": "stop"})
    assert said([*first, *told(wrong, 2)]) == ("stopped", "1 fault")
    died = [{"event": "failure", "cause": "worker died", "decision": "restart"}]
    assert said([*first, *told(died, 2)]) == ("underway or interrupted", "1 fault")
    assert said([*first, *told([{"event": "trained"}], 2)]) == ("trained", "0 faults")
