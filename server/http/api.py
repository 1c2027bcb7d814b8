"""The HTTP edge: POST /v1/events, the health endpoints, the API's description."""

import logging
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future

import falcon
import orjson
from falcon.constants import COMBINED_METHODS

from server.caller import Caller
from server.deferral import ENVIRON_KEY, Deferral
from server.errors import IngestError, Internal, InvalidEvents
from server.events.json_codec import encode_invalid_events, encode_response
from server.events.schema import MAX_REQUEST_BYTES
from server.http.body import read_json
from server.http.cors import CrossOrigin
from server.http.server import SMALL_BODY_BYTES
from server.ingest.limits import Allowance
from server.ingest.preferences import STRICT_APPLIED, is_strict
from server.ingest.request_record import RequestRecord, RequestRecorder
from server.ingest.service import IngestService
from server.protocols import HTTP

EVENTS_PATH = "/v1/events"
# As proxies write it in their logs, for nobody is answered it: the client was gone.
_CLIENT_GONE = 499
_INVALID_EVENTS = 422
_APPLIED = "Preference-Applied"

_STATUS = {
    "INVALID_ARGUMENT": falcon.HTTP_400,
    "UNAUTHENTICATED": falcon.HTTP_401,
    "PERMISSION_DENIED": falcon.HTTP_403,
    "RESOURCE_EXHAUSTED": falcon.HTTP_429,
    "UNAVAILABLE": falcon.HTTP_503,
    "INTERNAL": falcon.HTTP_500,
}

# The names that the draft below has for what is counted; it has none for events.
_UNIT_NAMES = {"events": "events", "bytes": "content-bytes"}

_log = logging.getLogger("productgraph.http")

App = falcon.App[falcon.Request, falcon.Response]


def create_app(
    service: IngestService,
    recorder: RequestRecorder,
    is_ready: Callable[[], bool],
    *,
    description: bytes,
    allowed_origins: Collection[str],
) -> App:
    """Return the WSGI application; it needs a server that can hold answers, as HTTPServer does.

    `recorder` records every POST of events; `description` is the OpenAPI document as JSON;
    `allowed_origins` may hold `*` for any.
    """
    app: App = falcon.App(middleware=[CrossOrigin(allowed_origins), _UnknownMethods()])
    app.add_route(EVENTS_PATH, _Events(service, recorder))
    app.add_route("/health", _Health())
    app.add_route("/ready", _Ready(is_ready))
    app.add_route("/openapi.json", _Description(description))
    app.set_error_serializer(_serialize_http_error)
    app.add_error_handler(Exception, _answer_unexpected)
    app.add_error_handler(IngestError, _answer_error)
    app.add_error_handler(InvalidEvents, _answer_invalid_events)
    return app


class PendingRequest:
    """One request until it is over, however often it has to be taken up."""

    def __init__(self, record: RequestRecord) -> None:
        self.record = record
        self.caller: Caller | None = None
        self.stored: Future[None] | None = None
        self.refusal: int | None = None

    def close(self) -> None:
        """Finish the record with the status that was answered."""
        self.record.finish(self.refusal or self._outcome())

    def _outcome(self) -> int:
        if self.stored is None:
            return _CLIENT_GONE
        # If the client was gone when this failed, nobody asked for another answer.
        failure = self.stored.exception()
        if failure is not None:
            self.record.refused(failure)
        return 202 if failure is None else _status_of(failure)


class _Events:
    def __init__(self, service: IngestService, recorder: RequestRecorder) -> None:
        self._service = service
        self._recorder = recorder

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        deferral: Deferral = req.env[ENVIRON_KEY]
        request = deferral.pending
        if not isinstance(request, PendingRequest):
            request = deferral.pending = self._open(req)
        resp.set_header("X-Request-ID", request.record.request_id)
        try:
            self._answer(req, resp, deferral, request)
        except Exception as error:
            request.refusal = _status_of(error)
            request.record.refused(error)
            raise
        finally:
            if request.caller is not None:
                _describe_allowances(resp, self._service.admission.allowances_of(request.caller))

    def _open(self, req: falcon.Request) -> PendingRequest:
        request_id, traceparent = map(req.env.get, ("HTTP_X_REQUEST_ID", "HTTP_TRACEPARENT"))
        return PendingRequest(self._recorder.begin(HTTP, EVENTS_PATH, request_id, traceparent))

    def _answer(
        self,
        req: falcon.Request,
        resp: falcon.Response,
        deferral: Deferral,
        request: PendingRequest,
    ) -> None:
        admission, key = self._service.admission, req.get_header("X-PG-API-Key") or ""
        caller = request.caller = request.caller or admission.identify(key)
        if caller is not None:
            request.record.identified(caller)
        if deferral.failure is not None:
            raise deferral.failure
        if caller is None:
            deferral.hold(admission.look_up(key), repeat=True)
            return
        admission.check_origin(caller, req.env.get("HTTP_ORIGIN"))
        request.record.authenticated(caller)
        max_bytes = SMALL_BODY_BYTES if deferral.in_loop else MAX_REQUEST_BYTES
        room = admission.find_room(caller)
        body = read_json(req, max_bytes if room is None else min(max_bytes, room))
        if body is None:
            if room is not None and room < max_bytes:
                raise admission.refuse_bytes(caller)
            deferral.hand_over()
            return
        deadline = self._service.find_deadline(arrived_at=deferral.received_at)
        strict = is_strict(req.env.get("HTTP_PREFER"))
        answer = self._service.ingest(caller, body, request.record, deadline, strict=strict)
        request.stored = answer.stored
        deferral.hold(answer.stored)
        resp.status = falcon.HTTP_202
        resp.data = encode_response(answer.response)
        if strict:
            resp.set_header(_APPLIED, STRICT_APPLIED)


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


class _UnknownMethods:
    """Lets a method that Falcon does not know be answered as any that a route does not have."""

    def process_request(self, req: falcon.Request, _resp: falcon.Response) -> None:
        if req.method not in COMBINED_METHODS:
            req.method = "TRACE"


def _describe_allowances(resp: falcon.Response, allowances: Sequence[Allowance]) -> None:
    if not allowances:
        return
    # https://datatracker.ietf.org/doc/html/draft-ietf-httpapi-ratelimit-headers-10
    policies = (
        f'"{each.name}";q={each.limit};qu="{_UNIT_NAMES[each.unit]}";w={each.seconds}'
        for each in allowances
    )
    limits = (f'"{each.name}";r={each.remaining};t={each.seconds_to_full}' for each in allowances)
    resp.set_header("RateLimit-Policy", ", ".join(policies))
    resp.set_header("RateLimit", ", ".join(limits))


def _status_of(error: BaseException) -> int:
    """Return the status that answers an error."""
    if isinstance(error, falcon.HTTPError):
        return error.status_code
    if isinstance(error, InvalidEvents):
        return _INVALID_EVENTS
    code = error.code if isinstance(error, IngestError) else Internal.code
    return int(falcon.http_status_to_code(_STATUS[code]))


def _answer_error(
    _req: falcon.Request, resp: falcon.Response, error: IngestError, _params: object
) -> None:
    resp.status = _STATUS[error.code]
    resp.data = _encode_error(str(error))
    if error.retry_after_seconds is not None:
        resp.set_header("Retry-After", str(error.retry_after_seconds))


def _answer_invalid_events(
    _req: falcon.Request, resp: falcon.Response, error: InvalidEvents, _params: object
) -> None:
    resp.status = _INVALID_EVENTS
    resp.data = encode_invalid_events(error)
    resp.set_header(_APPLIED, STRICT_APPLIED)


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
