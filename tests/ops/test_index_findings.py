"""What `gateway status` says of a process's index."""

import re
from pathlib import Path
from typing import Any

import yaml

from gateway.engine.control.state import Control
from gateway.ops.findings import INDEX, Finding
from gateway.ops.index_findings import BEHIND
from gateway.ops.process_status import process_findings

GIB = 1 << 30
DAY = 86400.0
ALERTS = Path(__file__).parent.parent.parent / "deploy" / "prometheus" / "rules" / "alerts.yml"


def findings(**index: Any) -> list[Finding]:
    known = {
        "file": "/var/lib/gateway/index.db",
        "days": 7.0,
        "max_bytes": 8 * GIB,
        "held_up": None,
        "behind": behind(1.5),
        "events": 4_000_000,
        "bytes": 4 * GIB,
        "oldest": 1000.0,
        "oldest_age": 7 * DAY,
        "room": 100 * GIB,
    }
    return process_findings({"index": known | index}, "a:9090", Control())


def behind(seconds: float, *, reason: str = "") -> dict[str, Any]:
    since = 10_000 - seconds
    return {"topic": "gateway.events.github", "since": since, "seconds": seconds, "records": 12_000, "reason": reason}


def test_an_index_that_is_well_is_no_finding() -> None:
    assert findings() == []
    assert findings(behind=None, events=None, bytes=None, oldest=None, oldest_age=None, room=None) == []
    assert findings(events=0, bytes=8192, oldest=None, oldest_age=None) == []


def test_what_holds_it_up_is_told_and_not_also_that_it_is_behind() -> None:
    [found] = findings(held_up={"since": 100.0, "reason": "index.db: disk is full"}, behind=behind(4000.0))
    assert (found.rank, found.what, found.since, found.by) == (
        INDEX,
        "index /var/lib/gateway/index.db",
        100.0,
        "a:9090",
    )
    assert found.why == "held up: index.db: disk is full; searches find what it had before"
    assert found.needs_attention
    [found] = findings(held_up={"since": None, "reason": "KeyError, a bug of the gateway"}, bytes=None, behind=None)
    assert found.since is None


def test_one_that_is_behind_is_told_from_when_the_alert_is() -> None:
    [alert] = [
        rule
        for group in yaml.safe_load(ALERTS.read_text())["groups"]
        for rule in group["rules"]
        if rule["alert"] == "GatewayIndexBehind"
    ]
    [minutes] = re.findall(r"> (\d+) \* 60", alert["expr"])
    assert float(minutes) * 60 == BEHIND
    assert findings(behind=behind(BEHIND)) == []
    [found] = findings(behind=behind(7200.0))
    assert (found.why, found.since, found.count) == ("2 hours behind gateway.events.github", 2800.0, 12_000)
    assert found.needs_attention
    assert "made anew" in found.next[0]
    [found] = findings(behind=behind(7200.0, reason="no leader"))
    assert found.why == "2 hours behind gateway.events.github: no leader"
    assert "brokers" in found.next[0]


def test_a_file_at_its_bound_says_how_far_it_goes_back() -> None:
    [found] = findings(bytes=8 * GIB * 15 // 16, oldest=5000.0, oldest_age=3 * DAY)
    told = (
        "7.5 GiB of 8.0 GiB are used (--index-bytes), beyond which it drops its oldest events; it goes back 3 days of"
    )
    assert found.why == f"{told} 7 days (--index-days)"
    assert (found.since, found.count) == (5000.0, 4_000_000)
    assert not found.needs_attention, "it was given that bound"
    assert findings(bytes=8 * GIB * 15 // 16 - 1, oldest_age=3 * DAY) == []
    assert findings(bytes=8 * GIB, oldest_age=7 * DAY) == [], "it has all that it is to have"


def test_a_disk_without_room_for_the_bound_is_told_before_it_is_full() -> None:
    assert findings(room=4 * GIB) == []
    [found] = findings(room=3 * GIB)
    assert found.why == "its disk has 3.0 GiB left, and it may take 4.0 GiB more (--index-bytes)"
    assert not found.needs_attention
    [found] = findings(room=200 << 20)
    assert found.why == "its disk has 200 MiB left, and it may take 4.0 GiB more (--index-bytes)"
    assert found.needs_attention


def test_a_process_without_an_index_or_of_an_older_version_has_nothing_to_report() -> None:
    assert process_findings({"index": None}, "a:9090", Control()) == []
    assert process_findings({}, "a:9090", Control()) == []


def test_a_status_of_another_version_is_said_to_be_unreadable() -> None:
    [found] = process_findings({"index": {"file": "index.db"}, "version": "9"}, "a:9090", Control())
    assert found.why == "part of its status (version 9) can't be read here: index"
