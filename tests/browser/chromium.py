"""Chromium, driven through chromedriver by the W3C's WebDriver protocol."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.support.services import wait_until

_SECONDS = 60.0
_ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


class Browser:
    """A browser with a profile of its own, until it is closed."""

    def __init__(self, client: httpx.Client, session: str) -> None:
        self._client = client
        self._session = session

    def open(self, url: str) -> None:
        """Load a page."""
        self._post("url", {"url": url})

    def run(self, script: str, *arguments: object) -> Any:
        """Return what a script in the page returns."""
        return self._post("execute/sync", {"script": script, "args": list(arguments)})

    def open_tab(self) -> str:
        """Open another tab and go there; return its name."""
        tab = str(self._post("window/new", {"type": "tab"})["handle"])
        self.go_to(tab)
        return tab

    def find_tab(self) -> str:
        """Return the name of the tab that this browser shows."""
        return str(_read(self._client.get(f"/session/{self._session}/window")))

    def go_to(self, tab: str) -> None:
        """Show a tab."""
        self._post("window", {"handle": tab})

    def close_tab(self) -> None:
        """Close the tab that is shown, as a user would."""
        _read(self._client.delete(f"/session/{self._session}/window"))

    def set_offline(self, is_offline: bool) -> None:
        """Cut the tab off from the network, or connect it again."""
        conditions = {"latency": 0, "download_throughput": -1, "upload_throughput": -1}
        wanted = conditions | {"offline": is_offline}
        self._post("chromium/network_conditions", {"network_conditions": wanted})

    def quit(self) -> None:
        """Close everything."""
        _read(self._client.delete(f"/session/{self._session}"))

    def _post(self, command: str, body: object) -> Any:
        return _read(self._client.post(f"/session/{self._session}/{command}", json=body))


def _read(answer: httpx.Response) -> Any:
    value = answer.json()["value"]
    assert answer.status_code == 200, value
    return value


@contextmanager
def running_driver() -> Iterator[httpx.Client]:
    """Run chromedriver; skip the test if it or Chromium is not installed."""
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if not (driver and chromium):
        pytest.skip("Chromium is not installed (Debian: apt install chromium chromium-driver)")
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([driver, "--port=0"], stdout=output, stderr=output)
        try:
            with httpx.Client(timeout=_SECONDS) as client:
                client.base_url = httpx.URL(f"http://127.0.0.1:{_wait_for_port(output)}")
                yield client
        finally:
            process.terminate()
            process.wait(_SECONDS)


def _wait_for_port(output: Any) -> int:
    mark = "started successfully on port "

    def read() -> str:
        output.seek(0)
        return str(output.read())

    wait_until(lambda: mark in read())
    return int(read().partition(mark)[2].split(".")[0])


@contextmanager
def running_browser(driver: httpx.Client) -> Iterator[Browser]:
    """Run a browser that has never been anywhere."""
    options = {"binary": shutil.which("chromium"), "args": _ARGUMENTS}
    capabilities = {"alwaysMatch": {"goog:chromeOptions": options}}
    session = _read(driver.post("/session", json={"capabilities": capabilities}))["sessionId"]
    browser = Browser(driver, session)
    try:
        yield browser
    finally:
        browser.quit()
