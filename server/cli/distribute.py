"""`productgraph distribute`: spreads the events over the nodes of Citus."""

import click

from server.cli.command import Failure, opened_engine, with_settings
from server.config import Settings
from server.storage.connection import connected
from server.storage.distribution import distribute as distribute_tables
from server.storage.distribution import find_undone
from server.storage.migrate import check_indexed


@click.command()
@click.option("--check", is_flag=True, help="Change nothing, and fail if something is to be done.")
@click.option(
    "--shards",
    type=click.IntRange(1, 64_000),
    default=32,
    show_default=True,
    help="Into how many parts the events go, the first time.",
)
@with_settings
def distribute(settings: Settings, check: bool, shards: int) -> None:
    """Spread the events over the nodes of Citus.

    For the coordinator of a cluster, in a quiet moment: writes wait until the events that are there
    have been copied. All events of a project are on one node. The other tables stay on the
    coordinator, and become known to every node, so that services can connect to any. Safe to run
    again.
    """
    with opened_engine(settings) as engine:
        check_indexed(engine)
        if check:
            with connected(engine) as connection:
                undone = find_undone(connection)
            if undone:
                raise Failure("; ".join(undone))
        else:
            for line in distribute_tables(engine, shards):
                click.echo(line)
    click.echo("the tables are distributed")
