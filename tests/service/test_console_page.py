"""The console in a real browser."""

import json
import re
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.support.browser import (
    click,
    prefer_scheme,
    read_complaints,
    read_text,
    read_texts,
    resize,
    running_browser,
    wait_for_text,
)
from tests.support.clients import Tenant, open_tenant
from tests.support.services import Service, running_service, wait_until

pytestmark = pytest.mark.slow

# Notes a figure in the report of a run (--junitxml).
Note = Callable[[str, object], None]

SCRIPT = "<script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"


@pytest.fixture(scope="module")
def service(open_directory: Path) -> Iterator[Service]:
    """Provide a service as `scripts/serve` starts it, whose console needs no password."""
    with running_service({"DATA_DIR": str(open_directory / "console")}) as running:
        yield running


@pytest.fixture(scope="module")
def tenant(service: Service) -> Iterator[Tenant]:
    """Provide a project of that service."""
    with open_tenant(service) as tenant:
        yield tenant


@pytest.fixture(scope="module")
def running() -> Iterator[Chrome]:
    """Provide the browser."""
    with running_browser() as browser:
        yield browser


@pytest.fixture
def page(running: Chrome, service: Service) -> Iterator[Chrome]:
    """Provide the browser with the console in it, which must give it nothing to complain of."""
    resize(running, 1280, 900)
    prefer_scheme(running, "light")
    running.get(find_console(service))
    wait_for_text(running, "#state", "1 worker")
    yield running
    assert read_complaints(running) == []


def find_console(service: Service) -> str:
    """Return the address that the banner names."""
    found = re.search(r"See events at (http://localhost:\d+)/\n", service.output.read_text())
    assert found
    return found[1]


def make_event(tenant: Tenant, **changes: object) -> dict[str, Any]:
    """Make an event of this moment with an id of its own."""
    moment = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    names = {"event_id": f"evt_{uuid.uuid4()}", "event.timestamp": moment}
    return tenant.make_event({**names, **changes})


def search(page: Chrome, event_id: str) -> None:
    """Look for an event by its id."""
    page.find_element(By.TAG_NAME, "body").send_keys("/")
    field = page.switch_to.active_element
    field.clear()
    field.send_keys(event_id, Keys.ENTER)


def close(page: Chrome) -> None:
    """Close what a search has found."""
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    wait_until(lambda: not page.find_element(By.ID, "sheet").is_displayed())


def test_an_event_is_seen_as_soon_as_it_is_sent(
    page: Chrome, tenant: Tenant, record_testsuite_property: Note
) -> None:
    """A stored event appears in the list by itself, and opens whole under its wire names."""
    event = make_event(tenant, **{"page.path": f"/{uuid.uuid4()}", "event.sequence": 2**63 - 1})
    event["metadata"] = {"cart": [{"id": 1.5}, None, True]}
    started = time.monotonic()
    tenant.post_events([event])
    wait_for_text(page, "#tail li", event["page.path"])
    record_testsuite_property("an event is seen after", time.monotonic() - started)
    click(page, "#tail a")
    wait_for_text(page, "#found h3", "stored")
    assert json.loads(read_text(page, "#found pre")) == event
    address = page.current_url
    page.get(address)
    wait_for_text(page, "#found h3", event["event_id"])
    close(page)


def test_a_rejected_event_is_seen_with_its_reason(
    page: Chrome, tenant: Tenant, record_testsuite_property: Note
) -> None:
    """A rejected event appears with its reason, opens, and is found by its id."""
    event = make_event(tenant, **{"event.type": "page.vew"})
    started = time.monotonic()
    tenant.post_events([event])
    wait_for_text(page, "#reasons", "page.vew")
    record_testsuite_property("a rejected event is seen after", time.monotonic() - started)
    click(page, "#reasons a")
    wait_for_text(page, "#found pre", event["event_id"])
    assert "rejected replay" in read_text(page, "#found")
    close(page)
    search(page, event["event_id"])
    wait_for_text(page, "#found", "page.vew")
    close(page)


def test_a_search_finds_what_the_list_no_longer_has(page: Chrome, tenant: Tenant) -> None:
    """Any stored event is found by its id, and what is not there is said to be missing."""
    events = [make_event(tenant) for _ in range(300)]
    tenant.post_events(events)
    search(page, events[0]["event_id"])
    wait_for_text(page, "#found pre", events[0]["event_id"])
    close(page)
    search(page, "nobody has sent it")
    wait_for_text(page, "#found", "no event 'nobody has sent it'")
    wait_until(lambda: "Failed to load resource" in "".join(read_complaints(page)))
    close(page)


def test_the_plot_moves_with_what_is_sent(
    page: Chrome, tenant: Tenant, record_testsuite_property: Note
) -> None:
    """The plot and its numbers grow with stored, repeated and rejected events."""
    events = [make_event(tenant) for _ in range(50)]

    def read_shapes() -> list[str]:
        shapes: list[str] = page.execute_script(
            "return [...document.querySelectorAll('#plot path')].map((e) => e.getAttribute('d'))"
        )
        return shapes

    before = read_shapes()
    started = time.monotonic()
    tenant.post_events(events)
    tenant.post_events([*events, make_event(tenant, **{"event.type": "none"})])
    wait_until(lambda: all(map(str.__ne__, read_shapes(), before)))
    record_testsuite_property("the plot moves after", time.monotonic() - started)
    for name in ("stored", "duplicate", "rejected"):
        wait_for_text(page, f"#legend .{name} small", lambda text: int(text.split()[0]) > 0)


def test_usage_and_ends_of_keys_are_on_the_page(page: Chrome, tenant: Tenant) -> None:
    """The page shows what a project has used, and which of its keys is about to end."""
    tenant.post_events([make_event(tenant)])
    old = "UPDATE api_keys SET last_used_at = now(), expires_at = now() + interval '3 d'"
    tenant.database.cursor().execute(f"{old} WHERE project_id = %s", [tenant.project.id])
    wait_for_text(page, "#usage-list", tenant.project.id)
    wait_for_text(page, "#key-list", "expires in 2 d")
    wait_for_text(page, "#keys-note", "1 about to expire")


def test_hostile_texts_stay_texts_on_the_page(page: Chrome, tenant: Tenant) -> None:
    """Markup in every field of stored and rejected events is shown and never run."""
    names = ("session.id", "user.id", "page.path", "page.title", "error.type", "error.message")
    event = make_event(tenant, **dict.fromkeys(names, SCRIPT), metadata={SCRIPT: SCRIPT})
    event |= {"event_id": SCRIPT + uuid.uuid4().hex, SCRIPT: SCRIPT}
    tenant.post_events([event, {**event, "event.type": SCRIPT}])
    wait_for_text(page, "#tail", "<script>")
    wait_for_text(page, "#reasons", "<script>")
    click(page, "#tail a")
    wait_for_text(page, "#found pre", lambda text: text.count("<script>") >= 10)
    close(page)
    search(page, event["event_id"])
    wait_for_text(page, "#found", "rejected")
    assert page.find_elements(By.CSS_SELECTOR, "body script, img[onerror]") == []
    assert page.title == "ProductGraph events"
    close(page)


def test_the_page_can_be_used_by_keys_alone(page: Chrome, tenant: Tenant) -> None:
    """Without a mouse: pause, walk through the list, open an event and close it."""
    paths = {f"/{n}/{uuid.uuid4()}" for n in range(5)}
    tenant.post_events([make_event(tenant, **{"page.path": path}) for path in paths])
    # All of them: one that came later would take its place before the others.
    wait_until(lambda: paths <= set(read_texts(page, "#tail .subject")))
    page.find_element(By.TAG_NAME, "body").send_keys("p")
    wait_for_text(page, "#pause", "Resume")
    page.execute_script("document.querySelector('#tail a').focus()")
    page.switch_to.active_element.send_keys("j")
    second = page.switch_to.active_element.get_attribute("href")
    assert second == page.find_elements(By.CSS_SELECTOR, "#tail a")[1].get_attribute("href")
    page.switch_to.active_element.send_keys(Keys.ENTER)
    wait_for_text(page, "#found h3", "stored")
    close(page)
    tenant.post_events([late := make_event(tenant)])
    search(page, late["event_id"])
    wait_for_text(page, "#found pre", late["event_id"])
    close(page)
    assert late["event_id"] not in page.page_source.partition('id="sheet"')[0]
    page.find_element(By.TAG_NAME, "body").send_keys("p")
    wait_until(lambda: late["event_id"] in page.page_source.partition('id="sheet"')[0])


def test_filters_leave_what_was_asked_for(page: Chrome, tenant: Tenant) -> None:
    """A filter narrows the list, stands in the address, and is lifted again."""
    tenant.post_events([make_event(tenant, **{"user.id": "anna"}), make_event(tenant)])
    field = page.find_element(By.NAME, "user")
    field.send_keys("anna")
    wait_until(lambda: set(read_texts(page, "#tail .who")) == {"anna"})
    assert page.current_url.endswith("/?user=anna")
    page.refresh()
    wait_until(lambda: set(read_texts(page, "#tail .who")) == {"anna"})
    click(page, "#filters button")
    wait_until(lambda: "sess_1" in read_text(page, "#tail"))


@pytest.mark.parametrize("width", [320, 390, 768, 1024, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_every_width(page: Chrome, tenant: Tenant, width: int, scheme: str) -> None:
    """From a phone to a wide screen nothing sticks out, in light and in dark."""
    event = make_event(tenant, **{"page.path": "/" + "x" * 200, "event.type": "journey.step"})
    tenant.post_events([event, {**event, "event.type": "y" * 200}])
    prefer_scheme(page, scheme)
    resize(page, width, 900)
    wait_for_text(page, "#tail", "/xxx")
    wait_for_text(page, "#reasons", "yyy")
    for path in ("", "#sheet"):
        if path:
            click(page, "#tail a")
            wait_for_text(page, "#found h3", "")
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        assert find_overflowing(page, width) == []
    close(page)


def find_overflowing(page: Chrome, width: int) -> list[str]:
    """Return the elements that reach beyond the right edge of the page."""
    found: list[str] = page.execute_script(
        "return [...document.querySelectorAll('body *:not(.skip)')]"
        ".filter((e) => e.getBoundingClientRect().right > arguments[0] + 1)"
        ".map((e) => e.tagName + ' ' + e.className)",
        width,
    )
    return found
