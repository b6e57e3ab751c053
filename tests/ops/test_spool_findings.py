"""What `gateway status` says of a process's spool."""

import re
from pathlib import Path
from typing import Any

import yaml

from gateway.engine.control.state import Control
from gateway.ops.findings import NOT_READ, WAITING, Finding
from gateway.ops.process_status import process_findings
from gateway.ops.spool_findings import NEARLY_FULL

ALERTS = Path(__file__).parent.parent.parent / "deploy" / "prometheus" / "rules" / "alerts.yml"


def findings(**spool: Any) -> list[Finding]:
    known = {"events": 0, "bytes": 0, "oldest": None, "used": 0.0, "refuses": None, "waits": None}
    return process_findings({"spool": known | spool}, "a:9090", Control())


def test_an_empty_spool_and_none_are_no_finding() -> None:
    assert findings() == []
    assert process_findings({"spool": None}, "a:9090", Control()) == []
    assert process_findings({}, "a:9090", Control()) == [], "an older version has none"


def test_events_that_are_being_moved_are_told_and_not_wrong() -> None:
    [found] = findings(events=300, bytes=5000, oldest=100.0, used=0.1)
    assert (found.rank, found.what, found.since, found.by, found.count) == (WAITING, "spool", 100.0, "a:9090", 300)
    assert found.why == "acknowledged events that are on this process's disk alone, and being moved to the log"
    assert not found.needs_attention
    assert found.next == ()


def test_what_keeps_events_from_being_moved_is_told_with_the_next_step() -> None:
    [found] = findings(events=300, oldest=100.0, waits={"gateway.events.github": "gateway.events.github/3: no leader"})
    assert found.why.endswith("and not moved: gateway.events.github: gateway.events.github/3: no leader")
    assert found.needs_attention
    assert "brokers" in found.next[0]
    [found] = findings(events=1, oldest=1.0, waits={"": "kafka: connection refused"})
    assert found.why.endswith("and not moved: kafka: connection refused")
    reasons = {f"topic-{number}": "no leader" for number in range(5)}
    [found] = findings(events=9, oldest=1.0, waits=reasons)
    assert found.why.endswith("topic-0: no leader; topic-1: no leader; topic-2: no leader; and 2 more")
    missing = "expected a topic of the log, got none of this name (or one that we may not Describe)"
    [found] = findings(events=9, oldest=1.0, waits={"gateway.events.crm": missing})
    assert found.next == ("gateway topics create",)
    [found] = findings(events=9, oldest=1.0, waits={"gateway.events.crm": f"{missing}; spool.process-1.db: disk full"})
    assert found.next == ("gateway topics create",)
    large = "1 too large for the topic, and tried again every 5 min: MESSAGE_TOO_LARGE"
    [found] = findings(events=1, waits={"gateway.events.github": large})
    assert found.next == ("# raise the topic's max.message.bytes again: they are moved within five minutes",)


def test_a_spool_that_takes_no_more_is_told_first() -> None:
    problem = "expected 50 free bytes on its disk, got 49"
    full, events = findings(events=7, oldest=100.0, used=1.0, refuses=problem)
    assert (full.rank, full.since, full.count, full.needs_attention) == (NOT_READ, 100.0, 7, True)
    assert full.why == f"accepts no more: {problem}; while the log accepts none either, senders get 503"
    assert not events.needs_attention
    [found] = findings(used=1.0, refuses=problem)
    assert found.count is None


def test_one_that_is_nearly_full_is_told_from_when_the_alert_is() -> None:
    [alert] = [
        rule
        for group in yaml.safe_load(ALERTS.read_text())["groups"]
        for rule in group["rules"]
        if rule["alert"] == "GatewaySpoolFull"
    ]
    assert [float(each) for each in re.findall(r"> ([\d.]+)", alert["expr"])] == [NEARLY_FULL]
    assert len(findings(events=1, oldest=1.0, used=NEARLY_FULL)) == 1
    full, _ = findings(events=1, oldest=1.0, used=0.85)
    assert full.why == "nearly full: 85% of its bytes, its age or its disk are used"
    assert full.needs_attention
    full, _ = findings(events=1, oldest=1.0, used=1.0)
    assert full.why.startswith("nearly full: 100% of its bytes, its age or its disk are used; a topic ")


def test_a_status_of_another_version_is_said_to_be_unreadable() -> None:
    [found] = process_findings({"spool": {"events": 1}, "version": "9"}, "a:9090", Control())
    assert found.why == "part of its status (version 9) can't be read here: spool"
