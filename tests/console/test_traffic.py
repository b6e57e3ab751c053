"""Traffic on pages: numbers for people, charts, and the same for who hears them."""

from pathlib import Path

import pytest

from gateway.access.principal import AccessRole
from gateway.api.traffic_shapes import AttemptTraffic, DeliveryTraffic, Traffic, TrafficStep
from gateway.console.figures import chart, rate, success
from gateway.log.attempt_records import Decision
from gateway.model import Result
from tests.console.conftest import Console, console_of
from tests.console.furnished import HOLDS, RULES, furnished


def a_traffic(
    *, recorded: str = "all", delivered: int = 0, died: int = 0, dropped: int = 0, made: int = 0, failed: int = 0
) -> Traffic:
    """Return the traffic of an hour, in two steps."""
    steps = [
        TrafficStep(at=at, received=7 * n, deliveries=4 * n, delivered=0, died=n, attempts=2 * n, failed=n)
        for n, at in ((0, "2026-12-01T13:00:00.000Z"), (1, "2026-12-01T14:00:00.000Z"))
    ]
    return Traffic(
        since="2026-12-01T13:00:00.000Z",
        until="2026-12-01T15:00:00.000Z",
        step_seconds=3600,
        attempts_recorded=recorded,
        received=7,
        bytes=700,
        duplicates=0,
        deliveries=DeliveryTraffic(
            begun=delivered + died + dropped,
            delivered=delivered,
            done=0,
            dropped=dropped,
            waiting=0,
            unknown=0,
            died=died,
            dead=died,
            reasons=(),
        ),
        attempts=AttemptTraffic(made=made, failed=failed, retries=0, results=(), p50_seconds=None, p95_seconds=None),
        steps=tuple(steps),
    )


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, ""), (1, "12/d"), (2, "1/h"), (240, "2/min"), (7200, "1/s"), (9000, "1.2/s"), (72_000_000, "10,000/s")],
)
def test_a_rate_is_of_the_time_that_says_most(count: int, expected: str) -> None:
    assert rate(count, a_traffic()) == expected


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"delivered": 99, "died": 1}, "99 %"),
        ({"delivered": 100_000, "died": 1}, "99.9 %"),
        ({"delivered": 1, "died": 100_000}, "0.1 %"),
        ({"delivered": 3}, "100 %"),
        ({"died": 2, "dropped": 1}, "0 %"),
        ({}, ""),
        ({"delivered": 3, "recorded": "failures"}, None),
    ],
)
def test_what_isnt_all_isnt_told_as_all(counts: dict[str, int], expected: str | None) -> None:
    assert success(a_traffic(**counts)) == expected  # type: ignore[arg-type] # a case's own


def test_success_may_be_that_of_attempts() -> None:
    assert success(a_traffic(made=8, failed=2, died=1), of="attempts") == "75 %"


def test_a_chart_says_in_words_what_it_shows() -> None:
    told = chart(a_traffic(), "deliveries")
    assert "<title>4 deliveries since 2026-12-01 13:00 UTC, at most 4 in an hour; 1 dead</title>" in told
    assert 'd="M4 0h3v24h-3z"' in told
    assert 'class="bad" d="M4 18h3v6h-3z"' in told
    assert "<title>7 events since" in chart(a_traffic(), "received")


async def test_the_overview_has_the_traffic_of_now_of_the_hour_and_of_the_day(console: Console) -> None:
    company = console.company
    events = [(await company.event())[0] for _ in range(3)]
    for event in events:
        await company.attempt(event, result=Result.TIMEOUT, status=None, decision=Decision.RETRY)
    await company.die(events[-1])
    await console.refresh()
    page = await console.page()
    assert "Last day, by the hour" in page.text
    assert "3 events since" in page.text
    assert "3 attempts since" in page.text
    assert "Only failures are recorded" in page.text
    assert "Traffic of the last day by the hour" in page.text  # for who doesn't see the chart
    await company.attempt(events[-1], number=2)
    await console.refresh()
    page = await console.page()
    assert "Only failures are recorded" not in page.text
    assert "25 %" in page.text


async def test_pages_of_names_have_their_traffic(tmp_path: Path) -> None:
    company, _, _ = await furnished()
    async with console_of(company, tmp_path, RULES, HOLDS) as console:
        await console.refresh()
        for section, name in (("destinations", "crm"), ("routes", "book-charges"), ("sources", "stripe")):
            page = await console.page(section, name)
            assert "Traffic of the last day by the hour" in page.text
            assert ("Events received" in page.text) == (section == "sources")
        assert (await console.page("rules")).source.count('<svg class="chart"') == 4  # beside each route's line
        for section in ("destinations", "routes"):
            page = await console.page(section)
            assert "p50 / p95" in page.text
            assert page.source.count('<svg class="chart"') >= 3


async def test_without_an_index_pages_have_everything_else(console: Console) -> None:
    console.index = None
    assert "the index isn't available" in (await console.page("routes", "build")).text
    for section in ("", "routes", "destinations", "rules"):
        assert '<svg class="chart"' not in (await console.page(*([section] if section else []))).source


async def test_who_is_limited_sees_the_traffic_of_their_own_events(console: Console) -> None:
    for source in ("github", "github", "stripe"):
        event, *_ = await console.company.event(source=source)
        await console.company.die(event, route="audit", destination="ledger")
    await console.refresh()
    assert "3 events since" in (await console.page()).text
    assert "3 deliveries since" in (await console.page("routes", "audit")).text
    console.become(AccessRole.VIEWER, sources=frozenset({"stripe"}))
    page = await console.page()
    assert "1 event since" in page.text
    assert "1 delivery since" in (await console.page("routes", "audit")).text
