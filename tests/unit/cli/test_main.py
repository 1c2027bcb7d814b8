"""The command line as such: help, version, completion, wrong usage."""

import os
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from server.cli.main import main, productgraph


def list_commands(command: click.Command, *path: str) -> Iterator[tuple[str, ...]]:
    """Yield the way to each command, groups included."""
    yield path
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from list_commands(child, *path, name)


COMMANDS = list(list_commands(productgraph))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_help_fits_a_screen_of_80_columns(
    path: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command explains itself in lines of 80 columns, none cut, whatever the settings are."""
    monkeypatch.setenv("PORT", "bad")
    assert main([*path, "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(" ".join(["Usage: productgraph", *path]))
    assert "..." not in printed.replace("[ARGS]...", "").replace("]...", "")
    assert max(map(len, printed.splitlines())) <= 80


def test_internal_commands_are_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    """`worker`, which only `serve` can run, is not among the commands that the help lists."""
    assert main(["--help"]) == 0
    assert "worker" not in capsys.readouterr().out


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """`--version` prints the name and the number, and nothing else."""
    assert main(["--version"]) == 0
    name, number = capsys.readouterr().out.split()
    assert name == "productgraph"
    assert number == "unknown" or number[0].isdigit()


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "nonsense",
        "keys",
        "keys revoke",
        "keys revoke 0",
        "keys revoke one",
        "keys revoke 9223372036854775808",
        "keys limit 1",
        "keys limit 1 --rate soon",
        "rejected list --limit -1",
        "rejected replay",
        "rejected replay 1 --all",
        "forward dead list --limit 0",
        "forward dead retry",
        "forward dead purge 1 --all",
        "retention --keep 90d --yes --dry-run",
        "retention --keep 90d --tries 0",
        "migrate --nonsense",
    ],
)
def test_wrong_usage_exits_with_2(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong usage is told apart from failure, before any database is looked for."""
    assert main(arguments.split()) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "Usage: productgraph" in told.err


@pytest.mark.parametrize(
    "path", [p for p in COMMANDS if p and p[-1] in ("list", "status")], ids=" ".join
)
def test_every_list_takes_json(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever prints a list can print it for programs."""
    assert main([*path, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_a_shell_can_complete_commands() -> None:
    """What `completion bash` prints asks the command, which answers with what fits."""
    script = subprocess.run(
        [sys.executable, "-m", "server", "completion", "bash"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "_PRODUCTGRAPH_COMPLETE=bash_complete" in script
    asked = {
        "_PRODUCTGRAPH_COMPLETE": "bash_complete",
        "COMP_WORDS": "productgraph keys li",
        "COMP_CWORD": "2",
    }
    done = subprocess.run(
        [sys.executable, "-m", "server"],
        env=os.environ | asked,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["plain,limit", "plain,list"]
