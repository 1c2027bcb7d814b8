"""Health probes on the metrics port, which tell of those who do the work."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment


class Probes:
    """A WSGI application that answers `/health` and `/ready`, and hands the rest to a page.

    Healthy means what `watch` is given, ready that the database answers as well.
    """

    def __init__(self, page: "WSGIApplication", is_ready: Callable[[], bool]) -> None:
        self._page = page
        self._is_ready = is_ready
        self._is_healthy: Callable[[], bool] = lambda: False

    def watch(self, is_healthy: Callable[[], bool]) -> None:
        """Ask this from now on whether those who do the work do it."""
        self._is_healthy = is_healthy

    def __call__(
        self, environ: "WSGIEnvironment", start_response: "StartResponse"
    ) -> Iterable[bytes]:
        """Answer a request."""
        path = environ["PATH_INFO"]
        if path not in ("/health", "/ready"):
            return self._page(environ, start_response)
        is_good = self._is_healthy() and (path == "/health" or self._is_ready())
        status = "200 OK" if is_good else "503 Service Unavailable"
        start_response(status, [("Content-Type", "application/json")])
        good = {"/health": b"ok", "/ready": b"ready"}[path]
        return [b'{"status":"%b"}' % (good if is_good else b"unavailable")]
