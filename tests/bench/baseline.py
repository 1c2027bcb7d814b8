"""What a user might write in an afternoon, to compare with: the obvious library for every step.

`python -m tests.bench.baseline URL` serves POST /v1/events on a free port, which it prints.
"""

import sys
from collections.abc import Sequence
from typing import Any

import falcon
from google.protobuf.json_format import MessageToDict, ParseDict
from sqlalchemy import Engine, MetaData, Table, create_engine
from sqlalchemy.dialects.postgresql import insert
from waitress.server import create_server

from productgraph.v1.event_pb2 import Event


class EventTable:
    """The events table of the service, written row by row."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._insert = insert(Table("events", MetaData(), autoload_with=engine))

    def store(self, events: Sequence[Event]) -> None:
        """Commits the events, but for those that are stored already."""
        rows = [_make_row(event) for event in events]
        with self._engine.begin() as connection:
            connection.execute(self._insert.on_conflict_do_nothing(), rows)


def _make_row(event: Event) -> dict[str, Any]:
    row: dict[str, Any] = {field.name: None for field in Event.DESCRIPTOR.fields}
    for field, value in event.ListFields():
        if field.message_type is None:
            row[field.name] = value
        elif field.name == "event_timestamp":
            row[field.name] = value.ToDatetime()
        else:
            row[field.name] = MessageToDict(value)
    return row


class _Events:
    def __init__(self, table: EventTable) -> None:
        self._table = table

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        events = [ParseDict(item, Event()) for item in req.get_media()["events"]]
        self._table.store(events)
        resp.status = falcon.HTTP_202
        resp.text = f'{{"accepted":{len(events)},"rejected":0,"errors":[]}}'


def main(url: str) -> None:
    """Serves until it is killed."""
    app = falcon.App()
    app.add_route("/v1/events", _Events(EventTable(create_engine(url))))
    server = create_server(app, host="127.0.0.1", port=0)
    sys.stdout.write(f"{server.effective_port}\n")
    sys.stdout.flush()
    server.run()


if __name__ == "__main__":
    main(sys.argv[1])
