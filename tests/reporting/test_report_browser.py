"""Test the report page in a real browser, opened from its file without a network. Skip if Chromium is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from assemble.commands.main import main
from assemble.reporting import records
from assemble.reporting.results import find_promoted
from tests.chromium import needed, opened, resize
from tests.machine import until
from tests.reporting.test_report import PIXEL

pytestmark = needed


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the page of the shipped records, with one run that has a curve, a picture and a film."""
    import av
    import numpy as np

    root = tmp_path_factory.mktemp("page")
    promoted = find_promoted("mct", "mini")[0]
    run = records.run_folder(root / "runs", promoted.paper, promoted.scale, promoted.draw, promoted.stage)
    media = run / "media"
    media.mkdir(parents=True)
    (media / "picture.png").write_bytes(PIXEL)
    with av.open(str(media / "clip.mp4"), "w") as film:
        stream = film.add_stream("libx264", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for brightness in range(0, 200, 20):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), brightness, np.uint8), "rgb24")
            film.mux(stream.encode(frame))
        film.mux(stream.encode())
    (run / "metrics.csv").write_text("step,name,value\n" + "".join(f"{i},train/loss,{9 - i}\n" for i in range(5)))
    values = json.loads(promoted.to_json()) | {"media": ["media/clip.mp4", "media/picture.png"]}
    records.write(run / records.RECORD_FILE, records.Record(**values))
    assert main(["report", f"--runs={root / 'runs'}", f"--output={root / 'report.html'}"]) == 0
    return root / "report.html"


@pytest.fixture(scope="module")
def browser(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Open the page in Chromium, which logs the page's network requests."""
    with opened(page.as_uri(), tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def tab(browser: Any, page: Path) -> Any:
    """Return the browser at the top of the page, 1400 pixels wide, in light colors, with all sections folded."""
    resize(browser, 1400)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.execute_script(
        "document.documentElement.style.scrollBehavior = 'auto'; document.activeElement.blur();"
        "document.body.click(); scrollTo(0, 0);"
    )
    return browser


def shown(tab: Any) -> str:
    text: str = tab.execute_script(
        "return [...document.querySelectorAll('.origin:popover-open')].map(box => box.innerText).join('|')"
    )
    return text


def test_it_asks_for_nothing_and_complains_about_nothing(browser: Any, page: Path) -> None:
    requests = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            requests.append(message["params"]["request"]["url"])
    assert page.as_uri() in requests
    assert [url for url in requests if not url.startswith(("data:", "file:", "about:", "chrome"))] == []
    assert [url for url in requests if url.startswith("file:") and url != page.as_uri()] == []
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_itself_never_scrolls_sideways(tab: Any, width: int) -> None:
    resize(tab, width)
    until(lambda: tab.execute_script("return innerWidth") == width, "the window has its size")
    assert tab.execute_script("return document.documentElement.scrollWidth") <= width
    # Unfolding every section must not cause a request either.
    tab.execute_script("window.folded = [...document.querySelectorAll('details:not([open])')];"
                       "folded.forEach(d => { d.open = true })")  # fmt: skip
    assert tab.execute_script("return document.documentElement.scrollWidth") <= width
    tab.execute_script("folded.forEach(d => { d.open = false })")


@pytest.mark.parametrize("width", [390, 1400])
def test_a_click_on_a_value_shows_where_it_comes_from(tab: Any, width: int) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    resize(tab, width)
    first, second = tab.find_elements("css selector", ".value")[:2]
    texts = []
    for value in (first, second):
        tab.execute_script("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", value)
        value.click()
        texts.append(until(lambda: shown(tab), "shown on a click"))
        box = tab.execute_script("return document.querySelector('.origin:popover-open').getBoundingClientRect()")
        assert 0 <= box["left"] < box["right"] <= width
        ActionChains(tab).send_keys(Keys.ESCAPE).perform()
        until(lambda: shown(tab) == "", "hidden by the escape key")
    assert texts[0] != texts[1]
    for part in ("seed 0", "revision", "configuration", "hardware", "papers/avid_cma/results/mini/seed"):
        assert part in texts[0]
    assert "seed 0: " in first.get_attribute("title")


def test_it_starts_with_the_verdicts_and_is_short_until_something_is_opened(tab: Any) -> None:
    assert tab.execute_script("return document.documentElement.scrollHeight") < 15_000
    link = tab.find_elements("css selector", ".card .claims a")[-1]
    table = tab.find_element("id", link.get_attribute("href").partition("#")[2])
    first = tab.find_element("css selector", ".card .strip.holds")
    assert first.size["width"] > 190
    tab.execute_script("arguments[0].open = false; arguments[1].click()", table, link)
    until(lambda: table.get_attribute("open") is not None, "a link to a table opens it")


def test_a_clip_plays_and_a_picture_is_enlarged(tab: Any) -> None:
    video = tab.find_element("tag name", "video")
    until(lambda: tab.execute_script("return arguments[0].readyState", video) >= 1, "the film's data are known")
    assert tab.execute_script("return arguments[0].videoWidth", video) == 32
    assert tab.execute_script("return arguments[0].duration", video) == pytest.approx(1.0, abs=0.2)
    tab.execute_script("arguments[0].play()", video)
    until(lambda: tab.execute_script("return arguments[0].currentTime", video) > 0, "the film plays")
    tab.execute_script("arguments[0].pause()", video)
    picture = tab.find_element("css selector", ".media img")
    tab.execute_script("arguments[0].scrollIntoView({block: 'center'})", picture)
    until(lambda: tab.execute_script("return arguments[0].complete", picture), "the picture is loaded")
    tab.execute_script("arguments[0].click()", picture)
    dialog = tab.find_element("css selector", "dialog.large")
    assert dialog.get_attribute("open") is not None
    tab.execute_script("arguments[0].click()", dialog)
    assert dialog.get_attribute("open") is None


def test_it_prints_with_everything_unfolded(tab: Any) -> None:
    folded = "return document.querySelectorAll('details:not([open])').length"
    before = tab.execute_script(folded)
    tab.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    tab.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert tab.execute_script(folded) == 0
    assert not tab.find_element("tag name", "nav").is_displayed()
    tab.execute_script("dispatchEvent(new Event('afterprint'))")
    tab.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert tab.execute_script(folded) == before > 0
