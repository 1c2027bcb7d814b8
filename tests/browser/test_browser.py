"""The client for pages, in Chromium, against a running service: each event once, or reported."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from selenium.webdriver import Chrome

from tests.service.test_faults import frozen
from tests.service.test_rate_limits import limited
from tests.support.browser import running_browser
from tests.support.clients import Tenant, open_tenant
from tests.support.ports import find_ports
from tests.support.services import Service, running_service, wait_until

pytestmark = pytest.mark.slow

CLIENT = Path(__file__).with_name("client.js")
SECONDS = 90.0
# The visitor's page. `leave` sends events and goes elsewhere before anything could be answered.
PAGE = """<!doctype html><meta charset="utf-8"><title>page</title><script src="/client.js"></script>
<script>
const asked = Object.fromEntries(new URLSearchParams(location.search));
const reports = [];
const report = (text, event) => reports.push([text, event ? event.event_id : null]);
const sender = new EventSender({ ...asked, report });
const send = (count, fields) => {
  for (let number = 0; number < count; number++) sender.send("custom", { name: "x", ...fields });
};
if (asked.leave) { send(Number(asked.leave)); location.href = "/elsewhere"; }
</script>"""


class Pages(BaseHTTPRequestHandler):
    """Serves the page, the client, and an empty page, of another origin than the API's."""

    def do_GET(self) -> None:
        """Answer with a page."""
        is_script = self.path == "/client.js"
        body = CLIENT.read_bytes() if is_script else PAGE.encode()
        if self.path == "/elsewhere":
            body = b"<!doctype html><title>elsewhere</title>"
        self.send_response(200)
        self.send_header("Content-Type", "text/javascript" if is_script else "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve HTTP on a free port; yield where."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def pages() -> Iterator[str]:
    """Serve the pages."""
    with serving(Pages) as url:
        yield url


@pytest.fixture
def browser() -> Iterator[Chrome]:
    """Run a browser that has never been anywhere."""
    with running_browser() as browser:
        yield browser


@dataclass
class Visitor:
    """A visitor of the page, and what becomes of the events that it sends."""

    browser: Chrome
    pages: str
    tenant: Tenant

    def visit(self, key: str | None = None, api: str | None = None, **asked: object) -> None:
        """Load the page."""
        url = f"{api or self.tenant.service.http_url}/v1/events"
        settings = {"url": url, "key": key or self.tenant.project.key}
        query = urlencode(settings | {"project": self.tenant.project.id} | asked)
        self.browser.get(f"{self.pages}/page?{query}")

    def send(self, count: int, **fields: object) -> None:
        """Let the page send events."""
        self.browser.execute_script("send(arguments[0], arguments[1])", count, fields)

    def set_offline(self, is_offline: bool) -> None:
        """Cut the browser off from the network, or connect it again."""
        self.browser.set_network_conditions(offline=is_offline, latency=0, throughput=-1)

    def read_reports(self) -> list[Any]:
        """Return what was reported to the page."""
        return list(self.browser.execute_script("return reports"))

    def count_kept(self) -> int:
        """Return how many events wait in localStorage."""
        return int(self.browser.execute_script("return localStorage.length"))

    def expect(self, sent: int, reported: int = 0) -> None:
        """Fail unless each event comes to be stored once or reported, and is kept no longer."""

        def is_settled() -> bool:
            found = len(self.tenant.read_rows()) + len(self.read_reports())
            return found >= sent and self.count_kept() == 0

        wait_until(is_settled, SECONDS)
        ids = [row["event_id"] for row in self.tenant.read_rows()]
        twice = len(ids) - len(set(ids))
        reports = len(self.read_reports())
        print(f"BROWSER sent={sent} stored={len(ids)} twice={twice} reported={reports}")  # noqa: T201
        assert (len(ids), twice, reports) == (sent - reported, 0, reported)


@pytest.fixture
def visitor(browser: Chrome, pages: str, tenant: Tenant) -> Visitor:
    """Return a visitor of the page, which sends to the shared service."""
    return Visitor(browser, pages, tenant)


def test_a_page_sends_its_events_in_time(visitor: Visitor) -> None:
    """Events of an ordinary visit are stored, and nothing is kept or reported."""
    visitor.visit()
    visitor.send(5)
    visitor.expect(5)


def test_events_of_a_page_left_at_once_arrive(visitor: Visitor) -> None:
    """On the first visit, with no preflight cached, the page is left as it loads."""
    visitor.visit(leave=3)
    wait_until(
        lambda: "elsewhere" in visitor.browser.execute_script("return document.title"), SECONDS
    )
    visitor.visit()
    visitor.expect(3)


def test_events_of_a_closed_tab_arrive(visitor: Visitor) -> None:
    """A tab is closed right after its events; what did not leave with it is sent next time."""
    first = visitor.browser.current_window_handle
    visitor.browser.switch_to.new_window("tab")
    visitor.visit()
    visitor.send(400)
    visitor.browser.close()
    visitor.browser.switch_to.window(first)
    visitor.visit()
    visitor.expect(400)


def test_a_tab_is_left_with_a_request_that_outlives_it(visitor: Visitor) -> None:
    """What fits into one request arrives without another visit, when the preflight is cached."""
    first = visitor.browser.current_window_handle
    visitor.browser.switch_to.new_window("tab")
    visitor.visit()
    visitor.send(1)
    wait_until(lambda: len(visitor.tenant.read_rows()) == 1, SECONDS)
    visitor.send(20)
    visitor.browser.close()
    visitor.browser.switch_to.window(first)
    wait_until(lambda: len(visitor.tenant.read_rows()) == 21, SECONDS)


@pytest.mark.parametrize("count", [10, 1500])
def test_events_of_an_offline_page_are_sent_later(count: int, visitor: Visitor) -> None:
    """Without a network they are kept, and with it again they are sent."""
    visitor.visit()
    visitor.set_offline(True)
    visitor.send(count)
    time.sleep(3)
    assert visitor.count_kept() == count
    assert visitor.tenant.read_rows() == []
    visitor.set_offline(False)
    visitor.expect(count)


def test_two_tabs_share_what_is_kept(visitor: Visitor) -> None:
    """What both have kept is stored once, though both send it: one is loaded again meanwhile."""
    first = visitor.browser.current_window_handle
    visitor.visit()
    visitor.browser.switch_to.new_window("tab")
    second = visitor.browser.current_window_handle
    visitor.visit()
    visitor.set_offline(True)
    visitor.send(200)
    visitor.browser.switch_to.window(first)
    visitor.send(300)
    assert visitor.count_kept() == 500
    visitor.set_offline(False)
    visitor.browser.switch_to.window(second)
    visitor.visit()
    visitor.expect(500)


def test_rejected_events_are_reported_to_the_page(visitor: Visitor) -> None:
    """An event that breaks a rule is reported with its reason, and its neighbours are stored."""
    visitor.visit()
    visitor.send(4)
    visitor.send(1, duration_ms="soon")
    visitor.expect(5, reported=1)
    [[text, event_id]] = visitor.read_reports()
    assert text == "duration_ms: must be an integer"
    assert event_id.startswith("evt-")


def test_a_full_store_is_reported_to_the_page(visitor: Visitor) -> None:
    """What is sent while 5,000 events wait is reported, and the others are stored."""
    visitor.visit()
    visitor.set_offline(True)
    visitor.send(5002)
    visitor.set_offline(False)
    visitor.expect(5002, reported=2)


def test_a_page_without_a_valid_key_keeps_its_events(visitor: Visitor) -> None:
    """It stops, and reports why; a page with a valid key sends them."""
    visitor.visit(key="pgk_wrong")
    visitor.send(7)
    wait_until(visitor.read_reports, SECONDS)
    assert visitor.read_reports() == [["401: missing or invalid API key", None]]
    assert visitor.count_kept() == 7
    visitor.visit()
    visitor.expect(7)


def test_a_limited_page_comes_again_when_it_may(
    browser: Chrome, pages: str, tenant: Tenant
) -> None:
    """After a 429 it waits as long as Retry-After says."""
    slow = limited(tenant, event_rate=10)
    slow.post_events(slow.make_events(200))
    slow.take_rows()
    visitor = Visitor(browser, pages, slow)
    visitor.visit()
    visitor.send(5)
    visitor.expect(5)

    def find_statuses() -> set[int]:
        records = [line for line in tenant.service.read_log() if line["message"] == "request"]
        return {line["status"] for line in records if line.get("project") == tenant.project.id}

    wait_until(lambda: {202, 429} <= find_statuses())


def test_events_survive_a_frozen_database(
    browser: Chrome, pages: str, open_directory: Path
) -> None:
    """While the database stands still for 8 s, nothing is lost and nothing stored twice."""
    directory = open_directory / "frozen-browser"
    with (
        running_service({"DATA_DIR": str(directory), "REQUEST_TIMEOUT_SECONDS": "2"}) as service,
        open_tenant(service) as tenant,
    ):
        visitor = Visitor(browser, pages, tenant)
        visitor.visit()
        visitor.send(3)
        wait_until(lambda: len(tenant.read_rows()) == 3, SECONDS)
        with frozen(directory):
            visitor.send(20)
            time.sleep(8)
        visitor.expect(23)


def test_events_survive_a_restart(
    browser: Chrome, pages: str, open_directory: Path, service: Service
) -> None:
    """What is sent while the service is away is stored when it is back."""
    del service
    [port] = find_ports(1)
    settings = {"DATA_DIR": str(open_directory / "restarted"), "PORT": str(port)}
    with running_service(settings) as first, open_tenant(first) as tenant:
        visitor = Visitor(browser, pages, tenant)
        visitor.visit()
        visitor.send(3)
        wait_until(lambda: len(tenant.read_rows()) == 3, SECONDS)
        first.stop()
        visitor.send(20)
        time.sleep(3)
        project = tenant.project
    with running_service(settings) as second, open_tenant(second) as other:
        visitor.tenant = Tenant(second, project, other.database)
        visitor.expect(23)


EVERY_HEADER = """
return (async (url, key) => {
  const gzip = new Blob(['{"events":[]}']).stream().pipeThrough(new CompressionStream("gzip"));
  const answer = await fetch(url, {
    method: "POST",
    headers: {
      "Content-Type": "application/json",
      "Content-Encoding": "gzip",
      "X-PG-API-Key": key,
      "X-Request-ID": "mine",
      "Prefer": "handling=strict",
      "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    },
    body: await new Response(gzip).blob(),
  });
  const read = ["Preference-Applied", "X-Request-ID"].map((name) => answer.headers.get(name));
  return [answer.status, ...read];
})(...arguments)"""


def test_a_page_may_send_every_header_that_is_read(visitor: Visitor) -> None:
    """The browser's preflight lets them pass, and the page can read those of the answer."""
    visitor.visit()
    url, key = f"{visitor.tenant.service.http_url}/v1/events", visitor.tenant.project.key
    answer = visitor.browser.execute_script(EVERY_HEADER, url, key)
    assert answer == [202, "handling=strict", "mine"]


class Picky(BaseHTTPRequestHandler):
    """Answers 400 to a request with a poisonous event, as a proxy might, and 202 to others."""

    taken: list[str] = []  # noqa: RUF012 - the test looks here

    def do_OPTIONS(self) -> None:
        """Allow everything."""
        self._answer(204, None)

    def do_POST(self) -> None:
        """Take events, unless one is poisonous."""
        events = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["events"]
        if any("poison" in event for event in events):
            self._answer(400, {"error": "poison"})
        else:
            self.taken += [event["event_id"] for event in events]
            self._answer(202, {"accepted": len(events), "rejected": 0, "errors": []})

    def _answer(self, status: int, body: object) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        for name in ("Origin", "Headers"):
            self.send_header(f"Access-Control-Allow-{name}", "*")
        self.send_header("Access-Control-Allow-Headers", "content-type,x-pg-api-key")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def test_a_poisoned_request_is_halved_until_it_passes(visitor: Visitor) -> None:
    """On 400 the one event that is to blame is found and reported, and all others are taken."""
    with serving(Picky) as api:
        visitor.visit(api=api)
        visitor.send(20)
        visitor.send(1, poison=True)
        visitor.send(12)
        wait_until(lambda: visitor.read_reports() and not visitor.count_kept(), SECONDS)
        [[text, _]] = visitor.read_reports()
        assert text == "poison"
    assert len(Picky.taken) == len(set(Picky.taken)) == 32
