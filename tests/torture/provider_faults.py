"""Providers that answer badly or not at all, and a bad connection to them."""

import math
import time
from collections.abc import Sequence

from productgraph.v1.event_pb2 import Event as Message
from tests.support.patience import PATIENCE
from tests.support.provider_servers import HTML, Event, Script
from tests.support.provider_servers import Fault as Failure
from tests.support.services import wait_until
from tests.torture.clients import STORED
from tests.torture.events import REFUSED_USER
from tests.torture.providers import Remembering, answer
from tests.torture.proxy import Weather
from tests.torture.trial import Fault, Inject, Trial

# In which the provider that is well must have everything, while the other one is not.
UNHINDERED_SECONDS = 15.0 * PATIENCE
# A request is given up after 20 s, and the next one comes within a few more.
_CATCH_UP_SECONDS = 60.0 * PATIENCE
_THOUSAND = 1000


def find_missing(trial: Trial, provider: Remembering) -> set[str]:
    """Return the insert ids of acknowledged events that a provider takes and does not have."""
    batches = tuple(trial.load.acknowledged)
    kept = {i: name for b in batches for i, name in b.insert_ids.items() if i not in b.refused}
    return provider.find_missing(list(kept.values()))


def _misbehave(*scripts: Script) -> Inject:
    """Let one of the providers fail in one of these ways; the other one must not notice."""

    def inject(trial: Trial) -> float:
        names = trial.draw.sample(list(trial.cluster.providers), 2)
        ill, well = (trial.cluster.providers[name] for name in names)
        failures: list[Script] = []

        def behave(_: Sequence[Event]) -> Script:
            failures.append(trial.draw.choice(scripts))
            return failures[-1]

        ill.behave = behave
        try:
            trial.warm_up()
            wait_until(lambda: failures, 30.0 * PATIENCE)
            trial.load.stop()
            wait_until(lambda: not find_missing(trial, well), UNHINDERED_SECONDS)
        finally:
            ill.behave = lambda _: None
        return catch_up(trial, ill)

    return inject


def catch_up(trial: Trial, *providers: Remembering) -> float:
    """Wait until the providers have everything; return how long that took, in seconds.

    However slow the machine is, something must arrive again and again.
    """
    since = time.monotonic()
    trial.load.stop()
    least, deadline = math.inf, since + _CATCH_UP_SECONDS
    while missing := sum(len(find_missing(trial, provider)) for provider in providers):
        if missing < least:
            least, deadline = missing, time.monotonic() + _CATCH_UP_SECONDS
        assert time.monotonic() < deadline, f"{missing} events were waited for in vain"
        time.sleep(0.05)
    return time.monotonic() - since


def _refuse_one(trial: Trial) -> float:
    trial.warm_up()
    batch = trial.load.source.make_batch(size=_THOUSAND, refused=1, change=_refuse_first)
    trial.load.send_batch(trial.cluster.open_clients()[0], batch)
    seconds = catch_up(trial, *trial.cluster.providers.values())
    dead = len(trial.cluster.providers)
    wait_until(lambda: count_dead(trial, batch.refused) == dead, 30.0 * PATIENCE)
    return seconds


def _refuse_first(index: int, event: Message) -> None:
    if index == 0:
        event.user_id = REFUSED_USER


def count_dead(trial: Trial, refused: frozenset[str]) -> int:
    """Count the dead events with the one id of a batch that was refused."""
    [word] = (name.encode() for name in refused)
    found = trial.cluster.query("SELECT event FROM dead_events")
    return sum(word in bytes(event) for (event,) in found)


def _weather(weather: Weather) -> Inject:
    def inject(trial: Trial) -> float:
        name = trial.draw.choice(list(trial.cluster.providers))
        with trial.cluster.provider_proxies[name].weather(weather):
            trial.warm_up()
            trial.wait(0.5, 1.5)
        return catch_up(trial, *trial.cluster.providers.values())

    return inject


def _cut(*, reset: bool) -> Inject:
    def inject(trial: Trial) -> float:
        trial.warm_up()
        for _ in range(trial.draw.randint(2, 8)):
            proxies = list(trial.cluster.provider_proxies.values())
            trial.draw.choice(proxies).cut(reset=reset)
            trial.wait(0.0, 0.2)
        return catch_up(trial, *trial.cluster.providers.values())

    return inject


# With an answer that gets lost the provider has the events; with a bad one it does not.
_BUSY = answer(500, b"")

FAULTS = tuple(
    Fault(name, inject, rounds, quick_rounds, STORED)
    for name, inject, rounds, quick_rounds in (
        ("provider-hang", _misbehave(Script(fault=Failure.HANG)), 20, 0),
        ("provider-drip", _misbehave(Script(fault=Failure.DRIP)), 20, 0),
        ("provider-reset", _misbehave(Script(fault=Failure.RESET), answer(503, b"")), 20, 1),
        ("provider-html", _misbehave(answer(200, HTML)), 20, 1),
        ("provider-truncate", _misbehave(Script(fault=Failure.CUT_SHORT)), 20, 1),
        ("provider-500", _misbehave(_BUSY), 20, 1),
        ("provider-refuses-one", _refuse_one, 20, 1),
        ("provider-delay", _weather(Weather(delay=0.2)), 20, 1),
        ("provider-stall", _weather(Weather(stalled=True)), 20, 1),
        ("provider-slice", _weather(Weather(piece_bytes=700)), 20, 1),
        ("provider-cut", _cut(reset=False), 20, 1),
        ("provider-reset-link", _cut(reset=True), 20, 1),
    )
)
