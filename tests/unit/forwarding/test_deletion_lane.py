"""Providers are asked to delete a person until they do, whatever they answer."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.config import DeletionAccess
from server.events.persons import Person
from server.forwarding import http_client
from server.forwarding.providers.amplitude import Amplitude
from server.forwarding.providers.mixpanel import Mixpanel
from server.forwarding.providers.provider import CURRENT_MAPPING_VERSION, Answer
from server.privacy.digests import Digests
from server.privacy.sealing import Unsealable, seal_person, unseal_person
from server.storage.connection import connected, open_engine
from server.storage.outbox import Lease
from server.storage.provider_deletions import (
    ACCEPTED,
    DONE,
    FAILED,
    IMPOSSIBLE,
    UNKNOWN,
    WAITING,
    Progress,
    ProviderDeletion,
    claim_deletion,
    record_progress,
)
from tests.support.database import PROVIDERS
from tests.support.deletion_servers import (
    AmplitudeDeletionServer,
    DeletionServer,
    MixpanelDeletionServer,
)
from tests.support.deletions import PRIVACY_SECRET, DeletionBench, build_service
from tests.support.events import make_message
from tests.support.provider_servers import HTML, Fault, Reply, Script

USER = "žofie o'neill\"x <z@example.org>"
ACCESS = DeletionAccess("https://localhost/delete", "key", "s3cret", 1.0)
each = pytest.mark.parametrize("name", PROVIDERS)


@pytest.fixture
def servers() -> Iterator[dict[str, DeletionServer]]:
    """Both providers' servers, by their names."""
    with AmplitudeDeletionServer() as one, MixpanelDeletionServer() as other:
        yield {"amplitude": one, "mixpanel": other}


@pytest.fixture
def deletions(url: str, servers: dict[str, DeletionServer]) -> DeletionBench:
    """Return a bench without deletions."""
    bench = DeletionBench(url, servers)
    bench.query("TRUNCATE person_deletions, provider_deletions, forward_lanes")
    return bench


@pytest.fixture
def person() -> Person:
    """Return a person of two ids."""
    return Person("p", USER, ("a1",))


def test_both_providers_are_asked_by_the_ids_that_events_had(
    deletions: DeletionBench, person: Person
) -> None:
    """Amplitude is asked by the user, Mixpanel by user and devices; then the ids are gone."""
    receipt = deletions.delete(person)
    assert [(row.provider, row.state) for row in deletions.read(receipt)] == [
        (name, WAITING) for name in PROVIDERS
    ]
    assert all(deletions.ask(name) for name in PROVIDERS)
    documents = {name: server.asked[0].document for name, server in deletions.servers.items()}
    assert documents == {
        "amplitude": {
            "user_ids": [USER],
            "requester": "productgraph",
            "ignore_invalid_id": "true",
        },
        "mixpanel": {"distinct_ids": [USER, "$device:a1"], "compliance_type": "GDPR"},
    }
    assert [(row.state, row.detail, row.job) for row in deletions.read(receipt)] == [
        (ACCEPTED, "staging", "2031-02-28"),
        (ACCEPTED, "pending", "1583792934719392965"),
    ]
    assert deletions.query("SELECT count(sealed) FROM provider_deletions") == [(0,)]
    assert not any(deletions.ask(name) for name in PROVIDERS)


@given(user=st.text(), device=st.text(min_size=1))
def test_a_deletion_names_ids_as_events_do(user: str, device: str) -> None:
    """Whatever the ids are, both APIs of a provider get them in the same form."""
    event = make_message("p", "e", user_id=user)
    event.attributes["user.anonymous_id"] = device
    person = Person("p", user, (device,))
    encoded = event.SerializeToString()
    sent = orjson.loads(Amplitude("", "").encode_event(encoded, CURRENT_MAPPING_VERSION))
    asked = build_service("amplitude", ACCESS).request_deletion(person)
    assert asked
    if user:
        assert orjson.loads(asked.body)["user_ids"] == [sent["user_id"]]
    wanted = [user] if user else []
    for known in ([*wanted], []):
        event.user_id = known[0] if known else ""
        encoded = event.SerializeToString()
        sent = orjson.loads(Mixpanel("", "").encode_event(encoded, CURRENT_MAPPING_VERSION))
        person = Person("p", known[0] if known else None, () if known else (device,))
        asked = build_service("mixpanel", ACCESS).request_deletion(person)
        assert asked
        # Blanks alone are no device for the mapping, which takes the session instead.
        if known or not device.isspace():
            ids = orjson.loads(asked.body)["distinct_ids"]
            assert ids == [sent["properties"]["distinct_id"]]


FAILURES = {
    "500": Script(Reply(500, HTML)),
    "503": Script(Reply(503, b"")),
    "429": Script(Reply(429, b"{}", {"Retry-After": "1"})),
    "no JSON": Script(Reply(200, HTML)),
    "no job": Script(Reply(200, b'{"status": "ok", "results": []}')),
    "moved": Script(Reply(302, b"", {"Location": "https://example.org"})),
    "wrong place": Script(Reply(404, HTML)),
    "forbidden": Script(Reply(403, b"{}")),
    "malformed": Script(Reply(400, b"{}")),
    "hang": Script(fault=Fault.HANG),
    "reset": Script(fault=Fault.RESET),
    "cut": Script(fault=Fault.CUT_SHORT),
}


@pytest.mark.parametrize(
    ("name", "script"),
    [(PROVIDERS[number % 2], script) for number, script in enumerate(FAILURES.values())],
    ids=FAILURES,
)
def test_a_deletion_that_fails_is_asked_again(
    deletions: DeletionBench,
    person: Person,
    name: str,
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever goes wrong, the deletion waits with the reason, and is taken the next time."""
    receipt = deletions.delete(person, [name])
    deletions.servers[name].scripts.append(script)
    with monkeypatch.context() as impatient:
        impatient.setattr(http_client, "TOTAL_SECONDS", 2.0)
        assert deletions.ask(name)
    [row] = deletions.read(receipt)
    assert (row.state, row.attempts, bool(row.last_error)) == (WAITING, 1, True)
    deletions.hasten()
    assert deletions.ask(name)
    [row] = deletions.read(receipt)
    assert (row.state, row.attempts, row.last_error) == (ACCEPTED, 0, None)


def seconds_to_next_try(row: ProviderDeletion) -> float:
    """Return in how many seconds a provider is asked again."""
    assert row.next_try_at is not None
    return (row.next_try_at - datetime.now(UTC)).total_seconds()


@each
def test_refused_credentials_pause_all_deletions_of_a_provider(
    deletions: DeletionBench, person: Person, name: str
) -> None:
    """After a 401 nothing is asked for minutes; with the right credentials it goes on."""
    server = deletions.servers[name]
    receipts = [deletions.delete(each, [name]) for each in (person, Person("p", "other"))]
    wrong = replace(server.access(), secret="wrong")
    assert [deletions.ask(name, wrong) for _ in range(3)] == [True, False, False]
    refused, other = (deletions.read(receipt)[0] for receipt in receipts)
    assert refused.last_error is not None
    assert refused.last_error.startswith("401")
    assert seconds_to_next_try(refused) > 120
    assert seconds_to_next_try(other) > 120
    assert len(server.asked) == 1
    deletions.hasten()
    assert [deletions.ask(name) for _ in range(3)] == [True, True, False]
    assert {deletions.read(receipt)[0].state for receipt in receipts} == {ACCEPTED}


@each
def test_a_provider_is_not_asked_before_its_retry_after(
    deletions: DeletionBench, person: Person, name: str
) -> None:
    """A 429 pauses all deletions of the provider for as long as it says."""
    deletions.delete(person, [name])
    other = deletions.delete(Person("p", "other"), [name])
    deletions.servers[name].scripts.append(Script(Reply(429, b"", {"Retry-After": "600"})))
    assert [deletions.ask(name) for _ in range(2)] == [True, False]
    assert seconds_to_next_try(deletions.read(other)[0]) > 400


@each
def test_a_refused_deletion_delays_no_others(
    deletions: DeletionBench, person: Person, name: str
) -> None:
    """A 400 is about one person: the next one is asked for at once."""
    receipts = [deletions.delete(each, [name]) for each in (person, Person("p", "other"))]
    deletions.servers[name].scripts.append(Script(Reply(400, b'{"error": "bad"}')))
    assert [deletions.ask(name) for _ in range(3)] == [True, True, False]
    refused, other = (deletions.read(receipt)[0] for receipt in receipts)
    assert (refused.state, refused.last_error) == (WAITING, '400 {"error":"bad"}')
    assert other.state == ACCEPTED


def test_lanes_share_the_pause_between_deletions(deletions: DeletionBench) -> None:
    """Of several lanes only one asks within the pause, however much is due."""
    for user in ("u1", "u2", "u3"):
        deletions.delete(Person("p", user), ["mixpanel"])
    access = deletions.servers["mixpanel"].access(600.0)
    assert [deletions.ask("mixpanel", access) for _ in range(4)] == [True, False, False, False]
    deletions.query("UPDATE forward_lanes SET deletions_after = now()")
    assert [deletions.ask("mixpanel", access) for _ in range(2)] == [True, False]
    assert len(deletions.servers["mixpanel"].asked) == 2


def test_a_claimed_deletion_is_asked_again_when_its_lease_ends(
    deletions: DeletionBench, person: Person
) -> None:
    """What a killed forwarder had claimed is asked by another one, and a late record is void."""
    receipt = deletions.delete(person, ["mixpanel"])
    lease, mark = Lease(uuid4(), 60.0), Digests(PRIVACY_SECRET).mark
    with connected(open_engine(deletions.url)) as connection:
        claimed = claim_deletion(connection, "mixpanel", lease, 0.0, mark)
        assert claimed
        assert not deletions.ask("mixpanel")
        deletions.hasten()
        assert deletions.ask("mixpanel")
        record_progress(connection, "mixpanel", lease.id, claimed.id, Progress(FAILED, None))
    assert deletions.read(receipt)[0].state == ACCEPTED


def test_amplitude_deletes_nobody_by_anonymous_ids(deletions: DeletionBench) -> None:
    """Who is known by anonymous ids alone is said to be impossible to delete there."""
    receipt = deletions.delete(Person("p", None, ("a1", "a2")))
    assert all(deletions.ask(name) for name in PROVIDERS)
    amplitude, mixpanel = deletions.read(receipt)
    assert (amplitude.state, amplitude.detail) == (IMPOSSIBLE, "it deletes nobody by anonymous ids")
    assert amplitude.ended_at is not None
    assert deletions.servers["amplitude"].asked == []
    assert mixpanel.state == ACCEPTED
    assert deletions.servers["mixpanel"].deleted == {"$device:a1", "$device:a2"}


def test_whom_amplitude_does_not_know_is_asked_for_an_hour(
    deletions: DeletionBench, servers: dict[str, DeletionServer], person: Person
) -> None:
    """What was delivered a moment ago may not be known yet: only later it counts as unknown."""
    server = servers["amplitude"]
    assert isinstance(server, AmplitudeDeletionServer)
    server.unknown = frozenset({USER})
    early, late = (deletions.delete(person, ["amplitude"]) for _ in range(2))
    long_ago = (
        "UPDATE provider_deletions SET requested_at = now() - interval '2 h' WHERE receipt_id = %s"
    )
    deletions.query(long_ago, late.id)
    assert [deletions.ask("amplitude") for _ in range(3)] == [True, True, False]
    [waiting], [ended] = map(deletions.read, (early, late))
    assert (waiting.state, waiting.detail) == (WAITING, "not known there so far")
    assert (ended.state, ended.next_try_at) == (UNKNOWN, None)
    server.unknown = frozenset()
    deletions.hasten()
    assert deletions.ask("amplitude")
    assert deletions.read(early)[0].state == ACCEPTED


@pytest.mark.parametrize(
    ("name", "answered", "state"),
    [
        ("amplitude", "Staging", ACCEPTED),
        ("amplitude", "Submitted", ACCEPTED),
        ("amplitude", "Done", DONE),
        *(("mixpanel", answered, ACCEPTED) for answered in ("STAGING", "STARTED", "UNKNOWN")),
        ("mixpanel", "SUCCESS", DONE),
        ("mixpanel", "FAILURE", FAILED),
        ("mixpanel", "REVOKED", FAILED),
    ],
)
def test_an_accepted_deletion_is_followed_to_its_end(
    deletions: DeletionBench, person: Person, name: str, answered: str, state: str
) -> None:
    """The provider is asked how far its job is until it is done or has failed."""
    receipt = deletions.delete(person, [name])
    deletions.ask(name)
    deletions.servers[name].state = answered
    deletions.hasten()
    assert deletions.ask(name)
    [row] = deletions.read(receipt)
    assert (row.state, row.detail, row.last_error) == (state, answered.lower(), None)
    assert (row.ended_at is None) == (row.next_try_at is not None) == (state == ACCEPTED)


@each
def test_a_question_about_a_job_may_fail(
    deletions: DeletionBench, person: Person, name: str
) -> None:
    """The job stays accepted, and an answer that may name the person is not kept."""
    receipt = deletions.delete(person, [name])
    deletions.ask(name)
    deletions.servers[name].scripts.append(Script(Reply(404, USER.encode())))
    deletions.hasten()
    assert deletions.ask(name)
    [row] = deletions.read(receipt)
    assert (row.state, row.last_error) == (ACCEPTED, "404")
    assert row.detail in ("staging", "pending")


@each
def test_a_job_that_never_ends_counts_as_failed(
    deletions: DeletionBench, person: Person, name: str
) -> None:
    """Two months after its acceptance nobody waits for a job any more."""
    receipt = deletions.delete(person, [name])
    deletions.ask(name)
    deletions.query("UPDATE provider_deletions SET accepted_at = now() - interval '61 days'")
    deletions.hasten()
    assert deletions.ask(name)
    assert deletions.read(receipt)[0].state == FAILED


def test_many_ids_of_a_person_go_out_in_several_requests(deletions: DeletionBench) -> None:
    """More ids than a request may have are all asked for."""
    ids = tuple(f"a{number}" for number in range(2500))
    receipt = deletions.delete(Person("p", "u", ids))
    for name in PROVIDERS:
        while deletions.ask(name):
            pass
    assert deletions.servers["mixpanel"].deleted == {"u", *(f"$device:{each}" for each in ids)}
    assert deletions.servers["amplitude"].deleted == {"u"}
    states = [(row.provider, row.state) for row in deletions.read(receipt)]
    assert states.count(("mixpanel", ACCEPTED)) == 3
    assert states.count(("amplitude", IMPOSSIBLE)) == 2


def test_nothing_is_asked_under_another_secret(deletions: DeletionBench, person: Person) -> None:
    """What was sealed under another PRIVACY_SECRET waits for that one, and delays nothing."""
    receipt = deletions.delete(person, ["mixpanel"])
    assert not deletions.ask("mixpanel", secret=PRIVACY_SECRET[::-1])
    assert deletions.read(receipt)[0].attempts == 0
    assert deletions.ask("mixpanel")


def test_ids_that_cannot_be_decrypted_delay_nobody(
    deletions: DeletionBench, person: Person
) -> None:
    """What was changed in the table waits with that reason, and the next person is asked for."""
    receipts = [deletions.delete(each, ["mixpanel"]) for each in (person, Person("p", "other"))]
    spoil = "UPDATE provider_deletions SET sealed = substr(sealed, 2) WHERE receipt_id = %s"
    deletions.query(spoil, receipts[0].id)
    assert [deletions.ask("mixpanel") for _ in range(3)] == [True, True, False]
    spoilt, other = (deletions.read(receipt)[0] for receipt in receipts)
    assert (spoilt.state, spoilt.last_error) == (WAITING, "its ids cannot be decrypted")
    assert other.state == ACCEPTED


@given(st.text(), st.lists(st.text(min_size=1), max_size=5))
def test_sealed_ids_open_under_their_secret_alone(user: str, anonymous: list[str]) -> None:
    """Any ids come back as they were, in no clear text, and under no other secret."""
    person = Person("p", user, tuple(anonymous))
    [sealed] = seal_person(Digests(PRIVACY_SECRET), person)
    assert unseal_person(Digests(PRIVACY_SECRET), sealed) == person
    with pytest.raises(Unsealable):
        unseal_person(Digests(PRIVACY_SECRET[::-1]), sealed)


ECHOES: list[Callable[[str], bytes]] = [
    lambda user: f"no such user: {user}".encode(),
    lambda user: json.dumps({"error": f"no {user}", "ids": [user]}).encode(),
    lambda user: orjson.dumps({"invalid": {user: 1}}),
]


@pytest.mark.parametrize("user", ["u7", USER, "0123456789", "na\tme", "ünï"])
def test_an_error_of_a_deletion_names_nobody(deletions: DeletionBench, user: str) -> None:
    """What a provider says about a refused deletion is kept without id and credentials."""
    server = deletions.servers["mixpanel"]
    receipt = deletions.delete(Person("p", user), ["mixpanel"])
    for echo in ECHOES:
        body = echo(user) + f" {server.secret} {server.project_key}".encode()
        server.scripts.append(Script(Reply(400, body)))
        deletions.hasten()
        assert deletions.ask("mixpanel")
        [row] = deletions.read(receipt)
        assert row.last_error
        for hidden in (user, json.dumps(user)[1:-1], server.secret, server.project_key):
            assert hidden not in row.last_error


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["day", "status", "invalid_ids", "results", "tracking_id", "task_id"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(value=JSON)
@each
def test_any_answer_to_a_deletion_can_be_read(name: str, value: Any) -> None:
    """No answer is an error, and only a job that has a name is one."""
    service = build_service(name, ACCESS)
    answer = Answer(200, {}, orjson.dumps(value))
    ruling = service.read_deletion(Person("p", "u"), answer)
    assert ruling is None or ruling.state == UNKNOWN or ruling.job
    service.read_state("2031-02-28", answer)
