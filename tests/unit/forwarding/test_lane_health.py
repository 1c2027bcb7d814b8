"""Whoever looks after a forwarder sees how each provider fares, and never what events hold."""

import json
import logging
import signal
import subprocess
from collections import Counter
from datetime import timedelta
from typing import Any
from urllib.request import urlopen

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.forwarding.answers import hide_secrets, quote_answer, quote_reason
from server.forwarding.lane_health import LaneHealth
from server.forwarding.providers.amplitude import Amplitude
from server.forwarding.providers.provider import Answer, Decision, NoAnswer
from tests.support.clock import Clock
from tests.support.events import make_message
from tests.support.forwarding import SECRET, Bench, make_events
from tests.support.provider_servers import HTML, Reply, Script
from tests.support.services import ask, wait_until

PAYLOAD = orjson.dumps({"page_title": "Grüße an Zoë Müller", "n": 12345678})


def quote(text: str | bytes) -> str:
    """Return what is shown of an answer to a request with this payload."""
    body = text if isinstance(text, bytes) else text.encode()
    return quote_answer(body, [PAYLOAD, b'{"x":"y"}'], [SECRET])


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("down", "down"),
        ("", ""),
        (f"key {SECRET}, {SECRET.upper()}", "key …, …"),
        ("bad title: Grüße an Zoë Müller!", "bad title: …!"),
        ("bad title: an Zoë Müll", "bad title:…"),
        ("aZoë Mül", "aZoë Mül"),  # of eight characters, seven are in the request
        ('{"error": "no Gr\\u00fc\\u00dfe an Zo\\u00eb"}', '{"error":"no …"}'),
        ('{"error": 12345678}', '{"error…'),
        ("one\ntwo\x1b[31m\x00", "one\\ntwo\\x1b[31m\\x00"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        ("x" * 1000, "x" * 200),
        (HTML, HTML.decode()),
    ],
)
def test_an_answer_is_shown_without_its_request(answer: str | bytes, shown: str) -> None:
    """Of an answer the begin is shown, without credentials, echoes and control characters."""
    assert quote(answer) == shown


@given(
    request=st.text(min_size=8, max_size=80),
    before=st.text(max_size=20),
    cut=st.tuples(st.integers(0, 72), st.integers(8, 80)),
)
def test_no_piece_of_a_request_is_shown(request: str, before: str, cut: tuple[int, int]) -> None:
    """No eight characters in a row of what is shown are in the request."""
    payload = request.encode(errors="replace")
    text = payload.decode()
    answer = before.encode(errors="replace").decode() + text[cut[0] : cut[0] + cut[1]]
    shown = quote_answer(answer.encode(), [payload], [])
    pieces = [shown[at : at + 8] for at in range(len(shown) - 7)]
    assert not [piece for piece in pieces if piece in text and "\\" not in piece]


def test_reasons_keep_the_names_of_fields() -> None:
    """A reason names the field that a provider refuses, and not what the field held."""
    payload = b'{"event_properties":{"page_title":"Top secret plans"}}'
    reason = "event_properties: page_title is Top secret plans"
    assert quote_reason(reason, [payload], []) == "event_properties: page_title is …"


def test_hidden_secrets_may_be_empty() -> None:
    """A provider without a credential hides nothing."""
    assert hide_secrets("text", ["", "ex"]) == "t…t"


FAILED, DONE = Decision(retry={0: 0.0}), Decision(done=frozenset({0}))


def note(health: LaneHealth, decision: Decision, answer: Answer | NoAnswer) -> None:
    """Return a round of one request."""
    health.note_request([PAYLOAD], decision, answer)
    health.end_round()


def find_records(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str, Any]]:
    """Level, message and answer or reasons of what was logged since the last time."""
    records = [
        (r.levelname, r.message, getattr(r, "answer", getattr(r, "reasons", None)))
        for r in caplog.records
    ]
    caplog.clear()
    return records


def test_a_failing_provider_is_logged_at_intervals(caplog: pytest.LogCaptureFixture) -> None:
    """A WARNING when it begins to fail and each minute after, and one INFO when it is well."""
    caplog.set_level(logging.INFO)
    clock = Clock()
    health = LaneHealth(Amplitude(SECRET, ""), clock=clock)
    note(health, DONE, Answer(200, {}, b""))
    assert find_records(caplog) == []
    note(health, FAILED, Answer(500, {}, f"down, {SECRET} Zoë Müller".encode()))
    assert find_records(caplog) == [("WARNING", "a provider fails", "500 down, ……")]
    for seconds, expected in ((30, []), (29, []), (1, ["no answer (ConnectError)"])):
        clock.now += seconds
        note(health, FAILED, NoAnswer("ConnectError"))
        assert [answer for _, _, answer in find_records(caplog)] == expected
    assert health.trouble == "no answer (ConnectError)"
    note(health, DONE, Answer(200, {}, b""))
    assert find_records(caplog) == [("INFO", "a provider has recovered", None)]
    assert health.trouble is None
    # One that comes and goes makes no more than two lines a minute.
    for _ in range(20):
        clock.now += 1
        note(health, FAILED, Answer(500, {}, b"again"))
        note(health, DONE, Answer(200, {}, b""))
    assert len(find_records(caplog)) == 0


def test_refusals_are_logged_by_reason_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """Events refused for good are summed up by their reasons once a minute, ten of them."""
    clock = Clock()
    health = LaneHealth(Amplitude(SECRET, ""), clock=clock)
    dead = Decision(dead={0: "invalid field time", 1: "invalid field time", 2: "Zoë Müller"})
    note(health, dead, Answer(400, {}, b""))
    [(level, message, reasons)] = find_records(caplog)
    assert (level, message) == ("WARNING", "events refused for good")
    assert reasons == {"invalid field time": 2, "…": 1}
    for number in range(100):
        note(health, Decision(dead={0: f"reason {number}"}), Answer(400, {}, b""))
    clock.now += 61
    health.log_refused()
    [(_, _, reasons)] = find_records(caplog)
    assert sum(reasons.values()) == 100
    assert len(reasons) == 11
    health.log_refused()
    assert find_records(caplog) == []


def test_requests_are_counted_by_their_outcome() -> None:
    """Each request is counted once, under one of a bounded number of outcomes."""
    counts: Counter[tuple[str, str]] = Counter()

    def count(provider: str, outcome: str) -> None:
        counts[provider, outcome] += 1

    provider = Amplitude(SECRET, "")
    health = LaneHealth(provider, count)
    payloads = [provider.encode_event(make_message("p", "e").SerializeToString(), 2)] * 2
    answers: dict[str, Answer | NoAnswer] = {
        "accepted": Answer(200, {}, b'{"code":200,"events_ingested":2}'),
        "refused": Answer(413, {}, b""),
        "blocked": Answer(403, {}, b""),
        "unauthorized": Answer(401, {}, b""),
        "throttled": Answer(429, {}, b"{}"),
        "incomplete": Answer(200, {}, b'{"code":200,"events_ingested":1}'),
        "failed": Answer(200, {}, HTML),
        "no_answer": NoAnswer("ReadTimeout"),
    }
    for answer in answers.values():
        known = None if isinstance(answer, NoAnswer) else answer
        health.note_request(payloads, provider.decide(payloads, known), answer)
    assert counts == {("amplitude", outcome): 1 for outcome in answers}


@pytest.mark.usefixtures("quick")
def test_the_database_shows_how_a_lane_fares(bench: Bench) -> None:
    """What a provider answered at last, the next try and the recovery are in the lane's row."""
    row = (
        "SELECT last_error, failing_since IS NOT NULL, next_try_at IS NOT NULL,"
        " seen_at > now() - '30 s'::interval FROM forward_lanes WHERE provider = 'amplitude'"
    )
    server = bench.servers["amplitude"]
    server.behave = lambda _: Script(Reply(500, f"no {SECRET}".encode()))
    counts: Counter[tuple[str, str]] = Counter()
    with bench.forwarding("amplitude", counts=counts):
        wait_until(lambda: bench.query("SELECT 1 FROM forward_lanes WHERE seen_at IS NOT NULL"))
        bench.store(make_events("p", 3))
        wait_until(lambda: bench.query(row) == [("500 no …", True, True, True)])
        server.behave = lambda _: None
        wait_until(lambda: bench.query(row) == [("500 no …", False, False, True)])
    assert counts["amplitude", "failed"] >= 1
    assert counts["amplitude", "accepted"] == 1


@pytest.mark.slow
def test_a_forwarder_of_its_own_serves_metrics(bench: Bench) -> None:
    """Alone it serves its port with /metrics and /health, and says at once what goes where."""
    bench.servers["mixpanel"].behave = lambda _: Script(Reply(500, b"down"))
    bench.store(make_events("p", 3))
    with bench.process(stderr=subprocess.PIPE) as process:
        assert process.stderr
        lines = [json.loads(process.stderr.readline()) for _ in range(3)]
        for name, line in zip(bench.servers, lines, strict=False):
            assert line["message"] == "forwarding every stored event"
            assert (line["provider"], line["endpoint"]) == (name, bench.servers[name].url)
        url = f"http://127.0.0.1:{lines[2]['port']}"
        assert ask(f"{url}/health") == 200
        wait_until(lambda: ask(f"{url}/ready") == 200)

        def read_page() -> str:
            with urlopen(f"{url}/metrics") as page:
                return str(page.read().decode())

        accepted, failed = (
            f'productgraph_provider_requests_total{{outcome="{outcome}",provider="{name}"}} '
            for name, outcome in (("amplitude", "accepted"), ("mixpanel", "failed"))
        )
        wait_until(lambda: f"{accepted}1.0" in read_page() and f"{failed}0.0" not in read_page())
        wait_until(lambda: 'productgraph_outbox_pending{provider="mixpanel"} 3.0' in read_page())
        # A second one beside it forwards too, without a page.
        port = {"METRICS_PORT": str(lines[2]["port"])}
        with bench.process(bench.settings | port, stderr=subprocess.PIPE) as other:
            assert other.stderr
            said = [json.loads(other.stderr.readline()) for _ in range(3)]
            assert said[2]["level"] == "WARNING"
            assert "already in use" in said[2]["message"]
            other.send_signal(signal.SIGTERM)
            assert other.wait(30) == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.mark.slow
def test_a_switched_off_provider_leaves_no_queue(bench: Bench) -> None:
    """What waits for it dies at its age as long as another lane runs, or is purged at once."""
    bench.store(make_events("old", 3))
    bench.query("UPDATE outbox_payloads SET received_at = now() - '4 days'::interval")
    bench.store(make_events("new", 2))
    bench.query("INSERT INTO forward_lanes (provider, stopped_reason) VALUES ('mixpanel', 'why')")
    with bench.process(bench.settings | {"MIXPANEL_ENABLED": "false"}) as process:
        wait_until(lambda: len(bench.read_dead("mixpanel")) == 3)
        wait_until(lambda: bench.read_pending("amplitude") == set())
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert len(bench.read_pending("mixpanel")) == 2
    reason = f"given up after {timedelta(days=3)}: the provider is switched off"
    assert set(bench.read_dead("mixpanel").values()) == {reason}
    assert bench.query("SELECT stopped_reason FROM forward_lanes WHERE provider = 'mixpanel'") == [
        (None,)
    ]
