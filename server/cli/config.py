"""`productgraph config`: the settings in effect."""

import os

import click

from server.cli.command import json_option, print_json, warn_of_strays, with_settings
from server.config import SETTINGS, Settings, show_settings


@click.command()
@json_option
@click.option("--table", "as_table", is_flag=True, hidden=True, help="The table of OPERATIONS.md.")
@with_settings
def config(_settings: Settings, as_json: bool, as_table: bool) -> None:
    """Print the settings in effect, without passwords and keys.

    A star marks what the environment sets; everything else is a default.
    """
    if as_table:
        click.echo(describe_settings())
        return
    warn_of_strays()
    rows = [
        {"name": name, "value": value, "is_set": bool(os.environ.get(name, "").strip())}
        for name, value in show_settings()
    ]
    if as_json:
        print_json(rows)
        return
    width = max(len(setting.name) for setting in SETTINGS)
    for row in rows:
        mark = "*" if row["is_set"] else " "
        click.echo(f"{mark} {row['name']:{width}}  {row['value']}".rstrip())


def describe_settings() -> str:
    """Return the settings as a table in Markdown."""
    rows = [
        f"| `{setting.name}` | {_quote(setting.default)} | {setting.meaning} |"
        for setting in SETTINGS
    ]
    return "\n".join(["| variable | default | meaning |", "|---|---|---|", *rows])


def _quote(default: str) -> str:
    return f"`{default}`" if default else ""
