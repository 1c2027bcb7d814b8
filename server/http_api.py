"""The HTTP edge: POST /v1/events, the health endpoints, CORS."""

import logging
import zlib
from collections.abc import Callable, Collection

import falcon
import orjson
from falcon.constants import COMBINED_METHODS

from server.errors import IngestError, Internal, InvalidArgument
from server.json_codec import JsonCodec, encode_response
from server.service import IngestService

MAX_BODY_BYTES = 10 * 1024 * 1024
_PREFLIGHT_SECONDS = 3600
_GZIP_WINDOW = 31  # zlib's number for "with a gzip header"

# Where the server puts what lets an answer wait without a thread, and why it could not be sent.
_HOLD, _FAILURE = "productgraph.hold", "productgraph.failure"

_STATUS = {
    "INVALID_ARGUMENT": falcon.HTTP_400,
    "UNAUTHENTICATED": falcon.HTTP_401,
    "UNAVAILABLE": falcon.HTTP_503,
    "INTERNAL": falcon.HTTP_500,
}

_log = logging.getLogger("productgraph.http")

App = falcon.App[falcon.Request, falcon.Response]


def create_app(
    service: IngestService,
    codec: JsonCodec,
    is_ready: Callable[[], bool],
    *,
    allowed_origins: Collection[str],
) -> App:
    """The WSGI application.

    `allowed_origins` may hold `*` for any. Behind a server that cannot hold answers back, a request
    waits for its commit.
    """
    app: App = falcon.App(middleware=[_CrossOrigin(allowed_origins), _UnknownMethods()])
    app.add_route("/v1/events", _Events(service, codec))
    app.add_route("/health", _Health())
    app.add_route("/ready", _Ready(is_ready))
    app.set_error_serializer(_serialize_http_error)
    app.add_error_handler(Exception, _answer_unexpected)
    app.add_error_handler(IngestError, _answer_error)
    return app


class _Events:
    def __init__(self, service: IngestService, codec: JsonCodec) -> None:
        self._service = service
        self._codec = codec

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        if failure := req.env.get(_FAILURE):
            raise failure
        deadline = self._service.deadline_after()
        project_id = self._authenticate(req, deadline)
        if project_id is None:
            return
        _check_content_type(req)
        events = self._codec.parse_batch(_read_body(req))
        response, stored = self._service.ingest(project_id, events, deadline)
        if hold := req.env.get(_HOLD):
            hold(stored)
        else:
            self._service.wait(stored, deadline)
        resp.status = falcon.HTTP_202
        resp.data = encode_response(response)

    def _authenticate(self, req: falcon.Request, deadline: float) -> str | None:
        """The project of the request's key; None where the request will be repeated."""
        key = req.get_header("X-PG-API-Key") or ""
        project_id = self._service.authenticate(key)
        if project_id is not None:
            return project_id
        found = self._service.look_up_key(key)
        if hold := req.env.get(_HOLD):
            hold(found, repeat=True)
            return None
        return self._service.wait(found, deadline)


class _Health:
    def on_get(self, _req: falcon.Request, resp: falcon.Response) -> None:
        resp.data = b'{"status":"ok"}'


class _Ready:
    def __init__(self, is_ready: Callable[[], bool]) -> None:
        self._is_ready = is_ready

    def on_get(self, _req: falcon.Request, resp: falcon.Response) -> None:
        if self._is_ready():
            resp.data = b'{"status":"ready"}'
        else:
            resp.status = falcon.HTTP_503
            resp.data = b'{"status":"unavailable"}'


class _CrossOrigin:
    """CORS for pages of any allowed origin.

    An origin is echoed together with Access-Control-Allow-Credentials because the browser SDK sends
    credentialed requests, which a browser refuses to pair with `*`. That is safe even for any
    origin: no cookie or other credential that a browser adds by itself is ever read here, only the
    API key that the page itself puts into a header.
    """

    def __init__(self, allowed_origins: Collection[str]) -> None:
        self._allowed = frozenset(allowed_origins)

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answers preflights, which carry no key."""
        if req.method == "OPTIONS" and req.get_header("Access-Control-Request-Method"):
            resp.complete = True
            resp.status = falcon.HTTP_204
            resp.set_header("Access-Control-Allow-Methods", "GET, POST")
            resp.set_header("Access-Control-Max-Age", str(_PREFLIGHT_SECONDS))
            if headers := req.get_header("Access-Control-Request-Headers"):
                resp.set_header("Access-Control-Allow-Headers", headers)

    def process_response(
        self,
        req: falcon.Request,
        resp: falcon.Response,
        _resource: object,
        _succeeded: bool,
    ) -> None:
        """Adds the headers to every answer, errors included."""
        resp.append_header("Vary", "Origin")
        origin = req.get_header("Origin")
        if origin and ("*" in self._allowed or origin in self._allowed):
            resp.set_header("Access-Control-Allow-Origin", origin)
            resp.set_header("Access-Control-Allow-Credentials", "true")
            resp.set_header("Access-Control-Expose-Headers", "Retry-After")


class _UnknownMethods:
    """Lets a method that Falcon does not know be answered as any that a route does not have."""

    def process_request(self, req: falcon.Request, _resp: falcon.Response) -> None:
        if req.method not in COMBINED_METHODS:
            req.method = "TRACE"


def _check_content_type(req: falcon.Request) -> None:
    media_type = (req.content_type or "").partition(";")[0].strip().lower()
    if media_type != falcon.MEDIA_JSON:
        raise falcon.HTTPUnsupportedMediaType(title="Content-Type must be application/json")


def _read_body(req: falcon.Request) -> bytes:
    coding = (req.get_header("Content-Encoding") or "identity").strip().lower()
    if coding not in ("identity", "gzip"):
        raise falcon.HTTPUnsupportedMediaType(title="Content-Encoding must be identity or gzip")
    body = b""
    if (req.content_length or 0) <= MAX_BODY_BYTES:
        body = req.bounded_stream.read()
        if coding == "gzip":
            body = _decompress(body)
        if len(body) <= MAX_BODY_BYTES:
            return body
    raise InvalidArgument(f"body: larger than {MAX_BODY_BYTES} bytes")


def _decompress(body: bytes) -> bytes:
    """The content of a gzip body, up to one byte over the limit."""
    member = zlib.decompressobj(_GZIP_WINDOW)
    try:
        content = member.decompress(body, MAX_BODY_BYTES + 1)
    except zlib.error:
        raise InvalidArgument("body: invalid gzip") from None
    # Further members are refused: a body of many tiny ones takes minutes to read.
    if len(content) <= MAX_BODY_BYTES and (not member.eof or member.unused_data):
        raise InvalidArgument("body: invalid gzip")
    return content


def _answer_error(
    _req: falcon.Request, resp: falcon.Response, error: IngestError, _params: object
) -> None:
    resp.status = _STATUS[error.code]
    resp.data = _encode_error(str(error))
    if error.retry_after_seconds is not None:
        resp.set_header("Retry-After", str(error.retry_after_seconds))


def _answer_unexpected(
    req: falcon.Request, resp: falcon.Response, error: Exception, params: object
) -> None:
    _log.error("a request failed", exc_info=error)
    _answer_error(req, resp, Internal(), params)


def _serialize_http_error(
    _req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError
) -> None:
    resp.content_type = falcon.MEDIA_JSON
    resp.data = _encode_error((error.title or "").removeprefix(f"{error.status_code} "))


def _encode_error(text: str) -> bytes:
    return orjson.dumps({"error": text})
