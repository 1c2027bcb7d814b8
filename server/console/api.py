"""The console's HTTP: the page for browsers, and on the same paths its data as JSON."""

import logging
from collections.abc import Mapping
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from typing import Any, NamedTuple

import falcon
import orjson

from server.console.access import Access
from server.console.overview import Overview
from server.console.questions import (
    Keys,
    NewestEvents,
    NotFound,
    OneEvent,
    Question,
    RejectedEvent,
    RejectedEvents,
    Usage,
)
from server.console.reader import Reader
from server.deferral import ENVIRON_KEY, Deferral
from server.errors import IngestError, Internal
from server.storage.event_queries import EventFilter

_STATIC = files("server.console") / "static"
_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_STATUS: Mapping[str, str] = {
    "UNAVAILABLE": falcon.HTTP_503,
    "INTERNAL": falcon.HTTP_500,
}
_MAX_EVENTS = 200
_DEFAULT_EVENTS = 100
_MAX_ID = 2**63 - 1
_MAX_TEXT = 255

_log = logging.getLogger("productgraph.console")

App = falcon.App[falcon.Request, falcon.Response]


class Sources(NamedTuple):
    """The sources of the console's data.

    `delay` is the longest time from an event's arrival until it is visible.
    """

    overview: Overview
    reader: Reader
    delay: timedelta


def create_app(sources: Sources, access: Access) -> App:
    """Return the WSGI application; it needs a server that can hold answers."""
    app: App = falcon.App(middleware=[access])
    page = _read_static()
    html = page["page.html"]
    app.add_route("/", _Overview(html, sources.overview))
    app.add_route("/events", _Events(html, sources.reader, sources.delay))
    app.add_route("/event", _Event(html, sources.reader))
    app.add_route("/rejected", _Asked(html, sources.reader, RejectedEvents()))
    app.add_route("/rejected/{number:int(min=1)}", _Rejected(html, sources.reader))
    app.add_route("/keys", _Asked(html, sources.reader, Keys()))
    app.add_route("/usage", _Asked(html, sources.reader, Usage()))
    app.add_route("/static/{name}", _Static(page))
    app.set_error_serializer(_serialize_http_error)
    app.add_error_handler(Exception, _answer_unexpected)
    app.add_error_handler(IngestError, _answer_error)
    app.add_error_handler(NotFound, _answer_absence)
    return app


class _File(NamedTuple):
    media_type: str
    content: bytes


def _read_static() -> dict[str, _File]:
    return {
        file.name: _File(_MEDIA_TYPES["." + file.name.rpartition(".")[2]], file.read_bytes())
        for file in _STATIC.iterdir()
    }


class _Static:
    def __init__(self, pages: Mapping[str, _File]) -> None:
        self._files = pages

    def on_get(self, _req: falcon.Request, resp: falcon.Response, name: str) -> None:
        if (file := self._files.get(name)) is None:
            raise falcon.HTTPNotFound
        resp.content_type, resp.data = file


class _Resource:
    """Something that has a page for browsers, and JSON for all others."""

    def __init__(self, page: _File) -> None:
        self._page = page

    def on_get(self, req: falcon.Request, resp: falcon.Response, **names: Any) -> None:
        if req.client_prefers([falcon.MEDIA_JSON, falcon.MEDIA_HTML]) == falcon.MEDIA_HTML:
            resp.content_type, resp.data = self._page
        else:
            self._answer(req, resp, **names)

    def _answer(self, req: falcon.Request, resp: falcon.Response, /, **names: Any) -> None:
        raise NotImplementedError


class _Overview(_Resource):
    def __init__(self, page: _File, overview: Overview) -> None:
        super().__init__(page)
        self._overview = overview

    def _answer(self, _req: falcon.Request, resp: falcon.Response, /, **_: Any) -> None:
        resp.data = self._overview.encode()


class _Waiting:
    """A request whose answer is not there yet."""

    def __init__(self, answer: "Future[bytes]") -> None:
        self.answer = answer

    def close(self) -> None:
        """Do nothing: others may wait for the same answer."""


class _Question(_Resource):
    """Asks the database, and holds the answer back until it is there."""

    def __init__(self, page: _File, reader: Reader) -> None:
        super().__init__(page)
        self._reader = reader

    def _answer(self, req: falcon.Request, resp: falcon.Response, /, **names: Any) -> None:
        deferral: Deferral = req.env[ENVIRON_KEY]
        if deferral.failure is not None:
            raise deferral.failure
        waiting = deferral.pending
        if not isinstance(waiting, _Waiting):
            waiting = deferral.pending = _Waiting(self._reader.ask(self._read(req, **names)))
        if waiting.answer.done():
            resp.data = waiting.answer.result()
        else:
            deferral.hold(waiting.answer, repeat=True)

    def _read(self, req: falcon.Request, /, **names: Any) -> Question:
        raise NotImplementedError


class _Asked(_Question):
    """One question, always the same."""

    def __init__(self, page: _File, reader: Reader, question: Question) -> None:
        super().__init__(page, reader)
        self._question = question

    def _read(self, _req: falcon.Request, /, **_: Any) -> Question:
        return self._question


class _Events(_Question):
    def __init__(self, page: _File, reader: Reader, delay: timedelta) -> None:
        super().__init__(page, reader)
        self._delay = delay

    def _read(self, req: falcon.Request, /, **_: Any) -> Question:
        names = ("project", "type", "session", "user")
        wanted = EventFilter(*(_read_text(req, name) for name in names))
        limit = req.get_param_as_int("limit", min_value=1, max_value=_MAX_EVENTS)
        since = _read_moment(req, "since")
        return NewestEvents(wanted, since, limit or _DEFAULT_EVENTS, self._delay)


class _Event(_Question):
    def _read(self, req: falcon.Request, /, **_: Any) -> Question:
        if (event_id := _read_text(req, "id")) is None:
            raise falcon.HTTPMissingParam("id")
        days = req.get_param_as_int("days", min_value=1, max_value=36_500) or 7
        # To the minute, so that the same question is asked once.
        since = (datetime.now(UTC) - timedelta(days=days)).replace(second=0, microsecond=0)
        return OneEvent(event_id, _read_text(req, "project"), _read_moment(req, "at"), since)


class _Rejected(_Question):
    def _read(self, _req: falcon.Request, /, **names: Any) -> Question:
        if names["number"] > _MAX_ID:
            raise falcon.HTTPNotFound
        return RejectedEvent(names["number"])


def _read_text(req: falcon.Request, name: str) -> str | None:
    """Return a parameter, None if it is empty; an event can hold no longer one, and no NUL."""
    text: str | None = req.get_param(name)
    if text and ("\0" in text or len(text) > _MAX_TEXT or _has_surrogates(text)):
        raise falcon.HTTPInvalidParam("no event can have it", name)
    return text or None


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _read_moment(req: falcon.Request, name: str) -> datetime | None:
    """Return a moment in the database's range, or None if there is none."""
    if not (text := req.get_param(name)):
        return None
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise falcon.HTTPInvalidParam("must be like 2026-01-15T10:30:00Z", name) from None


def _answer_error(
    _req: falcon.Request, resp: falcon.Response, error: IngestError, _params: object
) -> None:
    resp.status = _STATUS[error.code]
    resp.content_type = falcon.MEDIA_JSON
    resp.data = _encode_error(str(error))


def _answer_absence(
    _req: falcon.Request, resp: falcon.Response, error: NotFound, _params: object
) -> None:
    resp.status = falcon.HTTP_404
    resp.data = _encode_error(str(error))


def _answer_unexpected(
    req: falcon.Request, resp: falcon.Response, error: Exception, params: object
) -> None:
    _log.error("a request failed", exc_info=error)
    _answer_error(req, resp, Internal(), params)


def _serialize_http_error(
    _req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError
) -> None:
    resp.content_type = falcon.MEDIA_JSON
    title = (error.title or "").removeprefix(f"{error.status_code} ")
    resp.data = _encode_error(f"{title}: {error.description}" if error.description else title)


def _encode_error(text: str) -> bytes:
    return orjson.dumps({"error": text})
