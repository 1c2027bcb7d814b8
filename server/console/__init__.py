"""The console: a page that shows what happens, and its data as JSON. It changes nothing."""

from server.console.access import Access
from server.console.api import Sources, create_app
from server.console.overview import Overview, ServiceState
from server.console.reader import Reader
from server.console.throughput import Throughput, Totals

__all__ = [
    "Access",
    "Overview",
    "Reader",
    "ServiceState",
    "Sources",
    "Throughput",
    "Totals",
    "create_app",
]
