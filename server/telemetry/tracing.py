"""Traces by OpenTelemetry, which its own environment variables set up: the extra `otel`.

Imported only if traces are on. A request's spans are made once it is over, from what was
observed, so that its own path is the same with them and without.
"""

import os
import threading
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from server.forwarding.http_client import Transport
from server.forwarding.providers.provider import Answer, NoAnswer, Request
from server.ingest.request_record import RequestRecord
from server.protocols import HTTP

_SERVICE = "productgraph-ingestion"
_STOP_SECONDS = 5.0

_PROPAGATOR = TraceContextTextMapPropagator()


class Tracing:
    """The spans of one process, on their way to a collector."""

    def __init__(self) -> None:
        own = Resource.create({"service.name": _SERVICE, "process.pid": os.getpid()})
        resource = own.merge(OTELResourceDetector().detect())
        # `stop` ends it in time; at the interpreter's exit it might wait half a minute.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("productgraph")
        self.requests = RequestTraces(self._tracer)

    def open_transport(self, provider: str, connections: int) -> Transport:
        """Return a transport to a provider, each of whose requests is a span."""
        return _TracedTransport(self._tracer, provider, connections)

    def stop(self) -> None:
        """Send the spans that are left, for five seconds at the most."""
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        thread.join(_STOP_SECONDS)


class RequestTraces:
    """Makes the spans of a request: itself and, as far as it came, `decode` and `store`."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def record(self, request: RequestRecord) -> None:
        """Make the spans of a finished request, beneath the one that its client named."""
        name, attributes = _name_span(request)
        start = request.started_at
        span = self._tracer.start_span(
            name, _find_parent(request.traceparent), SpanKind.SERVER, attributes, None, start
        )
        if not span.is_recording():
            return
        span.set_attributes(_describe(request))
        if request.is_fault:
            span.set_status(StatusCode.ERROR)
        self._add_steps(request, set_span_in_context(span, Context()))
        span.end(start + _nanoseconds(request.seconds))

    def _add_steps(self, request: RequestRecord, context: Context) -> None:
        authenticating, decoding = request.seconds_authenticating, request.seconds_decoding
        if authenticating is None or decoding is None:
            return
        start = request.started_at
        marks = (authenticating, authenticating + decoding, request.seconds)
        began, handed_over, ended = (start + _nanoseconds(mark) for mark in marks)
        self._tracer.start_span("decode", context, start_time=began).end(handed_over)
        self._tracer.start_span("store", context, start_time=handed_over).end(ended)


def _name_span(request: RequestRecord) -> tuple[str, dict[str, AttributeValue]]:
    """Return a span's name and attributes.

    https://opentelemetry.io/docs/specs/semconv/http/http-spans/ and …/rpc/rpc-spans/
    """
    route = request.route
    if request.protocol != HTTP:
        return route, {"rpc.system.name": request.protocol, "rpc.method": route}
    return f"POST {route}", {
        "http.request.method": "POST",
        "http.route": route,
        "url.path": route,
        "url.scheme": "http",
    }


def _find_parent(traceparent: str | None) -> Context:
    """Return the span that a client named, or none if it named none in W3C's form."""
    carrier = {} if traceparent is None else {"traceparent": traceparent}
    return _PROPAGATOR.extract(carrier, Context())


def _describe(request: RequestRecord) -> dict[str, AttributeValue]:
    response, status = request.response, request.status
    prefix = "http" if request.protocol == HTTP else "rpc"
    values: dict[str, AttributeValue | None] = {
        f"{prefix}.response.status_code": status,
        "error.type": str(status) if request.is_fault else None,
        "productgraph.request.id": request.request_id,
        "productgraph.request.bytes": request.size_bytes,
        "productgraph.project.id": request.project_id,
        "productgraph.events.accepted": response.accepted if response else None,
        "productgraph.events.rejected": response.rejected if response else None,
    }
    return {name: value for name, value in values.items() if value is not None}


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


class _TracedTransport(Transport):
    def __init__(self, tracer: Tracer, provider: str, connections: int) -> None:
        super().__init__(connections)
        self._tracer = tracer
        self._provider = provider

    async def send(self, request: Request) -> Answer | NoAnswer:
        """Return the answer to a request, as `Transport` gives it."""
        with self._tracer.start_as_current_span(
            f"forward {self._provider}", Context(), SpanKind.CLIENT, _describe_request(request)
        ) as span:
            answer = await super().send(request)
            if isinstance(answer, NoAnswer):
                span.set_status(StatusCode.ERROR)
                span.set_attribute("error.type", "no_answer")
                return answer
            span.set_attribute("http.response.status_code", answer.status)
            if answer.status >= 400:
                span.set_status(StatusCode.ERROR)
                span.set_attribute("error.type", str(answer.status))
            return answer


def _describe_request(request: Request) -> dict[str, AttributeValue]:
    """Return what semantic conventions ask for, without any credential in the address."""
    parts = urlsplit(request.url)
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return {
        "http.request.method": request.method,
        "http.request.body.size": len(request.body),
        "server.address": host,
        "server.port": port,
        "url.full": f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}",
    }
