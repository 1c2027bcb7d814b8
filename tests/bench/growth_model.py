"""A model of what a rate of events takes and costs, from the CPU time and the bytes of one event.

It supposes that both stay what they were: whatever does not grow linearly is not in it.
"""

from dataclasses import dataclass

_DAY_SECONDS = 86_400
_MONTH_DAYS = 30


@dataclass(frozen=True)
class Inputs:
    """What was measured, the prices, and how much room is left."""

    service_us: float
    database_us: float
    bytes_per_event: float
    # Of an hour of a vCPU, and of a GiB for a month.
    vcpu_price: float
    disk_price: float
    # The busiest second over the mean.
    peak: float = 2.0
    # The share of a core that may be used then.
    busy: float = 0.5


@dataclass(frozen=True)
class Need:
    """What a number of events a day takes; the disk is that of one copy of their rows."""

    events_a_day: int
    service_cores: float
    database_cores: float
    vcpu_hours_a_day: float
    vcpu_cost_a_day: float
    gib_a_day: float
    # Of one month's events, kept for a month.
    disk_cost_a_month: float


def calculate_need(inputs: Inputs, events_a_day: int) -> Need:
    """Return what this many events a day take."""
    busiest = events_a_day / _DAY_SECONDS * inputs.peak
    service, database = (
        busiest * microseconds / 1e6 / inputs.busy
        for microseconds in (inputs.service_us, inputs.database_us)
    )
    hours = (service + database) * 24
    disk = events_a_day * inputs.bytes_per_event / 2**30
    return Need(
        events_a_day,
        service,
        database,
        hours,
        hours * inputs.vcpu_price,
        disk,
        disk * _MONTH_DAYS * inputs.disk_price,
    )
