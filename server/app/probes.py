"""Health probes on the metrics port, which tell of the workers."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment


class Probes:
    """A WSGI application that answers `/health` and `/ready`, and hands the rest to a page.

    Healthy means that a worker serves, ready that the database answers as well.
    """

    def __init__(self, page: "WSGIApplication", is_ready: Callable[[], bool]) -> None:
        self._page = page
        self._is_ready = is_ready
        self._count_serving: Callable[[], int] = lambda: 0

    def watch(self, count_serving: Callable[[], int]) -> None:
        """Ask this from now on how many workers serve."""
        self._count_serving = count_serving

    def __call__(
        self, environ: "WSGIEnvironment", start_response: "StartResponse"
    ) -> Iterable[bytes]:
        """Answer a request."""
        path = environ["PATH_INFO"]
        if path not in ("/health", "/ready"):
            return self._page(environ, start_response)
        is_good = self._count_serving() > 0 and (path == "/health" or self._is_ready())
        status = "200 OK" if is_good else "503 Service Unavailable"
        start_response(status, [("Content-Type", "application/json")])
        good = {"/health": b"ok", "/ready": b"ready"}[path]
        return [b'{"status":"%b"}' % (good if is_good else b"unavailable")]
