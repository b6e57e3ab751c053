"""Rules, alerts and their routing: valid, tested on series, and each alert told of in the runbooks."""

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.telemetry.metrics import Metrics, process_registry
from tests.test_documents import anchors

ROOT = Path(__file__).parent.parent.parent
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))
SERIES = sorted((PROMETHEUS / "tests").glob("*.yml"))
RUNBOOKS = ROOT / "docs" / "runbooks.md"
SEVERITIES = {"page", "ticket"}
OURS = re.compile(r"\bgateway_\w+")
SUFFIX = re.compile(r"_(bucket|count|sum)$")

Tool = Callable[[str], Path]

pytestmark = pytest.mark.timeout(180)  # where CI has to fetch Prometheus first


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def rules() -> Iterator[dict[str, Any]]:
    for file in RULES:
        for group in yaml.safe_load(file.read_text())["groups"]:
            yield from group["rules"]


def metrics() -> set[str]:
    """Return the names of all that a gateway exposes, without what a histogram's series end in."""
    registry = process_registry()
    Metrics(registry)
    return {metric.name + ("_total" if metric.type == "counter" else "") for metric in registry.collect()}


def run(program: Path, *arguments: str | Path) -> str:
    result = subprocess.run(
        [program, *arguments], cwd=PROMETHEUS, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


# ---- What Prometheus and Alertmanager take ----


def test_prometheus_takes_its_configuration_and_every_rule(tool: Tool) -> None:
    run(tool("promtool"), "check", "config", "prometheus.yml")
    run(tool("promtool"), "check", "rules", "--lint=all", "--lint-fatal", *RULES)


def test_alertmanager_takes_its_configuration(tool: Tool) -> None:
    run(tool("amtool"), "check-config", ROOT / "deploy" / "alertmanager" / "alertmanager.yml")


@pytest.mark.parametrize("severity", sorted(SEVERITIES))
def test_an_alert_goes_where_its_severity_says(tool: Tool, severity: str) -> None:
    config = ROOT / "deploy" / "alertmanager" / "alertmanager.yml"
    routed = run(tool("amtool"), "config", "routes", "test", f"--config.file={config}", f"severity={severity}")
    assert routed.strip() == severity


def test_an_inhibition_names_alerts_that_there_are() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "alertmanager" / "alertmanager.yml").read_text())
    for rule in config["inhibit_rules"]:
        for matcher in (*rule["source_matchers"], *rule["target_matchers"]):
            _, operator, value = matcher.split(maxsplit=2)
            for part in value.strip('"').split("|") if operator == "=~" else [value]:
                assert any(re.fullmatch(part, name) for name in alerts()), part


# ---- Alerts on series ----


@pytest.mark.parametrize("file", SERIES, ids=lambda file: str(file.stem))
def test_alerts_fire_and_are_silent_as_told(tool: Tool, file: Path) -> None:
    run(tool("promtool"), "test", "rules", file)


def test_each_alert_is_seen_to_fire_and_to_be_silent() -> None:
    seen: dict[str, set[bool]] = {name: set() for name in alerts()}
    for file in SERIES:
        for test in yaml.safe_load(file.read_text())["tests"]:
            for check in test["alert_rule_test"]:
                seen[check["alertname"]].add(bool(check["exp_alerts"]))
    assert {name: found for name, found in seen.items() if found != {True, False}} == {}


# ---- What an alert tells ----


@pytest.mark.parametrize("name", alerts())
def test_an_alert_says_whom_it_wakes_what_is_wrong_and_where_to_read_on(name: str) -> None:
    alert = alerts()[name]
    assert alert["labels"]["severity"] in SEVERITIES
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
    assert "{{" in alert["annotations"]["summary"] + alert["annotations"]["description"] or not labels(alert), name
    document, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    assert (ROOT / document, anchor) == (RUNBOOKS, name.lower())


def labels(alert: dict[str, Any]) -> list[str]:
    """Return what an alert is about one of: the labels that its expression keeps."""
    found = re.match(r"\(*\s*\w+ by \((.*?)\)", alert["expr"])
    return found[1].split(", ") if found else []


def test_each_alert_has_its_section_and_each_section_its_alert() -> None:
    text = RUNBOOKS.read_text()
    assert {name.lower() for name in alerts()} <= anchors(text)
    assert set(re.findall(r"^### (Gateway\w+)$", text, re.MULTILINE)) == set(alerts())


@pytest.mark.parametrize("name", alerts())
def test_a_section_says_what_it_means_what_to_look_at_and_what_to_do(name: str) -> None:
    [section] = re.findall(rf"^### {name}\n(.*?)(?=^##|\Z)", RUNBOOKS.read_text(), re.MULTILINE | re.DOTALL)
    assert re.findall(r"^\*\*(.+?)\.\*\*", section, re.MULTILINE) == ["Means", "Look at", "Do", "Wake"]
    assert f"`{alerts()[name]['labels']['severity']}`" in section


def test_a_rule_is_about_metrics_that_there_are() -> None:
    known = metrics()
    for rule in rules():
        for name in OURS.findall(rule["expr"]):
            assert name in known or SUFFIX.sub("", name) in known, f"{rule}: {name}"


def test_the_runbooks_are_about_metrics_that_there_are() -> None:
    known = metrics()
    for name in OURS.findall(RUNBOOKS.read_text()):
        assert name in known or SUFFIX.sub("", name) in known, name
