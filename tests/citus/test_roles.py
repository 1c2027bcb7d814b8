"""The service on any node, as a role that reads and writes rows alone."""

from collections.abc import Callable
from functools import partial

import pytest
from sqlalchemy.engine import make_url

from tests.citus.borrowing import borrow
from tests.citus.conftest import Cluster
from tests.service import test_roles
from tests.service.test_roles import ROLE, run_roles
from tests.support.clients import open_tenant
from tests.support.services import Service, running_service, wait_until

borrow(test_roles)  # skips all of this without a cluster


def has_rejected(service: Service) -> bool:
    """Return whether an event is kept that was rejected."""
    return "unknown type" in service.run("rejected", "list").stdout


@pytest.mark.slow
def test_a_role_with_rights_on_rows_serves_from_any_node(
    cluster: Cluster, create_migrated: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script is run on the coordinator first, and on a worker for that alone."""
    coordinator = make_url(create_migrated())
    worker = cluster.workers[0].set(database=coordinator.database)
    for node in (coordinator, worker):
        run_roles(node.render_as_string(hide_password=False), owner=node.username or "")
        monkeypatch.setenv("PGOPTIONS", "-c citus.enable_ddl_propagation=off")
    monkeypatch.delenv("PGOPTIONS")
    for node in (coordinator, worker):
        url = node.set(username=ROLE).render_as_string(hide_password=False)
        with running_service({"DATABASE_URL": url}) as service, open_tenant(service) as tenant:
            assert tenant.post({"events": tenant.make_events(3)}).status == 202
            assert tenant.post({"events": [tenant.make_event({"event.type": "odd"})]}).status == 202
            wait_until(partial(has_rejected, service))
