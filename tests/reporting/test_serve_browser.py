"""The live page in a real browser. Skipped where there is no Chromium."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.reporting.records import Record
from common.reporting.serve import Server
from tests.chromium import needed, opened, resize, until
from tests.reporting.test_report import PIXEL

pytestmark = needed

Make = Callable[..., Record]


@pytest.fixture
def runs(project: Path, make_record: Make, save: Callable[[Record], Path]) -> Path:
    """Three runs that train, with curves and pictures, one named as no page should read it, and one that measures."""
    for seed, rate in ((0, 0.1), (1, 0.2), (2, 0.3)):
        config = {"seed_everything": seed, "model": {"rate": rate}}
        folder = save(make_record("base", seed, 50.0 + seed, config=config, job="pretrain"))
        points = "".join(f"{step},train/loss,{(seed + 1) * 9 / (step + 1)}\n" for step in range(5 + seed))
        (folder / "metrics.csv").write_text(f"step,name,value\n{points}0,val/<b>,1\n1,val/<b>,2\n")
        (folder / "media").mkdir()
        (folder / "media" / "picture.png").write_bytes(PIXEL)
        (folder / "media" / "texts.csv").write_text("question,answer\nwhat,<img src=x>\n")
    save(make_record("esc@<img src=x onerror=document.title=1>", 0, 70.0))
    return project / "runs"


@pytest.fixture
def server(runs: Path) -> Iterator[Server]:
    found = Server(runs, 0, interval=0.1)
    threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture
def tab(server: Server, tmp_path: Path) -> Iterator[Any]:
    with opened(f"{server.address}#columns=run,state,test/top1", tmp_path / "profile") as driver:
        until(lambda: count(driver, "#table tbody tr") == 4, "the table has its rows")
        yield driver


def count(tab: Any, selector: str) -> int:
    found: int = tab.execute_script("return document.querySelectorAll(arguments[0]).length", selector)
    return found


def names(tab: Any) -> list[str]:
    found: list[str] = tab.execute_script(
        "return [...document.querySelectorAll('#table tbody tr')].map(row => row.cells[1].textContent)"
    )
    return found


def choose(tab: Any, name: str) -> None:
    tab.execute_script('document.querySelector(`#table [data-key="${arguments[0]}"]`).click()', name)


def test_runs_are_filtered_sorted_and_have_the_columns_chosen(tab: Any) -> None:
    words = tab.find_element("name", "words")
    words.send_keys("base test/top1>50")
    until(lambda: sorted(names(tab)) == ["mct/mini/seed1/base", "mct/mini/seed2/base"], "words and conditions")
    words.clear()
    words.send_keys("model.rate<=0.2")
    tab.execute_script("document.querySelector('[data-key=\"sort test/top1\"]').click()")
    until(lambda: names(tab)[0] == "mct/mini/seed0/base", "the smallest first")
    tab.execute_script("document.querySelector('[data-key=\"sort test/top1\"]').click()")
    until(lambda: tab.execute_script("return document.querySelector('th[aria-sort=descending]') !== null"), "turned")
    # Its focus stays with the button though the table was drawn anew.
    tab.execute_script("document.querySelector('[data-key=\"sort run\"]').focus()")
    tab.execute_script("document.activeElement.click()")
    assert tab.execute_script("return document.activeElement.dataset.key") == "sort run"
    tab.execute_script("document.querySelector('#columns [data-key=\"model.rate\"]').click()")
    heads = tab.execute_script("return [...document.querySelectorAll('#table thead th')].map(h => h.textContent)")
    assert heads == ["show", "run", "state", "test/top1", "model.rate"]
    assert "model.rate" in tab.current_url
    tab.refresh()  # what was chosen stands in the address
    until(lambda: "0.2" in tab.find_element("id", "table").text, "the column is there again")


def test_chosen_runs_show_curves_media_and_differences(tab: Any) -> None:
    choose(tab, "mct/mini/seed0/base")
    choose(tab, "mct/mini/seed2/base")
    until(lambda: count(tab, "#charts path") == 4, "two runs, two metrics")
    # One axis: both charts end at the last step of the longest run.
    ends = tab.execute_script(
        "return [...document.querySelectorAll('#charts svg')]"
        ".map(svg => [...svg.querySelectorAll('text')].at(-1).textContent)"
    )
    assert ends == ["6", "6"]
    label = tab.execute_script("return document.querySelector('#charts svg').getAttribute('aria-label')")
    assert label.startswith("train/loss by step; mct/mini/seed0/base ends at 1.8")
    tab.execute_script(
        "const svg = document.querySelector('#charts svg'); svg.focus();"
        "svg.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft'}))"
    )
    read = tab.execute_script("return document.querySelector('#charts figcaption').textContent")
    assert "seed2/base: 3.8571 at 6" in read
    until(lambda: count(tab, "#media img") == 2, "a picture of each run")
    until(lambda: "<img src=x>" in tab.find_element("id", "media").text, "the texts")
    assert "model.rate" in until(lambda: tab.find_element("id", "diff").text, "the difference")
    assert ["test/top1", "50", "52", "2"] in tab.execute_script(
        "return [...document.querySelectorAll('#diff tbody tr')].map(row => [...row.cells].map(c => c.textContent))"
    )


def test_it_follows_a_run_that_trains(tab: Any, runs: Path) -> None:
    choose(tab, "mct/mini/seed0/base")
    until(lambda: count(tab, "#charts path") == 2, "its curves")
    before = tab.execute_script("return document.querySelector('#charts path').getAttribute('d')")
    with (runs / "mct/mini/seed0/base/metrics.csv").open("a") as file:
        file.write("20,train/loss,0.1\n")
    until(
        lambda: tab.execute_script("return document.querySelector('#charts path').getAttribute('d')") != before,
        "it grows",
    )
    folder = runs / "mct/mini/seed9/base"
    folder.mkdir(parents=True)
    (folder / "identity.json").write_text("{}")
    (folder / "progress.json").write_text(json.dumps({"step": 3, "share": 0.5, "loss": 1.0, "left": 60.0}))
    until(lambda: "mct/mini/seed9/base" in names(tab), "a new run comes by itself")
    row = tab.execute_script("return [...document.querySelectorAll('#table tr')].map(row => row.textContent).join()")
    assert "seed9/baserunning" in row


def test_it_asks_nobody_else_and_runs_nothing_of_what_it_shows(tab: Any, server: Server) -> None:
    choose(tab, "mct/mini/seed1/base")
    until(lambda: count(tab, "#media img") == 1, "the picture")
    until(lambda: tab.execute_script("return document.querySelector('#media img').complete"), "is loaded")
    assert tab.title == "Runs"
    urls = []
    for entry in tab.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            urls.append(message["params"]["request"]["url"])
    assert [url for url in urls if not url.startswith((server.address, "data:", "about:", "chrome:"))] == []
    assert tab.get_log("browser") == []
    tab.get(f"{server.address}report")
    assert "Transfer" in tab.find_element("tag name", "main").text


@pytest.mark.parametrize("width", [390, 1400])
def test_it_never_scrolls_sideways_and_every_control_has_a_name(tab: Any, width: int) -> None:
    choose(tab, "mct/mini/seed0/base")
    choose(tab, "mct/mini/seed1/base")
    until(lambda: count(tab, "#charts path") == 4, "curves")
    resize(tab, width)
    until(lambda: tab.execute_script("return innerWidth") == width, "the window has its size")
    assert tab.execute_script("return document.documentElement.scrollWidth") <= width
    unnamed = tab.execute_script(
        "return [...document.querySelectorAll('input, select, button, img, svg[role]')].filter(e => !("
        "e.labels?.length || e.textContent.trim() || e.getAttribute('aria-label') || e.alt)).map(e => e.outerHTML)"
    )
    assert unnamed == []
