"""Debian's Chromium without a window, where it and Playwright are installed."""

import contextlib
import shutil
from collections.abc import Iterator

import pytest

NAMES = "chromium", "chromium-browser", "google-chrome"
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync"
).split()


@contextlib.contextmanager
def opened() -> Iterator:
    """Yields a new page of Playwright's; its list `requests` has what is not inside the page.

    Skips the test where there is no browser. An error of the page's script fails the block.
    """
    playwright = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=FLAGS)
        page, errors = browser.new_page(viewport={"width": 1300, "height": 900}), []
        page.requests = []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: line.type == "error" and errors.append(line.text))
        yield page
        browser.close()
    assert errors == []
