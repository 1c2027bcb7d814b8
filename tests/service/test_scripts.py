"""The scripts that a new user runs first: which Python they take, and what they say."""

import os
import re
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.services import ROOT

ENVIRONMENT = ROOT / "scripts" / "environment"


@pytest.fixture(scope="module")
def installer() -> ModuleType:
    """Return the module of `scripts/installer`."""
    loader = SourceFileLoader("installer", str(ROOT / "scripts" / "installer"))
    spec = spec_from_loader("installer", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def run_shell(command: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run a command of `scripts/environment`, on behalf of `scripts/serve`."""
    return subprocess.run(
        ["sh", "-c", f'. "$1"; {command}', str(ROOT / "scripts" / "serve"), str(ENVIRONMENT)],
        env={"PATH": os.defpath} | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def make_python(directory: Path, name: str, version: str) -> None:
    """Make a program that is asked for its version as a Python is."""
    program = directory / name
    program.write_text(f"#!/bin/sh\necho {version}\n")
    program.chmod(0o755)


def find_python(directory: Path) -> "subprocess.CompletedProcess[str]":
    """Find a Python among those in a directory."""
    return run_shell(f"PATH='{directory}'; find_python")


@pytest.mark.parametrize("present", [["3.14", "3.13"], ["3.14", "3.12", "3.11"], ["3.11"]])
def test_tested_python_is_preferred(tmp_path: Path, present: list[str]) -> None:
    """The newest Python that was tested is taken, even if there is a newer one."""
    for version in present:
        make_python(tmp_path, f"python{version}", version)
    wanted = next(version for version in present if version != "3.14")
    done = find_python(tmp_path)
    assert (done.stdout, done.stderr) == (f"python{wanted}\n", "")


@pytest.mark.parametrize("name", ["python3", "python3.14"])
def test_untested_python_is_named(tmp_path: Path, name: str) -> None:
    """A Python that is newer than any that was tested is taken if need be, and named."""
    make_python(tmp_path, name, "3.14")
    done = find_python(tmp_path)
    assert done.stdout == f"{name}\n"
    assert "Python 3.14 is newer than any that was tested" in done.stderr


def test_missing_python_is_explained(tmp_path: Path) -> None:
    """Without a Python the user is told what to install, and how to name one."""
    done = find_python(tmp_path)
    assert done.returncode == 1
    assert "python3-venv" in done.stderr
    assert "PYTHON=" in done.stderr


def test_image_has_a_tested_python() -> None:
    """The image's Python is one of those that the tests run with."""
    tested = re.search(r'^tested_pythons="(.*)"$', ENVIRONMENT.read_text(), re.MULTILINE)
    image = re.search(r"^ARG PYTHON=(\d+\.\d+)", (ROOT / "Dockerfile").read_text())
    assert tested is not None
    assert image is not None
    assert image[1] in tested[1].split()


def test_this_python_is_known() -> None:
    """The tests run with a Python that the scripts would take."""
    done = run_shell('name_version "$PYTHON"', PYTHON=sys.executable)
    assert done.stdout == f"{sys.version_info[0]}.{sys.version_info[1]}\n"


def test_silent_step_shows_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], installer: ModuleType
) -> None:
    """A step that prints nothing is named again and again while it lasts."""
    monkeypatch.setattr(installer, "_SILENT_SECONDS", 0.5)
    script = installer.Installer("serve", ROOT, Path("/nowhere"))
    assert script._run("sleeping", ["sleep", "3.5"]) == (0, [])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "serve: sleeping"
    assert len(lines) > 1
    assert all(re.fullmatch(r"serve: sleeping \(\d+ s\)", line) for line in lines[1:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"PIP_INDEX_URL": "http://127.0.0.1:1/simple"}, ("offline", "PIP_INDEX_URL")),
        ({"HTTPS_PROXY": "http://127.0.0.1:1"}, ("proxy", "HTTPS_PROXY")),
    ],
    ids=["offline", "proxy"],
)
def test_missing_network_is_explained(
    tmp_path: Path, variables: dict[str, str], words: tuple[str, ...]
) -> None:
    """Without network or proxy the last line names that, and what `pip` says of it is left out."""
    settings = {"PIP_INDEX_URL": "https://packages.invalid/simple", "PIP_CONFIG_FILE": os.devnull}
    done = run_shell(
        "prepare_environment embedded",
        **{"PYTHON": sys.executable, "VENV": str(tmp_path / "venv"), **settings, **variables},
    )
    assert done.returncode == 1
    assert all(word in done.stderr.splitlines()[-1] for word in words), done.stderr
    assert "No matching distribution" not in done.stderr
    assert all(line.startswith("serve: ") for line in done.stderr.splitlines())


def test_closed_tree_asks_for_a_place() -> None:
    """A source tree that cannot be written to needs DATA_DIR or VENV, and says so."""
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1"'
    if subprocess.run([*unshare, mount, "sh", ROOT], capture_output=True, check=False).returncode:
        pytest.skip("mounts cannot be made here")
    script = f'{mount}; . "$1/scripts/environment"; venv=/nowhere; prepare_environment embedded'
    done = subprocess.run(
        [*unshare, script, str(ROOT / "scripts" / "serve"), str(ROOT)],
        env={"PATH": os.defpath},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "cannot be written to: set DATA_DIR" in done.stderr
    assert "VENV" in done.stderr
