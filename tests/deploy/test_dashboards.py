"""The dashboards: written from one description, and each of their queries has been seen to return something."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.grafana.boards import BOARDS, DASHBOARDS, Board, Panel, dashboard, text_of
from dev.stack import Stack, StackError, ask
from tests.deploy.test_prometheus import OURS, RUNBOOKS, SUFFIX, Tool, alerts, metrics, rules
from tests.test_documents import anchors

SCRAPE_EVERY = 0.5
HEALTHY_FOR = 330.0
"""Seconds: five minutes is what most alerts wait for."""
DATA_TIMEOUT = 60.0
PANELS = [pytest.param(panel, id=f"{board.uid}: {panel.title}") for board in BOARDS for panel in board.panels]
UNITS = {"none", "s", "bytes", "reqps", "ops", "percentunit"}
"""Those of Grafana's units that we use: a misspelt one is shown behind the number as it is."""

NAME = re.compile(r"\b(?:gateway[_:]|process_|python_|up\b)")
SELECTOR = re.compile(r"\{(.*?)\}")


def test_the_files_match_their_description() -> None:
    """`python -m deploy.grafana.boards` writes them."""
    assert {file.name: file.read_text() for file in DASHBOARDS.iterdir()} == {
        board.file.name: text_of(board) for board in BOARDS
    }


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_has_a_meaning_a_unit_and_an_action(panel: Panel) -> None:
    assert panel.text.endswith(".")
    assert panel.unit in UNITS
    assert panel.alert in alerts()
    assert panel.runbook in anchors(RUNBOOKS.read_text())


@pytest.mark.parametrize("panel", PANELS)
def test_a_query_is_about_metrics_that_there_are(panel: Panel) -> None:
    known = metrics()
    for query in panel.queries:
        for name in OURS.findall(query.expr):
            assert name in known or SUFFIX.sub("", name) in known, name


@pytest.mark.parametrize("panel", PANELS)
def test_a_query_is_about_the_gateways_of_the_namespaces_and_jobs_that_were_chosen(panel: Panel) -> None:
    for query in panel.queries:
        expr = query.at(rate_interval="1m", variables={"namespace": "production", "job": "webhooks"})
        series = re.findall(rf"({NAME.pattern}[\w:]*){SELECTOR.pattern}", expr)
        assert len(series) == len(NAME.findall(expr)), expr
        for name, selector in series:
            # Objectives are of a whole gateway: what is recorded for them has no job.
            chosen = 'namespace=~"production"' if ":" in name else 'namespace=~"production", job=~"webhooks"'
            assert re.match(rf"{re.escape(chosen)}(, |$)", selector), expr


def test_recorded_series_have_no_job() -> None:
    """What the test above leaves out."""
    recorded = [rule for rule in rules() if "record" in rule]
    assert recorded
    assert not any("job" in each["expr"] for each in recorded)


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: str(board.uid))
def test_every_dashboard_is_chosen_by_the_same_variables(board: Board) -> None:
    """In the same order, so that links between them keep what was chosen."""
    names = [each["name"] for each in dashboard(board)["templating"]["list"]]
    assert names[:4] == ["datasource", "runbooks", "namespace", "job"]


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: str(board.uid))
def test_panels_lie_beside_each_other(board: Board) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard(board)["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: str(board.uid))
def test_a_dashboards_variables_are_defined(board: Board) -> None:
    built = dashboard(board)
    variables = {each["name"] for each in built["templating"]["list"]}
    text = json.dumps(built["panels"])
    assert set(re.findall(r"\$\{?([a-z]\w*)", text)) <= variables
    for name in variables - {"datasource", "runbooks"}:
        assert f"${name}" in text, f"{name} changes nothing"


def test_the_metrics_of_the_gateway_are_on_a_dashboard() -> None:
    shown = {SUFFIX.sub("", name) for board in BOARDS for panel in board.panels for query in panel.queries
             for name in OURS.findall(query.expr)}  # fmt: skip
    unseen = {name for name in metrics() if name.startswith("gateway_")} - shown
    assert unseen <= {
        "gateway_requests_total",  # by status: in the objectives
        "gateway_dedupe_conflicts_total",
        "gateway_dedupe_undecided_total",
        "gateway_rules_reloads_total",
        "gateway_rules_loaded_timestamp_seconds",
        "gateway_owner_info",  # who answers for what doesn't change: to be joined with others
        "gateway_spans_total",
    }


# ---- On a real Prometheus ----

on_a_stack = pytest.mark.rotated(share=1 / 4, group="dashboards")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("webhooks", "embedded"), id="any job"),
        pytest.param(("webhooks", "kafka"), id="a job of two roles", marks=pytest.mark.full),
        pytest.param(("", "kafka"), id="a job for each role", marks=pytest.mark.full),
    ],
)
def stack(tool: Tool, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Stack]:
    """Return a gateway under load and faults, with a Prometheus that scrapes it: one process, or one for each role."""
    for name in ("prometheus", "alertmanager"):
        tool(name)
    folder, (job, log) = tmp_path_factory.mktemp("stack") / "state", request.param
    stack = Stack(folder, log=log, scrape_every=SCRAPE_EVERY, job=job)
    stack.up()
    until = time.monotonic() + DATA_TIMEOUT
    while not ask(stack.prometheus, "gateway_build_info"):  # whichever test comes first
        assert time.monotonic() < until
        time.sleep(SCRAPE_EVERY)
    yield stack
    stack.down()


@on_a_stack
@pytest.mark.timeout(180)
def test_every_query_of_every_panel_returns_something(stack: Stack) -> None:
    assert stack.without_data(timeout=DATA_TIMEOUT) == []


@on_a_stack
@pytest.mark.timeout(180)
def test_every_rule_is_evaluated_without_a_failure(stack: Stack) -> None:
    until = time.monotonic() + DATA_TIMEOUT
    while (found := health_of_rules(stack)) != {"ok"}:
        assert time.monotonic() < until, found
        time.sleep(SCRAPE_EVERY)


@on_a_stack
def test_a_gateway_that_answers_is_not_down_whatever_its_job_is_called(stack: Stack) -> None:
    assert ask(stack.prometheus, "gateway_build_info") != []
    until = time.monotonic() + DATA_TIMEOUT
    while ask(stack.prometheus, 'ALERTS{alertname=~"GatewayAllDown|GatewayProcessDown"}') != []:
        assert time.monotonic() < until  # as of before the first scrape they are pending
        time.sleep(SCRAPE_EVERY)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_nothing_fires_of_a_gateway_to_which_nothing_happens(tool: Tool, tmp_path: Path) -> None:
    """For longer than most alerts wait: it starts without events, and Prometheus knows nothing of its past."""
    for name in ("prometheus", "alertmanager"):
        tool(name)
    stack = Stack(tmp_path / "state", log="kafka", scrape_every=SCRAPE_EVERY, job="webhooks", has_traffic=False)
    stack.up()
    try:
        until = time.monotonic() + HEALTHY_FOR
        while time.monotonic() < until:
            assert ask(stack.prometheus, 'ALERTS{alertstate="firing"}') == []
            time.sleep(1)
        assert ask(stack.prometheus, "ALERTS") == [], "nor would any fire that waits for longer"
        assert len(ask(stack.prometheus, "gateway_build_info")) == 3
        assert health_of_rules(stack) == {"ok"}
    finally:
        stack.down()


def health_of_rules(stack: Stack) -> set[str]:
    with urllib.request.urlopen(f"{stack.prometheus}/api/v1/rules", timeout=10) as response:
        groups = json.load(response)["data"]["groups"]
    return {rule["health"] for group in groups for rule in group["rules"]}


@on_a_stack
def test_the_search_that_it_names_finds_what_is_sent(stack: Stack) -> None:
    [(_, command)] = [each for each in stack.urls() if "search" in each[0]]
    _, *words = shlex.split(command)
    until = time.monotonic() + DATA_TIMEOUT
    while not (found := events_found(words)):
        assert time.monotonic() < until
        time.sleep(SCRAPE_EVERY)
    assert {each["source"] for each in found} == {"github"}
    assert {each["key"] for each in found} == {"acme/1"}


def events_found(words: list[str]) -> list[dict[str, Any]]:
    told = subprocess.run(
        [sys.executable, "-m", "gateway", *words, "--json"], capture_output=True, text=True, check=True, timeout=60
    )
    return [found for found in map(json.loads, told.stdout.splitlines()) if "id" in found]


@on_a_stack
def test_an_invalid_query_says_why(stack: Stack) -> None:
    with pytest.raises(StackError, match="parse error"):
        ask(stack.prometheus, "sum by (")


@on_a_stack
def test_a_stopped_stack_leaves_nothing(stack: Stack) -> None:
    """The last one, since it ends what the others look at. That it is up is said only while all of it is."""
    folder = stack.folder
    files = list(folder.glob("*.pid"))
    ids = [int(file.read_text().split()[0]) for file in files]
    of_kafka = {"kafka", "router", "console"} if stack.log == "kafka" else set[str]()
    assert {file.stem for file in files} == {"ingress", "traffic", "prometheus", "alertmanager", *of_kafka}
    assert all(map(_is_there, ids))
    assert stack.is_up
    os.kill(ids[0], signal.SIGKILL)
    os.waitid(os.P_PID, ids[0], os.WEXITED | os.WNOWAIT)
    with pytest.raises(StackError, match=r"expected all of it to run, got .* ended"):
        _ = stack.is_up
    stack.down()
    assert not any(map(_is_there, ids))
    assert not folder.exists()


def _is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
