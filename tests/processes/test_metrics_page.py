"""The metrics of several processes on one page, which Prometheus reads as one process's."""

from collections.abc import Mapping

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from gateway.processes.metrics_page import ProcessState, metrics_page
from gateway.telemetry.metrics import OPEN_METRICS, Metrics, exposition

STATES = [ProcessState(number=number, pid=4711 + number, is_ready=True, restarts=number) for number in range(3)]


async def pages_of(numbers: Mapping[int, int], content_type: str) -> dict[int, bytes]:
    """Return the pages of processes that have accepted so many events each."""
    found = {}
    for process, count in numbers.items():
        registry = CollectorRegistry()
        metrics = Metrics(registry)
        metrics.events.labels('a "quoted" \\ name').inc(count)
        metrics.request_duration.labels("github").observe(0.02)
        found[process] = b"".join([piece async for piece in exposition(registry, content_type)])
    return found


@pytest.mark.parametrize("content_type", ["text/plain", f"{OPEN_METRICS}; version=1.0.0"])
async def test_each_series_has_its_process_and_each_family_stands_once(content_type: str) -> None:
    is_open = content_type.startswith(OPEN_METRICS)
    pages = await pages_of({0: 3, 2: 4}, content_type)
    text = metrics_page(pages, STATES, is_open=is_open).decode()
    parse = openmetrics.text_string_to_metric_families if is_open else text_string_to_metric_families
    families = {family.name: family for family in parse(text)}
    single = {family.name: family for family in parse(pages[0].decode())}
    assert {*families} == {*single, "gateway_process_up", "gateway_process_restarts"}
    for name, family in single.items():
        assert (families[name].type, families[name].documentation) == (family.type, family.documentation)
        of_first = [each for each in families[name].samples if each.labels["process"] == "0"]
        without = [{**each.labels} for each in of_first]
        for labels in without:
            del labels["process"]
        assert [each.name for each in of_first] == [each.name for each in family.samples]
        assert without == [each.labels for each in family.samples]
        assert {each.labels["process"] for each in families[name].samples} <= {"0", "2"}
    events = [each for each in families["gateway_events"].samples if each.labels["source"] == 'a "quoted" \\ name']
    assert [(each.labels["process"], each.value) for each in events if each.name.endswith("_total")] == [
        ("0", 3.0),
        ("2", 4.0),
    ]
    up = {each.labels["process"]: each.value for each in families["gateway_process_up"].samples}
    assert up == {"0": 1.0, "1": 0.0, "2": 1.0}
    restarts = {each.labels["process"]: each.value for each in families["gateway_process_restarts"].samples}
    assert restarts == {"0": 0.0, "1": 1.0, "2": 2.0}
    assert text.endswith("# EOF\n") == is_open
    assert text.count("# EOF") == int(is_open)


async def test_without_an_answer_the_page_says_so() -> None:
    text = metrics_page({}, STATES, is_open=False).decode()
    assert text.count('gateway_process_up{process="') == 3
    assert "} 1\n" not in text.partition("# HELP gateway_process_restarts")[0]
