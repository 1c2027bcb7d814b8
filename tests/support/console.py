"""The console of a running service, asked over HTTP."""

import base64
import threading
from collections import Counter
from http.client import HTTPConnection
from typing import Self
from urllib.parse import urlencode, urlsplit

from tests.support.clients import Answer
from tests.support.services import Service

PASSWORD = "a password of the tests"
SETTINGS = {"CONSOLE": "on", "CONSOLE_PASSWORD": PASSWORD}
# What a browser sends to load a page.
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
_ANSWER_SECONDS = 30.0


def make_credentials(password: str, name: str = "anybody") -> str:
    """Return the header of basic authentication."""
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


def ask_console(
    service: Service, path: str, method: str = "GET", headers: dict[str, str | None] | None = None
) -> Answer:
    """Send a request with the password, unless the headers say otherwise; None leaves one out."""
    usual = {"Authorization": make_credentials(PASSWORD)}
    sent = {name: text for name, text in {**usual, **(headers or {})}.items() if text is not None}
    place = urlsplit(service.metrics_url)
    connection = HTTPConnection("127.0.0.1", place.port or 0, timeout=_ANSWER_SECONDS)
    try:
        connection.request(method, path, headers=sent)
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())
    finally:
        connection.close()


def spell(path: str, **parameters: object) -> str:
    """Return a path with a query."""
    return f"{path}?{urlencode(parameters)}"


class Pages:
    """Asks what open pages ask, each of them once a second."""

    def __init__(self, service: Service, count: int) -> None:
        self._service = service
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._waiting = 0
        self.statuses: Counter[int] = Counter()
        paths = ("/", "/events", "/rejected", "/keys")
        self._threads = [
            threading.Thread(target=self._run, args=(spell(path, page=number),), daemon=True)
            for number in range(count)
            for path in paths
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def waiting(self) -> int:
        """How many requests have no answer yet."""
        return self._waiting

    def _run(self, path: str) -> None:
        while not self._stop.wait(1.0):
            with self._lock:
                self._waiting += 1
            answer = ask_console(self._service, path)
            with self._lock:
                self._waiting -= 1
                self.statuses[answer.status] += 1
