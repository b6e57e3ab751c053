"""Rules, alerts and their routing: valid, tested on series, and each alert told of in the runbooks."""

import itertools
import json
import re
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

import gateway.ingress.tls
import gateway.reload
import gateway.run
from gateway.commands import COMMANDS
from gateway.engine.delivery.breaker import Breaker, BreakerPolicy
from gateway.log.topics import Topics
from gateway.model import Result
from gateway.processes.metrics_page import metrics_page
from gateway.settings import Role
from gateway.telemetry.metrics import REJECTIONS, Metrics, process_registry
from tests.gateway_process import free_ports
from tests.telemetry.test_log_events import documented
from tests.test_documents import CODE, anchors

ROOT = Path(__file__).parent.parent.parent
PROMETHEUS = ROOT / "deploy" / "prometheus"
ALERTMANAGER = ROOT / "deploy" / "alertmanager" / "alertmanager.yml"
RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))
SERIES = sorted((PROMETHEUS / "tests").glob("*.yml"))
RUNBOOKS = ROOT / "docs" / "runbooks.md"
SEVERITIES = {"page", "ticket"}
OURS = re.compile(r"\bgateway_\w+")
SUFFIX = re.compile(r"_(bucket|count|sum)$")
OUR_COMMAND = re.compile(r"`(gateway [^`]+)`")

EVIDENCE = re.compile(
    r"(?:The lines? (?P<lines>`\w+`.*?),|No line, as (?P<reason>[^`;]{8,});)"
    r" the metrics? (?P<metrics>`gateway_.*?), (?P<commands>`gateway \w.*)"
)
"""What a section's "Look at" begins with: "The line `…`, the metric `…`, `gateway …`"."""

START_TIMEOUT = 10.0

Tool = Callable[[str], Path]

pytestmark = [
    pytest.mark.timeout(180),  # where CI has to fetch Prometheus first
    pytest.mark.rotated(share=1 / 6, group="prometheus"),
]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def rules() -> Iterator[dict[str, Any]]:
    for file in RULES:
        for group in yaml.safe_load(file.read_text())["groups"]:
            yield from group["rules"]


def own_jobs(alert: str) -> re.Pattern[str]:
    """Return by which names of jobs an alert knows processes that have never answered."""
    [selector] = re.findall(r"\bup\{(.*?)\}", alerts()[alert]["expr"])
    return re.compile(selector.partition("=~")[2].strip('"'))


def metrics() -> set[str]:
    """Return the names of all that a gateway exposes, without what a histogram's series end in."""
    registry = process_registry()
    Metrics(registry)
    of_parent = text_string_to_metric_families(metrics_page({}, (), is_open=False).decode())
    found = [*registry.collect(), *of_parent]
    return {metric.name + ("_total" if metric.type == "counter" else "") for metric in found}


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
    run(tool("amtool"), "check-config", ALERTMANAGER)


@pytest.mark.parametrize("severity", sorted(SEVERITIES))
def test_an_alert_goes_where_its_severity_says(tool: Tool, severity: str) -> None:
    routed = run(tool("amtool"), "config", "routes", "test", f"--config.file={ALERTMANAGER}", f"severity={severity}")
    assert routed.strip() == severity


def test_an_inhibition_names_alerts_that_there_are() -> None:
    config = yaml.safe_load(ALERTMANAGER.read_text())
    for rule in config["inhibit_rules"]:
        for matcher in (*rule["source_matchers"], *rule["target_matchers"]):
            label, operator, value = matcher.split(maxsplit=2)
            for part in value.strip('"').split("|") if operator == "=~" else [value]:
                assert label != "alertname" or any(re.fullmatch(part, name) for name in alerts()), part


@pytest.mark.parametrize("prefix", ["gateway.", "hooks-", ""])
def test_what_waits_in_a_spool_waits_for_topics_of_events_alone(prefix: str) -> None:
    """These may have any name; no topic of the gateway's own mutes what is said of spools."""
    of_events = {f"{prefix}events.{source}" for source in ("github", "github-audit", "control", "access-control")}
    topics, events = Topics(prefix), {*of_events, "payments", "orders.in"}
    specs = topics.specs(events, [("mirror", "ledger")], has_responses=True, has_quarantine=True)
    rules = [
        rule
        for rule in yaml.safe_load(ALERTMANAGER.read_text())["inhibit_rules"]
        if "GatewaySpoolWaits" in str(rule["target_matchers"])
    ]
    assert {spec.name for spec in specs if any(_is_of_topic(rule, spec.name) for rule in rules)} == events


def _is_of_topic(rule: Mapping[str, Any], topic: str) -> bool:
    """Return whether what is said of a topic meets the matchers of an inhibition that name topics."""
    matchers = [each.split(" ", 2) for each in rule["source_matchers"] if each.startswith("topic ")]
    return all(bool(re.fullmatch(text.strip('"'), topic)) is (sign == "=~") for _, sign, text in matchers)


@pytest.fixture(scope="module")
def alertmanager(tool: Tool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the URL of an Alertmanager with our configuration."""
    folder, [port] = tmp_path_factory.mktemp("alertmanager"), free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [str(tool("alertmanager")), f"--config.file={ALERTMANAGER}", f"--storage.path={folder / 'data'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address="]
    with (folder / "log").open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        until = time.monotonic() + START_TIMEOUT
        while not answers(f"{url}/-/ready"):
            assert time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait()


DOWN = {"alertname": "GatewayAllDown", "job": "gateway-router", "role": "router"}
LOG_DOWN = {"alertname": "GatewayLogDown"}
BURNS = {"alertname": "GatewayDeliveryBudgetBurnsFast"}
UNDONE = {"alertname": "GatewayEventPendingTooLong", "topic": "gateway.events.github"}
UNREAD = {"alertname": "GatewayPartitionUnavailable", "topic": "gateway.events.github", "partition": "3"}
LOST = {"alertname": "GatewayRecordsLost", "topic": "gateway.events.github"}
INGRESS_DOWN = {"alertname": "GatewayProcessDown", "job": "gateway-ingress", "instance": "gateway-ingress-1"}
SPOOLED = {"alertname": "GatewayEventsSpooled"}
SPOOL_WAITS = {"alertname": "GatewaySpoolWaits", "job": "gateway-ingress", "instance": "gateway-ingress-1"}
SPOOL_FULL = {"alertname": "GatewaySpoolFull", "job": "gateway-ingress", "instance": "gateway-ingress-1"}
OF_ONE = {"job": "gateway-router", "instance": "gateway-router-1"}


@pytest.mark.parametrize(
    ("cause", "effect", "is_muted"),
    [
        pytest.param(DOWN, BURNS, False, id="no router of a job, and others deliver late"),
        pytest.param(DOWN, {"alertname": "GatewayProcessDown", **OF_ONE}, True, id="no router, one of them"),
        pytest.param(DOWN, INGRESS_DOWN, False, id="no router, and an ingress"),
        pytest.param(LOG_DOWN, BURNS, True, id="no log, and nothing is delivered"),
        pytest.param(LOG_DOWN, UNDONE, True, id="no log, and nothing is done"),
        pytest.param(UNREAD, UNDONE, True, id="a partition is not read, and its events are not done"),
        pytest.param(UNREAD | {"topic": "gateway.dead"}, UNDONE, False, id="a partition of another topic is not read"),
        pytest.param(UNREAD, SPOOL_WAITS, True, id="a partition takes nothing, and its events wait in a spool"),
        pytest.param(
            UNREAD | {"topic": "gateway.retry.20h"},
            SPOOL_WAITS,
            False,
            id="a partition of a retry topic takes nothing, and events wait in a spool",
        ),
        pytest.param(
            UNREAD | {"topic": "gateway.audit"}, SPOOLED, False, id="the audit topic is missing, and events are spooled"
        ),
        pytest.param(LOG_DOWN, SPOOLED, True, id="no log, and events are spooled"),
        pytest.param(LOG_DOWN, SPOOL_FULL, False, id="no log, and a spool is full"),
        pytest.param(LOG_DOWN, LOST, False, id="no log, and records lost"),
        pytest.param(LOG_DOWN | OF_ONE, BURNS, False, id="no log for one, and little is delivered"),
        pytest.param(LOG_DOWN, LOG_DOWN | OF_ONE, False, id="no log, one of them"),
    ],
)
def test_an_outage_mutes_its_consequences_in_its_own_namespace(
    alertmanager: str, request: pytest.FixtureRequest, cause: dict[str, str], effect: dict[str, str], *, is_muted: bool
) -> None:
    own, other = {"namespace": request.node.name}, {"namespace": "staging"}
    tell(alertmanager, cause | own, effect | own, effect | other)
    assert is_inhibited(alertmanager, effect | own) is is_muted
    assert not is_inhibited(alertmanager, effect | other)


def test_an_outage_mutes_its_consequences_where_there_are_no_namespaces(alertmanager: str) -> None:
    tell(alertmanager, LOG_DOWN, BURNS)
    assert is_inhibited(alertmanager, BURNS)


def tell(url: str, *alerts: dict[str, str]) -> None:
    """Tell Alertmanager of alerts, and return when it knows of their effects: those of the last ones come last."""
    last = {"namespace": f"last-{time.monotonic_ns()}"}
    body = json.dumps([{"labels": labels} for labels in (*alerts, LOG_DOWN | last, BURNS | last)]).encode()
    request = urllib.request.Request(f"{url}/api/v2/alerts", body, {"content-type": "application/json"})
    urllib.request.urlopen(request, timeout=5).close()
    until = time.monotonic() + START_TIMEOUT
    while not is_inhibited(url, BURNS | last):
        assert time.monotonic() < until, alerts
        time.sleep(0.02)


def is_inhibited(url: str, labels: dict[str, str]) -> bool:
    with urllib.request.urlopen(f"{url}/api/v2/alerts", timeout=5) as response:
        [found] = [each for each in json.load(response) if each["labels"] == labels]
    return bool(found["status"]["inhibitedBy"])


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except OSError:
        return False
    return True


# ---- Alerts on series ----


@pytest.mark.parametrize("file", SERIES, ids=lambda file: str(file.stem))
def test_alerts_fire_and_are_silent(tool: Tool, file: Path) -> None:
    run(tool("promtool"), "test", "rules", file)


def test_each_alert_is_seen_to_fire_and_to_be_silent() -> None:
    seen: dict[str, set[bool]] = {name: set() for name in alerts()}
    for file in SERIES:
        for test in yaml.safe_load(file.read_text())["tests"]:
            for check in test["alert_rule_test"]:
                seen[check["alertname"]].add(bool(check["exp_alerts"]))
    assert {name: found for name, found in seen.items() if found != {True, False}} == {}


# ---- What an alert looks at ----


def test_gateways_are_kept_apart() -> None:
    """By its namespace: nothing is added up over two of them, nor compared."""
    for rule in rules():
        grouped = re.findall(r"\b(?:sum|max|min|count|avg|on)\b(?: by)? \((.*?)\)", rule["expr"])
        assert len(grouped) == len(re.findall(r"\b(?:sum|max|min|count|avg|on)\b", rule["expr"]))
        assert all(labels.split(", ")[0] == "namespace" for labels in grouped), rule["expr"]


def test_brackets_say_what_an_unless_is_of() -> None:
    """`and` and `unless` bind alike, from the left: beside each other, one has to know that to read them."""
    for rule in rules():
        text = re.sub(r'"[^"]*"', "", rule["expr"])
        innermost = re.compile(r"[(\[{]([^()\[\]{}]*)[)\]}]")
        levels = []
        while found := innermost.search(text):
            levels.append(found[1])
            text = text[: found.start()] + text[found.end() :]
        for operands in itertools.chain.from_iterable(re.split(r"\bor\b", level) for level in (*levels, text)):
            assert not {"and", "unless"} <= set(operands.split()), rule


def test_the_jobs_of_our_own_configuration_are_known_to_the_alerts_by_name() -> None:
    """Without a console nothing is down, but somebody is to look after it."""
    outage, known = own_jobs("GatewayAllDown"), own_jobs("GatewayProcessDown")
    for role in Role:
        assert bool(outage.fullmatch(f"gateway-{role}")) is (role.receives or role.delivers)
        assert known.fullmatch(f"gateway-{role}")
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    assert all(known.fullmatch(job["job_name"]) for job in config["scrape_configs"])


def test_a_destination_is_down_by_the_results_that_open_a_breaker() -> None:
    def opens(result: Result) -> bool:
        breaker = Breaker(BreakerPolicy(consecutive_failures=1))
        breaker.record(result, now=0.0)
        return breaker.is_open

    [told] = re.findall(r'result=~"(.*?)"', alerts()["GatewayBreakerOpenLong"]["expr"])
    assert set(told.split("|")) == {result for result in Result if opens(result)}


def test_what_strangers_can_have_refused_is_a_ticket_and_no_error_of_an_objective() -> None:
    """A 503 before verification: nobody is woken by it, in whatever window."""
    unverified = {"key_unavailable", "slow_bodies"}
    assert unverified < set(REJECTIONS)
    ratios = [rule for rule in rules() if rule.get("record", "").startswith("gateway:acknowledgement_errors:")]
    assert len(ratios) == 7
    for rule in ratios:
        window = rule["record"].rpartition("ratio_rate")[2]
        [(reasons, of)] = re.findall(r'- sum .*gateway_rejected_total\{.*reason=~"(.*?)"\}\[(.*?)\]', rule["expr"])
        assert (set(reasons.split("|")), of) == (unverified, window)
        assert set(re.findall(r"\[(.*?)\]", rule["expr"])) == {window}
    told = alerts()["GatewaySignaturesRefused"]
    assert told["labels"]["severity"] == "ticket"
    for reasons in re.findall(r'reason=~"(.*?)"', told["expr"]):
        assert unverified < set(reasons.split("|"))


# ---- What an alert tells ----


@pytest.mark.parametrize("name", alerts())
def test_an_alert_has_a_severity_a_description_and_a_runbook(name: str) -> None:
    alert = alerts()[name]
    assert alert["labels"]["severity"] in SEVERITIES
    is_of_rules = not {"source", "route", "destination"}.isdisjoint(labels(alert))
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"} | (
        {"owner"} if is_of_rules else set()
    )
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


def section_of(name: str) -> str:
    [section] = re.findall(rf"^### {name}\n(.*?)(?=^##|\Z)", RUNBOOKS.read_text(), re.MULTILINE | re.DOTALL)
    return str(section)


@pytest.mark.parametrize("name", alerts())
def test_a_section_has_means_look_at_do_and_wake(name: str) -> None:
    section = section_of(name)
    assert re.findall(r"^\*\*(.+?)\.\*\*", section, re.MULTILINE) == ["Means", "Look at", "Do", "Wake"]
    assert f"`{alerts()[name]['labels']['severity']}`" in section


@pytest.mark.parametrize("name", alerts())
def test_a_section_names_the_line_the_metric_and_the_command_that_show_its_case(name: str) -> None:
    assert list(faults_of(section_of(name), about=measured(alerts()[name]["expr"]))) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("*Log*: Lag.", "form"),
        ("The line `rules_refused`, `gateway status`.", "form"),
        ("The line `rules_refused`, the metric `gateway_log_up`.", "form"),
        ("No line; the metric `gateway_log_up`, `gateway status`.", "form"),
        ("No line, as nothing has failed; the metric `gateway_log_up`. `gateway status` tells.", "form"),
        ("The line `rules_refuse`, the metric `gateway_log_up`, `gateway status`.", "rules_refuse"),
        ("The lines `stopped` and `gone`, the metric `gateway_log_up`, `gateway status`.", "gone"),
        ("The line `stopped`, the metric `gateway_rules_refused`, `gateway status`.", "gateway_log_up"),
        ("The line `stopped`, the metrics `gateway_log_up` and `gateway_no`, `gateway status`.", "gateway_no"),
        ("The line `stopped`, the metric `gateway_log_up`, `gateway states`.", "gateway states"),
        ("The line `stopped`, the metric `gateway_log_up`, `gateway status --all`.", "gateway status --all"),
        ("The line `stopped`, the metric `gateway_log_up`, `gateway status`, `gateway dead`.", "gateway dead"),
    ],
)
def test_a_section_without_one_of_them_or_with_one_that_there_is_not_is_found(text: str, fault: str) -> None:
    assert [fault in told for told in faults_of(f"**Look at.** {text} *Log*: Append.", about={"gateway_log_up"})] == [
        True
    ]


def faults_of(section: str, *, about: set[str]) -> Iterator[str]:
    """Tell what the first sentence of a section's "Look at" lacks, or names that there isn't.

    `about` are the metrics of its alert, of which it is to name one.
    """
    look_at = " ".join(section.partition("**Look at.** ")[2].partition("\n\n")[0].split())
    sentence = re.split(r"\.(?= |$)", look_at)[0]
    found = EVIDENCE.fullmatch(sentence)
    if found is None:
        yield f"expected the form of the others, got {sentence}"
        return
    rows = documented()
    fields = {field for row in rows.values() for field in row.fields}
    for line in CODE.findall(found["lines"] or ""):
        if line not in rows.keys() | fields:
            yield f"expected a line of the log, got {line}"
    named = {metric.partition("{")[0] for metric in CODE.findall(found["metrics"])}
    yield from [f"expected a metric, got {metric}" for metric in sorted(named - metrics())]
    if not named & about:
        yield f"expected one of {sorted(about)}, got {sorted(named)}"
    for command in OUR_COMMAND.findall(found["commands"]):
        if not is_command(command.split()):
            yield f"expected a command, got {command}"


def is_command(words: list[str]) -> bool:
    """Return whether there is such a command, and it takes these arguments."""
    _, *called = words
    for length in (2, 1):
        command = COMMANDS.get(" ".join(called[:length]))
        if command is not None:
            try:
                command.parser().parse_intermixed_args(called[length:])
            except SystemExit:
                return False
            return True
    return False


def measured(expression: str) -> set[str]:
    """Return the metrics that an expression is made of, also by way of recorded series."""
    recorded = {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}
    series = [recorded[name] for name in re.findall(r"gateway:\w+:\w+", expression)]
    return {SUFFIX.sub("", name) for text in (expression, *series) for name in OURS.findall(text)}


def test_the_renewal_of_each_owner_is_documented() -> None:
    """By the owner that its name begins with: some are read when they change, some at the start alone."""
    files = [Path(module.__file__ or "") for module in (gateway.run, gateway.reload, gateway.ingress.tls)]
    owners = [owner for file in files for owner in re.findall(r'set_certificate_expiries\("(\w+)"', file.read_text())]
    [section] = re.findall(r"^### GatewayCertificateExpires\n(.*?)^###", RUNBOOKS.read_text(), re.MULTILINE | re.DOTALL)
    assert owners
    assert all(f"`{owner}/`" in section for owner in owners)


def test_a_rule_is_about_metrics_that_there_are() -> None:
    known = metrics()
    for rule in rules():
        for name in OURS.findall(rule["expr"]):
            assert name in known or SUFFIX.sub("", name) in known, f"{rule}: {name}"


def test_the_runbooks_are_about_metrics_that_there_are() -> None:
    known = metrics()
    for name in OURS.findall(RUNBOOKS.read_text()):
        assert name in known or SUFFIX.sub("", name) in known, name
