"""The HTTP API as an OpenAPI 3.1 document: openapi.json, with the event from its schema."""

from importlib.resources import files
from typing import Any

import orjson

from productgraph.v1 import rules_pb2
from server.events.schema import MAX_BATCH_SIZE, Field, Kind, Schema

Document = dict[str, Any]


def encode_description(schema: Schema, max_body_bytes: int) -> bytes:
    """Return the document for events of this schema, in bodies of at most `max_body_bytes`."""
    text = files(__package__).joinpath("openapi.json").read_text("utf-8")
    for name, value in {
        "max_body_bytes": max_body_bytes,
        "max_events": MAX_BATCH_SIZE,
        "max_event_bytes": schema.max_bytes,
        "catch_all": schema.catch_all.wire_name,
    }.items():
        text = text.replace(f'"{{{name}}}"', str(value)).replace(f"{{{name}}}", str(value))
    document = orjson.loads(text)
    event = document["components"]["schemas"]["TelemetryEvent"]
    for field in schema.fields:
        event["properties"][field.wire_name] = _describe_field(field, schema.max_depth)
        if field.rules.required:
            event["required"].append(field.wire_name)
    return orjson.dumps(document)


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
            return {"type": "object", "additionalProperties": True, "description": nesting}
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
    described = {"minimum": field.range.start, "maximum": field.range.stop - 1}
    if field.rules.rounding:
        return {"type": "number", "description": "Rounded to the nearest integer."} | described
    return {"type": "integer"} | described
