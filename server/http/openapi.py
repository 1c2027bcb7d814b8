"""The HTTP API as an OpenAPI 3.1 document, derived from the schema of an event."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import orjson

from productgraph.v1 import rules_pb2
from server.events.schema import MAX_BATCH_SIZE, Field, Kind, Schema

Document = dict[str, Any]

_JSON, _TEXT = "application/json", "text/plain"
_REQUEST_ID = "X-Request-ID"

_INTRODUCTION = """\
Takes telemetry events into ProductGraph. An acknowledged event is committed, once, however often it
was sent: retrying is always safe. An event that breaks a rule is rejected by itself, and reported
by its index in an answer 202.

Every other path is answered 404. What is no proper HTTP is refused in plain text, with 400, 413,
431 or 501.
"""
_INGEST = """\
Answers once every accepted event is committed. The body may be compressed with gzip
(`Content-Encoding: gzip`), and has at most {max_body_bytes} bytes before and after decompression.
"""
_EVENT = """\
At most {max_bytes} bytes in its protobuf encoding. What is not named here is kept too, as if it
were sent in `{catch_all}`. `null` means absent.
"""

# What every operation may be answered with, by the name of the component.
_EVERYWHERE = (HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.INTERNAL_SERVER_ERROR)
_REASONS = {
    HTTPStatus.BAD_REQUEST: "Not JSON, not of the documented shape, too many events or too large.",
    HTTPStatus.UNAUTHORIZED: "The API key is missing, malformed, unknown or revoked.",
    HTTPStatus.NOT_FOUND: "Another path.",
    HTTPStatus.METHOD_NOT_ALLOWED: "Another method; `Allow` names those there are.",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "Another content type than JSON, or another encoding than"
    " identity and gzip.",
    HTTPStatus.TOO_MANY_REQUESTS: "The rate limit of the API key is reached.",
    HTTPStatus.INTERNAL_SERVER_ERROR: "A fault of the service, told without details.",
    HTTPStatus.SERVICE_UNAVAILABLE: "Not stored in time, or too much is waiting to be stored:"
    " send it again.",
}
_HEADERS_OF = {
    HTTPStatus.METHOD_NOT_ALLOWED: ("Allow",),
    HTTPStatus.TOO_MANY_REQUESTS: ("Retry-After", "RateLimit-Policy", "RateLimit"),
    HTTPStatus.SERVICE_UNAVAILABLE: ("Retry-After",),
}
_HEADERS: dict[str, Document] = {
    "Allow": {"description": "The methods of this path.", "schema": {"type": "string"}},
    "Retry-After": {
        "description": "After how many seconds to send the request again.",
        "required": True,
        "schema": {"type": "integer", "minimum": 0},
    },
    "RateLimit-Policy": {
        "description": "The limits that apply, as Structured Fields.",
        "schema": {"type": "string"},
    },
    "RateLimit": {
        "description": "What is left of the limits, as Structured Fields.",
        "schema": {"type": "string"},
    },
    _REQUEST_ID: {
        "description": "The request's id, which the service's log has too.",
        "schema": {"type": "string"},
    },
}


def encode_description(schema: Schema, max_body_bytes: int) -> bytes:
    """The document for events of this schema, in bodies of so many bytes at the most, as JSON."""
    return orjson.dumps(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "ProductGraph event ingestion",
                "version": "1",
                "description": _INTRODUCTION,
            },
            "paths": {
                "/v1/events": {"post": _describe_ingestion(max_body_bytes)},
                "/health": {"get": _describe_state("The process lives.", "ok")},
                "/ready": {"get": _describe_readiness()},
                "/openapi.json": {"get": _describe_itself()},
            },
            "components": {
                "securitySchemes": {
                    "key": {"type": "apiKey", "in": "header", "name": "X-PG-API-Key"}
                },
                "headers": _HEADERS,
                "parameters": {"RequestId": _describe_request_id()},
                "responses": {status.name: _describe_error(status) for status in _REASONS},
                "schemas": {
                    "Batch": _describe_batch(),
                    "Event": _describe_event(schema),
                    "Outcome": _describe_outcome(),
                    "Error": _describe_object({"error": {"type": "string"}}),
                },
            },
        }
    )


def _describe_ingestion(max_body_bytes: int) -> Document:
    statuses = [status for status in _REASONS if status != HTTPStatus.NOT_FOUND]
    return {
        "operationId": "ingestEvents",
        "summary": "Stores a batch of events of one project.",
        "description": _INGEST.format(max_body_bytes=max_body_bytes),
        "security": [{"key": []}],
        "parameters": [{"$ref": "#/components/parameters/RequestId"}],
        "requestBody": {"required": True, "content": _content(_refer_to("schemas", "Batch"))},
        "responses": {
            "202": _describe_answer(
                "What became of the events.",
                _refer_to("schemas", "Outcome"),
                ("RateLimit-Policy", "RateLimit", _REQUEST_ID),
            ),
            **_describe_errors(*statuses),
        },
    }


def _describe_state(meaning: str, state: str) -> Document:
    answer = _describe_answer(meaning, _describe_object({"status": {"const": state}}))
    return {"summary": meaning, "responses": {"200": answer, **_describe_errors(*_EVERYWHERE)}}


def _describe_readiness() -> Document:
    described = _describe_state("Events can be stored.", "ready")
    unavailable = _describe_object({"status": {"const": "unavailable"}})
    described["responses"]["503"] = _describe_answer("Events cannot be stored.", unavailable)
    return described


def _describe_itself() -> Document:
    answer = _describe_answer("This document.", {"type": "object"})
    return {
        "summary": "Describes this API.",
        "responses": {"200": answer, **_describe_errors(*_EVERYWHERE)},
    }


def _describe_answer(
    meaning: str, content: Document, headers: tuple[str, ...] = (), *types: str
) -> Document:
    return {
        "description": meaning,
        "headers": {name: _refer_to("headers", name) for name in headers},
        "content": _content(content) | {kind: {"schema": {"type": "string"}} for kind in types},
    }


def _describe_errors(*statuses: HTTPStatus) -> Document:
    return {str(status.value): _refer_to("responses", status.name) for status in statuses}


def _describe_error(status: HTTPStatus) -> Document:
    types = (_TEXT,) if status == HTTPStatus.BAD_REQUEST else ()
    headers = (*_HEADERS_OF.get(status, ()), _REQUEST_ID)
    return _describe_answer(_REASONS[status], _refer_to("schemas", "Error"), headers, *types)


def _describe_request_id() -> Document:
    return {
        "name": _REQUEST_ID,
        "in": "header",
        "description": "An id of the client's for the request.",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
    }


def _describe_batch() -> Document:
    return {
        "type": "object",
        "required": ["events"],
        "properties": {
            "events": {
                "type": "array",
                "maxItems": MAX_BATCH_SIZE,
                "items": _refer_to("schemas", "Event"),
            }
        },
    }


def _describe_event(schema: Schema) -> Document:
    return {
        "type": "object",
        "description": _EVENT.format(
            max_bytes=schema.max_bytes, catch_all=schema.catch_all.wire_name
        ),
        "required": [field.wire_name for field in schema.fields if field.rules.required],
        "properties": {
            field.wire_name: _describe_field(field, schema.max_depth) for field in schema.fields
        },
    }


def _describe_field(field: Field, max_depth: int) -> Document:
    described = _describe_value(field, max_depth)
    if not field.rules.required:
        described["type"] = [described["type"], "null"]
    return described


def _describe_value(field: Field, max_depth: int) -> Document:
    match field.kind:
        case Kind.TEXT:
            return _describe_text(field.rules)
        case Kind.TIMESTAMP:
            return {"type": "string", "format": "date-time"}
        case Kind.OBJECT:
            nesting = f"Objects and arrays nest at most {max_depth} levels deep, this one counted."
            return {"type": "object", "description": nesting}
        case Kind.INTEGER | Kind.LONG:
            return _describe_integer(field)


def _describe_text(rules: rules_pb2.FieldRules) -> Document:
    described: Document = {"type": "string"}
    sentences = []
    if rules.required:
        described["minLength"] = 1
    if rules.max_bytes:
        described["maxLength"] = rules.max_bytes
        sentences.append(f"At most {rules.max_bytes} bytes of UTF-8.")
    if rules.allowed_values:
        described["enum"] = list(rules.allowed_values)
    if rules.matches_api_key:
        sentences.append("The project that the API key belongs to.")
    return described | ({"description": " ".join(sentences)} if sentences else {})


def _describe_integer(field: Field) -> Document:
    described: Document = {
        "type": "number" if field.rules.rounding else "integer",
        "minimum": field.range.start,
        "maximum": field.range.stop - 1,
    }
    if field.rules.rounding:
        described["description"] = "Rounded to the nearest integer."
    return described


def _describe_outcome() -> Document:
    """The answer's message as JSON, which always has all its fields."""
    index: Document = {"type": "integer", "minimum": 0}
    count = index | {"maximum": MAX_BATCH_SIZE}
    error = {"index": index, "error": {"type": "string"}}
    errors = {"type": "array", "items": _describe_object(error)}
    return _describe_object({"accepted": count, "rejected": count, "errors": errors})


def _describe_object(properties: Mapping[str, Document]) -> Document:
    return {"type": "object", "required": list(properties), "properties": dict(properties)}


def _content(schema: Document) -> Document:
    return {_JSON: {"schema": schema}}


def _refer_to(kind: str, name: str) -> Document:
    return {"$ref": f"#/components/{kind}/{name}"}
