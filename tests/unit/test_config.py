"""Settings are checked before anything starts, and errors name the variable."""

from pathlib import Path
from typing import Any

import pytest

from server import config
from server.config import (
    DeletionAccess,
    InvalidSetting,
    RejectedKeep,
    TlsFiles,
    find_strays,
    read_settings,
)
from server.storage.connection import open_engine
from server.values import hide_credentials, hide_password

MIB = 1024 * 1024
PASSWORD = "s3cret-passw0rd"

# Each setting: its variable, its default, texts with what they mean, texts that are refused.
SETTINGS: dict[str, tuple[str, Any, dict[str, Any], list[str]]] = {
    "host": ("HOST", "127.0.0.1", {"0.0.0.0": "0.0.0.0", "::1": "::1"}, []),
    "port": (
        "PORT",
        8080,
        {"0": 0, "65535": 65535, " 80 ": 80},
        ["65536", "-1", "+80", "80.0", "8e1", "http", "0x50", "1_000", "\uff18\uff10", "9" * 5000],
    ),
    "grpc_port": ("GRPC_PORT", 50051, {"0": 0, "65535": 65535}, ["65536", "-1", "grpc"]),
    "metrics_port": (
        "METRICS_PORT",
        9464,
        {"0": 0, "65535": 65535, "off": None, "OFF": None},
        ["65536", "-1", "none"],
    ),
    "database_url": (
        "DATABASE_URL",
        None,
        {
            "postgresql+psycopg2://me@db/app": "postgresql://me@db/app",
            **{
                url: url
                for url in (
                    *("postgresql://me@db/app", "postgres://me@db:5433/app"),
                    "postgresql:///app?host=/run",
                    "postgresql://me@h1:5432,h2:5433/app?target_session_attrs=read-write",
                    "postgresql://me:a%40b%2C@[::1]:5432,h2/app",
                    "postgresql://%2Fvar%2Frun/app?user=me@cloud",
                    *("postgresql://?service=events", "service=events", "host=h1,h2 dbname=app"),
                )
            },
        },
        [
            *("db", "db:5432/app", "postgresql:me@db", "mysql://me@db/app", "://me@db/app"),
            *("postgresql+asyncpg://me@db/app", "sqlite:///app.db"),
            *("postgresql://me@db:port/app", "postgresql://me@[::1/app"),
            *("postgresql://me@h1:5432,h2:65536/app", "postgresql://me:a@b@db/app"),
            *("postgresql://db/app?nonsense=1", "host=db nonsense=1", "host=me@db", "port=0"),
        ],
    ),
    "data_dir": (
        "DATA_DIR",
        Path.cwd() / "data",
        {"/var/data": Path("/var/data"), "here": Path.cwd() / "here", "~/d": Path.home() / "d"},
        ["~no-such-account/d"],
    ),
    "data_dir_is_default": ("DATA_DIR", True, {"data": False, "/var/data": False}, []),
    "workers": ("WORKERS", 1, {"1": 1, "64": 64}, ["0", "65", "-1", "two", "1.5"]),
    "cors_allowed_origins": (
        "CORS_ALLOWED_ORIGINS",
        {"*"},
        {
            "https://a.example": {"https://a.example"},
            "https://a.example, http://b.example:3000,": {
                "https://a.example",
                "http://b.example:3000",
            },
            "app://desktop": {"app://desktop"},
        },
        ["a.example", "https://a.example/", "https://a.example/x", "https://", "*.example", "[::"],
    ),
    "grpc_reflection": (
        "GRPC_REFLECTION",
        True,
        {"false": False, "0": False, "No": False, "OFF": False, "TRUE": True, "1": True},
        ["maybe", "2", "y"],
    ),
    "request_timeout_seconds": (
        "REQUEST_TIMEOUT_SECONDS",
        5.0,
        {"1": 1.0, "2.5": 2.5, "60": 60.0},
        ["0.9", "61", "-5", "nan", "inf", "5s"],
    ),
    "max_waiting_bytes": (
        "MAX_WAITING_MB",
        64 * MIB,
        {"1": MIB, "4096": 4096 * MIB},
        ["0", "4097", "1.5", "64MB"],
    ),
    "event_rate_limit": (
        "RATE_LIMIT",
        0,
        {"1": 1, "1000": 1000, "1000000000": 10**9, "OFF": 0},
        ["0", "-1", "1.5", "1e3", "1000000001", "1KB", "\u0663", "on", "9" * 100],
    ),
    "byte_rate_limit": (
        "BYTE_RATE_LIMIT",
        0,
        {"1024": 1024, "1KB": 1024, "5MB": 5 * MIB, "5mb": 5 * MIB, "off": 0},
        ["0", "1023", "1.5MB", "5M", "5 MB", "MB", "1GBs", "2000000000", "1TB"],
    ),
    "forward_max_age_seconds": (
        "FORWARD_MAX_AGE",
        259_200.0,
        {"90s": 90.0, "2m": 120.0, "1h": 3600.0, "7d": 604_800.0},
        ["0s", "-1d", "3", "d", "1.5h", "1w", "\u0663d", "9" * 400 + "d"],
    ),
    "forwarders": ("FORWARDERS", 1, {"0": 0, "16": 16}, ["17", "-1", "none", "0.5"]),
    "rejected_keep": (
        "REJECTED_KEEP",
        RejectedKeep(10_000, 604_800.0),
        {"1/1h": RejectedKeep(1, 3600.0), "1000000/30d": RejectedKeep(10**6, 2592e3), "off": None},
        ["on", "100", "100/", "/7d", "0/7d", "1000001/7d", "100/7", "100/7d/8d", "-1/7d"],
    ),
    "privacy_secret": ("PRIVACY_SECRET", None, {"x" * 32: "x" * 32}, ["x" * 31]),
    "redact": (
        "REDACT",
        (),
        {
            "page.url=no-query": (("page.url", "no-query"),),
            " error.stack = drop, metadata.e=drop ": (
                ("error.stack", "drop"),
                ("metadata.e", "drop"),
            ),
        },
        ["page.url", "page.url=", "=drop", "page.url=hide", "a=drop,a=no-query"],
    ),
    "log_level": (
        "LOG_LEVEL",
        "INFO",
        {"debug": "DEBUG", "Warning": "WARNING", "ERROR": "ERROR"},
        ["verbose", "10", "CRITICAL"],
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_blank_variable_leaves_the_default(name: str) -> None:
    """A variable that is missing, empty or blank leaves its setting at the default."""
    variable, default, _, _ = SETTINGS[name]
    for environment in ({}, {variable: ""}, {variable: "  "}):
        assert getattr(read_settings(environment), name) == default


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, (_, _, good, _) in SETTINGS.items() for text in good]
)
def test_settings_take_every_documented_value(name: str, text: str) -> None:
    """Each setting takes the values that the documentation names."""
    variable, _, good, _ = SETTINGS[name]
    assert getattr(read_settings({variable: text}), name) == good[text]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        pytest.param(name, text, id=f"{name}-{text[:40]}")
        for name, (_, _, _, bad) in SETTINGS.items()
        for text in bad
    ],
)
def test_a_refused_value_is_reported_with_its_variable(name: str, text: str) -> None:
    """An unusable value is refused in one line that begins with the variable's name."""
    variable = SETTINGS[name][0]
    with pytest.raises(InvalidSetting) as failure:
        read_settings({variable: text})
    message = str(failure.value)
    assert message.startswith(f"{variable}: ")
    assert "\n" not in message
    assert len(message) < 300


def test_every_setting_is_tested_by_a_table() -> None:
    """A new setting is tested like the others; groups of them have tests of their own."""
    groups = {"console", "deletions", "destinations", "grpc_tls", "tracing"}
    assert set(SETTINGS) | groups == set(vars(read_settings({})))


REMOTE = {"DATABASE_URL": "postgresql://me@db/app"}
ON = {"CONSOLE": "on"}
LONG = {"CONSOLE_PASSWORD": PASSWORD}


@pytest.mark.parametrize(
    ("environment", "is_on"),
    [
        ({}, True),
        ({"HOST": "localhost"}, True),
        ({"HOST": "::1"}, True),
        ({"HOST": "127.8.9.1"}, True),
        ({"HOST": "0.0.0.0"}, False),
        ({"HOST": "::"}, False),
        ({"HOST": "10.0.0.1"}, False),
        ({"HOST": "example.com"}, False),
        ({"METRICS_PORT": "off"}, False),
        (REMOTE, False),
        (REMOTE | LONG, False),
        ({"CONSOLE": "off"}, False),
        ({"CONSOLE": "auto"}, True),
        (ON, True),
        (ON | LONG | REMOTE, True),
        (ON | LONG | {"HOST": "0.0.0.0"}, True),
    ],
)
def test_the_console_is_on_only_where_nobody_else_reaches(
    environment: dict[str, str], is_on: bool
) -> None:
    """By itself the console is on only for this machine, and else only by a setting."""
    assert (read_settings(environment).console is not None) is is_on


@pytest.mark.parametrize(
    ("environment", "variable"),
    [
        (ON | REMOTE, "CONSOLE_PASSWORD"),
        (ON | {"HOST": "0.0.0.0"}, "CONSOLE_PASSWORD"),
        (ON | {"HOST": "example.com"}, "CONSOLE_PASSWORD"),
        (ON | LONG | {"METRICS_PORT": "off"}, "METRICS_PORT"),
        ({"CONSOLE_PASSWORD": "elevenchars"}, "CONSOLE_PASSWORD"),
        ({"CONSOLE": "maybe"}, "CONSOLE"),
        ({"CONSOLE_HOSTS": "localhost:9464"}, "CONSOLE_HOSTS"),
        ({"CONSOLE_HOSTS": "https://localhost"}, "CONSOLE_HOSTS"),
        ({"CONSOLE_HOSTS": ","}, "CONSOLE_HOSTS"),
        ({"CONSOLE_HOSTS": "*"}, "CONSOLE_HOSTS"),
    ],
)
def test_an_open_console_ends_the_start(environment: dict[str, str], variable: str) -> None:
    """A console that others could reach without a password is an error, as is one without port."""
    with pytest.raises(InvalidSetting, match=f"^{variable}: must "):
        read_settings(environment)


def test_the_console_has_its_names_and_no_shown_password() -> None:
    """The names of hosts are read as browsers send them, and the password is in no text."""
    hosts = {"CONSOLE_HOSTS": "Console.Example.com, [::1],10.0.0.1"}
    console = read_settings(ON | LONG | hosts).console
    assert console is not None
    assert console.hosts == {"console.example.com", "::1", "10.0.0.1"}
    assert console.password == PASSWORD
    assert PASSWORD not in repr(console)
    with pytest.raises(InvalidSetting) as failure:
        read_settings({"CONSOLE_PASSWORD": "sh0rt"})
    assert "sh0rt" not in str(failure.value)


ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}


@pytest.mark.parametrize(
    ("environment", "tracing"),
    [
        ({}, False),
        (ENDPOINT, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
        (ENDPOINT | {"OTEL_SDK_DISABLED": "True"}, False),
        (ENDPOINT | {"OTEL_SDK_DISABLED": "false", "OTEL_TRACES_EXPORTER": "otlp"}, True),
        (ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_SDK_DISABLED": "false", "OTEL_TRACES_EXPORTER": "otlp"}, False),
    ],
)
def test_otel_variables_switch_traces_on_and_off(
    environment: dict[str, str], tracing: bool
) -> None:
    """Traces are on where OpenTelemetry's variables name a collector and do not turn them off."""
    assert read_settings(environment).tracing is tracing


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "ftp://collector"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://collector:port"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc"),
    ],
)
def test_malformed_tracing_ends_the_start(variable: str, text: str) -> None:
    """What traces cannot be sent by is an error, unless there are to be none."""
    with pytest.raises(InvalidSetting, match=f"^{variable}: must be "):
        read_settings(ENDPOINT | {variable: text})
    for off in ({"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}):
        assert not read_settings(ENDPOINT | {variable: text} | off).tracing


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("RATELIMIT", "RATE_LIMIT"),
        ("WORKER", "WORKERS"),
        ("rate_limit", "RATE_LIMIT"),
        ("Port", "PORT"),
        ("GRPCPORT", "GRPC_PORT"),
        ("DATABASE_URI", "DATABASE_URL"),
        ("CORS_ALLOWED_ORIGIN", "CORS_ALLOWED_ORIGINS"),
        ("METRIC_PORT", "METRICS_PORT"),
        ("LOGLEVEL", "LOG_LEVEL"),
        ("FORWARDER", "FORWARDERS"),
    ],
)
def test_names_near_a_setting_are_found(name: str, meant: str) -> None:
    """A variable that was meant to be a setting is reported with the setting."""
    assert list(find_strays({name: "1", "PATH": "/bin"})) == [(name, meant)]


# What shells, Docker, Kubernetes, systemd, PostgreSQL and common tools set.
FOREIGN = """
    BASH BASHOPTS COLUMNS LINES EUID HOSTNAME HOSTTYPE LOGNAME MACHTYPE MAILCHECK OLDPWD OSTYPE PPID
    PWD SHELL SHELLOPTS SHLVL TERM UID USER HOME PATH LANG LC_ALL EDITOR PAGER TZ TMPDIR DISPLAY
    KUBERNETES_SERVICE_HOST KUBERNETES_SERVICE_PORT KUBERNETES_SERVICE_PORT_HTTPS KUBERNETES_PORT
    KUBERNETES_PORT_443_TCP KUBERNETES_PORT_443_TCP_ADDR KUBERNETES_PORT_443_TCP_PORT
    PRODUCTGRAPH_SERVICE_HOST PRODUCTGRAPH_SERVICE_PORT PRODUCTGRAPH_PORT GRPC_SERVICE_HOST
    GRPC_SERVICE_PORT METRICS_SERVICE_HOST METRICS_SERVICE_PORT DATABASE_SERVICE_HOST
    CACHE_DIRECTORY CONFIGURATION_DIRECTORY CREDENTIALS_DIRECTORY INVOCATION_ID JOURNAL_STREAM
    LISTEN_FDS LISTEN_PID LOGS_DIRECTORY MAINPID MEMORY_PRESSURE_WATCH NOTIFY_SOCKET
    RUNTIME_DIRECTORY STATE_DIRECTORY SYSTEMD_EXEC_PID WATCHDOG_PID WATCHDOG_USEC DEBUGINFOD_URLS
    PGHOST PGPORT PGUSER PGPASSWORD PGDATABASE PGDATA POSTGRES_USER POSTGRES_DB POSTGRES_PASSWORD
    HTTP_PROXY HTTPS_PROXY NO_PROXY PYTHONPATH VIRTUAL_ENV GRPC_VERBOSITY GRPC_TRACE
    GRPC_DEFAULT_SSL_ROOTS_FILE_PATH OTEL_SERVICE_NAME OTEL_EXPORTER_OTLP_ENDPOINT XDG_DATA_DIRS
    MALLOC_ARENA_MAX SSH_CLIENT SSH_CONNECTION DOCKER_HOST CI DEBIAN_FRONTEND
"""


def test_names_of_others_are_not_taken_for_settings() -> None:
    """Nothing that a shell, Docker, Kubernetes or systemd sets is warned of, nor a setting."""
    names = [*FOREIGN.split(), *(setting.name for setting in config.SETTINGS)]
    assert list(find_strays(dict.fromkeys(names, "1"))) == []
    assert list(find_strays({"METRIC_PORT": "tcp://10.0.0.1:80"})) == []


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:s3cret@db:5432/app", "postgresql://***@db:5432/app"),
        ("postgresql:///app?host=/run&password=s3cret", "postgresql:///app?***"),
        ("https://api2.amplitude.com/batch", "https://api2.amplitude.com/batch"),
        ("postgresql://me:s3cret@h1,h2/app", "postgresql://***@h1,h2/app"),
        ("", ""),
    ],
)
def test_shown_urls_have_no_credentials(url: str, shown: str) -> None:
    """Of an address all is shown but its account and its query."""
    assert hide_credentials(url) == shown


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("", ""),
        ("postgresql://me:s3cret@db/app", "postgresql://***@db/app"),
        ("host=h1,h2 dbname=app", "host=h1,h2 dbname=app"),
        ("dbname=app user=me password='s3cret ://' service=x", "service=x dbname=app ***"),
    ],
)
def test_a_shown_database_has_no_password(address: str, shown: str) -> None:
    """Of a database's address, in whatever form, only the place is shown."""
    assert hide_password(address) == shown


@pytest.mark.parametrize(("debug", "level"), [("true", "DEBUG"), ("0", "ERROR"), ("", "ERROR")])
def test_debug_prevails_over_log_level(debug: str, level: str) -> None:
    """DEBUG prevails over LOG_LEVEL."""
    assert read_settings({"DEBUG": debug, "LOG_LEVEL": "ERROR"}).log_level == level


def test_debug_refuses_anything_but_a_flag() -> None:
    """DEBUG is a flag like any other."""
    with pytest.raises(InvalidSetting, match="DEBUG: must be true or false, is 'very'"):
        read_settings({"DEBUG": "very"})


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "mysql", "", "postgresql+asyncpg"])
@pytest.mark.parametrize("place", ["me:{}@db/app", "me:{}@db:port/app", "me:x@{}@db/app"])
def test_settings_never_show_the_database_password(scheme: str, place: str) -> None:
    """The password of a good or a bad DATABASE_URL is in no message and no representation."""
    url = f"{scheme}://{place.format(PASSWORD)}"
    try:
        settings = read_settings({"DATABASE_URL": url})
        assert settings.database_url is not None
        shown = f"{settings} {open_engine(settings.database_url)!r}"
    except InvalidSetting as problem:
        shown = f"{problem!r} {problem.__cause__!r}"
    assert PASSWORD not in shown


ANALYTICS = {
    "ANALYTICS_ENABLED": "true",
    "AMPLITUDE_ENABLED": "true",
    "AMPLITUDE_API_KEY": PASSWORD,
    "MIXPANEL_TOKEN": "unused",
}


@pytest.mark.parametrize(
    ("changes", "endpoints"),
    [
        ({}, {"amplitude": "https://api2.amplitude.com/batch"}),
        ({"ANALYTICS_ENABLED": ""}, {}),
        ({"AMPLITUDE_ENABLED": "false"}, {}),
        ({"AMPLITUDE_ENDPOINT": "http://[::1]:9/b"}, {"amplitude": "http://[::1]:9/b"}),
        (
            {"AMPLITUDE_ENABLED": "no", "MIXPANEL_ENABLED": "yes"},
            {"mixpanel": "https://api.mixpanel.com/import"},
        ),
    ],
    ids=str,
)
def test_only_enabled_providers_are_destinations(
    changes: dict[str, str], endpoints: dict[str, str]
) -> None:
    """Events go to the providers that are enabled, and a credential is never shown."""
    settings = read_settings(ANALYTICS | changes)
    assert {name: place.endpoint for name, place in settings.destinations.items()} == endpoints
    assert PASSWORD not in repr(settings)


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("AMPLITUDE_API_KEY", ""),
        ("MIXPANEL_ENABLED", "perhaps"),
        ("AMPLITUDE_ENDPOINT", "http://api2.amplitude.com/batch"),
        ("AMPLITUDE_ENDPOINT", "http://localhost.example/batch"),
        ("AMPLITUDE_ENDPOINT", "https:///batch"),
        ("AMPLITUDE_ENDPOINT", "https://api2.amplitude.com:port/batch"),
    ],
)
def test_a_destination_needs_credential_and_safe_endpoint(variable: str, text: str) -> None:
    """An enabled provider needs a credential, and an endpoint that nobody can listen in on."""
    with pytest.raises(InvalidSetting, match=f"^{variable}: ") as failure:
        read_settings(ANALYTICS | {variable: text})
    assert PASSWORD not in str(failure.value)


DELETIONS = {
    "PRIVACY_SECRET": "0123456789abcdef0123456789abcdef",
    "AMPLITUDE_API_KEY": "key",
    "AMPLITUDE_SECRET_KEY": PASSWORD,
    "MIXPANEL_TOKEN": "token",
}


def test_a_provider_deletes_if_its_secret_is_set() -> None:
    """Whether events are forwarded there or not; no credential is shown."""
    settings = read_settings(DELETIONS | {"AMPLITUDE_DELETION_PAUSE": "3s"})
    access = DeletionAccess("https://amplitude.com/api/2/deletions/users", "key", PASSWORD, 3.0)
    assert settings.deletions == {"amplitude": access}
    both = read_settings(DELETIONS | {"MIXPANEL_GDPR_TOKEN": PASSWORD})
    place = "https://mixpanel.com/api/app/data-deletions/v3.0/"
    access = DeletionAccess(place, "token", PASSWORD, 2.0)
    assert both.deletions["mixpanel"] == access
    assert PASSWORD not in repr(both)
    assert read_settings({}).deletions == {}


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("AMPLITUDE_API_KEY", ""),
        ("PRIVACY_SECRET", ""),
        ("AMPLITUDE_DELETION_ENDPOINT", "http://amplitude.com/api/2/deletions/users"),
        ("MIXPANEL_DELETION_ENDPOINT", "ftp://mixpanel.com"),
        ("AMPLITUDE_DELETION_PAUSE", "0s"),
        ("MIXPANEL_DELETION_PAUSE", "often"),
    ],
)
def test_providers_deletions_need_keys_and_safe_endpoints(variable: str, text: str) -> None:
    """Deletions need all credentials, an endpoint that nobody can listen in on, and a pause."""
    with pytest.raises(InvalidSetting, match=f"^{variable}: ") as failure:
        read_settings(DELETIONS | {variable: text})
    assert PASSWORD not in str(failure.value)


TLS = {name: f"/{name}" for name in ("GRPC_TLS_CERT_FILE", "GRPC_TLS_KEY_FILE")}
CLIENT_CA = {"GRPC_TLS_CLIENT_CA_FILE": "clients.pem"}


def test_tls_settings_need_certificate_and_key() -> None:
    """TLS takes a certificate and its key; clients' certificates are asked for only if set so."""
    chain, key = map(Path, TLS.values())
    assert read_settings({}).grpc_tls is None
    assert read_settings(TLS).grpc_tls == TlsFiles(chain, key, None)
    assert read_settings(TLS | CLIENT_CA).grpc_tls == TlsFiles(
        chain, key, Path.cwd() / "clients.pem"
    )


@pytest.mark.parametrize("missing", TLS)
@pytest.mark.parametrize("others", [{}, CLIENT_CA], ids=["alone", "with an authority"])
def test_half_of_tls_never_opens_plain_text(missing: str, others: dict[str, str]) -> None:
    """A port that was meant to be secure is never opened in plain text."""
    with pytest.raises(InvalidSetting, match=f"^{missing}: must be set"):
        read_settings(TLS | others | {missing: ""})
    with pytest.raises(InvalidSetting, match=r"^GRPC_TLS_CERT_FILE: must be set"):
        read_settings(CLIENT_CA)
