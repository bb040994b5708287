"""A real browser without a network, for tests of pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest


def open_browser() -> Iterator[Any]:
    """Chromium, closed afterward; skip if it is not installed."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None or find_spec("selenium") is None:
        if os.environ.get("TV_LENS_NEED_BROWSER"):
            raise RuntimeError("chromium, chromedriver and selenium are to be here")
        pytest.skip(
            "needs the extra test-browser, chromium and chromedriver (Debian: apt-get install chromium chromium-driver)"
        )
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    # Offline: the page must not need the network.
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "window-size=1200,1000", "proxy-server=127.0.0.1:9"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    actual = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    actual.implicitly_wait(20)  # a page unpacks its figures before it draws them
    yield actual
    actual.quit()


def texts(browser: Any, selector: str) -> list[str]:
    """What is shown of each element, without those that are hidden."""
    return [each.text for each in browser.find_elements("css selector", selector)]


def fetched(browser: Any) -> list[str]:
    """What the page has read from elsewhere."""
    names = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    return [name for name in names if not name.startswith("data:")]
