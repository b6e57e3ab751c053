"""What each route has matched since its condition changed, and before."""

from pathlib import Path
from typing import Any

import pytest

from gateway.ops.route_counts import RouteCounts
from gateway.ops.source_counts import InForce
from gateway.rules.load import load_rules
from gateway.rules.rules import Rules
from gateway.rules.watch import changes
from gateway.telemetry.route_matches import RouteMatches
from tests.builders import an_event

HOUR = 3600.0
RULES = """
version: 1
sources:
  shop: {{verify: {{scheme: none}}, type: body.{kind}}}
  crm: {{verify: {{scheme: none}}}}
destinations: {{ci: {{url: "http://ci"}}, erp: {{url: "http://erp"}}}}
routes:
  - {{name: orders, from: shop, match: {{type: order}}, to: [ci]}}
  - {{name: refunds, from: {refunds_from}, match: {{type: {refunds}}}, to: [{to}]}}
  - {{name: large, from: shop, when: body.total > {large}, to: [ci]}}
{more}
"""
FIRST = {"kind": "kind", "refunds_from": "shop", "refunds": "refund", "to": "ci", "large": "9", "more": ""}
OTHER = "  - {name: crm, from: crm, to: [ci]}"


class Running:
    """A process whose rules a test changes, at whole seconds, and that routes what it is handed."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.now = 1000.0
        self.totals = RouteMatches()
        self.counts = RouteCounts(self.totals, remembered=HOUR)
        self._values = FIRST
        self.rules = self._load()

    def _load(self) -> Rules:
        self._file.write_text(RULES.format(**self._values))
        return load_rules(self._file)

    def change(self, **values: str) -> None:
        self._values = {**self._values, **values}
        old, self.rules = self.rules, self._load()
        changed, self.now = changes(old, self.rules), self.now + 10
        in_force = InForce(since=self.now - 1, loaded_at=self.now, changed=changed.changed)
        self.counts.change(changed, old, self.rules, in_force, now=self.now, at=self.now)

    def route(self, count: int, *routes: str, source: str = "shop") -> None:
        for _ in range(count):
            number = self.totals.events.get(source, 0) + 1
            self.totals.add(an_event(id=f"evt_{source}_{number}", source=source), routes)

    def status(self, part: str) -> dict[str, Any]:
        """Return what is sent of each route; of a group it is the same for each."""
        sent = self.counts.status(self.rules, now=self.now, at=self.now)[part]
        return {name: each for each in sent for name in ([each["route"]] if "route" in each else each["routes"])}


@pytest.fixture
def process(tmp_path: Path) -> Running:
    return Running(tmp_path / "routes.yaml")


def test_routes_that_have_matched_nothing_since_the_process_started_are_sent_in_groups(process: Running) -> None:
    process.route(95, "orders")
    process.route(9)
    assert process.counts.status(process.rules, now=0.0, at=0.0) == {
        "new": [
            {
                "since": None,
                "sources": ("shop",),
                "events": 104,
                "event": "evt_shop_104",
                "routes": ["refunds", "large"],
            }
        ],
        "changed": [],
        "missed": [],
    }


def test_a_changed_condition_sends_its_earlier_matches(process: Running) -> None:
    process.route(101, "orders")
    process.route(9, "refunds", "large")
    process.change(refunds="refnd")
    assert process.status("changed")["refunds"]["events"] == 0
    process.route(95, "orders")
    process.route(9, "large")
    assert process.status("changed") == {
        "refunds": {
            "route": "refunds",
            "sources": ("shop",),
            "events": 104,
            "since": 1009.0,
            "loaded_at": 1010.0,
            "changed": ("route refunds: match",),
            "before": {"events": 110, "matched": 9, "event": "evt_shop_110"},
        }
    }
    assert process.status("new") == {}
    process.route(1, "refunds")
    assert process.status("changed") == {}


def test_changes_elsewhere_restart_no_count(process: Running) -> None:
    process.route(10, "orders")
    process.change(to="erp")
    process.change(more=OTHER)
    assert process.status("new")["refunds"] == process.status("new")["large"]
    assert process.status("new")["refunds"]["events"] == 10
    assert process.status("new")["crm"]["since"] == 1019.0


@pytest.mark.parametrize("values", [{"kind": "knd"}, {"large": "90000"}])
def test_a_when_or_the_source_s_type_are_conditions_too(process: Running, values: dict[str, str]) -> None:
    process.route(10, "orders", "large")
    process.change(**values)
    process.route(7)
    (changed,) = process.status("changed")["large"]["changed"]
    assert changed in ("source shop: type", "route large: when")
    assert process.status("changed")["large"]["before"]["matched"] == 10


def test_a_route_with_other_sources_or_a_reused_name_has_no_past(process: Running) -> None:
    process.change(more=OTHER)
    process.route(10, "refunds")
    process.route(5, "crm", source="crm")
    process.change(refunds_from="crm")
    process.route(6, "crm", source="crm")
    assert process.status("changed") == {}
    assert process.status("new")["refunds"]["events"] == 6
    process.change(more="")
    process.change(more=OTHER)
    process.route(3, source="crm")
    assert (process.status("changed"), process.status("new")["crm"]["events"]) == ({}, 3)


def test_a_routes_missed_count_is_sent_for_an_hour_after_the_next_change(process: Running) -> None:
    process.route(20, "refunds")
    before = {"events": 20, "matched": 20, "event": "evt_shop_20"}
    process.change(refunds="refnd")
    process.change(refunds="rfund")
    assert process.status("missed") == {}, "nothing came"
    process.route(30)
    process.change(refunds="refundd")
    assert process.status("missed")["refunds"] == {
        "route": "refunds",
        "sources": ("shop",),
        "events": 30,
        "since": 1019.0,
        "until": 1030.0,
        "before": before,
    }
    assert process.status("changed")["refunds"]["before"] == before
    process.route(12)
    process.change(refunds="refund")
    process.route(1, "refunds")
    missed = process.status("missed")["refunds"]
    assert (missed["events"], missed["since"], missed["until"], missed["before"]) == (42, 1019.0, 1040.0, before)
    process.now += HOUR
    assert process.status("missed")
    process.now += 1
    assert process.status("missed") == {}


def test_removed_names_are_forgotten(process: Running) -> None:
    process.change(more=OTHER)
    process.route(5, "crm", source="crm")
    process.change(more="")
    assert "crm" in process.totals.events, "it is still a source"
    assert not process.totals.matched.keys() & {"crm"}
    assert not process.totals.last_match.keys() & {"crm"}
