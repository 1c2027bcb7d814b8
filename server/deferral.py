"""How an application behind our HTTP server puts an answer off, without a thread that waits.

The server puts a `Deferral` into each request's WSGI environment. An application that calls `hold`
returns its answer as usual; the server keeps it, and sends it once the future is done. If the
future fails, the server drops the answer and calls the application again, with `failure` set, for
another one. With `repeat=True` it drops the answer in either case, and calls the application again
as if for the first time, with `failure` set if the future failed.
"""

from concurrent.futures import Future
from typing import Any, Protocol

ENVIRON_KEY = "productgraph.deferral"


class Pending(Protocol):
    """A request that an application has taken up."""

    def close(self) -> None:
        """Take note that the request is over."""


class Deferral:
    """What the server and the application tell each other about one request.

    `received_at` is when the whole request had arrived, on the clock of time.monotonic: a large
    one may have waited for its turn. `failure` is what the application must answer with, if the
    server knows it already. `pending` is the application's own: whatever it puts there, it finds
    when it is called again for this request. The server calls its method `close` once, when the
    answer has been handed to the connection or the client is gone.

    `in_loop` says that others wait while the application runs: work that takes long must be put
    off by `hand_over`.
    """

    __slots__ = (
        "awaited",
        "failure",
        "handed_over",
        "in_loop",
        "pending",
        "received_at",
        "repeat",
    )

    def __init__(self) -> None:
        self.received_at = 0.0
        self.failure: BaseException | None = None
        self.pending: Pending | None = None
        self.in_loop = False
        self.awaited: Future[Any] | None = None
        self.repeat = False
        self.handed_over = False

    def hold(self, awaited: "Future[Any]", *, repeat: bool = False) -> None:
        """Keep the answer until the future `awaited` is done; with `repeat`, call again then."""
        self.awaited = awaited
        self.repeat = repeat

    def hand_over(self) -> None:
        """Drop the answer and call the application again in a thread."""
        self.handed_over = True
