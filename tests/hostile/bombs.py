"""The campaigns of weight: a few inputs that are large, deep or become so."""

import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import orjson

from server.events.json_parser import MAX_VALUES
from server.events.schema import EVENT_SCHEMA
from tests.bench.events import make_long_events
from tests.hostile.bodies import describe_outcome
from tests.hostile.connection import Answer, Connection, NoAnswer, encode_post
from tests.hostile.grammar import encode_batch, make_event
from tests.hostile.record import Record
from tests.hostile.target import Target
from tests.hostile.volume import probing_health
from tests.support.projects import Project

_BODY_BYTES = 10 * 1024 * 1024
_GZIP_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
_LARGE_CLIENTS = 8
_QUICK = 4
# What a worker may take at most while it reads large bodies, in MB of 1,000,000 bytes.
MAX_MEMORY_MB = 400.0
_BATCH = 1000
# Just less than the values that a body may have.
_MOST = MAX_VALUES - 20 * _BATCH


def attack_gzip(target: Target, record: Record, rounds: int, _seed: int) -> None:
    """Send bodies that are small until they are decompressed."""
    project = target.create_project()
    with probing_health(target, record):
        for _ in range(rounds):
            for body in make_gzip_bombs():
                answer = _post(
                    target, record, encode_post(body, project.key, b"Content-Encoding: gzip")
                )
                _require_status(record, answer, 400, f"gzip of {len(body)} bytes")
    _require_memory(target, record)


def make_gzip_bombs() -> Iterator[bytes]:
    """Make endless zeros, gzip in gzip, many members, a cut one, a false length, a long name."""
    yield _repeat_block(b"\0" * 2**20, 9_000)  # 9 GB in 10 MB
    yield _repeat_block(b" " * 2**20, 100)
    yield gzip.compress(b"[" * (_BODY_BYTES + 1))
    yield gzip.compress(gzip.compress(b"\0" * _BODY_BYTES))
    yield gzip.compress(b"") * 400_000
    yield gzip.compress(b'{"events":[]}') * 17
    yield gzip.compress(b'{"events":[]}')[:-9]
    yield gzip.compress(b'{"events":[]}')[:-4] + b"\xff\xff\xff\x7f"
    yield _GZIP_HEADER[:3] + b"\x1e" + b"\xff" * 100_000  # a name without an end


def _repeat_block(content: bytes, count: int) -> bytes:
    """Return a deflate stream that repeats a content many times, without ever holding it."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    deflate.compress(content)
    deflate.flush(zlib.Z_FULL_FLUSH)
    block = deflate.compress(content) + deflate.flush(zlib.Z_FULL_FLUSH)
    return _GZIP_HEADER + block * min(count, (_BODY_BYTES - 100) // len(block))


def attack_depth(target: Target, record: Record, rounds: int, _seed: int) -> None:
    """Send bodies that nest endlessly, and events that nest too deep among others that do not."""
    project = target.create_project()
    with probing_health(target, record):
        for number in range(rounds):
            for body in _make_endless():
                _require_status(
                    record, _post(target, record, encode_post(body, project.key)), 400, body[:40]
                )
            for index, text in enumerate(_make_deep()):
                _attack_neighbours(target, record, project, 1000 * number + 3 * index, text)
    _require_memory(target, record)


def _make_endless() -> Iterator[bytes]:
    for size in (1000, 100_000, _BODY_BYTES):
        for start, unit in (
            (b"", b"["),
            (b"", b'{"a":'),
            (b'{"events":', b"["),
            (b'{"events":[', b'{"metadata":'),
        ):
            yield start + unit * ((size - len(start)) // len(unit))
        yield b'{"events":["\\ud83d",' + b"[" * (size - 20)


def _make_deep() -> Iterator[bytes]:
    for depth in (31, 32, 33, 63, 64, 65, 1000, 100_000, 400_000):
        yield b"[" * depth + b"]" * depth
        yield b'{"a":' * (depth // 3) + b"1" + b"}" * (depth // 3)
        yield b'{"\\u0000":' * (depth // 4) + b'"\\ud83d"' + b"}" * (depth // 4)


def _attack_neighbours(
    target: Target, record: Record, project: Project, number: int, text: bytes
) -> None:
    events = [make_event(project.id, number + index) for index in range(3)]
    events[1]["metadata"] = {"deep": "DEEP"}
    body = encode_batch(events).replace(b'"DEEP"', text)
    answer = _post(target, record, encode_post(body, project.key))
    if _require_status(record, answer, 202, text[:40]):
        outcome = answer.json  # type: ignore[union-attr]
        problem = describe_outcome(outcome["accepted"], outcome["errors"], 3, 1)
        record.require(problem is None, f"{problem}: {text[:40]!r}, {len(text)} bytes")


_TYPES = EVENT_SCHEMA.fields[3].rules.allowed_values
_UNKNOWN_TYPE = f"event.type: unknown type 'ui.hover', must be one of {', '.join(_TYPES)}"
_NO_TIMESTAMP = "event.timestamp: must be an ISO 8601 date-time, such as 2024-01-15T10:30:00.123Z"
# What may be wrong with one event of a thousand, and what is then told of it.
_FAULTS: Sequence[tuple[dict[str, object], str]] = (
    ({"event_id": ""}, "event_id: required"),
    ({"project_id": "proj_of_others"}, "project_id: does not match the API key"),
    ({"event.type": "ui.hover"}, _UNKNOWN_TYPE),
    ({"event.timestamp": "yesterday"}, _NO_TIMESTAMP),
    ({"session.id": 7}, "session.id: must be a string"),
    ({"metadata": {"text": "x" * 110_000}}, "event: larger than 102400 bytes"),
    ({"event.sequence": 2**70}, "event.sequence: must be an integer of 64 bits"),
)


def attack_positions(target: Target, record: Record, count: int, _seed: int) -> None:
    """Send batches of a thousand events with one bad event, at each position in turn."""
    project, connection = target.create_project(), Connection(target.port)
    positions = range(0, _BATCH, max(1, _BATCH // count))
    for turn, position in enumerate(positions):
        events = [make_event(project.id, turn * _BATCH + index) for index in range(_BATCH)]
        fault, problem = _FAULTS[turn % len(_FAULTS)]
        events[position] |= fault
        answer = _exchange(connection, record, encode_post(encode_batch(events), project.key))
        if _require_status(record, answer, 202, f"position {position}"):
            wanted = {"accepted": _BATCH - 1, "rejected": 1}
            wanted["errors"] = [{"index": position, "error": problem}]  # type: ignore[assignment]
            outcome = answer.json  # type: ignore[union-attr]
            record.require(outcome == wanted, f"position {position}: {outcome}")
    connection.close()
    stored, due = target.count_events(project), len(positions) * (_BATCH - 1)
    record.require(stored == due, f"{due} accepted, {stored} stored")


def attack_memory(target: Target, record: Record, rounds: int, _seed: int) -> None:
    """Send eight bodies of 10 MB at the same time, of every kind that is expensive to read."""
    project = target.create_project()
    kinds = make_large_bodies(project)
    with ThreadPoolExecutor(_LARGE_CLIENTS) as pool:
        for name, make_body in list(kinds.items())[: None if rounds > 1 else _QUICK]:
            body = make_body()
            assert len(body) <= _BODY_BYTES, name
            request = encode_post(body, project.key)
            target.reset_peak_memory()
            sent = [pool.submit(_post, target, record, request) for _ in range(_LARGE_CLIENTS)]
            answers = [each.result() for each in sent]
            _require_large(target, record, name, answers)


def _require_large(
    target: Target, record: Record, name: str, answers: Sequence[Answer | None]
) -> None:
    for answer in answers:
        known = answer is None or answer.status in (202, 400)
        late = answer is not None and answer.status == 503 and answer.has_retry_after
        record.require(known or late, f"{name}: answered {answer}")
    peak = target.read_peak_memory()
    record.peak_memory_mb = max(record.peak_memory_mb, peak)
    record.require(peak <= MAX_MEMORY_MB, f"{name}: a worker took {peak:.0f} MB")
    slowest = max((answer.seconds for answer in answers if answer), default=0.0)
    statuses = sorted({str(answer.status) for answer in answers if answer})
    record.notes.append(f"{name}: {' '.join(statuses)}, {slowest:.1f} s, {peak:.0f} MB")


def make_large_bodies(project: Project) -> dict[str, Callable[[], bytes]]:
    """Return what makes each body, by its name: the most expensive of every kind known.

    The first are refused for the number of their values, the others have as many as they may.
    """
    event = encode_batch([make_event(project.id, 0)])[:-4]
    odd = event.replace(b"/products", b"\\u0000")
    cut = event.replace(b"/products", b"\\ud83d")
    array, object_ = b',"a":[', b',"a":{'
    events, no_events = b'{"events":[', b'{"events":[],"a":['
    return {
        "{},{},…": lambda: _fill(events, b"{},", b"{}]}"),
        "[0,0,…]": lambda: _fill(event + array, b"0,", b"0]}}]}"),
        "realistic": lambda: encode_batch(_own(make_long_events(_BATCH), project)),
        "[0,0,…], as many as may be": lambda: _fill(event + array, b"0,", b"0]}}]}", _MOST),
        "{},{},… and U+0000": lambda: _fill(b'{"a":"\\u0000","events":[', b"{},", b"{}]}"),
        "[[],[],…] and a surrogate": lambda: _fill(cut + array, b"[],", b"[]]}}]}"),
        "{} outside of events": lambda: _fill(no_events, b"{},", b"{}]}"),
        "no JSON at the very end": lambda: _fill(events, b"{},", b"{}]"),
        "one long text": lambda: _fill(event + b',"a":"', b"x", b'"}}]}'),
        "escapes": lambda: _fill(event + b',"a":"', b"\\u0000", b'"}}]}'),
        "commas in a text": lambda: _fill(event + b',"a":"', b",[", b'"}}]}'),
        "spaces": lambda: _fill(events, b" ", b"]}"),
        "keys": lambda: _fill_keys(event + object_, b"}}}]}"),
        "[[],…] and U+0000": lambda: _fill(odd + array, b"[],", b"[]]}}]}", _MOST // 2),
        "{} and U+0000": lambda: _fill(odd + array, b"{},", b"{}]}}]}", _MOST // 2),
        "1e999": lambda: _fill(event + array, b"1e999,", b"0]}}]}", _MOST),
        "9e99": lambda: _fill(event + array, b"9e99,", b"0]}}]}", _MOST),
        "{} for events": lambda: _fill(events, b"{},", b"{}]}", _MOST // 2),
        '{"a":1} outside of events': lambda: _fill(no_events, b'{"a":1},', b"{}]}", _MOST // 2),
        "a thousand with [0,0,…]": lambda: _fill_events(project, b"0", _MOST),
        "a thousand with [{},{},…]": lambda: _fill_events(project, b"{}", _MOST // 2),
        "a thousand with 9e99": lambda: _fill_events(project, b"9e99", _MOST),
        "a thousand with [{},…] and U+0000": lambda: _fill_events(
            project, b"{}", _MOST // 2, b"\\u0000"
        ),
    }


def _fill(start: bytes, unit: bytes, end: bytes, most: int = _BODY_BYTES) -> bytes:
    """Return a body with this many units, or as many as there is room for."""
    room = (_BODY_BYTES - len(start) - len(end)) // len(unit)
    return start + unit * min(room, most) + end


def _own(events: list[dict[str, object]], project: Project) -> list[dict[str, object]]:
    return [event | {"project_id": project.id} for event in events]


def _fill_keys(start: bytes, end: bytes) -> bytes:
    keys = b",".join(b'"%06x":0' % number for number in range(_MOST))
    return start + keys + end


def _fill_events(project: Project, value: bytes, most: int, text: bytes = b"x") -> bytes:
    """Return a thousand events that share this many values, filled to 10 MB by a long text."""
    values = b"[" + b",".join([value] * (most // _BATCH)) + b"]"
    events = []
    for number in range(_BATCH):
        event = make_event(project.id, number) | {"metadata": "VALUES", "page.path": "TEXT"}
        encoded = orjson.dumps(event).replace(b'"VALUES"', b'{"a":' + values + b"}")
        padding = text + b"x" * (10_000 - len(encoded))
        events.append(encoded.replace(b'"TEXT"', b'"' + padding + b'"'))
    return b'{"events":[' + b",".join(events) + b"]}"


def _post(target: Target, record: Record, request: bytes) -> Answer | None:
    connection = Connection(target.port)
    try:
        return _exchange(connection, record, request)
    finally:
        connection.close()


def _exchange(connection: Connection, record: Record, request: bytes) -> Answer | None:
    try:
        answer = connection.exchange(request)
    except NoAnswer as error:
        record.violate(f"{error} to {request[:400]!r}")
        return None
    record.add(answer.status, answer.seconds)
    return answer


def _require_status(record: Record, answer: Answer | None, status: int, of: object) -> bool:
    if answer is not None and answer.status != status:
        record.violate(f"{of!r}: answered {answer.status}, {answer.body[:200]!r}")
    return answer is not None and answer.status == status


def _require_memory(target: Target, record: Record) -> None:
    peak = target.read_peak_memory()
    record.require(peak <= MAX_MEMORY_MB, f"a worker took {peak:.0f} MB")
