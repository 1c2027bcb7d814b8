"""What a good Python team writes in an afternoon, to compare with: FastAPI, Pydantic, asyncpg.

`python -m tests.bench.baseline URL PORT WORKERS` serves POST /v1/events. Each worker prints its
process id once it is ready.
It answers the specification's examples as the service does, keeps unknown fields, and commits each
request in one transaction of its own. It has none of the service's other promises: no deadline, no
answer while the database is away, no limits, no U+0000 in a text.
"""

import hashlib
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Annotated, Any, Literal

import asyncpg  # type: ignore[import-untyped]
import orjson
import uvicorn
from fastapi import FastAPI, Header, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

_URL = "BASELINE_DATABASE_URL"
_MAX_EVENTS = 1000

EventType = Literal[
    "page.view",
    "page.leave",
    "ui.click",
    "ui.input",
    "ui.scroll",
    "ui.focus",
    "ui.blur",
    "ui.submit",
    "state.change",
    "api.request",
    "api.response",
    "journey.step",
    "error",
    "performance",
    "custom",
]
Id = Annotated[str, Field(min_length=1, max_length=255)]


def _named(name: str) -> Any:
    return Field(None, alias=name)


class Event(BaseModel):
    """An event as the specification documents it; fields that it does not name are kept."""

    model_config = ConfigDict(extra="allow")

    event_id: Id
    project_id: Id
    session_id: Id = Field(alias="session.id")
    event_type: EventType = Field(alias="event.type")
    event_timestamp: datetime = Field(alias="event.timestamp")
    user_id: str | None = _named("user.id")
    event_name: str | None = _named("event.name")
    event_sequence: int | None = _named("event.sequence")
    page_path: str | None = _named("page.path")
    page_title: str | None = _named("page.title")
    page_url: str | None = _named("page.url")
    page_referrer: str | None = _named("page.referrer")
    ui_component_name: str | None = _named("ui.component.name")
    ui_component_path: str | None = _named("ui.component.path")
    ui_component_type: str | None = _named("ui.component.type")
    ui_action: str | None = _named("ui.action")
    ui_element: str | None = _named("ui.element")
    ui_element_text: str | None = _named("ui.element.text")
    ui_state_key: str | None = _named("ui.state.key")
    ui_state_before: str | None = _named("ui.state.before")
    ui_state_after: str | None = _named("ui.state.after")
    gen_ai_journey_id: str | None = _named("gen_ai.journey.id")
    gen_ai_journey_step_id: str | None = _named("gen_ai.journey.step.id")
    gen_ai_journey_step_name: str | None = _named("gen_ai.journey.step.name")
    api_method: str | None = _named("api.method")
    api_path: str | None = _named("api.path")
    api_status_code: int | None = _named("api.status_code")
    api_duration_ms: float | None = _named("api.duration_ms")
    error_type: str | None = _named("error.type")
    error_message: str | None = _named("error.message")
    error_stack: str | None = _named("error.stack")
    duration_ms: float | None = None
    metadata: dict[str, Any] | None = None


COLUMNS = (*Event.model_fields, "attributes")
_INSERT = (
    f"INSERT INTO events ({', '.join(COLUMNS)})"
    f" VALUES ({', '.join(f'${number}' for number in range(1, len(COLUMNS) + 1))})"
    " ON CONFLICT DO NOTHING"
)
_FIND_PROJECT = "SELECT project_id FROM api_keys WHERE digest = $1 AND revoked_at IS NULL"
_DURATIONS = tuple(COLUMNS.index(name) for name in ("api_duration_ms", "duration_ms"))
_METADATA = COLUMNS.index("metadata")


class Batch(BaseModel):
    """The body of a request all of whose events are valid."""

    events: list[Event] = Field(max_length=_MAX_EVENTS)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with asyncpg.create_pool(os.environ[_URL], min_size=4, max_size=8) as pool:
        app.state.pool = pool
        app.state.project_of = {}
        sys.stdout.write(f"{os.getpid()}\n")
        sys.stdout.flush()
        yield


app = FastAPI(lifespan=_lifespan)


@app.post("/v1/events", status_code=202)
async def ingest(
    request: Request, x_pg_api_key: Annotated[str | None, Header()] = None
) -> JSONResponse:
    """Store a batch, and say what is wrong with each bad event."""
    project = await _authenticate(request.app, x_pg_api_key)
    valid, errors = _validate(await request.body(), project)
    if valid:
        async with request.app.state.pool.acquire() as connection, connection.transaction():
            await connection.executemany(_INSERT, [make_row(event) for event in valid])
    return JSONResponse(
        {"accepted": len(valid), "rejected": len(errors), "errors": errors}, status_code=202
    )


async def _authenticate(app: FastAPI, key: str | None) -> str:
    projects: dict[str, str] = app.state.project_of
    if key is None:
        raise HTTPException(401, "missing or invalid API key")
    if key not in projects:
        digest = hashlib.sha256(key.encode()).digest()
        project = await app.state.pool.fetchval(_FIND_PROJECT, digest)
        if project is None:
            raise HTTPException(401, "missing or invalid API key")
        projects[key] = project
    return projects[key]


def _validate(body: bytes, project: str) -> tuple[list[Event], list[dict[str, Any]]]:
    try:
        events = Batch.model_validate_json(body).events
    except ValidationError:
        return _validate_each(body, project)
    if all(event.project_id == project for event in events):
        return events, []
    return _validate_each(body, project)


def _validate_each(body: bytes, project: str) -> tuple[list[Event], list[dict[str, Any]]]:
    valid: list[Event] = []
    errors: list[dict[str, Any]] = []
    for index, item in enumerate(_read_items(body)):
        try:
            event = Event.model_validate(item)
        except ValidationError as problem:
            errors.append({"index": index, "error": _describe(problem)})
        else:
            if event.project_id == project:
                valid.append(event)
            else:
                errors.append({"index": index, "error": "project_id: not the API key's project"})
    return valid, errors


def _read_items(body: bytes) -> list[Any]:
    try:
        items = orjson.loads(body)["events"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise HTTPException(400, "body: invalid JSON") from None
    if type(items) is not list or len(items) > _MAX_EVENTS:
        raise HTTPException(400, f"events: must be an array of at most {_MAX_EVENTS}")
    return items


def _describe(problem: ValidationError) -> str:
    first = problem.errors(include_url=False)[0]
    is_missing = first["type"] in ("missing", "string_too_short")
    return f"{first['loc'][0]}: {'required' if is_missing else first['msg']}"


def make_row(event: Event) -> Sequence[Any]:
    """Return the values of an event's columns, as asyncpg takes them."""
    values = [*event.__dict__.values(), event.__pydantic_extra__ or None]
    for position in _DURATIONS:
        if values[position] is not None:
            values[position] = round(values[position])
    for position in (_METADATA, -1):
        if values[position] is not None:
            values[position] = orjson.dumps(values[position]).decode()
    return values


async def store(url: str, items: Sequence[dict[str, Any]]) -> None:
    """Store events without a service, as the service would."""
    connection = await asyncpg.connect(url)
    try:
        await connection.executemany(_INSERT, list(map(make_row, map(Event.model_validate, items))))
    finally:
        await connection.close()


def main(url: str, port: int, workers: int) -> None:
    """Serve until the process is told to end."""
    os.environ[_URL] = url
    uvicorn.run(
        "tests.bench.baseline:app",
        port=port,
        workers=workers,
        loop="uvloop",
        http="httptools",
        log_level="warning",
        access_log=False,
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
