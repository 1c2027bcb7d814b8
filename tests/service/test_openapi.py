"""The OpenAPI description: it is valid, follows the schema, and what it says is true."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode, checks
from schemathesis.schemas import BaseSchema

from productgraph.v1 import rules_pb2
from productgraph.v1.event_pb2 import Event
from server.events.schema import EVENT_SCHEMA
from server.http.openapi import encode_description
from tests.support.clients import Answer, send
from tests.support.projects import Project
from tests.support.services import Service

# Nothing can be wrong with the others' requests.
OPERATIONS = [
    ("/v1/events", "post", GenerationMode.POSITIVE),
    ("/v1/events", "post", GenerationMode.NEGATIVE),
    ("/health", "get", GenerationMode.POSITIVE),
    ("/ready", "get", GenerationMode.POSITIVE),
    ("/openapi.json", "get", GenerationMode.POSITIVE),
]
# Not among them: that data against the description is refused. An event that breaks a rule is
# rejected by itself, within an answer 202.
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.ignored_auth,
    checks.allow_header_conformance,
]
bounded = settings(
    max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def served(service: Service) -> Answer:
    """Return the answer that carries the description."""
    return send(service, "GET", "/openapi.json", origin="https://shop.example")


@pytest.fixture(scope="module")
def schema(service: Service) -> BaseSchema:
    """Return the description, as a client loads it."""
    return schemathesis.openapi.from_url(f"{service.http_url}/openapi.json")


def test_the_description_is_valid_openapi_3_1(schema: BaseSchema) -> None:
    """The document is OpenAPI 3.1, by the rules of that."""
    schema.validate()
    assert schema.raw_schema["openapi"].startswith("3.1.")


def test_pages_of_any_origin_can_read_the_description(served: Answer) -> None:
    """It needs no key, and a page of any origin may have it."""
    assert served.status == 200
    assert served.json["info"]["title"]
    assert served.headers["Access-Control-Allow-Origin"] == "https://shop.example"


def test_the_description_has_the_rules_of_the_schema(served: Answer) -> None:
    """Every field is there by its wire name, with what its options say and no more."""
    event = served.json["components"]["schemas"]["TelemetryEvent"]
    assert list(event["properties"]) == [field.json_name for field in Event.DESCRIPTOR.fields]
    for field in Event.DESCRIPTOR.fields:
        rules = field.GetOptions().Extensions[rules_pb2.field_rules]
        described = event["properties"][field.json_name]
        assert (field.json_name in event["required"]) == rules.required
        assert described.get("enum", []) == list(rules.allowed_values)
        assert described.get("maxLength", 0) == rules.max_bytes
        assert ("null" in described["type"]) != rules.required


def test_the_described_body_limit_is_the_given_one() -> None:
    """The size of a body is the one that is given."""
    assert b"at most 12345 bytes" in encode_description(EVENT_SCHEMA, 12345)


@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS)
def test_every_request_is_answered_as_described(
    path: str, method: str, mode: GenerationMode, schema: BaseSchema, project: Project
) -> None:
    """Whatever is sent, within the description or against it, is answered as that says."""
    operation = schema[path][method]

    @bounded
    @given(case=operation.as_strategy(mode))
    def check(case: "Case[Any]") -> None:
        case.call_and_validate(headers={"X-PG-API-Key": project.key}, checks=CHECKS)

    check()


def test_described_events_are_rejected_only_for_byte_lengths(
    schema: BaseSchema, project: Project
) -> None:
    """Only what JSON Schema cannot say, a length in bytes, rejects an event that it allows."""
    operation = schema["/v1/events"]["post"]

    @bounded
    @given(case=operation.as_strategy())
    def check(case: "Case[Any]") -> None:
        body: Any = case.body
        for event in body["events"]:
            event["project_id"] = project.id
        outcome = case.call(headers={"X-PG-API-Key": project.key}).json()
        assert all(error["error"].endswith("bytes") for error in outcome["errors"]), outcome

    check()
