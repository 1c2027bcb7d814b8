"""The README's pictures of the console, taken by a real browser of a service under a small load.

They are kept if PICTURES names a directory; PICTURE_SECONDS is how long events come before.
"""

import base64
import math
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson
import pytest
from selenium.webdriver import Chrome

from tests.support.browser import click, prefer_scheme, resize, running_browser, wait_for_text
from tests.support.clients import HttpConnection
from tests.support.console import PASSWORD, SETTINGS, make_credentials
from tests.support.events import Event, make_event
from tests.support.forwarding import enable_providers
from tests.support.provider_servers import AmplitudeServer, MixpanelServer, Reply, Script
from tests.support.services import Service, running_service

pytestmark = pytest.mark.slow

SECRET = "secret"
SECONDS = float(os.environ.get("PICTURE_SECONDS", "10"))
BUSY = Script(Reply(503, b'{"error": "Service temporarily unavailable"}'))
PAGES = ["/", "/products", "/products/lamp", "/cart", "/checkout", "/account/orders"]
ERRORS = [("TypeError", "Cannot read properties of undefined"), ("NetworkError", "Failed to fetch")]
VISITORS = [(f"user_{number:03}", f"sess_{uuid.uuid4().hex[:8]}") for number in range(40)]


def make_visit(project: str) -> Event:
    """Make one thing that a visitor of a shop does."""
    page = random.choice(PAGES)
    kinds: list[dict[str, object]] = [
        {"event.type": "page.view", "page.title": "Lamps & more"},
        {"event.type": "ui.click", "ui.component.name": "AddToCart", "ui.element.text": "Add"},
        {"event.type": "ui.input", "ui.component.name": "SearchField"},
        {
            "event.type": "api.response",
            "api.method": random.choice(["GET", "POST"]),
            "api.path": f"/api{page}",
            "api.status_code": random.choice([200, 200, 201, 404]),
            "api.duration_ms": random.randint(8, 400),
        },
    ]
    if random.random() < 0.06:
        name, text = random.choice(ERRORS)
        kinds = [{"event.type": "error", "error.type": name, "error.message": text}]
    user, session = random.choice(VISITORS)
    moment = datetime.now(UTC) - timedelta(milliseconds=random.randint(5, 900))
    common = {
        "event.timestamp": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "page.path": page,
        "session.id": session,
        "user.id": user,
        "plan": "pro",
        "metadata": {"release": "2026.11.3", "cart": {"items": random.randint(0, 5)}},
    }
    return make_event(project, f"evt_{uuid.uuid4()}", common | random.choice(kinds))


# Names that get a wrong value, the frequent mistakes more than once.
MISTAKES = (
    *[("event.type", "page.vew")] * 6,
    *[("session.id", "")] * 3,
    ("event.type", "click"),
    ("event.timestamp", "yesterday"),
)


@pytest.fixture(scope="module")
def shop(open_directory: Path) -> Iterator[Service]:
    """Provide a service that forwards to a provider that is well, and to one that is busy."""
    with AmplitudeServer(SECRET) as amplitude, MixpanelServer(SECRET) as mixpanel:
        mixpanel.behave = lambda _: BUSY
        providers = enable_providers({"amplitude": amplitude, "mixpanel": mixpanel}, SECRET)
        settings = {"DATA_DIR": str(open_directory / "shop")} | providers | SETTINGS
        with running_service(settings) as service:
            yield service


def visit_shop(service: Service, seconds: float) -> None:
    """Send what visitors do, in waves, with repetitions and mistakes."""
    keys = {
        project: service.run(
            *("keys", "create", "--project", project, "--name", name, *limits)
        ).stdout.strip()
        for project, name, limits in (
            ("web-shop", "browsers", ("--rate", "2000")),
            ("back-office", "server", ()),
        )
    }
    with ExitStack() as stack:
        connections = {
            project: stack.enter_context(closing(HttpConnection(service.http_port, key)))
            for project, key in keys.items()
        }
        wrong = [make_visit("web-shop") | dict([mistake]) for mistake in MISTAKES]
        connections["web-shop"].begin(orjson.dumps({"events": wrong}))
        assert connections["web-shop"].end().status == 202
        began = time.monotonic()
        while (now := time.monotonic()) < began + seconds:
            count = int(60 + 45 * math.sin((now - began) / 19) + random.randint(0, 25))
            for project, connection in connections.items():
                send_batch(connection, project, 6 if project == "back-office" else count)
            time.sleep(1.0)


def send_batch(connection: HttpConnection, project: str, size: int) -> None:
    """Send what visitors do, some of it twice, and now and then with mistakes."""
    events = [make_visit(project) for _ in range(max(2, size))]
    if random.random() < 0.25:
        events += [make_visit(project) | dict([random.choice(MISTAKES)])]
    for _ in range(2 if random.random() < 0.08 else 1):
        connection.begin(orjson.dumps({"events": events}))
        assert connection.end().status == 202


@pytest.fixture
def take(running: Chrome, tmp_path: Path) -> Callable[[str, int, int, str], Path]:
    """Return what takes a picture of the page, of this size and with these colours."""
    directory = Path(os.environ.get("PICTURES", tmp_path))

    def take(name: str, width: int, height: int, scheme: str) -> Path:
        resize(running, width, height)
        prefer_scheme(running, scheme)
        time.sleep(2.5)  # what has just arrived is marked for a moment
        options = {"format": "webp", "quality": 82}
        picture = running.execute_cdp_cmd("Page.captureScreenshot", options)
        path = directory / f"{name}-{scheme}.webp"
        path.write_bytes(base64.b64decode(picture["data"]))
        return path

    return take


@pytest.fixture(scope="module")
def running() -> Iterator[Chrome]:
    """Provide the browser, which knows the password."""
    with running_browser() as browser:
        browser.execute_cdp_cmd("Network.enable", {})
        headers = {"headers": {"Authorization": make_credentials(PASSWORD)}}
        browser.execute_cdp_cmd("Network.setExtraHTTPHeaders", headers)
        yield browser


def test_pictures_of_the_console_can_be_taken(
    shop: Service, running: Chrome, take: Callable[[str, int, int, str], Path]
) -> None:
    """The page under load, in both colours, an event of it, and how it looks on a phone."""
    visit_shop(shop, SECONDS)
    place = shop.metrics_url.removesuffix("/metrics")
    running.get(place)
    wait_for_text(running, "#tail", "web-shop")
    wait_for_text(running, "#reasons", "did you mean")  # of the newest in a group
    wait_for_text(running, "#lanes", "failing")
    pictures = [take("console", 1440, 900, scheme) for scheme in ("light", "dark")]
    pictures.append(take("console-phone", 390, 844, "light"))
    resize(running, 1440, 900)
    click(running, "#tail a")
    wait_for_text(running, "#found", "stored")
    pictures.append(take("console-event", 1440, 900, "light"))
    for picture in pictures:
        content = picture.read_bytes()
        assert content[:4] == b"RIFF"
        assert 10_000 < len(content) < 200_000
