"""Logs on standard error: one JSON object a line, or plain text on a terminal."""

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any

import orjson

# What every record has; anything else came in by `extra` and is a field of the line.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"asctime", "message", "taskName"}

# A terminal obeys these, and a line feed would begin a line of somebody else's making.
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}


def configure_logs(level: str) -> None:
    """Send all logs of `level` and above to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_TextFormatter() if sys.stderr.isatty() else _JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # One line for each request that finds no free thread: load, not a fault.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    # One line for each request to a provider.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)


def _fields_of(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


class _Formatter(logging.Formatter):
    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's names
        """Return the first line of each exception's text only.

        In the others PostgreSQL tells of the row that it was busy with.
        """
        parts = traceback.TracebackException(*ei).format()
        return "".join(
            part if part[0].isspace() else part.partition("\n")[0] + "\n" for part in parts
        ).rstrip()


class _JsonFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "pid": record.process,
            **_fields_of(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(line, default=str).decode()
        except orjson.JSONEncodeError:  # a lone surrogate, or a number over 64 bits
            return json.dumps(line, default=str)


class _TextFormatter(_Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        fields = "".join(f" {name}={value}" for name, value in _fields_of(record).items())
        return (super().formatMessage(record) + fields).translate(_ESCAPES)
