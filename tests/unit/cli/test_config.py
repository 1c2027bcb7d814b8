"""`productgraph config` shows the settings in effect."""

import json

import pytest

from server.cli.main import main
from server.config import SETTINGS

PASSWORD = "s3cret-passw0rd"
ENVIRONMENT = {
    "WORKERS": "3",
    "DATABASE_URL": f"postgresql://me:{PASSWORD}@db/app",
    "AMPLITUDE_API_KEY": PASSWORD,
    "MIXPANEL_TOKEN": PASSWORD,
    "HOST": "",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set some settings, and no others."""
    for setting in SETTINGS:
        monkeypatch.delenv(setting.name, raising=False)
    for name, text in ENVIRONMENT.items():
        monkeypatch.setenv(name, text)


def test_config_shows_values_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    """Each setting has a line with its value, and a star if the environment sets it."""
    assert main(["config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[2:].split()[0] for line in lines] == [setting.name for setting in SETTINGS]
    width = max(len(setting.name) for setting in SETTINGS)
    assert f"* {'WORKERS':{width}}  3" in lines
    assert f"  {'HOST':{width}}  127.0.0.1" in lines


def test_config_as_json_has_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    """With --json each setting is one object."""
    assert main(["config", "--json"]) == 0
    rows = {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows["WORKERS"] == {"name": "WORKERS", "value": "3", "is_set": True}
    assert rows["PORT"] == {"name": "PORT", "value": "8080", "is_set": False}
    assert rows["HOST"]["is_set"] is False


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_the_config_command_masks_secrets(
    form: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """No password, key or token is printed, only that there is one."""
    assert main(["config", *form]) == 0
    printed = capsys.readouterr().out
    assert PASSWORD not in printed
    assert printed.count("***") == 3


def test_config_refuses_what_serve_refuses(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unusable setting is an error here too."""
    monkeypatch.setenv("PORT", "http")
    assert main(["config"]) == 1
    assert "PORT: must be a whole number" in capsys.readouterr().err


def test_config_warns_of_near_misses(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable that is nearly a setting is named, with the setting that may be meant."""
    monkeypatch.setenv("RATELIMIT", "5")
    assert main(["config"]) == 0
    assert "RATELIMIT is not a setting; did you mean RATE_LIMIT?" in capsys.readouterr().err
