"""Routes that match nothing: what is improbable by their past is wrong, what may be meant is told."""

from collections.abc import Sequence
from dataclasses import replace
from math import comb, isclose
from typing import Any

import pytest

from gateway.engine.control.records import ControlRecord, Selection
from gateway.engine.control.state import Control
from gateway.ops.findings import NOT_READ, SOURCE, Finding
from gateway.ops.output import when
from gateway.ops.quiet_routes import MAX_NAMES, MAX_ROWS, MIN_EVENTS, quiet_route_findings
from gateway.ops.route_counts import Past

BEFORE = {"events": 110, "matched": 9, "event": "evt_9"}
REPLAY = "gateway replay --route refunds --from 1970-01-01T00:01:40.000Z --undelivered"


def changed(**sent: Any) -> dict[str, Any]:
    values = {"route": "refunds", "sources": ["shop"], "events": 104, "since": 100.0, "before": BEFORE}
    return {**values, "loaded_at": 101.0, "changed": ["route refunds: match"], **sent}


def missed(**sent: Any) -> dict[str, Any]:
    values = {"route": "refunds", "sources": ["shop"], "events": 104, "since": 100.0, "until": 160.0, "before": BEFORE}
    return {**values, **sent}


def new(*routes: str, **sent: Any) -> dict[str, Any]:
    return {"since": None, "sources": ["shop"], "events": 104, "event": "evt_104", "routes": routes, **sent}


def found(*processes: dict[str, Any] | None, control: Control | None = None, **words: Any) -> Sequence[Finding]:
    nothing: dict[str, Any] = {"new": [], "changed": [], "missed": []}
    answers = [
        ({} if each is None else {"quiet_routes": nothing | each}, f"p{number}:9090")
        for number, each in enumerate(processes, 1)
    ]
    return quiet_route_findings(answers, control or Control(), **words)


@pytest.mark.parametrize(
    ("events", "matched", "after"), [(110, 9, 104), (40, 20, 3), (10, 0, 50), (10, 10, 1), (1, 1, 99), (7, 3, 0)]
)
def test_the_chance_of_no_match_is_the_share_of_the_orders_in_which_all_matches_come_first(
    events: int, matched: int, after: int
) -> None:
    chance = Past(events=events, matched=matched, event="").chance_of_none(after)
    assert isclose(chance, comb(events, matched) / comb(events + after, matched))


def test_a_route_that_matches_nothing_since_its_condition_changed_is_wrong_where_that_is_improbable() -> None:
    (row,) = found({"changed": [changed()]})
    assert (row.rank, row.what, row.needs_attention, row.since, row.by) == (
        SOURCE,
        "route refunds",
        True,
        100.0,
        "p1:9090",
    )
    assert row.why == "matched none of 104 events of shop since its condition changed; before, 9 of 110"
    assert row.next == (
        f"# the rules loaded at {when(101.0)} changed route refunds: match",
        "# why it doesn't match an event that it matched before:",
        "gateway explain evt_9",
        "# once its condition is correct and active (`rules_reloaded`), recover what it missed (--dry-run counts):",
        REPLAY,
    )


@pytest.mark.parametrize(
    ("events", "past", "is_told"),
    [
        (104, {"events": 110, "matched": 3}, False),
        (40, {"events": 110, "matched": 9}, False),
        (6, {"events": 40, "matched": 40}, True),
        (0, {"events": 40, "matched": 40}, False),
        (10_000_000, {"events": 1_000_000_000, "matched": 1000}, True),
        (100_000, {"events": 1_000_000_000, "matched": 1000}, False),
    ],
)
def test_chance_is_not_reported(events: int, past: dict[str, int], *, is_told: bool) -> None:
    assert bool(found({"changed": [changed(events=events, before=BEFORE | past)]})) == is_told


def test_a_route_without_a_past_is_reported_but_not_wrong() -> None:
    (row,) = found({"new": [new("refunds")]})
    assert (row.what, row.needs_attention, row.since) == ("route refunds", False, None)
    assert row.why == "matched none of 104 events of shop since the process started"
    assert row.next == ("# why it doesn't match the last one:", "gateway explain evt_104")
    (row,) = found({"new": [new("refunds", since=100.0, events=MIN_EVENTS)]})
    assert (row.since, row.next[-1]) == (100.0, REPLAY)
    assert row.why == "matched none of 20 events of shop under its current rules"
    assert found({"new": [new("refunds", events=MIN_EVENTS - 1)]}) == []


def test_many_routes_without_a_past_are_one_row() -> None:
    names = [f"r{number:02}" for number in range(MAX_NAMES + 3)]
    assert len(found({"new": [new(*names[:MAX_ROWS])]})) == MAX_ROWS
    (row,) = found({"new": [new(*names)]})
    assert (row.what, row.needs_attention, row.count) == ("routes", False, len(names))
    assert row.why.endswith(f"at least 20 each: {', '.join(names[:MAX_NAMES])}, and 3 more")
    (row,) = found({"new": [new(*names)]}, routes={"r01"})
    assert row.what == "route r01", "of a destination"


def test_the_counts_of_processes_add_up_and_one_match_counts() -> None:
    half = changed(events=52, before=BEFORE | {"events": 55, "matched": 4})
    assert found({"changed": [half]}) == []
    other = half | {"since": 99.0, "before": BEFORE | {"events": 55, "matched": 5}}
    (row,) = found({"changed": [half]}, {"changed": [other]}, None)
    assert row.why == "matched none of 104 events of shop since its condition changed; before, 9 of 110"
    assert (row.since, row.by) == (99.0, "2 processes")
    assert found({"changed": [changed()]}, {}) == [], "it has matched some in the other one"
    assert found({"changed": [changed()]}, None), "an ingress, or one of an older version"
    (row,) = found({"changed": [half]}, {"new": [new("refunds", events=400)]})
    assert row.why.startswith("matched none of 452 events"), "one that was restarted has no past"


def test_missed_events_stay_wrong_after_a_condition_change_until_a_replay_finds_some() -> None:
    def replayed(count: int, at: float = 170.0, **selected: Any) -> ControlRecord:
        selection = replace(Selection(route="refunds", since=100.0, undelivered=True), **selected)
        return ControlRecord(kind="replay", name=f"{at}", state="done", at=at, selection=selection, count=count)

    (row,) = found({"missed": [missed()]})
    why = f"matched none of 104 events of shop until its condition changed at {when(160.0)}; before, 9 of 110"
    assert (row.why, row.needs_attention, row.since, row.until) == (why, True, 100.0, 160.0)
    told = "# if its condition is correct now, recover what it missed (count first with --dry-run):"
    assert row.next == (told, REPLAY)
    (row,) = found({"missed": [missed()]}, control=Control([replayed(0)]))
    assert (row.why, row.needs_attention) == (f"{why}; replayed since: 0 queued", True)
    assert row.next[1:] == ("gateway explain evt_9", told, REPLAY)
    for commands in (
        [replayed(0), replayed(9, at=180.0)],
        [replayed(9, source="shop")],
        [replayed(9), replayed(0, 180.0)],
    ):
        (row,) = found({"missed": [missed()]}, control=Control(commands))
        assert (row.why, row.needs_attention, row.next) == (f"{why}; replayed since: 9 queued", False, ())
    for other in (replayed(9, since=120.0), replayed(9, at=159.0), replayed(9, destination="ci")):
        (row,) = found({"missed": [missed()]}, control=Control([other]))
        assert (row.needs_attention, row.next[-1]) == (True, REPLAY), other
    assert found({"missed": [missed(events=40)]}) == [], "that may have been chance"
    (row,) = found({"missed": [missed(events=52)]}, {"missed": [missed(events=52, until=165.0)]})
    assert (row.until, row.why.split(" until")[0]) == (165.0, "matched none of 104 events of shop")
    assert found({"missed": [missed()]}, routes={"orders"}) == []


@pytest.mark.parametrize(
    "sent",
    [
        5,
        {"new": 5},
        {"changed": [{"route": "refunds"}]},
        {"changed": [changed(since="monday")]},
        {"changed": [changed(since=1e300)]},
        {"missed": [missed(until=-1.0)]},
        {"missed": [missed(before=None)]},
        {"new": [new("refunds", since="monday")]},
    ],
)
def test_unreadable_counts_are_reported_beside_the_others(sent: Any) -> None:
    nothing: dict[str, Any] = {"new": [], "changed": [], "missed": []}
    bad = sent if isinstance(sent, int) else nothing | sent
    good = nothing | {"changed": [changed()]}
    unread, row = quiet_route_findings([({"quiet_routes": bad}, "a:1"), ({"quiet_routes": good}, "b:1")], Control())
    assert (unread.rank, unread.what) == (NOT_READ, "a:1")
    assert row.what == "route refunds"
