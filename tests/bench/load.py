"""One load in a process of its own: `python -m tests.bench.load` with a LoadPlan on its input."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle

from tests.bench.events import KINDS, Tenant, TenantRequest, encode_http, encode_protobuf
from tests.bench.grpc_load import GrpcConnection, GrpcLoad
from tests.bench.http_load import HttpConnection, HttpLoad
from tests.bench.meter import Meter
from tests.bench.processes import read_all_cpu_seconds
from tests.bench.spread import Shares, open_evenly
from tests.bench.stream_load import StreamLoad


@dataclass(frozen=True)
class LoadPlan:
    """What to send where, and whose CPU time to read; `first_number` must be new in the run."""

    protocol: str
    port: int
    key: str
    events_per_request: int
    connections: int
    streams: int
    warm_up_seconds: float
    seconds: float
    first_number: int
    # The processes that the connections are spread over.
    workers: Sequence[int]
    # The processes whose CPU time, with that of their descendants, is read, by name.
    families: Mapping[str, Sequence[int]]
    kind: str = "usual"
    # Over HTTP: the ports of further replicas, and projects with their keys that send in turn.
    other_ports: Sequence[int] = ()
    tenants: Sequence[Tenant] = ()


@dataclass(frozen=True)
class LoadResult:
    """What one load measured; CPU times are those of the measured period, in seconds."""

    requests: int
    events: int
    seconds: float
    p50_ms: float
    p99_ms: float
    cpu_seconds: Mapping[str, float]
    connections_per_worker: Sequence[int]
    # All that was acknowledged, before and after the measured period too.
    acknowledged_events: int
    next_number: int
    # Every answer other than success in the measured period, and how often it came.
    failures: Mapping[str, int]

    @property
    def cpu_us_per_event(self) -> dict[str, float]:
        """Return the CPU time of one event in microseconds, by the names of the families."""
        return {name: seconds / self.events * 1e6 for name, seconds in self.cpu_seconds.items()}


def run_load(plan: LoadPlan) -> LoadResult:
    """Send one request after another over each connection, and measure once it is warm."""
    load, shares = _open(plan)
    warm_up, measured, rest = Meter(), Meter(), Meter()
    load.start(warm_up)
    load.run(plan.warm_up_seconds, warm_up)
    before, started_at = _read_cpu(plan), time.perf_counter()
    load.run(plan.seconds, measured)
    seconds, after = time.perf_counter() - started_at, _read_cpu(plan)
    load.finish(rest)
    sent = sum(len(meter.latencies) for meter in (warm_up, measured, rest))
    failed = sum(meter.failures.total() for meter in (warm_up, measured, rest))
    stored = len(measured.latencies) - measured.failures.total()
    return LoadResult(
        requests=stored,
        events=stored * plan.events_per_request,
        seconds=seconds,
        p50_ms=measured.percentile_ms(0.5),
        p99_ms=measured.percentile_ms(0.99),
        cpu_seconds={name: after[name] - before[name] for name in after},
        connections_per_worker=[shares[worker] for worker in plan.workers],
        acknowledged_events=(sent - failed) * plan.events_per_request,
        next_number=plan.first_number + sent + plan.connections + plan.streams,
        failures=dict(measured.failures),  # asdict cannot copy a Counter
    )


def _read_cpu(plan: LoadPlan) -> dict[str, float]:
    return read_all_cpu_seconds(plan.families) | {"load_generator": time.process_time()}


def _open(plan: LoadPlan) -> tuple[HttpLoad | GrpcLoad | StreamLoad, Shares]:
    count, first = plan.events_per_request, plan.first_number
    events = KINDS[plan.kind](count)

    ports = cycle([plan.port, *plan.other_ports])

    def open_http() -> HttpConnection:
        if plan.tenants:
            return HttpConnection(next(ports), TenantRequest(count, plan.tenants))
        return HttpConnection(next(ports), encode_http(events, plan.key))

    def open_grpc() -> GrpcConnection:
        return GrpcConnection(plan.port, plan.key)

    if plan.protocol == "http":
        https, shares = open_evenly(open_http, plan.connections, plan.workers)
        return HttpLoad(https, count, first), shares
    grpcs, shares = open_evenly(open_grpc, plan.connections, plan.workers)
    requests = [encode_protobuf(events) for _ in range(plan.streams)]
    if plan.protocol == "stream":
        [grpc] = grpcs
        return StreamLoad(grpc, requests, count, first), shares
    return GrpcLoad(grpcs, requests, count, first), shares


def main() -> None:
    """Read the plan, and write the result."""
    result = run_load(LoadPlan(**json.load(sys.stdin)))
    json.dump(asdict(result), sys.stdout)


if __name__ == "__main__":
    main()
