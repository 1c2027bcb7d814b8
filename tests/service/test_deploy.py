"""What deploys the service agrees with it: Dockerfile, compose.yaml, Kubernetes manifests."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from server.cli.main import main
from server.config import read_settings
from tests.support.services import ROOT, Service, ask, clean_environment

# Parsed YAML, whose types are its schema's business.
Node = Any

IMAGE = "productgraph-ingestion"
MANIFESTS = ROOT / "scripts/deploy/kubernetes"
DRAIN_SECONDS = 30  # OPERATIONS.md: SIGTERM drains everything within these

DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: Node = yaml.safe_load((ROOT / "compose.yaml").read_text())
KUSTOMIZATION: Node = yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text())
OBJECTS: list[Node] = [
    document
    for path in sorted(MANIFESTS.glob("*.yaml"))
    if path.name != "kustomization.yaml"
    for document in yaml.safe_load_all(path.read_text())
]


def find_template(workload: Node) -> Node | None:
    """Return the template of a workload's pods, or None if the object has none."""
    spec = workload.get("spec", {})
    spec = spec.get("jobTemplate", {}).get("spec", spec)
    return spec.get("template")


PODS: dict[str, Node] = {
    workload["metadata"]["name"]: template
    for workload in OBJECTS
    if (template := find_template(workload))
}
# By pod: what runs before it and then for as long as it lives.
CONTAINERS: dict[str, list[Node]] = {
    name: [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
    for name, pod in PODS.items()
}
SERVICES: dict[str, Node] = {
    name: service
    for name, service in COMPOSE["services"].items()
    if IMAGE in service.get("image", "")
}

each_pod = pytest.mark.parametrize("name", PODS)


def find_object(kind: str, name: str) -> Node:
    """Return the manifest of one object."""
    [found] = [o for o in OBJECTS if (o["kind"], o["metadata"]["name"]) == (kind, name)]
    return found


def read_instruction(name: str) -> list[str]:
    """Return the arguments of every such instruction in the Dockerfile's last stage."""
    stage = re.split(r"^FROM .*$", DOCKERFILE.replace("\\\n", ""), flags=re.MULTILINE)[-1]
    return re.findall(rf"^{name} +(.*)$", stage, re.MULTILINE)


class AskedEnvironment(dict[str, str]):
    """An environment that remembers which variables it was asked for."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.names: set[str] = set()

    def get(self, name: str, default: str = "") -> str:  # type: ignore[override]
        """Return the variable's value."""
        self.names.add(name)
        return super().get(name, default)


def list_variables() -> set[str]:
    """Every variable that is a setting; analytics is on, for it has some of its own."""
    credentials = {"AMPLITUDE_API_KEY": "x", "MIXPANEL_TOKEN": "x"}
    names = ("ANALYTICS_ENABLED", "AMPLITUDE_ENABLED", "MIXPANEL_ENABLED")
    environment = AskedEnvironment(dict.fromkeys(names, "true") | credentials)
    read_settings(environment)
    return environment.names


def list_environments() -> Iterator[tuple[str, dict[str, str]]]:
    """Yield what each place sets for the service."""
    for name, service in SERVICES.items():
        yield f"compose.yaml: {name}", service["environment"]
    for generator in KUSTOMIZATION["configMapGenerator"]:
        yield "kustomization.yaml", dict(text.split("=", 1) for text in generator["literals"])
    for name, containers in CONTAINERS.items():
        for container in containers:
            values = {entry["name"]: entry["value"] for entry in container.get("env", [])}
            yield f"{name}: {container['name']}", values
    yield "Dockerfile", dict(re.findall(r"(\w+)=(\S+)", read_instruction("ENV")[0]))


def list_commands() -> Iterator[tuple[str, list[str]]]:
    """Yield the arguments of `productgraph` in each place."""
    for name, service in SERVICES.items():
        yield f"compose.yaml: {name}", service.get("command", ["serve"])
    for name, containers in CONTAINERS.items():
        for container in containers:
            yield f"{name}: {container['name']}", container["args"]
    yield "Dockerfile", json.loads(read_instruction("CMD")[0])


@pytest.mark.parametrize(
    "environment", [pytest.param(values, id=name) for name, values in list_environments()]
)
def test_deployments_set_only_known_variables_to_valid_values(environment: dict[str, str]) -> None:
    """Every variable that a deployment sets is a setting, with a value that it can have."""
    known = list_variables()
    assert environment.keys() - {"PATH"} <= known
    assert all(isinstance(text, str) for text in environment.values())  # YAML has other types
    literal = {name: text for name, text in environment.items() if "${" not in text}
    assert read_settings(literal)


@pytest.mark.parametrize(
    "arguments", [pytest.param(arguments, id=name) for name, arguments in list_commands()]
)
def test_containers_run_only_commands_that_exist(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """What a container runs is a command that there is, with options that it has."""
    assert main([*arguments, "--help"]) == 0, capsys.readouterr().err


def list_ports() -> dict[str, str]:
    """Return the ports of a service without settings, by their variables."""
    settings = vars(read_settings({}))
    return {name.upper(): str(port) for name, port in settings.items() if name.endswith("port")}


def test_containers_open_the_default_ports() -> None:
    """The ports that a service has by default are those that containers open and are asked at."""
    ports = list_ports()
    numbers = set(ports.values())
    assert set(read_instruction("EXPOSE")[0].split()) == numbers
    [container] = PODS["ingestion"]["spec"]["containers"]
    names = {port["name"]: str(port["containerPort"]) for port in container["ports"]}
    assert set(names.values()) == numbers
    targets = [
        port["targetPort"]
        for service in OBJECTS
        if service["kind"] == "Service"
        for port in service["spec"]["ports"]
    ]
    probes = [container[f"{name}Probe"]["httpGet"]["port"] for name in ("startup", "liveness")]
    assert {*targets, *probes} <= names.keys()
    annotations = PODS["ingestion"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == names["metrics"] == ports["METRICS_PORT"]
    assert ports.items() <= SERVICES["ingestion"]["environment"].items()
    published = {port.split(":")[-1] for port in SERVICES["ingestion"]["ports"]}
    assert published == {ports["PORT"], ports["GRPC_PORT"]}


def test_forwarders_are_asked_on_their_only_port() -> None:
    """What probes and scrapes a forwarder asks the port of its metrics."""
    metrics = list_ports()["METRICS_PORT"]
    [container] = PODS["forwarder"]["spec"]["containers"]
    assert container["ports"] == [{"name": "metrics", "containerPort": int(metrics)}]
    for name in ("startup", "liveness"):
        assert container[f"{name}Probe"]["httpGet"] == {"path": "/health", "port": "metrics"}
    annotations = PODS["forwarder"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == metrics
    environment = SERVICES["forwarder"]["environment"]
    assert environment["METRICS_PORT"] == environment["PORT"] == metrics
    assert "healthcheck" not in SERVICES["forwarder"]


def test_kubernetes_probes_agree_with_the_answers(service: Service) -> None:
    """Kubernetes asks for what the service answers, and only readiness takes it out of use."""
    [container] = PODS["ingestion"]["spec"]["containers"]
    paths = {
        name: container[f"{name}Probe"]["httpGet"]["path"]
        for name in ("startup", "liveness", "readiness")
    }
    assert paths == {"startup": "/health", "liveness": "/health", "readiness": "/ready"}
    assert {ask(f"{service.http_url}{path}") for path in paths.values()} == {200}


def test_the_image_health_check_passes_only_while_alive(service: Service) -> None:
    """The image's health check passes on a live service, and on nothing else."""
    [check] = read_instruction("HEALTHCHECK")
    command = json.loads(check.partition("CMD ")[2])
    assert command[0] == "bash"  # which starts at once, unlike Python
    statuses = [
        subprocess.run(
            command,
            env=clean_environment({"PORT": port, "HTTP_PROXY": "http://127.0.0.1:1"}),
            stderr=subprocess.DEVNULL,
            timeout=30,
            check=False,
        ).returncode
        for port in (str(service.http_port), "1")
    ]
    assert statuses == [0, 1]


@each_pod
def test_pods_meet_the_restricted_security_standard(name: str) -> None:
    """Every pod meets the Pod Security Standard `restricted`, and has a root that it cannot write.

    https://kubernetes.io/docs/concepts/security/pod-security-standards/
    """
    spec = PODS[name]["spec"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert all(kind in ("name", "emptyDir") for volume in spec["volumes"] for kind in volume)
    for container in CONTAINERS[name]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}


@each_pod
def test_pods_request_resources_and_no_token(name: str) -> None:
    """Every pod asks for what it needs, and has neither a token nor variables of other services."""
    spec = PODS[name]["spec"]
    assert (
        spec["serviceAccountName"] == find_object("ServiceAccount", "ingestion")["metadata"]["name"]
    )
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    for container in CONTAINERS[name]:
        assert container["image"] == IMAGE  # which kustomization.yaml replaces
        assert container["resources"]["requests"].keys() == {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]
        assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/tmp"]


def test_compose_containers_write_only_to_tmp() -> None:
    """Containers of ours can write nowhere but to /tmp, and gain no rights."""
    assert SERVICES.keys() == {"ingestion", "forwarder", "migrate", "retention"}
    for service in SERVICES.values():
        assert service["read_only"] is True
        assert service["tmpfs"] == ["/tmp"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_compose_mounts_exist_and_match_their_readers() -> None:
    """What compose.yaml mounts is here, and is found where Prometheus and Grafana look for it."""
    mounted = {
        target: ROOT / source
        for service in COMPOSE["services"].values()
        for source, target, *_ in (volume.split(":") for volume in service.get("volumes", []))
        if source.startswith("./")
    }
    assert all(source.exists() for source in mounted.values())
    prometheus = yaml.safe_load(mounted["/etc/prometheus/prometheus.yml"].read_text())
    assert {f"/etc/prometheus/{name}" for name in prometheus["rule_files"]} <= mounted.keys()
    targets = [
        target
        for job in prometheus["scrape_configs"]
        for static in job.get("static_configs", [])
        for target in static["targets"]
    ]
    assert targets == [f"ingestion:{list_ports()['METRICS_PORT']}"]
    [told] = prometheus["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"]
    name, _, number = told.partition(":")
    assert COMPOSE["services"][name]["ports"] == [f"127.0.0.1:{number}:{number}"]
    [found] = [job["dns_sd_configs"] for job in prometheus["scrape_configs"][1:]]
    port = int(list_ports()["METRICS_PORT"])
    assert found == [{"names": ["forwarder"], "type": "A", "port": port}]
    provisioning = mounted["/etc/grafana/provisioning"]
    for path in (provisioning / "dashboards").iterdir():
        for provider in yaml.safe_load(path.read_text())["providers"]:
            assert list(mounted[provider["options"]["path"]].glob("*.json"))
    [source] = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert urlsplit(source["url"]).hostname in COMPOSE["services"]


def test_compose_serves_as_a_role_that_owns_nothing() -> None:
    """Who serves and forwards is the role of roles.sql; only what changes tables is their owner."""
    accounts = {
        name: re.match(r"postgresql://(\w+):", service["environment"]["DATABASE_URL"])
        for name, service in SERVICES.items()
    }
    found = {name: match[1] for name, match in accounts.items() if match}
    [owner] = {found["migrate"], found["retention"]}
    [role] = {found["ingestion"], found["forwarder"]}
    assert owner == COMPOSE["services"]["postgres"]["environment"]["POSTGRES_USER"]
    command = COMPOSE["services"]["roles"]["command"]
    assert {f"--variable=owner={owner}", f"--variable=role={role}"} <= set(command)
    assert role != owner


def test_kubernetes_serves_as_a_role_that_owns_nothing() -> None:
    """Only what changes tables has the secret of their owner, and it runs daily too."""
    secrets = {
        (name, container["name"]): [s["secretRef"]["name"] for s in container["envFrom"][-1:]]
        for name, containers in CONTAINERS.items()
        for container in containers
    }
    owners = {("migrate", "migrate"), ("retention", "migrate"), ("retention", "retention")}
    assert {place for place, names in secrets.items() if names == ["ingestion-owner"]} == owners
    others = [names for place, names in secrets.items() if place not in owners]
    assert others == [["ingestion"], ["ingestion"]]
    first = (MANIFESTS / "kustomization.yaml").read_text().partition("apiVersion")[0]
    assert set(re.findall(r"create secret generic (\S+)", first)) == {
        "ingestion-owner",
        "ingestion",
    }
    roles = dict(re.findall(r"generic (\S+) \\\n.*postgresql://(\w+):", first))
    documented = (ROOT / "OPERATIONS.md").read_text()
    assert f"-v owner={roles['ingestion-owner']} -v role={roles['ingestion']}" in documented


def test_the_compose_retention_runs_again_and_again(tmp_path: Path) -> None:
    """Its loop adds partitions, deletes what is old, and pauses; and ends if one of them fails."""
    service = SERVICES["retention"]
    for name in ("productgraph", "sleep"):
        failing = "[ $(wc -l < done) -lt 6 ]"
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> done\n{failing}\n')
        (tmp_path / name).chmod(0o755)
    shell, option, script, *rest = service["entrypoint"]
    command = [shell, option, script.replace("$$", "$"), *rest, *service["command"]]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run(command, env=environment, cwd=tmp_path, timeout=60, check=False)
    done = (tmp_path / "done").read_text().splitlines()
    one = ["productgraph migrate", f"productgraph {' '.join(service['command'])}", "sleep 86400"]
    assert done[:6] == [*one, *one]


def run_checker(program: str, *arguments: str) -> None:
    """Let a program check a file; skip the test if it is not installed."""
    if (path := shutil.which(program)) is None:
        pytest.skip(f"{program} is not installed")
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alertmanager_accepts_its_example(tmp_path: Path) -> None:
    """Alertmanager takes the example, and tells critical alerts sooner than others."""
    file = str(ROOT / "scripts/deploy/alertmanager.yml")
    run_checker("amtool", "check-config", file)
    for severity, receiver in (("critical", "at once"), ("warning", "later")):
        routing = ["routes", "test", f"--config.file={file}", f"--verify.receivers={receiver}"]
        run_checker("amtool", "config", *routing, f"severity={severity}", "alertname=X")
    assert not list(tmp_path.iterdir())


def test_systemd_accepts_the_units() -> None:
    """Systemd finds nothing wrong with the units but that their program is not installed here."""
    if (analyze := shutil.which("systemd-analyze")) is None:
        pytest.skip("systemd-analyze is not installed")
    units = sorted((ROOT / "scripts/deploy/systemd").iterdir())
    done = subprocess.run(
        [analyze, "verify", "--man=no", *units], capture_output=True, text=True, check=False
    )
    complaints = [line for line in done.stderr.splitlines() if "productgraph" in line]
    assert all("is not executable" in line for line in complaints), done.stderr
    service = (ROOT / "scripts/deploy/systemd/productgraph.service").read_text()
    [seconds] = re.findall(r"^TimeoutStopSec=(\d+)$", service, re.MULTILINE)
    assert int(seconds) > DRAIN_SECONDS
    for unit in units:
        for arguments in re.findall(r"^ExecStart=\S+/productgraph (.+)$", unit.read_text(), re.M):
            assert main([*arguments.split(), "--help"]) == 0


def test_the_operator_has_the_same_alerts_and_pods() -> None:
    """PrometheusRule holds alerts.yml, and PodMonitor finds every pod that has metrics."""
    folder = ROOT / "scripts/deploy/prometheus-operator"
    rule = yaml.safe_load((folder / "prometheus-rule.yaml").read_text())
    alerts = yaml.safe_load((ROOT / "scripts/deploy/alerts.yml").read_text())
    assert rule["spec"] == alerts
    monitor = yaml.safe_load((folder / "pod-monitor.yaml").read_text())
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    [expression] = monitor["spec"]["selector"]["matchExpressions"]
    with_metrics = {
        name
        for name, pod in PODS.items()
        for port in pod["spec"]["containers"][0].get("ports", [])
        if port["name"] == endpoint["port"]
    }
    assert set(expression["values"]) == with_metrics
    jobs = {relabeling["replacement"] for relabeling in endpoint["relabelings"]}
    prometheus = yaml.safe_load((ROOT / "scripts/deploy/prometheus.yml").read_text())
    assert jobs == {job["job_name"] for job in prometheus["scrape_configs"]}


def test_network_policies_open_only_what_is_served() -> None:
    """Every pod has a policy; anybody reaches the two ports, and monitoring alone the metrics."""
    policies = [o["spec"] for o in OBJECTS if o["kind"] == "NetworkPolicy"]
    chosen: list[str] = []
    for policy in policies:
        selector = policy["podSelector"]
        chosen += selector.get("matchLabels", {}).values()
        chosen += [name for each in selector.get("matchExpressions", []) for name in each["values"]]
    assert sorted(chosen) == sorted(PODS)
    rules = [rule for policy in policies for rule in policy.get("ingress", [])]
    open_ports = {port["port"] for rule in rules if "from" not in rule for port in rule["ports"]}
    assert open_ports == {"http", "grpc"}
    assert {port["port"] for rule in rules if "from" in rule for port in rule["ports"]} == {
        "metrics"
    }


def test_the_image_installs_what_the_packages_need() -> None:
    """The layer of dependencies has those of both packages, and of the extras asked for."""
    script = [sys.executable, str(ROOT / "scripts/requirements")]
    listed = {
        extras: subprocess.run(
            [*script, extras], capture_output=True, text=True, check=True
        ).stdout.split("\n")
        for extras in ("", "otel")
    }
    assert {"falcon>=4.2,<5", "protobuf>=7.35.1,<8"} <= set(listed[""])
    assert any(line.startswith("opentelemetry-sdk") for line in listed["otel"])
    assert not any(line.startswith("opentelemetry-sdk") for line in listed[""])
    copied = DOCKERFILE[: DOCKERFILE.index("COPY . .")]
    assert all(name in copied for name in ("pyproject.toml", "gen/", "scripts/requirements"))


def test_the_links_of_alerts_lead_to_their_sections(tmp_path: Path) -> None:
    """Once the documented command has named OPERATIONS.md, every link leads to a heading."""
    document = (ROOT / "OPERATIONS.md").read_text()
    headings = re.findall(r"^#+ (.+)$", document, re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    [command] = re.findall(r"^    (sed -i .*?\.yaml)$", document, re.MULTILINE | re.DOTALL)
    shutil.copytree(ROOT / "scripts/deploy", tmp_path / "scripts/deploy")
    place = (ROOT / "OPERATIONS.md").as_uri()
    command = command.replace("https://…", place)
    subprocess.run(["sh", "-ec", command], cwd=tmp_path, check=True)
    for name in ("alerts.yml", "prometheus-operator/prometheus-rule.yaml"):
        text = (tmp_path / "scripts/deploy" / name).read_text()
        links = re.findall(r"^ +runbook_url: (.*)$", text, re.MULTILINE)
        assert len(links) == text.count("alert:") > 0
        assert {link.partition("#")[0] for link in links} == {place}
        assert {link.partition("#")[2] for link in links} <= anchors


def test_the_image_account_is_the_pods_account() -> None:
    """The image's account is a number other than root's, the same that the pods name."""
    [user] = read_instruction("USER")
    assert re.fullmatch(r"[1-9][0-9]*:[1-9][0-9]*", user)
    for pod in PODS.values():
        context = pod["spec"]["securityContext"]
        assert f"{context['runAsUser']}:{context['runAsGroup']}" == user


def test_draining_processes_are_given_enough_time() -> None:
    """Nothing kills a service or a forwarder that is still draining."""
    assert read_instruction("STOPSIGNAL") == ["SIGTERM"]
    for name in ("ingestion", "forwarder"):
        assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) > DRAIN_SECONDS
        [container] = PODS[name]["spec"]["containers"]
        steps = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
        pause = int(steps[1]) if steps else 0
        assert PODS[name]["spec"]["terminationGracePeriodSeconds"] > DRAIN_SECONDS + pause


def test_forwarders_never_run_in_two_places() -> None:
    """Where forwarders are deployments of their own, the service runs none beside itself."""
    environments = dict(list_environments())
    for place in ("compose.yaml: ingestion", "kustomization.yaml"):
        assert environments[place]["FORWARDERS"] == "0"
    assert {"forwarder"} <= PODS.keys() & SERVICES.keys()


def test_selectors_match_the_pods_of_one_workload() -> None:
    """Whatever selects pods selects those of one workload; the autoscaler finds its own."""
    labels = [pod["metadata"]["labels"] for pod in PODS.values()]
    selectors = [o["spec"]["selector"] for o in OBJECTS if "selector" in o.get("spec", {})]
    assert len(selectors) == 5
    for selector in selectors:
        assert labels.count(selector.get("matchLabels", selector)) == 1
    target = find_object("HorizontalPodAutoscaler", "ingestion")["spec"]["scaleTargetRef"]
    deployment = find_object(target["kind"], target["name"])
    assert deployment["apiVersion"] == target["apiVersion"]
    assert "replicas" not in deployment["spec"]


def test_the_kustomization_lists_every_manifest_and_setting() -> None:
    """The kustomization has every manifest, our image, and the settings that the pods name."""
    files = {path.name for path in MANIFESTS.iterdir()} - {"kustomization.yaml"}
    assert set(KUSTOMIZATION["resources"]) == files
    assert [image["name"] for image in KUSTOMIZATION["images"]] == [IMAGE]
    generated = {generator["name"] for generator in KUSTOMIZATION["configMapGenerator"]}
    sources = [s for each in CONTAINERS.values() for c in each for s in c["envFrom"]]
    assert {s["configMapRef"]["name"] for s in sources if "configMapRef" in s} == generated
    # It would be another name with each change of a setting, and a job cannot be changed.
    assert not any("configMapRef" in s for s in CONTAINERS["migrate"][0]["envFrom"])


def test_deployment_files_contain_no_password() -> None:
    """No password is in these files: compose.yaml demands them from the environment."""
    text = (ROOT / "compose.yaml").read_text()
    secrets = re.findall(r"^ +\w*(?:PASSWORD|TOKEN|KEY|SECRET)\w*: *(.+)", text, re.MULTILINE)
    secrets += re.findall(r"://\w+:(.+)@", text)
    secrets += re.findall(r"=password=(.+)", text)
    assert len(secrets) == 6
    assert all(re.fullmatch(r"\$\{\w+:\?[^}]+\}", secret) for secret in secrets)
    assert not [o for o in OBJECTS if o["kind"] == "Secret"]
    assert "secretGenerator" not in KUSTOMIZATION
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"/.env", "/ingestion.env"} <= set(ignored)


def copy_context(directory: Path) -> None:
    """Copy what .dockerignore lets into the image's build."""
    first, *lines = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] != "#"
    ]
    assert first == "*"
    for name in [line[1:] for line in lines if line.startswith("!")]:
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)


@pytest.mark.slow
def test_the_image_context_builds_a_working_package(
    tmp_path: Path, create_database: Callable[[], str]
) -> None:
    """What .dockerignore lets through makes a package that works, and does not change itself."""
    copy_context(tmp_path / "context")
    application = tmp_path / "app"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, *options, "--target", application, tmp_path / "context"], check=True)
    before = list_files(application)
    environment = clean_environment({"DATABASE_URL": create_database()})
    environment["PYTHONPATH"] = str(application)
    for arguments in (["migrate"], ["keys", "create", "--project", "proj"], ["migrate", "--check"]):
        # Isolated from the working directory, which is the source tree.
        command = [sys.executable, "-P", "-m", "server", *arguments]
        subprocess.run(command, env=environment, check=True, timeout=60, stdout=subprocess.DEVNULL)
    assert list_files(application) == before
    assert any(path.endswith(".pyc") for path in before)


def list_files(directory: Path) -> set[str]:
    """Return the files below a directory."""
    return {os.path.join(place, name) for place, _, names in os.walk(directory) for name in names}
