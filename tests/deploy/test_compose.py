"""compose.yaml: valid, and made of what is there: paths, services, command lines, versions."""

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from gateway.commands import COMMANDS
from gateway.ops import probe
from gateway.rules.load import check_rules
from gateway.run import STOP_TIMEOUT
from gateway.settings import KafkaTarget, Role, from_sources

ROOT = Path(__file__).parent.parent.parent
FILE = ROOT / "deploy" / "compose.yaml"
COMPOSE: dict[str, Any] = yaml.safe_load(FILE.read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"] == "webhook-gateway"}
NAMESPACE = {"m": "http://maven.apache.org/POM/4.0.0"}


def test_it_is_valid() -> None:
    _validate(COMPOSE)
    with pytest.raises(jsonschema.ValidationError, match="volume"):
        _validate({**COMPOSE, "services": {**SERVICES, "router": {**SERVICES["router"], "volume": []}}})


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_each_mount_exists(name: str) -> None:
    for volume in SERVICES[name].get("volumes", ()):
        source, _, target = volume.partition(":")
        if source.startswith("."):
            assert (FILE.parent / source).is_dir()
            assert target.endswith(":ro")
        else:
            assert source in COMPOSE["volumes"]


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_service_waits_for_others(name: str) -> None:
    for other, how in SERVICES[name].get("depends_on", {}).items():
        is_once = how["condition"] == "service_completed_successfully"
        assert how["condition"] in {"service_healthy", "service_completed_successfully"}
        assert is_once == (SERVICES[other]["restart"] == "no")
        assert is_once or "test" in SERVICES[other]["healthcheck"]


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_service_has_no_more_rights_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    # Kafka's image writes its configuration when it starts.
    assert service.get("read_only", False) == (name != "kafka")
    # Only senders come from other machines.
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()) if name != "ingress")


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_foreign_image_has_a_version(name: str) -> None:
    assert name in OURS or re.search(r":v?\d+\.\d+\.\d+$", SERVICES[name]["image"])


def test_the_broker_is_of_the_version_that_is_tested() -> None:
    pom = ET.parse(ROOT / "dev" / "broker" / "pom.xml")
    [version] = [
        each.findtext("m:version", namespaces=NAMESPACE)
        for each in pom.iterfind(".//m:dependency", NAMESPACE)
        if "kafka_" in each.findtext("m:artifactId", "", NAMESPACE)
    ]
    assert SERVICES["kafka"]["image"] == f"apache/kafka:{version}"
    checks = yaml.safe_load((ROOT / ".github" / "workflows" / "checks.yml").read_text())
    assert checks["jobs"]["test"]["services"]["kafka"]["image"] == f"apache/kafka:{version}"


def test_the_gateway_accepts_its_command_line() -> None:
    roles = []
    for service in OURS.values():
        words = service["command"]
        command = COMMANDS.get(" ".join(words[:2])) or COMMANDS[words[0]]
        arguments = command.parser().parse_args(words[len(command.name.split()) :])
        settings = from_sources({"role": getattr(arguments, "role", None)}, service["environment"])
        assert settings.log == KafkaTarget((_broker(),))
        if command.name == "run":
            roles.append(settings.role)
            # Prometheus asks from another container.
            assert settings.admin.host == "0.0.0.0"
            assert int(service["stop_grace_period"].removesuffix("s")) > STOP_TIMEOUT
            assert service["healthcheck"]["test"][-1] in probe.PATHS
            assert service["healthcheck"]["test"][-2] == probe.__name__
    assert sorted(roles) == [Role.CONSOLE, Role.INGRESS, Role.ROUTER]


def test_the_index_is_kept_and_found_by_commands_in_a_volume_of_its_own() -> None:
    """The tmpfs of the others would lie over it, and begin it anew with each start."""
    console = SERVICES["console"]
    settings = from_sources({"role": "console"}, console["environment"])
    # What a command in the container opens.
    assert settings.index == from_sources({}, console["environment"]).index
    folders = dict(volume.split(":")[:2] for volume in console["volumes"])
    assert folders["index"] == str(settings.index.file.parent)
    assert folders["index"] not in console["tmpfs"]
    assert [name for name, service in SERVICES.items() if "index" in str(service.get("volumes"))] == ["console"]


def test_acknowledged_events_outlive_the_ingress_in_a_volume_of_its_own() -> None:
    """A tmpfs over it would lose them with the container."""
    ingress = SERVICES["ingress"]
    spool = from_sources({"role": "ingress"}, ingress["environment"]).spool
    folders = dict(volume.split(":")[:2] for volume in ingress["volumes"])
    assert spool.file is not None
    assert folders["spool"] == str(spool.file.parent)
    assert folders["spool"] not in ingress["tmpfs"]
    assert COMPOSE["volumes"]["spool"] is None, "one of the machine, which `down` leaves"
    assert [name for name, service in SERVICES.items() if "spool" in str(service.get("volumes"))] == ["ingress"]
    assert [name for name in OURS if "GATEWAY_SPOOL" in OURS[name]["environment"]] == ["ingress"]


def test_prometheus_finds_the_gateway_and_alertmanager() -> None:
    config = yaml.safe_load((FILE.parent / "prometheus" / "prometheus.yml").read_text())
    scraped = {
        target for job in config["scrape_configs"] for each in job["static_configs"] for target in each["targets"]
    }
    admin = from_sources({}, SERVICES["router"]["environment"]).admin
    running = [name for name, service in OURS.items() if service["restart"] != "no"]
    assert {f"{name}:{admin.port}" for name in running} <= scraped
    assert {target.partition(":")[0] for target in scraped} <= SERVICES.keys()


def test_grafana_finds_its_dashboards_and_prometheus() -> None:
    mounted = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    provisioning = FILE.parent / "grafana" / "provisioning"
    [dashboards] = [yaml.safe_load(file.read_text()) for file in provisioning.glob("dashboards/*")]
    assert [each["options"]["path"] for each in dashboards["providers"]] == [mounted["./grafana/dashboards"]]
    [sources] = [yaml.safe_load(file.read_text()) for file in provisioning.glob("datasources/*")]
    assert [each["url"] for each in sources["datasources"]] == ["http://prometheus:9090"]


def test_its_rules_are_fine_and_their_secrets_given() -> None:
    file = FILE.parent / "compose" / "rules" / "routes.yaml"
    _, problems = check_rules(file, resolve=False)
    assert not [problem for problem in problems if problem.severity == "error"]
    named = set(re.findall(r"\$\{file:/run/secrets/([^}]+)\}", file.read_text()))
    assert named
    for name, service in OURS.items():
        assert (set(service["secrets"]) == set()) if name == "console" else (named <= set(service["secrets"]))


def test_no_secret_is_in_the_repository() -> None:
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    for secret in COMPOSE["secrets"].values():
        folder = (FILE.parent / secret["file"]).parent.relative_to(ROOT)
        assert f"{folder}/" in ignored
    words = re.compile(r"password|secret|token", re.IGNORECASE)
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            assert not words.search(name) or str(value).startswith("/run/secrets/")


def _validate(compose: Mapping[str, Any]) -> None:
    text = resources.files("check_jsonschema.builtin_schemas").joinpath("vendor/compose-spec.json").read_text()
    schema = json.loads(text)
    jsonschema.validators.validator_for(schema)(schema).validate(compose)


def _broker() -> str:
    advertised = SERVICES["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    return str(advertised).removeprefix("PLAINTEXT://")
