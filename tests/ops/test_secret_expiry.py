"""Which secrets expire, as `gateway status` shows it."""

from typing import Any

import pytest

from gateway.engine.control.state import Control
from gateway.ops.findings import Finding
from gateway.ops.process_status import process_findings
from gateway.ops.secret_expiry import EXPIRY_ALERT, secret_statuses
from gateway.telemetry.secret_uses import SecretUses
from gateway.verify.key_ring import SecretLifetime

NOW = 1_700_000_000.0
DAY = 86400.0
FOREVER = SecretLifetime("secrets", 0)


def finding(*lifetimes: SecretLifetime, index: int = 1, events: int = 0, now: float = NOW) -> Finding | None:
    """Return what is shown of a process with these secrets, one of which has verified some events."""
    uses = SecretUses()
    for _ in range(events):
        uses.add("stripe", index, at=now)
    secrets = secret_statuses("stripe", lifetimes, uses, now=now, at=now)
    found = process_findings({"sources": [a_source(secrets)]}, "a:9090", Control())
    assert len(found) <= 1
    return found[0] if found else None


def a_source(secrets: Any) -> dict[str, Any]:
    counts: dict[str, Any] = {
        "events": 0.0,
        "since": None,
        "types": [],
        "newest": None,
        "missed_since": None,
        "missed": None,
    }
    identity = {**counts, "duplicates": 0.0, "conflicts": 0.0}
    source = {"source": "stripe", **counts, "unrouted": 0.0, "refused": {}, "identity": identity}
    return source if secrets is None else {**source, "secrets": secrets}


def test_a_secret_that_is_used_shortly_before_its_end_is_wrong() -> None:
    found = finding(FOREVER, SecretLifetime("secrets", 1, NOW + 3.5 * DAY), events=120)
    assert found is not None
    assert found.what == "source stripe"
    assert found.why == "secret 2 expires in 3 days, and 120 events verified with it in the last hour"
    assert (found.needs_attention, found.count, found.until, found.by) == (True, 120, NOW + 3.5 * DAY, "a:9090")
    assert "gateway explain stripe" in found.next


def test_one_that_nobody_uses_any_more_may_end() -> None:
    found = finding(FOREVER, SecretLifetime("secrets", 1, NOW + DAY))
    assert found is not None
    assert found.why == "secret 2 expires in 1 day, and 0 events verified with it in the last hour"
    assert not found.needs_attention
    over = finding(FOREVER, SecretLifetime("secrets", 1, NOW - 3700), events=5)
    assert over is not None
    assert (over.why, over.needs_attention, over.count) == ("secret 2 expired 1 hour ago", False, None)


@pytest.mark.parametrize("lifetimes", [(FOREVER,), (FOREVER, SecretLifetime("secrets", 1, NOW + EXPIRY_ALERT + 1)), ()])
def test_what_does_not_end_within_a_week_is_not_shown(lifetimes: tuple[SecretLifetime, ...]) -> None:
    assert finding(*lifetimes, events=5) is None


def test_the_last_of_a_list_is_wrong_though_nothing_came() -> None:
    found = finding(SecretLifetime("secrets", 0, NOW + 90), index=0)
    assert found is not None
    assert found.needs_attention
    assert found.why.endswith("; no other lasts longer, so all requests are refused then")
    expired = finding(SecretLifetime("public_keys", 0, NOW - 1), index=0)
    assert expired is not None
    assert expired.needs_attention
    assert expired.why.startswith("public key 1 expired less than a minute ago; no other lasts longer, so all")


def test_a_process_of_an_older_version_says_nothing_of_it() -> None:
    assert process_findings({"sources": [a_source(None)]}, "a:9090", Control()) == []
