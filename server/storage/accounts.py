"""The account that PostgreSQL runs as.

PostgreSQL refuses to run as root, so root runs it as another account.
"""

import os
import pwd
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NAMES = ("postgres", "nobody", "productgraph")  # the last one is made if there is none
_SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


class EmbeddedPostgresError(Exception):
    """The embedded PostgreSQL cannot be used; the message is one line, fit for a user."""


@dataclass(frozen=True)
class Account:
    """Whose rights PostgreSQL has: this process's own, or as root those of another account."""

    uid: int
    gid: int

    @property
    def name(self) -> str:
        """Its name, or its number if it has none."""
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return f"uid {self.uid}"

    def run(
        self, command: Sequence[str | Path], statement: str = "", pass_fds: Sequence[int] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end, with `statement` as its input."""
        options: dict[str, Any] = {}
        if os.geteuid() == 0:
            options = {"user": self.uid, "group": self.gid, "extra_groups": []}
        return subprocess.run(  # noqa: S603 - no word of it comes from outside
            command,
            cwd="/",
            # Neither our secrets, nor a PG... variable that PostgreSQL would obey.
            env={"PATH": os.defpath, "LC_ALL": "C"},
            start_new_session=True,  # a Ctrl-C is meant for us alone
            input=statement,
            capture_output=True,
            text=True,
            errors="replace",
            pass_fds=pass_fds,
            **options,
        )

    def find_closed(self, *ends: Path) -> str:
        """Return the outermost file or directory on the ways to `ends` that it may not enter.

        What does not exist yet is left out. Empty if all ways are open.
        """
        if os.geteuid() != 0:
            return ""
        ways = {str(path) for end in ends for path in (end, *end.parents)}
        script = 'for path; do test -x "$path" || ! test -e "$path" || break; path=; done'
        script += '; printf %s "$path"'
        return self.run(["/bin/sh", "-c", script, "sh", *sorted(ways)]).stdout


def find_account(cluster: Path) -> Account:
    """Return the account of a cluster, or the one that a new cluster is for.

    As root, make one if the machine has none. Raises EmbeddedPostgresError.
    """
    uid = os.geteuid()
    if uid != 0:
        _require_name(uid)
        return Account(uid, os.getegid())
    if cluster.exists():  # PostgreSQL opens no other account's
        status = cluster.stat()
        return Account(status.st_uid, status.st_gid)
    for name in _NAMES:
        with suppress(KeyError):
            return _look_up(name)
    return _make_account()


def _require_name(uid: int) -> None:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        raise EmbeddedPostgresError(
            f"PostgreSQL cannot run as user id {uid}, which has no account on this machine: set"
            " DATABASE_URL to use another PostgreSQL, or run as a user with a name, or as root"
        ) from None


def _look_up(name: str) -> Account:
    entry = pwd.getpwnam(name)
    return Account(entry.pw_uid, entry.pw_gid)


def _make_account() -> Account:
    command = ["useradd", "--system", "--no-create-home", "--shell", "/bin/false", _NAMES[-1]]
    try:
        subprocess.run(  # noqa: S603 - no word of it comes from outside
            command, check=True, capture_output=True, text=True, env={"PATH": _SYSTEM_PATH}
        )
        return _look_up(_NAMES[-1])
    except (OSError, subprocess.CalledProcessError, KeyError) as error:
        reason = str(getattr(error, "stderr", "") or error).strip().splitlines()[-1]
        raise EmbeddedPostgresError(
            "PostgreSQL refuses to run as root, there is no account for it to run as"
            f" ({', '.join(_NAMES)}), and none can be made ({reason}): make one"
            f" ({' '.join(command)}), or run as an ordinary user, or set DATABASE_URL"
        ) from error
