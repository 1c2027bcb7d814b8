"""The stand-ins for Amplitude and Mixpanel, in a process of their own.

`python -m tests.bench.providers` obeys the lines of its input, and answers each with a line of
JSON. It has the lowest priority there is: in life, providers do not share the machine.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from server.processes.priority import lower_priority
from tests.support.provider_servers import (
    AmplitudeServer,
    Fault,
    MixpanelServer,
    ProviderServer,
    Reply,
    Script,
)
from tests.support.services import ROOT, clean_environment

NAMES = ("amplitude", "mixpanel")
_SECRET = "s3cret"
_LOWEST_PRIORITY = 19
# Nothing of what comes meanwhile is kept.
_HANG = Script(Reply(503, b""), Fault.HANG)


class Providers:
    """Both stand-ins, from the outside."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._urls: Mapping[str, str] = self._read()

    @property
    def settings(self) -> dict[str, str]:
        """The settings of a service that forwards to them."""
        enabled = {f"{name.upper()}_ENABLED": "true" for name in self._urls}
        endpoints = {f"{name.upper()}_ENDPOINT": url for name, url in self._urls.items()}
        secrets = {"AMPLITUDE_API_KEY": _SECRET, "MIXPANEL_TOKEN": _SECRET}
        return {"ANALYTICS_ENABLED": "true"} | enabled | endpoints | secrets

    def hang(self, name: str) -> None:
        """Let one of them take requests and answer none from now on."""
        self._ask("hang", name)

    def answer(self, name: str) -> None:
        """Let it answer again."""
        self._ask("answer", name)

    def read_arrivals(self) -> dict[str, dict[str, float]]:
        """Return when each insert id first arrived, by `time.monotonic`, for each provider."""
        return dict(self._ask("arrivals"))

    def _ask(self, *words: str) -> Any:
        assert self._process.stdin is not None
        print(*words, file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


@contextmanager
def running_providers() -> Iterator[Providers]:
    """Run both until the context ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.providers"],
        cwd=ROOT,
        env=clean_environment({}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:  # closes its input, which ends it
        yield Providers(process)


def _read_arrivals(server: ProviderServer) -> dict[str, float]:
    arrivals: dict[str, float] = {}
    for delivery in tuple(server.deliveries):
        if delivery.status == 200:
            arrivals.setdefault(delivery.insert_id, delivery.arrived_at)
    return arrivals


def _say(content: Any) -> None:
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Serve until the input ends."""
    lower_priority(_LOWEST_PRIORITY)
    with ExitStack() as stack:
        servers: dict[str, ProviderServer] = {
            "amplitude": stack.enter_context(AmplitudeServer(_SECRET)),
            "mixpanel": stack.enter_context(MixpanelServer(_SECRET)),
        }

        def behave(name: str, script: Script | None) -> None:
            servers[name].behave = lambda _events: script

        commands: dict[str, Callable[..., Any]] = {
            "hang": lambda name: behave(name, _HANG),
            "answer": lambda name: behave(name, None),
            "arrivals": lambda: {n: _read_arrivals(server) for n, server in servers.items()},
        }
        _say({name: server.url for name, server in servers.items()})
        for line in sys.stdin:
            command, *arguments = line.split()
            _say(commands[command](*arguments))


if __name__ == "__main__":
    main()
