"""The HTTP edge: POST /v1/events, the health endpoints, the API's description, CORS."""

import logging
import zlib
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future

import falcon
import orjson
from falcon.constants import COMBINED_METHODS

from productgraph.v1.event_ingestion_service_pb2 import IngestEventsResponse
from server.caller import Caller
from server.errors import IngestError, Internal, InvalidArgument
from server.events.json_codec import JsonCodec, encode_response
from server.events.json_parser import estimate_seconds
from server.ingest.limits import Allowance
from server.ingest.request_record import RequestRecord, RequestRecorder
from server.ingest.service import IngestService

MAX_BODY_BYTES = 10 * 1024 * 1024
_PREFLIGHT_SECONDS = 3600
_GZIP_WINDOW = 31  # zlib's number for "with a gzip header"

# Where the server puts what lets an answer wait without a thread, and why it could not be sent.
_HOLD, _FAILURE = "productgraph.hold", "productgraph.failure"
# Where it puts what lets the application know a request again, and learn that it is over.
_KEEP, _KEPT = "productgraph.keep", "productgraph.kept"
# And since when the whole request is there.
_RECEIVED = "productgraph.received"
# As proxies write it in their logs, for nobody is answered it: the client was gone.
_CLIENT_GONE = 499

_STATUS = {
    "INVALID_ARGUMENT": falcon.HTTP_400,
    "UNAUTHENTICATED": falcon.HTTP_401,
    "RESOURCE_EXHAUSTED": falcon.HTTP_429,
    "UNAVAILABLE": falcon.HTTP_503,
    "INTERNAL": falcon.HTTP_500,
}

_EXPOSED_HEADERS = "RateLimit, RateLimit-Policy, Retry-After, X-Request-ID"
# The names that the draft below has for what is counted; it has none for events.
_UNIT_NAMES = {"events": "events", "bytes": "content-bytes"}

_log = logging.getLogger("productgraph.http")

App = falcon.App[falcon.Request, falcon.Response]


def create_app(
    service: IngestService,
    codec: JsonCodec,
    is_ready: Callable[[], bool],
    *,
    description: bytes,
    allowed_origins: Collection[str],
    recorder: RequestRecorder | None = None,
) -> App:
    """The WSGI application.

    `description` is its OpenAPI document as JSON; `allowed_origins` may hold `*` for any;
    `recorder` is told of every POST of events. Behind a server that cannot hold answers back, a
    request waits for its commit.
    """
    app: App = falcon.App(middleware=[_CrossOrigin(allowed_origins), _UnknownMethods()])
    app.add_route("/v1/events", _Events(service, codec, recorder or RequestRecorder()))
    app.add_route("/health", _Health())
    app.add_route("/ready", _Ready(is_ready))
    app.add_route("/openapi.json", _Description(description))
    app.set_error_serializer(_serialize_http_error)
    app.add_error_handler(Exception, _answer_unexpected)
    app.add_error_handler(IngestError, _answer_error)
    return app


class _Exchange:
    """One request until it is over, however often it has to be taken up."""

    def __init__(self, record: RequestRecord) -> None:
        self.record = record
        self.stored: Future[None] | None = None
        self.refusal: int | None = None

    def close(self) -> None:
        """Tells the recorder how it ended."""
        self.record.finish(self.refusal or self._outcome())

    def _outcome(self) -> int:
        if self.stored is None:
            return _CLIENT_GONE
        # Where the client was gone when this failed, nobody asked for another answer.
        failure = self.stored.exception()
        return 202 if failure is None else _status_of(failure)


class _Events:
    def __init__(self, service: IngestService, codec: JsonCodec, recorder: RequestRecorder) -> None:
        self._service = service
        self._codec = codec
        self._recorder = recorder

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        exchange = req.env.get(_KEPT) or self._open_exchange(req)
        resp.set_header("X-Request-ID", exchange.record.request_id)
        try:
            self._ingest(req, resp, exchange)
        except Exception as error:
            exchange.refusal = _status_of(error)
            raise
        finally:
            if _KEEP not in req.env:
                exchange.close()

    def _open_exchange(self, req: falcon.Request) -> _Exchange:
        request_id, traceparent = map(req.env.get, ("HTTP_X_REQUEST_ID", "HTTP_TRACEPARENT"))
        exchange = _Exchange(self._recorder.begin("http", request_id, traceparent))
        if keep := req.env.get(_KEEP):
            keep(exchange)
        return exchange

    def _ingest(self, req: falcon.Request, resp: falcon.Response, exchange: _Exchange) -> None:
        if failure := req.env.get(_FAILURE):
            raise failure
        deadline = self._service.deadline_after(since=req.env.get(_RECEIVED))
        caller = self._authenticate(req, deadline)
        if caller is None:
            return
        exchange.record.authenticated(caller.project_id)
        try:
            response = self._take(req, exchange, caller, deadline)
        finally:
            if allowances := self._service.allowances_of(caller):
                _describe_allowances(resp, allowances)
        resp.status = falcon.HTTP_202
        resp.data = encode_response(response)

    def _take(
        self, req: falcon.Request, exchange: _Exchange, caller: Caller, deadline: float
    ) -> IngestEventsResponse:
        """What became of the events, once they are stored; or before, with the answer held back."""
        self._service.admit(caller, req.content_length or 0)
        _check_content_type(req)
        body = _read_body(req)
        left = self._service.seconds_left(deadline)
        self._service.check_in_time(deadline, estimate_seconds(body, left))
        exchange.record.size_bytes = len(body)
        events = self._codec.parse_batch(body)
        response, stored = self._service.ingest(caller, events, deadline)
        exchange.record.decoded(response)
        exchange.stored = stored
        if hold := req.env.get(_HOLD):
            hold(stored)
        else:
            self._service.wait(stored, deadline)
        return response

    def _authenticate(self, req: falcon.Request, deadline: float) -> Caller | None:
        """Whose the request's key is; None where the request will be repeated."""
        key = req.get_header("X-PG-API-Key") or ""
        caller = self._service.authenticate(key)
        if caller is not None:
            return caller
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


class _Description:
    def __init__(self, description: bytes) -> None:
        self._description = description

    def on_get(self, _req: falcon.Request, resp: falcon.Response) -> None:
        resp.data = self._description


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
            resp.set_header("Access-Control-Expose-Headers", _EXPOSED_HEADERS)


class _UnknownMethods:
    """Lets a method that Falcon does not know be answered as any that a route does not have."""

    def process_request(self, req: falcon.Request, _resp: falcon.Response) -> None:
        if req.method not in COMBINED_METHODS:
            req.method = "TRACE"


def _describe_allowances(resp: falcon.Response, allowances: Sequence[Allowance]) -> None:
    # https://datatracker.ietf.org/doc/html/draft-ietf-httpapi-ratelimit-headers-10
    policies = (f'"{q.unit}";q={q.rate};qu="{_UNIT_NAMES[q.unit]}";w=1' for q in allowances)
    limits = (f'"{q.unit}";r={q.remaining};t={q.seconds_to_full}' for q in allowances)
    resp.set_header("RateLimit-Policy", ", ".join(policies))
    resp.set_header("RateLimit", ", ".join(limits))


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


def _status_of(error: BaseException) -> int:
    """What `error` is answered with."""
    if isinstance(error, falcon.HTTPError):
        return error.status_code
    code = error.code if isinstance(error, IngestError) else Internal.code
    return int(falcon.http_status_to_code(_STATUS[code]))


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
    request_id = resp.get_header("X-Request-ID")
    _log.error("a request failed", exc_info=error, extra={"request_id": request_id})
    _answer_error(req, resp, Internal(), params)


def _serialize_http_error(
    _req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError
) -> None:
    resp.content_type = falcon.MEDIA_JSON
    resp.data = _encode_error((error.title or "").removeprefix(f"{error.status_code} "))


def _encode_error(text: str) -> bytes:
    return orjson.dumps({"error": text})
