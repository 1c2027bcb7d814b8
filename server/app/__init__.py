"""The only place where the parts are put together: the parent process and those it starts."""

from server.app.forwarder import run_forwarder
from server.app.parent import DEMO_PROJECT, run_service
from server.app.parts import find_data, name_command, opened_database
from server.app.worker import opened_replay, run_worker

__all__ = [
    "DEMO_PROJECT",
    "find_data",
    "name_command",
    "opened_database",
    "opened_replay",
    "run_forwarder",
    "run_service",
    "run_worker",
]
