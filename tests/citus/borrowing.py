"""Runs the tests of another module against a cluster."""

import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest

URL = "TEST_CITUS_URL"


def borrow(module: ModuleType, without: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return what a module has, for a module here: pytest then gives it the fixtures from here.

    `without` names the tests that cannot hold on Citus, each with the reason. The module that asks
    is skipped if no cluster is given.
    """
    if URL not in os.environ:
        pytest.skip(f"{URL} names no coordinator of a cluster of Citus", allow_module_level=True)
    names = {name: value for name, value in vars(module).items() if not name.startswith("__")}
    for name, reason in (without or {}).items():
        names[name] = pytest.mark.skip(reason=reason)(names[name])
    return names
