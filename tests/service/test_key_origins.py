"""Which pages may use an API key: a browser names the origin of each."""

import json
from contextlib import closing
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.caller import Caller
from server.errors import PermissionDenied
from server.http.gate import BodyGate, Head
from server.ingest.admission import Admission
from server.ingest.key_cache import KeyCache
from server.storage.connection import connected, open_engine
from server.storage.keys import create_key, list_keys
from server.values import parse_pages
from tests.support.clients import Tenant, accepted, send
from tests.support.events import make_event, to_message
from tests.support.load import HttpClient
from tests.support.load import send as send_batch
from tests.support.projects import Project

SHOP, OTHER = "https://shop.example", "https://other.example"


@pytest.fixture
def shop(tenant: Tenant) -> Tenant:
    """Return the same project with a key for the pages of a shop."""
    with connected(open_engine(tenant.service.database_url)) as connection:
        key = create_key(connection, tenant.project.id, "shop", origins=[SHOP])
    return Tenant(tenant.service, Project(tenant.project.id, key), tenant.database)


def test_a_page_of_another_origin_cannot_use_a_key(shop: Tenant) -> None:
    """A browser's request from a page that is not listed is 403, stores nothing, and has CORS."""
    body = {"events": shop.make_events(1)}
    for origin in (
        OTHER,
        f"{SHOP}.evil.example",
        "http://shop.example",
        "null",
        "",
        f"{SHOP}, {OTHER}",
    ):
        answer = shop.post(body, origin=origin)
        assert (answer.status, answer.json) == (
            403,
            {"error": "this API key is not for pages of this origin"},
        )
        assert answer.headers["Access-Control-Allow-Origin"] == (origin or None)
        assert "Retry-After" not in answer.headers
    assert shop.read_rows() == []
    assert shop.post(body, origin=SHOP).json == accepted(1)
    assert len(shop.take_rows()) == 1


def test_services_need_no_origin_to_use_a_key(shop: Tenant) -> None:
    """A request without an Origin is taken over both protocols, and any key's without a list."""
    assert shop.post_events(shop.make_events(1)) == accepted(1)
    assert shop.ingest([to_message(shop.make_event())]) == accepted(1)


def test_no_body_of_another_page_is_kept() -> None:
    """The head of a request is enough to refuse it: its body is not received."""
    caller = Caller("p", 1, origins=frozenset({SHOP}))
    keys = cast(KeyCache, SimpleNamespace(known_caller=lambda _: caller))
    gate = BodyGate(Admission(keys), "/v1/events")

    def ask(**headers: str) -> object:
        head = {"command": "POST", "path": "/v1/events", "content_length": 1, "headers": headers}
        return gate(cast(Head, SimpleNamespace(**head)))

    assert isinstance(ask(ORIGIN=OTHER), PermissionDenied)
    assert ask(ORIGIN=SHOP) is True
    assert ask() is True


def test_a_preflight_is_answered_whatever_a_key_lists(shop: Tenant) -> None:
    """A preflight carries no key: it is answered for any page that the service lets in."""
    asked = {"origin": OTHER, "access_control_request_method": "POST"}
    answer = send(shop.service, "OPTIONS", "/v1/events", None, **asked)
    assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (204, OTHER)


def test_the_origins_of_a_key_can_be_changed(tenant: Tenant) -> None:
    """Origins are given with a key, shown, changed and lifted; what is none is refused."""
    run, service = tenant.service.run, tenant.service
    made = run("keys", "create", "--project", tenant.project.id, "--origins", f"{SHOP},{OTHER}:443")
    key = made.stdout.strip()
    with connected(open_engine(service.database_url)) as connection:
        number = str(max(k.id for k in list_keys(connection) if k.project_id == tenant.project.id))

    def shown() -> object:
        return json.loads(run("keys", "show", number, "--json").stdout)["origins"]

    assert shown() == [OTHER, SHOP]
    assert run("keys", "rotate", number).returncode == 0
    assert run("keys", "origins", number, "HTTP://Localhost:3000").returncode == 0
    assert shown() == ["http://localhost:3000"]
    assert "origins      http://localhost:3000\n" in run("keys", "show", number).stdout
    assert run("keys", "origins", number, "any").returncode == 0
    assert shown() is None
    with closing(HttpClient(service, key)) as client:
        assert send_batch(client, [make_event(tenant.project.id)]) == "202"
    for arguments, status in (
        (("999999999", SHOP), 1),
        ((number, "shop.example"), 2),
        ((number, "*"), 2),
        ((number, ","), 2),
    ):
        done = run("keys", "origins", *arguments)
        assert (done.returncode, done.stdout) == (status, "")


@settings(max_examples=200)
@given(st.text() | st.from_regex(r"https?://[a-z.]{1,9}(:[0-9]{1,4})?(/.*)?", fullmatch=True))
def test_every_text_lists_origins_or_is_refused(text: str) -> None:
    """Whatever is given lists origins as browsers spell them, or is refused as a whole."""
    try:
        pages = parse_pages(text)
    except ValueError:
        return
    assert pages
    assert parse_pages(",".join(pages)) == pages
