"""The service on any node, as a role that reads and writes rows alone."""

from collections.abc import Callable

import pytest
from sqlalchemy.engine import make_url

from tests.citus.borrowing import borrow
from tests.citus.conftest import Cluster
from tests.service import test_roles
from tests.service.test_roles import ROLE, run_roles
from tests.support.clients import open_tenant
from tests.support.services import running_service, wait_until

borrow(test_roles)  # skips all of this without a cluster


def check_serving(url: str) -> None:
    """Run a service on a database as the role, and see it store and reject."""
    settings = {
        "DATABASE_URL": make_url(url).set(username=ROLE).render_as_string(hide_password=False)
    }
    with running_service(settings) as service, open_tenant(service) as tenant:
        assert tenant.post({"events": tenant.make_events(3)}).status == 202
        assert tenant.post({"events": [tenant.make_event({"event.type": "odd"})]}).status == 202
        wait_until(lambda: "unknown type" in service.run("rejected", "list").stdout)


@pytest.mark.slow
def test_a_role_with_rights_on_rows_serves_from_any_node(
    cluster: Cluster, create_migrated: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does once the script has run on the coordinator, and then on that worker alone."""
    coordinator = create_migrated()
    worker, owner = cluster.name_on_worker(coordinator), make_url(coordinator).username or ""
    run_roles(coordinator, owner)
    with monkeypatch.context() as environment:
        environment.setenv("PGOPTIONS", "-c citus.enable_ddl_propagation=off")
        run_roles(worker, owner)
    check_serving(coordinator)
    check_serving(worker)
