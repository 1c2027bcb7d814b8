"""The metrics port: health probes, which tell of the workers or of a forwarder, and the pages."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from server.telemetry.metrics_page import PATH as METRICS_PATH

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment


class Pages:
    """A WSGI application that serves the metrics, and leaves all other paths to the console.

    Without a console, the metrics page answers on all paths.
    """

    def __init__(self, metrics: "WSGIApplication", console: "WSGIApplication | None") -> None:
        self._metrics = metrics
        self._console = console

    def __call__(
        self, environ: "WSGIEnvironment", start_response: "StartResponse"
    ) -> Iterable[bytes]:
        """Answer a request."""
        if self._console is None or environ["PATH_INFO"] == METRICS_PATH:
            return self._metrics(environ, start_response)
        return self._console(environ, start_response)


class Probes:
    """A WSGI application that answers `/health` and `/ready`, and hands the rest to a page.

    Healthy means what `watch` is given, ready that the database answers as well.
    """

    def __init__(self, page: "WSGIApplication", is_ready: Callable[[], bool]) -> None:
        self._page = page
        self._is_ready = is_ready
        self._is_healthy: Callable[[], bool] = lambda: False

    def watch(self, is_healthy: Callable[[], bool]) -> None:
        """Ask `is_healthy` from now on; until then nothing is healthy."""
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
