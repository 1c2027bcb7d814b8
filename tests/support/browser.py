"""A real browser without a window, for tests of pages. Debian: chromium and chromium-driver."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service as Driver
from selenium.webdriver.common.by import By

from tests.support.services import wait_until

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_ANSWER_SECONDS = 60


@contextmanager
def running_browser() -> Iterator[Chrome]:
    """Provide a browser with a profile of its own; skip the test if there is none to be run."""
    program = next(filter(None, map(shutil.which, _BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no browser is installed (Debian: chromium and chromium-driver)")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ChromeOptions()
        options.binary_location = program
        for argument in _list_arguments(profile):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        browser = Chrome(options, Driver(driver))
        browser.set_page_load_timeout(_ANSWER_SECONDS)
        browser.set_script_timeout(_ANSWER_SECONDS)
        try:
            yield browser
        finally:
            browser.quit()


def _list_arguments(profile: str) -> list[str]:
    return [
        "--headless=new",
        f"--user-data-dir={profile}",
        "--no-first-run",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--force-device-scale-factor=1",
        "--lang=en-GB",
        # Root has no sandbox, as in a container; the pages are ours.
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
    ]


def resize(browser: Chrome, width: int, height: int) -> None:
    """Give the page this size, also one that is narrower than a window can be."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def prefer_scheme(browser: Chrome, scheme: str) -> None:
    """Ask pages for light or dark colours."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def read_texts(browser: Chrome, selector: str) -> list[str]:
    """Return the texts that are seen in the elements of this selector, all at one moment."""
    texts: list[str] = browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])]"
        ".map((e) => e.checkVisibility() ? e.innerText : '')",
        selector,
    )
    return texts


def read_text(browser: Chrome, selector: str) -> str:
    """Return the text that is seen in the first element of this selector; '' if there is none."""
    return next(iter(read_texts(browser, selector)), "")


def click(browser: Chrome, selector: str) -> None:
    """Click on the first element of this selector, even if the page is just replacing it."""

    def is_clicked() -> bool:
        try:
            browser.find_element(By.CSS_SELECTOR, selector).click()
        except StaleElementReferenceException:
            return False
        return True

    wait_until(is_clicked)


def wait_for_text(browser: Chrome, selector: str, wanted: str | Callable[[str], object]) -> None:
    """Wait until an element has a text."""
    has = wanted if callable(wanted) else (lambda text: wanted in text)
    wait_until(lambda: has(read_text(browser, selector)))


def read_complaints(browser: Chrome) -> list[str]:
    """Return what the browser has complained of since the last call."""
    found = browser.get_log("browser")  # type: ignore[no-untyped-call]
    return [entry["message"] for entry in found]
