"""Run Debian's Chromium in tests of web pages. Skip these tests if Chromium or its driver is missing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.machine import LONG, promised

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

needed = pytest.mark.skipif(
    not ((CHROMIUM and DRIVER) or promised("browser")),
    reason="needs chromium and chromedriver on the path (Debian: apt-get install chromium chromium-driver)",
)


@contextmanager
def opened(address: str, profile: Path) -> Iterator[Any]:
    """Open a page in a browser that logs its network requests."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    assert CHROMIUM
    assert DRIVER
    options = Options()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                     f"--user-data-dir={profile}", "--window-size=1400,900"):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_page_load_timeout(LONG)
    driver.set_script_timeout(LONG)
    try:
        driver.get(address)
        yield driver
    finally:
        driver.quit()


def resize(browser: Any, width: int) -> None:
    """Set the width of the window; below 600 pixels, pages use the layout for phones."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
